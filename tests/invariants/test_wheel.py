"""The wheel has every package and every file that training needs."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_SOURCE = (".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")


def run(*command, **options):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True, **options).stdout


def test_a_wheel_in_a_fresh_environment_trains_a_shipped_model(tmp_path):
    shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tmp_path / "source")
    (wheel,) = tmp_path.glob("hrf_fast-*.whl")
    environment = tmp_path / "environment"
    venv.create(environment)
    python, scripts = environment / "bin" / "python", environment / "bin"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    # dependencies come from this environment, whose own .pth files, and so its editable hrf_fast, do not count there
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    here = {"cwd": tmp_path, "env": variables}
    assert run(python, "-c", "import hrf_fast; print(hrf_fast.__file__)", **here).startswith(str(environment))
    words = ["sample.num_inference_steps=3", "train.iterations=1", "train.groups_per_iteration=1", "train.group_size=2"]
    words += ["evaluation.panel_size=2", "evaluation.every=0", "run.progress=quiet", "run.folder=run"]
    run(scripts / "hrf", "train", *words, **here)
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["iteration"] == 0
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()
    run(scripts / "hrf", "report", "run", **here)
    assert (tmp_path / "run" / "report.html").is_file()
