"""The gradient's signal and noise, by hand arithmetic, by brute force and in runs."""

import pytest
import torch

from hrf_fast.training.calls import CallPlan
from hrf_fast.training.gradient_noise import GradientHalves, NoiseScale
from hrf_fast.training.optimizer_step import Clips, optimizer_step
from hrf_fast.training.rollout import Rollout, rollout
from hrf_fast.windows.base import Window
from tests.conftest import make_engine, make_group, make_policy
from tests.runs import metrics, train, with_folder


class Given:
    """An engine of one weight pair whose gradients are given, one after the other."""

    def __init__(self, *gradients):
        self._gradients = [[torch.tensor(values)] for values in gradients]

    def gradients(self):
        return self._gradients.pop(0)


def test_signal_and_noise_by_hand():
    # the even groups add up to A = (1, 2), all to (4, 3), so the odd ones to B = (3, 1)
    halves = GradientHalves(Given([1.0, 2.0], [4.0, 3.0]))
    assert list(halves.in_order([])) == []
    halves.end()
    signal, noise = halves.signal_and_noise(6)
    assert (float(signal), float(noise)) == (4 * (1 * 3 + 2 * 1), 6 * ((1 - 3) ** 2 + (2 - 1) ** 2))


@pytest.mark.parametrize("order", ["collect", "on_policy"])
def test_a_step_measures_the_gradients_of_its_groups(order):
    policy = make_policy()
    plan = CallPlan(4, 8, order, halves=True)
    groups = [make_group(policy, Window(1, 3), number=number, anchor=torch.zeros(3, 16, 16)) for number in range(4)]
    rolled_out = Rollout()
    for pack in plan.packs({group.number: group.window for group in groups}):
        rolled_out.join(rollout(policy, [groups[number] for number in pack], plan))
    advantages = {number: torch.tensor([1.0, -1.0, 0.5, -0.5]) for number in range(4)}
    clips = Clips(clip_range=1.0, advantage_clip=2.5, scale_by_window=False)

    def step(numbers, measure):
        engine = make_engine(policy)
        engine.set_learning_rate(0.0)
        windows = {number: groups[number].window for number in numbers}
        calls = plan.replay(windows)
        trajectories = {number: rolled_out.trajectories[number] for number in numbers}
        stats = optimizer_step(engine, policy, trajectories, advantages, calls, clips, measure=measure)
        return torch.cat([p.grad.flatten() for p in engine.parameters]), stats

    gradient, stats = step(range(4), True)
    even, odd = step([0, 2], False)[0], step([1, 3], False)[0]
    torch.testing.assert_close(gradient, (even + odd) / 2)
    # halves of two groups each: 4 ⟨A, B⟩ is the product of their means, and a mean's variance is half a group's
    torch.testing.assert_close(stats.gradient_signal, even @ odd, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(stats.gradient_noise, (even - odd).square().sum(), rtol=1e-4, atol=1e-8)


def test_a_run_logs_both_and_learns_the_same(tiny_run, tmp_path):
    words = [*tiny_run, "train.groups_per_step=2"]
    without, measured = (
        train(with_folder(words, tmp_path / str(on), f"train.gradient_noise={on}")).folder for on in (False, True)
    )
    assert "gradient_signal" not in metrics(without)[0]
    assert all(record["gradient_noise"] > 0 for record in metrics(measured))
    for record in (lines := metrics(measured)):
        del record["gradient_signal"], record["gradient_noise"]
    assert lines == metrics(without)


def test_noise_above_the_signal_is_said_after_eight_iterations():
    scale = NoiseScale(4, "equal")
    # the noise scale is 5 groups, and a step averages 4
    lines = [scale.add(2.0, 10.0) for _ in range(8)]
    assert lines[:7] == [None] * 7
    assert "noise scale is 5 groups" in lines[7] and "groups_per_step of 5 or more" in lines[7]
    assert "train.step_weights=std" in lines[7]
    assert NoiseScale(4, "equal").add(None, None) is None
    quiet = NoiseScale(6, "std")
    assert [quiet.add(2.0, 10.0) for _ in range(9)] == [None] * 9
    negative = NoiseScale(4, "std")
    assert "too large to be measured" in [negative.add(-1.0, 10.0) for _ in range(8)][7]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["train.groups_per_step=1"], "train.groups_per_step is 1"),
        (
            ["train.groups_per_step=2", "train.step_share=0.5"],
            "train.step_share is 0.5: both halves leave",
        ),
        (["train.groups_per_step=2", "engine.deepspeed=configs/deepspeed/zero2.json"], "engine.deepspeed is"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_run, words, value):
    with pytest.raises(ValueError, match=r"train\.gradient_noise is true") as refused:
        train([*tiny_run, *words, "train.gradient_noise=true"])
    assert value in str(refused.value)
