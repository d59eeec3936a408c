"""Rollouts: what is run, what is kept, and what a result depends on."""

import pytest
import torch

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.sample import renoised, sample, starting_noise
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.rollout import Rollout, rollout
from hrf_fast.windows.base import Window
from tests.conftest import T, make_group, make_policy


def roll_out(policy, group, images_per_call=0, **options):
    return rollout(policy, [group], CallPlan(group.size, images_per_call), **options)


def test_prefix_steps_are_never_run():
    # window [4, 5) of 6: steps 4 and 5 run, two calls of 3 images
    policy = make_policy()
    trajectory = roll_out(policy, make_group(policy, Window(4, 5), size=3)).trajectories[0]
    assert (policy.calls.batches, policy.calls.forwards, policy.calls.backwards) == (2, 6, 0)
    assert trajectory.latents.shape == (2, 3, 3, 16, 16)
    assert trajectory.old_log_prob.shape == (1, 3)
    assert trajectory.window == Window(4, 5)


def test_images_are_in_range_and_finite():
    policy = make_policy()
    images = roll_out(policy, make_group(policy, Window(0, 5), size=3)).images[0]
    assert images.shape == (3, 3, 16, 16) and float(images.min()) >= 0 and float(images.max()) <= 1


def test_only_the_trained_calls_are_handed_on_and_steps_from_the_first_kept_one_have_their_graphs():
    # window [2, 4): calls at 2 and 3; steps 4 and 5 only finish the images
    policy = make_policy()
    group = make_group(policy, Window(2, 4), size=3)
    for keep_from, kept in ((None, [False, False]), (3, [False, True]), (0, [True, True])):
        calls = roll_out(policy, group, keep_from=keep_from).calls
        assert [call.steps.start for call in calls] == [2, 3]
        assert [call.prediction is not None for call in calls] == kept
        assert all(call.prediction.model_output.requires_grad for call in calls if call.prediction)


def test_a_kept_graph_does_not_change_the_trajectory():
    policy = make_policy()
    group = make_group(policy, Window(1, 5), size=3)
    both = [roll_out(policy, group, keep_from=keep_from) for keep_from in (None, 0)]
    plain, kept = (each.trajectories[0] for each in both)
    assert torch.equal(plain.latents, kept.latents) and torch.equal(plain.old_log_prob, kept.old_log_prob)
    assert not kept.latents.requires_grad and not both[1].images[0].requires_grad


@pytest.mark.parametrize("images_per_call", [1, 2, 8])
def test_a_trajectory_does_not_depend_on_the_calls_that_its_samples_share(images_per_call):
    policy = make_policy()
    pack = [make_group(policy, Window(start, 5), number=number) for number, start in enumerate((1, 3))]
    whole, other = (rollout(policy, pack, CallPlan(4, images)) for images in (0, images_per_call))
    for number in (0, 1):
        # the UNet's own fp32 sums depend on the batch
        for name in ("latents", "old_log_prob"):
            expected, found = (getattr(each.trajectories[number], name) for each in (whole, other))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other.images[number], whole.images[number], atol=1e-4, rtol=1e-4)


def test_a_group_starts_from_its_anchor_taken_back_to_its_window():
    policy = make_policy()
    anchor = torch.rand(3, 16, 16) * 2 - 1
    group = make_group(policy, Window(4, 5), size=3, anchor=anchor)
    first = roll_out(policy, group).trajectories[0].latents[0]
    assert torch.equal(first, renoised(policy, anchor, 4, group.noise))
    # and without one from pure noise
    group = make_group(policy, Window(4, 5), size=3)
    assert torch.equal(roll_out(policy, group).trajectories[0].latents[0], starting_noise(policy, group.noise))


@pytest.mark.parametrize("anchored", [True, False])
def test_samples_that_share_their_noise_start_alike_and_part_in_the_window(anchored):
    policy = make_policy()
    anchor = torch.rand(3, 16, 16) * 2 - 1 if anchored else None
    group = make_group(policy, Window(3, 5, shared=True), size=3, anchor=anchor)
    trajectory = roll_out(policy, group).trajectories[0]
    one = group.noise[:1]
    start = starting_noise(policy, one) if anchor is None else renoised(policy, anchor, 3, one)
    assert torch.equal(trajectory.latents[0], start.expand(3, -1, -1, -1))
    first, second, third = trajectory.latents[1]
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_rollouts_join_in_their_order():
    policy = make_policy()
    rolled_out = Rollout()
    for number in (3, 1):
        rolled_out.join(roll_out(policy, make_group(policy, Window(4, 5), number=number, size=2)))
    assert list(rolled_out.trajectories) == [3, 1]
    assert [call.pieces[0].group for call in rolled_out.calls] == [3, 1]


def test_a_sample_does_not_depend_on_its_batch():
    policy = make_policy()
    together = sample(policy, NoiseKey(3, torch.arange(5)), images_per_call=5)
    apart = sample(policy, NoiseKey(3, torch.arange(5)), images_per_call=2)
    alone = sample(policy, NoiseKey(3, torch.tensor([4])), images_per_call=1)
    # the UNet's own fp32 sums depend on the batch; the noise does not
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone[0], together[4], atol=1e-4, rtol=1e-4)


def test_another_seed_gives_another_image_and_the_same_seed_the_same():
    policy = make_policy()
    first = sample(policy, NoiseKey(3, torch.arange(2)), images_per_call=2)
    assert torch.equal(first, sample(policy, NoiseKey(3, torch.arange(2)), images_per_call=2))
    assert not torch.allclose(first, sample(policy, NoiseKey(4, torch.arange(2)), images_per_call=2))


def test_renoising_at_the_end_keeps_the_anchor_and_at_the_start_loses_it():
    policy = make_policy()
    anchor = torch.rand(3, 16, 16) * 2 - 1
    noise = NoiseKey(1, torch.arange(2))
    late, early = renoised(policy, anchor, T - 1, noise), renoised(policy, anchor, 0, noise)
    assert float((late - anchor).abs().mean()) < 0.05
    # at step 0 the image is mostly noise: variance near 1 and different per sample
    assert float((early[0] - early[1]).abs().mean()) > 0.5
    expected = policy.sampler.signal[0] * anchor + policy.sampler.noise[0] * starting_noise(policy, noise)
    assert torch.equal(early, expected)
