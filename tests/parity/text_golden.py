"""Golden files of text-to-image models: their pipelines as folders, and their cases as time-major tensors."""

import functools
import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hrf_fast.policies.parts import quiet
from hrf_kernels import gaussian_log_prob, gaussian_mean
from tests.conftest import GOLDEN
from tests.loading import load_policy

# latents and images, relative to their scale; log-probs; losses, which nearly cancel, so that only a difference counts
LATENTS = LOG_PROBS = 1e-5
LOSSES = 5e-6


@functools.cache
def read(name):
    """(metadata, tensors) of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        return metadata, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def case(name, key):
    """(facts, tensors) of one case; what has steps is time-major."""
    metadata, tensors = read(name)
    found = {k.removeprefix(f"{key}."): v for k, v in tensors.items() if k.startswith(f"{key}.")}
    steps = len(found["timesteps"])
    for k, tensor in found.items():
        has_steps = tensor.dim() > 1 and tensor.shape[1] in (steps, steps + 1) and ".grad." not in k
        if has_steps and (k in ("latents", "noise", "model_output", "log_probs") or k.startswith("new.")):
            found[k] = tensor.transpose(0, 1).contiguous()
    return metadata["cases"][key], found


def module(name, kind, config, prefix):
    """A network of a golden file with its weights."""
    _, tensors = read(name)
    network = kind(config) if isinstance(config, CLIPTextConfig) else kind.from_config(config)
    network.load_state_dict({k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")})
    return network.eval()


def tokenizer(config):
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length")
    merges = [tuple(merge.split()) for merge in config["merges"]]
    return CLIPTokenizer(vocab=config["vocab"], merges=merges, **{name: config[name] for name in names})


@functools.cache
def folder(name, prefix="", scheduler="scheduler"):
    """The pipeline of a golden file as a folder: its keys begin with `prefix`; for trl_ddpo by scheduler eps or v."""
    configs = read(name)[0]["configs"]
    parts = {
        "unet": module(name, UNet2DConditionModel, configs[f"{prefix}unet"], f"{prefix}unet"),
        "vae": module(name, AutoencoderKL, configs[f"{prefix}vae"], f"{prefix}vae"),
        "scheduler": DDIMScheduler(**(configs.get("schedulers", configs)[scheduler])),
        "tokenizer": tokenizer(configs["tokenizer"]),
    }
    encoder = CLIPTextConfig(**configs[f"{prefix}text_encoder"])
    parts["text_encoder"] = module(name, CLIPTextModel, encoder, f"{prefix}text_encoder")
    path = Path(_root().name) / f"{name}-{prefix}{scheduler}"
    with quiet():
        if prefix == "xl_":
            second = CLIPTextConfig(**configs["xl_text_encoder_2"])
            parts["text_encoder_2"] = module(name, CLIPTextModelWithProjection, second, "xl_text_encoder_2")
            pipeline = StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer(configs["tokenizer_2"]))
        else:
            checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipeline = StableDiffusionPipeline(**parts, **checker)
        pipeline.save_pretrained(path)
    return path


@functools.cache
def _root():
    return tempfile.TemporaryDirectory(prefix="golden_")


def policy(name, prefix="", saved="scheduler", **options):
    return load_policy(str(folder(name, prefix, saved)), **options)


def close(ours, theirs, tolerance=LATENTS):
    """Assert that tensors are equal to a part of their scale."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))


@torch.no_grad()
def denoise(policy, condition, tensors, table):
    """Our own trajectory from the golden start and noise, against the golden one at every step; the clean latents."""
    latents = tensors["latents"][0]
    for step in range(len(policy.sampler)):
        prediction = policy.predict(latents, step, condition)
        close(prediction.combined, tensors["model_output"][step])
        before, mean = latents, gaussian_mean(prediction.combined, latents, table[step])
        latents = mean + table[step].std * tensors["noise"][step] if "noise" in tensors else mean
        close(latents, tensors["latents"][step + 1])
        if "log_probs" in tensors:
            ours = gaussian_log_prob(prediction.combined, before, latents, table[step])
            torch.testing.assert_close(ours, tensors["log_probs"][step], rtol=0, atol=LOG_PROBS)
    close(policy.decode(latents), tensors["images"])
