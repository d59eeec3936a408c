"""The rules of prose that a machine can hold: how a docstring begins, and names that say nothing."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("hrf_fast", "kernels", "benchmarks", "pretraining")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# a docstring starts with a verb or with the noun that it defines
BEGINNINGS = re.compile(r"(Of|What|Those|The same|That|It|For the user)\b")
NAMES = {"found", "whole", "kept", "given", "said", "some", "lost", "own", "place"}


def docstrings(tree):
    """Every docstring and every text under a field."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement.lineno, str(statement.value.value)


def assigned(tree):
    """Every name that an assignment, a loop or a with binds; fields of a class have a docstring to explain them."""
    fields = {id(node.target) for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)}
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in fields)
    return ((node.lineno, node.id) for node in names if isinstance(node.ctx, ast.Store))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose(path):
    tree = ast.parse(path.read_text())
    vague = [f"{line}: {text.splitlines()[0]}" for line, text in docstrings(tree) if BEGINNINGS.match(text.strip())]
    empty = [f"{line}: {name}" for line, name in assigned(tree) if name in NAMES]
    assert vague == [] and empty == []
