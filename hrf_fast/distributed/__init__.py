"""The ranks of a job, what their launcher says, and the watch by which a dead one is found."""
