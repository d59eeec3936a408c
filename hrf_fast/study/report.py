"""Report: the arms of a study compared over training seeds, as Markdown with a plot, from its lines alone.

Left out: anything over cases. Each case is compared by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from hrf_fast.report.plots import Series, paths
from hrf_fast.report.tables import Table
from hrf_fast.run.files import HELD_OUT, intervals_of, write_atomically
from hrf_fast.study.comparison import Compared, Lines, Measure, compare, measures
from hrf_fast.study.plan import Study
from hrf_fast.study.results import Results, code_commit, key, select
from hrf_fast.study.run import choices, failures
from hrf_fast.study.statistics import Estimate, end_of, estimate, holm, path_of, reported

_QUALITY = {
    "inception": "Inception Score, share",
    "looks": "looks, share",
    "vendi_per_prompt": "Vendi per prompt, share",
}
_SHOWN: dict[str, Callable[[float], str]] = {
    "gain": lambda value: f"{value:+.4g}",
    "share": lambda value: f"{100 * value:.1f} %",
    "count": lambda value: f"{value:,.0f}",
    "area": lambda value: f"{value:.4g}",
    "ratio": lambda value: f"{value:.2f}",
}


def write_report(study: Study, results: Results, *, target: float | None = None, also: Collection[str] = ()) -> str:
    """Write study-NAME.md and study-NAME.png beside the results; returns the text.

    Args:
        target: gain that evaluations are counted to, in units of the reward; by default the highest that every run of
            both arms reached with the floor kept.
        also: commits whose lines count besides those of the code's own, or of the newest line where the code has none.

    Raises:
        ValueError: there is no whole line of the study, or the target is no gain.
    """
    if target is not None and not target > 0:
        raise ValueError(f"--target is {target}; use a gain above 0, in units of the reward")
    records, notes = results.read()
    commit, current = "", code_commit()
    for record in records:
        commit = record["commit"] if commit != current else commit
    tuning_jobs = study.tuning_jobs()
    tuning, tuned_notes = select(records, tuning_jobs, {commit, *also})
    rates = {(c["case"], c["arm"]): c["learning_rate"] for c in choices(study, tuning)}
    jobs = study.jobs(rates)
    lines, more = select(records, jobs, {commit, *also})
    notes += [*tuned_notes, *(note for note in more if note not in tuned_notes), *failures(tuning_jobs, tuning)]
    for job in jobs:
        line = lines.get(key(job), {"error": "not run yet"})
        if "error" in line:
            notes.append(f"{job.name} is not in the tables: {line['error']}")
    done = {name: line for name, line in lines.items() if "error" not in line}
    if not done:
        raise ValueError(
            f"{results.path} has no finished run of {study.path}; `hrf study run {study.path}` makes them"
            + "".join(f". {note}" for note in notes[:3])
            + (f". And {len(notes) - 3} notes more" if len(notes) > 3 else "")
        )
    text = [f"# Study {study.name}", "", *_origin(study, list(done.values())), ""]
    plotted = []
    for case in study.cases:
        arms = {
            arm: {
                seed: line for (its_case, its_arm, seed, _), line in done.items() if (its_case, its_arm) == (case, arm)
            }
            for arm in study.arms
        }
        arms = {arm: by_seed for arm, by_seed in arms.items() if by_seed}
        text += [f"## {case}", ""]
        if not arms:
            text += ["No run is finished.", ""]
            continue
        text += [*_markdown(ends(arms, study.shown_rate if rates else None)), ""]
        comparison = comparisons(arms, study.reference, measures(study.keep, target))
        if len(comparison.rows) > 1:
            text += [*_markdown(comparison), ""]
        # the reference first
        in_order = sorted(arms.items(), key=lambda item: item[0] != study.reference)
        plotted.append((case, [(arm, *_series(arm, by_seed)) for arm, by_seed in in_order]))
    image = results.path.with_suffix(".png")
    text += [f"![Gain against the share kept]({image.name})", "", *(f"- {note}" for note in notes), ""]
    write_atomically(image, paths(plotted, x_label="gain in reward", y_label="Vendi Score kept", level=study.keep))
    write_atomically(results.path.with_suffix(".md"), "\n".join(text).encode())
    return "\n".join(text)


def _origin(study: Study, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what was run, of which code and where, and how to read the tables."""
    commits = {*_all(lines, "commit"), *(line["run_commit"] for line in lines if "run_commit" in line)}
    machines = {f"{m['gpu'] or m['processor']}, {m['cores']} cores, torch {m['torch']}" for m in _all(lines, "machine")}
    return [
        f"{study.path.name}: {len(lines)} runs, commit {', '.join(sorted(commits))}, "
        f"{min(_all(lines, 'date'))} to {max(_all(lines, 'date'))}; {'; '.join(sorted(machines))}.",
        "",
        "Gains and shares are of a run's panels against its own pretrained panel. Brackets are 95 % intervals over "
        "training seeds (Student t); differences are paired by seed, p is a paired t-test's, and Holm's correction is "
        "over the arms of a row's measure. Between panels a path is linear: no model was there, nor within the first "
        "step."
        + (
            " A learning rate is marked where it is the lowest or highest of those tried."
            if study.learning_rates
            else ""
        )
        + (
            " An arm of blends ends with the chosen one, on the panel that did not choose it; its path is along alpha."
            if any("alpha" in line for line in lines)
            else ""
        ),
    ]


def _all(lines: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [line[name] for line in lines]


def ends(arms: Mapping[str, Lines], shown_rate: Callable[[float], str] | None = None) -> Table:
    """Tabulate where the runs of each arm end.

    Args:
        shown_rate: says an arm's learning rate, where the study has chosen it.
    """
    firsts = [intervals_of(reported(line)[0]) for by_seed in arms.values() for line in by_seed.values()]
    held_out = dict.fromkeys(name for first in firsts for name in first if name.startswith(HELD_OUT))
    columns = [*_QUALITY.values(), *(f"held-out {name.removeprefix(HELD_OUT)}, change" for name in held_out)]
    rows = [["arm", "learning rate", "seeds", "gain at the end", "kept", *columns, "evaluations"]]
    for arm, by_seed in arms.items():
        lines = list(by_seed.values())
        pairs = [reported(line) for line in lines]
        last = [path_of({"panels": pair})[-1] for pair in pairs]
        rate = shown_rate(lines[0]["learning_rate"]) if shown_rate else ""
        quality = []
        for name in _QUALITY:
            shares = [end[name][0] / first[name][0] for first, end in pairs if name in first and name in end]
            quality.append(_shown(estimate(shares), "share") if shares else "")
        measured = [[intervals_of(panel) for panel in pair] for pair in pairs]
        for name in held_out:
            changes = [end[name][0] - first[name][0] for first, end in measured if name in first and name in end]
            quality.append(_shown(estimate(changes), "gain") if changes else "")
        gains, kept_shares = estimate([point.gain for point in last]), estimate([point.kept for point in last])
        evaluations = _SHOWN["count"](estimate([path_of(line)[-1].evaluations for line in lines]).mean)
        rows.append(
            [arm, rate, str(len(lines)), _shown(gains, "gain"), _shown(kept_shares, "share"), *quality, evaluations]
        )
    return Table(rows)


def comparisons(arms: Mapping[str, Lines], reference: str, wanted: Sequence[Measure]) -> Table:
    """Tabulate each measure of each arm against the reference, paired over the seeds that both have.

    Of a share kept also what is lost of it, over the reference's loss.
    """
    rows = [["measure", "arm", "seeds", "mean", reference, "difference", "p", "p (Holm)"]]
    for measure in wanted:
        pairs = {
            arm: compared
            for arm in arms
            if arm != reference and (compared := compare(arms[arm], arms.get(reference, {}), measure))
        }
        corrected = holm([compared.result.p if compared.result else None for compared in pairs.values()])
        for (arm, compared), p in zip(pairs.items(), corrected, strict=True):
            rows.append([compared.title, arm, *_cells(compared, measure.kind), _p(p)])
        if measure.kind == "share":
            for arm, compared in pairs.items():
                loss = _shown(compared.loss, "ratio") if compared.loss else "-"
                rows.append([f"loss, {compared.title}", arm, _cells(compared, "share")[0], loss, "1", "", "", ""])
    return Table(rows)


def _cells(compared: Compared, kind: str) -> list[str]:
    if compared.arm is None or compared.reference is None:
        return [f"0 of {compared.shared}", "-", "-", "-", "-"]
    means = [_SHOWN[kind](one.mean) for one in (compared.arm, compared.reference)]
    if compared.result is None:
        return [f"{compared.arm.seeds} of {compared.shared}", *means, "-", "-"]
    difference = _shown(compared.result.difference, kind, signed=True)
    return [str(compared.shared), *means, difference, _p(compared.result.p)]


def _shown(value: Estimate, kind: str, *, signed: bool = False) -> str:
    def show(number: float) -> str:
        text = _SHOWN[kind](number)
        return f"+{text}" if signed and number >= 0 and not text.startswith("+") else text

    interval = "" if value.low is None or value.high is None else f" [{show(value.low)}, {show(value.high)}]"
    return show(value.mean) + interval


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.2g}"


def _markdown(table: Table) -> list[str]:
    header, *rows = table.rows
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _series(arm: str, by_seed: Lines) -> tuple[list[Series], Series]:
    """The path of each seed, and their mean.

    The mean path goes as far as all runs have panels, and then to the mean of their tuned models, which is the arm's
    row of the table; along blends it goes on to the largest α. Where runs are of different lengths, its last segment
    therefore joins panels of different iterations. What a run did after the checkpoint that it restored is in its own
    path alone.
    """
    all_paths = [path_of(line) for line in by_seed.values()]
    # a line of blends goes on behind the chosen one
    last = [len(line["panels"]) - 1 if "alpha" in line else end_of(line) for line in by_seed.values()]
    series = [Series(arm, [point.gain for point in path], [point.kept for point in path]) for path in all_paths]
    to_end = [path[: end + 1] for path, end in zip(all_paths, last, strict=True)]
    columns = list(zip(*to_end, strict=False))
    if len(set(last)) > 1:
        columns.append(tuple(path[-1] for path in to_end))
    gains = [estimate([point.gain for point in column]).mean for column in columns]
    return series, Series(arm, gains, [estimate([point.kept for point in column]).mean for column in columns])
