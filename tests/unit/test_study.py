"""Studies: statistics by hand arithmetic, the file's refusals, lines that are kept apart, and the smallest real one."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from hrf_fast.cli import main
from hrf_fast.report import plots
from hrf_fast.run.lock import lock_folder
from hrf_fast.study import statistics
from hrf_fast.study.comparison import compare, measures, percent
from hrf_fast.study.outcome import trained
from hrf_fast.study.reading import read_study
from hrf_fast.study.report import _series, ends, write_report
from hrf_fast.study.results import Results, code_commit, facts, key, select
from hrf_fast.study.run import _check_counted, choices, failures, run_study
from hrf_fast.study.statistics import Point
from hrf_fast.study.workers import Workers, _begun

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


def panels(*points):
    """points: (evaluations, reward, vendi)."""
    return [
        {"iteration": i, "evaluations": e, "reward": [r, r - 1, r + 1], "vendi": [v, v - 1, v + 1], "rewards": [r, r]}
        for i, (e, r, v) in enumerate(points)
    ]


def line(*points, arm="hrf"):
    return {"arm": arm, "panels": panels(*points)}


# ---- statistics


@pytest.mark.parametrize("degrees, quantile", [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227)])
def test_the_quantile_of_t_is_that_of_the_tables(degrees, quantile):
    assert statistics.t_quantile(0.975, degrees) == pytest.approx(quantile, rel=1e-5)
    assert statistics.two_sided_p(quantile, degrees) == pytest.approx(0.05, rel=1e-4)


def test_mean_and_paired_difference_by_hand():
    # 1, 2, 3: mean 2, sd 1, half width 4.30265 / sqrt 3
    assert statistics.estimate([1.0, 2.0, 3.0]) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414, 3), abs=1e-4)
    # seed 9 has no partner; differences 1, 2, 3: t = 2 sqrt 3 with 2 degrees, p = 1 - t / sqrt(2 + t^2) = 0.07418
    result = statistics.paired({1: 2.0, 2: 4.0, 3: 6.0, 9: 50.0}, {1: 1.0, 2: 2.0, 3: 3.0})
    assert result.difference.mean == 2 and result.difference.seeds == 3
    assert result.p == pytest.approx(0.074180, abs=1e-5)
    assert statistics.paired({1: 2.0}, {1: 1.0}) == ((1.0, None, None, 1), None)
    assert statistics.paired({1: 2.0}, {2: 1.0}) is None


def test_the_ratio_of_two_means_by_hand():
    # a reference that does not vary: the interval of the mean, over it
    mean = statistics.estimate([1.0, 2.0, 3.0])
    assert statistics.ratio([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]) == (
        pytest.approx(0.5),
        pytest.approx(mean.low / 4),
        pytest.approx(mean.high / 4),
        3,
    )
    # half of it on every seed is half without doubt
    half = statistics.ratio([4.5, 5.0, 5.5], [9.0, 10.0, 11.0])
    assert half == (pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5), 3)
    # both ends are where the paired differences have a mean of 0 at the edge of their interval
    ours, theirs = [1.0, 3.0, 2.0], [4.0, 5.0, 6.0]
    found = statistics.ratio(ours, theirs)
    pairs = list(zip(ours, theirs, strict=True))
    low, high = (statistics.estimate([a - end * b for a, b in pairs]) for end in (found.low, found.high))
    assert low.low == pytest.approx(0, abs=1e-9) and high.high == pytest.approx(0, abs=1e-9)
    # a reference that may lose nothing bounds no ratio, and one that loses nothing has none
    assert statistics.ratio([1.0, 2.0], [9.0, -1.0]) == (pytest.approx(0.375), None, None, 2)
    assert statistics.ratio([1.0, 2.0], [1.0, -1.0]) is None and statistics.ratio([], []) is None


def test_holm_by_hand():
    # sorted .01 .03 .04, factors 3 2 1: .03, .06, then max(.06, .04); the order is the caller's
    assert statistics.holm([0.04, None, 0.01, 0.03]) == pytest.approx([0.06, None, 0.03, 0.06])
    assert statistics.holm([0.8, 0.9]) == [1.0, 1.0]


PATH = [Point(0, 0.0, 1.0), Point(100, 1.0, 0.96), Point(200, 2.0, 0.84), Point(300, 1.5, 0.95)]


def test_a_path_by_hand():
    # from (1, .96) to (2, .84) the floor .9 is crossed half way, at gain 1.5; the last segment crosses at 2 - .5 6/11
    assert statistics.gain_at_diversity(PATH, 0.9) == pytest.approx(2 - 0.5 * 6 / 11)
    assert statistics.gain_at_diversity(PATH[:3], 0.9) == pytest.approx(1.5)
    assert statistics.evaluations_to_gain(PATH, 0.5, 0.9) == pytest.approx(50)
    # gain 1.6 comes first at 160, where .888 is kept; the floor is back at 200 + 100 * 6/11
    assert statistics.evaluations_to_gain(PATH, 1.6, 0.9) == pytest.approx(200 + 600 / 11)
    assert statistics.evaluations_to_gain(PATH, 2.5, 0.9) is None
    # the highest gain above the floor is reached where it was found: here the two crossings differ by rounding
    path = [
        Point(0, 0.0, 1.0),
        Point(100, 0.08044581855253541, 0.9359890790654909),
        Point(200, 1.507940642520574, 0.7664169121134534),
    ]
    gain = statistics.gain_at_diversity(path, 0.9)
    assert statistics.evaluations_to_gain(path, gain, 0.9) == pytest.approx(100 + 100 * 0.2122346)
    # strips: gain 2 to .84, gain 1.5 to .95, gain 1 to .96
    assert statistics.hypervolume(PATH) == pytest.approx(2 * 0.84 + 1.5 * 0.11 + 1 * 0.01)


def test_seconds_to_a_gain_pass_as_evaluations_do():
    line = {"arm": "hrf", "panels": panels((0, 0.0, 10.0), (100, 1.0, 9.6), (200, 2.0, 9.4))}
    # a line of before panels had seconds
    assert statistics.seconds_to_gain(line, 1.5, 0.9) is None
    for panel, seconds in zip(line["panels"], (0.0, 30.0, 80.0), strict=True):
        panel["seconds"] = seconds
    # gain 1.5 is half way between the last two panels
    assert statistics.seconds_to_gain(line, 1.5, 0.9) == pytest.approx(55)
    assert statistics.seconds_to_gain(line, 0.5, 0.9) == pytest.approx(15)
    assert statistics.seconds_to_gain(line, 2.5, 0.9) is None
    assert statistics.seconds_to_gain(line, 1.5, 0.955) is None


def test_diversity_at_a_gain_counts_from_the_runs_own_start():
    # reward 3 to 5 passes 4, gain 1, half way between shares 1 and .8
    run = line((0, 3.0, 10.0), (100, 5.0, 8.0))
    assert statistics.path_of(run) == [(0, 0, 1), (100, 2, pytest.approx(0.8))]
    assert statistics.diversity_at_gain(statistics.path_of(run), 1.0) == pytest.approx(0.9)
    assert statistics.diversity_at_gain(statistics.path_of(run), 2.5) is None


def test_a_run_reaches_the_gain_of_its_best_panel():
    # -1 + (-.46 + 1) is above -.46 in float64, so a search in rewards would miss the weakest run of a study
    assert -1.0 + (-0.46 + 1.0) > -0.46
    path = statistics.path_of(line((0, -1.0, 10.0), (100, -0.46, 9.0)))
    assert statistics.diversity_at_gain(path, path[1].gain) == pytest.approx(0.9)


def test_two_arms_at_their_common_levels():
    hrf = {1: line((0, 0.0, 10.0), (100, 2.0, 9.0)), 2: line((0, 0.0, 10.0), (100, 1.0, 10.0))}
    ddpo = {1: line((0, 0.0, 10.0), (100, 4.0, 6.0)), 2: line((0, 0.0, 10.0), (50, 2.0, 8.0))}
    gain, share, evaluations, _, anyhow, area, best = (compare(hrf, ddpo, measure) for measure in measures(0.9, None))
    # at .9: 2 and 1 against 1 and 1
    assert gain.arm.mean == pytest.approx(1.5) and gain.reference.mean == pytest.approx(1.0)
    # the common gain is 1: .95 and 1 against .9 and .9
    assert share.title == "kept at gain 1" and share.result.difference.mean == pytest.approx(0.075)
    # within the floor the common gain is 1 too: 50 and 100 against 25 and 25
    assert evaluations.result.difference.mean == pytest.approx(50)
    # whatever is kept, to the gain of the second measure
    assert anyhow.title == "evaluations to gain 1" and (anyhow.arm.mean, anyhow.reference.mean) == (75, 25)
    assert area.arm.mean == pytest.approx((1.8 + 1) / 2)
    # of panels alone: 2 and 1 against the pretrained ones, since the two of DDPO are under the floor
    assert (best.arm.mean, best.reference.mean) == (1.5, 0.0)
    # a target that no pair reaches
    missed = compare(hrf, ddpo, measures(0.9, 1.5)[2])
    assert missed.result is None and missed.shared == 2
    # to 1.5 whatever is kept HRF's second run does not come: the mean of the others says nothing about the difference
    some = compare(hrf, ddpo, measures(0.9, 1.5)[4])
    assert some.title == "evaluations to gain 1.5" and some.result is None
    assert (some.arm.mean, some.reference.mean, some.arm.seeds, some.shared) == (75, 37.5, 1, 2)
    fell = {1: line((0, 0.0, 10.0), (100, -1.0, 9.0))}
    assert compare(fell, ddpo, measures(0.9, None)[1]).result is None


# ---- the file


def test_layers_merge_as_files_do(write_study):
    study = read_study(write_study(cases={"a": {"train": {"group_size": 3}}}))
    ddpo, hrf = (study.job("a", arm, 1).config for arm in study.arms)
    # another schedule drops the old one's options
    assert (ddpo.window.schedule, ddpo.window.kwargs) == ("full", {})
    assert hrf.window.kwargs == {"iterations_per_cluster": 1} and hrf.train.group_size == ddpo.train.group_size == 3
    assert [(job.name, job.config.run.seed) for job in study.jobs({})] == [
        ("a-ddpo-1", 1), ("a-hrf-1", 1), ("a-ddpo-2", 2), ("a-hrf-2", 2)
    ]  # fmt: skip
    assert len({job.configuration for job in study.jobs({})}) == 4


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"seed": [1]}, "no key 'seed' .*'seeds'"),
        ({"reference": None}, "lacks reference"),
        ({"reference": "dpo"}, "reference is 'dpo'"),
        ({"reference": ["ddpo"]}, "reference is .'ddpo'."),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]"),
        ({"keep": 90}, "keep is 90"),
        ({"tune": {"seeds": [2, 3], "learning_rates": [1e-5]}}, r"share \[2\]"),
        ({"tune": {"seeds": [3]}}, "tune is"),
        ({"arms": {"ddpo": {"run": {"seed": 3}}}}, "arms.ddpo sets run.seed"),
        (
            {"options": {"optimizer": {"learning_rate": 1}}, "tune": {"seeds": [3], "learning_rates": [1e-5]}},
            "options sets optimizer.learning_rate",
        ),
        ({"arms": {"../x": {}}}, "arms has the name"),
        ({"cases": [1]}, r"cases is \[1\]"),
        ({"arms": {"ddpo": {"train": {"group_sise": 3}}}}, "arm ddpo: .*arms.ddpo: no option train.group_sise"),
        ({"arms": {"ddpo": {}, "b": {"train": {"group_size": 1}}}}, "arm b: train.group_size is 1"),
        ({"arms": {"ddpo": {"window": {"schedule": "ful"}}}}, "arm ddpo: .*'ful'"),
        ({"arms": {"ddpo": {}, "b": {"evaluation": {"panel_size": 4}}}}, "evaluation.panel_size is 16 in arm ddpo"),
        (
            {"arms": {"ddpo": {}, "b": {"prompts": {"source": "animals"}}}},
            r"the prompts of panels are \(None, .* in arm ddpo and \('animals', .* in arm b",
        ),
        ({"options": {"evaluation": {"network": "none"}}}, "evaluation.network is 'none'"),
        ({"config": "none.yaml"}, "none.yaml does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(write_study, changes, words):
    with pytest.raises(ValueError, match=words):
        read_study(write_study(**changes)).check()


# ---- lines


def finished(job, *points, commit="c1"):
    return {**facts(job, commit), "seconds": 1.0, "reason": "the end", "panels": panels(*points)}


def test_lines_that_do_not_count_are_named_and_stay(write_study, tmp_path):
    study, results = read_study(write_study()), Results(tmp_path / "lines.jsonl")
    jobs = study.jobs({})
    whole = finished(jobs[0], (0, 0.0, 10.0))
    results.append({**facts(jobs[0], "c1"), "error": "no disk"})
    results.append(whole)
    results.append(finished(jobs[0], (0, 9.0, 10.0)))
    results.append(finished(jobs[1], (0, 0.0, 10.0), commit="c0"))
    results.append({**finished(jobs[2], (0, 0.0, 10.0)), "configuration": "other"})
    with open(results.path, "a") as file:
        file.write('{"case": "tiny", "arm": "hr')
    results.append(finished(jobs[3], (0, 0.0, 10.0)))
    records, notes = results.read()
    assert len(records) == 6 and len(notes) == 1 and "line 6" in notes[0]
    lines, apart = select(records, jobs, {"c1"})
    # the first whole line of a run wins, over a failure before it too
    assert lines[key(jobs[0])] == whole and set(lines) == {key(jobs[0]), key(jobs[3])}
    assert len(apart) == 2 and "commit c0" in apart[0] and "another configuration" in apart[1]
    assert key(jobs[1]) in select(records, jobs, {"c1", "c0"})[0]


@pytest.mark.parametrize(
    "damage",
    [
        *(
            {"panels": value}
            for value in ([], [{}], [{"evaluations": 0, "reward": [1.0], "vendi": []}], {"reward": 1}, 3)
        ),
        *({"panels": panels((0, reward, vendi))} for reward, vendi in ((float("nan"), 9.0), (0.0, 0.0))),
        {"panels": [{**panels((0, 0.0, 9.0))[0], "reward": ["0", "0", "0"]}]},
        {"panels": [{**panels((0, 0.0, 9.0))[0], "inception": None}]},
        *({name: None} for name in ("machine", "date", "seconds", "reason", "configuration")),
        {"machine": {}},
        {"panels": [{**panels((0, 0.0, 9.0))[0], "inception": [0.0, 0.0, 0.0]}]},
        {"seed": [1]},
        {"commit": ["c1"]},
        {"model": 7},
    ],
    ids=lambda damage: json.dumps(damage)[:40],
)
def test_a_line_that_is_not_whole_is_named(write_study, tmp_path, damage):
    results, job = Results(tmp_path / "lines.jsonl"), read_study(write_study()).jobs({})[0]
    results.append({**finished(job, (0, 0.0, 9.0)), **damage})
    results.append(finished(job, (0, 0.0, 9.0)))
    results.append({"case": "tiny", "arm": "hrf", "learning_rate": 1e-5, "choice": {}})
    records, notes = results.read()
    assert len(records) == 1 and "line 1 is half-written" in notes[0] and "line 3 is" in notes[1]


def test_results_that_can_not_be_written_are_named_before_anything_trains(write_study, tmp_path, monkeypatch):
    monkeypatch.setattr(Workers, "train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").touch()
    results = Results(tmp_path / "file" / "lines.jsonl")
    with pytest.raises(OSError, match="lines.jsonl can't be written"):
        run_study(read_study(write_study()), out=tmp_path / "out", results=results, jobs=1)


def test_paths_that_a_study_cannot_use_are_named(tmp_path):
    with pytest.raises(ValueError, match="a folder; use a file"):
        Results(tmp_path).read()
    for name in ("study.md", "study.png"):
        with pytest.raises(ValueError, match=f"--results is .*{name}, where the report or its plot goes"):
            Results(tmp_path / name)
    begun = tmp_path / "tiny-hrf-1.json"
    assert _begun(begun) == {"commit": "unknown"}
    for text in ('{"comm', '["commit"]', '{"commit": "c"}'):
        begun.write_text(text)
        with pytest.raises(ValueError, match=r"tiny-hrf-1.json does not say .*; delete it"):
            _begun(begun)


TRACEBACK = """loading
Traceback (most recent call last):
  File "x.py", line 1, in <module>
    f()
KeyError: 'here'"""


@pytest.mark.parametrize(
    ("code", "log", "error"),
    [
        (-signal.SIGKILL, "error: an old one\nself-check passed: fp32", "killed by SIGKILL (out of memory?)"),
        (-signal.SIGTERM, "", "killed by SIGTERM"),
        (-40, "", "killed by signal 40"),
        (1, "error: no answer of https://me:pw@host/?token=T", "no answer of https://host/?token="),
        (1, "error: no disk\nHRF_TRACEBACK=1 in the environment shows the whole traceback", "no disk"),
        (1, f"error: an old one\n{TRACEBACK}", "KeyError: 'here'"),
        (3, "self-check passed: fp32", "exit code 3; see {log}"),
        (1, "", "exit code 1; see {log}"),
    ],
)
def test_the_error_of_a_failed_run_says_what_stopped_it(write_study, tmp_path, code, log, error):
    job = read_study(write_study()).jobs({})[0]
    path = tmp_path / f"{job.name}.log"
    path.write_text(log)
    outcome = Workers(tmp_path, Results(tmp_path / "lines.jsonl"), 1, set(), None)._outcome(job, code)
    assert outcome == {"error": error.format(log=path)}


def test_the_rate_of_the_highest_gain_within_the_floor_is_chosen(write_study):
    tune = {"seeds": [7, 8], "learning_rates": [1e-5, 2e-5, 4e-5, "8e-5"]}
    study = read_study(write_study(tune=tune))
    ends = {1e-5: (1.0, 9.5), 2e-5: (2.0, 9.0), 4e-5: (9.0, 8.0), 8e-5: (9.0, 9.9)}
    # the mean over seeds decides: of 1e-5 that of 2.5 and -0.5
    more = {(1e-5, 7): 1.5, (1e-5, 8): -1.5}
    lines = {}
    for job in study.tuning_jobs():
        gain, vendi = ends[job.learning_rate]
        gain += more.get((job.learning_rate, job.seed), 0.0)
        lines[key(job)] = finished(job, (0, 0.0, 10.0), (10, gain, vendi))
        if job.learning_rate == 8e-5 and job.seed == 8:
            lines[key(job)] = {**facts(job, "c1"), "error": "diverged"}
    # 4e-5 ends below the floor, so its pretrained panel counts; 8e-5 failed on a seed
    table = {"1e-05": 1.25, "2e-05": 2.0, "4e-05": 0.0}
    assert choices(study, lines) == [
        {"case": "tiny", "arm": arm, "learning_rate": 2e-5, "choice": table} for arm in ("ddpo", "hrf")
    ]
    (job, *_) = study.jobs({("tiny", "ddpo"): 2e-5})
    assert job.name == "tiny-ddpo-1-2e-05" and job.config.optimizer.learning_rate == 2e-5


@pytest.mark.parametrize(
    "rates, shown",
    [([1e-5, 4e-5, 2e-5], ["1e-05 (lowest)", "2e-05", "4e-05 (highest)"]), ([1e-5], ["1e-05", "2e-05", "4e-05"])],
)
def test_a_learning_rate_at_an_end_of_those_tried_is_marked(write_study, rates, shown):
    study = read_study(write_study(tune={"seeds": [7], "learning_rates": rates}))
    assert [study.shown_rate(rate) for rate in (1e-5, 2e-5, 4e-5)] == shown


def test_a_tuning_run_that_failed_is_named_and_one_that_does_not_count_ends_the_study(write_study, tmp_path):
    study = read_study(write_study(tune={"seeds": [7], "learning_rates": [1e-5, 2e-5]}))
    results, (good, bad, *rest) = Results(tmp_path / "lines.jsonl"), study.tuning_jobs()
    for job in (good, *rest, *study.jobs({("tiny", arm): 1e-5 for arm in study.arms})):
        results.append(finished(job, (0, 0.0, 10.0), (10, 1.0, 10.0)))
    results.append({**facts(bad, "c1"), "error": "diverged"})
    assert "- tiny-ddpo-7-2e-05 was out of the choice: diverged" in write_report(study, results)
    lines, _ = select(results.read()[0], study.tuning_jobs(), {"c1"})
    _check_counted(study.tuning_jobs(), lines)
    del lines[key(good)]
    assert failures(study.tuning_jobs(), lines)[0] == "tiny-ddpo-7-1e-05 was out of the choice: not run yet"
    with pytest.raises(
        ValueError, match="the code has changed while the study ran, and the lines of tiny-ddpo-7-1e-05 do"
    ):
        _check_counted(study.tuning_jobs(), lines)


@pytest.mark.parametrize("without", ["tuning", "compared"])
def test_a_study_whose_code_was_edited_ends_with_an_error(write_study, tmp_path, monkeypatch, capsys, without):
    study = read_study(write_study(tune={"seeds": [7], "learning_rates": [1e-5, 2e-5]}))

    def train(workers, jobs):
        lines = {key(job): finished(job, (0, 0.0, 10.0), (10, 1.0, 10.0)) for job in jobs}
        if jobs[0].tuning == (without == "tuning"):
            del lines[key(jobs[0])]
        lines[key(jobs[1])] = {"error": "diverged"}
        return lines

    monkeypatch.setattr(Workers, "train", train)
    first = "tiny-ddpo-7-1e-05" if without == "tuning" else "tiny-ddpo-1"
    with pytest.raises(ValueError, match=f"the code has changed while the study ran, and the lines of {first}"):
        run_study(study, out=tmp_path / "out", results=Results(tmp_path / "lines.jsonl"), jobs=1)
    said = "tiny-ddpo-7-2e-05 was out of the choice: diverged" in capsys.readouterr().err
    assert said == (without == "compared")


class Ended:
    returncode = 0

    def poll(self):
        return 0


def test_a_line_is_of_the_code_that_its_run_began_with(write_study, tmp_path, monkeypatch):
    job, results = read_study(write_study()).jobs({})[0], Results(tmp_path / "lines.jsonl")
    bar = SimpleNamespace(total=0, update=lambda *_: None, set_description=lambda *_, **__: None)
    begun = {"commit": "c0", "configuration": "as it began"}
    monkeypatch.setattr(Workers, "_outcome", lambda *_: {"error": "x"})
    monkeypatch.setattr(Workers, "_start", lambda workers, job: workers._running.update({Ended(): (job, begun)}))
    Workers(tmp_path, results, 1, set(), bar).train([job])
    ((record,), _) = results.read()
    assert {name: record[name] for name in begun} == begun


def test_a_run_is_of_the_users_code_and_prompts_as_they_are(write_study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    code, prompts = tmp_path / "study_rewards.py", tmp_path / "prompts.txt"
    code.write_text("def bright(images, prompts):\n    return images.mean((1, 2, 3))\n")
    prompts.write_text("a cat\n")
    options = {"reward": {"name": "study_rewards:bright"}, "evaluation": {"prompts": str(prompts)}}
    job = read_study(write_study(options=options)).jobs({})[0]
    hashes = [job.configuration]
    for file in (code, prompts):
        file.write_text(file.read_text() + "\n# edited\n")
        hashes.append(job.configuration)
    assert len(set(hashes)) == 3
    code.unlink()
    del sys.modules["study_rewards"]
    with pytest.raises(ValueError, match="reward.name .*study_rewards"):
        read_study(write_study(options=options)).jobs({})[0].configuration  # noqa: B018


def test_a_study_is_read_as_configurations_are(write_study, tmp_path):
    path = write_study().rename(tmp_path / "my-study 2.yaml")
    path.write_text(path.read_text() + "options: {reward: {kwargs: {weight: 1e-3}}}\n")
    study = read_study(path)
    assert study.options["reward"]["kwargs"] == {"weight": 1e-3} and list(study.cases) == ["my_study_2"]
    path.write_text(path.read_text() + "seeds: [3]\n")
    with pytest.raises(ValueError, match="duplicate key"):
        read_study(path)


def test_a_folder_of_other_code_is_renamed_unless_somebody_trains_there(write_study, tmp_path, monkeypatch):
    job = read_study(write_study()).jobs({})[0]
    workers = Workers(tmp_path, Results(tmp_path / "lines.jsonl"), 1, {"older"}, None)
    started = SimpleNamespace(Popen=lambda *args, **kwargs: object(), DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr("hrf_fast.study.workers.subprocess", started)
    folder = tmp_path / job.name
    folder.mkdir()
    # lines of these commits count, but a run is of one
    (tmp_path / f"{job.name}.json").write_text(json.dumps({"commit": "older", "configuration": job.configuration}))
    held = lock_folder(folder)
    with pytest.raises(ValueError, match="is in use by process"):
        workers._start(job)
    # nor does a run of the same code begin beside itself, whose study was killed
    (tmp_path / f"{job.name}.json").write_text(
        json.dumps({"commit": code_commit(), "configuration": job.configuration})
    )
    with pytest.raises(ValueError, match="is in use by process"):
        workers._start(job)
    (tmp_path / f"{job.name}.json").write_text(json.dumps({"commit": "older", "configuration": job.configuration}))
    held.release()
    workers._start(job)
    assert not folder.exists() and (tmp_path / f"{job.name}@older").is_dir()
    assert [begun["commit"] for _, begun in workers._running.values()] == [code_commit()]


def test_seconds_before_a_panel_by_hand(tmp_path):
    interval = [1.0, 0.5, 1.5]
    panels = [{"iteration": n, "evaluations": n, "reward": interval, "rewards": [1.0]} for n in (0, 2, 4)]
    lines = [{"iteration": n, "seconds": {"rollout": 10.0 * (n + 1), "update": 0.0}} for n in range(4)]
    events = [{"iteration": 4, "event": "end", "text": "the end", "figures": {"model": 4}}]

    def seconds(lines):
        for name, records in (("evaluations", panels), ("metrics", lines), ("events", events)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return [panel.get("seconds") for panel in trained(tmp_path)["panels"]]

    assert seconds(lines) == [0.0, 30.0, 100.0]
    # a log that has lost a line does not know them
    assert seconds(lines[1:]) == [0.0, None, None]


def test_floors_have_the_digits_that_they_were_written_with():
    assert [percent(share) for share in (0.9, 0.975, 0.995)] == ["90 %", "97.5 %", "99.5 %"]


def test_a_report_from_lines(write_study, tmp_path):
    study, results = read_study(write_study(seeds=[1, 2, 3])), Results(tmp_path / "study-tiny.jsonl")
    with pytest.raises(ValueError, match="no finished run"):
        write_report(study, results)
    ends = {"ddpo": [(2.0, 8.0), (4.0, 8.0)], "hrf": [(2.0, 10.0), (4.0, 9.0)]}
    for job in study.jobs({}):
        outcome = {**facts(job, "c1"), "error": "diverged"}
        if job.seed < 3:
            outcome = finished(job, (0, 0.0, 10.0), (100, *ends[job.arm][job.seed - 1]))
        results.append(outcome)
    text = write_report(study, results)
    assert text == results.path.with_suffix(".md").read_text()
    assert results.path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # mean 3, sd sqrt 2: half width 12.706
    assert "| ddpo | 2 | +3 [-9.706, +15.71] | 80.0 %" in text
    # at gain 2: shares 1 and .95 against .8 and .9
    assert "| kept at gain 2 | hrf | 2 | 97.5 % | 85.0 % | +12.5 % [" in text
    # .025 of .15
    assert "| loss, kept at gain 2 | hrf | 2 | 0.17 | 1 |" in text
    assert "tiny-hrf-3 is not in the tables: diverged" in text
    # these lines have no seconds
    assert "| seconds to gain 1 with 90 % kept | hrf | 0 of 2 |" in text


def test_many_arms_have_a_plane_each_and_a_case_without_runs_says_so(write_study, tmp_path):
    arms = {"ddpo": {}} | {f"arm{number}": {"optimizer": {"weight_decay": number / 100}} for number in range(1, 9)}
    study = read_study(write_study(arms=arms, seeds=[1], cases={"run": {}, "later": {}}))
    results = Results(tmp_path / "study-tiny.jsonl")
    for job in study.jobs({}):
        if job.case == "run":
            results.append(finished(job, (0, 0.0, 10.0), (100, 1.0, 9.0)))
    text = write_report(study, results)
    assert "## later\n\nNo run is finished.\n" in text
    with Image.open(results.path.with_suffix(".png")) as image:
        # three rows of four planes, of 1.5 WIDTH x .4 HEIGHT a row
        assert image.size == (int(1.5 * plots.WIDTH * plots.DPI), int(3 * 0.4 * plots.HEIGHT * plots.DPI))


def test_cases_stand_two_in_a_row_on_one_scale_of_shares_in_per_cent(monkeypatch):
    monkeypatch.setattr(plots, "_png", lambda figure: figure)
    one, two = plots.Series("a", [0.0, 1.0], [1.0, 0.9]), plots.Series("a", [0.0, 50.0], [1.0, 0.4])
    cases = [("one", [("a", [one], one)]), ("two", [("a", [two], two)]), ("three", [("a", [one], one)])]
    figure = plots.paths(cases, x_label="gain", y_label="kept", level=0.9)
    figure.canvas.draw()
    planes = [axes for axes in figure.axes if axes.get_visible()]
    assert len(planes) == 3 and len({axes.get_subplotspec().rowspan.start for axes in planes}) == 2
    # 8.1 inches: a README's column of about 850 pixels shows its 9 points at 13 pixels
    assert figure.get_size_inches()[0] == pytest.approx(8.1)
    assert len({axes.get_ylim() for axes in planes}) == 1 and len({axes.get_xlim() for axes in planes}) == 2
    ticks = [label.get_text() for label in planes[0].get_yticklabels()]
    assert "80 %" in ticks and all(text.endswith(" %") for text in ticks)


def test_small_planes_of_one_case_share_its_gains_and_no_other_cases(monkeypatch):
    monkeypatch.setattr(plots, "_png", lambda figure: figure)
    arms = {
        top: [(f"arm {n}", [], plots.Series("a", [0.0, top * n], [1.0, 0.9])) for n in range(1, 10)] for top in (1, 50)
    }
    figure = plots.paths([("kilobytes", arms[1]), ("nats", arms[50])], x_label="gain", y_label="kept", level=0.9)
    limits = [axes.get_xlim() for axes in figure.axes if axes.get_visible()]
    assert len(limits) == 18 and len({*limits[:9]}) == len({*limits[9:]}) == 1
    assert limits[0][1] < 10 < 400 < limits[9][1]


def test_an_arm_ends_with_the_models_that_its_runs_restored():
    path = [(0, 0.0, 10.0), (100, 1.0, 9.0), (200, 2.0, 5.0)]
    restored = {1: line(*path) | {"learning_rate": 1.0, "model": 1}, 2: line(*path) | {"learning_rate": 1.0}}
    _, (_, seeds, gain, kept, *_, evaluations) = ends({"hrf": restored}).rows
    # gains of 1 and 2 and shares of .9 and .5; what was spent counts whole
    assert (seeds, evaluations) == ("2", "200") and gain.startswith("+1.5") and kept.startswith("70")
    # the plot's mean goes on while both have panels, and ends at the row of the table
    lines, mean = _series("hrf", restored)
    assert [path.x for path in lines] == [[0, 1, 2]] * 2
    assert mean.x == pytest.approx([0, 1, 1.5]) and mean.y == pytest.approx([1, 0.9, 0.7])


def test_the_ends_of_runs_show_how_held_out_rewards_changed():
    def held(first, end):
        run = line((0, 0.0, 10.0), (100, 1.0, 9.0))
        for panel, value in zip(run["panels"], (first, end), strict=True):
            panel["held_out"] = {"aesthetic": [value, value, value]}
        return run

    without = line((0, 0.0, 10.0), (100, 1.0, 9.0))
    titles, hrf, ddpo = ends({"hrf": {1: held(5.0, 4.0), 2: held(5.0, 5.5), 3: without}, "ddpo": {1: without}}).rows
    column = titles.index("held-out aesthetic, change")
    # changes of −1 and .5: −.25 on average, with a standard error of .75 times 12.706, the t of one degree of freedom
    assert hrf[column] == "-0.25 [-9.78, +9.28]" and ddpo[column] == ""


def test_the_mean_path_of_runs_of_other_lengths_ends_at_the_mean_of_their_ends():
    short = line((0, 0.0, 10.0), (100, 1.0, 9.0))
    long = line((0, 0.0, 10.0), (100, 2.0, 8.0), (200, 3.0, 7.0), (300, 5.0, 5.0))
    _, mean = _series("hrf", {1: short, 2: long})
    # in common: 0, then gains of 1 and 2; the ends: gains of 1 and 5, shares of .9 and .5
    assert mean.x == pytest.approx([0, 1.5, 3]) and mean.y == pytest.approx([1, 0.85, 0.7])
    # equal lengths end there anyway
    assert _series("hrf", {1: long, 2: long})[1].x == pytest.approx([0, 2, 3, 5])


# ---- the real thing

TINY = {
    "sample": {"num_inference_steps": 3},
    "train": {"iterations": 1, "group_size": 2, "groups_per_iteration": 1, "groups_per_step": 1},
    "evaluation": {"panel_size": 4},
}


@pytest.mark.slow
def test_the_smallest_study_by_its_command(write_study, tmp_path, capsys):
    # the start refuses an arm whose windows have no clusters in range only when the model is there
    broken = {"window": {"schedule": "clusters", "kwargs": {"clusters": [[2, 3]], "iterations_per_cluster": 1}}}
    file = write_study(seeds=[1], options=TINY, arms={"ddpo": {"window": {"schedule": "full"}}, "broken": broken})
    results = tmp_path / "lines.jsonl"
    words = [str(file), "--results", str(results)]
    run = ["study", "run", *words, "--jobs", "2", "--out", str(tmp_path / "out")]
    assert main(run) == 1 and "1 runs failed: tiny-broken-1" in capsys.readouterr().err
    records = {record["arm"]: record for record in map(json.loads, results.read_text().splitlines())}
    assert "window.kwargs.clusters" in records["broken"]["error"]
    record = records["ddpo"]
    assert record["commit"] == code_commit() and record["reason"] == "train.iterations is 1"
    assert record["model"] == 1
    assert [panel["seconds"] for panel in record["panels"]] == [0, record["seconds"]]
    assert [len(panel["rewards"]) for panel in record["panels"]] == [4, 4] and record["panels"][1]["vendi"][0] > 1
    # only what failed is run again
    trained = (tmp_path / "out" / "tiny-ddpo-1.log").stat().st_mtime_ns
    assert main(run) == 1 and len(results.read_text().splitlines()) == 3
    assert (tmp_path / "out" / "tiny-ddpo-1.log").stat().st_mtime_ns == trained
    assert main(["study", "report", *words]) == 0 and "| ddpo | 1 |" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_stops_the_runs_after_a_checkpoint(write_study, tmp_path):
    long = {**TINY, "train": {**TINY["train"], "iterations": 400}, "run": {"save_every": 1}}
    file, out = write_study(seeds=[1], options=long, arms={"ddpo": {"window": {"schedule": "full"}}}), tmp_path / "out"
    words = ["study", "run", str(file), "--results", str(tmp_path / "lines.jsonl"), "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "hrf_fast.cli", *words], stderr=subprocess.PIPE, text=True)
    log = out / "tiny-ddpo-1" / "metrics.jsonl"
    while not (log.is_file() and log.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "the same command resumes" in process.communicate(timeout=120)[1] and process.returncode == 130
    assert list((out / "tiny-ddpo-1" / "checkpoints").iterdir()) and not (tmp_path / "lines.jsonl").exists()


PUBLISHED = [path for path in sorted((ROOT / "configs" / "study").glob("*.yaml")) if read_study(path).results.is_file()]


def test_published_reports_are_there_to_be_compared():
    # from another current folder there are none
    assert len(PUBLISHED) >= 25


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_report_is_what_its_command_writes(path, tmp_path):
    published = read_study(path).results
    copy = Path(shutil.copy(published, tmp_path))
    assert main(["study", "report", str(path), "--results", str(copy)]) == 0
    assert copy.with_suffix(".md").read_text() == published.with_suffix(".md").read_text()


def test_commits_of_a_study_are_a_list_of_words(write_study):
    study = write_study(commits=[23245915846])
    with pytest.raises(ValueError, match="commits is .23245915846.; list those of lines that count, in quotes"):
        read_study(study)


def test_the_reason_and_the_model_are_those_of_the_newest_end(tmp_path):
    with pytest.raises(ValueError, match=r"events.jsonl has no end of the run; delete .*, and the run is made again"):
        trained(tmp_path)
    texts = ("train.iterations is 2", "asked: to stop (hrf report x)")
    ends = [{"iteration": 2, "event": "end", "text": text, "figures": {"model": n}} for n, text in enumerate(texts)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(end) + "\n" for end in ends))
    outcome = trained(tmp_path)
    assert (outcome["reason"], outcome["model"]) == (texts[1], 1)
