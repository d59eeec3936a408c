"""The signal's arithmetic by hand, and the smallest measurement."""

import json
import math

import pytest
import torch

from benchmarks.bench_signal import Mixture, curves, main, ratio, weightings


def test_a_ratio_by_hand():
    # gradients (3, 0) and (1, 2): mean (2, 1), squared norms 9 and 5
    noise = (14 / 2 - 5) * 2
    assert ratio(torch.tensor([4.0, 2.0]), 14.0, 2) == pytest.approx((5 - noise / 2) / noise)
    assert math.isnan(ratio(torch.tensor([4.0]), 8.0, 2))


def test_groups_weighed_by_their_spread_by_hand():
    mixture = Mixture()
    mixture.add(torch.tensor([1.0, 0.0]), spread=4.0)
    mixture.add(torch.tensor([0.0, 1.0]), spread=1.0)
    # (4, 0) and (0, 1): mean (2, 0.5), squared norms 16 and 1
    noise = (17 / 2 - 4.25) * 2
    assert mixture.ratios()["1.0"] == pytest.approx((4.25 - noise / 2) / noise)
    assert mixture.ratios()["0.0"] == pytest.approx(ratio(torch.tensor([1.0, 1.0]), 2.0, 2))


def test_weights_that_are_compared():
    kinds = weightings(torch.tensor([3.0, 1.0]), 4.0)
    assert {name: weights.tolist() for name, weights in kinds.items()} == {
        "equal": [1.0, 1.0],
        "without_last": [1.0, 0.0],
        "std": [0.75, 0.25],
    }


@pytest.mark.parametrize("more", [(), ("window.shared_noise=true", "train.gae_lambda=0")])
def test_the_smallest_measurement(tiny_model, tmp_path, capsys, more):
    words = [
        *more,
        f"model.name={tiny_model}",
        "sample.num_inference_steps=4",
        "train.group_size=2",
        "evaluation.panel_size=2",
    ]
    main(["--starts", "ddpo", "1", "--groups", "2", "--out", str(tmp_path), *words])
    beside = str(tmp_path / "signal.json")
    results = json.loads((tmp_path / "signal.json").read_text())["results"]
    assert [(result["start"], len(result["std_by_step"])) for result in results] == [("ddpo", 3), (1, 2)]
    assert "| ddpo |" in capsys.readouterr().out
    main(["--starts", "1", "--groups", "2", "--out", str(tmp_path / "next"), "--beside", beside, *words])
    assert (tmp_path / "next" / "signal.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_is_of_the_numbered_starts_in_their_order():
    results = [
        {"start": start, "equal": value, "std": 2 * value} for start, value in (("ddpo", 9.0), (5, 2.0), (1, 3.0))
    ]
    assert [(line.name, line.x, line.y) for line in curves([("mine", results)])] == [
        ("mine, equal", [1.0, 5.0], [3.0, 2.0]),
        ("mine, std", [1.0, 5.0], [6.0, 4.0]),
    ]


@pytest.mark.parametrize("words", [["--groups", "1"], ["--starts", "9"], ["--beside", __file__]])
def test_what_cannot_be_measured_is_refused(tiny_model, tmp_path, words):
    with pytest.raises(ValueError, match=words[0]):
        main([*words, "--out", str(tmp_path), f"model.name={tiny_model}", "sample.num_inference_steps=4"])
