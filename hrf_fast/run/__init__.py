"""A run's folder: logs, checkpoints, progress, interrupts."""
