"""The optimizer step: gradients by hand and by autograd, and what must not change them."""

import math
import random

import pytest
import torch

from hrf_fast.policies.base import Condition
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.optimizer_step import Clips, optimizer_step, replay_ratios
from hrf_fast.training.rollout import Rollout, rollout
from hrf_fast.windows.base import Window
from hrf_kernels import gaussian_log_prob
from tests.conftest import make_engine, make_group, make_policy

SIZE = 4


def roll_out(policy, window, number=0):
    """The trajectory of a group by itself."""
    group = make_group(policy, window, number=number, size=SIZE)
    return rollout(policy, [group], CallPlan(SIZE)).trajectories[number]


def replay_calls(trajectories, images_per_call=0):
    windows = {number: trajectory.window for number, trajectory in trajectories.items()}
    return CallPlan(SIZE, images_per_call).replay(windows)


def gradients(
    policy, trajectories, advantages, *, images_per_call=0, clip_range=1e-4, advantage_clip=2.5, scaled=False
):
    """Stats and the flat gradient of one optimizer step."""
    engine = make_engine(policy)
    trajectories, advantages = dict(enumerate(trajectories)), dict(enumerate(advantages))
    calls = replay_calls(trajectories, images_per_call)
    stats = optimizer_step(engine, policy, trajectories, advantages, calls, Clips(clip_range, advantage_clip, scaled))
    return stats, flat_gradient(policy)


def flat_gradient(policy):
    return torch.cat([parameter.grad.flatten() for parameter in policy.unet.parameters()])


def log_prob_of(policy, trajectory, index):
    """[B] log-prob of the window's step `index` under the current weights."""
    step = trajectory.window.start + index
    latents, next_latents = trajectory.latents[index], trajectory.latents[index + 1]
    output = policy.predict(latents, step, Condition()).model_output
    return gaussian_log_prob(output, latents, next_latents, policy.sampler.coefficients[step])


def relative(a, b):
    return float((a - b).norm() / b.norm())


ADVANTAGES = torch.tensor([1.0, -0.5, 0.25, -0.75])


def test_on_policy_the_gradient_is_minus_advantage_times_that_of_the_log_prob():
    # ratio 1: d loss = -A d log_prob, summed over steps and averaged over samples
    policy = make_policy()
    trajectory = roll_out(policy, Window(2, 5))
    _, ours = gradients(policy, [trajectory], [ADVANTAGES])
    policy.unet.zero_grad()
    sum(-(ADVANTAGES * log_prob_of(policy, trajectory, i)).mean() for i in range(3)).backward()
    assert relative(ours, flat_gradient(policy)) < 1e-5


def test_on_policy_stats_are_those_of_ratio_one():
    policy = make_policy()
    stats, _ = gradients(policy, [roll_out(policy, Window(2, 5))], [ADVANTAGES])
    # loss = 3 steps x mean(-A) = 3 x 0 = 0
    assert float(stats.ratio_mean) == float(stats.ratio_max) == 1.0
    assert float(stats.approx_kl) == float(stats.clip_fraction) == float(stats.clipped_fraction) == 0.0
    assert abs(float(stats.loss)) < 1e-7


# one sample a call, three and the rest, and two steps of all four
@pytest.mark.parametrize("images_per_call", [1, 3, 8])
def test_the_gradient_does_not_depend_on_how_forwards_are_split(images_per_call):
    policy = make_policy()
    trajectory = roll_out(policy, Window(1, 5))
    _, whole = gradients(policy, [trajectory], [ADVANTAGES])
    _, split = gradients(policy, [trajectory], [ADVANTAGES], images_per_call=images_per_call)
    # fp32 sums in another order
    assert relative(split, whole) < 1e-4


def test_groups_of_one_optimizer_step_are_averaged():
    policy = make_policy()
    first, second = roll_out(policy, Window(1, 5)), roll_out(policy, Window(3, 5), number=1)
    _, both = gradients(policy, [first, second], [ADVANTAGES, -ADVANTAGES])
    _, a = gradients(policy, [first], [ADVANTAGES])
    _, b = gradients(policy, [second], [-ADVANTAGES])
    assert relative(both, (a + b) / 2) < 1e-5


def test_the_advantage_clip_scales_with_the_window():
    # start 3 of 6 gives w = 1/2: a bound of 0.8 acts as 0.4
    policy = make_policy()
    trajectory = roll_out(policy, Window(3, 5))
    _, scaled = gradients(policy, [trajectory], [ADVANTAGES], advantage_clip=0.8, scaled=True)
    _, by_hand = gradients(policy, [trajectory], [ADVANTAGES.clamp(-0.4, 0.4)])
    assert torch.equal(scaled, by_hand)


def test_the_clip_range_scales_with_the_window():
    # w = 1/2; the policy has moved, so that some ratios lie between 1 + range/2 and 1 + range
    policy = make_policy()
    trajectory = roll_out(policy, Window(3, 5))
    with torch.no_grad():
        for parameter in policy.unet.parameters():
            parameter.mul_(1.001)
    stats, _ = gradients(policy, [trajectory], [ADVANTAGES], clip_range=1.0)
    width = abs(float(stats.ratio_max) - 1) * 1.5
    unscaled, _ = gradients(policy, [trajectory], [ADVANTAGES], clip_range=width)
    scaled, _ = gradients(policy, [trajectory], [ADVANTAGES], clip_range=width, scaled=True)
    assert float(scaled.clip_fraction) > float(unscaled.clip_fraction)


def test_a_clipped_sample_has_no_gradient():
    # old log-prob far below: ratio = exp(1) > 1 + clip, and with A > 0 every gradient is stopped
    policy = make_policy()
    trajectory = roll_out(policy, Window(3, 5))
    trajectory.old_log_prob.sub_(1.0)
    stats, gradient = gradients(policy, [trajectory], [torch.ones(4)], clip_range=0.1)
    assert float(stats.clipped_fraction) == float(stats.clip_fraction) == 1.0
    assert float(stats.ratio_mean) == pytest.approx(2.71828, abs=1e-4)
    assert not gradient.any()
    # with A < 0 the same ratio is outside the range, and the gradient flows
    stats, gradient = gradients(policy, [trajectory], [-torch.ones(4)], clip_range=0.1)
    assert float(stats.clip_fraction) == 1.0 and float(stats.clipped_fraction) == 0.0
    assert gradient.any()


def test_replaying_a_fresh_trajectory_gives_ratio_one_to_the_bit():
    for clip_sample in (False, True):
        policy = make_policy(clip_sample=clip_sample)
        trajectory = roll_out(policy, Window(0, 5))
        ratios = replay_ratios(policy, {0: trajectory}, replay_calls({0: trajectory}), as_in_update=True)
        assert ratios.tolist() == [1.0] * (5 * SIZE)


def test_a_moved_policy_has_another_ratio():
    policy = make_policy()
    trajectory = roll_out(policy, Window(0, 5))
    with torch.no_grad():
        next(policy.unet.parameters()).mul_(1.1)
    # the log-probs of the moved policy by themselves, step by step
    old = trajectory.old_log_prob
    expected = torch.cat([(log_prob_of(policy, trajectory, i) - old[i]).exp() for i in range(5)]).detach()
    ratios = replay_ratios(policy, {0: trajectory}, replay_calls({0: trajectory}))
    assert torch.allclose(ratios, expected, rtol=1e-5) and not ratios.requires_grad
    assert float((ratios - 1).abs().max()) > 1e-3


def test_a_step_moves_the_log_prob_of_good_samples_up():
    policy = make_policy()
    engine = make_engine(policy)
    engine.set_learning_rate(1e-4)
    trajectory = roll_out(policy, Window(2, 5))
    calls = replay_calls({0: trajectory})
    optimizer_step(engine, policy, {0: trajectory}, {0: ADVANTAGES}, calls, Clips(1.0, 2.5, False))
    with torch.no_grad():
        moved = torch.stack([log_prob_of(policy, trajectory, i) for i in range(3)])
    change = (moved - trajectory.old_log_prob).sum(0)
    assert float((change * ADVANTAGES).sum()) > 0


# --- drawn plans ------------------------------------------------------------------------------------------------------


def drawn_gradient(plan, windows, checkpoint):
    """The flat gradient of one optimizer step as the loop makes it, with the same advantages for every plan."""
    policy = make_policy()
    policy.network.checkpoint_activations(checkpoint)
    keep_from = plan.keep_from(windows.values()) if plan.order == "on_policy" else None
    rolled_out = Rollout()
    for pack in plan.packs(windows):
        groups = [make_group(policy, windows[number], number=number, size=plan.group_size) for number in pack]
        rolled_out.join(rollout(policy, groups, plan, keep_from=keep_from))
    advantages = {number: torch.linspace(-1, 1 + number, plan.group_size) for number in windows}
    calls = plan.update(rolled_out.calls, windows)
    clips = Clips(1.0, 2.5, scale_by_window=True)
    optimizer_step(make_engine(policy), policy, rolled_out.trajectories, advantages, calls, clips)
    return flat_gradient(policy)


@pytest.mark.parametrize("order", ["collect", "on_policy"])
@pytest.mark.parametrize(
    ("size", "images_per_call"),
    [(2, 4), (2, 11), (5, 1), (5, 4)]
    + [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 0), (2, 1), (2, 2), (2, 6), (5, 0), (5, 2))]
    + [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((5, 6), (5, 11))],
)
def test_a_drawn_plan_has_the_gradient_of_the_published_one(size, images_per_call, order):
    generator = random.Random(f"{size} {images_per_call} {order}")
    windows = {group: Window(generator.randrange(5), 5) for group in range(generator.randint(1, 3))}
    kept, checkpoint = generator.choice([0, 2 * size, math.inf]), generator.random() < 0.3
    plan = CallPlan(size, images_per_call, order, kept)
    published = drawn_gradient(CallPlan(size), windows, False)
    # fp32: a UNet's sums depend on the batch in the last digits
    assert relative(drawn_gradient(plan, windows, checkpoint), published) < 1e-4, (plan, windows, checkpoint)
