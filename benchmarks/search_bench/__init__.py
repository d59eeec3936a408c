"""HRF-D's searches: what each would choose from equal measurements, and what its choices lose."""
