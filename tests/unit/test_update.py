"""The update: gradients by hand and by autograd, and what must not change them."""

import pytest
import torch

from hrf_fast.engines.plain import PlainEngine
from hrf_fast.noise import NoiseKey
from hrf_fast.policies.pixel import Policy
from hrf_fast.policies.sample import starting_noise
from hrf_fast.policies.sampler import build_diffusion
from hrf_fast.training.calls import replay_calls
from hrf_fast.training.optimizer_step import Clips, replay_ratio_error, update
from hrf_fast.training.rollout import Start, rollout
from hrf_fast.windows.base import Window
from hrf_kernels import gaussian_log_prob
from tests.conftest import make_scheduler, make_unet

T = 6


def make_policy(seed=0, **scheduler_options) -> Policy:
    scheduler = make_scheduler(**{"clip_sample": False, **scheduler_options})
    diffusion = build_diffusion(scheduler, sampler="ddim", num_inference_steps=T, eta=1.0)
    return Policy(make_unet(seed=seed).eval(), scheduler, diffusion)


def make_engine(policy, max_grad_norm=0.0) -> PlainEngine:
    return PlainEngine(policy.unet, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=max_grad_norm)


def make_group(policy, window, size=4, first_id=0):
    noise = NoiseKey(5, torch.arange(first_id, first_id + size))
    start = Start(window, starting_noise(policy, noise), noise)
    return rollout(policy, {0: start}, micro_batch_size=size)[0][0]


def calls_for(trajectories, micro_batch_size=4, steps_per_forward=1):
    windows = {group: trajectory.window for group, trajectory in trajectories.items()}
    split = {"micro_batch_size": micro_batch_size, "steps_per_forward": steps_per_forward}
    return replay_calls(windows, group_size=4, **split)


def gradients(policy, groups, advantages, calls=None, clip_range=1e-4, advantage_clip=2.5, scaled=False, **split):
    engine = make_engine(policy)
    groups = dict(enumerate(groups))
    clips = Clips(clip_range, advantage_clip, scaled)
    stats = update(engine, policy, groups, dict(enumerate(advantages)), calls or calls_for(groups, **split), clips)
    return stats, torch.cat([p.grad.flatten() for p in policy.unet.parameters()])


def relative(a, b):
    return float((a - b).norm() / b.norm())


ADVANTAGES = torch.tensor([1.0, -0.5, 0.25, -0.75])


def test_on_policy_the_gradient_is_minus_advantage_times_that_of_the_log_prob():
    # ratio 1: d loss = -A d log_prob, summed over steps and averaged over samples
    policy = make_policy()
    group = make_group(policy, Window(2, 5))
    _, ours = gradients(policy, [group], [ADVANTAGES])
    policy.unet.zero_grad()
    loss = 0.0
    for i in range(3):
        output = policy.model_output(group.latents[i], int(group.timesteps[i]))
        log_prob = gaussian_log_prob(output, group.latents[i], group.latents[i + 1], group.coefficients[i])
        loss = loss - (ADVANTAGES * log_prob).mean()
    loss.backward()
    assert relative(ours, torch.cat([p.grad.flatten() for p in policy.unet.parameters()])) < 1e-5


def test_on_policy_stats_are_those_of_ratio_one():
    policy = make_policy()
    stats, _ = gradients(policy, [make_group(policy, Window(2, 5))], [ADVANTAGES])
    # loss = 3 steps x mean(-A) = 3 x 0 = 0
    assert float(stats.ratio_mean) == float(stats.ratio_max) == 1.0
    assert float(stats.approx_kl) == float(stats.clip_fraction) == float(stats.clipped_fraction) == 0.0
    assert abs(float(stats.loss)) < 1e-7


@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"steps_per_forward": 2}], ids=str
)
def test_the_gradient_does_not_depend_on_how_forwards_are_split(options):
    policy = make_policy()
    group = make_group(policy, Window(1, 5))
    _, whole = gradients(policy, [group], [ADVANTAGES])
    _, split = gradients(policy, [group], [ADVANTAGES], **options)
    # fp32 sums in another order
    assert relative(split, whole) < 1e-4


def test_groups_of_one_optimizer_step_are_averaged():
    policy = make_policy()
    first, second = make_group(policy, Window(1, 5)), make_group(policy, Window(3, 5), first_id=10)
    _, both = gradients(policy, [first, second], [ADVANTAGES, -ADVANTAGES])
    _, a = gradients(policy, [first], [ADVANTAGES])
    _, b = gradients(policy, [second], [-ADVANTAGES])
    assert relative(both, (a + b) / 2) < 1e-5


def test_the_advantage_clip_scales_with_the_window():
    # start 3 of 6 gives w = 1/2: a bound of 0.8 acts as 0.4
    policy = make_policy()
    group = make_group(policy, Window(3, 5))
    _, scaled = gradients(policy, [group], [ADVANTAGES], advantage_clip=0.8, scaled=True)
    _, by_hand = gradients(policy, [group], [ADVANTAGES.clamp(-0.4, 0.4)])
    assert torch.equal(scaled, by_hand)


def test_the_clip_range_scales_with_the_window():
    # w = 1/2; the policy has moved, so that some ratios lie between 1 + range/2 and 1 + range
    policy = make_policy()
    group = make_group(policy, Window(3, 5))
    with torch.no_grad():
        for parameter in policy.unet.parameters():
            parameter.mul_(1.001)
    stats, _ = gradients(policy, [group], [ADVANTAGES], clip_range=1.0)
    width = abs(float(stats.ratio_max) - 1) * 1.5
    unscaled, _ = gradients(policy, [group], [ADVANTAGES], clip_range=width)
    scaled, _ = gradients(policy, [group], [ADVANTAGES], clip_range=width, scaled=True)
    assert float(scaled.clip_fraction) > float(unscaled.clip_fraction)


def test_a_clipped_sample_has_no_gradient():
    # old log-prob far below: ratio = exp(1) > 1 + clip, and with A > 0 every gradient is stopped
    policy = make_policy()
    group = make_group(policy, Window(3, 5))
    group.old_log_prob.sub_(1.0)
    stats, gradient = gradients(policy, [group], [torch.ones(4)], clip_range=0.1)
    assert float(stats.clipped_fraction) == float(stats.clip_fraction) == 1.0
    assert float(stats.ratio_mean) == pytest.approx(2.71828, abs=1e-4)
    assert not gradient.any()
    # with A < 0 the same ratio is outside the range, and the gradient flows
    stats, gradient = gradients(policy, [group], [-torch.ones(4)], clip_range=0.1)
    assert float(stats.clip_fraction) == 1.0 and float(stats.clipped_fraction) == 0.0
    assert gradient.any()


def test_replaying_a_fresh_trajectory_gives_ratio_one_to_the_bit():
    for clip_sample in (False, True):
        policy = make_policy(clip_sample=clip_sample)
        group = make_group(policy, Window(0, 5))
        assert replay_ratio_error(policy, {0: group}, calls_for({0: group})) == 0.0


def test_a_moved_policy_has_another_ratio():
    policy = make_policy()
    group = make_group(policy, Window(0, 5))
    with torch.no_grad():
        next(policy.unet.parameters()).mul_(1.1)
    assert replay_ratio_error(policy, {0: group}, calls_for({0: group})) > 0.0


def test_a_step_moves_the_log_prob_of_good_samples_up():
    policy = make_policy()
    engine = make_engine(policy)
    engine.set_learning_rate(1e-4)
    group = make_group(policy, Window(2, 5))
    update(engine, policy, {0: group}, {0: ADVANTAGES}, calls_for({0: group}), Clips(1.0, 2.5, False))
    with torch.no_grad():
        moved = torch.stack(
            [
                gaussian_log_prob(
                    policy.model_output(group.latents[i], int(group.timesteps[i])),
                    group.latents[i],
                    group.latents[i + 1],
                    group.coefficients[i],
                )
                for i in range(3)
            ]
        )
    change = (moved - group.old_log_prob).sum(0)
    assert float((change * ADVANTAGES).sum()) > 0
