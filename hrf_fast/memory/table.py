"""The page of `hrf plan`."""

from __future__ import annotations

from collections.abc import Sequence

from hrf_fast.config.amounts import show_bytes
from hrf_fast.config.options import PRECISIONS
from hrf_fast.memory.planner import MODES, RESERVE, Plan
from hrf_fast.memory.zero import ENGINES

_TITLES = {
    "plain": "plain, ZeRO-0",
    "zero1": "ZeRO-1",
    "zero1_offload": "ZeRO-1, offload",
    "zero2": "ZeRO-2",
    "zero2_offload": "ZeRO-2, offload",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3, offload",
}


def describe(plan: Plan) -> str:
    """States per GPU, activations per mode, what fits, UNet calls, and a verdict on the configuration itself."""
    compute, micro = plan.config.compute, plan.config.samples_per_call
    side = f"{plan.config.model.name}: {plan.any_footprint.parameters / 1e6:.1f} M parameters"
    head = f"{side}; {plan.gpus} x {show_bytes(plan.memory)}, {RESERVE:.0%} of it left for what can't be counted"
    states = [["per GPU", "parameters", "gradients", "optimizer", "together", "on the host"]]
    for engine in ENGINES:
        s = plan.states(engine)
        states.append([_TITLES[engine], *map(show_bytes, (s.parameters, s.gradients, s.optimizer, s.together, s.host))])
    calls = {
        "keep": plan.calls.longest_window,
        "replay": compute.steps_per_forward,
        "checkpoint": compute.steps_per_forward,
    }
    images = {mode: micro for mode in MODES}
    images["keep"] = plan.kept_samples
    acts = [["activations", *PRECISIONS]]
    for mode in MODES:
        sizes = [show_bytes(plan.activations(mode, precision, micro)) for precision in PRECISIONS]
        acts.append([f"{mode}, {images[mode]} images x {calls[mode]} step{'s' * (calls[mode] > 1)}", *sizes])
    sizes = [show_bytes(plan.footprints[precision, False].sampling(compute.batch_size)) for precision in PRECISIONS]
    acts.append([f"sampling, {compute.batch_size} images", *sizes])
    acts.append(["trajectories", *[show_bytes(plan.trajectories)] * len(PRECISIONS)])
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
    compute, micro = plan.config.compute, plan.config.samples_per_call
    precision, sample = compute.precision, compute.batch_size
    usable = plan.memory * (1 - RESERVE)

    def need_of(mode: str) -> float:
        return plan.need(plan.engine, precision, mode, micro, sample)

    # auto takes the first that fits
    fastest = next((mode for mode in plan.modes if need_of(mode) <= usable), "checkpoint")
    mode = fastest if compute.activations == "auto" else compute.activations
    need, fits = need_of(mode), need_of(mode) <= usable
    named = f"{_TITLES[plan.engine]}, {precision}, {mode}, micro-batch {micro}, compute.batch_size {sample}"
    verdict = f"this configuration ({named}) needs {show_bytes(need)} a GPU: it {'fits' if fits else 'does not fit'}"
    ways = (plan.best(engine, p) for p in dict.fromkeys((precision, *PRECISIONS)) for engine in (plan.engine, *ENGINES))
    best = next(choice for choice in ways if choice)
    return (
        f"{verdict}\nfastest that fits: {_TITLES[best.engine]}, compute.precision={best.precision}, activations "
        f"{best.mode}, compute.micro_batch_size={best.micro_batch_size}, compute.batch_size={best.sample_batch_size}: "
        f"{show_bytes(best.bytes)} a GPU"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
