"""The arms of the toys: every method and remedy of the trainer as words of a configuration."""

from __future__ import annotations

STEPS = 8
"""T."""
EVALUATIONS = 100_000
"""Network evaluations of a run, in which a backward counts two."""
LEARNING_RATES = (6e-4, 1.2e-3, 2.4e-3)
"""Each arm's is chosen of these on seeds that are not compared."""

# the run's own panel is small: experiment.py counts the modes of a larger one
COMMON = (
    *("model.name=toy", f"sample.num_inference_steps={STEPS}", "train.iterations=1000"),
    *(f"stop.max_evaluations={EVALUATIONS}", "stop.max_drift=0", "optimizer.weight_decay=0"),
    # all steps of an iteration in one call of the update
    *("compute.activations=replay", "compute.images_per_call=8192", "evaluation.network=points"),
    *("evaluation.panel_size=8", "run.save_every=0", "run.progress=quiet"),
    # where the MLP is
    "run.device=cpu",
)
# a batch of 256 from pure noise, and its rewards standardised over it
_DDPO = ("window.schedule=full", "train.groups_per_iteration=1", "train.groups_per_step=1", "train.group_size=256")
# windows are cheaper than whole trajectories, so an iteration has more samples at about the cost of DDPO's
_HRF = ("train.groups_per_iteration=4", "train.groups_per_step=4", "train.group_size=96")
# all but the two published ones take the factor 1/std out of the gradient: see docs/numerics.md
_STD_DDPO, _STD_HRF = ((*arm, "train.step_weights=std") for arm in (_DDPO, _HRF))
_CREDIT = (*_STD_DDPO, "train.gae_lambda=0")
_PENALTY = ("remedies.reference_penalty=3",)
# a group is one state here, so that an iteration has more groups of fewer samples
_SHARED = (
    *(*_STD_HRF, "window.kwargs.clusters=[[4,8]]", "window.shared_noise=true"),
    *("train.groups_per_iteration=20", "train.groups_per_step=20", "train.group_size=32"),
)

ARMS: dict[str, tuple[str, ...]] = {
    "DDPO": _DDPO,
    "DDPO, weights by std": _STD_DDPO,
    "DDPO, credit": _CREDIT,
    "DDPO, credit and penalty": (*_CREDIT, *_PENALTY),
    "DDPO + KL": (*_STD_DDPO, "remedies.kl_weight=0.005"),
    "DDPO + penalty": (*_STD_DDPO, *_PENALTY),
    "DDPO, no std": (*_STD_DDPO, "train.advantage_scale=none"),
    "DDPO + novelty": (*_STD_DDPO, "train.advantage_scale=none", "remedies.novelty=true"),
    "DDPO + matching": (*_STD_DDPO, "remedies.matching=1", "train.advantage_clip=256"),
    "DDPO + band": (*_STD_DDPO, "remedies.reward_band=1"),
    "from re-noised": (*_STD_HRF, "window.schedule=full", "window.kwargs.renoised=true", "train.group_size=64"),
    "HRF, published": (*_HRF, "window.kwargs.iterations_per_cluster=6"),
    "HRF, clean half": (*_STD_HRF, "window.kwargs.clusters=[[4,8]]", "train.group_size=160"),
    "HRF, clean half, shared noise": _SHARED,
    "HRF, clean half, shared noise, credit": (*_SHARED, "train.gae_lambda=0"),
    "HRF-D": (*_STD_HRF, "window.schedule=dynamic"),
    "random": (*_STD_HRF, "window.schedule=random"),
    "progressive": (*_STD_HRF, "window.schedule=progressive", "window.kwargs.iterations=12"),
}
