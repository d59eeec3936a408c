"""What happens to a run from outside: a signal at any moment, and a full disk."""

import json
import subprocess
import sys
from pathlib import Path
from signal import Signals

import pytest

from hrf_fast.run.checkpoint import list_checkpoints
from hrf_fast.train import main
from tests.faults.soak import MOMENTS, SIGNALS, turn
from tests.runs import assert_equal_runs, with_folder

ROOT = Path(__file__).parents[2]


def test_runs_stopped_at_random_moments_equal_the_unbroken_one():
    # a process of its own: it forks, which a process that has computed must not
    command = [sys.executable, "-m", "tests.faults.soak", "--kills", "4"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    once = "rollout 1, update 1, write 1, anywhere 1, SIGKILL 1, SIGTERM 1, SIGHUP 1, SIGINT 1, half checkpoints "
    assert result.stdout.startswith(f"4 signals ({once}")


@pytest.mark.slow
def test_adapters_and_statistics_of_prompts_outlive_kill_9():
    command = [sys.executable, "-m", "tests.faults.soak", "--kills", "3", "--signal", "KILL", "--text"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr
    # peft imports DeepSpeed where it is installed, which prints a line
    last = result.stdout.splitlines()[-1]
    assert last.startswith("3 signals (rollout 1, update 1, write 1, anywhere 0, SIGKILL 3, ")


def test_sixteen_signals_are_every_signal_at_every_moment():
    turns = [turn(hits, list(SIGNALS)) for hits in range(16)]
    assert set(turns) == {(moment, Signals[f"SIG{name}"]) for moment in MOMENTS for name in SIGNALS}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB, two checkpoints and a bit, that can grow: `resize("8m")`."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", *options, "tmpfs", str(folder)], capture_output=True)

    if mount("size=300k").returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder, lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_with_a_clear_error_and_the_checkpoint_before_goes_on(tiny_run, tmp_path, small_disk, capsys):
    disk, resize = small_disk
    words = with_folder(tiny_run, disk / "run", "train.iterations=3", "evaluation.every=0", "run.keep_checkpoints=99")
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and str(disk / "run") in error
    kept = list_checkpoints(disk / "run" / "checkpoints")
    assert kept and not (disk / "run" / "model").exists()
    assert json.loads((kept[0] / "state.json").read_text())["iteration"] == len(kept)
    # with room again, the same command ends as if nothing had happened
    assert resize("64m").returncode == 0
    assert main(words) == 0
    assert "is skipped" not in capsys.readouterr().out
    assert main(with_folder(words, tmp_path / "whole")) == 0
    assert_equal_runs(tmp_path / "whole", disk / "run")
