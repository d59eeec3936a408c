"""Unconditional flow-matching models: loaded, trained, resumed, saved, and drawn as diffusers draws them."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel

from hrf_fast.evaluation.panel import Panel
from hrf_fast.policies.pixel import PixelPolicy
from hrf_fast.policies.sample import starting_noise
from hrf_kernels import gaussian_mean
from tests.conftest import make_smallest_unet, make_unet, tiny_words
from tests.loading import load_policy
from tests.runs import assert_equal_training, equal, metrics, train, weights
from tests.unit.test_card import drawn, lines_of

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def flow_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "flow"
    DDPMPipeline(make_smallest_unet(1, 16), FlowMatchEulerDiscreteScheduler(shift=2.0)).save_pretrained(folder)
    return folder


def words(model, folder, *more):
    return [*tiny_words(model, folder), "sample.scheduler=flow_sde", *more]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@torch.no_grad()
def by_ode(policy, noise):
    latents = starting_noise(policy, noise)
    for step in range(len(policy.sampler)):
        prediction = policy.predict(latents, step, policy.condition([None] * len(noise)))
        latents = gaussian_mean(prediction.combined, latents, policy.sampler.deterministic[step])
    return policy.decode(latents)


def test_a_run_saves_what_diffusers_draws_by_its_ode(flow_model, tmp_path, monkeypatch):
    options = ("evaluation.panel_size=16", "train.iterations=1", "sample.noise_level=0.5")
    result = train(words(flow_model, tmp_path / "run", *options), reward=brightness)
    folder = result.folder / "model"
    policy = load_policy(str(folder), scheduler="flow_sde", num_inference_steps=6)
    assert isinstance(policy, PixelPolicy)
    noise = Panel(16, 1234, 16).noise(policy)
    images = drawn(lines_of(folder), noise, policy.latent_shape, folder, monkeypatch)
    torch.testing.assert_close(images, by_ode(policy, noise).expand_as(images), rtol=0, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert "flow_sde, 6 steps, noise level 0.5" in card and "## Draw by the ODE" in card and "eta" not in card


def test_the_unet_is_given_sigmas_that_are_no_whole_numbers(flow_model):
    # a UNet2DModel turns a Python float into an int; tensors stay
    policy = load_policy(str(flow_model), scheduler="cps", num_inference_steps=6)
    latents, condition = torch.randn(2, *policy.latent_shape), policy.condition([None] * 2)
    timestep = policy.sampler.timesteps[2]
    assert float(timestep) % 1 > 0.1
    with torch.no_grad():
        expected = policy.unet(latents, timestep).sample
        assert torch.equal(policy.predict(latents, 2, condition).model_output, expected)
        assert torch.equal(policy.predict(latents, torch.tensor([2, 2]), condition).model_output, expected)
        assert not torch.equal(policy.unet(latents, int(timestep)).sample, expected)


@pytest.mark.parametrize(
    "schedule", ["dynamic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "clusters"))]
)
def test_a_run_of_every_method_is_on_policy_and_resumes_to_the_bit(schedule, flow_model, tmp_path):
    kwargs = {"full": "{}", "clusters": "{clusters: [[0, 3], [3, 6]]}", "dynamic": "{stride: 2}"}[schedule]
    options = (f"window.schedule={schedule}", f"window.kwargs={kwargs}", "train.order=on_policy", "evaluation.every=0")
    unbroken = train(words(flow_model, tmp_path / "unbroken", *options), reward=brightness).folder
    for iterations in (1, 2):
        resumed = words(flow_model, tmp_path / "resumed", *options, f"train.iterations={iterations}")
        train(resumed, reward=brightness)
    assert_equal_training(tmp_path / "resumed", unbroken)
    records = metrics(unbroken)
    assert [(record["ratio_mean"], record["ratio_max"]) for record in records] == [(1, 1), (1, 1)]
    assert not equal(weights(unbroken), weights(flow_model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample.scheduler": "ddim"}, "sample.scheduler is 'ddim' but the model is one of flow matching"),
        ({"sample.eta": 0.5}, "sample.eta is 0.5 but sample.scheduler is flow_sde"),
        ({"sample.scheduler": "cps", "sample.noise_level": 1.5}, "sample.noise_level is 1.5; cps takes at most 1"),
        ({"sample.scheduler": "ddim", "sample.noise_level": 0.5}, "sample.noise_level is 0.5 but .* is ddim"),
        ({"sample.num_inference_steps": 1}, "sample.num_inference_steps is 1"),
        ({"sample.guidance_scale": 3}, "sample.guidance_scale is 3"),
        ({"window.schedule": "clusters", "window.kwargs": "{clusters: [[5, 6]]}"}, "no step before the deterministic"),
    ],
    ids=str,
)
def test_options_that_a_flow_model_can_not_have_are_refused(change, message, flow_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(words(flow_model, tmp_path / "run", *(f"{name}={value}" for name, value in change.items())))


def test_a_model_of_ddpms_kind_has_no_flow_sampler(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"sample.scheduler is 'flow_sde'.*use one of ddim, ddpm, ddim_trl"):
        train(words(tiny_model, tmp_path / "run"))
    with pytest.raises(ValueError, match="sample.shift is 3, but model.name is .* which is none of flow matching"):
        load_policy(str(tiny_model), shift=3.0)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "DDIMPipeline"}, "a DDIMPipeline whose scheduler is FlowMatchEuler"),
        ("scheduler/scheduler_config.json", {"invert_sigmas": True}, "invert_sigmas: true"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting: true"),
        ("scheduler/scheduler_config.json", {"shift": 1e9}, "the shift 1000000000.0 .* do not fall"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
    ],
    ids=str,
)
def test_flow_models_of_other_kinds_are_refused_by_name(file, values, message, tmp_path):
    DDPMPipeline(make_smallest_unet(1, 16), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(config | values))
    with pytest.raises(ValueError, match=message):
        load_policy(str(tmp_path), scheduler="flow_sde", num_inference_steps=6)


def test_a_learned_table_of_steps_has_no_sigmas(tmp_path):
    unet = UNet2DModel(**{**make_unet(1).config, "time_embedding_type": "learned", "num_train_timesteps": 1000})
    DDPMPipeline(unet, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="time_embedding_type: 'learned'"):
        load_policy(str(tmp_path), scheduler="flow_sde", num_inference_steps=6)
