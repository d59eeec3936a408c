"""The kernel benchmark's result as a page of Markdown; what was not measured is left empty, and the page says so."""

from __future__ import annotations

from typing import Any

from benchmarks.machine import describe
from benchmarks.tables import markdown_table

OURS = ("analytic", "two-stage", "one-program")
NO_GPU = (
    "GPU columns (times, GB/s, share of peak, launches) are empty: torch sees no GPU here, and nothing is "
    "estimated. The same command fills them on a machine with one."
)


def page(result: dict[str, Any]) -> str:
    """Everything that was counted and measured."""
    parts = [describe(result["machine"]), ", ".join(f"{name} {result[name]}" for name in ("seed", "dtype", "clock"))]
    parts += [f"left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    parts += [f"not measured, time was up: {'; '.join(result['unfinished'])}"] if result["unfinished"] else []
    parts += [_errors(result["cases"]), _counted(result["counted"])]
    on_gpu = result["machine"]["device"] != "cpu"
    parts.append(_gpu(result) if on_gpu else f"{_cpu(result['cases'])}\n\n{NO_GPU}")
    if result["unet"]:
        parts.append(_unet(result["unet"]))
    return "\n\n".join(parts)


def _errors(cases: list[dict[str, Any]]) -> str:
    worst: dict[str, dict[str, float]] = {}
    for case in cases:
        for name, values in case["providers"].items():
            for what, error in values["errors"].items():
                of_this = worst.setdefault(name, {})
                of_this[what] = max(of_this.get(what, 0.0), error)
    rows = [(name, *errors.values()) for name, errors in worst.items()]
    return f"Largest errors against float64, each of its scale ({len(cases)} cases):\n\n" + markdown_table(
        ("provider", "log-prob", "loss", "gradient"), rows
    )


def _counted(counted: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for counts in counted.values() for name in counts))
    rows: list[list[Any]] = []
    for name in names:
        counts = [by_name.get(name) or {} for by_name in counted.values()]
        rows.append([name, *(count.get(value) for count in counts for value in ("tensors", "calls"))])
    header = ["provider", *(f"{clamp}: {what}" for clamp in counted for what in ("tensors", "calls"))]
    return (
        "Traffic of a forward and a backward in float32 tensors of the batch's size, and operations or launches:\n\n"
        + markdown_table(header, rows)
        + "\n\neager: torch operations, counted here; torch.compile: inductor's own count; fused: as the tests count "
        "them, running the compiled kernels.\nanalytic works on blocks that stay in a CPU's cache: most of its "
        "traffic is not memory's."
    )


def _where(case: dict[str, Any]) -> list[str]:
    return ["×".join(map(str, case["shape"])), str(case["batch"]), "on" if case["clamp"] else "off"]


def _cpu(cases: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for case in cases for name in case["providers"]))
    others = [name for name in names if name not in OURS]
    compared = others if "analytic" in names else []
    rows = []
    for case in cases:
        values = case["providers"]
        versus = values.get("analytic", {}).get("vs", {})
        times = [values.get(name, {}).get("cpu_ms") for name in names]
        rows.append([*_where(case), *times, *(f"{versus[name]:.2f}×" for name in compared)])
    header = ["shape", "B", "clamp", *(f"{name}, ms" for name in names), *(f"analytic is, of {n}" for n in compared)]
    return "CPU time of a forward and a backward, and how many times faster ours is:\n\n" + markdown_table(header, rows)


def _gpu(result: dict[str, Any]) -> str:
    times, columns = ("cold", "warm", "launched"), ("cold_gb_per_s", "cold_share_of_peak", "warm_gb_per_s", "launches")
    rows = []
    for case in result["cases"]:
        for name, values in case["providers"].items():
            gpu = values["gpu"]
            spread = (with_spread(gpu, time, ".3g") for time in times)
            rows.append([*_where(case), name, *spread, *(gpu[column] for column in columns)])
    header = ["shape", "B", "clamp", "provider", "cold ms", "warm ms", "launched ms", "cold GB/s", "of peak"]
    header += ["warm GB/s", "launches"]
    # files of before timed torch's copy_
    name = "read_write_gb_per_s" if "read_write_gb_per_s" in result else "copy_gb_per_s"
    moved = "a kernel that reads and writes 1 GB" if name == "read_write_gb_per_s" else "a copy of 1 GB"
    peak, rate = (f"{rate:.0f}" if rate else "unknown" for rate in (result["peak_gb_per_s"], result[name]))
    return (
        "GPU time of a forward and a backward. Cold: in a CUDA graph over inputs of four times the L2 cache (64 at "
        "most); warm: a graph over one input, whose rates may be the cache's; launched: from the host, the cache "
        "emptied. Medians, with their 20th and 80th percentiles. The card's GB/s by its clock and bus, which the share "
        f"is of: {peak}; of {moved}: {rate}.\n\n{markdown_table(header, rows)}"
    )


def with_spread(gpu: dict[str, Any], time: str, spec: str, scale: float = 1.0) -> str | None:
    """A median time of a GPU and its 20th and 80th percentiles, in milliseconds times `scale`; None: not measured."""
    if (median := gpu[f"{time}_ms"]) is None:
        return None
    low, high = (f"{value * scale:{spec}}" for value in gpu[f"{time}_ms_spread"])
    return f"{median * scale:{spec}} [{low}, {high}]"


def _unet(unet: dict[str, Any]) -> str:
    where = f"{unet['model']}, {'×'.join(map(str, unet['shape']))}, B {unet['batch']}"
    shares = "; ".join(
        f"{name} {unet['ms'][name]:.3g} ms, {share:.2%} of the step" for name, share in unet["share_of_step"].items()
    )
    return f"Beside a UNet's forward and backward ({where}: {unet['ms']['unet']:.4g} ms) the loss is: {shares}"
