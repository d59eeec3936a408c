"""TrlRun: what a TRL script, a JSON file of DDPOConfig fields or a command line says; a script is read, never run."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class TrlRun:
    """The contents of a source: fields of DDPOConfig, the rewards and prompts that a script names."""

    fields: dict[str, Any] = field(default_factory=dict)
    reward: str | None = None
    """A reward of ours, or "module:function"."""
    prompts: str | None = None
    """As `module:function`."""
    computed: dict[str, str] = field(default_factory=dict)
    """Fields that the script computes, by their expressions."""


def read_source(source: Path) -> TrlRun:
    """The fields in a JSON file, or in a script's calls of DDPOConfig and of the default pipeline.

    Raises:
        ValueError: no such file, not JSON, or a script without a DDPOConfig.
    """
    try:
        text = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: {error}; give a script or a JSON file of DDPOConfig fields") from error
    if source.suffix != ".py":
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{source} is neither a .py script nor JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{source} holds a JSON {type(fields).__name__}; give an object of DDPOConfig fields")
        return TrlRun(fields)
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"{source}, line {error.lineno}, is no Python: {error.msg}") from error
    return _read_script(source, tree)


def read_words(words: Sequence[str]) -> dict[str, Any]:
    """Fields of a command line: --field=value or --field value; a bare --field is true.

    Raises:
        ValueError: a word that belongs to no field.
    """
    fields: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            fields[name] = _literal(value) if equals else True
            name = None if equals else name
        elif name is None:
            raise ValueError(f"{word!r} belongs to no field; write --field=value, as for the TRL script")
        else:
            fields[name], name = _literal(word), None
    return fields


def _literal(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(word.lower(), word)


def _read_script(source: Path, tree: ast.Module) -> TrlRun:
    run = TrlRun()
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls: dict[str, ast.Call] = {}
    mentioned = False
    for node in ast.walk(tree):
        mentioned |= isinstance(node, ast.Name) and node.id == "DDPOConfig"
        if isinstance(node, ast.Call) and (name := _name(node.func)):
            calls[name] = node
        if isinstance(node, ast.ClassDef):
            # a dataclass of script arguments, whose defaults are the run's
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and item.value is not None:
                    _keep(run, _name(item.target), _default(item.value))
    if not mentioned:
        raise ValueError(f"{source} has no DDPOConfig; give the script that trains with TRL's DDPOTrainer")
    for keyword in calls["DDPOConfig"].keywords if "DDPOConfig" in calls else ():
        if keyword.arg:
            _keep(run, keyword.arg, keyword.value)
    if pipeline := calls.get("DefaultDDPOStableDiffusionPipeline"):
        written = dict(zip(("pretrained_model", "pretrained_revision", "use_lora"), pipeline.args, strict=False))
        names = {"pretrained_model_name": "pretrained_model", "pretrained_model_revision": "pretrained_revision"}
        written |= {names.get(k.arg, k.arg): k.value for k in pipeline.keywords if k.arg}
        for name, value in written.items():
            # an attribute of the script's arguments, whose default was read above
            if not isinstance(value, ast.Attribute):
                _keep(run, name, value)
    if trainer := calls.get("DDPOTrainer"):
        handed = dict(zip(("config", "reward_function", "prompt_function"), trainer.args, strict=False))
        handed |= {keyword.arg: keyword.value for keyword in trainer.keywords if keyword.arg}
        run.reward = _function(handed.get("reward_function"), source, functions)
        run.prompts = _function(handed.get("prompt_function"), source, functions)
        made = handed.get("reward_function")
        if isinstance(made, ast.Call) and _name(made.func) == "aesthetic_scorer":
            # the factory of TRL's example
            run.reward = "aesthetic"
    return run


def _keep(run: TrlRun, name: str, value: ast.expr) -> None:
    """Keep a literal value, or the expression of one that only running the script would tell."""
    try:
        run.fields[name] = ast.literal_eval(value)
    except ValueError:
        run.computed[name] = ast.unparse(value)


def _default(value: ast.expr) -> ast.expr:
    """The default inside field(default=…), or the value itself."""
    if isinstance(value, ast.Call):
        return next((keyword.value for keyword in value.keywords if keyword.arg == "default"), value)
    return value


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _function(node: ast.expr | None, source: Path, functions: set[str]) -> str | None:
    """A function of the script's top level as module:function."""
    return f"{source.stem}:{node.id}" if isinstance(node, ast.Name) and node.id in functions else None
