"""DenoiserPolicy: what every policy has in common: calls of the network, guidance, counting and compiling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hrf_fast.config.options import FLOW_SAMPLERS
from hrf_fast.policies.base import Condition, Prediction
from hrf_fast.policies.calling import UNET, Shape, shape_of
from hrf_fast.policies.compilation import compile_network
from hrf_fast.policies.flow_sampler import choose_deterministic_sampler
from hrf_fast.policies.lora import adapted_layers, store_frozen, switched_off
from hrf_fast.policies.network import Network, NetworkCalls
from hrf_fast.policies.parts import import_pipeline
from hrf_fast.policies.sampler import Sampler
from hrf_fast.policies.schedulers import FLOW_SCHEDULER, not_defaults
from hrf_fast.stopwatch import Stopwatch
from hrf_kernels import choose_backend


class DenoiserPolicy:
    """The denoising policy π(x_{t-1} | x_t, t) of a UNet or transformer.

    A subclass adds `condition`, `decode` and how it is saved.
    """

    takes_prompts = False
    decoder: nn.Module | None = None
    decoded_at_once = 1
    has_unconditional_branch = False
    visiting_bytes = 0

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        sampler: Sampler,
        *,
        precision: str = "fp32",
        kernels: str = "auto",
        channels_last: bool = False,
        guidance_scale: float = 1.0,
        shape: Shape | None = None,
        linear_sigmas: bool = False,
    ) -> None:
        """Wrap a UNet or transformer of diffusers.

        Args:
            scheduler: the model's own, which is saved with it; sampler: the steps made of it.
            precision: fp32, or bf16 or fp16 for autocast with fp32 weights.
            kernels: see `hrf_kernels.choose_backend`.
            channels_last: weights and inputs of a UNet in that memory format.
            guidance_scale: for conditions with an unconditional branch.
            shape: of the latents, and the call that takes them; None for what the config of a UNet says.
            linear_sigmas: see `build_flow_sampler`.

        Raises:
            ValueError: an unknown precision, kernels that can't run on the network's device, or neither a shape nor a
                config that says one.
        """
        if shape is None and not hasattr(unet, "config"):
            raise ValueError(
                f"{type(unet).__name__} has no config of diffusers, which says the shape of the latents and the call; "
                "give shape=Shape(latents, call, size=None), as docs/models.md shows"
            )
        self.scheduler, self.precision = scheduler, precision
        self.guidance_scale, self._linear_sigmas = guidance_scale, linear_sigmas
        shape = shape or shape_of("", UNET, unet.config)
        self.device = next(unet.parameters()).device
        try:
            self.kernels, self.kernels_reason = choose_backend(kernels, self.device)
        except ValueError as error:
            raise ValueError(f"HRF_KERNELS is {kernels!r}: {error}") from error
        self.network = Network(unet, precision, channels_last=channels_last, call=shape.call, kernels=self.kernels)
        self._with_gradient: Callable[..., Tensor] = self.network
        self._reference: Network | None = None
        self.sampler = sampler.to(self.device)
        self.compiled = "none"
        self.calls = NetworkCalls()
        self.stopwatch = Stopwatch(self.device)
        self.shape, self.latent_shape = shape, shape.latents

    @staticmethod
    def saved_as(pipeline: str, scheduler: Any) -> Any:
        """The class of diffusers that `save` writes for a model whose pipeline and scheduler are these."""
        return import_pipeline(pipeline)

    @property
    def unet(self) -> Any:
        """The network's denoiser."""
        return self.network.unet

    def deterministic_sampler(self, steps: int) -> Sampler:
        """Deterministic steps by the model's own scheduler, see `Policy.deterministic_sampler`."""
        tokens, linear = self.shape.tokens, self._linear_sigmas
        sampler = choose_deterministic_sampler(
            self.scheduler, num_inference_steps=steps, image_tokens=tokens, linear_sigmas=linear
        )
        return sampler.to(self.device)

    def predict(self, latents: Tensor, steps: int | Tensor, condition: Condition) -> Prediction:
        """The network's outputs for latents [B, …] at one step or at [B] steps, counted and timed.

        Both branches of guidance are one call of 2B rows, the unconditional ones first, as in diffusers' pipelines.
        """
        forward = self._with_gradient if torch.is_grad_enabled() else self.network
        return self._predict(forward, latents, steps, condition)

    def hold_reference(self) -> None:
        """Copy the network, in the compute precision, unless it has adapters; see `Policy.hold_reference`.

        Autocast rounds weights at each use, so a copy in its precision computes the numbers of the original.
        """
        if not adapted_layers(self.unet):
            self._reference = copy.deepcopy(self.network).requires_grad_(False)
            store_frozen(self._reference.unet, self.precision)
            # a matrix product of PyTorch may round by whether a weight wants a gradient, as those of the original do
            self._reference.requires_grad_(True)

    @torch.no_grad()
    def reference(self, latents: Tensor, steps: int | Tensor, condition: Condition) -> Tensor:
        """The pretrained model's output, see `Policy.reference`.

        Raises:
            RuntimeError: `hold_reference` was not called and there are no adapters.
        """
        if self._reference is None and not adapted_layers(self.unet):
            raise RuntimeError("there is no pretrained network to refer to; call hold_reference() before training")
        with switched_off(self.unet):
            return self._predict(self._reference or self.network, latents, steps, condition).combined.float()

    def _predict(
        self, forward: Callable[..., Tensor], latents: Tensor, steps: int | Tensor, condition: Condition
    ) -> Prediction:
        # one step: a view of the device's table; diffusers would copy a Python number to the device and wait for it
        timesteps = self.sampler.timesteps[steps]
        branches = condition.branches
        self.calls.batches += 1
        self.calls.forwards += branches * len(latents)
        if branches > 1:
            latents = torch.cat([latents] * branches)
            timesteps = timesteps.repeat(branches) if timesteps.dim() else timesteps
        with self.stopwatch.running():
            output = forward(latents, timesteps, **condition.inputs)
        if branches == 1:
            return Prediction(output)
        unconditional, conditional = output.chunk(branches)
        return Prediction(conditional, unconditional, self.guidance_scale)

    def attach(self, forward: Callable[..., Tensor]) -> None:
        """Let calls with gradient go through an engine's wrapper of the network; see `Policy.attach`."""
        self._with_gradient = forward

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Panels and checks are no part of what training costs: calls inside are neither counted nor timed."""
        calls, self.calls = self.calls, NetworkCalls()
        stopwatch, self.stopwatch = self.stopwatch, Stopwatch(self.device)
        try:
            yield
        finally:
            self.calls, self.stopwatch = calls, stopwatch

    def blocks(self) -> list[nn.Module]:
        """The down, mid and up blocks of a UNet, or the blocks of a transformer."""
        return _blocks(self.unet)

    def compile(self, mode: str) -> None:
        """Run the denoiser compiled, see `compile_network`; `compile_graphs` makes the graphs before training."""
        if mode == "none":
            return
        modules = [self.unet, *([self._reference.unet] if self._reference else [])]
        if mode == "blocks":
            # the reference is a copy, whose modules have the same names
            names = {module: name for name, module in self.unet.named_modules()}
            modules = [unet.get_submodule(names[block]) for unet in modules for block in self.blocks()]
        compile_network(modules)
        if self._reference:
            self._reference.compiled = True
        self.compiled, self.network.compiled = mode, True


def _blocks(unet: Any) -> list[nn.Module]:
    if hasattr(unet, "transformer_blocks"):
        return [*unet.transformer_blocks, *getattr(unet, "single_transformer_blocks", ())]
    return [*unet.down_blocks, *filter(None, [unet.mid_block]), *unet.up_blocks]


@torch.no_grad()
def decode_in_parts(decoder: Any, latents: Tensor, at_once: int) -> Tensor:
    """Images [B, C, H, W] in [0, 1] of latents in the decoder's own units, `at_once` in a call, without autocast.

    They are written into one tensor: those of a large panel are gigabytes, and would be there twice.
    """
    images: Tensor | None = None
    with torch.autocast(latents.device.type, enabled=False):
        for first in range(0, len(latents), at_once):
            part = decoder.decode(latents[first : first + at_once]).sample
            if images is None:
                images = part.new_empty(len(latents), *part.shape[1:])
            images[first : first + at_once] = part.div_(2).add_(0.5).clamp_(0, 1)
    assert images is not None, "no latents"
    return images


def check_finite(latents: Tensor) -> None:
    """Refuse latents that no image is made of.

    Raises:
        FloatingPointError: a latent is NaN or infinite, which the clamp to [0, 1] would hide in part.
    """
    if not torch.isfinite(latents).all():
        raise FloatingPointError(
            "the images are not finite: the model's weights have diverged or were NaN when loaded; use a lower "
            "optimizer.learning_rate in a new run.folder, from the same model or from one that `hrf export` makes of "
            "the last checkpoint (docs/run_folder.md), or check model.name"
        )


def scheduler_of(kind: str, eta: float, resolved: Mapping[str, Any] | None = None) -> tuple[str, str, str]:
    """The lines of `Policy.example` about a sampler.

    Args:
        resolved: config of the policy's scheduler, where the lines begin with another one: that of the base model,
            whose `from_config` puts a class's default where the policy has its own.

    Returns:
        The scheduler's class, more arguments of its `from_config`, and more arguments of a pipeline's call.
    """
    name, options, noise = {
        "ddim": ("DDIMScheduler", {}, f", eta={eta}"),
        "ddim_trl": ("DDIMScheduler", {"set_alpha_to_one": False}, f", eta={eta}"),
        "ddpm": ("DDPMScheduler", {}, ""),
        # diffusers has none of the samplers of flow models, and its own stochastic one is another rule: the ODE
        **dict.fromkeys(FLOW_SAMPLERS, (FLOW_SCHEDULER, {"stochastic_sampling": False}, "")),
    }[kind]
    settings = not_defaults(name, resolved or {}) | options
    if kind in FLOW_SAMPLERS and resolved:
        # sample.shift may have taken the place of the base model's
        settings |= {setting: resolved[setting] for setting in ("shift", "use_dynamic_shifting")}
    return name, "".join(f", {setting}={value!r}" for setting, value in settings.items()), noise


@contextmanager
def contiguous(module: nn.Module) -> Iterator[None]:
    """Weights in the order that safetensors writes; afterwards they are where and as they were."""
    strided = [(parameter, parameter.data) for parameter in module.parameters() if not parameter.is_contiguous()]
    try:
        for parameter, data in strided:
            parameter.data = data.contiguous()
        yield
    finally:
        for parameter, data in strided:
            parameter.data = data
