"""`hrf evaluate` of a checkpoint, of a run that has not finished too, and where it writes."""

import gc
import json
import shutil
import weakref

import pytest
from safetensors.torch import load_file, save_file

from hrf_fast.cli import main
from hrf_fast.commands import runs
from hrf_fast.run.files import sha256
from tests.conftest import tiny_words


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *tiny_words(tiny_model, run), "optimizer.learning_rate=1e-2"]) == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def evaluated(path, *words):
    assert main(["evaluate", str(path), *words]) == 0


def read(path):
    return json.loads(path.read_text())


def test_the_last_checkpoint_is_evaluated_as_the_tuned_model(run, capsys):
    evaluated(run)
    evaluated(run / "checkpoints" / "iteration-000002")
    assert f"written to {run / 'evaluation-000002.json'}" in capsys.readouterr().out
    last = read(run / "evaluation-000002.json")
    assert last.pop("checkpoint") == "iteration-000002" and last == read(run / "evaluation.json")
    assert last["tuned"]["rewards"] != last["pretrained"]["rewards"]


def test_a_checkpoint_of_an_unfinished_run_is_evaluated_by_its_own_weights(run, monkeypatch):
    shutil.rmtree(run / "model")
    evaluated(run / "checkpoints" / "iteration-000002")
    # from inside the checkpoint too
    monkeypatch.chdir(run / "checkpoints" / "iteration-000001")
    evaluated(".")
    first, last = (read(run / f"evaluation-00000{number}.json") for number in (1, 2))
    assert first["pretrained"] == last["pretrained"] and first["tuned"]["rewards"] != last["tuned"]["rewards"]
    assert not (run / "evaluation.json").exists()


def test_averaged_weights_of_a_checkpoint_are_evaluated_where_there_are_any(run):
    one, two = (run / "checkpoints" / f"iteration-00000{number}" for number in (1, 2))
    # the averages of the second checkpoint are the weights of the first
    save_file(load_file(one / "weights.safetensors"), two / "ema.safetensors")
    manifest = read(two / "manifest.json") | {"ema.safetensors": sha256(two / "ema.safetensors")}
    (two / "manifest.json").write_text(json.dumps(manifest))
    for checkpoint in (one, two):
        evaluated(checkpoint)
    assert read(run / "evaluation-000001.json")["tuned"] == read(run / "evaluation-000002.json")["tuned"]


def test_a_second_evaluation_with_another_reward_overwrites_nothing(run, tmp_path, capsys):
    evaluated(run)
    before, out = (run / "evaluation.json").read_bytes(), tmp_path / "new" / "other.json"
    evaluated(run, "reward.name=jpeg_incompressibility", "--out", str(out))
    assert f"written to {out}" in capsys.readouterr().out and (run / "evaluation.json").read_bytes() == before
    assert read(out)["reward"]["name"] == "jpeg_incompressibility"
    assert main(["evaluate", str(run), "--out", str(tmp_path)]) == 1
    assert f"--out is {tmp_path}, which is a folder; name a JSON file" in capsys.readouterr().err


def test_no_two_models_are_in_memory_at_once(run, monkeypatch):
    build, loaded = runs.build_policy, []

    def build_alone(*arguments):
        gc.collect()
        assert not any(network() for network in loaded)
        policy = build(*arguments)
        loaded.append(weakref.ref(policy.network))
        return policy

    monkeypatch.setattr(runs, "build_policy", build_alone)
    for path in (run, run / "checkpoints" / "iteration-000001"):
        evaluated(path)
    assert len(loaded) == 4


def test_what_is_neither_a_run_nor_a_checkpoint_is_not_evaluated(run, capsys):
    assert main(["evaluate", str(run / "checkpoints")]) == 1
    assert "holds the checkpoints of a run; name one of them, such as " in capsys.readouterr().err
    (run / "checkpoints" / "iteration-000001" / "weights.safetensors").write_bytes(b"torn")
    assert main(["evaluate", str(run / "checkpoints" / "iteration-000001")]) == 1
    assert "iteration-000001 is broken: weights.safetensors is not what was written" in capsys.readouterr().err
    assert not (run / "evaluation-000001.json").exists()
