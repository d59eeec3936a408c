"""Windows with noise inside and deterministic steps around them: MixGRPO and Flow-GRPO-Fast."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hrf_fast.config.load import load_config
from hrf_fast.memory.counts import count_calls
from hrf_fast.policies.flow_sampler import build_flow_sampler
from hrf_fast.policies.pixel import PixelPolicy
from hrf_fast.policies.sample import starting_noise
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.collect import begin
from hrf_fast.training.prefix import prefixes
from hrf_fast.training.rollout import rollout
from hrf_fast.windows.base import Window
from hrf_kernels import gaussian_mean
from tests.conftest import T, make_group, make_policy, make_unet
from tests.runs import metrics, train
from tests.unit.test_collect import Phases, make_components
from tests.unit.test_windows import draw, make, starts


def make_flow_policy():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    sampler = build_flow_sampler(scheduler, kind="flow_sde", num_inference_steps=T)
    return PixelPolicy(make_unet().eval(), scheduler, sampler)


@torch.no_grad()
def ode(policy, latents, first, last):
    """Latents after the deterministic steps [first, last), step by step."""
    for step in range(first, last):
        output = policy.predict(latents, step, policy.condition([None] * len(latents))).model_output
        latents = gaussian_mean(output, latents, policy.sampler.deterministic[step])
    return latents


# --- schedules --------------------------------------------------------------------------------------------------------


def test_mixgrpos_window_moves_one_step_every_25_iterations_and_begins_again():
    # 39 steps to train: windows of 4 start at 0 to 35, so the 36th move is back to 0
    schedule = make("mixgrpo")
    expected = {0: 0, 24: 0, 25: 1, 49: 1, 50: 2, 874: 34, 875: 35, 899: 35, 900: 0}
    assert {i: starts(schedule, i)[0] for i in expected} == expected
    assert draw(schedule, 50, num_groups=3) == [Window(2, 6, deterministic=True, shared=True)] * 3
    assert schedule.needs_anchors is False
    # as in the paper it stays at the end
    staying = make("mixgrpo", {"wrap": False})
    assert [starts(staying, i)[0] for i in (875, 900, 9000)] == [35, 35, 35]
    # 9 steps: 0, 3 and the last place, 5
    wide = make("mixgrpo", {"stride": 3, "iterations_per_start": 1}, T=10)
    assert [starts(wide, i)[0] for i in range(4)] == [0, 3, 5, 0]


def test_flow_grpo_fasts_windows_lie_in_the_first_half():
    windows = draw(make("flow_grpo_fast"), num_groups=500)
    assert {(window.start, len(window)) for window in windows} == {(start, 2) for start in range(19)}
    assert all(window.deterministic and window.shared for window in windows)
    narrow = draw(make("flow_grpo_fast", {"width": 3, "inside": [5, 9]}), num_groups=50)
    assert {(window.start, window.stop) for window in narrow} == {(5, 8), (6, 9)}
    assert all(window.deterministic and window.shared for window in narrow)


@pytest.mark.parametrize(
    ("name", "kwargs", "option"),
    [
        ("mixgrpo", {"width": 0}, "width is 0"),
        ("mixgrpo", {"width": 40}, "width is 40.*39 steps"),
        ("mixgrpo", {"stride": 0}, "stride"),
        ("mixgrpo", {"iterations_per_start": 0}, "iterations_per_start"),
        ("mixgrpo", {"wrap": 1}, "wrap is 1"),
        ("flow_grpo_fast", {"inside": [38, 40]}, r"inside is \[38, 40\].*end at 39"),
        ("flow_grpo_fast", {"inside": [3, 4]}, r"inside is \[3, 4\].*at least 2 steps"),
        ("flow_grpo_fast", {"inside": 3}, "inside is 3"),
        ("flow_grpo_fast", {"width": 41}, "width is 41"),
    ],
)
def test_windows_that_do_not_fit_are_refused(name, kwargs, option):
    with pytest.raises(ValueError, match=rf"window\.kwargs\.{option}"):
        make(name, kwargs)


# --- prefix and rollout -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [make_policy, make_flow_policy], ids=["ddim", "flow"])
@pytest.mark.parametrize("shared", [True, False])
def test_deterministic_steps_lead_to_the_window_and_on_from_it(policy, shared):
    policy = policy()
    group = make_group(policy, Window(2, 4, deterministic=True, shared=shared), size=3)
    noise = starting_noise(policy, group.noise)
    before = policy.calls.forwards
    (origin,) = prefixes(policy, [group], images_per_call=64).values()
    # two steps, of one sample where the noise is shared
    assert policy.calls.forwards - before == 2 * (1 if shared else 3)
    expected = ode(policy, noise[:1].expand_as(noise) if shared else noise, 0, 2)
    torch.testing.assert_close(origin, expected, rtol=0, atol=1e-5)
    group = make_group(policy, group.window, size=3)
    object.__setattr__(group, "origin", origin)
    before = policy.calls.forwards
    rolled_out = rollout(policy, [group], CallPlan(3))
    trajectory = rolled_out.trajectories[0]
    # steps 2 to 5 of 6
    assert policy.calls.forwards - before == 3 * 4
    assert torch.equal(trajectory.latents[0], origin) and trajectory.old_log_prob.shape == (2, 3)
    # the noise of the window parts the samples
    assert not torch.equal(trajectory.latents[1][0], trajectory.latents[1][1])
    clean = ode(policy, trajectory.latents[-1], 4, T)
    torch.testing.assert_close(rolled_out.images[0], policy.decode(clean), rtol=0, atol=1e-5)


def test_steps_after_an_anchors_window_may_be_deterministic_too():
    policy = make_policy()
    group = make_group(policy, Window(1, 3, deterministic=True), size=2, anchor=torch.zeros(3, 16, 16))
    rolled_out = rollout(policy, [group], CallPlan(2))
    clean = ode(policy, rolled_out.trajectories[0].latents[-1], 3, T)
    torch.testing.assert_close(rolled_out.images[0], policy.decode(clean), rtol=0, atol=1e-5)


def mixed(num_groups, probe):
    return [Window(number % 4, number % 4 + 1, deterministic=True, shared=True) for number in range(num_groups)]


@pytest.mark.parametrize("images_per_call", [0, 2])
def test_every_group_is_given_its_own_prefix_whatever_shares_its_calls(images_per_call):
    components = make_components(mixed, needs_anchors=False, plan=CallPlan(3, images_per_call))
    _, groups = begin(components, Phases(), iteration=2)
    # prefixes of 0, 1, 2 and 3 steps, of one sample each
    assert components.policy.calls.forwards == 6
    for group in groups.values():
        alone = prefixes(components.policy, [group], images_per_call=64)[group.number]
        torch.testing.assert_close(group.origin, alone, rtol=0, atol=1e-4)
        assert torch.equal(group.origin[0], group.origin[2]) and group.anchor is None
    # a window at step 0 starts from the shared noise itself
    assert torch.equal(groups[0].origin[0], starting_noise(components.policy, groups[0].noise)[0])


def test_windows_of_an_iteration_are_alike():
    def unlike(num_groups, probe):
        return [Window(1, 2, deterministic=number > 0) for number in range(num_groups)]

    with pytest.raises(ValueError, match=r"some are deterministic or shared and others not"):
        begin(make_components(unlike), Phases(), iteration=0)


@pytest.mark.parametrize(
    ("schedule", "shared"),
    [("mixgrpo", "null"), ("mixgrpo", "false"), ("flow_grpo_fast", "null"), ("clusters", "true")],
)
def test_a_run_costs_what_the_plan_says_and_its_ratio_is_1(schedule, shared, tiny_run):
    words = [*tiny_run, f"window.schedule={schedule}", "train.order=on_policy", "evaluation.every=0"]
    words.append(f"window.shared_noise={shared}")
    kwargs = {"mixgrpo": "{width: 2, iterations_per_start: 1}", "flow_grpo_fast": "{inside: [1, 5]}", "clusters": "{}"}[
        schedule
    ]
    words.append(f"window.kwargs={kwargs}")
    records = metrics(train(words).folder)
    assert [(record["ratio_mean"], record["ratio_max"]) for record in records] == [(1, 1), (1, 1)]
    counts = count_calls(load_config(words), 5, branches=1)
    assert records[-1]["forwards"] in (2 * counts.forwards("keep", 1), 2 * counts.forwards("replay", 1))
    assert counts.anchors > 0
