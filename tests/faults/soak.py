"""Soak: stop a training run again and again, resume it by the same command, compare with an unbroken run.

    python -m tests.faults.soak --kills 24 [--seed 0] [--signal KILL …] [--text] [section.field=value …]

Each life is a fork of this process, which has imported everything and computed nothing. It is stopped by SIGKILL,
SIGTERM, SIGHUP and SIGINT in turn, or by those that `--signal` names: in a rollout, in an update, while a checkpoint is
written, and anywhere, so that 16 signals are every signal at every moment. After a round the newest checkpoints must be
equal to the bit, and so must the logs but for times and memory. With `--text` adapters of a text-to-image model are
trained, on statistics of prompts. Another engine is an override, such as
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
from collections import Counter
from pathlib import Path

import torch

import hrf_fast
from hrf_fast.command import run_command
from hrf_fast.run.files import read_log
from tests.conftest import make_scheduler, make_smallest_unet
from tests.runs import assert_equal_checkpoints, assert_equal_runs, train
from tests.text_models import make_pipeline

MOMENTS = ("rollout", "update", "write", "anywhere")
ITERATIONS, GROUPS, GROUP_SIZE = 8, 2, 3
SIGNALS = ("KILL", "TERM", "HUP", "INT")
# exit codes of a life that was stopped: by the system, before the run heeds signals, or as an error of 128 and more
STOPPED = {code for name in SIGNALS for code in (-signal.Signals[f"SIG{name}"], 128 + signal.Signals[f"SIG{name}"])}


class Watched(hrf_fast.Listener):
    """Brightness as a reward. A letter in shared memory tells the parent where the iteration is: rollout or update."""

    def __init__(self, letter: mmap.mmap) -> None:
        self.letter, self.rewarded = letter, 0

    def iteration(self, record):
        self.rewarded = 0
        self.letter[0:1] = b"-"

    def __call__(self, images, prompts=None):
        # panels are larger; while one group is rewarded the next one is rolled out, and the last one's update follows
        if len(images) == GROUP_SIZE:
            self.rewarded += 1
            self.letter[0:1] = b"u" if self.rewarded == GROUPS else b"r"
        return images.mean((1, 2, 3))


def live(words: list[str], log: Path, letter: mmap.mmap) -> int:
    """Fork a process that trains; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        signal.alarm(600)
        # under nohup the hang-up would be ignored
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        watched = Watched(letter)
        code = run_command(lambda: train(words, reward=watched, listeners=[watched]))
    except KeyboardInterrupt:
        # before or after the command
        code = 130
    finally:
        os._exit(code)


def ended(pid: int) -> bool:
    # without reaping it: its exit code is read once, by the caller
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def stop_at(moment: str, pid: int, folder: Path, letter: mmap.mmap, dice: random.Random, by: signal.Signals) -> None:
    """Wait for the moment, some iterations from now, and send the signal, unless the run ends before."""
    lines = len(read_log(folder / "metrics.jsonl")) + dice.randrange(3)
    deadline = time.monotonic() + dice.uniform(0, 3)

    def now() -> bool:
        if moment == "anywhere":
            return time.monotonic() > deadline
        if moment == "write":
            return any((folder / "checkpoints").glob(".*.tmp"))
        return letter[0:1] == moment[0].encode() and len(read_log(folder / "metrics.jsonl")) >= lines

    while not now():
        if ended(pid):
            return
        time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.02))
    # it is not reaped yet, so the number is still its own
    os.kill(pid, by)


def end_of(pid: int, log: Path) -> int:
    """Wait for a life to end; its exit code, or minus the signal that killed it."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in {0, *STOPPED}:
        raise SystemExit(f"a life ended with {code}:\n{log.read_text()[-3000:]}")
    return code


def compare(whole: Path, broken: Path) -> None:
    try:
        assert_equal_runs(whole, broken)
        assert_equal_checkpoints(whole, broken)
    except AssertionError as error:
        raise SystemExit(f"{whole} and {broken} differ: {error}") from error


def turn(hits: int, names: list[str]) -> tuple[str, signal.Signals]:
    """The moment and the signal of the next hit: every pair comes once before one comes again."""
    turns, moment = divmod(hits, len(MOMENTS))
    return MOMENTS[moment], signal.Signals[f"SIG{names[(moment + turns) % len(names)]}"]


def make_model(folder: Path, text: bool) -> list[str]:
    """Write a model to `folder`/model; returns the words of a run on it."""
    from diffusers import DDPMPipeline

    words = [f"model.name={folder / 'model'}"]
    if not text:
        DDPMPipeline(make_smallest_unet(3, 16, attention=True), make_scheduler("DDPMScheduler")).save_pretrained(
            folder / "model"
        )
        return words
    make_pipeline("sd1").save_pretrained(folder / "model")
    # of so few prompts each has statistics soon
    (folder / "prompts.txt").write_text("a cat\na dog\nred\n")
    words += [f"prompts.source={folder / 'prompts.txt'}", "evaluation.images_per_prompt=2", "sample.guidance_scale=2"]
    words += ["train.advantages=prompt", "train.prompt_buffer=7", "train.prompt_min_count=4"]
    return [*words, "lora.rank=2", "optimizer.ema_decay=0.9"]


def soak(
    folder: Path, *, kills: int, seed: int, names: list[str], overrides: list[str], text: bool = False
) -> dict[str, int]:
    """Rounds of stopped and resumed runs until `kills` signals have hit.

    Args:
        text: train adapters of a text-to-image model.

    Returns:
        Hits per moment and per signal, and how many of all left half a checkpoint.
    """
    torch.set_num_threads(1)
    words = [*make_model(folder, text), "sample.num_inference_steps=6", f"train.iterations={ITERATIONS}"]
    words += [f"train.groups_per_iteration={GROUPS}", f"train.group_size={GROUP_SIZE}", "optimizer.learning_rate=1e-4"]
    words += ["evaluation.every=3", "evaluation.panel_size=6", "evaluation.network=none"]
    words += ["run.save_every=1", "run.device=cpu", "run.progress=quiet", *overrides]
    log, letter, dice = folder / "log.txt", mmap.mmap(-1, 1), random.Random(seed)
    whole = folder / "whole"
    if end_of(live([*words, f"run.folder={whole}"], log, letter), log):
        raise SystemExit("the unbroken run was stopped by another than us")
    counts: Counter[str] = Counter()
    hits = rounds = halves = 0
    while hits < kills:
        broken, rounds = folder / f"broken-{rounds}", rounds + 1
        alive = True
        while alive:
            moment, by = turn(hits, names)
            letter[0:1] = b"-"
            pid = live([*words, f"run.folder={broken}"], log, letter)
            if hits < kills:
                stop_at(moment, pid, broken, letter, dice, by)
            # a run may end by itself before its moment, even in the milliseconds before the signal
            alive = end_of(pid, log) != 0
            hits += alive
            counts.update([moment, by.name] * alive)
            halves += alive and any((broken / "checkpoints").glob(".*.tmp"))
        compare(whole, broken)
        shutil.rmtree(broken)
    listed = (*MOMENTS, *(f"SIG{name}" for name in names))
    return {**{name: counts[name] for name in listed}, "half checkpoints": halves}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=SIGNALS, action="append", help="of those that come in turn; all by default")
    parser.add_argument("--text", action="store_true", help="train adapters of a text-to-image model")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    started = time.monotonic()
    options = {name: getattr(arguments, name) for name in ("kills", "seed", "overrides", "text")}
    with tempfile.TemporaryDirectory() as folder:
        counts = soak(Path(folder), names=arguments.signal or list(SIGNALS), **options)
    listed = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(
        f"{arguments.kills} signals ({listed}) in {time.monotonic() - started:.0f} s: the runs are equal, bit for bit"
    )


if __name__ == "__main__":
    main()
