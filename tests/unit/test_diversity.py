import math

import pytest
import torch

from hrf_fast.evaluation.diversity import (
    Interval,
    _interval,
    inception_interval,
    inception_score,
    mean_interval,
    paired_difference_interval,
    vendi_interval,
)
from hrf_fast.evaluation.kept import halves, kept_interval
from hrf_fast.evaluation.vendi import affordable, chunk_of, vendi_of, vendi_score

# eigenvalues 3/4 and 1/4: exp(3/4 log 4/3 + 1/4 log 4) = 4 / 3^(3/4)
THREE_TO_ONE = 4 / 3**0.75


def random_features(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def random_log_probs(count, classes, seed=0):
    return (2 * random_features(count, classes, seed)).log_softmax(1)


def test_vendi_of_equal_images_is_one():
    assert vendi_score(torch.tensor([[3.0, 4.0]]).repeat(7, 1)) == pytest.approx(1, abs=1e-12)


def test_vendi_of_orthogonal_images_is_their_number():
    assert vendi_score(torch.eye(7)) == pytest.approx(7, abs=1e-12)


def test_vendi_counts_a_repeated_image_by_its_share():
    assert vendi_score(torch.eye(2)[[0, 0, 1, 1]]) == pytest.approx(2, abs=1e-12)
    assert vendi_score(torch.eye(2)[[0, 0, 0, 1]]) == pytest.approx(THREE_TO_ONE, abs=1e-12)


def test_vendi_of_two_images_at_sixty_degrees():
    # K/2 = [[1/2, 1/4], [1/4, 1/2]]: eigenvalues 3/4 and 1/4
    features = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    assert vendi_score(features) == pytest.approx(THREE_TO_ONE, abs=1e-12)


def test_vendi_does_not_depend_on_the_length_of_a_feature_vector():
    features = random_features(6, 4)
    scaled = features * torch.tensor([1e-3, 1, 1e3, 2, 5, 7])[:, None]
    assert vendi_score(scaled) == pytest.approx(vendi_score(features), abs=1e-6)


@pytest.mark.filterwarnings("ignore:Please import `csr_matrix`:DeprecationWarning")
@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9, 9)])
def test_vendi_equals_the_authors_package(shape):
    vendi = pytest.importorskip("vendi_score.vendi")
    features = random_features(*shape).double()
    unit = features / features.norm(dim=1, keepdim=True)
    assert vendi_score(features) == pytest.approx(vendi.score_K((unit @ unit.T).numpy()), rel=1e-9)


def test_vendi_is_the_same_through_the_smaller_and_the_larger_kernel():
    # 20 zero columns change no cosine but make the image side the smaller one
    features = random_features(12, 5).double()
    wide = torch.cat([features, torch.zeros(12, 20)], 1)
    assert vendi_score(wide) == pytest.approx(vendi_score(features), rel=1e-12)


def test_vendi_of_bf16_features_is_computed_in_double():
    features = random_features(64, 8).bfloat16()
    assert vendi_score(features) == vendi_score(features.double())


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(4), r"shape \[4\]; pass \[N, D\]"),
        (torch.ones(0, 4), r"shape \[0, 4\]; pass \[N, D\] with N > 0"),
        (torch.tensor([[1.0, 0], [0, 0]]), "1 of 2 features are all zeros or not finite, row 1 first"),
        (torch.tensor([[1.0, math.nan], [math.inf, 0]]), "2 of 2 features are all zeros or not finite, row 0 first"),
    ],
)
def test_vendi_refuses_features_without_direction(features, message):
    with pytest.raises(ValueError, match=message):
        vendi_score(features)


def test_inception_score_is_one_when_every_image_looks_alike():
    assert inception_score(random_log_probs(1, 5).repeat(9, 1)) == pytest.approx(1, abs=1e-12)


def test_inception_score_is_the_number_of_classes_when_each_is_sure_and_equally_often():
    # log 0 = -inf stands for the other classes
    assert inception_score(torch.eye(4).repeat(3, 1).log()) == pytest.approx(4, abs=1e-12)


def test_inception_score_of_a_sure_and_an_unsure_image():
    # p = (1, 0) and (1/2, 1/2), mean (3/4, 1/4): KL 1 is log 4/3; KL 2 is (log 2/3 + log 2)/2; their mean, exponent
    expected = math.exp((math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2)
    assert inception_score(torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("log_probs", "message"),
    [
        (torch.zeros(3), r"shape \[3\]; pass \[N, K\]"),
        (torch.zeros(0, 3), r"shape \[0, 3\]"),
        (torch.zeros(2, 3), "must sum to 1; apply log_softmax"),
        (torch.full((2, 3), math.nan), "must sum to 1"),
    ],
)
def test_inception_score_refuses_what_is_no_log_probability(log_probs, message):
    with pytest.raises(ValueError, match=message):
        inception_score(log_probs)


def test_bootstrap_of_two_samples_by_hand():
    # resamples of (0, 1) have mean 0, 1/2, 1 1/4, 1/2, 1/4 of the time: 5 % tails 0 and 1, 40 % tails 1/2
    values = torch.tensor([0.0, 1.0])
    assert mean_interval(values, level=0.9, seed=0) == (0.5, 0.0, 1.0)
    assert mean_interval(values, level=0.2, seed=0) == (0.5, 0.5, 0.5)


def test_mean_interval_has_the_width_of_normal_theory():
    # 400 samples of variance 1: 1.96/sqrt(400) = 0.098 to each side
    values = random_features(400, 1)[:, 0]
    values = (values - values.mean()) / values.std(correction=0)
    value, low, high = mean_interval(values, resamples=4000, seed=1)
    assert value == pytest.approx(0, abs=1e-6)
    assert low == pytest.approx(-0.098, rel=0.08)
    assert high == pytest.approx(0.098, rel=0.08)


def test_mean_intervals_cover_the_truth_as_often_as_they_say():
    # 300 panels of 40 draws of a mean-0 law: about 94 % hold 0; three standard errors of that share are 4 %
    panels = random_features(300, 40, seed=3)
    intervals = [mean_interval(panel, resamples=300, seed=0) for panel in panels]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals) / 300
    assert 0.9 <= covered <= 0.98


def test_the_seed_decides_the_interval():
    values = random_features(30, 1)[:, 0]
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5)
    assert mean_interval(values, seed=5) != mean_interval(values, seed=6)


def bootstrap_interval(statistic, count, *, seed, centred=False):
    """The interval of a statistic of an index into `count` samples, one resample after the other."""
    index = torch.randint(count, (1000, count), generator=torch.Generator().manual_seed(seed))
    value = float(statistic(torch.arange(count)))
    values = torch.tensor([float(statistic(row)) for row in index], dtype=torch.float64)
    shift = value - values.mean() if centred else 0
    return Interval(value, float(values.quantile(0.025) + shift), float(values.quantile(0.975) + shift))


def test_fast_intervals_equal_the_general_one():
    tall, wide, log_probs = random_features(20, 4), random_features(5, 9), random_log_probs(20, 4)
    for f in (tall, wide):
        slow = bootstrap_interval(lambda i, f=f: vendi_score(f[i]), len(f), seed=2, centred=True)
        assert vendi_interval(f, seed=2) == pytest.approx(slow, rel=1e-9)
    slow = bootstrap_interval(lambda i: inception_score(log_probs[i]), 20, seed=2, centred=True)
    assert inception_interval(log_probs, seed=2) == pytest.approx(slow, rel=1e-9)
    slow = bootstrap_interval(lambda i: float(tall[i, 0].double().mean()), 20, seed=2)
    assert mean_interval(tall[:, 0], seed=2) == pytest.approx(slow, rel=1e-9)


def test_larger_matrices_have_fewer_resamples_and_less_of_them_in_memory():
    # the time of a matrix of 512 is 8 times that of 256; half a gigabyte is 2^26 numbers
    sides = {256: 1000, 512: 125, 2000: 100}
    assert {side: affordable(1000, torch.empty(5000, side)) for side in sides} == sides
    assert affordable(1000, torch.empty(64, 768)) == 1000 and affordable(50, torch.empty(5000, 768)) == 50
    assert chunk_of(torch.empty(5000, 768)) == 7 and chunk_of(torch.empty(256, 128)) == 64
    assert chunk_of(torch.empty(10_000, 4096)) == 1


def test_fewer_halves_are_the_first_of_all():
    features = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    every, few = (halves(vendi_of(features), 16, seed=3, draws=draws, chunk=7) for draws in (500, 20))
    assert torch.equal(every[:21], few)
    # a run that began with more of them goes on
    assert kept_interval(every, few, 16) == kept_interval(few, few, 16) == pytest.approx((1, 1, 1))


def test_a_diversity_interval_is_centred_because_repeats_score_low():
    # 12 orthogonal images score 12, and no resample of them with a repeat can: plain percentiles miss the value
    features = torch.eye(12)
    plain = bootstrap_interval(lambda i: vendi_score(features[i]), 12, seed=0)
    assert plain.value == pytest.approx(12) and plain.high < 11
    centred = vendi_interval(features, seed=0)
    assert centred.low < centred.value < centred.high
    assert centred.high - centred.low == pytest.approx(plain.high - plain.low, rel=1e-9)


def test_centring_by_hand():
    # the statistic of all samples is 10; of resamples 0, 1, 2, 3, 4: mean 2, quartiles 1 and 3
    assert _interval(10.0, torch.arange(5.0).double(), 0.5, centred=True) == (10.0, 9.0, 11.0)


def test_a_constant_change_is_certain_when_paired():
    before = 100 * random_features(30, 1)[:, 0].double()
    assert paired_difference_interval(before, before + 0.5, seed=0) == pytest.approx((0.5, 0.5, 0.5), abs=1e-12)


def test_a_paired_change_is_the_mean_of_the_differences():
    # differences 1 and 3: resampled means 1, 2, 3
    before, after = torch.tensor([5.0, 7.0]), torch.tensor([6.0, 10.0])
    assert paired_difference_interval(before, after, level=0.9, seed=0) == (2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval(torch.ones(1), seed=0), "count is 1; an interval needs at least 2 samples"),
        (lambda: mean_interval(torch.ones(4), resamples=0, seed=0), "resamples is 0"),
        (lambda: mean_interval(torch.ones(4), level=1.0, seed=0), "level is 1.0"),
        (lambda: mean_interval(torch.ones(2, 2), seed=0), r"shape \[2, 2\]; pass finite values \[N\]"),
        (lambda: mean_interval(torch.tensor([1.0, math.nan]), seed=0), "pass finite values"),
        (lambda: paired_difference_interval(torch.ones(3), torch.ones(4), seed=0), r"\[3\] and \[4\]; pass the same"),
        (lambda: vendi_interval(torch.ones(1, 3), seed=0), "at least 2 samples"),
    ],
)
def test_intervals_refuse_what_they_cannot_measure(call, message):
    with pytest.raises(ValueError, match=message):
        call()
