"""Diffusion models as denoising policies."""
