"""Ranks of the tests: forks of one process that has imported everything and computed nothing.

Imports cost ten seconds, a case less than one. A case is a function of the rank at the top level of a module; each is
run on both ranks of one process group over gloo, and returns on the main rank what the test wants to see.
"""

import importlib
import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
RANKS = 2
# what a rank imports, some of it while it runs
IMPORTED = ("hrf_fast.train", "deepspeed", "diffusers.models.unets.unet_2d", "diffusers.pipelines.ddpm.pipeline_ddpm")


def fork(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a function at the top level of a module in a process of its own, which does not outlive this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    # the first call starts the process that forks, with the environment of that moment
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu"):
        forkserver.ensure_running()
    process = context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def run_script(folder: Path, variables: dict[str, str], words: list[str]) -> None:
    """Run train.py with these environment variables and arguments; its output goes to files in `folder`."""
    for stream, name in ((1, "output"), (2, "errors")):
        with open(folder / name, "wb", buffering=0) as file:
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    os.environ |= variables
    sys.argv = [str(ROOT / "hrf_fast" / "train.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_cases(module: str, cases: dict[str, tuple], timeout: float = 900) -> dict[str, object]:
    """Results by name of `module.function(*arguments)` on both ranks; cases: {name: (function, *arguments)}."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cases").write_bytes(pickle.dumps(cases))
        processes = [fork(run_rank, rank, folder, module) for rank in range(RANKS)]
        try:
            deadline = time.monotonic() + timeout
            # a rank that failed leaves the other in a collective
            while any(process.exitcode is None for process in processes) and not any(p.exitcode for p in processes):
                assert time.monotonic() < deadline, "the ranks hang"
                time.sleep(0.1)
            assert [process.exitcode for process in processes] == [0] * RANKS, "a rank failed: see its traceback"
        finally:
            for process in processes:
                process.kill()
        return pickle.loads((Path(folder) / "results").read_bytes())


def run_rank(rank: int, folder: str, module: str) -> None:
    """Run the cases in `folder` as one of the two ranks."""
    import torch
    import torch.distributed as dist

    os.chdir(ROOT)
    # no MASTER_ADDR: the group is made here, by a file
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    functions = importlib.import_module(module)
    results = {}
    for name, (function, *arguments) in pickle.loads(Path(folder, "cases").read_bytes()).items():
        results[name] = getattr(functions, function)(*arguments)
        dist.barrier()
    if rank == 0:
        Path(folder, "results").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()
