"""The page of `hrf plan`, and the amounts of memory that its options take."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hrf_fast.options import PRECISIONS
from hrf_fast.planner import MODES, RESERVE, Plan
from hrf_fast.states import ENGINES

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_TITLES = {
    "plain": "plain, ZeRO-0",
    "zero1": "ZeRO-1",
    "zero1_offload": "ZeRO-1, offload",
    "zero2": "ZeRO-2",
    "zero2_offload": "ZeRO-2, offload",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3, offload",
}


def parse_memory(text: str) -> int:
    """Bytes of an amount such as 80GB (10^9 each) or 24GiB (2^30).

    Raises:
        ValueError: no number, an unknown unit, or nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match.group(2).upper() if match else ""
    if match is None or unit not in _UNITS or float(match.group(1)) == 0:
        units = "KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        raise ValueError(f"--memory is {text!r}; use a number above 0 with a unit of {units}, such as 80GB or 24GiB")
    return int(float(match.group(1)) * _UNITS[unit])


def describe(plan: Plan) -> str:
    """States per GPU, activations per mode, what fits, UNet calls, and a verdict on the configuration itself."""
    train, sample = plan.config.train, plan.config.sample
    micro = train.micro_batch_size or train.group_size
    side = f"{plan.config.model.name}: {plan.parameters / 1e6:.1f} M parameters"
    head = f"{side}; {plan.gpus} x {_size(plan.memory)}, {RESERVE:.0%} of it left for what can't be counted"
    states = [["per GPU", "parameters", "gradients", "optimizer", "together", "on the host"]]
    for engine in ENGINES:
        s = plan.states(engine)
        states.append([_TITLES[engine], *map(_size, (s.parameters, s.gradients, s.optimizer, s.together, s.host))])
    calls = {
        "keep": plan.calls.longest_window,
        "replay": train.steps_per_forward,
        "checkpoint": train.steps_per_forward,
    }
    images = {mode: micro for mode in MODES}
    images["keep"] = plan.kept_samples
    acts = [["activations", *PRECISIONS]]
    for mode in MODES:
        sizes = [_size(plan.activations(mode, precision, micro)) for precision in PRECISIONS]
        acts.append([f"{mode}, {images[mode]} images x {calls[mode]} step{'s' * (calls[mode] > 1)}", *sizes])
    sizes = [_size(plan.footprints[precision, False].sampling(sample.batch_size)) for precision in PRECISIONS]
    acts.append([f"sampling, {sample.batch_size} images", *sizes])
    acts.append(["trajectories", *[_size(plan.trajectories)] * len(PRECISIONS)])
    fits = [["fits (micro-batch)", *(f"{p} {m}" for p in PRECISIONS for m in MODES)]]
    for engine in ENGINES:
        choices = [plan.choose(engine, p, m) for p in PRECISIONS for m in MODES]
        fits.append([_TITLES[engine], *(str(c.micro_batch_size) if c else "no" for c in choices)])
    return "\n\n".join([head, _table(states), _table(acts), _table(fits), _calls(plan), _verdict(plan)])


def _calls(plan: Plan) -> str:
    calls, epochs = plan.calls, plan.config.train.inner_epochs
    parts = {name: getattr(calls, name) for name in ("anchors", "search", "rollout")}
    lines = [
        f"UNet calls per iteration on all GPUs, in images: {', '.join(f'{n} {v:,.0f}' for n, v in parts.items())}; "
        f"update {calls.update * epochs:,.0f} forwards and backwards"
    ]
    rows = [["", "forwards", "backwards", "cost in forwards"]]
    for mode in MODES:
        numbers = calls.forwards(mode, epochs), calls.update * epochs, calls.evaluations(mode, epochs)
        rows.append([mode, *(f"{n:,.0f}" for n in numbers)])
    return "\n".join([*lines, _table(rows)])


def _verdict(plan: Plan) -> str:
    train, precision = plan.config.train, plan.config.train.precision
    micro, sample = train.micro_batch_size or train.group_size, plan.config.sample.batch_size
    need = plan.need(plan.engine, precision, "replay", micro, sample)
    fits = need <= plan.memory * (1 - RESERVE)
    named = f"{_TITLES[plan.engine]}, {precision}, micro-batch {micro}, sample.batch_size {sample}"
    verdict = f"this configuration ({named}) needs {_size(need)} a GPU: it {'fits' if fits else 'does not fit'}"
    ways = (plan.best(engine, p) for p in dict.fromkeys((precision, *PRECISIONS)) for engine in (plan.engine, *ENGINES))
    best = next(choice for choice in ways if choice)
    return (
        f"{verdict}\nfastest that fits: {_TITLES[best.engine]}, train.precision={best.precision}, activations "
        f"{best.mode}, train.micro_batch_size={best.micro_batch_size}, sample.batch_size={best.sample_batch_size}: "
        f"{_size(best.bytes)} a GPU"
    )


def _size(size: float) -> str:
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_:
            return f"{size / bytes_:.3g} {unit}" if size < 1000 * bytes_ else f"{size / bytes_:,.0f} {unit}"
    return f"{size / 1e3:.3g} kB" if size else "0"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
