"""`hrf bench call`: a call's times and its operations, on the CPU."""

import json

import pytest

from benchmarks import bench_call


def test_a_call_is_timed_and_its_operations_are_listed_by_time(tmp_path, capsys):
    words = ["--model", "tiny", "--images", "2", "3", "--rounds", "2", "--top", "3", "--device", "cpu"]
    bench_call.main([*words, "--channels-last", "--precision", "bf16", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "call.json").read_text())
    assert [(found["images"], found["call"]) for found in result["calls"]] == [
        (images, kind) for images in (2, 3) for kind in ("forward", "forward and backward")
    ]
    for found in result["calls"]:
        seconds = [kernel["seconds"] for kernel in found["kernels"]]
        assert (
            len(seconds) == 3 and seconds == sorted(seconds, reverse=True) and sum(seconds) <= found["kernel_seconds"]
        )
        assert 0 < found["host_seconds"] <= found["wall_range"][1] and found["peak_bytes"] > 0
    # the operations of a backward come on top of a forward's
    assert result["calls"][1]["launches"] > 1.5 * result["calls"][0]["launches"]
    text = capsys.readouterr().out
    assert text == (tmp_path / "call.md").read_text()
    assert "tiny, bf16, channels_last\n" in text and "## forward and backward, 3 images" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "2", "0"], r"--images is \[2, 0\]; use 1 or more"),
        (["--rounds", "0"], "--rounds is 0"),
    ],
)
def test_bad_options_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        bench_call.main(words)
