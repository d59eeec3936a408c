"""Fixtures and makers: small models made on the spot, and the golden numbers of the HRF authors' code."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors import safe_open

from hrf_fast.config.options import OptimizerConfig
from hrf_fast.engines.plain import PlainEngine
from hrf_fast.noise import NoiseKey
from hrf_fast.policies.pixel import PixelPolicy
from hrf_fast.policies.sampler import build_sampler
from hrf_fast.training.groups import Group
from hrf_fast.training.reference import NO_REFERENCE
from hrf_fast.windows.base import Window

GOLDEN = Path(__file__).parent / "golden"

# parity tolerances, each with its reason
LOSS_TOLERANCE = 1e-5  # of the loss scale: fp32 sums over steps and pixels in another order
GRADIENT_TOLERANCE = 1e-3  # relative norm: fp32 ratios near 1 lose digits at small std


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def forget_user_modules(tmp_path_factory):
    """A module that a test wrote and imported is gone after it: another test's may have the same name."""
    path, folder = list(sys.path), str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = path
    # each is looked at once: there are four thousand, and most tests take less than a look at all
    for name in sys.modules.keys() - _NOT_USERS:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
            del sys.modules[name]
        else:
            _NOT_USERS.add(name)


_NOT_USERS: set[str] = set()


@pytest.fixture
def offline(monkeypatch):
    """A file of the hub that is not there fails at once, not after half a minute of retries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def golden():
    """(cases, tensors) of hrf_reference.safetensors."""
    with safe_open(GOLDEN / "hrf_reference.safetensors", framework="pt") as file:
        cases = json.loads(file.metadata()["cases"])
        return cases, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def make_unet(channels: int = 3, size: int = 16, seed: int = 0):
    """The tiny UNet of the golden numbers, randomly initialised."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )


def make_smallest_unet(channels: int, size: int, attention: bool = False, seed: int = 0, head: int = 4, **options):
    """A UNet of one block, with one layer of attention or none, randomly initialised; options are UNet2DModel's."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("AttnDownBlock2D" if attention else "DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=head,
        add_attention=False,
        **options,
    )


def make_scheduler(kind: str = "DDIMScheduler", **options):
    import diffusers

    return getattr(diffusers, kind)(**{"beta_start": 1e-4, "beta_end": 0.02, **options})


@pytest.fixture
def not_measured(monkeypatch):
    """Plans without activations, which take seconds to measure, for tests of what else is in a plan."""
    monkeypatch.setattr("hrf_fast.memory.footprint._peaks", lambda *_: (0, 0, 0))


# denoising steps of `make_policy`, of which the last is deterministic
T = 6


def make_policy(seed: int = 0, **scheduler_options) -> PixelPolicy:
    """A policy of one block and one layer of attention that is in no folder."""
    scheduler = make_scheduler(**{"clip_sample": False, **scheduler_options})
    sampler = build_sampler(scheduler, kind="ddim", num_inference_steps=T, eta=1.0)
    return PixelPolicy(make_smallest_unet(3, 16, attention=True, seed=seed).eval(), scheduler, sampler)


def make_engine(policy, max_grad_norm: float = 0.0, ema_decay: float = 0.0) -> PlainEngine:
    options = OptimizerConfig(weight_decay=0.0, max_grad_norm=max_grad_norm, ema_decay=ema_decay)
    return PlainEngine(policy.network, options)


def make_algorithm(seed: int, **options) -> SimpleNamespace:
    """What collecting reads of a run's algorithm."""
    neutral = {"guided": True, "sharpness": 0.0, "gae_lambda": None, "shared_noise": None}
    return SimpleNamespace(seed=seed, reference=lambda iteration: NO_REFERENCE, **neutral | options)


def make_group(policy, window: Window, *, number: int = 0, size: int = 4, anchor=None) -> Group:
    """A group before its rollout; its samples are numbered as those of group `number` of an iteration."""
    noise = NoiseKey(5, torch.arange(number * size, (number + 1) * size))
    return Group(number, window, noise, policy.condition([None] * size), anchor)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A diffusers folder with a tiny random 3-channel DDPM, as `DDPMPipeline.save_pretrained` writes it."""
    from diffusers import DDPMPipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    DDPMPipeline(make_smallest_unet(3, 16, attention=True), make_scheduler("DDPMScheduler")).save_pretrained(folder)
    return folder


def tiny_words(model, folder) -> list[str]:
    """Arguments of a run of seconds on the tiny model: two iterations of two groups of 3, six denoising steps."""
    return [
        f"model.name={model}",
        "sample.num_inference_steps=6",
        "train.iterations=2",
        "train.groups_per_iteration=2",
        "train.group_size=3",
        "optimizer.learning_rate=1e-4",
        "evaluation.every=1",
        "evaluation.panel_size=6",
        "run.save_every=1",
        "run.progress=json",
        f"run.folder={folder}",
    ]


@pytest.fixture
def tiny_run(tiny_model, tmp_path):
    """`tiny_words` of a run in tmp_path/run."""
    return tiny_words(tiny_model, tmp_path / "run")


@pytest.fixture
def write_study(tmp_path):
    """Writes a study of two arms and two seeds, with changes to it, and gives its path."""

    def write(**changes):
        values = {
            "config": str(Path(__file__).parents[1] / "configs" / "smoke_cpu.yaml"),
            "seeds": [1, 2],
            "arms": {"ddpo": {"window": {"schedule": "full"}}, "hrf": {}},
            "reference": "ddpo",
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(
            yaml.safe_dump({k: v for k, v in {**values, **changes}.items() if v is not None}, sort_keys=False)
        )
        return path

    return write


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory):
    """A folder with the smallest AutoencoderTiny of four latent channels."""
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("decoders") / "taesd"
    torch.manual_seed(0)
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    channels = {"encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4)}
    AutoencoderTiny(latent_channels=4, **blocks, **channels).save_pretrained(folder)
    return folder
