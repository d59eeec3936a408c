"""Options of how and where a run happens: compute, stop, evaluation, run and engine; options.py has the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hrf_fast.config.facts import option

PRECISIONS = ("fp32", "bf16", "fp16")
ATTENTIONS = ("sdpa", "xformers")
# noise.py makes keys of 32 bits
LARGEST_SEED = 2**32 - 1


@dataclass
class ComputeConfig:
    """How the machine computes the algorithm: precision, memory, compilation, batches."""

    precision: str = option("fp32", choices=PRECISIONS, panel=True)
    """fp32, or autocast to bf16 or fp16 over fp32 weights; fp16 scales the loss and is for CUDA."""
    activations: str = option("replay", choices=("auto", "keep", "replay", "checkpoint"), resumable=True)
    """Activations of window steps. keep holds those of the rollout for the update (order on_policy); replay runs the
    steps again; checkpoint also runs each block again in the backward, for least memory; auto keeps as many as fit
    into memory."""
    memory_budget: str | None = option(None, resumable=True)
    """Memory that activations=auto may plan for, per process, such as 24GB; null for all that is free at the start."""
    images_per_call: int = option(0, at_least=0)
    """Most images in a network call: larger groups are split, smaller ones share calls, and an update of the order
    collect replays several steps at once. 0: a group and a step to a call, as published, and 64 images where nothing is
    trained. Another number rounds otherwise."""
    attention: str = option("sdpa", choices=ATTENTIONS)
    """Implementation of attention: torch's own, or xformers (CUDA)."""
    offload: bool = option(False, resumable=True)
    """Keep a text-to-image model's text encoders and decoder in the CPU's memory while they are not used (CUDA)."""
    encoder_precision: str = option("fp32", choices=("fp32", "bf16"), panel=True)
    """Precision of text encoders; T5-XXL takes 19 GB in fp32. Where RUN/model is a pipeline with
    all its parts, they are stored in it."""
    channels_last: bool = option(False)
    """Weights and activations of the UNet in channels_last order; under DeepSpeed activations only. On CUDA its group
    norms are Triton's, with the SiLU behind them."""
    threads: int = option(0, at_least=0, at_most=4096)
    """Threads of torch on a CPU; 0 leaves the number to torch. Another number rounds otherwise."""
    auto_tune: bool = option(False, resumable=True)
    """Choose threads and channels_last by a measured warm-up (one process on a CPU). RUN/config.yaml has the choice,
    and a resume keeps it."""
    compile: str = option("none", choices=("none", "unet", "blocks"))
    """torch.compile for the denoiser: none, unet (one graph for all of it) or blocks (a graph for each block)."""
    deterministic: bool = option(True)
    """Equal seeds give equal bits, and fp32 is fp32. false is faster and for CUDA: matrix products and convolutions in
    TF32, and cudnn times its convolutions and takes the fastest."""


@dataclass
class StopConfig:
    """Rules that watch a run and may end it before its last iteration; each leaves a line in RUN/events.jsonl."""

    max_evaluations: int = option(0, at_least=0, resumable=True)
    """Stop after the iteration in which the UNet's evaluations pass this number (a backward counts two); 0 never."""
    on_collapse: str = option("warn", choices=("warn", "stop", "restore_best"), resumable=True)
    """Answer to a floor that is missed and to a divergence: warn and go on, stop, or stop with the weights of the best
    checkpoint, the one of highest panel reward above the floors, as the tuned model. It is kept for that."""
    diversity: str = option("vendi", choices=("vendi", "vendi_per_prompt", "looks"), resumable=True)
    """Metric of the panel that diversity_floor is about."""
    diversity_floor: float | None = option(None, at_least=0, below=1, resumable=True)
    """Share of the pretrained model's diversity under which a panel has collapsed, with its whole interval. null is 0.6
    where the panel measures it; 0 for none."""
    quality: str = option("inception", choices=("inception", "precision"), resumable=True)
    """Metric of the panel that quality_floor is about: the Inception Score, where the network has classes; or with any
    network precision, the share of images as near to another's original as that one's fifth neighbour is."""
    quality_floor: float | None = option(None, at_least=0, at_most=1, resumable=True)
    """Share of the pretrained model's quality under which a panel has collapsed, as diversity_floor. 1 of the Inception
    Score, with restore_best, gives back no model of a lower one."""
    target_reward: float | None = option(None, resumable=True)
    """Stop at the first panel whose mean reward is at least this, so that methods can be compared at equal reward."""
    patience: int = option(0, at_least=0, resumable=True)
    """Stop after this many panels without a gain of the reward beyond its interval; 0 never."""
    on_nan: str = option("stop", choices=("stop", "skip"), resumable=True)
    """Answer to a reward or gradient that is not finite: stop, or skip the optimizer steps that it belongs to. A reward
    of a panel or of HRF-D's search stops the run in either case."""
    max_drift: float = option(4.0, at_least=0, resumable=True)
    """Stop with an error where an iteration's last optimizer step changes the log-prob of its own samples by more than
    this, in nats per pixel: such a step has wrecked the model; 0 never stops."""
    max_ratio: float = option(10.0, at_least=0, resumable=True)
    """Divergence: ratio_max of an iteration over this; 0 for no limit, as in the options below."""
    max_clip_fraction: float = option(0.0, at_least=0, below=1, resumable=True)
    """Divergence: clip_fraction of an iteration over this."""
    max_kl: float = option(0.0, at_least=0, resumable=True)
    """Divergence: approx_kl of an iteration over this."""
    max_norm_factor: float = option(10.0, at_least=0, resumable=True)
    """Divergence: grad_norm over this many times its own median of up to 50 iterations, for three in a row."""


@dataclass
class HeldOutReward:
    """A reward that panels measure and nothing trains on."""

    name: str = ""
    """A registered name (see `hrf rewards`) or "module:function" for a function of your own."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the reward, by name."""


@dataclass
class EvaluationConfig:
    """The panel: images from fixed noise, evaluated before, during and after."""

    every: int = option(10, at_least=0, resumable=True)
    """Iterations between panels; 0 for only the first and last."""
    panel_size: int = option(128, at_least=2, panel=True)
    """Images in the panel."""
    seed: int = option(1234, at_least=0, at_most=LARGEST_SEED, panel=True)
    """Seed of the panel's noise; independent of run.seed."""
    prompts: str | None = option(None)
    """Source of the panel's prompts, as prompts.source; null for the training's own. The first ones are used."""
    images_per_prompt: int = option(4, at_least=1, panel=True)
    """Images of each prompt in the panel."""
    deterministic_steps: int = option(0, at_least=0, panel=True)
    """Draw panels by this many deterministic steps of the model's own scheduler (DDIM with eta 0, or the ODE of a
    flow), as users of the tuned model do; it may be more than T. 0 draws them as training does, with noise."""
    rewards: list[HeldOutReward] = option([], panel=True, resumable=True)
    """Held-out rewards {name, kwargs}, each name once: panels measure them and nothing trains on them, so that a reward
    which rises alone shows."""
    network: str = option("auto", panel=True)
    """Features for the Vendi Score, and with classes an Inception Score: auto (a shipped model's own, else none), none,
    a shipped name, hub id or folder."""


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
    """Keep the checkpoint of the best panel too, the one of highest reward above the floors of `stop`; a panel that is
    the best so far then comes with a checkpoint. Implied by stop.on_collapse=restore_best."""
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
