"""Looks: shares of attributes and effective numbers of their values, by hand."""

import math

import pytest
import torch

from hrf_fast.evaluation.looks import attribute_shares, looks_interval


def sure(*classes, of):
    """log p [N, of] that is sure of each image's class."""
    return torch.full((len(classes), of), -20.0).scatter_(1, torch.tensor(classes)[:, None], 0.0)


LOG_PROBS = {"hat": sure(0, 1, 0, 1, of=2), "shirt": sure(2, 2, 2, 0, of=3)}


def test_shares_are_of_the_most_probable_value():
    labels = {"hat": ["none", "cap"], "shirt": ["red", "green", "blue"]}
    assert attribute_shares(LOG_PROBS, labels) == {
        "hat": {"none": 0.5, "cap": 0.5},
        "shirt": {"red": 0.25, "green": 0.0, "blue": 0.75},
    }


def test_the_effective_number_is_exp_of_the_entropy():
    # two equally common values are two; shares of 1/4 and 3/4 have entropy ln 4 - 3/4 ln 3
    found = {name: looks_interval({name: values}, seed=0).value for name, values in LOG_PROBS.items()}
    assert found["hat"] == pytest.approx(2)
    assert found["shirt"] == pytest.approx(math.exp(math.log(4) - 0.75 * math.log(3)))


def test_looks_are_the_geometric_mean_over_attributes():
    interval = looks_interval(LOG_PROBS, seed=0)
    assert interval.value == pytest.approx(math.sqrt(2 * math.exp(math.log(4) - 0.75 * math.log(3))))
    assert interval.low < interval.value < interval.high


def test_images_that_are_all_alike_have_one_look():
    assert looks_interval({"hat": sure(1, 1, 1, of=2)}, seed=0) == pytest.approx((1, 1, 1))
