"""The kernels: who computes the loss, what its compiled code is made of, and how both are counted and timed."""
