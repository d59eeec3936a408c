"""Every option, as dataclasses with a docstring under each field; `hrf train --help` prints them.

A field carries its range, its choices and what a change means (facts.py). How options are read and layered is load.py,
what they may be together rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from hrf_fast.config.facts import Facts, option

SAMPLERS = ("ddim", "ddpm")
LEARNING_RATE_SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16")
ATTENTIONS = ("sdpa", "xformers")
OPTIMIZERS = ("adamw", "fused_adamw", "cpu_adam", "adamw_8bit", "paged_adamw_8bit")
# noise.py makes keys of 32 bits
LARGEST_SEED = 2**32 - 1


@dataclass
class ModelConfig:
    """The pretrained model to fine-tune."""

    name: str = option("fashion", panel=True)
    """`fashion` or `portraits` (shipped), a diffusers folder, or a hub id such as google/ddpm-celebahq-256."""
    revision: str | None = option(None, panel=True)
    """Branch, tag or commit of a hub id."""
    variant: str | None = option(None, panel=True)
    """Variant of the weight files, such as fp16 for *.fp16.safetensors; null for the plain ones."""


@dataclass
class SampleConfig:
    """The sampler, in training and in evaluation."""

    scheduler: str = option("ddim", choices=SAMPLERS, panel=True)
    """DDIM, or DDPM's ancestral sampling."""
    num_inference_steps: int = option(40, at_least=1, panel=True)
    """Denoising steps, T; the paper uses 40."""
    eta: float = option(1.0, above=0, at_most=1, panel=True)
    """Noise scale of DDIM; leave it at 1 for ddpm."""


@dataclass
class WindowConfig:
    """Which denoising steps are trained."""

    schedule: str = option("clusters")
    """full (DDPO), clusters (HRF), dynamic (HRF-D), random, sliding, or module:function."""
    kwargs: dict[str, Any] = option({})
    """The schedule's own options, e.g. {clusters: [[0, 20], [20, 40]], iterations_per_cluster: 35}."""


@dataclass
class RewardTerm:
    """One term of the reward; several terms are a weighted sum."""

    name: str = ""
    """A registered name (see `hrf rewards`) or "module:function" for a function of your own."""
    weight: float = 1.0
    """Factor of the term; negative to minimise it, 0 to log it without training on it."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the reward, by name."""


@dataclass
class RewardConfig:
    """The reward that is maximised: one by name, or a weighted sum of `terms`."""

    name: str | None = option("jpeg_compressibility", panel=True)
    """A name from `hrf rewards` or module:function; null when `terms` are given."""
    kwargs: dict[str, Any] = option({}, panel=True)
    """The reward's own options."""
    terms: list[RewardTerm] = option([], panel=True)
    """Terms {name, weight, kwargs} of a weighted sum."""


@dataclass
class TrainConfig:
    """The RL algorithm. Defaults are those of the HRF authors' code where it has them."""

    iterations: int = option(70, at_least=1, resumable=True)
    """Rollout and update, this many times. A resume may raise it where the learning rate is constant."""
    groups_per_iteration: int = option(4, at_least=1)
    """Groups per iteration; in HRF each has an anchor."""
    group_size: int = option(5, at_least=2)
    """Samples of a group; they share an anchor."""
    groups_per_step: int = option(1, at_least=1)
    """Groups averaged into one optimizer step; 1 as published. Must divide groups_per_iteration."""
    inner_epochs: int = option(1, at_least=1)
    """Passes over an iteration's rollouts."""
    order: str = option("collect", choices=("collect", "on_policy"))
    """collect rolls out all groups, then makes the optimizer steps, as published; on_policy rolls out one step's groups
    at a time, so that each step learns from the current policy."""
    advantages: str = option("group", choices=("group", "batch"))
    """Peers that rewards are standardised against: the group, or all groups of the iteration (batch)."""
    advantage_floor: float = option(1e-6, above=0)
    """Least standard deviation to divide by, in units of the reward."""
    advantage_clip: float = option(2.5, above=0)
    """Bound on |advantage|."""
    clip_range: float = option(1e-4, above=0)
    """Half-width of the ratio's range; log-probs are means over pixels, so useful values are small."""
    scale_clips_by_window: bool = option(True)
    """Multiply both clips by (T − start)/T, as HRF does; the full window of DDPO has factor 1."""


@dataclass
class OptimizerConfig:
    """AdamW: the implementation, the learning rate and the averaging of weights."""

    name: str = option("adamw", choices=OPTIMIZERS)
    """torch's AdamW, its fused form, DeepSpeed's for ZeRO offload (cpu_adam), or bitsandbytes' with 8-bit state. The
    paged form needs CUDA and is paged until a resume."""
    learning_rate: float = option(5e-6, above=0)
    """Peak learning rate."""
    learning_rate_schedule: str = option("constant", choices=LEARNING_RATE_SCHEDULES)
    """Learning rate after the warm-up; cosine falls to zero at the last iteration."""
    warmup_iterations: int = option(0, at_least=0)
    """Iterations of linear warm-up."""
    weight_decay: float = option(1e-3, at_least=0)
    """Decoupled weight decay."""
    kwargs: dict[str, Any] = option({})
    """AdamW's own options: betas, its two averaging factors ([0.9, 0.999]), and eps (1e-8)."""
    max_grad_norm: float = option(1.0, at_least=0)
    """Gradients are scaled down to this norm; 0 turns it off."""
    ema_decay: float = option(0.0, at_least=0, below=1)
    """Decay, per optimizer step, of averaged weights that panels and the final model use, such as 0.999; 0 for none."""

    @property
    def betas(self) -> tuple[float, float]:
        first, second = self.kwargs.get("betas", (0.9, 0.999))
        return first, second

    @property
    def eps(self) -> float:
        return float(self.kwargs.get("eps", 1e-8))


@dataclass
class ComputeConfig:
    """How the machine computes the algorithm: precision, memory, compilation, batches."""

    precision: str = option("fp32", choices=PRECISIONS, panel=True)
    """fp32, or autocast to bf16 or fp16 over fp32 weights; fp16 scales the loss and is for CUDA."""
    activations: str = option("replay", choices=("auto", "keep", "replay", "checkpoint"), resumable=True)
    """Activations of window steps. keep holds those of the rollout for the update (order on_policy); replay runs the
    steps again; checkpoint also runs each UNet block again in the backward, for least memory; auto keeps as many as fit
    into memory."""
    memory_budget: str | None = option(None, resumable=True)
    """Memory that activations=auto may plan for, per process, such as 24GB; null for all that is free at the start."""
    images_per_call: int = option(0, at_least=0)
    """Most images in a network call: larger groups are split, smaller ones share calls, and an update of the order
    collect replays several steps at once. 0: a group and a step to a call, as published, and 64 images where nothing is
    trained. Another number rounds otherwise."""
    attention: str = option("sdpa", choices=ATTENTIONS)
    """Implementation of attention: torch's own, or xformers (CUDA)."""
    channels_last: bool = option(False)
    """Weights and activations of the UNet in channels_last order; under DeepSpeed activations only."""
    compile: str = option("none", choices=("none", "unet", "blocks"))
    """torch.compile for the UNet: none, unet (one graph) or blocks (a graph for each down, mid and up block)."""
    deterministic: bool = option(True)
    """Equal seeds give equal bits, and fp32 is fp32. false is faster and for CUDA: matrix products and convolutions in
    TF32, and cudnn times its convolutions and takes the fastest."""


@dataclass
class StopConfig:
    """Ends of a run before its last iteration."""

    max_evaluations: int = option(0, at_least=0, resumable=True)
    """Stop after the iteration in which the UNet's evaluations pass this number (a backward counts two); 0 never."""
    on_nan: str = option("stop", choices=("stop", "skip"), resumable=True)
    """Answer to a reward or gradient that is not finite: stop, or skip the optimizer steps that it belongs to."""
    max_drift: float = option(4.0, at_least=0, resumable=True)
    """Stop with an error where an iteration's last optimizer step changes the log-prob of its own samples by more than
    this, in nats per pixel: such a step has wrecked the model; 0 never stops."""


@dataclass
class EvaluationConfig:
    """The panel: images from fixed noise, evaluated before, during and after."""

    every: int = option(10, at_least=0, resumable=True)
    """Iterations between panels; 0 for only the first and last."""
    panel_size: int = option(128, at_least=2, panel=True)
    """Images in the panel."""
    seed: int = option(1234, at_least=0, at_most=LARGEST_SEED, panel=True)
    """Seed of the panel's noise; independent of run.seed."""
    network: str = option("auto", panel=True)
    """Features for the Vendi Score: auto (a shipped model's own, else none), none, a shipped name, hub id or folder."""


@dataclass
class RunConfig:
    """Where and how the run happens."""

    folder: str = option("runs/default", resumable=True)
    """Folder that everything is written to; the same command resumes from it."""
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED)
    """Seed of all randomness in training."""
    device: str = option("auto")
    """auto (cuda if there is one), cpu, cuda or cuda:N."""
    save_every: int = option(10, at_least=0, resumable=True)
    """Iterations between checkpoints; 0 for only the last."""
    keep_checkpoints: int = option(2, at_least=1, resumable=True)
    """Newest checkpoints to keep."""
    keep_best: bool = option(False, resumable=True)
    """Keep the checkpoint of the best panel too; panels then come with a checkpoint."""
    lost_after: float = option(600.0, at_least=10, at_most=36_000, resumable=True)
    """Seconds after which a job gives up a machine that answers nothing. A rank that dies ends the job at once."""
    edited_code: str = option("note", choices=("note", "refuse"), resumable=True)
    """Answer, on resume, to a reward or schedule of yours whose file has changed since the run began."""
    writers: list[str] = option([], choices=("tensorboard", "wandb"), resumable=True)
    """Logs besides metrics.jsonl; for wandb log in by `wandb login`."""
    progress: str = option("auto", choices=("auto", "bar", "json", "quiet"), resumable=True)
    """Progress on the terminal; auto is bar on a terminal, else json."""


@dataclass
class EngineConfig:
    """Owner of the weights: one process, data-parallel ranks, or DeepSpeed."""

    deepspeed: str | None = option(None, resumable=True)
    """A DeepSpeed JSON file such as configs/deepspeed/zero3.json; null for the plain engine."""


@dataclass
class Config:
    """All sections of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


SECTIONS: dict[str, Any] = {section.name: section.default_factory for section in fields(Config)}
"""The dataclass of every section."""
FACTS: dict[str, Facts] = {
    f"{section}.{entry.name}": entry.metadata["facts"]
    for section, factory in SECTIONS.items()
    for entry in fields(factory)
}
"""The facts of every option, by "section.field"."""
