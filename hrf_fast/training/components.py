"""Components: the model and everything that acts on it, as values; assembly/ makes them from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hrf_fast.distributed import comm
from hrf_fast.engines.base import Engine
from hrf_fast.evaluation.panel import Panel, PanelMetrics
from hrf_fast.policies.base import Policy
from hrf_fast.policies.network import NetworkCalls
from hrf_fast.prompts import Prompt
from hrf_fast.prompts.draw import Prompts
from hrf_fast.registry import load_state_of, state_of
from hrf_fast.rewards import CombinedReward
from hrf_fast.training.advantages import Advantages
from hrf_fast.training.anchors import Anchors
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.gradient_noise import NoiseScale
from hrf_fast.training.groups import Groups
from hrf_fast.training.optimizer_step import Clips
from hrf_fast.training.reference import NO_REFERENCE, ReferenceWeights
from hrf_fast.training.rewarding import Rewarder
from hrf_fast.training.thinning import Thinning
from hrf_fast.windows.base import WindowSchedule


@dataclass(frozen=True)
class Algorithm:
    """The algorithm as numbers and functions of the iteration."""

    seed: int
    """Seed of all randomness in training."""
    clips: Clips
    inner_epochs: int
    """Passes over an iteration's rollouts."""
    skip_not_finite: bool
    """Skip optimizer steps of a reward or gradient that is not finite, instead of stopping."""
    max_drift: float
    """Largest drift, in nats per pixel, that an iteration's last optimizer step may cause; 0 for any."""
    learning_rate: Callable[[int], float]
    """By iteration."""
    guided: bool = True
    """Whether rollouts and updates are under the policy's guidance; panels are in either case."""
    shared_noise: bool | None = None
    """Whether a group's samples start from one noise; None leaves that to the window schedule."""
    reference: Callable[[int], ReferenceWeights] = lambda iteration: NO_REFERENCE
    """By iteration."""
    gae_lambda: float | None = None
    """λ of the credit of single steps; None credits all with the final reward."""
    sharpness: float = 0.0
    """Sharpness of trajectories that are matched to their rewards; 0 leaves advantages as they are."""
    thinning: Thinning = Thinning()
    lr_warmup: int = 0
    """Iterations until the learning rate is the configuration's."""

    def lr_warmup_note(self, done: int) -> str:
        """A line for a run that ended after `done` iterations, before its learning rate was the one asked for."""
        if not 0 < done < self.lr_warmup:
            return ""
        reached, asked = self.learning_rate(done - 1), self.learning_rate(self.lr_warmup)
        return (
            f"the run has ended within its warm-up: its last learning rate was {reached:.3g}, of {asked:.3g}; train "
            f"longer, or set optimizer.warmup_iterations and burn_in_iterations to fewer together"
        )


@dataclass(frozen=True)
class Components:
    """One run's parts."""

    policy: Policy
    engine: Engine
    reward: CombinedReward
    rewarder: Rewarder
    schedule: WindowSchedule
    advantages: Advantages
    groups: Groups
    call_plan: CallPlan
    algorithm: Algorithm
    noise_scale: NoiseScale
    """Adds up what train.gradient_noise measures."""
    panel: Panel
    term_weights: Mapping[str, float] | None = None
    """Weights of reward terms that are standardised one by one; None standardises their sum."""
    anchors: Anchors = field(default_factory=Anchors)
    prompts: Prompts | None = None
    """The groups' source; None for a model that takes none."""
    notes: tuple[str, ...] = ()
    """Choices that were made for the user, to be printed at the start."""
    sources: Mapping[str, dict[str, str]] = field(default_factory=dict)
    """The user's reward, schedule, prompts and advantages by name, as `source_of` gives them."""

    def evaluate_panel(self) -> PanelMetrics:
        """Evaluate the panel with the current weights, or the averaged ones; its calls are not training's."""
        with self.policy.uncounted(), self.engine.gathered(ema=True):
            return self.panel.evaluate(self.policy, self.reward)

    def draw_prompts(self, iteration: int) -> list[Prompt | None]:
        """The prompt of every group of an iteration, equal on all ranks; None for each without a source."""
        source, count = self.prompts, self.groups.per_iteration
        if source is None:
            return [None] * count
        # a function of the user's may draw otherwise on every rank
        return [*comm.main_says(lambda: source.draw(self.algorithm.seed, iteration, count))]

    def state(self, iteration: int) -> dict[str, Any]:
        """The part of a checkpoint after `iteration` iterations beside weights and optimizer.

        JSON-able but for `tensors`, which are tensors by name.
        """
        schedule = state_of(self.schedule, "schedule", "window.schedule")
        advantages = state_of(self.advantages, "advantages", "train.advantages")
        calls = asdict(self.policy.calls)
        return {"iteration": iteration, "calls": calls, **schedule, **advantages, **self.anchors.state()}

    def restore(self, state: dict[str, Any] | None) -> int:
        """Restore what `state` gave, or start anew; returns how many iterations are done.

        Raises:
            ValueError: a run has ended with these components.
        """
        if self.rewarder.closed:
            raise ValueError(
                "a run has ended with these components, also one that was refused; `build_components` makes others"
            )
        self.policy.calls = NetworkCalls(**state["calls"]) if state else NetworkCalls()
        self.anchors.load_state(state or {})
        load_state_of(self.schedule, state or {}, "schedule", "window.schedule")
        load_state_of(self.advantages, state or {}, "advantages", "train.advantages")
        return state["iteration"] if state else 0
