"""Every option, as dataclasses with a docstring under each field; `hrf train --help` prints them.

How they are read and layered is load.py, what they may be together rules.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SAMPLERS = ("ddim", "ddpm")
LEARNING_RATE_SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp32", "bf16", "fp16")
ACTIVATIONS = ("auto", "keep", "replay", "checkpoint")
ORDERS = ("collect", "on_policy")
COMPILES = ("none", "unet", "blocks")
KERNELS = ("auto", "eager", "triton")
ATTENTIONS = ("sdpa", "xformers")
OPTIMIZERS = ("adamw", "fused_adamw", "cpu_adam", "adamw_8bit", "paged_adamw_8bit")


@dataclass
class ModelConfig:
    """The pretrained model to fine-tune."""

    name: str = "fashion"
    """`fashion` or `portraits` (shipped), a diffusers folder, or a hub id such as google/ddpm-celebahq-256."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    attention: str = "sdpa"
    """sdpa (torch's own), or xformers (CUDA)."""


@dataclass
class SampleConfig:
    """How images are denoised, in training and in evaluation."""

    scheduler: str = "ddim"
    """ddim, or ddpm for ancestral sampling."""
    num_inference_steps: int = 40
    """T; the paper uses 40."""
    eta: float = 1.0
    """DDIM's noise scale in (0, 1]; 1 for ddpm."""
    batch_size: int = 64
    """Images per UNet call where nothing is trained: anchors, search, panels."""


@dataclass
class WindowConfig:
    """Which denoising steps are trained."""

    schedule: str = "clusters"
    """full (DDPO), clusters (HRF), dynamic (HRF-D), random, sliding, or module:function."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """The schedule's own options, e.g. {clusters: [[0, 20], [20, 40]], iterations_per_cluster: 35}."""


@dataclass
class RewardTerm:
    """One term of the reward; several terms are a weighted sum."""

    name: str = ""
    """A registered name (see `hrf rewards`) or "module:function" for a function of your own."""
    weight: float = 1.0
    """What the term is multiplied by; negative to minimise it, 0 to log it without training on it."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the reward, by name."""


@dataclass
class RewardConfig:
    """What is maximised: one reward by name, or a weighted sum of `terms`."""

    name: str | None = "jpeg_compressibility"
    """A name from `hrf rewards` or module:function; null when `terms` are given."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """The reward's own options."""
    terms: list[RewardTerm] = field(default_factory=list)
    """Terms {name, weight, kwargs} of a weighted sum."""
    background: bool = True
    """Score groups in a thread while the next ones denoise; the results are the same."""


@dataclass
class TrainConfig:
    """The RL update. Defaults are those of the HRF authors' code where it has them."""

    iterations: int = 70
    """Rollout and update, this many times."""
    groups_per_iteration: int = 4
    """Anchors, and so groups, per iteration."""
    group_size: int = 5
    """Samples that share an anchor; at least 2."""
    groups_per_step: int = 1
    """Groups averaged into one optimizer step; 1 as published. Must divide groups_per_iteration."""
    inner_epochs: int = 1
    """Passes over an iteration's rollouts."""
    advantages: str = "group"
    """Peers that rewards are standardised against: group, or batch for the whole iteration."""
    advantage_floor: float = 1e-6
    """Least standard deviation to divide by, in units of the reward."""
    advantage_clip: float = 2.5
    """Bound on |advantage|."""
    clip_range: float = 1e-4
    """Half-width of the ratio's range; log-probs are means over pixels, so useful values are small."""
    scale_clips_by_window: bool = True
    """Multiply both clips by (T − start)/T, as HRF does; the full window of DDPO has factor 1."""
    optimizer: str = "adamw"
    """adamw, fused_adamw, cpu_adam (ZeRO offload), adamw_8bit, or paged_adamw_8bit (CUDA; paged until a resume)."""
    learning_rate: float = 5e-6
    """Peak learning rate of AdamW."""
    learning_rate_schedule: str = "constant"
    """constant or cosine (to zero at the last iteration)."""
    warmup_iterations: int = 0
    """Iterations of linear warm-up."""
    weight_decay: float = 1e-3
    """AdamW's decoupled weight decay."""
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two averaging factors."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns it off."""
    micro_batch_size: int = 0
    """Samples per UNet call of a window, in rollout and update alike; 0 is the whole group."""
    steps_per_forward: int = 1
    """Consecutive window steps that the update puts into one UNet call; more than 1 round unlike the rollout."""
    precision: str = "fp32"
    """fp32, or bf16 or fp16 for autocast with fp32 weights; fp16 scales the loss and is for CUDA."""
    kernels: str = "auto"
    """What computes log-probs and their gradients: triton (fused), eager, or auto: triton on a GPU that has it."""
    order: str = "collect"
    """collect rolls out all groups, then makes the optimizer steps, as published; on_policy rolls out one step's groups
    at a time, so that each step learns from the current policy."""
    activations: str = "replay"
    """Of window steps: keep those of the rollout for the update (order on_policy), replay them, or checkpoint: replay
    with each UNet block run again in the backward, for least memory. auto keeps as many as fit into memory."""
    memory_budget: str | None = None
    """What auto may plan for, per process, such as 24GB; null for what is free at the start."""
    max_batch: int = 0
    """Images up to which groups share the UNet calls of a rollout, each joining at its start; 0 for one by one."""
    channels_last: bool = False
    """Weights and activations of the UNet in channels_last order; under DeepSpeed activations only."""
    compile: str = "none"
    """torch.compile for the UNet: none, unet (one graph) or blocks (a graph for each down, mid and up block)."""
    tf32: bool = False
    """CUDA: matrix products and convolutions of fp32 in TF32; false means that fp32 is fp32."""
    cudnn_benchmark: bool = False
    """CUDA: let cudnn time its convolutions and take the fastest; the same seed then no longer gives the same bits."""
    self_check: str = "warn"
    """When replay's rounding is not well below the smallest clip range: warn, or strict to refuse to train."""
    ema_decay: float = 0.0
    """Per optimizer step, of averaged weights that panels and the final model use; 0 turns them off."""
    on_nan: str = "stop"
    """A reward or gradient that is not finite: stop, or skip the optimizer steps that it belongs to."""
    max_evaluations: int = 0
    """Stop after the iteration in which the UNet's evaluations pass this number (a backward counts two); 0 never."""

    @property
    def samples_per_call(self) -> int:
        """Samples of a group in a UNet call of its window: micro_batch_size, where 0 is the whole group."""
        return self.micro_batch_size or self.group_size


@dataclass
class EvaluationConfig:
    """The panel: images from fixed noise, scored before, during and after."""

    every: int = 10
    """Iterations between panels; 0 for only the first and last."""
    panel_size: int = 128
    """Images in the panel."""
    seed: int = 1234
    """Of the panel's noise; independent of run.seed."""
    scorer: str = "auto"
    """Features for the Vendi Score: auto (a shipped model's own, else none), none, a shipped name, hub id or folder."""
    grid_size: int = 64
    """Images of the panel that the PNG grids show."""
    resamples: int = 1000
    """Bootstrap resamples behind the 95 % intervals."""


@dataclass
class RunConfig:
    """Where and how the run happens."""

    folder: str = "runs/default"
    """Everything is written below it; the same command resumes from it."""
    seed: int = 0
    """Of all randomness in training."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda or cuda:N."""
    save_every: int = 10
    """Iterations between checkpoints; 0 for only the last."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    keep_best: bool = False
    """Keep the checkpoint of the best panel too; panels then come with a checkpoint."""
    writers: list[str] = field(default_factory=list)
    """Besides metrics.jsonl: tensorboard, wandb (logged in by `wandb login`)."""
    progress: str = "auto"
    """auto (bar on a terminal, else json), bar, json or quiet."""


@dataclass
class EngineConfig:
    """What owns the weights: one process, data-parallel ranks, or DeepSpeed."""

    deepspeed: str | None = None
    """A DeepSpeed JSON file such as configs/deepspeed/zero3.json; null for the plain engine."""


@dataclass
class Config:
    """All sections of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
