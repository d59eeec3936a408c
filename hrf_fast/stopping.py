"""Stopping: rules that end a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """The end that the configuration sets: a number of iterations, or of network evaluations if that comes first."""

    iterations: int
    max_evaluations: int = 0
    """The run stops after the iteration in which the evaluations pass this number; 0 sets no such end."""

    def reached(self, iteration: int, evaluations: int) -> str | None:
        """The reason to stop after `iteration` iterations, or None to go on."""
        if 0 < self.max_evaluations <= evaluations:
            return f"stop.max_evaluations is {self.max_evaluations}"
        return f"train.iterations is {self.iterations}" if iteration >= self.iterations else None

    @property
    def unit(self) -> tuple[str, int]:
        """The unit that progress is shown in, and how many of it there will be."""
        return ("evaluations", self.max_evaluations) if self.max_evaluations else ("iterations", self.iterations)
