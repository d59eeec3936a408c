"""Scoring: groups as one batch, what is not finite, and the thread beside the rollout."""

import threading

import pytest
import torch

from hrf_fast.rewards import RewardTerm, build_reward
from hrf_fast.stopwatch import Stopwatch
from hrf_fast.training.rewarding import Background, score_groups


def images(*levels):
    """One grey image per level."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


@pytest.fixture
def reward(monkeypatch):
    """A `module:function` reward: the mean of an image, NaN where `poisoned(batch)` says so."""
    import types

    module = types.ModuleType("brightness")
    module.poisoned = lambda batch: torch.zeros(len(batch), dtype=torch.bool)
    module.calls = []

    def score(batch, prompts=None):
        module.calls.append(len(batch))
        return batch.mean((1, 2, 3)).masked_fill(module.poisoned(batch), torch.nan)

    module.score = score
    monkeypatch.setitem(__import__("sys").modules, "brightness", module)
    return build_reward([RewardTerm(name="brightness:score")]), module


def test_groups_are_scored_as_one_batch(reward):
    scored, module = reward
    found = score_groups(scored, {7: images(0.25, 0.5), 3: images(0.75, 1.0)})
    assert module.calls == [4]
    assert found[7].rewards.tolist() == [0.25, 0.5] and found[3].rewards.tolist() == [0.75, 1.0]
    # the mean of 0.25, 0.5, 0.75 and 1
    assert found[3].terms == {"brightness:score": 0.625}


def test_a_group_that_is_not_finite_does_not_take_the_others_with_it(reward):
    scored, module = reward
    module.poisoned = lambda batch: batch.mean((1, 2, 3)) == 1
    found = score_groups(scored, {0: images(0.25, 0.5), 1: images(0.75, 1.0)})
    assert found[0].rewards.tolist() == [0.25, 0.5] and found[0].problem == ""
    assert found[1].rewards is None and "returned 1 of 2 values that are NaN" in found[1].problem


def test_a_reward_that_is_finite_only_at_the_second_time_of_asking_is_not_believed(reward):
    scored, module = reward
    module.poisoned = lambda batch: torch.full((len(batch),), len(module.calls) == 1)
    found = score_groups(scored, {0: images(0.25), 1: images(0.5)})
    assert module.calls == [2, 1, 1]
    assert all(score.rewards is None and "returned 2 of 2" in score.problem for score in found.values())


@pytest.mark.parametrize("thread", [True, False])
def test_the_thread_does_one_thing_after_the_other_and_hands_errors_on(thread):
    background, order = Background(thread=thread), []

    def work(number):
        order.append((number, threading.current_thread() is threading.main_thread()))
        if number == 1:
            raise ValueError("no model")
        return 10 * number

    futures = [background.submit(work, number) for number in range(3)]
    assert (futures[0].result(), futures[2].result()) == (0, 20)
    with pytest.raises(ValueError, match="no model"):
        futures[1].result()
    assert order == [(number, not thread) for number in range(3)]


def test_closing_drops_what_has_not_begun():
    background, begun, go_on = Background(thread=True), threading.Event(), threading.Event()

    def work():
        begun.set()
        go_on.wait(60)

    first, second = background.submit(work), background.submit(work)
    begun.wait(60)
    background.close()
    assert second.cancelled() and not first.done()
    go_on.set()
    first.result(60)
    Background(thread=False).close()


def test_the_thread_works_on_the_gpu_of_its_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((device, threading.current_thread())))
    gpu = torch.device("cuda", 3)
    worker = Background(thread=True, device=gpu).submit(threading.current_thread).result()
    assert chosen == [(gpu, worker)] and worker is not threading.current_thread()
    Background(thread=True, device=torch.device("cpu")).submit(int).result()
    assert len(chosen) == 1


def test_the_stopwatch_adds_up_and_starts_again(monkeypatch):
    import time

    # a second passes inside each of two blocks, and two between them
    clock = iter([0.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.running():
            pass
    assert watch.restart() == 2.0 and watch.restart() == 0.0
