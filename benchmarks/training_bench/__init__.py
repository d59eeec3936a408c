"""Training: the published loop and ours as worker processes that take turns, and what each turn measures."""
