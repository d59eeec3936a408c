"""The architecture that the folders promise, and traps of the source tree that have stopped a start-up."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hrf_fast
from hrf_fast.cli import main
from hrf_fast.run.files import read_log
from tests.conftest import tiny_words

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hrf_fast"
# from the top: a module imports from its own line or from lines below
LAYERS = (
    ("cli", "train", "commands", "study"),
    ("assembly",),
    ("command", "arguments"),
    ("report",),
    ("timing",),
    ("memory", "doctor"),
    ("training",),
    ("run",),
    ("stopping",),
    ("evaluation",),
    ("rewards",),
    ("engines",),
    ("policies",),
    ("vision",),
    ("windows", "prompts"),
    ("from_trl",),
    ("config",),
    ("hub", "weights"),
    ("devices", "stopwatch"),
    ("distributed",),
    ("noise", "registry", "signatures", "user_code", "assets", "cpu", "errors", "version"),
)
MODULES = {path: path.relative_to(ROOT).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
SOURCES = sorted(
    path for folder in ("hrf_fast", "kernels", "benchmarks", "pretraining") for path in (ROOT / folder).rglob("*.py")
)


def imports(path: Path) -> set[str]:
    """Modules of hrf_fast that a file imports anywhere, also inside functions and for type checkers."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "hrf_fast":
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                known = inner.with_suffix(".py").is_file() or inner.is_dir()
                names.add(f"{node.module}.{alias.name}" if known else node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "hrf_fast"}
    return names


def module_name(path: Path) -> str:
    parts = MODULES[path]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


GRAPH = {module_name(path): imports(path) for path in MODULES}


def layer(module: str) -> int:
    part = module.split(".")[1]
    return next(number for number, names in enumerate(LAYERS) if part in names)


def test_every_module_has_a_layer_and_none_imports_upwards():
    upward = {
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        if module != "hrf_fast"
        for other in others
        if other == "hrf_fast" or layer(other) < layer(module)
    }
    assert upward == set()


def test_no_modules_import_each_other_in_a_circle():
    # remove modules that import nothing but removed ones; a circle is what stays
    left = {module: {other for other in others if other != module} for module, others in GRAPH.items()}
    while leaves := {module for module, others in left.items() if not others & set(left)}:
        left = {module: others for module, others in left.items() if module not in leaves}
    assert sorted(left) == []


def test_only_those_who_build_or_plan_take_the_whole_configuration():
    allowed = ("assembly", "train", "commands", "config", "run", "memory", "timing")
    takers = {
        f"{module_name(path)}.{function.name}"
        for path in MODULES
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for argument in (*function.args.args, *function.args.kwonlyargs)
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Config"
    }
    assert {taker for taker in takers if taker.split(".")[1] not in allowed} == set()


def test_hrf_kernels_knows_nothing_of_the_trainer():
    assert [path.name for path in (ROOT / "kernels").rglob("*.py") if imports(path)] == []


def test_no_module_hides_one_of_the_standard_library():
    # a launcher puts hrf_fast/ first on sys.path
    names = {path.stem for path in PACKAGE.iterdir()} - {"__init__", "__pycache__"}
    assert not names & set(sys.stdlib_module_names)


def test_the_kernels_folder_does_not_hide_the_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_first_file_to_open_is_short():
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 121


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 295


def test_help_imports_nothing_heavy():
    code = "import sys; from hrf_fast.cli import main; main(['--version']); print(sorted(set(sys.modules) & "
    code += "{'torch', 'numpy', 'diffusers', 'transformers', 'omegaconf', 'matplotlib'}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["hrf_fast", hrf_fast.__version__, "[]"]


def test_a_launched_script_does_not_hide_a_users_module(tiny_model, tmp_path):
    # a launcher puts hrf_fast/ before PYTHONPATH, with our rewards, config and report in it
    names = ("rewards", "config", "report")
    for value, name in enumerate(names):
        code = f"def score(images, prompts):\n    return 0 * images.mean((1, 2, 3)) + {value}\n"
        (tmp_path / f"{name}.py").write_text(code)
    terms = ", ".join(f'{{name: "{name}:score"}}' for name in names)
    words = [*tiny_words(tiny_model, "run"), "train.iterations=1", "evaluation.every=0", "window.schedule=full"]
    words += ["sample.num_inference_steps=3", "train.groups_per_iteration=1", "evaluation.panel_size=2"]
    path = os.pathsep.join(
        filter(None, (str(tmp_path), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")))
    )
    subprocess.run(
        [
            sys.executable,
            str(PACKAGE / "train.py"),
            "--local_rank=0",
            *words,
            "reward.name=null",
            f"reward.terms=[{terms}]",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
    )
    (record,) = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [record[f"reward/{name}:score"] for name in names] == [0, 1, 2]


def test_no_command_prints_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "train" in capsys.readouterr().out


def test_no_kind_of_model_is_named_outside_its_family():
    named = re.compile(r"\b(flux|sd3|stable_?diffusion)", re.I)
    for path in (PACKAGE / "policies").rglob("*.py"):
        if path.parent.name != "families":
            code = ast.unparse(_without_docstrings(ast.parse(path.read_text())))
            assert not named.search(re.sub(r"f?'[^'\n]*'|f?\"[^\"\n]*\"", "", code)), path


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [line for line in node.body if not _is_text(line)] or [ast.Pass()]
    return tree


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
