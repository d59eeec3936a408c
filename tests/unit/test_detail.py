"""Metrics of `hrf evaluate`: closed forms, hand arithmetic, and what they cost."""

import math
import time
import warnings

import pytest
import torch

from hrf_fast.evaluation import neighbours
from hrf_fast.evaluation.detail import detail, half_intervals, share_interval
from hrf_fast.evaluation.diversity import Interval, vendi_interval
from hrf_fast.evaluation.fidelity import fid, kid
from hrf_fast.evaluation.kept import panel_halves
from hrf_fast.evaluation.neighbours import (
    Overlap,
    distances,
    duplicates,
    duplicates_of,
    inside,
    nearly_equal,
    overlap_of,
    radius,
    spread,
    spread_of,
)
from hrf_fast.evaluation.vendi import median_distance, vendi_of, vendi_score

ORDERS = (0.5, 1.0, 2.0, 3.0, math.inf)
KERNELS = ({}, {"kernel": "rbf", "bandwidth": 0.05})


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_share_of_all_or_none_has_an_interval_too():
    # Wilson's of 40 of 40 and of 0 of 40: 40/(40 + 1.96²) and 1.96²/(40 + 1.96²)
    assert share_interval(Interval(1.0, 1.0, 1.0), 40) == pytest.approx((1.0, 0.91238, 1.0), abs=1e-5)
    assert share_interval(Interval(0.0, 0.0, 0.0), 40) == pytest.approx((0.0, 0.0, 0.08762), abs=1e-5)
    assert share_interval(Interval(0.95, 0.9, 1.02), 40) == (0.95, 0.9, 1.0)
    samples = normal(30, 4)
    measured = detail(samples, torch.rand(30, 3, 4, 4), samples + 1e-9, seed=0, fidelity=False)
    assert measured["precision"] == measured["recall"] == [1.0, pytest.approx(30 / 33.841459), 1.0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", KERNELS, ids=["cosine", "rbf"])
def test_vendi_closed_forms(kernel, order):
    # equal images, n different ones and k equal clusters; of unit vectors the RBF kernel is exp(−400) apart
    eye = torch.eye(30)
    for features, expected in ((eye[:1].repeat(50, 1), 1), (eye, 30), (eye[torch.arange(60) % 6], 6)):
        assert vendi_score(features, order=order, **kernel) == pytest.approx(expected, rel=1e-6)


def test_vendi_of_unequal_clusters_by_its_order():
    # shares 3/4 and 1/4: Σ λ² = 10/16, the largest 3/4, Σ sqrt λ = (√3 + 1)/2
    features = torch.eye(2)[[0, 0, 0, 1]]
    expected = {2.0: 1.6, math.inf: 4 / 3, 0.5: ((math.sqrt(3) + 1) / 2) ** 2, 1.0: 4 / 3**0.75}
    assert {q: vendi_score(features, order=q) for q in expected} == pytest.approx(expected, rel=1e-9)


def test_the_rbf_kernel_by_hand():
    # at distance b·√2 the kernel is 1/e: K/2 has eigenvalues (1 ± 1/e)/2
    shares = torch.tensor([(1 + 1 / math.e) / 2, (1 - 1 / math.e) / 2])
    expected = float(torch.special.entr(shares).sum().exp())
    found = vendi_score(torch.tensor([[0.0], [3 * math.sqrt(2)]]), kernel="rbf", bandwidth=3.0)
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_order_1_is_the_panels():
    features = normal(40, 9)
    assert vendi_score(features) == float(vendi_of(features)(None)) == vendi_interval(features, seed=0).value


@pytest.mark.slow
# seconds of one core, for features of the shipped networks and of CLIP's larger ones
@pytest.mark.parametrize(("width", "most"), [(128, 30), (768, 90)])
def test_vendi_of_5000_images_takes_seconds(width, most):
    features, began = normal(5000, width), time.process_time()
    # what a panel measures, on one core
    vendi_interval(features, seed=0)
    panel_halves(features, {}, None, seed=0)
    assert time.process_time() - began < most
    began = time.process_time()
    vendi_score(features)
    vendi_score(features, kernel="rbf", bandwidth=median_distance(features), order=2)
    vendi_score(features, kernel="rbf", bandwidth=median_distance(features))
    assert time.process_time() - began < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "poly"}, "kernel is 'poly'"),
        ({"order": 0}, "order is 0"),
        ({"kernel": "rbf"}, "bandwidth is None"),
        ({"bandwidth": 1.0}, "bandwidth is 1.0 with kernel 'cosine'"),
    ],
)
def test_vendi_refuses_what_it_can_not_measure(options, message):
    with pytest.raises(ValueError, match=message):
        vendi_score(torch.eye(3), **options)


def test_distances_by_hand():
    # 0, 3 and 7 on a line: pairs 3, 4 and 7; nearest 3, 3 and 4
    assert spread(torch.tensor([[0.0], [3.0], [7.0]])) == pytest.approx((14 / 3, 10 / 3))
    assert median_distance(torch.tensor([[0.0], [3.0], [7.0]])) == 4


def test_duplicates_are_the_images_that_add_nothing():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    repeated = images[[0, 1, 0, 2, 0]]
    # one level of 255 off is no other image
    repeated[2] = (repeated[2] + 1 / 255).clamp(max=1)
    assert duplicates(repeated) == pytest.approx(0.4) and duplicates(images) == 0


def overlap(reference, samples):
    return overlap_of(
        radius(distances(reference, reference)), distances(samples, samples), distances(reference, samples)
    )


def test_precision_recall_density_and_coverage_by_hand(monkeypatch):
    # radii of the reference 0, 1, 2 and 10 to their nearest: 1, 1, 1 and 8; samples 0.5, 2.5 and 30: 2, 2 and 27.5.
    # 0.5 is in the balls of 0 and 1 (and 10's reaches to 2 only), 2.5 in those of 2 and 10, 30 in none: precision 2/3,
    # density 4/(1·3). 0, 1 and 2 are within 2 of a sample and 10 within 27.5 of 30: recall 1. Every ball but none is
    # empty: coverage 1
    reference, samples = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.tensor([[0.5], [2.5], [30.0]])
    monkeypatch.setattr(neighbours, "NEAREST", 1)
    assert overlap(reference, samples) == pytest.approx((2 / 3, 1.0, 4 / 3, 1.0))
    assert inside(reference, samples).tolist() == [1, 1, 0]
    # 0 is within 1 of 1 beside itself, and 10 is near nothing but itself
    assert inside(reference, reference, same_noise=True).tolist() == [1, 1, 1, 0]


def test_samples_of_one_mode_are_precise_and_cover_half():
    # modes at 0 and 100, samples of the first only
    reference = torch.cat([normal(60, 2), normal(60, 2, seed=1) + 100])
    found = overlap(reference, normal(60, 2, seed=2))
    assert found.precision > 0.8 and found.recall == pytest.approx(0.5, abs=0.1)
    assert found.density == pytest.approx(1, abs=0.3) and 0.4 < found.coverage <= 0.5


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="at least 6 images"):
        inside(torch.zeros(5, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match="evaluation.panel_size is 11.*at least 12"):
        half_intervals(lambda index: [0.0], 11, seed=0)
    with pytest.raises(ValueError, match="1 samples"):
        fid(torch.zeros(5, 2), torch.zeros(1, 2))


def test_fid_of_shifted_features_is_the_squared_shift():
    # equal covariances, means that differ by (3, 4): 9 + 16
    features = normal(400, 2)
    assert fid(features, features + torch.tensor([3.0, 4.0])) == pytest.approx(25, rel=1e-4)


def test_kid_tells_equal_laws_from_others_and_leaves_the_generators_alone():
    state = torch.random.get_rng_state()
    same, other = kid(normal(200, 4), normal(200, 4, seed=1), seed=0), kid(normal(200, 4), normal(200, 4) + 1, seed=0)
    assert abs(same) < 0.2 < other
    assert torch.equal(state, torch.random.get_rng_state())


def test_kid_and_fid_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(kid(normal(20, 4), normal(20, 4), seed=0) + fid(normal(20, 4), normal(20, 4)))


def test_half_intervals_of_a_mean_are_as_wide_as_its_standard_error_says():
    # the standard error of a mean of 100 is 0.1: 1.96 of it to each side
    values = normal(100)
    values = (values - values.mean()) / values.std()
    (found,) = half_intervals(lambda index: [float(values[index].mean())], 100, seed=0)
    assert found.value == pytest.approx(0, abs=1e-9)
    assert (found.high - found.low) / 2 == pytest.approx(0.196, rel=0.25)


def test_the_pretrained_models_images_are_the_reference_of_every_metric():
    samples, reference = normal(40, 6), normal(30, 6, seed=1)
    found = detail(samples, torch.rand(40, 3, 8, 8), reference, seed=0, fidelity=False)
    assert [found[name][0] for name in Overlap._fields] == pytest.approx(overlap(reference, samples))
    rbf = vendi_score(samples, kernel="rbf", bandwidth=median_distance(reference))
    assert found["vendi_rbf"][0] == pytest.approx(rbf)


def test_detail_has_every_metric_and_intervals_of_the_biased_ones():
    found = detail(normal(40, 6), torch.rand(40, 3, 8, 8), normal(40, 6, seed=1), seed=0)
    assert set(found) == {
        *("vendi_q0.5", "vendi_q2", "vendi_qinf", "vendi_rbf", "pairwise_distance", "nearest_distance", "duplicates"),
        *("precision", "recall", "density", "coverage", "fid", "kid"),
    }
    assert all(low <= value <= high for value, low, high in (v for v in found.values() if len(v) == 3))
    assert [name for name, values in found.items() if len(values) != 3] == ["fid", "kid"]
    # what halves of 40 say of how far images are apart: something, and less than a third
    for name in ("vendi_rbf", "pairwise_distance", "nearest_distance"):
        value, low, high = found[name]
        assert low < value < high and high - low < value / 3


def test_an_interval_holds_its_value_where_most_halves_say_the_same():
    # a pair of images counts where it begins a half, as it does in one of 100: deviations of both tails have one sign
    pair = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:2]
    for sign in (1, -1):
        (found,) = half_intervals(lambda i, sign=sign: [sign * float(torch.equal(i[:2], pair))], 40, seed=0)
        assert found.low <= found.value <= found.high
        assert found.value in (found.low, found.high)


def test_a_share_in_which_all_halves_agree_has_wilsons_interval():
    # 39 of 40: centre (0.975 + 0.04802)/1.09604, reach sqrt(3.84146·(0.975·0.025 + 0.024009)/40)/1.09604
    assert share_interval(Interval(0.975, 0.975, 0.975), 40) == pytest.approx((0.975, 0.87122, 0.99556), abs=1e-4)


def test_distances_and_duplicates_of_a_half_are_those_of_its_images():
    features, images = normal(9, 4), torch.rand(9, 3, 4, 4)[[0, 1, 0, 2, 3, 4, 5, 6, 2]]
    half = torch.tensor([8, 3, 0, 2])
    among, near = distances(features, features), nearly_equal(images)
    assert spread_of(among[half][:, half]) == pytest.approx(spread(features[half]))
    assert duplicates_of(near[half][:, half]) == duplicates(images[half]) == 0.5
