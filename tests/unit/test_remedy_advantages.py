"""Changes of advantages that keep diversity: each by hand, matching against autograd, and what goes with what."""

import math
import re

import pytest
import torch

from hrf_fast.assembly.algorithm import build_algorithm, build_config_advantages
from hrf_fast.config.advantage_rules import matching_note
from hrf_fast.config.load import load_config
from hrf_fast.training.advantages import apply_advantages, build_advantages
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.credit import standardise
from hrf_fast.training.optimizer_step import Clips, call_surrogate
from hrf_fast.training.remedies import favour_novel, matching_advantages, novelty
from hrf_fast.training.rewarding import GroupRewards
from hrf_fast.training.rollout import rollout
from hrf_fast.training.standardising import group_advantages, within_band
from hrf_fast.windows.base import Window
from hrf_kernels import gaussian_log_prob
from tests.conftest import GRADIENT_TOLERANCE, make_group, make_policy, tiny_words
from tests.runs import metrics, train

REWARDS, GROUPS = torch.tensor([1.0, 2.0, 6.0, 5.0, 7.0]), torch.tensor([0, 0, 0, 1, 1])


def by_group(name="group", **options):
    """Advantages of the groups (1, 2, 6) and (5, 7)."""
    memory = {"prompt_buffer": 9, "prompt_min_count": 1} if name == "prompt" else {}
    made = build_advantages(name, **{"advantage_floor": 1e-6, **memory, **options})
    rewards = {0: REWARDS[:3], 1: REWARDS[3:]}
    return torch.cat(list(apply_advantages(made, rewards, {0: "a", 1: "b"}).values()))


# --- scale, baseline and band -----------------------------------------------------------------------------------------


def test_without_a_scale_an_advantage_is_the_deviation_from_the_mean():
    # means 3 and 6
    assert by_group(advantage_scale="none").tolist() == [-2, -1, 3, -1, 1]
    # mean 4.2 of all
    torch.testing.assert_close(by_group("batch", advantage_scale="none"), REWARDS - 4.2)
    # of buffers that hold these very rewards
    assert by_group("prompt", advantage_scale="none").tolist() == [-2, -1, 3, -1, 1]


def test_the_spread_of_the_whole_batch_divides_what_lies_beyond_a_group_s_mean():
    # of (1, 2, 6, 5, 7): mean 4.2, squares 10.24 + 4.84 + 3.24 + 0.64 + 7.84 = 26.8, over 4
    std = math.sqrt(6.7)
    torch.testing.assert_close(by_group(advantage_scale="batch"), torch.tensor([-2, -1, 3, -1, 1]) / std)
    # the floor is of that spread, so that no group is under it by itself
    torch.testing.assert_close(
        by_group(advantage_scale="batch", advantage_floor=4.0), torch.tensor([-2, -1, 3, -1, 1]) / 4
    )
    made = build_advantages("group", advantage_floor=2.0, advantage_scale="batch")
    rewards = {0: REWARDS[:3], 1: torch.tensor([6.0, 6.0])}
    # (1, 2, 6, 6, 6): mean 4.2, squares 10.24 + 4.84 + 3 * 3.24 = 24.8, over 4; equal rewards teach nothing
    assert made.scales(rewards) == pytest.approx({0: math.sqrt(6.2), 1: math.sqrt(6.2)})
    assert made(rewards, {0: "a", 1: "b"})[1].tolist() == [0, 0]
    assert made.notes(rewards) == {}
    assert "floor, all" in build_advantages("group", advantage_floor=3.0, advantage_scale="batch").notes(rewards)


def test_left_out_of_its_own_baseline():
    # 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2; 5 − 7, 7 − 5
    found = by_group(advantage_scale="none", advantage_baseline="leave_one_out")
    torch.testing.assert_close(found, torch.tensor([-3, -1.5, 4.5, -2, 2]))
    # with a scale: 3/2 and 2/1 of the standardised ones
    found = group_advantages(REWARDS, GROUPS, floor=1e-6, baseline="leave_one_out")
    expected = by_group() * torch.tensor([1.5, 1.5, 1.5, 2, 2])
    torch.testing.assert_close(found, expected)


def test_rewards_are_clipped_to_the_band_of_their_peers():
    # (1, 2, 6): mean 3, std sqrt(14/2) = 2.64575; half of it each way: 1.67712 to 4.32288
    found = within_band(REWARDS, GROUPS, band=0.5)
    torch.testing.assert_close(found[:3].float(), torch.tensor([1.6771243, 2, 4.3228757]))
    # (5, 7): std sqrt 2, so 6 ± 0.70711
    torch.testing.assert_close(found[3:].float(), torch.tensor([5.2928932, 6.7071068]))
    # the mean of the clipped ones is 2.6666667
    expected = torch.tensor([1.6771243, 2, 4.3228757]) - 8 / 3
    torch.testing.assert_close(by_group(reward_band=0.5, advantage_scale="none")[:3], expected)
    assert torch.equal(by_group(reward_band=9.0), by_group())


def test_options_reach_the_advantages_and_the_algorithm():
    def made(*words):
        return build_config_advantages(load_config([*words]))({0: REWARDS[:3], 1: REWARDS[3:]}, {0: "", 1: ""})[0]

    unscaled = "train.advantage_scale=none"
    torch.testing.assert_close(made(unscaled, "train.advantage_baseline=leave_one_out"), torch.tensor([-3, -1.5, 4.5]))
    # as above: 1, 2 and 6 clipped to .5 standard deviations around 3
    expected = torch.tensor([1.6771243, 2, 4.3228757]) - 8 / 3
    torch.testing.assert_close(made(unscaled, "remedies.reward_band=0.5"), expected)
    policy = make_policy()
    words = ["remedies.matching=0.5", "train.scale_clips_by_window=false", "optimizer.burn_in_iterations=2"]
    algorithm = build_algorithm(load_config([*words, "train.groups_per_step=4"]), policy.sampler)
    assert algorithm.sharpness == 0.5 and algorithm.clips.scale_by_window is False
    assert algorithm.learning_rate(1) == 0 < algorithm.learning_rate(2)


# --- novelty ----------------------------------------------------------------------------------------------------------


def test_novelty_is_the_nearest_cosine_distance_over_its_mean():
    # directions 0°, 60°, 180°, of any length: 1 − cos 60° = 0.5, and 1 − cos 120° = 1.5; mean 2.5/3
    features = torch.tensor([[2.0, 0.0], [0.5, math.sqrt(0.75)], [-3.0, 0.0]])
    factors = novelty(features)
    torch.testing.assert_close(factors.float(), torch.tensor([0.5, 0.5, 1.5]) * 3 / 2.5)
    # positive ones only
    found = favour_novel(torch.tensor([-1.0, 0.5, 2.0]), factors)
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.5 * 0.6, 2.0 * 1.8]))
    assert novelty(torch.ones(3, 2)).tolist() == [1, 1, 1]


def test_a_run_asks_the_panels_network_how_novel_images_are(tmp_path):
    words = [
        "model.name=fashion", "remedies.novelty=true", "sample.num_inference_steps=3", "window.schedule=full",
        "train.iterations=1", "train.groups_per_iteration=2", "train.group_size=3", "evaluation.every=0",
        "evaluation.panel_size=2", "run.progress=json", f"run.folder={tmp_path / 'run'}", "train.advantage_clip=100",
    ]  # fmt: skip
    train(words, reward=lambda images, prompts: images.mean((1, 2, 3)))
    (record,) = metrics(tmp_path / "run")
    # without factors the advantages of a group sum to zero, and their std over 6 is sqrt(4/5)
    assert record["advantage_std"] != pytest.approx(math.sqrt(4 / 5), rel=1e-3) and record["grad_norm"] > 0


# --- matching ---------------------------------------------------------------------------------------------------------


def test_matching_by_hand():
    # p = softmax(0, log 3) = (1/4, 3/4); q = softmax(2·(−½ log 2, ½ log 2)) = (1/3, 2/3)
    rewards = torch.tensor([-0.5, 0.5]) * math.log(2)
    found = matching_advantages(rewards, torch.tensor([0.0, math.log(3)]), sharpness=1.0)
    torch.testing.assert_close(found, 2 * torch.tensor([1 / 3 - 1 / 4, 2 / 3 - 3 / 4]))
    assert not matching_advantages(torch.zeros(2), torch.tensor([0.0, 5.0]), sharpness=1.0).any()
    group = GroupRewards(torch.tensor([1.0, 3.0]), {}, log_prob=torch.tensor([0.0, math.log(3)]))
    advantages = build_advantages("group", advantage_floor=1e-6)
    # standardised to ∓ sqrt ½
    (found,) = standardise({4: group}, advantages, torch.device("cpu"), sharpness=2.0).values()
    wanted = torch.tensor([-math.sqrt(2), math.sqrt(2)]).softmax(0)
    torch.testing.assert_close(found, 2 * (wanted - torch.tensor([0.25, 0.75])))


def test_the_clipped_loss_has_the_gradient_of_the_literal_formula():
    policy, window, sharpness = make_policy(), Window(1, 4), 0.7
    group = make_group(policy, window)
    plan = CallPlan(group.size)
    trajectory = rollout(policy, [group], plan).trajectories[0]
    rewards = torch.tensor([-1.2, 0.1, 0.3, 0.8])
    # L = −Σ q log softmax(s), s the sum of the steps' log-probs
    log_prob = torch.zeros(group.size)
    for index, step in enumerate(range(window.start, window.stop)):
        output = policy.predict(trajectory.latents[index], step, group.condition).model_output
        coefficients = policy.sampler.coefficients[step]
        log_prob = log_prob + gaussian_log_prob(
            output, trajectory.latents[index], trajectory.latents[index + 1], coefficients
        )
    literal = -((sharpness * rewards).softmax(0) * log_prob.log_softmax(0)).sum()
    parameters = list(policy.network.parameters())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(literal, parameters)])

    advantages = matching_advantages(rewards, trajectory.old_log_prob.sum(0), sharpness=sharpness)
    losses = [
        call_surrogate(policy, {0: trajectory}, {0: advantages}, call, Clips(1e-4, 100.0, False), loss_weight=1 / 4)
        for call in plan.replay({0: window})
    ]
    total = torch.stack([surrogate.loss.sum() for surrogate in losses]).sum()
    found = torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])
    assert float((found - expected).norm() / expected.norm()) < GRADIENT_TOLERANCE
    assert float(expected.norm()) > 0 and abs(float(advantages.sum())) < 1e-6


def test_a_run_matches_trajectories(tiny_model, tmp_path):
    more = ("remedies.matching=1", "train.groups_per_step=2", "window.schedule=full", "evaluation.every=0")
    words = [*tiny_words(tiny_model, tmp_path / "run"), *more, "train.iterations=1", "train.advantage_clip=10"]
    train(words, reward=lambda images, prompts: images.mean((1, 2, 3)))
    (record,) = metrics(tmp_path / "run")
    # |3·(q − p)| is under 3, with q of rewards at most 2/sqrt 3 from their mean
    assert 0 < record["advantage_max"] < 3 and record["ratio_max"] == 1 and record["grad_norm"] > 0
    # and is no standardised reward
    assert record["advantage_std"] != pytest.approx(math.sqrt(4 / 5), rel=1e-3)


# --- what goes with what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.advantage_scale=none", "train.advantage_floor=0.1"], r"train\.advantage_floor is 0\.1"),
        (["train.advantage_scale=mad"], r"train\.advantage_scale is 'mad'.*std, batch, none"),
        (["train.advantage_scale=batch", "train.advantages=batch"], "advantage_scale is batch.*peers are the batch"),
        (
            ["train.advantage_scale=batch", "train.order=on_policy"],
            "train.advantage_scale is batch but train.order is on_policy.*rolled out together",
        ),
        (["remedies.novelty=true", "evaluation.network=none"], r"remedies\.novelty is true.*network is none"),
        (["remedies.novelty=true", "model.name=some/model"], r"remedies\.novelty is true.*some/model"),
        (
            ["remedies.novelty=true", "train.group_size=1", "train.advantages=batch"],
            r"remedies\.novelty is true.*group_size is 1",
        ),
        (["remedies.matching=1"], r"train\.order is collect but remedies\.matching is 1"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(words)


@pytest.mark.parametrize(
    "word",
    [
        "train.advantages=batch",
        "train.advantage_scale=none",
        "train.advantage_baseline=leave_one_out",
        "remedies.novelty=true",
        "train.inner_epochs=2",
    ],
)
def test_matching_stands_alone(word):
    option = re.escape(word.partition("=")[0])
    words = ["remedies.matching=1", "train.groups_per_step=4"]
    load_config(words)
    with pytest.raises(ValueError, match=f"{option} is .* but remedies.matching is 1"):
        load_config([*words, word])


def test_clips_that_cut_the_advantages_of_matching_are_said():
    words = ["remedies.matching=1", "train.groups_per_step=4", "train.group_size=8"]
    (narrow, scaled, wide), full = (
        [
            matching_note(load_config([*words, f"window.schedule={schedule}", *more]))
            for more in (
                ["train.advantage_clip=4"],
                ["train.advantage_clip=9"],
                ["train.advantage_clip=9", "train.scale_clips_by_window=false"],
            )
        ]
        for schedule in ("clusters", "full")
    )
    assert "train.advantage_clip 4, which train.scale_clips_by_window lowers further, cuts them" in narrow
    assert narrow.endswith("set train.advantage_clip=8 train.scale_clips_by_window=false")
    assert scaled.endswith("set train.advantage_clip=9 train.scale_clips_by_window=false") and wide == ""
    assert full[0].endswith("cuts them: the update is not that of matching then; set train.advantage_clip=8")
    assert full[1:] == ["", ""] and matching_note(load_config([])) == ""
    # T is 10: a window of one step still leaves 8
    assert matching_note(load_config([*words, "train.advantage_clip=80", "sample.num_inference_steps=10"])) == ""


def test_options_that_a_way_to_make_advantages_does_not_take_are_refused():
    for option, value in (("advantage_baseline", "leave_one_out"), ("reward_band", 2.0)):
        with pytest.raises(ValueError, match=rf"{option} is {value} but train.advantages is prompt"):
            by_group("prompt", **{option: value})


def test_defaults_are_the_numbers_of_before():
    neutral = {"advantage_scale": "std", "advantage_baseline": "mean", "reward_band": 0.0}
    for name in ("group", "batch", "prompt"):
        assert torch.equal(by_group(name, **neutral), by_group(name))
    torch.testing.assert_close(by_group()[:3], torch.tensor([-2.0, -1.0, 3.0]) / math.sqrt(7))
