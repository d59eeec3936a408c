"""Every option, as dataclasses with a docstring under each field; `hrf train --help` prints them.

A field carries its range, its choices and what a change means (facts.py). How options are read and layered is load.py,
what they may be together rules.py. The sections about the machine and the run folder are in run_options.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from hrf_fast.config.facts import Facts, option
from hrf_fast.config.remedy_options import RemediesConfig
from hrf_fast.config.run_options import (
    PRECISIONS,
    ComputeConfig,
    EngineConfig,
    EvaluationConfig,
    RunConfig,
    StopConfig,
)

DDPM_SAMPLERS = ("ddim", "ddpm", "ddim_trl")
# with the noise level that each one's authors publish
FLOW_SAMPLERS = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}
LEARNING_RATE_SCHEDULES = ("constant", "cosine")
STEP_WEIGHTS = ("equal", "std", "guard", "dt")
CLIP_STEPS = ("equal", "std", "cps")
LORA_INITS = ("gaussian", "kaiming")
OPTIMIZERS = ("adamw", "fused_adamw", "cpu_adam", "adamw_8bit", "paged_adamw_8bit")


@dataclass
class ModelConfig:
    """The pretrained model to fine-tune."""

    name: str = option("fashion", panel=True)
    """`fashion`, `fashion-flow`, `portraits` or `peeps` (shipped), a diffusers folder, or a hub id such as
    google/ddpm-celebahq-256."""
    revision: str | None = option(None, panel=True)
    """Branch, tag or commit of a hub id."""
    variant: str | None = option(None, panel=True)
    """Variant of the weight files, such as fp16 for *.fp16.safetensors; null for the plain ones."""
    decoder: str | None = option(None, panel=True)
    """An AutoencoderTiny, a folder or a hub id, that decodes latents of a text-to-image model faster than its VAE:
    madebyollin/taesd (SD), madebyollin/taesdxl (SDXL), madebyollin/taesd3 (SD3), madebyollin/taef1 (FLUX); null for the
    VAE. RUN/model has the VAE."""
    image_size: int | None = option(None, at_least=1, panel=True)
    """Height and width in pixels of a text-to-image model's images; null for the model's own, 1024 for SD3 and FLUX."""
    max_sequence_length: int | None = option(None, at_least=1, at_most=512, panel=True)
    """Tokens of T5 that SD3 or FLUX is given for a prompt, as diffusers' pipelines call it; null for their 256 and 512.
    Fewer make every network call faster: flow_grpo takes 128."""


@dataclass
class SampleConfig:
    """The sampler, in training and in evaluation."""

    scheduler: str = option("ddim", choices=(*DDPM_SAMPLERS, *FLOW_SAMPLERS), panel=True)
    """ddim; ddpm, ancestral sampling; or ddim_trl, DDIM as TRL has it: the last step goes to the first trained step and
    not to the clean image, so it has noise and is trained. Where set_alpha_to_one is off (Stable Diffusion) this is
    ddim. Flow-matching models need flow_sde (Flow-GRPO), dance_sde (DanceGRPO) or cps (Flow-CPS)."""
    num_inference_steps: int = option(40, at_least=1, panel=True)
    """Denoising steps, T; the paper uses 40."""
    eta: float = option(1.0, above=0, at_most=1, panel=True)
    """Noise scale of DDIM; leave it at 1 for ddpm and for flow-matching models."""
    noise_level: float | None = option(None, above=0, panel=True)
    """Noise scale of a flow-matching model's sampler; null for what its authors publish: 0.7 of flow_sde, 0.3 of
    dance_sde, 0.8 of cps, which takes at most 1."""
    shift: float | None = option(None, above=0, panel=True)
    """Static shift of a flow-matching model's sigmas, such as 3; null for what its own scheduler has, which for FLUX
    goes by the size of the image."""
    guidance_scale: float = option(1.0, at_least=1, panel=True)
    """Factor of classifier-free guidance away from the negative prompt, for text-to-image models; 1 for none.
    FLUX.1-dev takes it as an input of the network."""


@dataclass
class PromptsConfig:
    """The prompts of a text-to-image model; each group draws one."""

    source: str | None = option(None)
    """animals, activities, peeps (for that model), a text file with a prompt on each line, a .jsonl file, or
    module:function."""
    kwargs: dict[str, Any] = option({})
    """Arguments of a source that is a function."""
    negative: str = option("", panel=True)
    """Negative prompt of prompts that have none of their own; it acts under guidance only, and not for FLUX."""
    distinct: bool = option(False)
    """The groups of an iteration draw different prompts, as flow_grpo's sampler does; a list must have as many."""


@dataclass
class WindowConfig:
    """Which denoising steps are trained."""

    schedule: str = option("clusters")
    """full (DDPO), clusters (HRF), dynamic (HRF-D), mixgrpo, flow_grpo_fast, progressive, interior, random, sliding, or
    module:function."""
    kwargs: dict[str, Any] = option({})
    """The schedule's own options, e.g. {clusters: [[0, 20], [20, 40]], iterations_per_cluster: 35}."""
    anchor_steps: int = option(0, at_least=0)
    """Draw anchors by this many deterministic steps (DDIM with eta 0) of the T; 0 draws them as all samples are."""
    anchor_reuse: int = option(1, at_least=1)
    """Iterations that anchors, and their prompts, serve before new ones are drawn."""
    shared_noise: bool | None = option(None)
    """Samples of a group start from one noise, so that the window's own noise alone parts them and its rewards; null is
    true for mixgrpo and flow_grpo_fast, false for the other schedules that ship."""


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
    mix: str = option("sum", choices=("sum", "advantages"))
    """Sum the terms' rewards, in their own units, or their advantages, each term standardised on its own, so that units
    do not matter (MixGRPO, arXiv 2507.21802). Metrics and panels have the sum of rewards either way."""


@dataclass
class TrainConfig:
    """The RL algorithm. Defaults are those of the HRF authors' code where it has them."""

    iterations: int = option(70, at_least=1, resumable=True)
    """Rollout and update, this many times. A resume may raise it where the learning rate and the weight of the
    KL are constant."""
    groups_per_iteration: int = option(4, at_least=1)
    """Groups per iteration; in HRF each has an anchor."""
    group_size: int = option(5, at_least=1)
    """Samples of a group; they share an anchor and a prompt. 1 needs advantages that compare groups."""
    groups_per_step: int = option(1, at_least=1)
    """Groups averaged into one optimizer step; 1 as published. Must divide groups_per_iteration."""
    inner_epochs: int = option(1, at_least=1)
    """Passes over an iteration's rollouts."""
    order: str = option("collect", choices=("collect", "on_policy"))
    """collect rolls out all groups, then makes the optimizer steps, as published; on_policy rolls out one step's groups
    at a time, so that each step learns from the current policy."""
    advantages: str = option("group")
    """Peers that rewards are standardised against: the group, all groups of the iteration (batch), the last rewards of
    the same prompt (prompt), or module:function."""
    prompt_buffer: int = option(16, at_least=1)
    """Rewards that advantages=prompt remembers of each prompt."""
    prompt_min_count: int = option(16, at_least=1)
    """Remembered rewards from which on a prompt is its own peer; before, its peers are all groups of the iteration."""
    advantage_scale: str = option("std", choices=("std", "batch", "none"))
    """Divisor of the advantages: their peers' standard deviation; batch, that of all rewards of the iteration over a
    group's own mean, as in Flow-GRPO (arXiv 2505.05470); or none (Dr. GRPO, arXiv 2503.20783), which leaves them in
    units of the reward, as advantage_clip then is."""
    advantage_baseline: str = option("mean", choices=("mean", "leave_one_out"))
    """Baseline of a reward: the mean of its peers, or of the others among them (RLOO, arXiv 2402.14740)."""
    gae_lambda: float | None = option(None, at_least=0, at_most=1)
    """Credit each step by generalized advantage estimation (arXiv 1506.02438) with this λ, where the value of a state
    is the reward of the clean image that the network predicts there: more rewards, no more network calls. 1 leaves the
    gradient unbiased; 0 has least noise, and credits a step with what its own noise changed in that prediction. null
    credits every step with the final reward, as published."""
    advantage_floor: float = option(1e-6, above=0)
    """Least standard deviation to divide by, in units of the reward."""
    advantage_clip: float = option(2.5, above=0)
    """Bound on |advantage|."""
    clip_range: float = option(1e-4, above=0)
    """Half-width of the ratio's range; log-probs are means over pixels, so useful values are small."""
    clip_steps: str = option("equal", choices=CLIP_STEPS)
    """Log-ratio that clip_range is of at each denoising step: equal, the Gaussian's at every one, as published; std,
    the Gaussian's times its std, the scale of GRPO-Guard (arXiv 2510.22319); or cps, times 2·std², that of Flow-CPS's
    published log-prob (arXiv 2509.05952)."""
    scale_clips_by_window: bool = option(True)
    """Multiply both clips by the window's share of the T steps: (T − start)/T, as HRF does, and (stop − start)/T for a
    window that ends before the last stochastic step. The full window of DDPO has factor 1."""
    step_weights: str = option("equal", choices=STEP_WEIGHTS)
    """Weight of each denoising step in the loss: equal, as published; or std, its noise's standard deviation over their
    mean. A log-prob's gradient grows as 1/std, so with equal weights the last steps, which hardly change an image, make
    nearly all of the gradient's noise. Of flow models also guard, std over the fall of sigma as in GRPO-Guard, and dt,
    that fall, as in PCPO."""
    gradient_noise: bool = option(False)
    """Measure the gradient's signal and noise of every optimizer step, from its groups in two halves: no extra network
    calls, two more gradients in memory. Needs an even number of groups per step and the plain engine."""
    step_share: float = option(1.0, above=0, at_most=1)
    """Share of the window's steps that an update learns from, every 1/share-th from a random one on, each weighted by
    1/share: the gradient's expectation is that of all steps."""
    skip_flat_groups: bool = option(False)
    """Leave network calls whose groups all have equal rewards out of the update: their gradient is zero."""
    guidance: bool = option(True)
    """Roll out and update under sample.guidance_scale, with gradient through both branches. false trains the model
    without guidance at half the cost; panels have guidance either way."""

    @property
    def one_step_a_rollout(self) -> bool:
        """Whether every rollout serves one optimizer step an epoch, so that the ratio is 1 in the first."""
        return self.order == "on_policy" or self.groups_per_step == self.groups_per_iteration


@dataclass
class OptimizerConfig:
    """AdamW: the implementation, the learning rate and the averaging of weights."""

    name: str = option("adamw", choices=OPTIMIZERS)
    """torch's AdamW (fused on CUDA but for ZeRO's offload), its fused form, DeepSpeed's for ZeRO offload
    (cpu_adam), or bitsandbytes' with 8-bit state. The paged form needs CUDA and is paged until a resume."""
    learning_rate: float = option(5e-6, above=0)
    """Peak learning rate."""
    learning_rate_schedule: str = option("constant", choices=LEARNING_RATE_SCHEDULES)
    """Learning rate after the warm-up; cosine falls towards zero, half way at half of the iterations."""
    warmup_iterations: int = option(0, at_least=0)
    """Iterations of linear warm-up."""
    burn_in_iterations: int = option(0, at_least=0)
    """Iterations before the warm-up that average AdamW's moments and move no weight, so that no step is a sign of one
    noisy gradient. They cost as much as others."""
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
class LoraConfig:
    """Adapters (LoRA) that are trained in place of the model's own weights."""

    rank: int = option(0, at_least=0)
    """Rank of the adapters; 0 trains all weights and has none."""
    alpha: float | None = option(None, above=0)
    """Adapters are scaled by alpha/rank; null for the rank, which is a scale of 1."""
    targets: list[str] = option(["to_q", "to_k", "to_v", "to_out.0"])
    """Endings of the names of layers that get an adapter: linear ones and convolutions."""
    init: str = option("gaussian", choices=LORA_INITS)
    """Start of A: normal of std 1/rank, or uniform as peft has it by default; B is 0, so that a run starts at its
    pretrained model. peft's initialisations that change the frozen weights (pissa, olora) have no place here."""
    base_precision: str = option("fp32", choices=PRECISIONS)
    """Storage of the frozen weights: fp32, or that of compute.precision, which takes half the memory and gives the same
    numbers. Adapters are fp32."""


@dataclass
class Config:
    """All sections of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    remedies: RemediesConfig = field(default_factory=RemediesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
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
