"""Credit of single steps: its arithmetic by hand, what a rollout hands over, whole runs, and what is refused."""

import pytest
import torch

from hrf_fast.config.load import load_config
from hrf_fast.rewards import RewardError, Rewards
from hrf_fast.training.advantages import build_advantages
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.credit import standardise, step_advantages
from hrf_fast.training.rewarding import GroupRewards, Rewarder
from hrf_fast.training.rollout import rollout
from hrf_fast.windows.base import Window
from hrf_kernels import gaussian_mean
from tests.conftest import make_group, make_policy, tiny_words
from tests.runs import assert_equal_training, metrics, train, with_folder
from tests.text_models import text_model

CPU = torch.device("cpu")


def bright(images, prompts=None):
    return images.mean((1, 2, 3))


# two samples; the values before steps 0 and 1, and the final rewards
VALUES = torch.tensor([[1.0, 1.0], [2.0, 4.0]])
REWARDS = torch.tensor([5.0, 1.0])


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        # δ: (1, 3), then (3, −3); less their means 2 and 0
        (0.0, [[-1, 1], [3, -3]]),
        # Â_0 = (1 + 3, 3 − 3) less 2
        (1.0, [[2, -2], [3, -3]]),
        # Â_0 = (1 + 1.5, 3 − 1.5) less 2
        (0.5, [[0.5, -0.5], [3, -3]]),
    ],
)
def test_advantages_of_steps_by_hand(gae_lambda, expected):
    advantages = step_advantages(REWARDS, VALUES, gae_lambda=gae_lambda, scale=2.0)
    assert advantages.tolist() == [[value / 2 for value in row] for row in expected]
    assert advantages.dtype == torch.float32


def test_noise_behind_the_window_is_credited_to_no_step():
    # values 1, 2 | 3 at the end, and 5: δ of the window's steps 1 and 1, then Â_1 = 1 + λ·2
    values, after, final = torch.tensor([[1.0, 0], [2.0, 0]]), torch.tensor([3.0, 0]), torch.tensor([5.0, 0])
    for gae_lambda, expected in ((0.0, [1, 1]), (1.0, [4, 3]), (0.5, [2, 2])):
        advantages = step_advantages(final, values, after, gae_lambda=gae_lambda, scale=1.0)
        assert (advantages[:, 0] - advantages[:, 1]).tolist() == expected
    policy = make_policy()
    groups = [make_group(policy, Window(start, stop), number=start, size=3) for start, stop in ((1, 3), (2, 4))]
    rolled_out = rollout(policy, groups, CallPlan(3, 4), estimate=True)
    for group in groups:
        latents = rolled_out.trajectories[group.number].latents[-1]
        step = group.window.stop
        output = policy.predict(latents, step, group.condition).combined
        expected = policy.decode(gaussian_mean(output, latents, policy.sampler.clean[step]))
        assert len(rolled_out.estimates[group.number]) == 2
        torch.testing.assert_close(rolled_out.after[group.number], expected, rtol=0, atol=1e-4)
    # and the rewarder hands both on
    pending = Rewarder(lambda images, _: Rewards(bright(images), {}), CPU).submit(
        rolled_out.images, None, None, rolled_out.estimates, rolled_out.after
    )
    for number, result in pending.result().items():
        torch.testing.assert_close(result.values, rolled_out.estimates[number].mean((2, 3, 4)))
        torch.testing.assert_close(result.after, rolled_out.after[number].mean((1, 2, 3)))


def test_a_window_that_noise_follows_is_credited_in_whole_runs(tiny_run, tmp_path):
    words = [word for word in [*tiny_run, *WORDS] if "window." not in word]
    words += ["window.schedule=interior", "window.kwargs.width=2", "train.gae_lambda=0"]
    for name, more in (("plain", []), ("several", ["compute.images_per_call=8"])):
        train(with_folder([*words, *more], tmp_path / name), reward=bright)
    for one, other in zip(*(metrics(tmp_path / name) for name in ("plain", "several")), strict=True):
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3) and one["grad_norm"] > 0


def test_equal_rewards_teach_nothing_whatever_their_steps_changed():
    rewards, values = torch.full((4,), 1.0), torch.tensor([[0.5, 0.51, 0.49, 0.5]])
    for name in ("group", "batch"):
        advantages = build_advantages(name, advantage_floor=1e-6)
        for gae_lambda in (0.0, 1.0):
            told = standardise({0: GroupRewards(rewards, {}, values=values)}, advantages, CPU, gae_lambda=gae_lambda)
            assert told[0].tolist() == [[0.0] * 4]


def test_a_rollout_hands_over_the_clean_images_that_it_predicts():
    policy = make_policy()
    groups = [make_group(policy, Window(start, 5), number=number, size=3) for number, start in enumerate((1, 3))]
    rolled_out = rollout(policy, groups, CallPlan(3, 4), estimate=True)
    assert {number: len(images) for number, images in rolled_out.estimates.items()} == {0: 4, 1: 2}
    for number, group in enumerate(groups):
        latents = rolled_out.trajectories[number].latents
        for i in range(len(group.window)):
            step = group.window.start + i
            output = policy.predict(latents[i], step, group.condition).combined
            expected = policy.decode(gaussian_mean(output, latents[i], policy.sampler.clean[step]))
            torch.testing.assert_close(rolled_out.estimates[number][i], expected, rtol=0, atol=1e-4)
    assert not rollout(policy, groups, CallPlan(3)).estimates


WORDS = ["train.gae_lambda=0.5", "evaluation.every=0", "window.schedule=random", "train.iterations=2"]


def test_orders_and_ways_of_replaying_learn_alike(tiny_run, tmp_path):
    words = [*tiny_run, *WORDS, "train.groups_per_step=2"]
    several = ["train.order=collect", "compute.images_per_call=8"]
    kept = ["train.order=on_policy", "compute.activations=keep"]
    for name, more in (("plain", []), ("several", several), ("kept", kept)):
        train(with_folder([*words, *more], tmp_path / name), reward=bright)
    plain = metrics(tmp_path / "plain")
    for name in ("several", "kept"):
        for one, other in zip(plain, metrics(tmp_path / name), strict=True):
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-3, abs=1e-7)
    # no more network calls than the final reward's credit takes
    train(with_folder([*words, "train.gae_lambda=null"], tmp_path / "final"), reward=bright)
    assert metrics(tmp_path / "final")[-1]["forwards"] == plain[-1]["forwards"]
    assert metrics(tmp_path / "final")[0]["grad_norm"] != plain[0]["grad_norm"]


def test_a_stopped_run_resumes_bit_for_bit(tiny_run, tmp_path):
    words = [*tiny_run, *WORDS]
    train(with_folder(words, tmp_path / "whole"), reward=bright)
    for iterations in (1, 2):
        train(with_folder(words, tmp_path / "halves", f"train.iterations={iterations}"), reward=bright)
    assert_equal_training(tmp_path / "whole", tmp_path / "halves")


def test_a_guided_latent_model_rewards_its_predictions_by_their_prompts(tmp_path):
    asked = []

    def reads(images, prompts):
        asked.append((tuple(images.shape), list(prompts)))
        return images.mean((1, 2, 3))

    words = [*tiny_words(text_model("sd1"), tmp_path / "run"), "sample.guidance_scale=3", "prompts.source=animals"]
    words += ["evaluation.images_per_prompt=2", "train.gae_lambda=0", "window.schedule=full"]
    words += ["train.iterations=1", "train.order=on_policy"]
    result = train(words, reward=reads)
    record = metrics(result.folder)[0]
    assert record["grad_norm"] > 0 and record["ratio_max"] == 1
    # each group has 3 samples and 6 steps
    values = [prompts for shape, prompts in asked if shape[0] == 18]
    assert [set(prompts) for prompts in values] == [{prompt} for prompt in record["prompts"]]


def test_a_value_that_is_not_finite_is_named(tiny_run):
    calls = []

    def breaks(images, prompts):
        calls.append(len(images))
        return images.mean((1, 2, 3)) / (0.0 if len(calls) > 2 else 1.0)

    words = [word for word in tiny_run if not word.startswith("evaluation")]
    with pytest.raises(RewardError, match=r"group 0: .*of predicted clean images, for train\.gae_lambda"):
        train([*words, *WORDS, "evaluation.panel_size=2", "evaluation.network=none"], reward=breaks)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.advantages=prompt", "prompts.source=animals"], "train.advantages is prompt .* use group or batch"),
        (["train.advantages=batch", "train.group_size=1"], "train.group_size is 1 .* use 2"),
        (["train.advantage_baseline=leave_one_out"], "advantage_baseline is leave_one_out .* use mean"),
        (["remedies.reward_band=1"], "remedies.reward_band is 1.* use 0"),
        (["remedies.matching=1"], "remedies.matching is 1.* use 0"),
        (["train.gae_lambda=1.5"], "train.gae_lambda is 1.5"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tiny_run, words, message):
    with pytest.raises(ValueError, match=message):
        load_config([*tiny_run, "train.gae_lambda=0.5", *words])


def test_the_floor_divides_the_credit_of_steps_of_rewards_that_hardly_differ():
    # rewards 0 and 0.02 have the std 0.0141, under the floor of 0.1; with equal values λ = 1 credits reward − mean:
    # ∓0.01/0.1
    rewards, values = torch.tensor([0.0, 0.02]), torch.zeros(1, 2)
    for name in ("group", "batch"):
        advantages = build_advantages(name, advantage_floor=0.1)
        told = standardise(
            {0: GroupRewards(rewards, {}, values=values)}, advantages, torch.device("cpu"), gae_lambda=1.0
        )
        torch.testing.assert_close(told[0], torch.tensor([[-0.1, 0.1]]))


def test_deterministic_steps_behind_the_window_add_no_value_of_its_end():
    policy = make_policy()
    group = make_group(policy, Window(1, 3, deterministic=True), anchor=torch.zeros(policy.latent_shape))
    rolled_out = rollout(policy, [group], CallPlan(group.size), estimate=True)
    assert len(rolled_out.estimates[0]) == 2 and not rolled_out.after
