"""Weights of the denoising steps in the loss."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hrf_fast.assembly.model import build_policy
from hrf_fast.config.load import load_config
from hrf_fast.policies.flow_sampler import build_flow_sampler
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.optimizer_step import Clips, call_surrogate
from hrf_fast.training.rollout import rollout
from hrf_fast.training.step_weights import range_factors, step_weights
from hrf_fast.windows.base import Window
from tests.conftest import make_group, make_policy
from tests.runs import metrics, train, with_folder

pytestmark = pytest.mark.long

ADVANTAGES = torch.tensor([3.0, -0.5, 1.0, -2.0])


def test_std_weights_have_a_mean_of_one_over_the_stochastic_steps():
    sampler = make_policy().sampler
    weights = step_weights("std", sampler)
    assert float(weights[: sampler.stochastic_steps].mean()) == pytest.approx(1.0)
    # a ratio of weights is that of the noises
    ratio = sampler.coefficients.std[1] / sampler.coefficients.std[0]
    assert float(weights[1] / weights[0]) == pytest.approx(float(ratio))
    assert step_weights("equal", sampler) is None


@pytest.mark.parametrize("images_per_call", [0, 8])
def test_the_loss_of_a_step_is_multiplied_by_its_weight(images_per_call):
    policy = make_policy()
    group = make_group(policy, Window(1, 4), anchor=torch.zeros(policy.latent_shape))
    plan = CallPlan(4, images_per_call)
    rolled_out = rollout(policy, [group], plan)
    clips = Clips(clip_range=0.1, advantage_clip=2.5, scale_by_window=True)
    weights = torch.arange(1.0, len(policy.sampler) + 1)
    for call in plan.replay({0: group.window}):
        plain, weighted = (
            call_surrogate(policy, rolled_out.trajectories, {0: ADVANTAGES}, call, chosen)
            for chosen in (clips, replace(clips, step_weights=weights))
        )
        expected = plain.loss * weights[torch.tensor(call.steps)].repeat_interleave(4)
        torch.testing.assert_close(weighted.loss, expected)
        assert float(plain.loss.detach().abs().sum()) > 0


def test_a_run_is_weighted_by_the_option(tiny_run, tmp_path):
    runs = [
        train(with_folder(tiny_run, tmp_path / name, f"train.step_weights={name}")).folder for name in ("equal", "std")
    ]
    equal, std = (metrics(run)[0] for run in runs)
    # one rollout, other gradients
    assert equal["reward_mean"] == std["reward_mean"]
    assert equal["grad_norm"] != std["grad_norm"]


def test_weights_of_flow_steps_by_hand():
    # sigmas 1, .5, .001, 0 (T 3, shift 1; the last but one is the scheduler's least), falls .5, .499, .001; the last
    # step is deterministic. Dance-SDE: std .3 * sqrt(fall)
    sampler = build_flow_sampler(FlowMatchEulerDiscreteScheduler(), kind="dance_sde", num_inference_steps=3)
    torch.testing.assert_close(sampler.noise, torch.tensor([1.0, 0.5005, 0.001]))
    falls = torch.tensor([0.4995, 0.4995, 0.001])
    torch.testing.assert_close(step_weights("dt", sampler), falls / 0.4995)
    torch.testing.assert_close(step_weights("guard", sampler), torch.tensor([1.0, 1.0, 0.0]))
    sampler = build_flow_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), kind="dance_sde", num_inference_steps=4)
    falls = -torch.cat([sampler.noise, torch.zeros(1)]).diff()
    guard = 0.3 / falls[:3].sqrt()
    torch.testing.assert_close(step_weights("guard", sampler)[:3], guard / guard.mean())
    assert float(step_weights("dt", sampler)[:3].mean()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["guard", "dt"])
def test_weights_of_flow_steps_need_a_flow_model(name):
    with pytest.raises(ValueError, match=f"train.step_weights is {name}.*none of flow matching"):
        step_weights(name, make_policy().sampler)


def test_a_range_is_that_of_the_log_ratio_that_is_named():
    sampler = make_policy().sampler
    std = sampler.coefficients.std
    assert range_factors("equal", sampler) is None
    # a log-ratio times std stays within ε where ours stays within ε/std; Flow-CPS's is 2·std² times ours
    stochastic = slice(sampler.stochastic_steps)
    torch.testing.assert_close(range_factors("std", sampler)[stochastic], 1 / std[stochastic])
    torch.testing.assert_close(range_factors("cps", sampler)[stochastic], 1 / (2 * std[stochastic] ** 2))
    assert bool(range_factors("std", sampler).isfinite().all())


@pytest.mark.parametrize("images_per_call", [0, 8])
def test_the_ratio_of_a_step_is_held_to_its_range(images_per_call):
    policy = make_policy()
    group = make_group(policy, Window(1, 4), anchor=torch.zeros(policy.latent_shape))
    plan = CallPlan(4, images_per_call)
    trajectories = rollout(policy, [group], plan).trajectories
    # ratios of e^0.05 = 1.051 under a range of 0.1 at step 2, and of a tenth of it at steps 1 and 3
    trajectories[0].old_log_prob.sub_(0.05)
    factors = torch.tensor([1.0, 0.1, 1.0, 0.1, *[1.0] * (len(policy.sampler) - 4)])
    clips = Clips(clip_range=0.1, advantage_clip=2.5, scale_by_window=False, range_factors=factors)
    outside = [
        call_surrogate(policy, trajectories, {0: ADVANTAGES}, call, clips).outside
        for call in plan.replay({0: group.window})
    ]
    assert torch.cat(outside).bool().tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_the_self_check_holds_rounding_against_the_ranges_of_the_steps_that_it_replays(tiny_run, tmp_path, capsys):
    words = with_folder(tiny_run, tmp_path / "run", "train.clip_steps=cps", "window.schedule=full")
    train([*words, "train.iterations=1"])
    sampler = build_policy(load_config(words)).sampler
    # of six steps the last is deterministic, and the two before it are replayed
    largest = float(sampler.coefficients.std[3:5].max())
    (shown,) = re.findall(r"smallest clip range ([^;]*);", capsys.readouterr().out)
    assert float(shown) == pytest.approx(1e-4 / (2 * largest**2), rel=0.05)
