"""The run folder: whose it is, what a resume may change, and logs that a crash leaves whole."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hrf_fast.config.load import load_config
from hrf_fast.errors import NotWritten
from hrf_fast.evaluation.grids import save_grid
from hrf_fast.run.files import append_line, read_log, replace_folder, write_atomically
from hrf_fast.run.folder import RunFolder
from hrf_fast.run.lock import lock_folder
from hrf_fast.run.session import Run
from hrf_fast.run.writers import TensorBoardWriter
from hrf_fast.train import train
from tests.unit.test_run import log, panel

# tensorboard fails in a thread, which tells its next call, and pytest during a later test
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def words(tmp_path):
    return [f"run.folder={tmp_path / 'run'}", "run.progress=quiet"]


@pytest.fixture
def config(words):
    return load_config(words)


def begin(config, iterations=1):
    with Run(config) as run:
        run.begin(0)
        for iteration in range(iterations):
            log(run, iteration)


# --- whose it is ------------------------------------------------------------------------------------------------------


def test_a_free_option_may_change_on_resume_and_the_length_only_under_a_constant_rate(words, tmp_path):
    begin(load_config(words))
    with Run(load_config([*words, "run.save_every=3", "run.progress=json", "train.iterations=99"])):
        pass
    cosine = [f"run.folder={tmp_path / 'cosine'}", "optimizer.learning_rate_schedule=cosine", "run.progress=quiet"]
    begin(load_config(cosine))
    with pytest.raises(ValueError, match="train.iterations was 70 and is 99"):
        Run(load_config([*cosine, "train.iterations=99"]))


def test_a_run_that_has_done_nothing_may_change_its_configuration(config, words, tmp_path):
    with Run(config) as run:
        run.begin(0)
        run.log_panel(0, 0, panel())
    # as stop.on_collapse=restore_best keeps the pretrained weights, which may be another model's
    (tmp_path / "run" / "checkpoints" / "iteration-000000").mkdir(parents=True)
    other = load_config([*words, "train.group_size=9"])
    begin(other, iterations=0)
    assert not (tmp_path / "run" / "checkpoints" / "iteration-000000").exists()
    # and the panel of the configuration that never trained is gone
    assert read_log(tmp_path / "run" / "evaluations.jsonl") == []
    assert load_config(["--config", str(tmp_path / "run" / "config.yaml")]) == other


def test_another_configuration_is_refused_with_its_options(config, words):
    begin(config)
    with pytest.raises(
        ValueError, match="train.group_size was 5 and is 9; run.seed was 0 and is 3.*docs/run_folder.md has"
    ):
        Run(load_config([*words, "train.group_size=9", "run.seed=3"]))


def test_the_command_of_the_docs_goes_on_from_a_runs_model_under_other_options(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    once = ["train.iterations=1", "evaluation.every=0", "train.groups_per_step=2", "window.kwargs.clusters=[[0, 6]]"]
    first = train(load_config([*tiny_run, *once, "run.progress=quiet", "evaluation.network=fashion"]))
    page = (Path(__file__).parents[2] / "docs" / "run_folder.md").read_text()
    (command,) = re.findall(r"`hrf train (--config RUN/config.yaml .*)`", page)
    config = load_config(command.replace("RUN", "run").split())
    assert config.optimizer.learning_rate == 1e-4 and config.run.folder == "runs/next"
    second = train(config)
    # it begins where the first has ended, and gains count from there
    assert second.panel["iteration"] == 1
    assert read_log(tmp_path / "runs" / "next" / "evaluations.jsonl")[0]["reward"] == first.panel["reward"]


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=f"run.folder {tmp_path / 'run'} is not empty"):
        Run(config)


def test_a_configuration_of_the_user_s_and_files_beside_it_are_no_run(config, tmp_path):
    (tmp_path / "run").mkdir()
    files = {"config.yaml": "# notes\nbase: fashion.yaml\n", "events.jsonl": "mine\n"}
    for name, text in files.items():
        (tmp_path / "run" / name).write_text(text)
    with pytest.raises(ValueError, match="is not empty and holds no run; choose another run.folder"):
        Run(config)
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == files


def test_a_run_that_did_nothing_goes_on_where_its_lock_file_is_gone(config, tmp_path):
    # as some file systems leave it
    begin(config, iterations=0)
    (tmp_path / "run" / ".lock").unlink()
    begin(config, iterations=1)


def test_a_key_that_was_changed_is_not_repeated(words):
    kwargs = ["reward.name=remote", "reward.kwargs.url=http://h", "reward.kwargs.api_key=hidden"]
    begin(load_config([*words, *kwargs]))
    with pytest.raises(ValueError, match="reward.kwargs was .*http://h") as caught:
        Run(load_config([*words, *kwargs, "reward.kwargs.api_key=hidden2"]))
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.yaml", ".lock-owner"])
def test_a_folder_in_which_a_run_was_killed_before_it_had_a_configuration_is_free(config, tmp_path, name, monkeypatch):
    # as a kill leaves it: nothing is renamed and nothing is removed
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: sys.exit())
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            write_atomically(tmp_path / "run" / name, b"half")
    assert len(list((tmp_path / "run").iterdir())) == 1
    with Run(config):
        pass
    # a file of the user's that is called so is not ours
    (tmp_path / "run" / "thesis.tmp").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        Run(config)


def test_fewer_iterations_than_are_done_are_refused(config):
    with Run(config) as run, pytest.raises(ValueError, match="train.iterations is 70.* 71"):
        run.begin(71)


def test_a_finished_run_without_checkpoints_is_not_trained_over(config, tmp_path):
    begin(config)
    (tmp_path / "run" / "model").mkdir()
    with Run(config) as run, pytest.raises(ValueError, match=f"run.folder {tmp_path / 'run'} .*no checkpoint"):
        run.begin(0)
    assert len(read_log(tmp_path / "run" / "metrics.jsonl")) == 1


def test_checkpoints_must_be_a_folder(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(ValueError, match="checkpoints is not a folder"):
        Run(config)


def test_a_folder_is_one_runs_at_a_time(config, tmp_path):
    with Run(config), pytest.raises(ValueError, match=f"{tmp_path / 'run'} is in use by process {os.getpid()} on "):
        Run(config)
    with Run(config):
        pass


def test_a_killed_process_leaves_a_folder_that_can_be_taken_again(tmp_path):
    code = "import sys, time, pathlib; from hrf_fast.run.lock import lock_folder; "
    code += "lock = lock_folder(pathlib.Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"run.folder {tmp_path} is in use by process {child.pid} on "):
            lock_folder(tmp_path)
        child.send_signal(signal.SIGKILL)
    lock = lock_folder(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
        lock_folder(tmp_path)
    lock.release()
    # releasing removes no file: another process may have it open
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock-owner"}


def test_a_lock_whose_owner_cannot_be_written_is_not_kept(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("hrf_fast.run.lock.write_atomically", full)
        lock_folder(tmp_path)
    lock_folder(tmp_path).release()


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """Let no file grow beyond 64 bytes: the system takes a part of a longer write, and refuses the next one."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_to_tensorboard(path):
    # torch's writer names its files itself
    pytest.importorskip("tensorboard")
    writer = TensorBoardWriter(RunFolder(load_config([f"run.folder={path.parent}"])))
    for iteration in range(20):
        writer.send(iteration, {"reward": 1.0}, None, panel=False)
    writer.finished("")


WRITES = {
    "metrics.jsonl": lambda path: append_line(path, "x" * 100),
    "config.yaml": lambda path: write_atomically(path, b"x" * 100),
    "samples/grid.png": lambda path: save_grid(torch.rand(4, 3, 16, 16), path),
    "checkpoint": lambda path: replace_folder(path, lambda folder: (folder / "state.json").write_text("x" * 100)),
    "tensors": lambda path: replace_folder(path, lambda f: save_file({"a": torch.zeros(99)}, f / "w.safetensors")),
    "tensorboard": write_to_tensorboard,
}


def test_a_folder_that_a_crash_has_left_aside_goes_with_the_next_write(tmp_path):
    # killed between two renames: the old one is aside, and there is no new one
    (tmp_path / ".model.old").mkdir()
    replace_folder(tmp_path / "model", lambda folder: (folder / "x").write_text("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (tmp_path / "model" / "x").read_text() == "new"


def test_a_link_in_the_place_of_a_model_gives_way_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_text("old")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    for text in ("new", "newer"):
        replace_folder(tmp_path / "model", lambda folder, text=text: (folder / "x").write_text(text))
        assert (tmp_path / "model" / "x").read_text() == text and not (tmp_path / "model").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "elsewhere"}
    # one that leads nowhere any more
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    replace_folder(tmp_path / "model", lambda folder: (folder / "x").write_text("last"))
    assert (tmp_path / "model" / "x").read_text() == "last"
    assert (tmp_path / "elsewhere" / "x").read_text() == "old"


@pytest.mark.parametrize("name", WRITES)
def test_what_can_not_be_written_is_named_with_the_way_out(tmp_path, small_files, name):
    with pytest.raises(
        NotWritten, match=rf"^{tmp_path / name} can't be written: .*; .*, then the same command goes on$"
    ):
        WRITES[name](tmp_path / name)
    assert name in ("metrics.jsonl", "tensorboard") or not (tmp_path / name).exists()


def test_a_full_disk_is_called_so_and_keeps_its_number(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(
        OSError, match=r"^/dev/full can't be written: No space left on device; free space, then"
    ) as caught:
        append_line(Path("/dev/full"), "x")
    assert caught.value.errno == errno.ENOSPC


def test_a_part_of_a_line_is_an_error_and_not_a_line(tmp_path, small_files):
    path = tmp_path / "metrics.jsonl"
    append_line(path, json.dumps({"iteration": 0}))
    with pytest.raises(NotWritten, match="No space left on device; free space"):
        append_line(path, json.dumps({"iteration": 1, "note": "x" * 100}))
    assert read_log(path) == [{"iteration": 0}]


def test_a_line_after_a_half_written_one_begins_on_its_own(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"iteration": 0}\n{"iterat')
    append_line(path, "1")
    append_line(path, "2")
    assert path.read_text().splitlines() == ['{"iteration": 0}', '{"iterat', "1", "2"]


# --- logs -------------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iteration": 1, "rew')
    assert read_log(path) == [{"iteration": 0}]


def test_iterations_that_the_log_has_lost_are_noted(config, tmp_path):
    begin(config)
    with Run(config) as run:
        for iteration in (0, 3):
            log(run, iteration)
    with Run(config) as run:
        assert run.folder.begin(1, {}) == []
        assert run.folder.begin(4, {}) == [
            f"{tmp_path / 'run' / 'metrics.jsonl'} lacks 3 of the 4 iterations that are done, first 1: the weights "
            "have them, but no report shows them"
        ]


@pytest.mark.parametrize("line", ["garbage", "{}", "[1]", '{"iteration": "x"}'])
def test_a_damaged_log_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 "):
        read_log(path)


@pytest.mark.parametrize(
    "text", ["", '{"reward x": ', "[]", '{"reward x": 3}', '{"reward x": {"sha256": "0"}}', "\xff"]
)
def test_a_damaged_record_of_sources_is_named(config, tmp_path, text):
    begin(config)
    path = tmp_path / "run" / "sources.json"
    path.write_text(text, encoding="latin-1")
    with Run(config) as run, pytest.raises(ValueError, match=f"{path} is damaged .*; restore it, or delete it"):
        run.begin(1, {"reward x": {"file": "x.py", "sha256": "0"}})


@pytest.mark.parametrize("size", [0, 5, 40, 100])
def test_a_truncated_file_of_the_pretrained_panel_is_named(config, tmp_path, size):
    with Run(config) as run:
        run.begin(0)
        run.folder.save_pretrained({"vendi": torch.ones(8)})
    path = tmp_path / "run" / "pretrained.safetensors"
    data = path.read_bytes()
    assert len(data) > size
    path.write_bytes(data[:size])
    with Run(config) as run, pytest.raises(ValueError, match=f"{path} can't be read .*; restore it, or delete it"):
        run.begin(1)


def test_rewinding_drops_iterations_to_be_done_again_but_keeps_the_panel_before_them(config, tmp_path):
    with Run(config) as run:
        for iteration in range(4):
            log(run, iteration)
            run.log_panel(iteration + 1, 0, panel())
        run.folder.rewind(2)
    assert [record["iteration"] for record in read_log(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert [record["iteration"] for record in read_log(tmp_path / "run" / "evaluations.jsonl")] == [1, 2]
