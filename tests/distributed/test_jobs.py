"""Jobs of two ranks through the real script: launchers, a rank that dies, Ctrl-C, and what is refused."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from hrf_fast.run.checkpoint import list_checkpoints
from hrf_fast.run.files import read_log
from hrf_fast.train import main
from tests.distributed.ranks import ROOT, fork, run_script

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**variables):
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**clean, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{clean['PATH']}", **variables}


def as_torchrun(rank, ranks, port):
    """The variables of a rank under torchrun."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()}


def as_srun(rank, ranks, port):
    """The variables of a task under srun, whose job has a number that gives the port."""
    step = {"SLURM_STEP_NUM_TASKS": ranks, "SLURM_STEP_NUM_NODES": 1, "SLURM_STEP_TASKS_PER_NODE": ranks}
    step |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_JOB_ID": port, "SLURM_STEP_ID": 0}
    return {name: str(value) for name, value in step.items()}


@dataclass
class Rank:
    """A rank that a launcher has started, and the folder of its output."""

    process: BaseProcess
    folder: Path

    @property
    def errors(self) -> str:
        return (self.folder / "errors").read_text()


def start(folder, words, ranks=2, launcher=as_torchrun):
    """The ranks as a launcher starts them; their output goes to `folder`/rank-*."""
    port, started = free_port(), []
    for rank in range(ranks):
        (folder / f"rank-{rank}").mkdir()
        process = fork(run_script, folder / f"rank-{rank}", launcher(rank, ranks, port), words)
        started.append(Rank(process, folder / f"rank-{rank}"))
    return started


def finish(ranks, timeout=400):
    """(exit code, errors) of each."""
    deadline = time.monotonic() + timeout
    try:
        for rank in ranks:
            rank.process.join(max(0, deadline - time.monotonic()))
            assert rank.process.exitcode is not None, rank.errors
    finally:
        for rank in ranks:
            rank.process.kill()
    return [(rank.process.exitcode, rank.errors) for rank in ranks]


def wait_for_lines(path: Path, count: int, ranks):
    for _ in range(1800):
        if path.exists() and path.read_text().count("\n") >= count:
            return
        for rank in ranks:
            assert rank.process.exitcode is None, rank.errors
        time.sleep(0.1)
    raise AssertionError(f"{path} never had {count} lines")


@pytest.fixture
def long_run(tiny_run):
    return [*tiny_run, "train.groups_per_step=2", "train.iterations=2000", "evaluation.every=0", "run.save_every=0"]


@pytest.mark.slow
def test_a_rank_whose_reward_holds_pythons_lock_for_long_is_waited_for(tiny_run, tmp_path):
    words = [*tiny_run, "reward.name=tests.distributed.cases:holding", "train.iterations=1", "train.groups_per_step=2"]
    for code, errors in finish(start(tmp_path, [*words, "evaluation.every=0", "run.lost_after=10"])):
        assert code == 0, errors
    assert len(read_log(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.slow
def test_tasks_of_srun_are_the_ranks_of_one_job(tiny_run, tmp_path):
    words = [*tiny_run, "train.groups_per_step=2", "evaluation.every=0", "train.iterations=1"]
    for code, errors in finish(start(tmp_path, words, launcher=as_srun)):
        assert code == 0, errors
    (record,) = read_log(tmp_path / "run" / "metrics.jsonl")
    assert record["images"] == 6


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_the_job_with_a_message_that_names_it(long_run, tmp_path, victim):
    ranks = start(tmp_path, long_run)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 1, ranks)
    ranks[victim].process.kill()
    code, errors = finish(ranks, timeout=60)[1 - victim]
    assert code == 1
    assert f"rank {victim} (process {ranks[victim].process.pid} " in errors


def test_ctrl_c_on_all_ranks_saves_once_and_exits_130(long_run, tmp_path):
    ranks = start(tmp_path, long_run)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 1, ranks)
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGINT)
    time.sleep(0.2)
    # the launcher's SIGTERM follows at once
    for rank in ranks:
        rank.process.terminate()
    for code, errors in finish(ranks):
        assert code == 130, errors
    done = len(read_log(tmp_path / "run" / "metrics.jsonl"))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [f"iteration-{done:06d}"]
    # one rank alone goes on from there
    more = [*long_run, f"train.iterations={done + 1}"]
    assert main(more) == 0
    assert len(read_log(tmp_path / "run" / "metrics.jsonl")) == done + 1


def test_what_two_ranks_can_not_share_is_refused_once(tiny_run, tmp_path):
    (first, errors), (second, others) = finish(start(tmp_path, [*tiny_run, "train.groups_per_step=1"]))
    assert first == second == 1
    assert "train.groups_per_step is 1" in errors and "2 ranks" in errors
    # the main rank speaks for all
    assert "groups_per_step" not in others
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "function", "quote", "where"),
    [
        ("reward.name", "failing", "'", "rank 1"),
        ("train.advantages", "failing_advantages", "", "rank 1"),
        ("window.schedule", "FailingSchedule", "", "window.schedule"),
    ],
)
def test_user_code_that_fails_on_one_rank_stops_all_after_a_checkpoint(
    tiny_run, tmp_path, option, function, quote, where
):
    words = [
        *tiny_run,
        "train.groups_per_step=2",
        f"{option}=tests.distributed.cases:{function}",
        "evaluation.every=0",
        "run.save_every=0",
    ]
    (first, errors), (second, _) = finish(start(tmp_path, words))
    assert first == second == 1
    assert all(part in errors for part in (where, f"{quote}tests.distributed.cases:{function}{quote}", "KeyError"))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["iteration-000001"]


def launch(command, timeout=400):
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_deepspeed_command_of_the_docs_runs(tmp_path):
    pytest.importorskip("deepspeed")
    command = "deepspeed --num_accelerators 2 hrf_fast/train.py --config configs/smoke_cpu.yaml"
    assert command in (ROOT / "docs" / "multi_gpu.md").read_text()
    words = [f"run.folder={tmp_path / 'run'}", "engine.deepspeed=configs/deepspeed/zero2.json"]
    words += ["train.iterations=1", "sample.num_inference_steps=3", "evaluation.panel_size=2"]
    program, *rest = command.split()
    # a port of our own; the rest as a reader types it
    launch([program, "--master_port", str(free_port()), *rest, *words])
    # the exit code alone says little: this launcher returns 0 when its own process was killed
    assert len(read_log(tmp_path / "run" / "metrics.jsonl")) == 1
    assert (tmp_path / "run" / "model").is_dir()


# make test starts its ranks without a launcher
@pytest.mark.slow
@pytest.mark.parametrize("program", ["torchrun", "accelerate"])
def test_other_launchers_run_the_same_script(tiny_run, tmp_path, program):
    port = str(free_port())
    if program == "torchrun":
        command = ["torchrun", "--nproc_per_node", "2", "--master_port", port]
    else:
        pytest.importorskip("accelerate")
        command = ["accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
        command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    words = [*tiny_run, "train.groups_per_step=2", "evaluation.every=0", "train.iterations=1"]
    launch([*command, "hrf_fast/train.py", *words])
    assert len(read_log(tmp_path / "run" / "metrics.jsonl")) == 1
    assert (tmp_path / "run" / "model").is_dir()


def test_the_hostfile_of_the_docs_is_two_nodes_of_eight(tmp_path):
    pytest.importorskip("deepspeed")
    from deepspeed.launcher.runner import fetch_hostfile

    block = re.search(r"```\n((?:\S+ slots=\d+\n)+)```", (ROOT / "docs" / "multi_gpu.md").read_text())
    (tmp_path / "hostfile").write_text(block.group(1))
    assert list(fetch_hostfile(str(tmp_path / "hostfile")).values()) == [8, 8]
