"""The ranks of a job, and the heartbeat by which a dead one is found."""
