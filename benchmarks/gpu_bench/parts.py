"""Parts of the check: each file of tests/gpu, the kernel benchmark, the training benchmark of each layout.

A part returns its result, a mapping with `state` (whole, failed or unfinished) and whatever it has measured.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_bench.record import FAILED, UNFINISHED, WHOLE
from benchmarks.gpu_bench.training import LAYOUTS, measure_layout
from benchmarks.training_bench.workers import OutOfTime

ROOT = Path(__file__).parents[2]
# puts tests/gpu on the CPU
DRY_RUN = "HRF_GPU_DRY_RUN"
# the names of parts that time nothing begin with it
PROOFS = "tests: "
_RUNNING: set[subprocess.Popen[str]] = set()
Part = Callable[[float], dict[str, Any]]
"""Called with the seconds that are left."""


def all_parts(device: torch.device, *, dry_run: bool) -> dict[str, Part]:
    """Every part by name, in the order in which they run: what proves comes before what times."""
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    parts: dict[str, Part] = {f"{PROOFS}{path.stem[5:]}": partial(run_tests, path, dry_run=dry_run) for path in files}
    for dtype in ("fp32", "bf16"):
        parts[f"kernels: {dtype}"] = partial(run_kernels, dtype, device, dry_run=dry_run)
    for layout in LAYOUTS:
        parts[f"training: {layout}"] = partial(run_training, layout, device, dry_run=dry_run)
    return parts


def run_tests(path: Path, left: float, *, dry_run: bool) -> dict[str, Any]:
    """Run a file of tests in a process of its own: {state, passed, failed and skipped by test}."""
    if find_spec("pytest") is None:
        return {"state": UNFINISHED, "reason": 'pytest is missing: pip install "hrf_fast[test]"'}
    search = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": search, **({DRY_RUN: "1"} if dry_run else {})}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), f"--junitxml={report}"]
        output, late = _run_group(command, environment, left)
        if late:
            return {"state": UNFINISHED, "reason": f"{left:.0f} s were not enough"}
        if not report.is_file():
            return {"state": FAILED, "reason": output[-4000:]}
        outcomes = read_report(report)
    return {"state": FAILED if outcomes["failed"] or not any(outcomes.values()) else WHOLE, **outcomes}


def _run_group(command: list[str], environment: dict[str, str], left: float) -> tuple[str, bool]:
    """A command's output, and whether it was killed at its limit, with all processes that it has started."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    _RUNNING.add(process)
    late = False
    try:
        output, _ = process.communicate(timeout=left if math.isfinite(left) else None)
    except subprocess.TimeoutExpired:
        late = True
        _kill(process)
        output, _ = process.communicate()
    finally:
        _RUNNING.discard(process)
    return output, late


def kill_tests() -> None:
    """Kill the tests that run, and what they have started: a session of their own does not hear of Ctrl-C."""
    for process in list(_RUNNING):
        _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_report(path: Path) -> dict[str, Any]:
    """Outcomes of a JUnit report: names that passed, and failed and skipped ones with their reasons."""
    passed, failed, skipped = [], {}, {}
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        name, problem, reason = case.get("name", ""), None, case.find("skipped")
        for kind in ("failure", "error"):
            problem = case.find(kind) if problem is None else problem
        if problem is not None:
            # a page is for others, whose checkout lies elsewhere
            failed[name] = (problem.get("message") or "").replace(f"{ROOT}{os.sep}", "")[:500]
        elif reason is not None:
            skipped[name] = reason.get("message") or ""
        else:
            passed.append(name)
    return {"passed": passed, "failed": failed, "skipped": skipped}


def run_kernels(dtype: str, device: torch.device, left: float, *, dry_run: bool) -> dict[str, Any]:
    """Run the kernel benchmark, which first holds every provider to float64."""
    from benchmarks import bench_kernels
    from benchmarks.kernel_bench.providers import NAMES, Disagreement

    words = ["--dtype", dtype, "--device", str(device), "--seconds", "1"]
    if dry_run:
        quick = [name for name in NAMES if name != "torch.compile"]
        words += ["--shapes", "3x8x8", "--batch", "4", "--seconds", "0", "--unet", "none", "--providers", *quick]
    try:
        result = bench_kernels.benchmark(bench_kernels.parse(words), until=time.monotonic() + left)
    except Disagreement as error:
        return {"state": FAILED, "reason": str(error)}
    if result["unfinished"]:
        return {"state": UNFINISHED, "reason": f"no time for {'; '.join(result['unfinished'])}", "result": result}
    return {"state": WHOLE, "result": result}


def run_training(layout: str, device: torch.device, left: float, *, dry_run: bool) -> dict[str, Any]:
    """Time the literal loop and this trainer on a layout; one that does not fit is skipped by name."""
    # what other parts have left in this process's cache is free
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    with tempfile.TemporaryDirectory() as folder:
        until = time.monotonic() + left
        try:
            result = measure_layout(LAYOUTS[layout], Path(folder), device, free, until=until, tiny=dry_run)
        except OutOfTime as error:
            return {"state": UNFINISHED, "reason": str(error)}
    return {"state": WHOLE, **result}
