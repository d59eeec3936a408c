"""The page of `hrf plan`."""

from __future__ import annotations

from collections.abc import Sequence

from hrf_fast.config.amounts import show_bytes
from hrf_fast.config.rules import check_job
from hrf_fast.config.run_options import PRECISIONS
from hrf_fast.memory.planner import MODES, RESERVE, Choice, Plan
from hrf_fast.memory.zero import ENGINES
from hrf_fast.run.card import reward_name

_TITLES = {
    "plain": "plain, ZeRO-0",
    "zero1": "ZeRO-1",
    "zero1_offload": "ZeRO-1, offload",
    "zero2": "ZeRO-2",
    "zero2_offload": "ZeRO-2, offload",
    "zero3": "ZeRO-3",
    "zero3_optimizer_offload": "ZeRO-3, optimizer offloaded",
    "zero3_offload": "ZeRO-3, offload",
}


def plan_page(plan: Plan) -> str:
    """States per GPU, activations per mode, what fits, network calls, and a verdict on the configuration itself."""
    footprint, lora = plan.footprints[plan.config.compute.precision, False], plan.config.lora
    side = f"{plan.config.model.name}: {footprint.parameters / 1e6:.1f} M parameters"
    if lora.rank:
        side += f" ({sum(footprint.tensors):,} trained: LoRA of rank {lora.rank}; the others in {lora.base_precision})"
    side += f" and {show_bytes(plan.frozen)} of text encoders and decoder" if plan.frozen else ""
    if plan.copies:
        side += f" and {show_bytes(plan.copies[plan.config.compute.precision])} of the pretrained network's copy"
    head = f"{side}; {plan.gpus} x {show_bytes(plan.memory)}, {RESERVE:.0%} of it left for what can't be counted"
    tables = (_states(plan), _activations(plan), _fits(plan))
    return "\n\n".join([head, *map(_table, tables), _calls(plan), _verdict(plan)])


def _states(plan: Plan) -> list[list[str]]:
    rows = [["per GPU", "parameters", "gradients", "optimizer", "together", "on the host"]]
    for engine in ENGINES:
        s = plan.states(engine)
        rows.append([_TITLES[engine], *map(show_bytes, (s.parameters, s.gradients, s.optimizer, s.together, s.host))])
    return rows


def _activations(plan: Plan) -> list[list[str]]:
    images = plan.config.compute.images_per_call
    calls = plan.call_plan(images)
    titles = {
        "keep": f"keep, {plan.kept_samples} images x {_steps(plan.counts.longest_window)}",
        **dict.fromkeys(("replay", "checkpoint"), f"{plan.update_images(images)} images a call"),
    }
    rows = [["activations", *PRECISIONS]]
    for mode in MODES:
        sizes = [show_bytes(plan.activations(mode, precision, images)) for precision in PRECISIONS]
        rows.append([titles[mode] if mode == "keep" else f"{mode}, {titles[mode]}", *sizes])
    sizes = [show_bytes(plan.footprints[precision, False].sampling(calls.sampled)) for precision in PRECISIONS]
    rows.append([f"sampling, {calls.sampled} images a call", *sizes])
    if decoding := plan.any_footprint.decoding:
        rows.append(["decoding", *[show_bytes(decoding)] * len(PRECISIONS)])
    rows.append(["trajectories", *[show_bytes(plan.trajectories)] * len(PRECISIONS)])
    rows.append(["images, until rewarded", *[show_bytes(plan.images)] * len(PRECISIONS)])
    if plan.conditions:
        rows.append(["embeddings of prompts", *[show_bytes(plan.conditions)] * len(PRECISIONS)])
    return rows


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def _fits(plan: Plan) -> list[list[str]]:
    """yes, or the images_per_call that would fit, or no, or - for a mode that the trainer lacks there."""
    rows = [["fits", *(f"{p} {m}" for p in PRECISIONS for m in MODES)]]
    for engine in ENGINES:
        cells = [
            _fit(plan, plan.choose(engine, p, m)) if m in plan.modes(engine) else "-" for p in PRECISIONS for m in MODES
        ]
        rows.append([_TITLES[engine], *cells])
    return rows


def _fit(plan: Plan, choice: Choice | None) -> str:
    if choice is None:
        return "no"
    same = choice.images_per_call == plan.config.compute.images_per_call
    return "yes" if same else f"{choice.images_per_call} a call"


def _calls(plan: Plan) -> str:
    counts, epochs = plan.counts, plan.config.train.inner_epochs
    names = ("anchors", "search", "rollout", *(["reference"] if counts.reference else []))
    parts = {name: getattr(counts, name) for name in names}
    line = (
        f"network calls per iteration on all GPUs, in images: {', '.join(f'{n} {v:,.0f}' for n, v in parts.items())}; "
        f"update {counts.update * epochs:,.0f} forwards and backwards"
    )
    rows = [["", "forwards", "backwards", "cost in forwards"]]
    for mode in MODES:
        cost = counts.evaluations(mode, epochs) + counts.repeated(mode, epochs)
        numbers = counts.forwards(mode, epochs), counts.update * epochs, cost
        rows.append([mode, *(f"{n:,.0f}" for n in numbers)])
    return "\n".join([line, _table(rows)])


def mode_of(plan: Plan) -> str:
    """The configuration's mode of activations; for auto the first that fits."""
    compute, usable = plan.config.compute, plan.memory * (1 - RESERVE)
    if compute.activations != "auto":
        return compute.activations
    needs = {m: plan.need(plan.engine, compute.precision, m, compute.images_per_call) for m in plan.modes(plan.engine)}
    return next((mode for mode, need in needs.items() if need <= usable), "checkpoint")


def _verdict(plan: Plan) -> str:
    compute, usable = plan.config.compute, plan.memory * (1 - RESERVE)
    precision, images, mode = compute.precision, compute.images_per_call, mode_of(plan)
    need = plan.need(plan.engine, precision, mode, images)
    named = f"{_TITLES[plan.engine]}, {precision}, {mode}, compute.images_per_call {images}"
    fits = "it fits" if need <= usable else "it does not fit"
    ways = (plan.best(engine, p) for p in dict.fromkeys((precision, *PRECISIONS)) for engine in (plan.engine, *ENGINES))
    best = next(choice for choice in ways if choice)
    lines = [
        f"this configuration ({named}) needs {show_bytes(need)} a GPU: {fits}",
        f"fastest that fits: {_TITLES[best.engine]}, compute.precision={best.precision}, compute.activations="
        f"{best.mode}, compute.images_per_call={best.images_per_call}: {show_bytes(best.bytes)} a GPU",
        f"not counted: networks of the reward ({reward_name(plan.config.reward)}) and of evaluation.network "
        f"({plan.config.evaluation.network}), which each GPU holds too{_held_out(plan)}",
    ]
    try:
        check_job(plan.config, plan.gpus)
    except ValueError as error:
        lines.append(f"but `hrf train` refuses it: {error}")
    return "\n".join(lines)


def _held_out(plan: Plan) -> str:
    names = ", ".join(held.name for held in plan.config.evaluation.rewards)
    return f", and those of evaluation.rewards ({names}), which the first one holds" if names else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
