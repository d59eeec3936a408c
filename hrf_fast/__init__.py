"""Hierarchical reward fine-tuning of diffusion models (arXiv 2410.08315)."""

__version__ = "0.1.0"
