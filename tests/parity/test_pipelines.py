"""Parity with diffusers' pipelines of Stable Diffusion and SDXL: what the UNet is fed, latents and images."""

import pytest
import torch

from hrf_fast.policies.base import Condition
from hrf_fast.policies.families.stable_diffusion import time_ids
from hrf_fast.prompts import Prompt
from tests.parity.text_golden import case, close, denoise, policy

CASES = ("sd.eta0", "sd.eta1", "sd.negative", "xl.eta0", "xl.eta1")


def load(key):
    facts, tensors = case("pipelines", key)
    steps, scale = facts["num_inference_steps"], facts["guidance_scale"]
    loaded = policy("pipelines", f"{key.partition('.')[0]}_", num_inference_steps=steps, guidance_scale=scale)
    negative = facts.get("negative_prompt", [""] * len(facts["prompts"]))
    return facts, tensors, loaded, [Prompt(*texts) for texts in zip(facts["prompts"], negative, strict=True)]


@pytest.mark.parametrize("key", CASES)
def test_the_unet_is_fed_what_the_pipeline_feeds_it(key):
    _, tensors, loaded, prompts = load(key)
    inputs = loaded.condition(prompts).inputs
    assert {f"unet_{name}" for name in inputs} == {name for name in tensors if name.startswith("unet_")}
    for name, rows in inputs.items():
        close(rows, tensors[f"unet_{name}"])
    # without guidance: the second half alone
    for name, rows in loaded.condition(prompts, guided=False).inputs.items():
        close(rows, tensors[f"unet_{name}"].chunk(2)[1])


@pytest.mark.parametrize("key", CASES)
def test_latents_and_images_at_given_noise(key):
    facts, tensors, loaded, prompts = load(key)
    assert loaded.sampler.timesteps.tolist() == tensors["timesteps"].tolist()
    # the last step of Stable Diffusion's scheduler has noise, and is in windows
    assert loaded.sampler.stochastic_steps == facts["num_inference_steps"]
    table = loaded.sampler.coefficients if facts["eta"] else loaded.sampler.deterministic
    denoise(loaded, loaded.condition(prompts), tensors, table)


def test_time_ids_are_original_size_crop_and_target_size():
    facts, tensors = case("pipelines", "xl.sizes_b1")
    names = ("original_size", "crops_coords_top_left", "target_size")
    ours = torch.stack([time_ids(*(facts[f"{start}{name}"] for name in names)) for start in ("negative_", "")])
    assert torch.equal(ours, tensors["unet_time_ids"])
    # of two images diffusers' pipeline gives the second pair where embeddings are all negative, then all positive
    _, tensors = case("pipelines", "xl.sizes_batch")
    assert torch.equal(ours.repeat(2, 1), tensors["unet_time_ids"])


def test_a_condition_holds_a_prompt_for_the_second_encoder_and_sizes_for_the_negative_prompt():
    # no option has them: a source's prompt_2 is refused, see test_prompts.py
    facts, tensors = case("pipelines", "xl.sizes_b1")
    loaded = policy("pipelines", "xl_", num_inference_steps=5, guidance_scale=facts["guidance_scale"])
    encoder = loaded._encoder
    width = encoder.encoders[0].config.hidden_size
    halves = []
    for start in ("", "negative_"):
        (first,) = facts["prompts"] if not start else [facts["negative_prompt"]]
        (second,) = facts["prompt_2"] if not start else [facts["negative_prompt_2"]]
        names = (f"{start}{name}" for name in ("original_size", "crops_coords_top_left", "target_size"))
        one, two = (encoder.rows([text]) for text in (first, second))
        hidden = [one["encoder_hidden_states"][..., :width], two["encoder_hidden_states"][..., width:]]
        ids = time_ids(*(facts[name] for name in names))[None]
        rows = {"encoder_hidden_states": torch.cat(hidden, -1), "text_embeds": two["text_embeds"], "time_ids": ids}
        halves.append(rows)
    condition = Condition(*halves)
    for name, rows in condition.inputs.items():
        close(rows, tensors[f"unet_{name}"])
    denoise(loaded, condition, tensors, loaded.sampler.coefficients)


def test_latents_follow_the_time_ids(monkeypatch):
    facts, tensors, loaded, prompts = load("xl.positive_sizes_batch")
    names = ("original_size", "crops_coords_top_left", "target_size")
    ids = time_ids(*(facts[name] for name in names))
    monkeypatch.setattr("hrf_fast.policies.families.stable_diffusion.time_ids", lambda *_: ids)
    condition = loaded.condition(prompts)
    assert torch.equal(condition.inputs["time_ids"], tensors["unet_time_ids"])
    denoise(loaded, condition, tensors, loaded.sampler.deterministic)


def test_the_tolerance_rejects_another_prompt():
    facts, tensors, loaded, prompts = load("sd.eta0")
    with pytest.raises(AssertionError):
        denoise(loaded, loaded.condition(prompts[::-1]), tensors, loaded.sampler.deterministic)
