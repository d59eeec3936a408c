"""Policy: a diffusion model as the agent of an MDP, and what samples are conditioned on.

The MDP: the state is (x_t, t), the action x_{t-1}, the policy the network's Gaussian denoising step, and only x_0 is
rewarded. The loop knows this protocol and no image size, no timestep and no model family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hrf_fast.policies.network import Network, NetworkCalls
from hrf_fast.policies.sampler import Sampler
from hrf_fast.prompts import Prompt
from hrf_fast.stopwatch import Stopwatch


@dataclass(frozen=True)
class Condition:
    """The inputs that condition B samples, a row per sample under the network's argument names.

    Both mappings are empty for an unconditional model; the second one is empty without guidance.
    """

    conditional: dict[str, Tensor] = field(default_factory=dict)
    """[B, …] each: encoder_hidden_states, pooled embeddings, …"""
    unconditional: dict[str, Tensor] = field(default_factory=dict)
    """[B, …] each, of the negative prompt."""

    @property
    def branches(self) -> int:
        """Rows of a network call for each sample: 2 under guidance, else 1."""
        return 2 if self.unconditional else 1

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of one network call [branches·B, …]: the unconditional rows, if any, then the conditional."""
        if not self.unconditional:
            return self.conditional
        return {name: torch.cat([self.unconditional[name], tensor]) for name, tensor in self.conditional.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """The inputs of both branches."""
        return [*self.conditional.values(), *self.unconditional.values()]

    def __getitem__(self, rows: slice) -> Condition:
        return self._map(lambda tensor: tensor[rows])

    def expand(self, samples: int) -> Condition:
        """One row for so many samples, without a copy; `join` makes one for a network call."""
        return self._map(lambda tensor: tensor.expand(samples, *tensor.shape[1:]))

    def repeat(self, times: int) -> Condition:
        """All rows so many times: of steps time-major, all samples of the first step, then all of the next."""
        return self if times == 1 else self._map(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)))

    @property
    def bytes(self) -> int:
        """Size of all rows, in both branches."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @staticmethod
    def join(parts: Sequence[Condition]) -> Condition:
        """One condition of several, in their order; all have equal names.

        Rows of one storage are copied, so that a network sees the same strides in a rollout and in its replay: a stride
        of 0, in a batch of one too, which counts as contiguous, would have a compiled one compile again.
        """
        if len(parts) == 1 and all(tensor.is_contiguous() and 0 not in tensor.stride() for tensor in parts[0].tensors):
            return parts[0]
        return Condition(
            {name: torch.cat([part.conditional[name] for part in parts]) for name in parts[0].conditional},
            {name: torch.cat([part.unconditional[name] for part in parts]) for name in parts[0].unconditional},
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        conditional, unconditional = (
            {name: function(tensor) for name, tensor in tensors.items()}
            for tensors in (self.conditional, self.unconditional)
        )
        return Condition(conditional, unconditional)


class Prediction(NamedTuple):
    """The network's outputs for B latents, under the argument names of `hrf_kernels`."""

    model_output: Tensor
    """[B, …] in the network's own dtype."""
    unconditional_output: Tensor | None = None
    """[B, …] of the unconditional branch of guidance."""
    guidance_scale: float = 1.0

    @property
    def combined(self) -> Tensor:
        """The output, under guidance unconditional + scale·(conditional − unconditional), in fp32 as in the kernels."""
        if self.unconditional_output is None:
            return self.model_output
        unconditional = self.unconditional_output.float()
        return unconditional + self.guidance_scale * (self.model_output.float() - unconditional)

    def detach(self) -> Prediction:
        unconditional = None if self.unconditional_output is None else self.unconditional_output.detach()
        return Prediction(self.model_output.detach(), unconditional, self.guidance_scale)


class Policy(Protocol):
    """A model as the loop sees it; pixel.py, latent.py and text_to_image.py have three."""

    sampler: Sampler
    """T steps as tables of coefficients."""
    latent_shape: tuple[int, ...]
    """Shape of one sample's latents; the loop never looks inside."""
    network: Network
    """The module that an engine owns; parameters with requires_grad are trained."""
    takes_prompts: bool
    """Whether samples are conditioned on a prompt; otherwise `condition` is given None for each."""
    guidance_scale: float
    """Factor of guidance in `predict`; 1 for none."""
    device: torch.device
    precision: str
    kernels: str
    """The backend of `hrf_kernels` that computes log-probs: eager or triton."""
    kernels_reason: str
    compiled: str
    """How the network runs: none, unet or blocks, see `compile`."""
    decoder: nn.Module | None
    """Makes images of latents; None where these are pixels."""
    decoded_at_once: int
    """Images whose decoding is one call of the decoder."""
    has_unconditional_branch: bool
    """Whether guidance leads away from a branch of its own, that of the negative prompt."""
    calls: NetworkCalls
    stopwatch: Stopwatch

    @property
    def visiting_bytes(self) -> int:
        """Bytes of the largest module that comes to the device for its work alone, one at a time; 0 for none."""
        ...

    def condition(self, prompts: Sequence[Prompt | None], *, guided: bool = True) -> Condition:
        """The condition of one sample per prompt, without gradient; None is the empty prompt.

        Args:
            guided: False leaves out the unconditional branch, so that calls cost half and `predict` guides nothing.
        """
        ...

    def deterministic_sampler(self, steps: int) -> Sampler:
        """The sampler of `steps` deterministic steps by which diffusers draws from the saved model.

        DDIM with eta 0, or the ODE of a flow, at the timesteps that the model's scheduler has for so many steps, which
        need not be among those of `sampler`.

        Raises:
            ValueError: the scheduler has no timesteps for so many steps.
        """
        ...

    def predict(self, latents: Tensor, steps: int | Tensor, condition: Condition) -> Prediction:
        """The network's outputs for latents [B, *latent_shape] at one step, or at [B] steps.

        The call is counted, two per sample under guidance, and timed. With gradient enabled it goes through what
        `attach` was given.
        """
        ...

    def hold_reference(self) -> None:
        """Get ready for `reference`, before anything is trained, compiled or sharded.

        Adapters can be switched off; weights that are trained need a frozen copy, in the compute precision.
        """
        ...

    def reference(self, latents: Tensor, steps: int | Tensor, condition: Condition) -> Tensor:
        """The pretrained model's output [B, *latent_shape] in fp32, under guidance, without gradient.

        Arguments as `predict`; counted and timed as its calls are. Where weights are sharded they must be whole: inside
        `Engine.gathered()`.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of clean latents, without gradient.

        Raises:
            FloatingPointError: a latent is NaN or infinite.
        """
        ...

    def attach(self, forward: Callable[..., Tensor]) -> None:
        """Let calls with gradient go through an engine's wrapper of the network.

        Calls without gradient go to the network itself, whose weights must be whole: inside `Engine.gathered()`.
        """
        ...

    def uncounted(self) -> AbstractContextManager[None]:
        """A block whose calls are not counted: panels and checks are no part of what training costs."""
        ...

    def blocks(self) -> list[nn.Module]:
        """The network's blocks in their order, for compiling and for checkpointing activations."""
        ...

    def compile(self, mode: str) -> None:
        """Run the network compiled: none, unet (one graph) or blocks (a graph each)."""
        ...

    def save(self, folder: Path) -> None:
        """Write a diffusers folder (safetensors) that `DiffusionPipeline.from_pretrained` loads and runs."""
        ...

    def example(
        self, scheduler: str, num_inference_steps: int, eta: float, base: str = '"."', negative: str = ""
    ) -> str:
        """Lines of Python by which diffusers draws as this policy does, run in the folder that `save` wrote.

        The arguments are those of the policy's sampler, and `base` those of `from_pretrained` for the model that was
        tuned, which adapters are loaded into. `negative` is the negative prompt of a model that takes prompts.
        Afterwards `images` is [16, 3, H, W] in [0, 1].
        """
        ...
