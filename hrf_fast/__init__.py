"""Hierarchical reward fine-tuning of diffusion models (arXiv 2410.08315)."""

from hrf_fast.version import __version__

__all__ = ["__version__"]
