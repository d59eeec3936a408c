"""HRF against DDPO over several seeds, at equal UNet evaluations: the claim of the paper, measured.

    python benchmarks/study.py configs/demo_fashion.yaml --seeds 0 1 2 --jobs 2

Each seed trains HRF by the config and DDPO by the config with `configs/demo_ddpo.yaml` over it; both resume if they
were interrupted. For each seed it reads off: HRF's gain in reward on the fixed panel with its paired 95 % interval, the
share of the pretrained Vendi Score that it kept, and the Vendi Score of DDPO where its reward reached HRF's (linear
interpolation between panels). Writes study.json and study.md beside the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

if __name__ == "__main__":
    # instead of this folder, whose modules would hide packages of their names
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.tables import markdown_table
from hrf_fast.config.load import load_config
from hrf_fast.evaluation.panel import choose_network
from hrf_fast.report.comparison import RunLog, at_reward, gain, read_runs

ROOT = Path(__file__).resolve().parents[1]
# words of `hrf train` beside the configuration's file, by method
WORDS = {"hrf": [], "ddpo": ["--config", str(ROOT / "configs" / "demo_ddpo.yaml")]}
HEADER = ("seed", "HRF: gain in reward [95 %]", "Vendi that HRF keeps", "DDPO keeps at that reward", "DDPO's end")


def train(config: Path, method: str, seed: int, folder: Path, threads: int, overrides: list[str]) -> None:
    """Train one run in a process of its own, so that several can run side by side.

    Raises:
        ValueError: it failed; the message is its last line.
    """
    words = ["--config", str(config), *WORDS[method], f"run.seed={seed}", f"run.folder={folder}", *overrides]
    result = subprocess.run(
        [sys.executable, str(ROOT / "hrf_fast" / "train.py"), *words, "run.progress=quiet"],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise ValueError(f"{method} with seed {seed} failed: {last}")


def check(config: Path, overrides: list[str]) -> None:
    """Refuse a configuration that measures no diversity, before anything is trained.

    Raises:
        ValueError: the configuration can't work, or evaluation.network has no features.
    """
    loaded = load_config(["--config", str(config), *overrides])
    network = loaded.evaluation.network
    if choose_network(network, loaded.model.name, torch.device("cpu")) is None:
        raise ValueError(
            f"evaluation.network is {network!r}, which has no features for model.name {loaded.model.name!r}, but the "
            "study compares Vendi Scores; use a shipped name, a hub id or a folder"
        )


def compare(hrf: Path, ddpo: Path) -> dict[str, Any]:
    """Compare one seed's two runs; Vendi Scores are shares of the pretrained model's."""
    ours, theirs = read_runs([hrf, ddpo])
    before, after, end = _vendi(ours, 0), _vendi(ours), _vendi(theirs)
    level = ours.end
    point = at_reward(theirs, level)
    return {
        "pretrained_reward": ours.rewards()[0],
        "pretrained_vendi": before,
        "hrf_reward": level,
        "hrf_gain": list(gain(ours, ours)),
        "hrf_vendi_share": after / before,
        "hrf_evaluations": ours.panels[-1]["evaluations"],
        "ddpo_reward": theirs.end,
        "ddpo_vendi_share": end / before,
        "ddpo_evaluations": theirs.panels[-1]["evaluations"],
        # where DDPO's reward reached HRF's; None where it never did
        "ddpo_evaluations_at_hrf_reward": point[0] if point else None,
        "ddpo_vendi_share_at_hrf_reward": point[1].value / before if point else None,
    }


def _vendi(log: RunLog, panel: int | None = None) -> float:
    """The Vendi Score of a panel, the tuned model's by default.

    Raises:
        ValueError: nothing measured it.
    """
    vendi = log.metric("vendi", panel)
    if vendi is None:
        raise ValueError(f"{log.folder} has no Vendi Score; train it with an evaluation.network")
    return vendi.value


def markdown(title: str, results: dict[int, dict[str, Any]]) -> str:
    """One row per seed and a row of means ± standard deviations."""
    rows = []
    for seed, result in results.items():
        value, low, high = result["hrf_gain"]
        share = result["ddpo_vendi_share_at_hrf_reward"]
        rows.append(
            [
                str(seed),
                f"{value:+.4f} [{low:+.4f}, {high:+.4f}]",
                f"{result['hrf_vendi_share']:.1%}",
                f"{share:.1%}" if share is not None else "never reached it",
                f"{result['ddpo_reward'] - result['pretrained_reward']:+.4f}, {result['ddpo_vendi_share']:.1%}",
            ]
        )
    gain_mean = statistics.mean(result["hrf_gain"][0] for result in results.values())
    shares = ("hrf_vendi_share", "ddpo_vendi_share_at_hrf_reward", "ddpo_vendi_share")
    rows.append(["mean", f"{gain_mean:+.4f}", *(_mean([r[name] for r in results.values()]) for name in shares)])
    return f"### {title}\n\n{markdown_table(HEADER, rows)}\n"


def _mean(shares: list[float | None]) -> str:
    """Mean ± standard deviation over the seeds that have a value."""
    values = [share for share in shares if share is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{spread}"


def main(words: Sequence[str] | None = None) -> None:
    """Train what is missing, compare, and write study.json and study.md.

    Raises:
        ValueError: the configuration can't work, or a run failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--out", type=Path, help="folder of the runs; by default runs/study-<config>")
    parser.add_argument("overrides", nargs="*", help="section.field=value for every run")
    arguments = parser.parse_intermixed_args(words)
    if arguments.jobs < 1:
        raise ValueError(f"--jobs is {arguments.jobs}; use at least 1")
    check(arguments.config, arguments.overrides)
    out = arguments.out or Path("runs") / f"study-{arguments.config.stem}"
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    runs = [(method, seed, out / f"{method}-{seed}") for seed in arguments.seeds for method in WORDS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(train, arguments.config, *run, threads, arguments.overrides) for run in runs]
        try:
            for job in tqdm(jobs, unit="run"):
                job.result()
        except BaseException:
            # runs that have begun go on to their end; the others need not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    results = {seed: compare(out / f"hrf-{seed}", out / f"ddpo-{seed}") for seed in arguments.seeds}
    page = markdown(arguments.config.stem, results)
    (out / "study.json").write_text(json.dumps(results, indent=1))
    (out / "study.md").write_text(page)
    print(page)


if __name__ == "__main__":
    from hrf_fast.command import run_command

    sys.exit(run_command(main))
