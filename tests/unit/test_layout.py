"""The traps of the source tree, each of which has stopped a start-up once."""

import subprocess
import sys
from pathlib import Path

import hrf_fast
from hrf_fast.cli import main

ROOT = Path(__file__).parents[2]


def test_no_module_hides_one_of_the_standard_library():
    # a launcher puts hrf_fast/ first on sys.path
    names = {path.stem for path in (ROOT / "hrf_fast").iterdir()} - {"__init__", "__pycache__"}
    assert not names & set(sys.stdlib_module_names)


def test_the_kernels_folder_does_not_hide_the_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_train_stays_short():
    assert len((ROOT / "hrf_fast" / "train.py").read_text().splitlines()) < 150


def test_help_imports_nothing_heavy():
    code = "import sys; from hrf_fast.cli import main; main(['--version']); print(sorted(set(sys.modules) & "
    code += "{'torch', 'numpy', 'diffusers', 'transformers', 'omegaconf', 'matplotlib'}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["hrf_fast", hrf_fast.__version__, "[]"]


def test_the_script_runs_as_a_launcher_runs_it():
    out = subprocess.run(
        [sys.executable, str(ROOT / "hrf_fast" / "train.py"), "--local_rank=0", "train.iteratons=1"],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 1 and "did you mean 'iterations'" in out.stderr


def test_no_command_prints_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "train" in capsys.readouterr().out
