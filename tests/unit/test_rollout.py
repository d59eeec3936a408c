"""Rollouts: what is run, what is kept, and what a result depends on."""

import torch

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.sample import sample, starting_noise
from hrf_fast.training.rollout import Start, renoised, rollout
from hrf_fast.windows.base import Window
from tests.unit.test_update import T, make_policy


def test_prefix_steps_are_never_run():
    # window [4, 5) of 6: steps 4 and 5 run, two batches of 3 images
    policy = make_policy()
    noise = NoiseKey(1, torch.arange(3))
    trajectories, _ = rollout(
        policy, {0: Start(Window(4, 5), starting_noise(policy, noise), noise)}, micro_batch_size=3
    )
    trajectory = trajectories[0]
    assert (policy.calls.batches, policy.calls.forwards, policy.calls.backwards) == (2, 6, 0)
    assert trajectory.latents.shape == (2, 3, 3, 16, 16)
    assert trajectory.old_log_prob.shape == (1, 3)
    assert trajectory.timesteps.tolist() == policy.diffusion.timesteps[4:5].tolist()


def test_images_are_in_range_and_finite():
    policy = make_policy()
    noise = NoiseKey(1, torch.arange(3))
    start = Start(Window(0, 5), starting_noise(policy, noise), noise)
    images = rollout(policy, {0: start}, micro_batch_size=3)[0][0].images
    assert images.shape == (3, 3, 16, 16) and float(images.min()) >= 0 and float(images.max()) <= 1


def test_a_sample_does_not_depend_on_its_batch():
    policy = make_policy()
    together = sample(policy, NoiseKey(3, torch.arange(5)), batch_size=5)
    apart = sample(policy, NoiseKey(3, torch.arange(5)), batch_size=2)
    alone = sample(policy, NoiseKey(3, torch.tensor([4])), batch_size=1)
    # the UNet's own fp32 sums depend on the batch; the noise does not
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone[0], together[4], atol=1e-4, rtol=1e-4)


def test_another_seed_gives_another_image_and_the_same_seed_the_same():
    policy = make_policy()
    first = sample(policy, NoiseKey(3, torch.arange(2)), batch_size=2)
    assert torch.equal(first, sample(policy, NoiseKey(3, torch.arange(2)), batch_size=2))
    assert not torch.allclose(first, sample(policy, NoiseKey(4, torch.arange(2)), batch_size=2))


def test_renoising_at_the_end_keeps_the_anchor_and_at_the_start_loses_it():
    policy = make_policy()
    anchor = torch.rand(3, 16, 16) * 2 - 1
    noise = NoiseKey(1, torch.arange(2))
    late, early = renoised(policy, anchor, T - 1, noise), renoised(policy, anchor, 0, noise)
    assert float((late - anchor).abs().mean()) < 0.05
    # at step 0 the image is mostly noise: variance near 1 and different per sample
    assert float((early[0] - early[1]).abs().mean()) > 0.5
    expected = policy.diffusion.signal[0] * anchor + policy.diffusion.noise[0] * starting_noise(policy, noise)
    assert torch.equal(early, expected)
