"""Evaluation: what `hrf evaluate` prints, a table of the pretrained model's metrics beside the tuned model's.

All numbers come from the record that becomes evaluation.json; nothing is sampled here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hrf_fast.evaluation.diversity import paired_difference_interval
from hrf_fast.evaluation.looks import effective_number
from hrf_fast.report.tables import Table, interval_text, percent_text
from hrf_fast.run.files import intervals_of

EXPLAINED = "docs/stopping.md#metrics-of-hrf-evaluate"
TITLES = {"vendi": "Vendi Score", "vendi_per_prompt": "Vendi Score per prompt", "inception": "Inception Score"}
"""Metrics by their title in the table, where that is not the name in evaluation.json."""
BRIEF = ("reward", "held_out", "vendi", "inception", "looks", "precision", "recall")
"""Metrics that the table has without --all; the terms of a sum are under its reward."""
BRIEF_ATTRIBUTES = 2
"""Attributes that the table has without --all: those that changed most."""
SCORES = ("vendi", "inception", "looks")
"""Beginnings of the names of metrics above 0, which are compared by the share that is kept."""


def evaluation_lines(record: Mapping[str, Any], *, everything: bool = False) -> list[str]:
    """Set an evaluation as an aligned table, with a line below it that says where its metrics are explained.

    Args:
        record: the content of evaluation.json.
        everything: whether all metrics are in the table, or those of BRIEF alone.
    """
    before, after = (_metrics(record[title]) for title in ("pretrained", "tuned"))
    rows = {name: [TITLES.get(name, name), *_cells(name, before, after, record)] for name in before}
    attributes = _attribute_rows(record)
    names = [name for first in BRIEF for name in rows if name == first or name.startswith(f"{first}/")]
    brief = [*(rows[name] for name in names), *attributes[:BRIEF_ATTRIBUTES]]
    others = [*attributes[BRIEF_ATTRIBUTES:], *(row for name, row in rows.items() if name not in names)]
    header = ["metric", "pretrained", "tuned", "difference or share kept"]
    more = f"; {len(others)} more metrics: --all" if others and not everything else ""
    return [
        *Table([header, *brief, *(others if everything else [])]).lines(),
        f"Brackets are 95 % intervals. What the metrics mean: {EXPLAINED}{more}",
    ]


def _metrics(model: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """Every metric of one model by its name, [value] or [value, low, high]."""
    terms = {f"reward/{name}": [mean] for name, mean in model.get("terms", {}).items()}
    looks = {
        f"looks of {name}": [effective_number(shares.values())] for name, shares in model.get("attributes", {}).items()
    }
    detail = model.get("detail", {})
    # both have duplicates, detail's with an interval
    return {**intervals_of(model), **terms, **looks, **detail, **model["peer"], **detail}


def _cells(
    name: str, before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], record: Mapping[str, Any]
) -> list[str]:
    """A metric of both models, and its paired difference or the share that is kept.

    The reward's difference and the shares of the panel's scores have intervals; other changes are plain numbers.
    """
    cells = [interval_text(before[name]), interval_text(after[name])]
    if name == "reward":
        rewards = (torch.tensor(record[title]["rewards"], dtype=torch.float64) for title in ("pretrained", "tuned"))
        gain = paired_difference_interval(*rewards, seed=record["evaluation"]["seed"])
        return [*cells, interval_text(gain, "+")]
    if name.startswith(SCORES):
        share = record["tuned"].get("kept", {}).get(name, [after[name][0] / before[name][0]])
        return [*cells, percent_text(share)]
    return [*cells, interval_text([after[name][0] - before[name][0]], "+")]


def _attribute_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A row for each attribute, of the value whose share of the images changed most; the largest change first."""
    changes = []
    for attribute, shares in record["pretrained"].get("attributes", {}).items():
        after = record["tuned"]["attributes"][attribute]
        moved = {value: abs(after[value] - share) for value, share in shares.items()}
        # the most common one where nothing has changed
        value = max(moved, key=lambda value: moved[value] if any(moved.values()) else shares[value])
        changes.append((f"{attribute}: {value}", shares[value], after[value]))
    changes.sort(key=lambda change: -abs(change[2] - change[1]))
    return [[title, percent_text([a]), percent_text([b]), percent_text([b - a], "+")] for title, a, b in changes]
