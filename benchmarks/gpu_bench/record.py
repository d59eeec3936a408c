"""The record of a check: one JSON file, written after every part, which a second run goes on from."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from hrf_fast.run.files import write_atomically

_ROOT = Path(__file__).parents[2]
# without them tests of tests/gpu are skipped
_OPTIONAL = ("bitsandbytes", "deepspeed", "triton", "xformers")
# a part that ended: run again only for other code or another card
WHOLE, FAILED, UNFINISHED = "whole", "failed", "unfinished"


def facts_of(device: torch.device, *, dry_run: bool) -> dict[str, Any]:
    """Describe machine, card, driver and code, and how busy the card was before the check."""
    busy: dict[str, Any] = {}
    if device.type == "cuda":
        # first: the calls below give this process a context, which takes memory of the card
        busy = {"memory_used_by_others": _smi("memory.used", device), "utilization": _smi("utilization.gpu", device)}
    facts = machine(device, torch.get_num_threads()) | busy
    facts |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "dry_run": dry_run, "changes": _changes()}
    facts |= {"missing": [name for name in _OPTIONAL if find_spec(name) is None]}
    if device.type == "cuda":
        facts |= {
            "driver": _smi("driver_version", device),
            "capability": torch.cuda.get_device_capability(device),
        }
    return facts


def _changes() -> str:
    """Hash of what differs from the commit; empty where nothing does, or without git."""
    try:
        changes = subprocess.run(["git", "diff", "HEAD"], cwd=_ROOT, capture_output=True).stdout
    except FileNotFoundError:
        return ""
    return hashlib.sha256(changes).hexdigest()[:8] if changes else ""


def _smi(field: str, device: torch.device) -> str | None:
    """A fact that nvidia-smi tells, with its unit; None without it."""
    # nvidia-smi counts the cards that CUDA_VISIBLE_DEVICES hides
    visible = dict(enumerate(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))))
    card = visible.get(device.index or 0, str(device.index or 0))
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", f"--id={card}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def _identity(facts: dict[str, Any]) -> list[Any]:
    """The facts that a result holds for."""
    names = ("device", "driver", "cuda", "hip", "commit", "changes", "dry_run", "missing")
    return [*(facts.get(name) for name in names), facts["versions"]]


class Record:
    """Facts of the machine, and the result of every part that has run, by name."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        """Go on from the file where it is of the same code, card and driver; else begin anew."""
        self.path, self.facts = path, facts
        self.parts: dict[str, dict[str, Any]] = {}
        if path.is_file():
            before = json.loads(path.read_text())
            if _identity(before["machine"]) == _identity(facts):
                self.facts, self.parts = before["machine"], before["parts"]

    def is_whole(self, name: str) -> bool:
        """Whether a part needs no other run."""
        return self.parts.get(name, {}).get("state") == WHOLE

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Keep a part's result, and write the file."""
        self.parts[name] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps({"machine": self.facts, "parts": self.parts}, indent=1).encode())
