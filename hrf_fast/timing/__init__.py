"""Timing: how long network calls take, for `hrf plan` and for what compute.auto_tune chooses."""
