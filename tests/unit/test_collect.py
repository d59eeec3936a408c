"""Collecting an iteration: anchors, windows, groups and their noise on every rank, and rewards pack by pack."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from hrf_fast.distributed import comm
from hrf_fast.noise import NoiseKey, noise_key
from hrf_fast.policies.sample import sample
from hrf_fast.rewards import build_reward
from hrf_fast.training.anchors import Anchors
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.collect import begin, collect
from hrf_fast.training.groups import Groups
from hrf_fast.training.probe import probe_starts
from hrf_fast.training.rewarding import Rewarder
from hrf_fast.training.rollout import rollout
from hrf_fast.windows.base import Window
from tests.conftest import T, make_algorithm, make_policy

SEED, SIZE, CPU = 7, 3, torch.device("cpu")


class Phases:
    """Stands in for a run: the names of its phases."""

    def __init__(self):
        self.names = []

    @contextmanager
    def phase(self, name):
        self.names.append(name)
        yield


class Schedule:
    """A user's schedule that answers `choose(num_groups, probe)`."""

    def __init__(self, choose, *, needs_anchors):
        self.choose, self.needs_anchors = choose, needs_anchors

    def __call__(self, iteration, num_groups, *, generator, probe):
        return self.choose(num_groups, probe)


def late(num_groups, probe):
    """One window each: [4, 5), [3, 5), [2, 5), [1, 5), and again."""
    return [Window(4 - number % 4, 5) for number in range(num_groups)]


def full(num_groups, probe):
    """All that can be trained, as from pure noise."""
    return [Window(0, 5)] * num_groups


def mixed(num_groups, probe):
    """Windows whose samples share their noise."""
    return [Window(2, 4, deterministic=True, shared=True)] * num_groups


class Brightness:
    """A reward that keeps the sizes of its batches."""

    def __init__(self):
        self.sizes = []

    def __call__(self, images, prompts=None):
        self.sizes.append(len(images))
        return images.mean((1, 2, 3))


def make_components(choose=late, *, needs_anchors=True, rank=0, ranks=1, plan=None, policy=None, **asked):
    """What collecting reads of a run's components: 4 groups of 3, two to an optimizer step."""
    prompts, guided = asked.get("prompts"), asked.get("guided", True)
    brightness = Brightness()
    reward = build_reward(brightness)
    return SimpleNamespace(
        policy=policy or make_policy(),
        reward=reward,
        brightness=brightness,
        rewarder=Rewarder(reward, CPU),
        schedule=Schedule(choose, needs_anchors=needs_anchors),
        groups=Groups(per_iteration=4, size=SIZE, per_step=2, rank=rank, ranks=ranks),
        call_plan=plan or CallPlan(SIZE),
        anchors=Anchors(),
        algorithm=make_algorithm(SEED, guided=guided, shared_noise=asked.get("shared_noise")),
        draw_prompts=lambda iteration: prompts or [None] * 4,
    )


# --- begin ------------------------------------------------------------------------------------------------------------


def test_a_schedule_without_anchors_costs_nothing():
    components, run = make_components(full, needs_anchors=False), Phases()
    windows, groups = begin(components, run, iteration=5)
    assert components.policy.calls.batches == 0 and run.names == ["search"]
    assert windows == [Window(0, 5)] * 4
    assert all(group.anchor is None and group.window == windows[number] for number, group in groups.items())


def test_each_group_has_its_anchor_drawn_under_its_number():
    components, run = make_components(needs_anchors=True), Phases()
    _, groups = begin(components, run, iteration=5)
    # 4 anchors over all steps, in one call a step
    assert (components.policy.calls.batches, components.policy.calls.forwards) == (T, 4 * T)
    assert run.names == ["anchors", "search"]
    key = NoiseKey(noise_key(SEED, 5, "anchors"), torch.arange(4))
    expected = sample(components.policy, key, images_per_call=64)
    assert all(torch.equal(group.anchor, expected[number]) for number, group in groups.items())


@pytest.mark.parametrize(("shared_noise", "expected"), [(None, False), (True, True), (False, False)])
def test_the_option_says_whether_samples_share_their_noise_and_null_leaves_it_to_the_schedule(shared_noise, expected):
    windows, groups = begin(make_components(shared_noise=shared_noise), Phases(), iteration=5)
    assert [window.shared for window in windows] == [expected] * 4
    assert all(group.window.shared is expected for group in groups.values())
    windows, _ = begin(make_components(mixed, needs_anchors=False, shared_noise=shared_noise), Phases(), iteration=5)
    assert all(window.shared is (shared_noise is not False) for window in windows)


def test_groups_and_samples_are_numbered_over_the_iteration_under_the_rollouts_key():
    _, groups = begin(make_components(), Phases(), iteration=5)
    assert list(groups) == [group.number for group in groups.values()] == [0, 1, 2, 3]
    assert groups[2].noise.sample_id.tolist() == [6, 7, 8]
    assert {group.noise.key for group in groups.values()} == {noise_key(SEED, 5, "rollout")}
    assert all(group.size == SIZE and group.condition.conditional == {} for group in groups.values())


def test_the_ranks_have_the_groups_of_one_process():
    all_windows, alone = begin(make_components(needs_anchors=True), Phases(), iteration=2)
    numbers = []
    for rank in (0, 1):
        windows, groups = begin(make_components(needs_anchors=True, rank=rank, ranks=2), Phases(), iteration=2)
        # windows of all groups on every rank
        assert windows == all_windows
        numbers.append(list(groups))
        for number, group in groups.items():
            assert torch.equal(group.noise.sample_id, alone[number].noise.sample_id)
            # fp32 sums of the UNet over another batch
            torch.testing.assert_close(group.anchor, alone[number].anchor, atol=1e-4, rtol=1e-4)
    # an optimizer step's two groups are shared
    assert numbers == [[0, 2], [1, 3]]


def test_iterations_differ_in_their_noise():
    keys = [begin(make_components(), Phases(), iteration)[1][0].noise.key for iteration in range(3)]
    assert len(set(keys)) == 3


def test_a_probe_measures_every_groups_anchor_under_the_searchs_own_noise():
    measured = []

    def choose(num_groups, probe):
        measured.extend(probe([[3, 5], [4], [], [2]]))
        return late(num_groups, probe)

    components = make_components(choose, needs_anchors=True)
    _, groups = begin(components, Phases(), iteration=5)
    expected = probe_starts(
        components.policy,
        components.reward,
        [group.anchor for group in groups.values()],
        [[3, 5], [4], [], [2]],
        [NoiseKey(noise_key(SEED, 5, "search"), group.noise.sample_id) for group in groups.values()],
        images_per_call=64,
    )
    for ours, theirs in zip(measured, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- what a user's schedule may return --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "returned None"),
        ((Window(0, 5),) * 4, r"returned \(Window"),
        ([0, 1, 2, 3], r"returned \[0, 1, 2, 3\]"),
        ([], "0 windows for 4 groups"),
        ([Window(0, 5)] * 3, "3 windows for 4 groups"),
        # of 6 steps the last is deterministic
        ([Window(0, 5)] * 3 + [Window(4, 6)], "window to 6; steps from 5 "),
    ],
)
def test_what_is_no_list_of_windows_is_refused_under_the_schedules_name(answer, message):
    components = make_components(lambda num_groups, probe: answer)
    with pytest.raises(ValueError, match=rf"window\.schedule {__name__}:Schedule .*{message}"):
        begin(components, Phases(), iteration=0)


def test_windows_that_another_rank_has_otherwise_are_refused_on_all(monkeypatch):
    monkeypatch.setattr("hrf_fast.distributed.comm.gather", lambda windows: [windows, [Window(1, 5)] * 4])
    with pytest.raises(ValueError, match="returned other windows on one rank than on another") as caught:
        begin(make_components(full, needs_anchors=False), Phases(), iteration=0)
    assert comm.said_by_main(caught.value)


def test_a_late_window_from_pure_noise_is_refused():
    with pytest.raises(ValueError, match=rf"{__name__}:Schedule returned a window from 4, but its needs_anchors is F"):
        begin(make_components(late, needs_anchors=False), Phases(), iteration=0)
    # deterministic steps lead to it
    windows, groups = begin(make_components(mixed, needs_anchors=False), Phases(), iteration=0)
    assert windows[0].start == 2 and groups[0].origin is not None


@pytest.mark.parametrize(
    ("candidates", "needs_anchors", "message"),
    [
        ([[0]] * 4, False, "needs_anchors"),
        ([[0]] * 3, True, r"\[\[0\], \[0\], \[0\]\] for 4 groups"),
        ([[0], [0], [6], [0]], True, "start 6; .* 0 to 5"),
        ([[0], [-1], [0], [0]], True, "start -1; .* 0 to 5"),
    ],
)
def test_a_probe_of_what_can_not_be_measured_is_refused_under_the_schedules_name(candidates, needs_anchors, message):
    components = make_components(lambda num_groups, probe: probe(candidates), needs_anchors=needs_anchors)
    with pytest.raises(ValueError, match=rf"window\.schedule {__name__}:Schedule .*{message}"):
        begin(components, Phases(), iteration=0)


# --- collect ----------------------------------------------------------------------------------------------------------


def collected(components, numbers=None):
    """(phases, rollout, the rewards of each pack, windows)."""
    windows, groups = begin(components, Phases(), iteration=0)
    run = Phases()
    rolled_out, pending = collect(components, run, [groups[number] for number in (numbers or groups)], 0)
    return run.names, rolled_out, [future.result() for future in pending], windows


@pytest.mark.parametrize(
    ("images_per_call", "packs"),
    [
        # a group by itself, in the order of groups
        (0, [[0], [1], [2], [3]]),
        # two groups, neighbouring starts together: starts are 4, 3, 2, 1
        (6, [[3, 2], [1, 0]]),
        (100, [[3, 2, 1, 0]]),
    ],
)
def test_rewards_are_asked_for_pack_by_pack(images_per_call, packs):
    components = make_components(plan=CallPlan(SIZE, images_per_call))
    phases, rolled_out, rewards, windows = collected(components)
    assert phases == ["rollout"] * len(packs)
    assert [list(part) for part in rewards] == packs
    assert components.brightness.sizes == [SIZE * len(pack) for pack in packs]
    for part in rewards:
        for number, group in part.items():
            trajectory = rolled_out.trajectories[number]
            assert trajectory.window == windows[number]
            again = rollout(components.policy, [trajectory.group], CallPlan(SIZE)).images[number]
            torch.testing.assert_close(group.rewards, again.mean((1, 2, 3)), rtol=0, atol=1e-5)
    # what is learnt from are the rewards: images of earlier packs are let go
    assert rolled_out.images == rolled_out.estimates == {}


def test_only_the_given_groups_are_rolled_out():
    _, rolled_out, rewards, _ = collected(make_components(), numbers=[2, 3])
    assert list(rolled_out.trajectories) == [2, 3] and [list(part) for part in rewards] == [[2], [3]]


@pytest.mark.parametrize(
    ("kept_pairs", "steps"),
    [
        (0, []),
        # of both groups together, 3 samples each: step 4 of both is 6 pairs, step 3 of group 1 three more
        (6, [4, 4]),
        (9, [4, 3, 4]),
        (float("inf"), [4, 3, 4]),
    ],
)
def test_graphs_are_kept_from_one_step_on_for_all_packs_together(kept_pairs, steps):
    plan = CallPlan(SIZE, order="on_policy", kept_pairs=kept_pairs)
    _, rolled_out, _, _ = collected(make_components(plan=plan), numbers=[0, 1])
    # windows [4, 5) and [3, 5)
    assert [call.steps.start for call in rolled_out.calls] == [4, 3, 4]
    assert [call.steps.start for call in rolled_out.calls if call.prediction is not None] == steps


def test_trajectories_are_matched_by_the_log_prob_of_their_whole_window():
    components = make_components()
    components.algorithm.sharpness = 1.0
    _, rolled_out, rewards, _ = collected(components)
    for number, group in (pair for part in rewards for pair in part.items()):
        # windows of 1, 2, 3 and 4 steps: the sum over them
        old = rolled_out.trajectories[number].old_log_prob
        torch.testing.assert_close(group.log_prob, sum(old.unbind()))


def test_the_prompts_of_anchors_that_serve_again_serve_with_them():
    asked = []
    components = make_components()
    components.anchors = Anchors(reuse=3)
    components.draw_prompts = lambda iteration: asked.append(iteration) or [None] * 4
    for iteration in range(5):
        begin(components, Phases(), iteration)
    assert asked == [0, 0, 0, 3, 3]
