"""The text-to-image model that ships: its files load offline, its pictures and its classifier are those of the card."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hrf_fast.assets import ASSETS
from hrf_fast.noise import NoiseKey
from hrf_fast.policies.sample import sample
from hrf_fast.prompts import Prompt
from hrf_fast.rewards import RewardError, build_reward
from hrf_fast.vision.load import load_classifier, load_feature_network
from hrf_fast.vision.shipped import load_reference, load_shipped
from tests.loading import load_policy

PEEPS = ASSETS / "peeps"
CAPTIONS = (PEEPS / "captions.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def labels():
    return load_file(PEEPS / "reference.safetensors")["labels"].long()


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(PEEPS / "model", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts, steps, guidance=3.0):
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    return pipeline(prompts, generator=generator, **arguments).images


def test_the_folder_loads_as_it_is_in_full_precision_and_draws_in_two_steps(pipeline):
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {next(part.parameters()).dtype for part in parts} == {torch.float32}
    images = draw(pipeline, CAPTIONS[:2], steps=2)
    assert images.shape == (2, 3, 64, 64) and images.isfinite().all()
    assert images.min() >= 0 and images.max() <= 1


def test_a_sentence_of_its_words_is_one_token_each_and_others_are_spelt(pipeline):
    tokens = pipeline.tokenizer.tokenize("an angry person, in a green shirt")
    assert tokens == [f"{word}</w>" for word in ("an", "angry", "person", ",", "in", "a", "green", "shirt")]
    assert "".join(pipeline.tokenizer.tokenize("Zebra")).replace("</w>", "") == "zebra"
    assert max(len(pipeline.tokenizer(caption).input_ids) for caption in CAPTIONS) <= 32


def test_the_classifier_reads_the_captions_off_the_reference_drawings(labels):
    log_probs = load_classifier("classifier.model", "peeps").log_probs(load_reference("peeps"))
    assert labels.shape == (512, 7) and list(log_probs)[2] == "expression"
    for column, values in enumerate(log_probs.values()):
        assert (values.argmax(1) == labels[:, column]).float().mean() >= 0.99
    assert load_feature_network("evaluation.network", "peeps").features(load_reference("peeps")[:2]).shape == (2, 128)


def test_the_captions_name_what_the_labels_say(labels):
    names = load_shipped("peeps").labels
    for caption, label in zip(CAPTIONS, labels.tolist(), strict=True):
        shirt, background = names["shirt"][label[5]], names["background"][label[6]]
        assert f"in a {shirt} " in caption and caption.endswith((f"{background} background", f"{background} wall"))
        assert ("sunglasses" in caption or "shades" in caption) == (names["accessories"][label[3]] == "sunglasses")


def test_the_autoencoder_keeps_every_attribute(pipeline, labels):
    with torch.no_grad():
        latents = pipeline.vae.encode(load_reference("peeps")[:64] * 2 - 1).latent_dist.mean
        images = pipeline.vae.decode(latents).sample / 2 + 0.5
    # latents are normalised in the network: StableDiffusionPipeline's scaling factor is 1
    assert pipeline.vae.config.scaling_factor == 1 and latents.shape == (64, 16, 8, 8)
    assert latents.mean().abs() < 0.1 and abs(latents.std() - 1) < 0.1
    log_probs = load_shipped("peeps").log_probs(images.clamp(0, 1))
    right = [values.argmax(1) == labels[:64, column] for column, values in enumerate(log_probs.values())]
    assert torch.stack(right).float().mean() >= 0.97


def test_pictures_follow_their_prompts(pipeline, labels):
    log_probs = load_shipped("peeps").log_probs(draw(pipeline, CAPTIONS[:16], steps=10))
    right = [values.argmax(1) == labels[:16, column] for column, values in enumerate(log_probs.values())]
    assert torch.stack(right).float().mean() >= 0.85


def test_every_file_is_small_and_readable():
    files = [path for path in PEEPS.rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 10e6 and path.stat().st_mode & 0o044 == 0o044 for path in files)
    assert sum(path.stat().st_size for path in (PEEPS / "model").rglob("*") if path.is_file()) < 9e6
    index = json.loads((PEEPS / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


def test_it_is_a_policy_by_its_name_whose_guidance_follows_the_prompt(labels):
    policy = load_policy("peeps", num_inference_steps=10, guidance_scale=3.0)
    noise = NoiseKey(1, torch.arange(8))
    images = policy.decode(sample(policy, noise, [Prompt(text) for text in CAPTIONS[:8]], images_per_call=8))
    log_probs = load_shipped("peeps").log_probs(images)
    right = [values.argmax(1) == labels[:8, column] for column, values in enumerate(log_probs.values())]
    assert torch.stack(right).float().mean() >= 0.8


def test_the_reward_attribute_is_the_log_probability_of_what_a_prompt_names_or_of_its_target(labels):
    images, named = load_reference("peeps")[:4], load_shipped("peeps").labels
    log_probs = load_shipped("peeps").log_probs(images)
    sunglasses = log_probs["accessories"][:, named["accessories"].index("sunglasses")]
    fixed = build_reward("attribute", kwargs={"target": "accessories=sunglasses"})
    torch.testing.assert_close(fixed(images).total, sunglasses)
    prompts = [Prompt("x", metadata={"attributes": {"skin": "dark", "accessories": "sunglasses"}})] * 4
    dark = log_probs["skin"][:, named["skin"].index("dark")]
    torch.testing.assert_close(build_reward("attribute")(images, prompts).total, (dark + sunglasses) / 2)
    with pytest.raises(RewardError, match=r"reward\.kwargs\.target is null"):
        build_reward("attribute")(images, [Prompt("x")] * 4)
    with pytest.raises(ValueError, match=r"reward\.kwargs\.target is 'accessories=monocle'"):
        build_reward("attribute", kwargs={"target": "accessories=monocle"})
