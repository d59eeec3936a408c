"""The commands that do not train, through main()."""

import json

import pytest
from PIL import Image

from hrf_fast import cli
from hrf_fast.cli import main
from hrf_fast.train import main as train_main


def test_train_help_lists_every_option(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "train.clip_range=0.0001" in out and "--config FILE" in out


def test_rewards_are_listed_with_arguments_and_needs(capsys):
    assert main(["rewards"]) == 0
    out = capsys.readouterr().out
    for name in ("jpeg_compressibility", "jpeg_incompressibility", "aesthetic", "classifier", "module:function"):
        assert name in out
    assert "quality" in out and "transformers" in out


def test_sample_writes_a_grid_of_a_folder(tiny_model, tmp_path, capsys):
    out = tmp_path / "grids" / "g.png"
    assert main(["sample", str(tiny_model), "--out", str(out), "--count", "4", "--steps", "3"]) == 0
    # four images of 16 pixels, two by two, enlarged four times
    assert Image.open(out).size == (128, 128)
    assert "4 images" in capsys.readouterr().out


def test_sample_refuses_a_count_of_zero(tiny_model, capsys):
    assert main(["sample", str(tiny_model), "--count", "0"]) == 1
    assert "--count is 0" in capsys.readouterr().err


def test_a_run_is_trained_sampled_evaluated_and_reported(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *tiny_run]) == 0
    assert main(["sample", str(run), "--out", str(tmp_path / "s.png"), "--count", "2"]) == 0
    assert main(["evaluate", str(run), "evaluation.panel_size=8"]) == 0
    assert main(["report", str(run)]) == 0
    result = json.loads((run / "evaluation.json").read_text())
    assert len(result["tuned"]["rewards"]) == 8
    value, low, high = result["pretrained"]["reward"]
    assert low <= value <= high
    assert value == pytest.approx(sum(result["pretrained"]["rewards"]) / 8, abs=1e-6)
    # the training's panel is the first part of a larger one: the same images, the same rewards
    first = json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])
    assert result["pretrained"]["rewards"][:6] == pytest.approx(first["rewards"], abs=1e-3)
    assert "pretrained" in capsys.readouterr().out


def test_evaluate_wants_a_finished_run(tiny_run, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "has no config.yaml" in capsys.readouterr().err
    assert train_main(tiny_run) == 0
    import shutil

    shutil.rmtree(tmp_path / "run" / "model")
    assert main(["evaluate", str(tmp_path / "run")]) == 1
    assert "has no model/ yet" in capsys.readouterr().err


def test_an_error_is_one_line_and_the_traceback_is_there_on_request(capsys, monkeypatch):
    def fail():
        raise ValueError("x is 3; use 4")

    assert cli.run_command(fail) == 1
    assert capsys.readouterr().err == "error: x is 3; use 4\n"
    monkeypatch.setenv("HRF_TRACEBACK", "1")
    assert cli.run_command(fail) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_programming_error_keeps_its_traceback():
    def fail():
        raise AttributeError("a bug")

    with pytest.raises(AttributeError):
        cli.run_command(fail)


def test_ctrl_c_exits_with_130(capsys):
    def interrupt():
        raise KeyboardInterrupt

    assert cli.run_command(interrupt, cli.RESUMES) == 130
    assert "the same command resumes" in capsys.readouterr().err
