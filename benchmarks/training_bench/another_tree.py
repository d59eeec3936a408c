"""Another tree: a process that runs another checkout's training bench, by that checkout's code alone.

    python another_tree.py TREE table < {"model": …, "method": …, "arguments": {…}}
    python another_tree.py TREE serve FD < {"kind": …, "words": …, "folder": …, "threads": …}

A script, not a module: it imports nothing of its own checkout. `table` prints the other one's rows, [name, kind, words]
each; `serve` is a worker whose link is the file descriptor FD. The other checkout may be from before its benchmarks
were put into folders (commit 6082774).
"""

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace


def bench(name: str, earlier: str) -> ModuleType:
    """A module of the training bench, or the one that had its contents earlier."""
    return import_module(f"benchmarks.{name if find_spec('benchmarks.training_bench') else earlier}")


def main() -> None:
    tree, what = Path(sys.argv[1]), sys.argv[2]
    # before everything: this script's own folder, and an installed hrf_fast
    sys.path[:1] = [str(tree), str(tree / "kernels")]
    import hrf_fast

    if tree not in Path(hrf_fast.__file__).resolve().parents:
        raise ImportError(f"hrf_fast comes from {hrf_fast.__file__} instead of {tree}")
    request = json.load(sys.stdin)
    if what == "table":
        module = bench("training_bench.configurations", "bench_training")
        arguments = SimpleNamespace(**request["arguments"])
        words = module.method_words(request["model"], request["method"], arguments)
        table = module.table_of(request["method"], words, arguments)
        print(json.dumps([(row.name, row.kind, row_words) for row, row_words in table]))
    else:
        serve = bench("training_bench.serving", "serving").serve
        link = Connection(int(sys.argv[3]))
        serve(link, request["kind"], request["words"], Path(request["folder"]), request["threads"], False)


if __name__ == "__main__":
    main()
