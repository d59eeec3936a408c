"""Compilation is refused where it can't work: without Triton, a compiler or Python's headers, and under ZeRO-3."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from hrf_fast import doctor
from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.config.rules import check_job
from hrf_fast.policies import compilation
from hrf_fast.policies.compilation import check_compile, obstacle


def cuda(monkeypatch, *, major=9, tools=("gcc",), triton=True):
    monkeypatch.setattr(compilation, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name if name in tools else None)
    monkeypatch.delenv("CC", raising=False)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ({"triton": False}, r"Triton.*hrf_fast\[gpu\]"),
        ({"major": 6}, "compute capability 7.0"),
        ({"tools": ()}, "C compiler.*gcc or clang.* CC"),
    ],
)
def test_what_a_gpu_needs(monkeypatch, missing, reason):
    cuda(monkeypatch, **missing)
    with pytest.raises(ValueError, match=f"compute.compile is 'blocks' on cuda, .*{reason}.*compute.compile=none"):
        check_compile("blocks", torch.device("cuda"))
    check_compile("none", torch.device("cuda"))


@pytest.mark.parametrize(("code", "expected"), [(0, None), (1, "gcc can't compile C with Python.h")])
def test_the_compiler_is_tried(monkeypatch, code, expected):
    cuda(monkeypatch)
    commands = []

    def run(command, **options):
        commands.append((command, options["input"]))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    found = obstacle("cuda")
    assert found == expected or found.startswith(expected)
    assert commands[0][0][:3] == ["gcc", "-x", "c"] and "Python.h" in commands[0][1]


def test_a_cpu_without_a_compiler_is_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = load_config(["model.name=no-such-folder", "compute.compile=unet", "run.device=cpu"])
    with pytest.raises(ValueError, match=r"compute.compile is 'unet'.*C\+\+ compiler.*no-such-compiler.* CXX"):
        build_components(config)
    assert doctor._compile().startswith("no: on cpu it needs a C++ compiler")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_cpu_with_a_compiler_can(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    assert obstacle("cpu") is None and doctor._compile() == "ok on cpu: none, unet, blocks"


def test_zero_3_and_unknown_modes_are_refused():
    zero = "engine.deepspeed=configs/deepspeed/zero{}.json"
    with pytest.raises(ValueError, match="compute.compile is 'unet'.*zero3.json"):
        check_job(load_config(["compute.compile=unet", zero.format(3)]), 1)
    for stage in (0, 1, 2):
        check_job(load_config(["compute.compile=unet", zero.format(stage)]), 1)
    with pytest.raises(ValueError, match="compute.compile is 'block'.*'blocks'"):
        load_config(["compute.compile=block"])
