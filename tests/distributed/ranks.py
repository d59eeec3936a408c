"""Many cases in one launch of two ranks: imports cost ten seconds, a case less than one.

A case is a function of the rank at the top level of a module; each is run on both ranks of one process group over gloo,
and returns on the main rank what the test wants to see, or the traceback of what it raised.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
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
            for process in processes:
                assert process.wait(timeout) == 0, f"a rank exited with {process.returncode}"
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
        try:
            results[name] = getattr(functions, function)(*arguments)
        except Exception:
            results[name] = traceback.format_exc()
        dist.barrier()
    if rank == 0:
        Path(folder, "results").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
