"""Many cases in one launch of two ranks: imports cost ten seconds, a case less than one.

A case is a function of the rank at the top level of a module; each is run on both ranks of one process group over gloo,
and returns on the main rank what the test wants to see.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_cases(module: str, cases: dict[str, tuple], ranks: int = 2, timeout: float = 900) -> dict[str, object]:
    """Results by name of `module.function(*arguments)` on `ranks` ranks; cases: {name: (function, *arguments)}."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            # no MASTER_ADDR: the group is made here, by a file
            environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(ranks)}
            command = [sys.executable, "-m", "tests.distributed.ranks", folder, module]
            with open(Path(folder) / "cases", "wb") as file:
                pickle.dump(cases, file)
            processes.append(subprocess.Popen(command, env=environment, cwd=ROOT))
        try:
            deadline = time.monotonic() + timeout
            # a rank that failed leaves the other in a collective
            while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
                assert time.monotonic() < deadline, "the ranks hang"
                time.sleep(0.1)
            assert [process.returncode for process in processes] == [0] * ranks, "a rank failed: see its traceback"
        finally:
            for process in processes:
                process.kill()
        return pickle.loads((Path(folder) / "results").read_bytes())


def main(folder: str, module: str) -> None:
    import importlib

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    functions = importlib.import_module(module)
    results = {}
    for name, (function, *arguments) in pickle.loads(Path(folder, "cases").read_bytes()).items():
        results[name] = getattr(functions, function)(*arguments)
        dist.barrier()
    if rank == 0:
        Path(folder, "results").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
