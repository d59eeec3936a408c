"""Rewards on two ranks: what each builds, and who is asked for what."""

from tests.conftest import tiny_words
from tests.distributed.test_jobs import finish, start


def test_each_rank_rewards_its_own_groups_by_its_own_network_and_rank_0_alone_the_panels(tiny_model, tmp_path):
    words = [*tiny_words(tiny_model, tmp_path / "run"), "train.iterations=1", "train.groups_per_step=2"]
    words += ["reward.name=tests.distributed.cases:logged", f"reward.kwargs.log={tmp_path / 'log'}"]
    for code, errors in finish(start(tmp_path, words)):
        assert code == 0, errors
    first, second = ((tmp_path / f"log-{rank}").read_text().split() for rank in range(2))
    # a panel of 6 before and after, and one group of 3 each
    assert first == ["6", "network", "3", "6"]
    assert second == ["3", "network"]
