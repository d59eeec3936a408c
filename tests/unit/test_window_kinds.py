"""DDPO from noisy states, progressive and interior windows: which steps they train, and what follows them."""

import pytest
import torch

from hrf_fast.config.load import load_config
from hrf_fast.memory.counts import count_calls
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.optimizer_step import Clips, call_surrogate, window_share
from hrf_fast.training.rollout import rollout
from hrf_fast.windows.base import Window
from tests.conftest import T, make_group, make_policy
from tests.runs import metrics, train
from tests.unit.test_windows import draw, make, starts

# --- full, from noisy states ------------------------------------------------------------------------------------------


def test_ddpo_from_noisy_states_trains_every_step_of_the_suffix_from_anchors():
    schedule = make("full", {"renoised": True})
    assert schedule.needs_anchors is True and draw(schedule, num_groups=2) == [Window(0, 39)] * 2
    late = make("full", {"renoised": True, "start": 25})
    assert draw(late, iteration=3) == [Window(25, 39)]


@pytest.mark.parametrize(
    ("kwargs", "option"),
    [
        ({"start": 3}, "start is 3.*renoised=true"),
        ({"renoised": True, "start": 39}, "start is 39.*0 to 38"),
        ({"renoised": 1}, "renoised is 1"),
    ],
)
def test_a_start_that_full_can_not_have_is_refused(kwargs, option):
    with pytest.raises(ValueError, match=rf"window\.kwargs\.{option}"):
        make("full", kwargs)


# --- progressive ------------------------------------------------------------------------------------------------------


def test_progressive_windows_grow_towards_step_0_as_its_authors_do():
    # T 20, from the last 14 steps: stage i of 100 trains 14 + floor(7 i / 100), so 15 from stage 15 on (105/100), 16
    # from 29 on (203/100), 20 from 86 on (602/100)
    schedule = make("progressive", T=20)
    expected = {0: 14, 14: 14, 15: 15, 28: 15, 29: 16, 85: 19, 86: 20, 99: 20, 100: 20, 500: 20}
    assert {i: 20 - starts(schedule, i)[0] for i in expected} == expected
    assert draw(schedule, 15, num_groups=2) == [Window(5, 19)] * 2


def test_progressive_windows_start_where_they_are_told():
    # the last 2 of 10 steps, of which one is deterministic; all 10 after 9 of 9 iterations: one more each
    schedule = make("progressive", {"first_steps": 2, "iterations": 9}, T=10)
    assert [starts(schedule, i)[0] for i in range(11)] == [8, 7, 6, 5, 4, 3, 2, 1, 0, 0, 0]


@pytest.mark.parametrize("kwargs", [{"first_steps": 1}, {"first_steps": 41}, {"first_steps": 2.0}, {"iterations": 0}])
def test_progressive_windows_that_hold_nothing_or_too_much_are_refused(kwargs):
    with pytest.raises(ValueError, match=rf"window\.kwargs\.{next(iter(kwargs))} is "):
        make("progressive", kwargs)


# --- interior ---------------------------------------------------------------------------------------------------------


def test_interior_windows_have_their_width_wherever_they_start():
    # 39 steps to train: windows of 4 start at 0 to 35
    windows = draw(make("interior"), num_groups=600)
    assert {len(window) for window in windows} == {4} and {window.start for window in windows} == set(range(36))
    assert {w.start for w in draw(make("interior", {"width": 2, "starts": [5, 7]}), num_groups=50)} == {5, 6}
    assert {w.start for w in draw(make("interior", {"starts": {"steps": [3, 9]}}), num_groups=50)} == {3, 9}


@pytest.mark.parametrize(
    ("kwargs", "option"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": 40}, "width is 40.*39 steps"),
        ({"width": 4, "starts": [30, 40]}, r"starts is \[30, 40\].*0 to 35"),
        ({"starts": [5, 5]}, r"starts is \[5, 5\]"),
        ({"starts": 3}, "starts is 3"),
    ],
)
def test_interior_windows_that_do_not_fit_are_refused(kwargs, option):
    with pytest.raises(ValueError, match=rf"window\.kwargs\.{option}"):
        make("interior", kwargs)


def test_a_windows_share_of_the_steps():
    # HRF's (40 − 10)/40 to the end, the deterministic step included; 4 steps of 40 inside; all for DDPO
    assert window_share(Window(10, 39), 39, 40) == 0.75
    assert window_share(Window(10, 14), 39, 40) == 0.1
    assert window_share(Window(0, 39), 39, 40) == 1.0
    # without a deterministic step
    assert window_share(Window(10, 40), 40, 40) == 0.75 and window_share(Window(10, 39), 40, 40) == 0.725


def test_an_interior_window_is_stored_and_trained_and_the_steps_after_it_only_run():
    policy = make_policy()
    group = make_group(policy, Window(1, 3), size=2, anchor=torch.zeros(3, 16, 16))
    before = policy.calls.forwards
    rolled = rollout(policy, [group], CallPlan(2), keep_from=1)
    trajectory = rolled.trajectories[0]
    # steps 1 to 5 of 6 run; 1 and 2 are stored, and have graphs
    assert policy.calls.forwards - before == 2 * (T - 1)
    assert trajectory.latents.shape[:2] == (3, 2) and trajectory.old_log_prob.shape == (2, 2)
    assert [call.steps.start for call in rolled.calls] == [1, 2]
    assert all(call.prediction.model_output.requires_grad for call in rolled.calls)
    # the image is that of a window to the end from the same start, which draws the same noise
    whole = make_group(policy, Window(1, T - 1), size=2, anchor=torch.zeros(3, 16, 16))
    longer = rollout(policy, [whole], CallPlan(2))
    assert torch.equal(rolled.images[0], longer.images[0]) and not rolled.images[0].requires_grad
    assert torch.equal(trajectory.latents, longer.trajectories[0].latents[:3])


def test_an_interior_window_scales_its_clips_by_its_own_length():
    policy = make_policy()
    group = make_group(policy, Window(1, 3), size=2, anchor=torch.zeros(3, 16, 16))
    trajectory = rollout(policy, [group], CallPlan(2)).trajectories[0]
    advantages = {0: torch.tensor([3.0, -3.0])}
    call = CallPlan(2).replay({0: group.window})[1]
    loss = call_surrogate(policy, {0: trajectory}, advantages, call, Clips(1e-4, 2.5, True)).loss
    # on policy the ratio is 1, and the loss −A clipped to 2.5·2/6
    assert loss.tolist() == pytest.approx([-2.5 / 3, 2.5 / 3], rel=1e-6)


def test_a_run_of_interior_windows_is_counted_and_planned_as_it_is_made(tiny_run, tmp_path):
    words = ["window.schedule=interior", "window.kwargs={width: 2, starts: [1, 2]}", "train.iterations=1"]
    words = [*tiny_run, *words, "evaluation.every=0", "evaluation.panel_size=2"]
    train(words, reward=lambda images, prompts=None: images.mean((1, 2, 3)))
    (record,) = metrics(tmp_path / "run")
    # 2 anchors of 6 steps; 2 groups of 3 from step 1 on, 5 steps; 2 of these again, with gradient
    assert (record["window_starts"], record["window_steps"]) == ([1, 1], 4)
    assert (record["forwards"], record["backwards"]) == (2 * 6 + 6 * 5 + 6 * 2, 6 * 2)
    counts = count_calls(load_config(words), stop=5, branches=1)
    assert (counts.anchors, counts.rollout, counts.update, counts.longest_window) == (12, 30, 12, 2)
