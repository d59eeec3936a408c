"""The check as a page of Markdown, and the table of it for a README; nothing is written that was not measured."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_bench.record import WHOLE
from benchmarks.kernel_bench.page import page as kernel_page
from benchmarks.kernel_bench.page import with_spread
from benchmarks.machine import describe
from benchmarks.tables import markdown_table

MARKERS = ("<!-- hrf bench gpu -->", "<!-- end of hrf bench gpu -->")
# the shape and the provider that the README names
_SHAPE, _OURS, _REPLACED = [3, 256, 256], "two-stage", ("literal eager", "torch.compile")
_HEAD = (
    "configuration",
    "trained images/s",
    "over the loop [min, max]",
    "seconds a turn [min, max]",
    "time over bare calls",
    "MFU",
    "peak GB",
)


def page(facts: dict[str, Any], parts: dict[str, dict[str, Any]], planned: list[str]) -> str:
    """All parts: what was proven and measured, and what was not.

    Args:
        planned: the names of all parts, of which some may not have run.
    """
    lines = ["# Check on a GPU", "", *_head(facts), "", "| part | state |", "|---|---|"]
    lines += [f"| {name} | {_state(parts.get(name))} |" for name in planned]
    unproven = _unproven(facts, parts, planned)
    lines += ["", "## Not proven by this run", "", *(f"- {line}" for line in unproven or ["nothing"])]
    failures = [(name, *failure) for name, part in parts.items() for failure in part.get("failed", {}).items()]
    if failures:
        lines += ["", "## Failed", "", *(f"- {name}: {test}: {reason}" for name, test, reason in failures)]
    for name, part in parts.items():
        if name.startswith("kernels") and "result" in part:
            lines += ["", f"## {name.capitalize()}", "", kernel_page(part["result"])]
    for name, part in parts.items():
        if part.get("rows"):
            lines += ["", f"## {name.capitalize()}", "", *_training(part)]
    return "\n".join(lines) + "\n"


def _head(facts: dict[str, Any]) -> list[str]:
    if facts["dry_run"]:
        return [
            "**A dry run on a CPU, with tiny sizes: every part runs. No figure on this page says anything "
            "about a GPU.**",
            "",
            describe(facts),
        ]
    software = f"driver {facts['driver']}, CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}"
    used, busy = (facts[name] or "unknown" for name in ("memory_used_by_others", "utilization"))
    shared = f"before the check its memory in use was {used} and its utilization {busy}"
    return [
        f"{describe(facts)}; {software}",
        "",
        f"A card may be shared: {shared}. Times of training below are medians of turns with the least and the most "
        "beside them; those of kernels are medians, with their 20th and 80th percentiles.",
    ]


def _state(part: dict[str, Any] | None) -> str:
    if part is None:
        return "not run"
    counts = ", ".join(f"{len(part[name])} {name}" for name in ("passed", "failed", "skipped") if part.get(name))
    reason = (part.get("skipped") if isinstance(part.get("skipped"), str) else "") or part.get("reason", "")
    return ": ".join(filter(None, (part["state"], counts, reason.splitlines()[-1] if reason else "")))


def _unproven(facts: dict[str, Any], parts: dict[str, dict[str, Any]], planned: list[str]) -> list[str]:
    """Name what a reader must not take for proven."""
    lines = missing(facts)
    lines += [f"{name}: {_state(parts.get(name))}" for name in planned if parts.get(name, {}).get("state") != WHOLE]
    for name, part in parts.items():
        skipped = part.get("skipped", {})
        if isinstance(skipped, str):
            lines.append(f"{name}: {skipped}")
        else:
            lines += [f"{name}: {test}: {reason}" for test, reason in skipped.items()]
        lines += [f"{name}: {reason}" for reason in part.get("left_out", [])]
    if facts["dry_run"]:
        # tests that were all skipped are named above
        ran = [n for n in planned if parts.get(n, {}).get("state") == WHOLE and parts[n].get("passed", True)]
        lines += [f"{name}: ran on a CPU with tiny sizes" for name in ran]
    return lines


def missing(facts: dict[str, Any]) -> list[str]:
    """A sentence for each optional package that is missing, without which tests are skipped."""
    way = "`make install-gpu gpu-check` proves what needs it"
    return [f"{name} is not installed; {way}" for name in facts["missing"]]


def _training(part: dict[str, Any]) -> list[str]:
    size = f"T {part['steps']}, {part['groups']} groups of {part['group_size']}"
    title = f"{part['title']}, random weights" if not part["tiny"] else "tiny sizes: its figures mean nothing"
    return [
        f"{title}; {size}, medians of {len(part['rows'][0]['seconds'])} turns",
        "",
        markdown_table(_HEAD, map(_row, part["rows"])),
    ]


def _row(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        f"{row['images_per_second']:.2f}",
        f"{row['speedup']:.2f}× [{min(row['speedups']):.2f}, {max(row['speedups']):.2f}]",
        f"{row['seconds_median']:.2f} [{min(row['seconds']):.2f}, {max(row['seconds']):.2f}]",
        f"{row['overhead']:.3f}" if row["overhead"] else "",
        f"{row['mfu']:.0%}",
        f"{row['peak_bytes'] / 1e9:.2f}",
    ]


def table(facts: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str:
    """The README's table: a row for each layout and for the kernels."""
    rows: list[list[str]] = []
    for name, part in parts.items():
        if part.get("rows"):
            # the fastest of ours, beside the loop that comes first
            best = max(part["rows"][1:], key=lambda row: row["images_per_second"])
            images, over, _, overhead, mfu, peak = _row(best)[1:]
            speed = f"{images} trained images/s, MFU {mfu}, time over bare calls {overhead}, peak {peak} GB"
            rows.append([f"{part['title']}: {best['name']}", speed, f"{over} the published loop"])
        for case in part.get("result", {}).get("cases", []):
            gpu = case["providers"].get(_OURS, {}).get("gpu")
            if gpu and case["shape"] == _SHAPE and case["clamp"] and gpu["cold_gb_per_s"]:
                share = f", {gpu['cold_share_of_peak']:.0%} of the card's" if gpu["cold_share_of_peak"] else ""
                speed = f"{with_spread(gpu, 'cold', '.1f', 1e3)} µs, {gpu['cold_gb_per_s']:.0f} GB/s{share}"
                times = {name: case["providers"].get(name, {}).get("gpu", {}).get("cold_ms") for name in _REPLACED}
                over = ", ".join(f"{ms / gpu['cold_ms']:.1f}× {name}" for name, ms in times.items() if ms)
                rows.append([f"{name}, loss and gradient at {case['batch']}×3×256²", speed, over])
    where = f"{facts['device']}, torch {facts['versions']['torch']}, commit {facts['commit']}"
    return markdown_table([where, "speed", "over what it replaces"], rows)
