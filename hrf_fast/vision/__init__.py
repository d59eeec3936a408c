"""Networks that look at images, for rewards and metrics."""
