"""Paths: ~ wherever a path can be given, absolute ones in a run's folder, and a resume from another current folder."""

import json
import shutil
from pathlib import Path

import pytest

from hrf_fast.cli import build_parser, main
from hrf_fast.config.load import load_config
from hrf_fast.config.paths import absolute, with_absolute_paths
from hrf_fast.run.session import Run
from tests.runs import train, with_folder
from tests.unit.test_run import log

pytestmark = pytest.mark.long


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_local_folders_and_files_become_absolute_and_other_names_stay(home, tmp_path):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (home / "network").mkdir()
    (home / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    words = ["model.name=models/mine", "evaluation.network=~/network", "engine.deepspeed=~/zero.json"]
    words += [
        "model.decoder=models/mine",
        "run.folder=runs/x",
        "reward.kwargs.path=~/weights.pt",
        "window.kwargs.files=[~/a, b]",
    ]
    config = with_absolute_paths(load_config(words))
    assert config.model.name == config.model.decoder == str(tmp_path / "models" / "mine")
    assert config.evaluation.network == str(home / "network")
    assert config.engine.deepspeed == str(home / "zero.json")
    assert config.reward.kwargs == {"path": str(home / "weights.pt")}
    assert config.window.kwargs == {"files": [str(home / "a"), "b"]}
    # the folder may be moved
    assert config.run.folder == "runs/x"
    assert with_absolute_paths(config) == config
    for name in ("fashion", "google/ddpm-celebahq-256", "./nowhere"):
        assert with_absolute_paths(load_config([f"model.name={name}"])).model.name == name
    (tmp_path / "fashion").mkdir()
    assert with_absolute_paths(load_config(["model.name=fashion"])).model.name == "fashion"


def test_a_home_that_nobody_has_stays_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("~nobody-has-it/x") == tmp_path / "~nobody-has-it" / "x"


def test_configs_and_their_bases_may_be_in_the_home_folder(home):
    (home / "base.yaml").write_text("train: {group_size: 7}\n")
    (home / "top.yaml").write_text("base: ~/base.yaml\ntrain: {iterations: 3}\n")
    config = load_config(["--config=~/top.yaml"])
    assert (config.train.group_size, config.train.iterations) == (7, 3)


def test_paths_of_commands_may_be_in_the_home_folder(home, capsys):
    for words, name in (
        (["sample", "fashion", "--out=~/x.png"], "out"),
        (["sample", "fashion", "--folder=~/x"], "folder"),
        (["report", "~/x", "--out=~/x"], "out"),
        (["report", "~/x", "--strip=~/x"], "strip"),
        (["export", "~/x", "--out=~/x"], "model"),
        (["evaluate", "~/x"], "model"),
        (["evaluate", "~/x", "--out=~/x.json"], "out"),
    ):
        value = getattr(build_parser().parse_args(words), name)
        assert value.parent == home
    # a model's name may be no path, and is expanded where it is looked for
    assert main(["sample", "~/nowhere", "--out", str(home / "x.png")]) == 1
    assert "model.name is '~/nowhere'" in capsys.readouterr().err


def test_a_run_folder_in_the_home_folder(home):
    with Run(load_config(["run.folder=~/runs/mine", "run.progress=quiet"])) as run:
        run.begin(0)
    assert (home / "runs" / "mine" / "config.yaml").is_file() and not Path("~").exists()


def test_a_resume_from_another_folder_finds_the_same_model_or_none(tiny_model, tiny_run, home, tmp_path, monkeypatch):
    words = with_folder(tiny_run, tmp_path / "run", "evaluation.every=0", "run.save_every=1", "model.name=mine")
    shutil.copytree(tiny_model, tmp_path / "mine")
    train([*words, "train.iterations=1"])
    assert load_config(["--config", "run/config.yaml"]).model.name == str(tmp_path / "mine")
    # a model of that name there is another one
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match="model.name is 'mine'"):
        train(words)
    shutil.copytree(tiny_model, home / "mine")
    with pytest.raises(ValueError, match=f"model.name was '{tmp_path / 'mine'}' and is '{home / 'mine'}'"):
        train(words)
    # a run that is moved goes on, and its commands find the model from anywhere
    shutil.move(tmp_path / "run", home / "moved")
    train(with_folder(words, "moved", f"model.name={tmp_path / 'mine'}"))
    assert main(["sample", "moved", "--out", "x.png", "--count", "2"]) == 0


def test_a_folder_of_an_earlier_version_with_a_relative_model_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    config = load_config(["model.name=mine", "run.folder=run", "run.progress=quiet"])
    with Run(config) as run:
        run.begin(0)
        log(run, 0)
    assert "name: mine" in Path("run/config.yaml").read_text()
    with Run(with_absolute_paths(config)):
        pass
    assert json.loads(Path("run/metrics.jsonl").read_text())["iteration"] == 0
