"""A conditional policy: rows of a condition meet their samples in rollouts, replays and under guidance.

The network is one weight and a shift for each sample, so that everything is exact whatever shares a call.
"""

import pytest
import torch
from torch import nn

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.base import Condition, Prediction
from hrf_fast.policies.pixel import PixelPolicy
from hrf_fast.policies.sampler import build_sampler
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.groups import Group
from hrf_fast.training.optimizer_step import Clips, optimizer_step, replay_ratios
from hrf_fast.training.rollout import rollout
from hrf_fast.windows.base import Window
from tests.conftest import make_engine, make_scheduler

T, SIZE = 6, 3
WINDOWS = {0: Window(1, 5), 1: Window(3, 5), 2: Window(2, 4)}
# as text, a prompt per sample
PROMPTS = {0: ["0.1", "0.2", "0.3"], 1: ["1.1", "1.2", "1.3"], 2: ["-0.1", "-0.2", "-0.3"]}
ADVANTAGES = torch.tensor([1.0, -0.5, 0.25])


class Shifted(nn.Module):
    """weight · latents + shift; keeps the timesteps and shifts of its calls."""

    config = {"in_channels": 1, "sample_size": 2}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.seen = []

    def forward(self, latents, timesteps, shift, return_dict):
        self.seen.append((timesteps, shift.tolist()))
        return (self.weight * latents + shift.view(-1, 1, 1, 1),)


class Conditional(PixelPolicy):
    """Conditions on the number that a prompt is."""

    def condition(self, prompts, *, guided=True):
        return Condition({"shift": torch.tensor([float(prompt) for prompt in prompts])})


class Guided(Conditional):
    """Conditional with guidance away from the shift 0.5."""

    def condition(self, prompts, *, guided=True):
        shift = super().condition(prompts).conditional["shift"]
        return Condition({"shift": shift}, {"shift": torch.full_like(shift, 0.5)})


def make_policy(kind=Conditional):
    scheduler = make_scheduler(clip_sample=False)
    sampler = build_sampler(scheduler, kind="ddim", num_inference_steps=T, eta=1.0)
    return kind(Shifted(), scheduler, sampler, guidance_scale=3.0)


def make_groups(policy, prompts=PROMPTS):
    noise = {number: NoiseKey(5, torch.arange(number * SIZE, (number + 1) * SIZE)) for number in prompts}
    return [Group(n, WINDOWS[n], noise[n], policy.condition(words)) for n, words in prompts.items()]


def roll_out(policy, groups, images_per_call=0):
    """Trajectories of groups that share calls where those have room."""
    return rollout(policy, groups, CallPlan(SIZE, images_per_call, "on_policy")).trajectories


def everything(policy, groups, images_per_call=0):
    """Latents, log-probs and images by group."""
    rolled_out = rollout(policy, groups, CallPlan(SIZE, images_per_call, "on_policy"))
    return {
        number: {"latents": each.latents, "old_log_prob": each.old_log_prob, "images": rolled_out.images[number]}
        for number, each in rolled_out.trajectories.items()
    }


def step(policy, trajectories, plan, **options):
    """(stats, gradient) of one optimizer step over all trajectories."""
    engine = make_engine(policy)
    calls = plan.replay({number: trajectory.window for number, trajectory in trajectories.items()})
    advantages = dict.fromkeys(trajectories, ADVANTAGES)
    policy.unet.seen.clear()
    stats = optimizer_step(engine, policy, trajectories, advantages, calls, Clips(0.1, 2.5, False), **options)
    return stats, policy.unet.weight.grad.clone()


# --- rows by hand -----------------------------------------------------------------------------------------------------


def test_rows_are_cut_joined_and_repeated_time_major():
    condition = Condition({"text": torch.tensor([[1, 2], [3, 4], [5, 6]])}, {"text": torch.tensor([[7], [8], [9]])})
    part = condition[1:3]
    assert part.conditional["text"].tolist() == [[3, 4], [5, 6]] and part.unconditional["text"].tolist() == [[8], [9]]
    # all samples of the first step, then all of the next
    repeated = part.repeat(2)
    assert repeated.conditional["text"].tolist() == [[3, 4], [5, 6], [3, 4], [5, 6]]
    assert repeated.unconditional["text"].tolist() == [[8], [9], [8], [9]]
    joined = Condition.join([condition[2:3], part])
    assert joined.conditional["text"].tolist() == [[5, 6], [3, 4], [5, 6]]
    assert joined.unconditional["text"].tolist() == [[9], [8], [9]]
    assert Condition.join([part]) is part and part.repeat(1) is part


def test_the_samples_of_a_group_share_the_rows_of_their_prompt_until_a_call_joins_them():
    row = Condition({"text": torch.tensor([[1.0, 2.0]])}, {"text": torch.tensor([[3.0, 4.0]])})
    group = row.expand(5)
    assert group[1:4].conditional["text"].tolist() == [[1, 2]] * 3
    for name in ("conditional", "unconditional"):
        shared, first = getattr(group, name)["text"], getattr(row, name)["text"]
        assert shared.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and len(shared) == 5
        # a network sees the strides that a replay of several steps has
        joined = getattr(Condition.join([group[0:2]]), name)["text"]
        assert joined.is_contiguous() and joined.tolist() == first.tolist() * 2
        one = getattr(Condition.join([group[0:1]]), name)["text"]
        assert one.stride() == first.stride() and one.tolist() == first.tolist()
    assert group.repeat(2).inputs["text"].tolist() == [[3, 4]] * 10 + [[1, 2]] * 10


def test_the_empty_condition_stays_empty():
    empty = Condition()
    for condition in (empty[0:2], empty.repeat(3), Condition.join([empty, empty])):
        assert condition.conditional == condition.unconditional == {}


# --- rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images_per_call", [1, 2, 6, 9])
def test_groups_that_share_calls_or_are_split_are_rolled_out_as_one_by_one(images_per_call):
    policy = make_policy()
    groups = make_groups(policy)
    apart = {number: everything(policy, [group])[number] for number, group in zip(PROMPTS, groups, strict=True)}
    together = everything(policy, groups, images_per_call)
    for number in PROMPTS:
        for name in ("latents", "old_log_prob", "images"):
            assert torch.equal(together[number][name], apart[number][name]), (number, name)


def test_the_rows_of_a_joined_call_are_its_pieces_in_their_order():
    policy = make_policy()
    roll_out(policy, make_groups(policy), images_per_call=9)
    # step 1: group 0; step 2: 0 and 2; step 3: all; step 4: 0 and 1 inside their windows, 2 beyond; step 5: all
    pieces = [[0], [0, 2], [0, 1, 2], [0, 1], [2], [0, 1, 2]]
    assert [shift for _, shift in policy.unet.seen] == [
        pytest.approx([float(word) for number in numbers for word in PROMPTS[number]]) for numbers in pieces
    ]


def test_another_condition_gives_another_image():
    policy = make_policy()
    first, second = (
        rollout(policy, make_groups(policy, {0: words}), CallPlan(SIZE)).images[0]
        for words in (PROMPTS[0], ["0.1", "0.2", "0.9"])
    )
    assert torch.equal(first[:2], second[:2]) and not torch.allclose(first[2], second[2])


# --- optimizer steps --------------------------------------------------------------------------------------------------

# (order, images_per_call): as published, several steps of a group, split, joined, joined and split over two calls
PLANS = [("collect", 0), ("collect", 6), ("collect", 9), ("collect", 2), ("on_policy", 9), ("on_policy", 6)]


@pytest.mark.parametrize(("order", "images_per_call"), PLANS)
def test_on_policy_the_ratio_is_one_whatever_shares_a_call(order, images_per_call):
    policy = make_policy()
    stats, _ = step(policy, roll_out(policy, make_groups(policy)), CallPlan(SIZE, images_per_call, order))
    assert float(stats.ratio_mean) == float(stats.ratio_max) == 1.0
    assert float(stats.approx_kl) == float(stats.clip_fraction) == 0.0


@pytest.mark.parametrize(("order", "images_per_call"), PLANS)
def test_the_gradient_is_the_mean_of_the_groups_whatever_shares_a_call(order, images_per_call):
    policy = make_policy()
    trajectories = roll_out(policy, make_groups(policy))
    _, gradient = step(policy, trajectories, CallPlan(SIZE, images_per_call, order))
    apart = [step(policy, {number: trajectories[number]}, CallPlan(SIZE))[1] for number in PROMPTS]
    torch.testing.assert_close(gradient, sum(apart) / 3, rtol=1e-5, atol=0)
    assert float(gradient) != 0


def test_several_steps_of_a_group_repeat_its_rows_time_major():
    policy = make_policy()
    trajectories = roll_out(policy, make_groups(policy, {1: PROMPTS[1]}))
    step(policy, trajectories, CallPlan(SIZE, 6))
    ((timesteps, shift),) = policy.unet.seen
    third, fourth = policy.sampler.timesteps[3:5].tolist()
    assert timesteps.tolist() == [third] * 3 + [fourth] * 3
    assert shift == pytest.approx([1.1, 1.2, 1.3] * 2)


def test_rows_in_another_order_are_seen_by_the_ratio():
    # so that the tests above can fail: group 0's prompts turned round
    policy = make_policy()
    groups = make_groups(policy)
    trajectories = roll_out(policy, groups)
    turned = make_groups(policy, {0: PROMPTS[0][::-1]})[0]
    object.__setattr__(trajectories[0], "group", turned)
    calls = CallPlan(SIZE).replay(WINDOWS)
    assert float((replay_ratios(policy, trajectories, calls) - 1).abs().max()) > 1e-3


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_is_the_shift_that_it_comes_to():
    # w·x + u + 3·(c − u) with u = 0.5: the unguided policy of the shift 3·c − 1
    policy, by_hand = make_policy(Guided), make_policy()
    words = {number: [str(3 * float(word) - 1) for word in words] for number, words in PROMPTS.items()}
    guided = everything(policy, make_groups(policy), 9)
    unguided = everything(by_hand, make_groups(by_hand, words), 9)
    for number in PROMPTS:
        for name in ("latents", "old_log_prob", "images"):
            ours, theirs = guided[number][name], unguided[number][name]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for plan in (CallPlan(SIZE, 6), CallPlan(SIZE, 9, "on_policy")):
        stats, gradient = step(policy, roll_out(policy, make_groups(policy), 9), plan)
        _, expected = step(by_hand, roll_out(by_hand, make_groups(by_hand, words), 9), plan)
        assert float(stats.ratio_max) == 1.0
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=0)


def test_a_guided_call_is_one_of_two_rows_each_the_unconditional_first_and_counts_two():
    policy = make_policy(Guided)
    (group,) = make_groups(policy, {1: PROMPTS[1]})
    latents = torch.ones(SIZE, 1, 2, 2)
    prediction = policy.predict(latents, torch.tensor([3, 4, 3]), group.condition)
    ((timesteps, shift),) = policy.unet.seen
    third, fourth = policy.sampler.timesteps[3:5].tolist()
    assert timesteps.tolist() == [third, fourth, third] * 2 and shift == pytest.approx([0.5] * 3 + [1.1, 1.2, 1.3])
    # 0.5 · 1 + shift
    assert prediction.unconditional_output[:, 0, 0, 0].tolist() == [1.0] * 3
    assert prediction.model_output[:, 0, 0, 0].tolist() == pytest.approx([1.6, 1.7, 1.8])
    assert prediction.guidance_scale == 3.0
    assert (policy.calls.batches, policy.calls.forwards) == (1, 2 * SIZE)
    trajectories = roll_out(policy, [group])
    policy.calls.forwards = 0
    step(policy, trajectories, CallPlan(SIZE))
    pairs = SIZE * len(WINDOWS[1])
    assert (policy.calls.forwards, policy.calls.backwards) == (2 * pairs, 2 * pairs)


def test_the_combined_output_by_hand():
    prediction = Prediction(torch.tensor([2.0]), torch.tensor([0.5]), 3.0)
    # 0.5 + 3·(2 − 0.5)
    assert prediction.combined.tolist() == [5.0] and prediction.detach().combined.tolist() == [5.0]
