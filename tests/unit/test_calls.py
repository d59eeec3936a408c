"""Which samples and steps share a network call, by hand; and over drawn plans, that each is there once."""

import math
import random
from dataclasses import replace

import pytest

from hrf_fast.training.calls import SAMPLED_TOGETHER, CallPlan, together
from hrf_fast.windows.base import Window


def listed(calls):
    """Calls as ([(group, first, last)], first step, stop, trained)."""
    return [
        ([tuple(piece) for piece in call.pieces], call.steps.start, call.steps.stop, call.trained) for call in calls
    ]


# --- lanes ------------------------------------------------------------------------------------------------------------


def test_lanes_join_when_the_step_reaches_their_start():
    # T 4: lane 0 from step 1, lane 1 from step 3
    calls = list(together([1, 3], [2, 2], 4, images_per_call=4))
    assert calls == [(1, [0]), (2, [0]), (3, [0, 1])]


def test_a_call_holds_at_most_images_per_call_and_whole_lanes():
    # 3 + 3 fit into 6, the third does not; a lane of 9 is alone
    assert list(together([0, 0, 0], [3, 3, 3], 1, images_per_call=6)) == [(0, [0, 1]), (0, [2])]
    assert list(together([0, 0], [9, 1], 1, images_per_call=6)) == [(0, [0]), (0, [1])]


def test_lanes_beyond_their_window_share_no_call_with_lanes_inside():
    # lane 0 ends its window at 1, lane 1 at 2
    calls = list(together([0, 0], [1, 1], 3, images_per_call=2, stops=[1, 2]))
    assert calls == [(0, [0, 1]), (1, [1]), (1, [0]), (2, [0, 1])]


def test_every_lane_runs_every_step_from_its_start_once():
    starts, sizes = [5, 0, 3, 3, 9], [5, 2, 4, 1, 3]
    calls = list(together(starts, sizes, 10, images_per_call=7, stops=[9, 8, 9, 6, 10]))
    for lane, start in enumerate(starts):
        assert [step for step, lanes in calls if lane in lanes] == list(range(start, 10))


# --- plans by hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images_per_call", "order", "piece", "groups_per_call", "steps_per_call", "sampled"),
    [
        # groups of 4: as published, one and a half, a part, two and a half
        (0, "collect", 4, 1, 1, SAMPLED_TOGETHER),
        (6, "collect", 4, 1, 1, 6),
        (3, "collect", 3, 1, 1, 3),
        (10, "collect", 4, 2, 2, 10),
        # on policy the calls of the rollout are replayed: one step each
        (0, "on_policy", 4, 1, 1, SAMPLED_TOGETHER),
        (10, "on_policy", 4, 2, 1, 10),
    ],
)
def test_sizes_of_calls_by_hand(images_per_call, order, piece, groups_per_call, steps_per_call, sampled):
    plan = CallPlan(4, images_per_call, order)
    assert (plan.piece, plan.groups_per_call, plan.steps_per_call, plan.sampled) == (
        piece,
        groups_per_call,
        steps_per_call,
        sampled,
    )


def test_neighbouring_starts_share_a_pack_and_alone_groups_keep_their_order():
    windows = {0: Window(3, 5), 1: Window(0, 5), 2: Window(4, 5), 3: Window(1, 5), 4: Window(2, 5)}
    assert CallPlan(4).packs(windows) == CallPlan(4, 7).packs(windows) == [[0], [1], [2], [3], [4]]
    # by start: 1 at 0, 3 at 1, 4 at 2, 0 at 3, 2 at 4; 8 images are two groups
    assert CallPlan(4, 8).packs(windows) == [[1, 3], [4, 0], [2]]
    assert CallPlan(4, 100).packs(windows) == [[1, 3, 4, 0, 2]]


def test_a_rollout_by_hand():
    # T 4: group 0 trains steps 1 and 2, group 1 step 2; step 3 finishes both
    windows = {0: Window(1, 3), 1: Window(2, 3)}
    assert listed(CallPlan(4, 8).rollout(windows, 4)) == [
        ([(0, 0, 4)], 1, 2, True),
        ([(0, 0, 4), (1, 0, 4)], 2, 3, True),
        ([(0, 0, 4), (1, 0, 4)], 3, 4, False),
    ]
    # at most 3 images: pieces of 3 and 1, of which the 1 and the next 3 do not share a call of 3
    assert listed(CallPlan(4, 3).rollout({0: Window(2, 3)}, 4)) == [
        ([(0, 0, 3)], 2, 3, True),
        ([(0, 3, 4)], 2, 3, True),
        ([(0, 0, 3)], 3, 4, False),
        ([(0, 3, 4)], 3, 4, False),
    ]


def test_a_replay_of_the_order_collect_by_hand():
    windows = {0: Window(1, 4), 7: Window(3, 4)}
    # as published: a group and a step a call
    assert listed(CallPlan(4).replay(windows)) == [
        ([(0, 0, 4)], 1, 2, True),
        ([(0, 0, 4)], 2, 3, True),
        ([(0, 0, 4)], 3, 4, True),
        ([(7, 0, 4)], 3, 4, True),
    ]
    # 8 images: two steps of a group, the last one alone
    assert listed(CallPlan(4, 8).replay(windows)) == [
        ([(0, 0, 4)], 1, 3, True),
        ([(0, 0, 4)], 3, 4, True),
        ([(7, 0, 4)], 3, 4, True),
    ]
    # 2 images: two pieces, step by step within a piece
    assert listed(CallPlan(4, 2).replay({0: Window(1, 3)})) == [
        ([(0, 0, 2)], 1, 2, True),
        ([(0, 0, 2)], 2, 3, True),
        ([(0, 2, 4)], 1, 2, True),
        ([(0, 2, 4)], 2, 3, True),
    ]


def test_an_update_replays_in_the_order_collect_and_reuses_the_calls_of_the_rollout_on_policy():
    windows = {0: Window(1, 3)}
    rolled_out = CallPlan(4, 0, "on_policy").rollout(windows, 4)
    assert CallPlan(4, 0, "on_policy").update(rolled_out, windows) is rolled_out
    assert listed(CallPlan(4, 8).update(rolled_out, windows)) == [([(0, 0, 4)], 1, 3, True)]


@pytest.mark.parametrize(
    ("kept_pairs", "expected"),
    [
        # groups of 4 with windows [1, 4) and [3, 6): pairs from step 5 on 4, from 4 on 8, from 3 on 4·(1 + 3) = 16,
        # from 2 on 20, from 1 on 24
        (0, None),
        (3, None),
        (4, 5),
        (8, 4),
        (15, 4),
        (16, 3),
        (23, 2),
        # no window starts before step 1, so that all of them is step 0
        (24, 0),
        (math.inf, 0),
    ],
)
def test_the_first_kept_step_by_hand(kept_pairs, expected):
    plan = CallPlan(4, order="on_policy", kept_pairs=kept_pairs)
    assert plan.keep_from([Window(1, 4), Window(3, 6)]) == expected


@pytest.mark.parametrize(
    ("images_per_call", "splits", "expected"),
    [
        # groups of 5; what is sampled are 4 anchors and a panel of 128
        (0, (4, 128), [5]),
        (0, (1, 128), [5, 1]),
        # 65 images are sampled as 64 and 1
        (0, (4, 65), [5, 1]),
        # pieces of 2, 2 and 1
        (2, (4, 128), [2, 1]),
        # the largest batch is at least 2, for the graph of any batch
        (1, (4, 128), [2, 1]),
        # three steps of a group at once; 4 and 128 are split by 15 into 4 and 8 and 8
        (15, (4, 128), [15]),
        # 31 = 2·15 + 1
        (15, (4, 31), [15, 1]),
    ],
)
def test_batches_of_one_are_compiled_where_a_split_leaves_one(images_per_call, splits, expected):
    assert CallPlan(5, images_per_call).sizes(splits) == expected


# --- drawn plans ------------------------------------------------------------------------------------------------------


def draw(generator):
    """(plan, windows, T) with windows of one stop, as schedules make them, or of several."""
    num_steps, count = generator.randint(1, 8), generator.randint(1, 5)
    plan = CallPlan(
        generator.randint(2, 6),
        generator.choice([0, 1, 2, 3, 5, 7, 12, 40]),
        generator.choice(["collect", "on_policy"]),
    )
    common = generator.random() < 0.5
    stops = [num_steps if common else generator.randint(1, num_steps) for _ in range(count)]
    windows = {3 * group: Window(generator.randrange(stop), stop) for group, stop in enumerate(stops)}
    return plan, windows, num_steps


def pairs(calls, group_size):
    """How often a (group, sample, step) is in the calls."""
    counts = {}
    for call in calls:
        for piece in call.pieces:
            assert 0 <= piece.first < piece.last <= group_size
            for pair in ((piece.group, n, s) for n in range(piece.first, piece.last) for s in call.steps):
                counts[pair] = counts.get(pair, 0) + 1
    return counts


def expected_pairs(windows, group_size, stop=None):
    return {
        (group, sample, step): 1
        for group, window in windows.items()
        for sample in range(group_size)
        for step in range(window.start, window.stop if stop is None else stop)
    }


def test_a_drawn_plan_has_every_sample_at_every_step_once_and_no_call_too_large():
    for seed in range(200):
        plan, windows, num_steps = draw(random.Random(seed))
        size, replay = plan.group_size, plan.replay(windows)
        assert pairs(replay, size) == expected_pairs(windows, size), seed
        packs = [{group: windows[group] for group in pack} for pack in plan.packs(windows)]
        assert sorted(group for pack in packs for group in pack) == sorted(windows), seed
        rollouts = [plan.rollout(pack, num_steps) for pack in packs]
        rolled_out = [call for calls in rollouts for call in calls]
        assert pairs(rolled_out, size) == expected_pairs(windows, size, num_steps), seed
        for call in [*replay, *rolled_out]:
            assert call.images <= max(plan.images_per_call, plan.piece), seed
            assert len(call.steps) == 1 or len(call.pieces) == 1, seed
            # all inside their windows or all beyond them
            inside = {step < windows[piece.group].stop for piece in call.pieces for step in call.steps}
            assert inside == {call.trained}, seed
        for calls in rollouts:
            steps = [call.steps.start for call in calls]
            assert steps == sorted(steps), seed


def test_on_policy_a_drawn_replay_makes_the_very_calls_of_the_rollouts():
    for seed in range(100):
        plan, windows, num_steps = draw(random.Random(seed))
        plan = replace(plan, order="on_policy")
        packs = [{group: windows[group] for group in pack} for pack in plan.packs(windows)]
        trained = [call for pack in packs for call in plan.rollout(pack, num_steps) if call.trained]
        assert plan.replay(windows) == trained, seed


def test_drawn_kept_graphs_fit_and_those_of_one_step_more_would_not():
    for seed in range(100):
        generator = random.Random(seed)
        plan, windows, _ = draw(generator)
        plan = replace(plan, order="on_policy", kept_pairs=generator.randint(0, 40))
        steps = [step for window in windows.values() for step in range(window.start, window.stop)]
        first = plan.keep_from(windows.values())
        first = max(steps) + 1 if first is None else first

        def kept(start, steps=steps, size=plan.group_size):
            return size * sum(step >= start for step in steps)

        assert kept(first) <= plan.kept_pairs, seed
        assert first == 0 or kept(first - 1) > plan.kept_pairs, seed
