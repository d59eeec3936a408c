"""What other systems lack or name otherwise, taken away or put in place here: no test has run on them."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import hrf_fast
from hrf_fast import cpu
from hrf_fast.distributed.watch import keep_alive
from hrf_fast.run import files
from hrf_fast.run.files import read_log, replace_folder, write_atomically
from tests.conftest import tiny_words

PACKAGE = Path(hrf_fast.__file__).parent
ROOT = PACKAGE.parent


def fresh(module):
    """A module of hrf_fast as this system would import it now, beside the one that is imported."""
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(f"fresh_{path.stem}", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def test_peak_memory_is_psutils_where_the_standard_library_has_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7)))
    assert fresh("devices").peak_memory_bytes(SimpleNamespace(type="cpu")) == 7


@pytest.mark.parametrize(("platform", "factor"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_the_systems_unit(monkeypatch, platform, factor):
    devices = fresh("devices")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(devices.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5))
    assert devices.peak_memory_bytes(SimpleNamespace(type="cpu")) == 5 * factor


def test_signals_that_a_system_has_are_heeded(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(signal, "SIGBREAK", 21, raising=False)
    assert fresh("errors").SIGNALS == (signal.SIGINT, signal.SIGTERM, 21)


def test_the_watch_needs_no_fork(monkeypatch):
    monkeypatch.delattr(os, "register_at_fork")
    assert fresh("distributed.watch").Watch


def test_probes_have_other_names_on_macos(monkeypatch):
    monkeypatch.delattr(socket, "TCP_KEEPIDLE")
    monkeypatch.setattr(socket, "TCP_KEEPALIVE", 16, raising=False)
    options = []
    keep_alive(SimpleNamespace(setsockopt=lambda level, name, value: options.append((name, value))), 600.0)
    assert (16, 300) in options and len(options) == 4


class Windows:
    """`os` as Windows has it, where it matters to files: no folder can be opened, and a flush needs a writable file."""

    name = "nt"

    def __init__(self):
        self.flushed, self._modes = 0, {}

    def __getattr__(self, attribute):
        return getattr(os, attribute)

    def open(self, path, flags):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = os.open(path, flags)
        self._modes[descriptor] = flags
        return descriptor

    def fsync(self, descriptor):
        if self._modes.get(descriptor, os.O_RDWR) == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        self.flushed += 1


def test_files_and_folders_are_written_and_flushed_on_windows(tmp_path, monkeypatch):
    windows = Windows()
    monkeypatch.setattr(files, "os", windows)
    write_atomically(tmp_path / "a.txt", b"one")

    def fill(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "b.txt").write_text("two")

    for _ in range(2):
        replace_folder(tmp_path / "folder", fill)
    assert (tmp_path / "a.txt").read_bytes() == b"one"
    assert (tmp_path / "folder" / "inner" / "b.txt").read_text() == "two"
    # the file by itself, and the one in each folder
    assert windows.flushed == 3


def test_every_processor_is_usable_where_a_system_has_no_affinity(monkeypatch):
    monkeypatch.setattr(cpu.psutil, "Process", SimpleNamespace)
    monkeypatch.setattr(cpu.psutil, "cpu_count", lambda: 6)
    assert cpu.usable_cpus() == 6


# a run in a process in which modules and functions of POSIX are gone, once others have had theirs
BARE = """
import os, signal, sys
import filelock, matplotlib.figure, omegaconf, psutil, torch, tqdm
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
import torch.distributed.rendezvous
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None
for module, names in ((os, ("fork", "register_at_fork", "sysconf", "sched_getaffinity")), (signal, ("SIGHUP",))):
    for name in names:
        delattr(module, name)
psutil.Process = lambda: type("Process", (), {"memory_info": lambda self: type("M", (), {"peak_wset": 5})})()
from hrf_fast.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_run_needs_nothing_that_only_posix_has(tiny_model, tmp_path):
    words = [*tiny_words(tiny_model, tmp_path / "run"), "train.iterations=1", "evaluation.every=0"]
    done = subprocess.run([sys.executable, "-c", BARE, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [record["peak_memory_bytes"] for record in read_log(tmp_path / "run" / "metrics.jsonl")] == [5]
