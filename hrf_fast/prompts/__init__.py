"""Prompts: what text-to-image groups are asked to show."""

from hrf_fast.prompts.base import Prompt

__all__ = ["Prompt"]
