"""Parity with the HRF authors' code: losses, ratios, gradients and HRF-D's choices at recorded trajectories."""

import json

import pytest
import torch

from hrf_fast.config.options import OptimizerConfig
from hrf_fast.engines.plain import PlainEngine
from hrf_fast.noise import NoiseKey
from hrf_fast.policies.base import Condition
from hrf_fast.policies.pixel import PixelPolicy
from hrf_fast.policies.sampler import build_sampler
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.groups import Group
from hrf_fast.training.optimizer_step import Clips, optimizer_step
from hrf_fast.training.standardising import group_advantages
from hrf_fast.training.trajectory import Trajectory
from hrf_fast.windows.base import Window
from hrf_fast.windows.criterion import select_start
from hrf_kernels import gaussian_log_prob, gaussian_mean
from tests.conftest import GOLDEN, GRADIENT_TOLERANCE, LOSS_TOLERANCE, make_scheduler, make_unet

CASES = ("hrf_T10_clip", "hrf_T10_noclip", "hrf_T40_late", "ddpo_T10")


def load_case(golden, name):
    """(numbers, tensors, policy under the new weights, trajectory of our window) of one case."""
    cases, tensors = golden
    numbers = cases[name]
    case = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    unet = make_unet().eval()
    unet.load_state_dict({k.removeprefix("unet_new."): v for k, v in case.items() if k.startswith("unet_new.")})
    scheduler = make_scheduler(clip_sample=numbers["clip_sample"])
    sampler = build_sampler(
        scheduler, kind="ddim", num_inference_steps=numbers["num_inference_steps"], eta=numbers["eta"]
    )
    window, size = Window(numbers["start"], sampler.stochastic_steps), numbers["batch"]
    trajectory = Trajectory(
        # the noise is in the recorded latents
        Group(0, window, NoiseKey(0, torch.arange(size)), Condition()),
        latents=case["trajectory"][: len(window) + 1],
        old_log_prob=case["log_probs_old"][: len(window)],
    )
    return numbers, case, PixelPolicy(unet, scheduler, sampler), trajectory


def run_update(numbers, case, policy, trajectory, images_per_call=0):
    """Our optimizer step on a golden case; returns (stats, gradients by name)."""
    engine = PlainEngine(policy.unet, OptimizerConfig(weight_decay=0.0, max_grad_norm=0.0))
    stats = optimizer_step(
        engine,
        policy,
        {0: trajectory},
        {0: case["advantages"]},
        CallPlan(numbers["batch"], images_per_call).replay({0: trajectory.window}),
        Clips(numbers["clip_range"], numbers["clip_advantage"], scale_by_window=True),
    )
    return stats, {name: parameter.grad for name, parameter in policy.unet.named_parameters()}


def gradient_error(gradients, case):
    expected = {
        k.removeprefix("grad_without_last_step."): v for k, v in case.items() if k.startswith("grad_without_last")
    }
    assert set(expected) == set(gradients)
    difference = sum((gradients[k] - v).double().square().sum() for k, v in expected.items()).sqrt()
    return float(difference / sum(v.double().square().sum() for v in expected.values()).sqrt())


@pytest.mark.parametrize("name", CASES)
def test_the_window_ends_before_the_degenerate_last_step(golden, name):
    numbers, case, policy, trajectory = load_case(golden, name)
    # theirs trains on [start, T), the last step with sigma 0 clamped to 1e-6; ours stops one step earlier
    assert trajectory.window.stop == numbers["num_inference_steps"] - 1
    assert len(case["trajectory"]) == numbers["num_inference_steps"] - numbers["start"] + 1


@pytest.mark.parametrize("name", CASES)
def test_advantages_are_those_of_the_authors(golden, name):
    _, case, _, _ = load_case(golden, name)
    ours = group_advantages(case["rewards"], torch.zeros(len(case["rewards"]), dtype=torch.long), floor=1e-6)
    # theirs divides by std + 1e-6: 4e-6 relative at a std of 0.27
    torch.testing.assert_close(ours, case["advantages"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_mean_sigma_and_log_prob_of_every_window_step(golden, name):
    _, case, policy, trajectory = load_case(golden, name)
    for i, step in enumerate(range(trajectory.window.start, trajectory.window.stop)):
        coefficients = policy.sampler.coefficients[step]
        now, following = trajectory.latents[i], trajectory.latents[i + 1]
        with torch.no_grad():
            output = policy.predict(now, step, Condition()).model_output
        torch.testing.assert_close(coefficients.std, case["sigma"][i], atol=1e-6, rtol=2e-5)
        # their scheduler works in fp32, so differences are a few ulp of x0's terms
        torch.testing.assert_close(gaussian_mean(output, now, coefficients), case["mean"][i], atol=2e-5, rtol=1e-5)
        ours = gaussian_log_prob(output, now, following, coefficients)
        torch.testing.assert_close(ours, case["logp_new"][i], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("calls", ["one step a call", "one image a call", "three steps a call"])
def test_loss_and_every_gradient(golden, name, calls):
    numbers, case, policy, trajectory = load_case(golden, name)
    images = {"one step a call": 0, "one image a call": 1, "three steps a call": 3 * numbers["batch"]}[calls]
    stats, gradients = run_update(numbers, case, policy, trajectory, images)
    scale = float(case["advantages"].abs().mean())
    assert abs(float(stats.loss) - float(case["total_loss_without_last_step"])) <= LOSS_TOLERANCE * scale
    assert gradient_error(gradients, case) <= GRADIENT_TOLERANCE


def test_the_tolerance_rejects_a_gradient_that_is_one_percent_off(golden):
    numbers, case, policy, trajectory = load_case(golden, "hrf_T10_noclip")
    _, gradients = run_update(numbers, case, policy, trajectory)
    assert gradient_error({k: v * 1.01 for k, v in gradients.items()}, case) > GRADIENT_TOLERANCE


def test_the_degenerate_step_would_show_in_the_loss(golden):
    # theirs, sigma clamped to 1e-6: the last step's log-probs are rounding noise, and its loss is 0.17 to 0.43
    _, tensors = golden
    for name in CASES:
        theirs, ours = tensors[f"{name}.total_loss"], tensors[f"{name}.total_loss_without_last_step"]
        assert abs(float(theirs - ours)) > 1000 * LOSS_TOLERANCE, name


@pytest.mark.parametrize(
    "record", json.loads((GOLDEN / "hrf_d_selection.json").read_text()), ids=lambda r: str(r["chosen_start"])
)
def test_hrf_d_chooses_the_start_that_their_code_chose(record):
    chosen = select_start(
        record["candidate_starts"],
        torch.tensor(record["mean_rewards"], dtype=torch.float64),
        torch.tensor(record["mean_distances"], dtype=torch.float64),
        beta=record["beta"],
    )
    assert chosen == record["chosen_start"]
