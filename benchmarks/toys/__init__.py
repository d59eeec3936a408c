"""Mixtures of Gaussians in the plane and an MLP that samples them, for experiments of seconds."""
