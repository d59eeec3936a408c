"""The statistics of an optimizer step and the record of an iteration, by hand."""

import math

import pytest
import torch

from hrf_fast.training.metrics import StepStats, iteration_record, summarise
from hrf_fast.training.rewarding import GroupRewards
from hrf_fast.windows.base import Window
from hrf_kernels import Surrogate

# --- an optimizer step ------------------------------------------------------------------------------------------------


def surrogate(ratios, outside, clipped, kl):
    count = len(ratios)
    values = torch.tensor(ratios), torch.tensor(outside), torch.tensor(clipped), torch.tensor(kl)
    # a KL to the pretrained model of 0.5, 1, …
    return Surrogate(torch.zeros(count), torch.zeros(count), *values, kl=torch.arange(1.0, count + 1) / 2)


def test_step_stats_are_averages_over_all_pairs():
    # four pairs in forwards of 1 and 3: kl (0.4 + 0.1 + 0.2 + 0.5)/4, outside 3/4, clipped 1/4,
    # ratio (1.5 + 0.9 + 1 + 1.2)/4, to the reference (0.5 + 0.5 + 1 + 1.5)/4
    first = surrogate([1.5], [True], [True], [0.4])
    second = surrogate([0.9, 1.0, 1.2], [True, False, True], [False] * 3, [0.1, 0.2, 0.5])
    stats = StepStats.zeros(torch.device("cpu"))
    stats = stats.add(torch.tensor(0.25), first).add(torch.tensor(-0.75), second)
    stats = stats.finish(4, torch.tensor(3.0))
    found = {name: float(value) for name, value in vars(stats).items()}
    assert found == pytest.approx(
        {
            "loss": -0.5,
            "approx_kl": 0.3,
            "clip_fraction": 0.75,
            "clipped_fraction": 0.25,
            "ratio_mean": 1.15,
            "ratio_max": 1.5,
            "grad_norm": 3.0,
            "reference_kl": 0.875,
            "gradient_signal": math.nan,
            "gradient_noise": math.nan,
        },
        nan_ok=True,
    )


def test_the_largest_ratio_may_come_first_or_last():
    zeros = StepStats.zeros(torch.device("cpu"))
    low, high = surrogate([0.5], [True], [False], [0.0]), surrogate([0.7], [True], [False], [0.0])
    for order in ((low, high), (high, low)):
        stats = zeros
        for part in order:
            stats = stats.add(torch.tensor(0.0), part)
        assert float(stats.ratio_max) == pytest.approx(0.7)


def test_the_norm_of_an_offloaded_optimizer_joins_the_other_numbers_device():
    stats = StepStats.zeros(torch.device("meta")).finish(4, torch.tensor(2.0))
    assert {value.device.type for value in vars(stats).values()} == {"meta"}


def make_stats(*values):
    return StepStats(*(torch.tensor(value) for value in (*values, math.nan, math.nan)))


def test_an_iteration_is_the_mean_of_its_steps_and_the_largest_of_their_ratios():
    steps = [make_stats(1.0, 0.2, 0.5, 0.1, 1.0, 1.75, 4.0, 0.5), make_stats(2.0, 0.4, 0.0, 0.3, 0.5, 1.25, 1.0, 0.1)]
    assert summarise(steps) == pytest.approx(
        {
            "loss": 1.5,
            "approx_kl": 0.3,
            "clip_fraction": 0.25,
            "clipped_fraction": 0.2,
            "ratio_mean": 0.75,
            "ratio_max": 1.75,
            "grad_norm": 2.5,
            "reference_kl": 0.3,
        }
    )


def test_one_step_is_its_own_summary():
    values = (1.0, 0.2, 0.5, 0.1, 1.0, 1.75, 4.0, 0.3)
    assert list(summarise([make_stats(*values)]).values()) == pytest.approx(list(values))


def test_an_iteration_without_a_step_has_no_numbers():
    assert set(summarise([]).values()) == {None}


# --- an iteration -----------------------------------------------------------------------------------------------------


def rewards(values, **terms):
    return GroupRewards(torch.tensor(values), terms)


def test_the_record_of_an_iteration_by_hand():
    # rewards (1, 3 | 2, 8): mean 3.5, squared deviations 6.25 + 0.25 + 2.25 + 20.25 = 29 over 3;
    # std within groups sqrt(2) and sqrt(18), mean 2.828427; advantages (−1, 1, −2, 1): mean −0.25, 6.75 over 3
    record = iteration_record(
        [make_stats(1.0, 0.2, 0.5, 0.1, 1.0, 1.75, 4.0, 0.0)],
        # the means of the terms over groups: 0.25 and 2
        {0: rewards([1.0, 3.0], jpeg=0.5, size=1.0), 1: rewards([2.0, 8.0], jpeg=0.0, size=3.0)},
        {0: torch.tensor([-1.0, 1.0]), 1: torch.tensor([-2.0, 1.0])},
        [Window(0, 5), Window(3, 5)],
    )
    assert (record.pop("window_starts"), record.pop("window_stops")) == ([0, 3], [5, 5])
    assert record == pytest.approx(
        {
            "reward_mean": 3.5,
            "reward_std": math.sqrt(29 / 3),
            "reward_min": 1.0,
            "reward_max": 8.0,
            "reward/jpeg": 0.25,
            "reward/size": 2.0,
            "advantage_std": 1.5,
            "advantage_max": 2.0,
            "group_reward_std": 2.828427,
            "flat_groups": 0.0,
            "loss": 1.0,
            "approx_kl": 0.2,
            "clip_fraction": 0.5,
            "clipped_fraction": 0.1,
            "ratio_mean": 1.0,
            "ratio_max": 1.75,
            "grad_norm": 4.0,
            "window_steps": 7,
        }
    )


def test_groups_that_teach_nothing_are_counted():
    groups = {number: rewards([2.0, 2.0]) for number in range(4)}
    # of peers beyond the group, equal rewards may teach
    advantages = [[-1.0, 1.0], [0.0, 0.0], [-1.0, -1.0], [0.0, 0.0]]
    record = iteration_record([], groups, dict(enumerate(map(torch.tensor, advantages))), [Window(0, 1)] * 4)
    assert record["flat_groups"] == 0.5
    assert iteration_record([], groups, {}, [Window(0, 1)] * 4)["flat_groups"] is None


def test_a_group_that_is_skipped_is_in_no_mean():
    record = iteration_record(
        [make_stats(*[0.0] * 8)],
        {0: rewards([1.0, 3.0], jpeg=2.0), 1: GroupRewards(None, {}, "NaN")},
        {0: torch.tensor([-1.0, 1.0])},
        [Window(0, 1), Window(0, 3)],
    )
    # its window counts: the rollout has run it
    assert (record["reward_mean"], record["advantage_max"], record["window_steps"]) == (2.0, 1.0, 4)


def test_a_sample_without_peers_is_recorded_without_a_nan():
    record = iteration_record([], {0: rewards([3.0]), 1: GroupRewards(None, {}, "NaN")}, {}, [Window(0, 1)] * 2)
    names = ("reward_mean", "reward_std", "advantage_std", "advantage_max", "loss")
    assert [record[name] for name in names] == [3.0, 0.0, 0.0, 0.0, None]


def test_a_single_reward_term_is_not_repeated_in_the_record():
    record = iteration_record(
        [make_stats(*[0.0] * 8)],
        {0: rewards([1.0, 3.0], jpeg=2.0)},
        {0: torch.tensor([-1.0, 1.0])},
        [Window(0, 1)],
    )
    assert not [name for name in record if name.startswith("reward/")]
