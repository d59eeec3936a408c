"""The algorithm's own objects: groups, calls, advantages and the numbers of the update. Nothing is loaded here."""

from __future__ import annotations

from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.engines.optimizers import learning_rate_at
from hrf_fast.policies.sampler import Sampler
from hrf_fast.training.advantages import Advantages, build_advantages
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.components import Algorithm
from hrf_fast.training.groups import Groups
from hrf_fast.training.optimizer_step import Clips
from hrf_fast.training.reference import reference_at
from hrf_fast.training.step_weights import range_factors, step_weights
from hrf_fast.training.thinning import Thinning


def build_groups(config: Config) -> Groups:
    """The groups of an iteration, and this rank's share."""
    train = config.train
    return Groups(train.groups_per_iteration, train.group_size, train.groups_per_step, comm.rank(), comm.world_size())


def build_call_plan(config: Config) -> CallPlan:
    """How samples are put into network calls, before any graph is kept."""
    train = config.train
    return CallPlan(train.group_size, config.compute.images_per_call, train.order, halves=train.gradient_noise)


def build_algorithm(config: Config, sampler: Sampler) -> Algorithm:
    """The numbers of the algorithm."""
    train, optimizer = config.train, config.optimizer
    return Algorithm(
        seed=config.run.seed,
        clips=Clips(
            train.clip_range,
            train.advantage_clip,
            train.scale_clips_by_window,
            step_weights(train.step_weights, sampler),
            range_factors(train.clip_steps, sampler),
        ),
        inner_epochs=train.inner_epochs,
        skip_not_finite=config.stop.on_nan == "skip",
        max_drift=config.stop.max_drift,
        learning_rate=learning_rate_at(
            optimizer.learning_rate_schedule,
            peak=optimizer.learning_rate,
            burn_in_iterations=optimizer.burn_in_iterations,
            warmup_iterations=optimizer.warmup_iterations,
            iterations=train.iterations,
        ),
        guided=train.guidance,
        shared_noise=config.window.shared_noise,
        gae_lambda=train.gae_lambda,
        sharpness=config.remedies.matching,
        thinning=Thinning(train.step_share, train.skip_flat_groups),
        lr_warmup=optimizer.burn_in_iterations + optimizer.warmup_iterations,
        reference=reference_at(
            config.remedies, num_inference_steps=config.sample.num_inference_steps, iterations=train.iterations
        ),
    )


def build_config_advantages(config: Config) -> Advantages:
    """Build what train.advantages names."""
    names = ("advantage_floor", "advantage_scale", "advantage_baseline", "prompt_buffer", "prompt_min_count")
    options = {name: getattr(config.train, name) for name in names}
    return build_advantages(config.train.advantages, reward_band=config.remedies.reward_band, **options)
