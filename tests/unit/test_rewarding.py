"""Rewarding: groups as one batch, what is not finite, the thread beside the rollout, and groups as peers."""

import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest
import torch

from hrf_fast.errors import UserCodeError
from hrf_fast.rewards import NotFiniteError, RewardError, Rewards, build_reward
from hrf_fast.stopwatch import Stopwatch
from hrf_fast.training.advantages import build_advantages
from hrf_fast.training.credit import spread_notes, standardise
from hrf_fast.training.rewarding import GroupRewards, Rewarder, gather_rewards, reward_groups

CPU = torch.device("cpu")


def images(*levels):
    """One grey image per level."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


class Brightness:
    """A reward of the user's: the mean of an image, NaN where `poisoned(batch)` says so."""

    def __init__(self):
        self.calls = []
        self.poisoned = lambda batch: torch.zeros(len(batch), dtype=torch.bool)

    def __call__(self, batch, prompts=None):
        self.calls.append(len(batch))
        return batch.mean((1, 2, 3)).masked_fill(self.poisoned(batch), torch.nan)


def test_groups_are_rewarded_as_one_batch():
    brightness = Brightness()
    rewards = reward_groups(build_reward(brightness), {7: images(0.25, 0.5), 3: images(0.75, 1.0)})
    assert brightness.calls == [4]
    assert rewards[7].rewards.tolist() == [0.25, 0.5] and rewards[3].rewards.tolist() == [0.75, 1.0]
    # the mean of 0.25, 0.5, 0.75 and 1
    assert rewards[3].terms == {"Brightness": 0.625}


def test_a_group_that_is_not_finite_does_not_take_the_others_with_it():
    brightness = Brightness()
    brightness.poisoned = lambda batch: batch.mean((1, 2, 3)) == 1
    rewards = reward_groups(build_reward(brightness), {0: images(0.25, 0.5), 1: images(0.75, 1.0)})
    assert rewards[0].rewards.tolist() == [0.25, 0.5] and rewards[0].problem == ""
    assert rewards[1].rewards is None and "1 of 2 values" in rewards[1].problem and "Brightness" in rewards[1].problem


def test_a_reward_that_is_finite_only_at_the_second_time_of_asking_is_not_believed():
    brightness = Brightness()
    brightness.poisoned = lambda batch: torch.full((len(batch),), len(brightness.calls) == 1)
    rewards = reward_groups(build_reward(brightness), {0: images(0.25), 1: images(0.5)})
    assert brightness.calls == [2, 1, 1]
    assert all(group.rewards is None and "2 of 2 values" in group.problem for group in rewards.values())


# --- the thread -------------------------------------------------------------------------------------------------------


def stand_in(function):
    """A reward for `Rewarder` that is `function` of a batch; nothing is checked."""
    return lambda batch, prompts: Rewards(function(batch), {})


def test_the_thread_rewards_one_pack_after_the_other_and_hands_errors_on():
    order = []

    def reward(batch):
        order.append((len(batch), threading.current_thread() is threading.main_thread()))
        if len(batch) == 2:
            raise ValueError("no model")
        return 10 * batch.mean((1, 2, 3))

    rewarder = Rewarder(stand_in(reward), CPU)
    futures = [rewarder.submit({0: images(*[0.5] * count)}) for count in (1, 2, 3)]
    assert futures[0].result()[0].rewards.tolist() == [5.0] and futures[2].result()[0].rewards.tolist() == [5.0] * 3
    with pytest.raises(ValueError, match="no model"):
        futures[1].result()
    assert order == [(1, False), (2, False), (3, False)]


def test_closing_drops_what_has_not_begun():
    begun, go_on = threading.Event(), threading.Event()

    def reward(batch):
        begun.set()
        go_on.wait(60)
        return torch.zeros(len(batch))

    rewarder = Rewarder(stand_in(reward), CPU)
    first, second = (rewarder.submit({0: images(0.5)}) for _ in range(2))
    begun.wait(60)
    rewarder.close()
    assert second.cancelled() and not first.done()
    go_on.set()
    first.result(60)


def test_who_asks_after_the_end_does_not_wait_for_ever():
    rewarder = Rewarder(stand_in(lambda batch: batch.mean((1, 2, 3))), CPU)
    rewarder.close()
    with pytest.raises(RuntimeError, match="closed"):
        rewarder.submit({0: images(0.5)})


def test_a_process_ends_beside_a_reward_that_does_not():
    code = "import time; from hrf_fast.training.worker import Worker; Worker('reward').submit(time.sleep, 600)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_thread_works_on_the_gpu_of_its_rank(monkeypatch):
    chosen, workers = [], []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((device, threading.current_thread())))

    def reward(batch):
        workers.append(threading.current_thread())
        return torch.zeros(len(batch))

    gpu = torch.device("cuda", 3)
    for device in (gpu, CPU):
        Rewarder(stand_in(reward), device).submit({0: images(0.5)}).result()
    assert chosen == [(gpu, workers[0])] and threading.current_thread() not in workers


def test_on_a_cpu_the_thread_has_no_workers_of_its_own_and_other_threads_keep_theirs():
    """Two teams of OpenMP's on one CPU slow both down, so the rewards of one batch are computed by one thread."""
    numbers, before = [], torch.get_num_threads()

    def reward(batch):
        numbers.append(torch.get_num_threads())
        return torch.zeros(len(batch))

    torch.set_num_threads(3)
    try:
        Rewarder(stand_in(reward), CPU).submit({0: images(0.5)}).result()
        later = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
        later.start()
        later.join()
        numbers.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert numbers == [1, 3, 3]


# --- what the ranks have ----------------------------------------------------------------------------------------------


def future(value):
    result = Future()
    if isinstance(value, Exception):
        result.set_exception(value)
    else:
        result.set_result(value)
    return result


def finite(*values):
    return GroupRewards(torch.tensor(values), {"size": float(len(values))})


POISONED = GroupRewards(None, {}, "NaN at 0")


def test_gathered_rewards_are_in_the_order_of_their_groups():
    pending = [future({5: finite(1.0), 0: finite(2.0)}), future({3: POISONED})]
    rewards = gather_rewards(pending, iteration=7, skip_not_finite=True)
    assert list(rewards) == [0, 3, 5] and rewards[3] is POISONED


def test_a_reward_that_is_not_finite_stops_the_run_and_names_iteration_and_group():
    with pytest.raises(NotFiniteError, match="iteration 7, group 3.*NaN at 0"):
        gather_rewards([future({0: finite(1.0), 3: POISONED})], iteration=7, skip_not_finite=False)
    # an error of the reward is handed on whatever is skipped
    with pytest.raises(RewardError, match="no model"):
        gather_rewards([future(RewardError("no model"))], iteration=0, skip_not_finite=True)


def test_a_skipped_group_has_no_advantages_and_is_nobodys_peer():
    rewards = {0: finite(1.0, 3.0), 2: POISONED, 4: finite(10.0, 30.0)}
    # ∓1/√2 in each group
    advantages = standardise(rewards, build_advantages("group", advantage_floor=1e-6), CPU)
    assert list(advantages) == [0, 4]
    for values in advantages.values():
        torch.testing.assert_close(values, torch.tensor([-0.70710678, 0.70710678]))
    # of (1, 3, 10, 30): mean 11; squared deviations 100 + 64 + 1 + 361 = 526, over 3: std 13.24135
    advantages = standardise(rewards, build_advantages("batch", advantage_floor=1e-6), CPU)
    torch.testing.assert_close(advantages[0], torch.tensor([-10.0, -8.0]) / 13.241349)
    torch.testing.assert_close(advantages[4], torch.tensor([-1.0, 19.0]) / 13.241349)


def test_the_floor_reaches_the_advantages_and_no_finite_group_leaves_none():
    # (1, 3): deviations ∓1 over the floor of 4, above the std of √2
    assert standardise({0: finite(1.0, 3.0)}, build_advantages("group", advantage_floor=4.0), CPU)[0].tolist() == [
        -0.25,
        0.25,
    ]
    assert standardise({0: POISONED}, build_advantages("group", advantage_floor=1e-6), CPU) == {}


def test_a_sample_without_peers_has_no_advantage():
    batch, rewards = build_advantages("batch", advantage_floor=1e-6), {0: finite(1.0), 1: POISONED}
    assert standardise(rewards, batch, CPU) == {} and spread_notes(rewards, batch) == {}
    assert list(standardise({**rewards, 2: finite(3.0)}, batch, CPU)) == [0, 2]


def test_notes_of_own_advantages_that_fail_are_named():
    class Broken:
        def notes(self, rewards):
            return rewards["nobody"]

    rewards = {0: GroupRewards(torch.tensor([1.0, 2.0]), {})}
    with pytest.raises(UserCodeError, match=r"train.advantages .*Broken.notes\(\) failed with KeyError: 'nobody'"):
        spread_notes(rewards, Broken())


# --- the stopwatch ----------------------------------------------------------------------------------------------------


def test_the_stopwatch_adds_up_and_starts_again(monkeypatch):
    # a second passes inside each of two blocks, and two between them
    clock = iter([0.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.running():
            pass
    assert watch.restart() == 2.0 and watch.restart() == 0.0
