"""Window schedules: what each trains over a full cycle, by hand, and the configurations that are refused."""

import numpy as np
import pytest
import torch

from hrf_fast.training.optimizer_step import window_share
from hrf_fast.windows.base import Window, check_estimate
from hrf_fast.windows.schedules import SCHEDULES, build_schedule, check_starts


def make(name, kwargs=None, *, T=40, stop=None):
    return build_schedule(name, kwargs or {}, num_inference_steps=T, stop=T - 1 if stop is None else stop)


def no_probe(candidates, *, estimate="exact"):
    raise AssertionError("this schedule has nothing to search")


def draw(schedule, iteration=0, num_groups=1, seed=0, probe=no_probe):
    return schedule(iteration, num_groups, generator=torch.Generator().manual_seed(seed), probe=probe)


def starts(schedule, iteration=0, num_groups=1, seed=0, probe=no_probe):
    return [window.start for window in draw(schedule, iteration, num_groups, seed, probe)]


# --- windows ----------------------------------------------------------------------------------------------------------


def test_a_window_is_half_open():
    window = Window(3, 7)
    assert (window.start, window.stop, len(window)) == (3, 7, 4)
    assert len(Window(0, 1)) == 1


@pytest.mark.parametrize(("start", "stop"), [(3, 3), (4, 3), (-1, 3), (-3, -1), (0, 0)])
def test_a_window_that_is_empty_or_negative_is_refused(start, stop):
    with pytest.raises(ValueError, match=rf"window \[{start}, {stop}\)"):
        Window(start, stop)


@pytest.mark.parametrize("start", [0.0, True, "0", torch.tensor(0), np.int64(0)], ids=repr)
def test_a_window_of_other_than_ints_is_refused(start):
    with pytest.raises(ValueError, match=r"window \[.*, 3\) is not of ints; use int\(start\)"):
        Window(start, 3)


def test_a_window_cannot_be_changed():
    with pytest.raises(AttributeError):
        Window(0, 3).start = 2


# --- every schedule ---------------------------------------------------------------------------------------------------


def test_the_registered_schedules_are_known_here():
    # so that a new one is added to the sweep below
    assert set(SCHEDULES) == {
        *("full", "clusters", "random", "sliding", "dynamic", "progressive", "interior"),
        *("mixgrpo", "flow_grpo_fast"),
    }


def random_probe(candidates, *, estimate="exact"):
    generator = torch.Generator().manual_seed(len(candidates))
    return [(torch.rand(len(s), generator=generator), torch.rand(len(s), generator=generator)) for s in candidates]


# T, end of the windows: DDIM's last step is deterministic unless set_alpha_to_one is false
LENGTHS = ((40, 39), (40, 40), (20, 19), (7, 6), (7, 7), (3, 2), (2, 2))


@pytest.mark.parametrize(("T", "stop"), LENGTHS)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("full", {}),
        ("full", {"renoised": True, "start": 1}),
        ("progressive", {}),
        ("progressive", {"iterations": 7}),
        ("clusters", {}),
        ("clusters", {"iterations_per_cluster": 3}),
        ("random", {}),
        ("sliding", {}),
        ("sliding", {"stride": 3, "iterations_per_start": 2}),
        ("dynamic", {"stride": 1, "search": "exact"}),
        ("dynamic", {"stride": 1, "search": "x0"}),
        ("dynamic", {"stride": 1, "search": "bandit"}),
    ],
)
def test_no_window_of_a_full_cycle_is_empty_or_holds_a_deterministic_step(T, stop, name, kwargs):
    schedule = make(name, kwargs, T=T, stop=stop)
    # 90 iterations: over two clusters of 35 and round again, and twice over every sliding start
    for iteration in range(90):
        windows = draw(schedule, iteration, num_groups=3, seed=iteration, probe=random_probe)
        assert len(windows) == 3
        assert all(0 <= window.start < window.stop == stop for window in windows)


@pytest.mark.parametrize(
    ("name", "kwargs", "shortest"),
    [
        ("full", {}, (0, 39)),
        ("full", {"renoised": True, "start": 5}, (5, 39)),
        ("full", {"end": 20}, (0, 20)),
        ("clusters", {}, (38, 39)),
        ("clusters", {"clusters": [[0, 5], {"steps": [7, 6]}]}, (7, 39)),
        ("random", {}, (38, 39)),
        ("sliding", {"stride": 25}, (25, 39)),
        ("progressive", {}, (12, 39)),
        ("dynamic", {}, (36, 39)),
        ("dynamic", {"stride": 5, "search": "bandit"}, (30, 39)),
        ("interior", {"width": 3}, (0, 3)),
        ("mixgrpo", {"width": 3}, (0, 3)),
        ("flow_grpo_fast", {}, (0, 2)),
    ],
)
def test_a_schedule_knows_its_window_of_least_share(name, kwargs, shortest):
    schedule = make(name, kwargs)
    assert (schedule.shortest.start, schedule.shortest.stop) == shortest
    torch.manual_seed(0)

    def probe(candidates, *, estimate="exact"):
        return [(torch.rand(len(starts)), torch.rand(len(starts))) for starts in candidates]

    drawn = [window for i in range(200) for window in draw(schedule, i, num_groups=4, seed=i, probe=probe)]
    assert min(window_share(window, 39, 40) for window in drawn) == window_share(schedule.shortest, 39, 40)


@pytest.mark.parametrize("name", ["full", "clusters", "random", "sliding", "progressive"])
@pytest.mark.parametrize(("T", "stop"), [(1, 1), (2, 1)])
def test_the_defaults_work_with_a_single_step_to_train(T, stop, name):
    # T = 2 with a deterministic last step leaves step 0: its default second half, [1, 2), has nothing to train
    schedule = make(name, T=T, stop=stop)
    for iteration in (0, 34, 35, 69, 70):
        assert draw(schedule, iteration, num_groups=2) == [Window(0, 1)] * 2


def test_only_ddpo_starts_from_noise():
    assert make("full").needs_anchors is False
    assert all(make(name).needs_anchors is True for name in ("clusters", "random", "sliding", "dynamic"))


def test_full_trains_every_stochastic_step_of_every_group():
    assert draw(make("full"), iteration=12, num_groups=2) == [Window(0, 39), Window(0, 39)]


# --- clusters ---------------------------------------------------------------------------------------------------------


def test_the_default_clusters_are_the_halves_for_35_iterations_each():
    # T 40: starts 0–19 in iterations 0–34, 20–38 (39 is deterministic) in 35–69, and round again
    schedule = make("clusters")
    for iteration, expected in (
        (0, range(20)),
        (34, range(20)),
        (35, range(20, 39)),
        (69, range(20, 39)),
        (70, range(20)),
    ):
        assert set(starts(schedule, iteration, num_groups=400)) == set(expected)


def test_an_odd_number_of_steps_gives_the_later_half_the_middle_one():
    # T 7: [0, 3) and [3, 7) less the deterministic step 6
    schedule = make("clusters", T=7)
    assert set(starts(schedule, 0, num_groups=100)) == {0, 1, 2}
    assert set(starts(schedule, 35, num_groups=100)) == {3, 4, 5}


def test_explicit_steps_and_ranges_take_turns():
    # two iterations each: {4, 9}, then [0, 2), then {7}; iteration 6 is back at the first
    kwargs = {"clusters": [{"steps": [4, 9]}, [0, 2], {"steps": [7]}], "iterations_per_cluster": 2}
    schedule = make("clusters", kwargs, T=12)
    found = [set(starts(schedule, iteration, num_groups=50)) for iteration in range(8)]
    assert found == [{4, 9}, {4, 9}, {0, 1}, {0, 1}, {7}, {7}, {4, 9}, {4, 9}]


def test_a_tuple_is_as_good_as_a_list():
    assert set(starts(make("clusters", {"clusters": [(1, 3)]}), num_groups=50)) == {1, 2}


def test_the_deterministic_last_step_never_starts_a_window():
    # both spellings hold step 39 of 40; it is dropped and the rest is used
    for cluster in ([37, 40], {"steps": [37, 38, 39]}):
        assert set(starts(make("clusters", {"clusters": [cluster]}), num_groups=100)) == {37, 38}


def test_starts_are_uniform_over_the_cluster():
    # 8000 draws of 20: 400 each, standard deviation sqrt(8000·0.05·0.95) = 19.5; five of them
    counts = torch.bincount(torch.tensor(starts(make("clusters"), num_groups=8000)), minlength=20)
    assert len(counts) == 20
    assert (counts - 400).abs().max() < 98


def test_groups_of_one_iteration_draw_their_own_starts():
    assert len(set(starts(make("clusters"), num_groups=20))) > 5


@pytest.mark.parametrize("name", ["clusters", "random"])
def test_equal_generators_give_equal_windows_on_every_rank(name):
    assert draw(make(name), 3, 10, seed=4) == draw(make(name), 3, 10, seed=4)
    assert draw(make(name), 3, 10, seed=4) != draw(make(name), 3, 10, seed=5)


def test_a_schedule_has_no_state():
    # a resumed run asks for iteration 36 first
    used, fresh = make("clusters"), make("clusters")
    for iteration in range(36):
        draw(used, iteration, 2, seed=iteration)
    assert draw(used, 36, 5, seed=36) == draw(fresh, 36, 5, seed=36)


@pytest.mark.parametrize(("bounds", "steps"), [([0.5, 1.0], range(20, 39)), ([0, 0.25], range(10))])
def test_bounds_may_be_shares_of_the_steps(bounds, steps):
    assert set(starts(make("clusters", {"clusters": [bounds]}), num_groups=1000)) == set(steps)


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        ([[0, 20], [20, 41]], r"window\.kwargs\.clusters\[1\].* 40 .*sample\.num_inference_steps is 40.*0 to 38"),
        ([[0, 99999999999]], r"window\.kwargs\.clusters\[0\].* 40 .*0 to 38"),
        ([[-99999999999, 20]], r"window\.kwargs\.clusters\[0\].* -99999999999 .*0 to 38"),
        ([[-1, 20]], r"window\.kwargs\.clusters\[0\].* -1 .*0 to 38"),
        ([{"steps": [3, 99]}], r"window\.kwargs\.clusters\[0\].* 99 .*0 to 38"),
        ([[5, 5]], r"window\.kwargs\.clusters\[0\] is empty"),
        ([[20, 0]], r"window\.kwargs\.clusters\[0\] is empty"),
        ([[0, 20], {"steps": []}], r"window\.kwargs\.clusters\[1\] is empty"),
        ([[39, 40]], r"window\.kwargs\.clusters\[0\] is empty: \[39\].* 39"),
        ([], r"window\.kwargs\.clusters is empty"),
        ([0, 20], r"window\.kwargs\.clusters\[0\] is 0"),
        ([[0, 10, 20]], r"window\.kwargs\.clusters\[0\] is \[0, 10, 20\]"),
        ([[0.5, 0.5]], r"window\.kwargs\.clusters\[0\] is \[0\.5, 0\.5\].* shares of T"),
        ([[0.0, 0.01]], r"window\.kwargs\.clusters\[0\] is empty"),
        ([[0, 2.5]], r"window\.kwargs\.clusters\[0\] is \[0, 2\.5\]"),
        ([["0", "20"]], r"window\.kwargs\.clusters\[0\] is \['0', '20'\]"),
        ([[False, True]], r"window\.kwargs\.clusters\[0\] is \[False, True\]"),
        ([{"steps": [1, 2.5]}], r"window\.kwargs\.clusters\[0\] is .*2\.5"),
        ([{"start": [1]}], r"window\.kwargs\.clusters\[0\] is \{'start': \[1\]\}"),
        ([{"steps": 3}], r"window\.kwargs\.clusters\[0\] is \{'steps': 3\}"),
    ],
)
def test_clusters_that_cannot_be_trained_are_refused(clusters, message):
    with pytest.raises(ValueError, match=message):
        make("clusters", {"clusters": clusters})


def test_check_starts_keeps_the_order_and_drops_the_deterministic_end():
    assert check_starts([5, 1, 3, 4], option="x", num_inference_steps=6, stop=4) == [1, 3]


# --- random and sliding -----------------------------------------------------------------------------------------------


def test_random_is_uniform_over_every_start():
    # 7800 draws of 39: 200 each, standard deviation sqrt(7800·38)/39 = 14; five of them, in any iteration
    for iteration in (0, 50):
        counts = torch.bincount(torch.tensor(starts(make("random"), iteration, num_groups=7800)), minlength=39)
        assert len(counts) == 39
        assert (counts - 200).abs().max() < 70


def test_sliding_moves_all_groups_one_step_per_iteration_and_wraps():
    # T 5: starts 0, 1, 2, 3 (4 is deterministic), then 0
    schedule = make("sliding", T=5)
    assert [starts(schedule, iteration, num_groups=2) for iteration in range(5)] == [
        [0, 0],
        [1, 1],
        [2, 2],
        [3, 3],
        [0, 0],
    ]


def test_sliding_with_a_stride_and_several_iterations_per_start():
    # stop 9, stride 4: starts 0, 4, 8 for two iterations each
    schedule = make("sliding", {"stride": 4, "iterations_per_start": 2}, T=10)
    assert [starts(schedule, iteration)[0] for iteration in range(8)] == [0, 0, 4, 4, 8, 8, 0, 0]


# --- options ----------------------------------------------------------------------------------------------------------


each_count = pytest.mark.parametrize(
    ("name", "option"),
    [
        ("clusters", "iterations_per_cluster"),
        ("sliding", "iterations_per_start"),
        ("sliding", "stride"),
        ("dynamic", "stride"),
    ],
)


@each_count
@pytest.mark.parametrize("value", [0, -2])
def test_counts_below_one_are_refused(name, option, value):
    with pytest.raises(ValueError, match=rf"window\.kwargs\.{option} is {value};"):
        make(name, {option: value})


@each_count
@pytest.mark.parametrize("value", [2.5, "two"])
def test_counts_that_are_no_whole_numbers_are_refused_before_the_run(name, option, value):
    with pytest.raises(ValueError, match=rf"window\.kwargs\.{option} is .*{value}"):
        make(name, {option: value})


@pytest.mark.parametrize("value", [5, "abc", {"steps": [1]}])
def test_clusters_that_are_no_list_are_refused_before_the_run(value):
    with pytest.raises(ValueError, match=r"window\.kwargs\.clusters is "):
        make("clusters", {"clusters": value})


def test_an_unknown_schedule_answers_with_the_nearest():
    with pytest.raises(ValueError, match=r"window\.schedule is 'cluster'.*'clusters'.*clusters, dynamic, flow_grpo"):
        make("cluster")


def test_an_unknown_option_answers_with_the_nearest():
    with pytest.raises(ValueError, match=r"window\.kwargs\.strid .*'stride'.*beta, discount"):
        make("dynamic", {"strid": 3})
    with pytest.raises(ValueError, match=r"window\.kwargs\.stride is unknown"):
        make("full", {"stride": 3})


def test_the_trainers_own_arguments_are_no_options():
    with pytest.raises(ValueError, match=r"window\.kwargs\.stop is unknown"):
        make("full", {"stop": 3})


def test_an_end_of_ddpo_that_leaves_no_step_or_is_none_is_refused():
    with pytest.raises(ValueError, match="end is 40; use a step from 1 to 39"):
        make("full", {"end": 40})
    with pytest.raises(ValueError, match="end is 5; use a step from 6 to 39"):
        make("full", {"renoised": True, "start": 5, "end": 5})


def test_an_estimate_that_no_probe_has_answers_with_the_nearest():
    assert check_estimate("x0") == "x0"
    with pytest.raises(ValueError, match="estimate is 'exakt'.*'exact'"):
        check_estimate("exakt")
