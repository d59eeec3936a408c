"""The wheel that `pip install hrf_fast` would fetch: built from a clean tree, installed, and trained with."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from hrf_fast.run.files import read_log

ROOT = Path(__file__).parents[2]
NOT_OF_A_CLONE = (
    ".git",
    ".venv",
    "runs",
    "build",
    "dist",
    "shared",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".coverage*",
)


def check(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without a network, by the setuptools that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "clone", ignore=shutil.ignore_patterns(*NOT_OF_A_CLONE))
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    check([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(folder), "."], cwd=folder / "clone")
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_both_packages_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {Path(name) for name in archive.namelist() if ".dist-info/" not in name}
    sources = {"hrf_fast": ROOT / "hrf_fast", "hrf_kernels": ROOT / "kernels" / "hrf_kernels"}
    in_tree = {
        Path(package) / path.relative_to(source)
        for package, source in sources.items()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == in_tree


def test_an_installed_wheel_trains_a_shipped_model(wheel, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    site = Path(check([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    # the packages that hrf_fast needs, without running this environment's .pth files: one installs the source tree
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    # a source tree on the path is an installed package to pip
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    check([sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(wheel)], env=clean)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    here = {"cwd": elsewhere, "env": {**clean, "OMP_NUM_THREADS": "1"}}
    code = "from importlib.util import find_spec; print(find_spec('hrf_fast').origin, find_spec('hrf_kernels').origin)"
    assert [Path(module).parents[1] for module in check([python, "-c", code], **here).split()] == [site, site]
    words = ["model.name=fashion", "sample.num_inference_steps=4", "window.schedule=full", "train.iterations=1"]
    words += ["train.groups_per_iteration=1", "train.group_size=2", "evaluation.every=0", "evaluation.panel_size=2"]
    check([home / "bin" / "hrf", "train", *words, "run.folder=run", "run.progress=quiet"], **here)
    (record,) = read_log(elsewhere / "run" / "metrics.jsonl")
    assert record["grad_norm"] > 0
    # the shipped network measured the panel
    assert [set(panel) >= {"reward", "vendi"} for panel in read_log(elsewhere / "run" / "evaluations.jsonl")] == [
        True
    ] * 2
    assert (elsewhere / "run" / "model" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
