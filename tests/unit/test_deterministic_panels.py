"""Panels by deterministic steps: those of diffusers, in any number, in training and in every command on a run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hrf_fast.assembly.components import build_components
from hrf_fast.cli import main
from hrf_fast.config.load import load_config
from hrf_fast.config.options import FACTS
from hrf_fast.evaluation.panel import Panel
from hrf_fast.noise import NoiseKey
from hrf_fast.policies.sample import sample, sample_as_released, starting_noise
from hrf_fast.prompts import Prompt
from tests.conftest import make_policy, tiny_words
from tests.loading import load_policy
from tests.prompted import make_prompted_policy
from tests.runs import assert_equal_training, panels, train, with_folder
from tests.unit.test_card import drawn, lines_of, save
from tests.unit.test_flow import flow_model  # noqa: F401 (a fixture)

pytestmark = pytest.mark.long

NOISE = NoiseKey(3, torch.arange(3))


def brightness(images, prompts=None):
    return images.mean((1, 2, 3))


@torch.no_grad()
def by_diffusers(policy, scheduler, steps, **options):
    """Clean latents by a scheduler of diffusers, step by step."""
    scheduler.set_timesteps(steps)
    latents = starting_noise(policy, NOISE)
    for timestep in scheduler.timesteps:
        output = policy.unet(latents, timestep).sample
        latents = scheduler.step(output, timestep, latents, **options).prev_sample
    return latents


# --- the steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip_sample": True}, {"set_alpha_to_one": False, "steps_offset": 1}, {"timestep_spacing": "trailing"}],
    ids=str,
)
def test_fewer_and_more_steps_than_t_are_those_of_ddim_with_eta_0(steps, options):
    from diffusers import DDIMScheduler

    policy = make_policy(**options)
    before = policy.sampler
    drawn_here = sample_as_released(policy, NOISE, [None] * 3, steps=steps, images_per_call=2)
    expected = by_diffusers(policy, DDIMScheduler.from_config(policy.scheduler.config), steps, eta=0.0)
    # fp32, over up to 20 calls of a network and divisions by a small signal
    assert (drawn_here - expected).abs().max() < 1e-3 * expected.abs().max()
    # the policy of T 6 is as it was
    assert policy.sampler is before and policy.calls.forwards == 3 * steps


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_the_steps_of_a_flow_are_those_of_its_ode(steps, flow_model):  # noqa: F811
    from diffusers import FlowMatchEulerDiscreteScheduler

    policy = load_policy(str(flow_model), scheduler="cps", num_inference_steps=6)
    latents = sample_as_released(policy, NOISE, [None] * 3, steps=steps, images_per_call=2)
    expected = by_diffusers(policy, FlowMatchEulerDiscreteScheduler.from_config(policy.scheduler.config), steps)
    assert (latents - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_policy_has_its_sampler_back_after_an_error(monkeypatch):
    policy = make_policy()
    before = policy.sampler
    monkeypatch.setattr(policy, "predict", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample_as_released(policy, NOISE, [None] * 3, steps=2, images_per_call=2)
    assert policy.sampler is before


def test_a_panel_of_prompts_is_guided_and_its_images_have_their_own_noise_and_prompts():
    policy = make_prompted_policy()
    panel = Panel(4, 1, 3, None, tuple(map(Prompt, ("red", "green"))), 2, deterministic_steps=9)
    images = panel.images(policy)
    assert policy.asked == [(["red", "red", "green"], True), (["green"], True)]
    whole = sample_as_released(
        policy, panel.noise(policy), [panel.prompt(image) for image in range(4)], steps=9, images_per_call=4
    )
    torch.testing.assert_close(images, policy.decode(whole), rtol=0, atol=1e-5)
    # with the noise of training the panel is another
    assert not torch.allclose(images, Panel(4, 1, 3, None, panel.prompts, 2).images(policy), atol=1e-2)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddim", "ddpm", "ddim_trl", "latent", "cps"])
def test_the_lines_of_the_card_draw_the_panel_without_noise(kind, flow_model, tmp_path, monkeypatch):  # noqa: F811
    model = flow_model if kind == "cps" else tmp_path / "given"
    if kind != "cps":
        save("latent" if kind == "latent" else "DDPMScheduler", model)
    scheduler = "ddim" if kind == "latent" else kind
    words = [*tiny_words(model, tmp_path / "run"), f"sample.scheduler={scheduler}", "train.iterations=1"]
    words += ["sample.num_inference_steps=4", "evaluation.panel_size=16", "evaluation.deterministic_steps=9"]
    result = train(words, reward=brightness)
    folder = result.folder / "model"
    policy = load_policy(str(folder), scheduler=scheduler, num_inference_steps=4)
    noise = Panel(16, 1234, 16).noise(policy)
    images = drawn(lines_of(folder), noise, policy.latent_shape, folder, monkeypatch)
    assert float(brightness(images).mean()) == pytest.approx(result.last_panel["reward"][0], abs=1e-4)
    fewer = lines_of(folder).replace("num_inference_steps=9", "num_inference_steps=4")
    other = drawn(fewer, noise, policy.latent_shape, folder, monkeypatch)
    assert fewer != lines_of(folder) and (other - images).abs().max() > 1e-2
    card = (folder / "README.md").read_text()
    name = "the ODE" if kind == "cps" else "DDIM with eta 0"
    assert f"noise of seed 1234, {name}, 9 steps without noise, fp32" in card
    assert f"| sampler in training | {scheduler}, 4 steps, {'noise level 0.8' if kind == 'cps' else 'eta 1'} |" in card
    assert "## Draw as the panel does" in card and "Draw by the ODE" not in card


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run of T 6 whose panels are of 9 deterministic steps."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    words = [*tiny_words(tiny_model, run), "evaluation.deterministic_steps=9", "evaluation.network=fashion"]
    assert main(["train", *words, "evaluation.panel_size=8"]) == 0
    return run


def test_panels_alone_depend_on_the_option(finished, tiny_model, tmp_path):
    words = [*tiny_words(tiny_model, tmp_path / "noisy"), "evaluation.network=fashion", "evaluation.panel_size=8"]
    train(words)
    # counters of network calls are among the metrics
    assert_equal_training(finished, tmp_path / "noisy")
    for with_noise, without in zip(panels(tmp_path / "noisy"), panels(finished), strict=True):
        assert with_noise["rewards"] != without["rewards"]
    assert FACTS["evaluation.deterministic_steps"].panel


def test_a_resumed_run_has_equal_panels(tiny_run, finished, tmp_path):
    words = [*tiny_run, "evaluation.deterministic_steps=9", "evaluation.network=fashion", "evaluation.panel_size=8"]
    for iterations in (1, 2):
        train(with_folder(words, tmp_path / "halves", f"train.iterations={iterations}"))
    assert panels(tmp_path / "halves") == panels(finished)


def test_evaluate_and_blend_draw_as_the_panels_did_and_evaluate_in_other_steps(finished, capsys):
    def tuned(*words):
        assert main(["evaluate", str(finished), *words]) == 0
        return json.loads((finished / "evaluation.json").read_text())

    last = panels(finished)[-1]["rewards"]
    assert tuned()["tuned"]["rewards"] == last
    other = tuned("evaluation.deterministic_steps=3")
    assert other["evaluation"]["deterministic_steps"] == 3 and other["tuned"]["rewards"] != last
    assert main(["blend", str(finished), "--most", "1", "--step", "1", "--keep", "0.01"]) == 0
    front = [json.loads(line) for line in (finished / "blend" / "front.jsonl").read_text().splitlines()]
    assert [line["rewards"] for line in front[:2]] == [panels(finished)[0]["rewards"], last]


def grid(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_sample_draws_as_the_panels_did_unless_other_steps_are_asked_for(finished, tmp_path, capsys):
    out = tmp_path / "grid.png"

    def draw(model, *words):
        assert main(["sample", str(model), "--out", str(out), "--count", "8", *words]) == 0
        return grid(out), capsys.readouterr().out

    images, said = draw(finished)
    assert "8 images of" in said and said.endswith("in 9 deterministic steps\n")
    assert np.abs(images - grid(finished / "samples" / "iteration-000002.png")).max() <= 1
    fewer, said = draw(finished / "model", "--deterministic-steps", "3")
    assert said.endswith("in 3 deterministic steps\n") and np.abs(fewer - images).max() > 8
    noisy, said = draw(finished, "--deterministic-steps", "0", "--eta", "0.5")
    assert said.endswith("in 6 steps\n")
    policy = load_policy(str(finished / "model"), num_inference_steps=6, eta=0.5)
    expected = policy.decode(sample(policy, Panel(8, 1234, 8).noise(policy), images_per_call=8))
    # the first image in the first corner, enlarged by whole pixels
    scale = noisy.shape[1] // (3 * 16) or 1
    corner = noisy[: 16 * scale : scale, : 16 * scale : scale] / 255
    assert np.abs(corner - expected[0].permute(1, 2, 0).numpy()).max() < 0.01


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--steps", "5"],
            "--steps is 5, but images are drawn by deterministic steps (panels of the run are of 9 such",
        ),
        (
            ["--eta", "0.5", "--deterministic-steps", "3"],
            "--eta is 0.5, but .*(--deterministic-steps is 3).*leave it out",
        ),
        (["--scheduler", "ddpm", "--deterministic-steps", "3"], "--scheduler is ddpm, but .*leave it out"),
        (["--deterministic-steps", "-1"], "--deterministic-steps is -1; it must be at least 0"),
        (["--deterministic-steps", "1001"], "evaluation.deterministic_steps is 1001; use 1 to 1000, as trained"),
    ],
    ids=str,
)
def test_options_that_deterministic_steps_do_not_follow_are_refused(words, message, finished, tmp_path, capsys):
    assert main(["sample", str(finished), "--out", str(tmp_path / "grid.png"), *words]) == 1
    error = capsys.readouterr().err
    assert all(part in error for part in message.split(".*"))


def test_a_flow_that_is_drawn_without_noise_needs_no_sampler(flow_model, tmp_path, capsys):  # noqa: F811
    words = ["--deterministic-steps", "3", "--count", "2", "--device", "cpu"]
    assert main(["sample", str(flow_model), *words, "--out", str(tmp_path / "grid.png")]) == 0
    assert "in 3 deterministic steps" in capsys.readouterr().out


def test_steps_that_the_scheduler_has_not_are_refused_before_anything_runs(tiny_run):
    with pytest.raises(ValueError, match="evaluation.deterministic_steps is 1001; use 1 to 1000, as trained"):
        build_components(load_config([*tiny_run, "evaluation.deterministic_steps=1001"]))
