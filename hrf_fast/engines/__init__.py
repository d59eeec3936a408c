"""Whatever owns the weights: gradients, optimizer, sharding."""
