"""The signal's arithmetic by hand, and the smallest measurement."""

import json

import pytest
import torch

from benchmarks.bench_signal import main, ratios


def test_ratios_by_hand():
    # two groups, two steps, two weights: step 0 has gradients (3, 0) and (1, 0), step 1 (0, 4) and (0, -4)
    by_group = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, -4.0]]], dtype=torch.float64)
    mean, squares = by_group.mean(0), by_group.square().sum(-1).mean(0)
    result = ratios(mean, squares, 2, torch.tensor([3.0, 1.0], dtype=torch.float64))
    # traces: 1 and 16, times n/(n − 1) = 2
    assert result["noise_by_step"] == [2.0, 32.0]
    # |(2, 0)|² less half the noise
    assert result["equal"] == pytest.approx((4 - 34 / 2) / 34)
    assert result["without_last"] == pytest.approx((4 - 2 / 2) / 2)
    # weights 1.5 and 0.5
    noise = 2.25 * 2 + 0.25 * 32
    assert result["std"] == pytest.approx((9 - noise / 2) / noise)


def test_the_smallest_measurement(tiny_model, tmp_path, capsys):
    words = [
        f"model.name={tiny_model}",
        "sample.num_inference_steps=4",
        "train.group_size=2",
        "evaluation.panel_size=2",
    ]
    main(["--starts", "ddpo", "1", "--groups", "2", "--out", str(tmp_path), *words])
    results = json.loads((tmp_path / "signal.json").read_text())["results"]
    assert [(result["start"], len(result["std_by_step"])) for result in results] == [("ddpo", 3), (1, 2)]
    assert "| ddpo |" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--groups", "1"], ["--starts", "9"]])
def test_what_cannot_be_measured_is_refused(tiny_model, tmp_path, words):
    with pytest.raises(ValueError, match=words[0]):
        main([*words, "--out", str(tmp_path), f"model.name={tiny_model}", "sample.num_inference_steps=4"])
