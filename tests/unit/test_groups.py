"""Groups of an iteration: their optimizer steps, their ranks and the numbers of their samples, by hand."""

import pytest
import torch

from hrf_fast.training.groups import Groups
from hrf_fast.windows.base import Window
from tests.conftest import make_group, make_policy

RANKS = (1, 2, 4)


def make(rank=0, ranks=1):
    """12 groups of 5, 4 to an optimizer step: 3 steps."""
    return Groups(per_iteration=12, size=5, per_step=4, rank=rank, ranks=ranks)


def test_optimizer_steps_take_consecutive_groups():
    groups = make()
    assert groups.num_steps == 3
    assert [list(groups.of_step(step)) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_the_shares_of_ranks_by_hand():
    # one of two ranks has half of every step's groups, one of four a quarter
    assert [list(make(0, 2).of_rank(step, 0)) for step in range(3)] == [[0, 1], [4, 5], [8, 9]]
    assert [list(make(0, 2).of_rank(step, 1)) for step in range(3)] == [[2, 3], [6, 7], [10, 11]]
    assert [list(make(0, 4).of_rank(1, rank)) for rank in range(4)] == [[4], [5], [6], [7]]
    assert make(1, 2).own() == [2, 3, 6, 7, 10, 11]
    assert make(3, 4).own() == [3, 7, 11]


@pytest.mark.parametrize("ranks", RANKS)
def test_every_group_of_a_step_has_one_rank_and_all_have_equally_many(ranks):
    for step in range(3):
        shares = [list(make(0, ranks).of_rank(step, rank)) for rank in range(ranks)]
        assert [group for share in shares for group in share] == list(make().of_step(step))
        assert {len(share) for share in shares} == {4 // ranks}


@pytest.mark.parametrize("ranks", RANKS)
def test_the_ranks_have_the_groups_and_samples_of_one_process(ranks):
    own = [make(rank, ranks).own() for rank in range(ranks)]
    assert sorted(group for share in own for group in share) == make().own() == list(range(12))
    ids = {n for rank, share in enumerate(own) for group in share for n in make(rank, ranks).sample_ids(group)}
    assert ids == set(range(60))


def test_samples_are_numbered_over_the_iteration_whatever_the_rank():
    assert list(make().sample_ids(0)) == [0, 1, 2, 3, 4]
    # 2 · 5 and on
    assert list(make().sample_ids(2)) == list(make(1, 2).sample_ids(2)) == [10, 11, 12, 13, 14]


def test_own_groups_of_some_steps_keep_the_order_of_the_steps():
    assert make(1, 2).own([2, 0]) == [10, 11, 2, 3]
    assert make().own([]) == []


def test_collect_is_one_round_of_all_steps_and_on_policy_a_round_per_step():
    assert [list(steps) for steps in make().rounds("collect")] == [[0, 1, 2]]
    assert [list(steps) for steps in make().rounds("on_policy")] == [[0], [1], [2]]
    for order in ("collect", "on_policy"):
        assert [group for steps in make(1, 4).rounds(order) for group in make(1, 4).own(steps)] == [1, 5, 9]


def test_a_group_is_as_large_as_its_noise():
    group = make_group(make_policy(), Window(2, 5), number=3, size=7)
    assert group.size == 7 and group.noise.sample_id.tolist() == list(torch.arange(21, 28))
