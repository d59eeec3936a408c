"""What HRF-D measures: one by one by hand, in one staggered batch, and by the one-step estimate."""

import pytest
import torch

from hrf_fast.noise import NoiseKey
from hrf_fast.policies.base import Condition
from hrf_fast.policies.sample import renoised, sample
from hrf_fast.rewards import Rewards
from hrf_fast.training.probe import probe_starts
from hrf_fast.windows.base import evaluations
from hrf_kernels import gaussian_mean
from tests.conftest import T, make_policy

# fp32 sums of the UNet over another batch
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
CANDIDATES = [[0, 3, 5], [2], [4, 1]]


def brightness(images, prompts=None):
    return Rewards(images.mean((1, 2, 3)), {})


def make_anchors(policy, size=4):
    """Three anchors, and for each the noise of a group."""
    anchors = list(sample(policy, NoiseKey(3, torch.arange(3)), images_per_call=3))
    return anchors, [NoiseKey(9, torch.arange(size * group, size * (group + 1))) for group in range(3)]


def measure(policy, candidates, estimate="exact", images_per_call=64, reward=brightness):
    anchors, noises = make_anchors(policy)
    policy.calls.forwards = policy.calls.batches = 0
    options = {"estimate": estimate, "images_per_call": images_per_call}
    return probe_starts(policy, reward, anchors[: len(candidates)], candidates, noises[: len(candidates)], **options)


@torch.no_grad()
def one_by_one(policy, anchor, noise, start):
    """The published search: a group's deterministic rollout from one candidate."""
    latents = renoised(policy, anchor, start, noise)
    for step in range(start, T):
        output = policy.predict(latents, step, Condition()).model_output
        latents = gaussian_mean(output, latents, policy.sampler.deterministic[step])
    distance = 1 - torch.cosine_similarity(latents.flatten(1), anchor.flatten()[None])
    return brightness(policy.decode(latents)).total.mean(), distance.mean()


# calls of 3 split groups of 4 in 3 and 1
@pytest.mark.parametrize("images_per_call", [64, 8, 3, 1])
def test_the_staggered_search_of_all_groups_is_the_published_one_by_one(images_per_call):
    policy = make_policy()
    found = measure(policy, CANDIDATES, images_per_call=images_per_call)
    # candidates 0, 3, 5 | 2 | 4, 1 of 6 steps: 6 + 3 + 1 + 4 + 2 + 5 evaluations for each of 4 samples
    assert policy.calls.forwards == 21 * 4
    anchors, noises = make_anchors(policy)
    for group, starts in enumerate(CANDIDATES):
        rewards, distances = found[group]
        assert rewards.shape == distances.shape == (len(starts),)
        for index, start in enumerate(starts):
            reward, distance = one_by_one(policy, anchors[group], noises[group], start)
            torch.testing.assert_close(rewards[index], reward, **TOLERANCE)
            torch.testing.assert_close(distances[index], distance, **TOLERANCE)


def test_lanes_share_calls_up_to_the_images_of_one():
    policy = make_policy()
    # at steps 0 to 5 there are 1, 2, 3, 4, 5, 6 lanes of 4: one call each of at most 24 images, two of at most 12
    measure(policy, CANDIDATES)
    assert policy.calls.batches == 6
    measure(policy, CANDIDATES, images_per_call=12)
    assert policy.calls.batches == 1 + 1 + 1 + 2 + 2 + 2


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("images_per_call", [64, 3])
def test_x0_is_one_evaluation_and_the_formula_by_hand(clip, images_per_call):
    policy = make_policy(clip_sample=clip, clip_sample_range=0.8)
    found = measure(policy, CANDIDATES, "x0", images_per_call)
    assert policy.calls.forwards == 6 * 4
    anchors, noises = make_anchors(policy)
    alphas = policy.scheduler.alphas_cumprod
    for group, starts in enumerate(CANDIDATES):
        for index, start in enumerate(starts):
            latents = renoised(policy, anchors[group], start, noises[group])
            with torch.no_grad():
                output = policy.predict(latents, start, Condition()).model_output
            # x0 = (x − sqrt(1 − ā)·ε) / sqrt(ā), clamped where the scheduler clips
            alpha = alphas[policy.sampler.timesteps[start]]
            x0 = (latents - (1 - alpha).sqrt() * output) / alpha.sqrt()
            x0 = x0.clamp(-0.8, 0.8) if clip else x0
            distance = (1 - torch.cosine_similarity(x0.flatten(1), anchors[group].flatten()[None])).mean()
            torch.testing.assert_close(found[group][0][index], brightness(policy.decode(x0)).total.mean(), **TOLERANCE)
            torch.testing.assert_close(found[group][1][index], distance, **TOLERANCE)


def test_the_two_estimates_agree_where_one_step_is_left():
    # from the last step the deterministic rollout is one evaluation, and ends in its x0
    policy = make_policy()
    exact, x0 = (measure(policy, [[T - 1]], estimate)[0] for estimate in ("exact", "x0"))
    torch.testing.assert_close(exact, x0, **TOLERANCE)


def test_from_the_last_step_less_can_change_than_from_the_first():
    ((_, distances),) = measure(make_policy(), [[0, 3, 5]])
    assert float(distances[2]) < float(distances[0])


def test_a_reward_sees_at_most_the_images_of_a_call():
    seen = []

    def reward(images, prompts):
        seen.append(len(images))
        return brightness(images)

    for estimate in ("exact", "x0"):
        measure(make_policy(), CANDIDATES, estimate, 9, reward)
    assert sum(seen) == 48 and max(seen) <= 9


def test_a_reward_in_fp64_keeps_its_differences_beside_an_offset():
    policy = make_policy()
    plain = measure(policy, CANDIDATES)
    offset = measure(
        policy, CANDIDATES, reward=lambda images, prompts: Rewards(1e9 + brightness(images).total.double(), {})
    )
    for (rewards, _), (shifted, _) in zip(plain, offset, strict=True):
        torch.testing.assert_close(shifted - 1e9, rewards.double(), atol=1e-6, rtol=0)


def test_nothing_asked_costs_nothing():
    policy = make_policy()
    for estimate in ("exact", "x0"):
        found = measure(policy, [[], []], estimate)
        assert policy.calls.forwards == 0 and [len(values) for means in found for values in means] == [0] * 4
    # one group of two asked
    empty, one = measure(policy, [[], [4]])
    assert len(empty[0]) == 0 and len(one[0]) == 1 and policy.calls.forwards == 2 * 4


def test_the_cost_of_a_search_at_the_published_settings():
    # candidates 0, 2, …, 38 of 40 steps: 40 + 38 + … + 2 = 420
    assert sum(evaluations(start, 40) for start in range(0, 40, 2)) == 420
    assert sum(evaluations(start, 40, "x0") for start in range(0, 40, 2)) == 20


def test_an_unknown_estimate_answers_with_the_nearest():
    with pytest.raises(ValueError, match="estimate.*'exakt'.*'exact'.*x0"):
        measure(make_policy(), [[0]], "exakt")
