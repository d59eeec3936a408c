"""TrlRun: what a TRL script, a JSON file of DDPOConfig fields or a command line says; a script is read, never run."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrf_fast.from_trl.fields import DEFAULTS, HEAD, SWITCHED_ON

TRAINER = ("config", "reward_function", "prompt_function", "sd_pipeline", "image_samples_hook")
"""Parameters of DDPOTrainer, in their order."""


# as HfArgumentParser, which TRL's script has, reads a switch
_SWITCHES = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


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
    name: str = "trl"
    """Name of the source, without its suffix."""
    reward_text: str = ""
    """The reward as the script writes it."""
    declared: set[str] = field(default_factory=set)
    """Arguments of the script's own dataclasses."""
    unread: list[str] = field(default_factory=list)
    """Notes on other parts of the script that are left out."""

    def set(self, name: str, value: Any) -> None:
        """Give a field a value instead of the one, or the expression, that it had."""
        self.computed.pop(name, None)
        self.fields[name] = value


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
        return TrlRun(fields, name=source.stem)
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"{source}, line {error.lineno}, is no Python: {error.msg}") from error
    return _read_script(source, tree)


def read_words(words: Sequence[str], switched_on: Collection[str] = SWITCHED_ON) -> dict[str, Any]:
    """Fields of a command line: --field=value or --field value; a bare --field is true, and --no_field false.

    Args:
        switched_on: fields that are true by default, which alone have a --no_field, as in HfArgumentParser.

    Raises:
        ValueError: a word that belongs to no field.
    """
    fields: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if not equals and (off := name.removeprefix("no_")) != name and off in switched_on:
                fields[off], name = False, None
                continue
            fields[name] = _of_word(name, value) if equals else True
            name = None if equals else name
        elif name is None:
            raise ValueError(f"{word!r} belongs to no field; write --field=value, as for the TRL script")
        else:
            fields[name], name = _of_word(name, word), None
    return fields


def _of_word(name: str, word: str) -> Any:
    """A field's value as its script's own parser reads the word: by the type of its default."""
    default = DEFAULTS.get(name, 0)
    if default is None or isinstance(default, str):
        return word
    if isinstance(default, bool):
        return _SWITCHES.get(word.lower(), word)
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError):
        return word


def _read_script(source: Path, tree: ast.Module) -> TrlRun:
    run = TrlRun(name=source.stem)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls: dict[str, ast.Call] = {}
    mentioned = False
    for node in ast.walk(tree):
        mentioned |= isinstance(node, ast.expr) and _name(node) == "DDPOConfig"
        if isinstance(node, ast.Call) and (name := _name(node.func)):
            calls[name] = node
        if isinstance(node, ast.ClassDef) and any(map(_is_dataclass, node.decorator_list)):
            # a dataclass of script arguments, whose defaults are the run's
            for item in node.body:
                if isinstance(item, ast.AnnAssign):
                    run.declared.add(_name(item.target))
                    if item.value is not None:
                        _keep(run, _name(item.target), _default(item.value))
    if not mentioned:
        raise ValueError(f"{source} has no DDPOConfig; give the script that trains with TRL's DDPOTrainer")
    for keyword in calls["DDPOConfig"].keywords if "DDPOConfig" in calls else ():
        if keyword.arg:
            _keep(run, keyword.arg, keyword.value)
        else:
            run.unread.append(
                f"DDPOConfig(**{ast.unparse(keyword.value)}): left out, since the script was not run; give the fields "
                "as --field=value"
            )
    if pipeline := calls.get("DefaultDDPOStableDiffusionPipeline"):
        names = {"pretrained_model_name": "pretrained_model", "pretrained_model_revision": "pretrained_revision"}
        written = _arguments(pipeline, ("pretrained_model", "pretrained_revision", "use_lora"))
        _keep_written(run, {names.get(name, name): value for name, value in written.items()})
    if trainer := calls.get("DDPOTrainer"):
        handed = _arguments(trainer, TRAINER)
        _read_assignments(run, tree, handed.get("config"))
        _read_trainer(run, handed, source, functions)
    return run


def _read_trainer(run: TrlRun, handed: Mapping[str, ast.expr], source: Path, functions: set[str]) -> None:
    """The reward, the prompts and the hook that DDPOTrainer is handed."""
    reward = handed.get("reward_function")
    run.reward, run.prompts = (_function(node, source, functions) for node in (reward, handed.get("prompt_function")))
    run.reward_text = "" if reward is None else ast.unparse(reward)
    if isinstance(reward, ast.Call) and _name(reward.func) == "aesthetic_scorer":
        # the factory of TRL's example
        run.reward = "aesthetic"
        _keep_written(run, _arguments(reward, tuple(HEAD)))
    hook = handed.get("image_samples_hook")
    if hook is not None and not (isinstance(hook, ast.Constant) and hook.value is None):
        run.unread.append(
            f"image_samples_hook {ast.unparse(hook)}: left out; the run folder has a grid of every panel, and a "
            "listener gets its images (docs/run_folder.md)"
        )


def _read_assignments(run: TrlRun, tree: ast.Module, config: ast.expr | None) -> None:
    """Fields that the script assigns to its DDPOConfig, as in `config.num_epochs = 3`."""
    if not isinstance(config, ast.Name):
        return
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Assign)):
        for target in node.targets:
            if isinstance(target, ast.Attribute) and _name(target.value) == config.id:
                _keep(run, target.attr, node.value)


def _arguments(call: ast.Call, names: Sequence[str]) -> dict[str, ast.expr]:
    """Arguments of a call by name; `names` are those that may be positional, in order."""
    return dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}


def _keep_written(run: TrlRun, written: Mapping[str, ast.expr]) -> None:
    """Keep the arguments of a call, but for attributes of the script's own arguments, whose defaults were read."""
    for name, value in written.items():
        if not isinstance(value, ast.Attribute):
            _keep(run, name, value)


def _keep(run: TrlRun, name: str, value: ast.expr) -> None:
    """Keep a literal value, or the expression of one that only running the script would tell."""
    try:
        run.set(name, ast.literal_eval(value))
    # of a key that can't be one
    except (ValueError, TypeError):
        run.fields.pop(name, None)
        run.computed[name] = ast.unparse(value)


def _is_dataclass(decorator: ast.expr) -> bool:
    return _name(decorator.func if isinstance(decorator, ast.Call) else decorator) == "dataclass"


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
