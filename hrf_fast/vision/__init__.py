"""Networks that look at images, for rewards and metrics: shipped ones, and transformers' by folder or hub id."""
