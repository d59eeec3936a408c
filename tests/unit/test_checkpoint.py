"""Checkpoints: complete or absent, verified, and never executed."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hrf_fast.run.checkpoint import (
    AVERAGES,
    OPTIMIZER,
    WEIGHTS,
    list_checkpoints,
    load_first_intact,
    load_newest,
    save_checkpoint,
    sweep,
)
from hrf_fast.run.files import replace_folder, sha256, write_atomically
from tests.conftest import make_engine, make_policy

# of an AdamW, for each weight
STATE = ("exp_avg", "exp_avg_sq", "step")


def make_stepped(policy, **options):
    """An engine that has made one optimizer step."""
    engine = make_engine(policy, **options)
    engine.set_learning_rate(1e-3)
    with engine.accumulating():
        engine.backward(sum(parameter.sum() for parameter in policy.unet.parameters()))
    engine.step()
    return engine


@pytest.fixture
def saved(tmp_path):
    engine = make_stepped(make_policy())
    save_checkpoint(tmp_path, engine, {"iteration": 1, "calls": {"batches": 3}}, keep=2)
    return tmp_path, engine


def fail(text):
    raise AssertionError(f"unexpected warning: {text}")


def test_weights_optimizer_and_state_come_back_bit_for_bit(saved):
    folder, engine = saved
    fresh = make_engine(make_policy(seed=1))
    state = load_newest(folder, fresh, warn=fail)
    assert state == {"iteration": 1, "calls": {"batches": 3}}
    for old, new in zip(engine.parameters, fresh.parameters, strict=True):
        assert torch.equal(old, new)
    before, after = engine.optimizer.state_dict(), fresh.optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, entry in before["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, after["state"][index][key]), (index, key)


def test_the_checkpoint_holds_the_trained_tensors_under_the_names_of_the_network(tmp_path):
    policy = make_policy()
    policy.unet.conv_in.requires_grad_(False)
    path = save_checkpoint(tmp_path, make_engine(policy), {"iteration": 1}, keep=1)
    weights = load_file(path / WEIGHTS)
    expected = {name: parameter for name, parameter in policy.network.named_parameters() if parameter.requires_grad}
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    assert "unet.conv_out.weight" in weights and "unet.conv_in.weight" not in weights
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
        "weights.safetensors",
    ]


def test_the_best_is_kept_beside_the_newest_whatever_its_age(saved):
    folder, engine = saved
    for iteration in (2, 3, 4):
        save_checkpoint(folder, engine, {"iteration": iteration}, keep=1, best=2)
    assert [path.name for path in list_checkpoints(folder)] == ["iteration-000004", "iteration-000002"]


def test_only_the_newest_are_kept(saved):
    folder, engine = saved
    for iteration in (2, 3):
        save_checkpoint(folder, engine, {"iteration": iteration}, keep=2)
    assert [path.name for path in list_checkpoints(folder)] == ["iteration-000003", "iteration-000002"]


def test_a_broken_checkpoint_is_named_and_the_one_before_is_taken(saved):
    folder, engine = saved
    path = save_checkpoint(folder, engine, {"iteration": 2}, keep=2)
    data = bytearray((path / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "optimizer.safetensors").write_bytes(data)
    warnings = []
    state = load_newest(folder, engine, warn=warnings.append)
    assert state["iteration"] == 1
    assert len(warnings) == 1 and "iteration-000002" in warnings[0] and "optimizer.safetensors" in warnings[0]


@pytest.mark.parametrize("damage", ["no manifest", "file missing", "manifest is no mapping", "empty manifest"])
def test_when_every_checkpoint_is_broken_the_run_is_refused_not_restarted(saved, damage):
    folder, engine = saved
    path = folder / "iteration-000001"
    if damage == "no manifest":
        (path / "manifest.json").unlink()
    elif damage == "file missing":
        (path / "state.json").unlink()
    else:
        (path / "manifest.json").write_text("[]" if damage == "manifest is no mapping" else "{}")
    with pytest.raises(ValueError, match="no checkpoint in .* is intact"):
        load_newest(folder, engine, warn=lambda text: None)
    # of the best ones that says nothing about the newest
    assert load_first_intact(folder, [1, 0], engine, warn=lambda text: None) is None


def test_a_pickle_in_place_of_weights_is_refused_and_not_run(saved, tmp_path):
    folder, engine = saved
    path = folder / "iteration-000001" / WEIGHTS
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="no checkpoint"):
        load_newest(folder, engine, warn=lambda text: None)
    # even with a manifest that vouches for it
    manifest_path = folder / "iteration-000001" / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest[WEIGHTS] = sha256(path)
    manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{path} can't be read .*; delete its checkpoint"):
        load_newest(folder, engine, warn=fail)
    assert not marker.exists()


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert load_newest(tmp_path / "none", make_engine(make_policy()), warn=fail) is None


def test_a_failure_while_writing_leaves_the_old_folder_and_no_litter(tmp_path):
    target = tmp_path / "folder"
    replace_folder(target, lambda path: (path / "a").write_text("old"))

    def fail_half_way(path):
        (path / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_folder(target, fail_half_way)
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    replace_folder(target, lambda path: (path / "a").write_text("new"))
    assert (target / "a").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_leftover_of_a_killed_save_is_ignored_and_overwritten(saved):
    folder, engine = saved
    shutil.copytree(folder / "iteration-000001", folder / ".iteration-000002.tmp")
    assert [path.name for path in list_checkpoints(folder)] == ["iteration-000001"]
    save_checkpoint(folder, engine, {"iteration": 2}, keep=2)
    assert [path.name for path in list_checkpoints(folder)] == ["iteration-000002", "iteration-000001"]


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, b"1")
    write_atomically(path, b"22")
    assert path.read_bytes() == b"22" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_saved_optimizer_is_plain_safetensors(saved):
    folder, _ = saved
    tensors = load_file(folder / "iteration-000001" / "optimizer.safetensors")
    assert "0.exp_avg" in tensors and "0.step" in tensors


def test_pruning_counts_neither_broken_newer_checkpoints_nor_strangers(saved):
    folder, engine = saved
    broken = save_checkpoint(folder, engine, {"iteration": 3}, keep=2)
    (broken / "state.json").unlink()
    (folder / "iteration-zzz").write_text("a stray file")
    # resumed from 1, the run saves 2 with room for one
    save_checkpoint(folder, engine, {"iteration": 2}, keep=1)
    assert [path.name for path in list_checkpoints(folder)] == ["iteration-000003", "iteration-000002"]
    assert load_newest(folder, engine, warn=lambda text: None)["iteration"] == 2


def test_what_a_killed_save_left_is_swept(saved):
    folder, _ = saved
    for name in (".iteration-000002.tmp", ".iteration-000001.old"):
        (folder / name).mkdir(parents=True)
    sweep(folder)
    assert [path.name for path in folder.iterdir()] == ["iteration-000001"]


def test_a_full_disk_is_an_oserror_that_names_the_folder(saved, monkeypatch):
    folder, engine = saved

    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("hrf_fast.run.checkpoint.save_file", full)
    with pytest.raises(OSError, match="iteration-000002.*No space left"):
        save_checkpoint(folder, engine, {"iteration": 2}, keep=2)
    assert load_newest(folder, engine, warn=fail)["iteration"] == 1


def rewrite(folder, name, change):
    """Change the tensors in a file of the checkpoint, and the manifest so that it vouches for them."""
    path = folder / "iteration-000001"
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {name: sha256(path / name)}))


def replaced(name, value):
    return lambda tensors: tensors.update({name: value})


NAN = torch.full((3,), float("nan"))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (WEIGHTS, lambda tensors: tensors.pop("unet.conv_out.bias"), r"missing tensors \(unet.conv_out.bias\)"),
        (WEIGHTS, replaced("unet.other", NAN), r"unexpected tensors \(unet.other\)"),
        (WEIGHTS, replaced("unet.conv_out.bias", NAN), r"NaN or infinity in tensors \(unet.conv_out.bias\)"),
        (AVERAGES, lambda tensors: tensors.pop("unet.conv_out.bias"), r"missing tensors \(unet.conv_out.bias\)"),
        (AVERAGES, replaced("unet.conv_out.bias", torch.ones(1)), r"\(unet.conv_out.bias is \[1\] instead of \[3\]\)"),
        (AVERAGES, replaced("unet.conv_out.bias", NAN), r"NaN or infinity in tensors \(unet.conv_out.bias\)"),
        (OPTIMIZER, lambda tensors: [tensors.pop(f"0.{key}") for key in STATE], r"\(0.exp_avg, 0.exp_avg_sq, 0.step\)"),
        (OPTIMIZER, lambda tensors: tensors.pop("1.exp_avg"), r"missing tensors \(1.exp_avg\)"),
        (OPTIMIZER, replaced("999.step", torch.ones(())), r"unexpected tensors \(999.step\)"),
        (OPTIMIZER, replaced("1.exp_avg", torch.ones(1)), r"\(1.exp_avg is \[1\] instead of \[8\]\)"),
        (OPTIMIZER, replaced("1.step", NAN[0]), r"NaN or infinity in tensors \(1.step\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name_whatever_the_manifest_says(tmp_path, file, change, message):
    engine = make_stepped(make_policy(), ema_decay=0.5)
    save_checkpoint(tmp_path, engine, {"iteration": 1}, keep=2)
    load_newest(tmp_path, engine, warn=fail)
    rewrite(tmp_path, file, change)
    with pytest.raises(ValueError, match=rf"iteration-000001/{file} can't be used .*{message}.*checkpoint before"):
        load_newest(tmp_path, engine, warn=fail)


def test_a_run_that_averages_does_not_begin_its_average_again_without_a_word(tmp_path):
    engine = make_stepped(make_policy())
    save_checkpoint(tmp_path, engine, {"iteration": 1}, keep=2)
    with pytest.raises(ValueError, match="iteration-000001 has no ema.safetensors, but optimizer.ema_decay is above 0"):
        load_newest(tmp_path, make_stepped(make_policy(), ema_decay=0.5), warn=fail)


def test_a_checkpoint_before_the_first_optimizer_step_is_read(tmp_path):
    engine = make_engine(make_policy())
    save_checkpoint(tmp_path, engine, {"iteration": 1}, keep=2)
    assert load_newest(tmp_path, engine, warn=fail) == {"iteration": 1}


def test_weights_of_another_architecture_are_refused(saved):
    folder, _ = saved
    other = make_policy()
    other.unet.conv_in = torch.nn.Conv2d(3, 9, 3)
    with pytest.raises(ValueError, match=r"unet\.conv_in\.weight is \[8, 3, 3, 3\] instead of \[9, 3, 3, 3\]"):
        load_newest(folder, make_engine(other), warn=fail)
