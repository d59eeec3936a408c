"""Soak: kill a training run with SIGKILL again and again, resume it by the same command, compare with an unbroken run.

    python -m tests.faults.soak --kills 20 [--seed 0] [section.field=value …]

Each life is a fork of this process, which has imported everything and computed nothing, running train.py's own main().
Kills fall into a rollout, into an update, into the writing of a checkpoint, and anywhere, in turn. After a round the
weights must be equal to the bit, and so must the logs but for times and memory. Another engine is an override such as
`engine.deepspeed=configs/deepspeed/zero2.json`.
"""

import argparse
import mmap
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import hrf_fast.train as train_module
from hrf_fast.run.files import read_log
from hrf_fast.run.progress import Progress
from tests.conftest import make_scheduler, make_unet

MOMENTS = ("rollout", "update", "write", "anywhere")
# one letter that the child writes into shared memory at each phase, and that the parent watches
PHASES = {"rollout": b"r", "update": b"u"}
ITERATIONS = 8


def live(words: list[str], log: Path, phase: mmap.mmap) -> int:
    """Fork a process that trains; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.alarm(600)

    def note(self: Progress, name: str) -> None:
        phase[0:1] = PHASES.get(name, b"-")

    # the quiet display has nothing to say about a phase, so this changes nothing else
    Progress.phase = note
    os._exit(train_module.main(words))


def ended(pid: int) -> bool:
    # without reaping it: its exit code is read once, by the caller
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_at(moment: str, pid: int, folder: Path, phase: mmap.mmap, dice: random.Random) -> None:
    """Wait for the moment, some iterations from now, and kill, unless the run ends before."""
    lines = len(read_log(folder / "metrics.jsonl")) + dice.randrange(3)
    deadline = time.monotonic() + dice.uniform(0, 3)

    def now() -> bool:
        if moment == "anywhere":
            return time.monotonic() > deadline
        if moment == "write":
            return any((folder / "checkpoints").glob(".*.tmp"))
        return phase[0:1] == PHASES[moment] and len(read_log(folder / "metrics.jsonl")) >= lines

    while not now():
        if ended(pid):
            return
        time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.02))
    # it is not reaped yet, so the number is still its own
    os.kill(pid, signal.SIGKILL)


def end_of(pid: int, log: Path) -> int:
    """Wait for a life to end; its exit code, or minus the signal that killed it."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a life ended with {code}:\n{log.read_text()[-3000:]}")
    return code


def logs(run: Path) -> list[dict]:
    """Both logs without what times and memory say."""
    records = read_log(run / "metrics.jsonl") + read_log(run / "evaluations.jsonl")
    return [
        {k: v for k, v in record.items() if k not in ("seconds", "speed", "peak_memory_bytes")} for record in records
    ]


def compare(whole: Path, broken: Path) -> None:
    if logs(whole) != logs(broken):
        raise SystemExit(f"the logs of {whole} and {broken} differ")
    weights = [load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors") for run in (whole, broken)]
    wrong = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    if wrong or weights[0].keys() != weights[1].keys():
        raise SystemExit(f"the weights of {whole} and {broken} differ: {', '.join(wrong[:3])}")


def soak(folder: Path, *, kills: int, seed: int, overrides: list[str]) -> dict[str, int]:
    """Rounds of killed and resumed runs until `kills` have hit.

    Returns:
        Kills per moment, and how many of all left half a checkpoint.
    """
    from diffusers import DDPMPipeline

    torch.set_num_threads(1)
    DDPMPipeline(make_unet(), make_scheduler("DDPMScheduler")).save_pretrained(folder / "model")
    words = [f"model.name={folder / 'model'}", "sample.num_inference_steps=6", "compute.batch_size=8"]
    words += [f"train.iterations={ITERATIONS}", "train.groups_per_iteration=2", "train.group_size=3"]
    words += [
        "optimizer.learning_rate=1e-4",
        "evaluation.every=3",
        "evaluation.panel_size=6",
    ]
    words += ["evaluation.network=none", "run.save_every=1", "run.device=cpu", "run.progress=quiet", *overrides]
    log, phase, dice = folder / "log.txt", mmap.mmap(-1, 1), random.Random(seed)
    whole = folder / "whole"
    if end_of(live([*words, f"run.folder={whole}"], log, phase), log):
        raise SystemExit("the unbroken run was killed by another than us")
    counts, rounds, halves = dict.fromkeys(MOMENTS, 0), 0, 0
    while sum(counts.values()) < kills:
        broken, rounds = folder / f"broken-{rounds}", rounds + 1
        alive = True
        while alive:
            moment = MOMENTS[sum(counts.values()) % len(MOMENTS)]
            phase[0:1] = b"-"
            pid = live([*words, f"run.folder={broken}"], log, phase)
            if sum(counts.values()) < kills:
                kill_at(moment, pid, broken, phase, dice)
            # a run may end by itself before its moment, even in the milliseconds before the kill
            alive = end_of(pid, log) != 0
            counts[moment] += alive
            halves += alive and any((broken / "checkpoints").glob(".*.tmp"))
        compare(whole, broken)
        shutil.rmtree(broken)
    return {**counts, "half checkpoints": halves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options = {"kills": arguments.kills, "seed": arguments.seed, "overrides": arguments.overrides}
        counts = soak(Path(folder), **options)
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{arguments.kills} kills ({listed}) in {time.monotonic() - started:.0f} s: the runs are equal, bit for bit")


if __name__ == "__main__":
    main()
