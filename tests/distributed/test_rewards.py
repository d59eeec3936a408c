"""Rewards on two ranks: what each builds, and who is asked for what."""

import pytest

from hrf_fast.train import main
from tests.conftest import tiny_words
from tests.distributed.test_jobs import finish, start
from tests.runs import metrics


def test_each_rank_rewards_its_own_groups_by_its_own_network_and_rank_0_alone_the_panels(tiny_model, tmp_path):
    words = [*tiny_words(tiny_model, tmp_path / "run"), "train.iterations=1", "train.groups_per_step=2"]
    words += ["reward.name=tests.distributed.cases:logged", f"reward.kwargs.log={tmp_path / 'log'}"]
    for code, errors in finish(start(tmp_path, words)):
        assert code == 0, errors
    first, second = ((tmp_path / f"log-{rank}").read_text().split() for rank in range(2))
    # a panel of 6 before and after, and one group of 3 each
    assert first == ["6", "network", "3", "6"]
    assert second == ["3", "network"]


def test_terms_of_groups_on_two_ranks_are_standardised_as_on_one(tiny_model, tmp_path):
    terms = "{name: tests.distributed.cases:coarse}, {name: jpeg_compressibility, weight: -3}"
    more = ["reward.name=null", f"reward.terms=[{terms}]", "reward.mix=advantages", "train.advantages=batch"]
    more += ["train.groups_per_step=2", "train.iterations=1", "evaluation.every=0", "evaluation.panel_size=2"]
    assert main([*tiny_words(tiny_model, tmp_path / "one"), *more]) == 0
    for code, errors in finish(start(tmp_path, [*tiny_words(tiny_model, tmp_path / "two"), *more])):
        assert code == 0, errors
    (one,), (two,) = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert one["advantage_std"] > 1 and one["grad_norm"] > 0
    for name in ("advantage_std", "advantage_max", "grad_norm", "reward_mean"):
        # a gradient's sums over ranks in another order
        assert two[name] == pytest.approx(one[name], rel=1e-4)
