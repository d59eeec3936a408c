"""Blends as arms of a study: what is refused, their lines by hand, and what is trained for them."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from hrf_fast.cli import main
from hrf_fast.run.lock import blending
from hrf_fast.study.comparison import compare, measures
from hrf_fast.study.outcome import blended
from hrf_fast.study.plan import BlendOf
from hrf_fast.study.reading import read_study
from hrf_fast.study.report import _series, ends
from hrf_fast.study.results import Results, facts, select
from hrf_fast.study.statistics import end_of, path_of, seconds_to_gain
from hrf_fast.study.workers import Workers
from tests.unit.test_study import TINY, Ended, finished

BLEND = {"arm": "ddpo", "most": 1.5, "step": 0.5}
FULL = {"window": {"schedule": "full"}}
ARMS = {"ddpo": FULL, "ddpo_blend": {"blend": BLEND}, "hrf": {}}


def record(alpha, gain, share, seed=7):
    return {
        "alpha": alpha,
        "seed": seed,
        "reward": [1 + gain] * 3,
        "vendi": [10 * share] * 3,
        "rewards": [1 + gain] * 4,
        "prompts": ["a cat"],
    }


def panel(iteration, evaluations):
    return {"iteration": iteration, "evaluations": evaluations, "reward": [1.0] * 3, "rewards": [1.0]}


@pytest.fixture
def folder(tmp_path):
    """A run whose gain of .4 at a share of .5 has a blend of .3 at .95."""
    run = tmp_path / "tiny-ddpo-1"
    (run / "blend").mkdir(parents=True)
    (run / "model").mkdir()
    (run / "config.yaml").touch()
    front = [record(0, 0, 1), record(1, 0.4, 0.5), record(0.5, 0.3, 0.95), record(1.5, 0.5, 0.2), record(0.2, 9, 9)]
    second = [record(0, 0, 1, seed=8), record(1, 0.35, 0.5, seed=8), record(0.5, 0.2, 0.9, seed=8)]
    write_lines(run / "blend" / "front.jsonl", [*front, *second])
    (run / "blend" / "blend.json").write_text(json.dumps({"alpha": 0.5}))
    write_lines(run / "evaluations.jsonl", [panel(0, 0), panel(2, 300), panel(3, 450)])
    write_lines(run / "metrics.jsonl", [{"iteration": n, "seconds": {"update": 2.0}} for n in range(3)])
    end = {"iteration": 3, "event": "end", "text": "", "figures": {"model": 2}}
    write_lines(run / "events.jsonl", [end])
    return run


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_line_of_blends_has_the_cost_of_the_whole_run_and_a_panel_that_did_not_choose(folder):
    line = blended(folder, BlendOf("ddpo", 0.9, 1.5, 0.5))
    assert (line["alpha"], line["model"], line["seconds"]) == (0.5, 2, 6.0)
    assert line["reason"] == "alpha 0.5 of tiny-ddpo-1 chosen"
    # along alpha, and not at .2, which is of another step
    assert [panel["alpha"] for panel in line["panels"]] == [0, 0.5, 1, 1.5]
    assert [panel["evaluations"] for panel in line["panels"]] == [450] * 4
    assert ["rewards" in panel for panel in line["panels"]] == [True, True, False, False]
    assert end_of(line) == 1 and "prompts" not in line["panels"][0]
    path = path_of(line)
    assert path[1:3] == [(450, pytest.approx(0.3), pytest.approx(0.95)), (450, pytest.approx(0.4), pytest.approx(0.5))]
    assert seconds_to_gain(line, 0.2, 0.9) == 6.0 and seconds_to_gain(line, 0.45, 0.9) is None
    (row,) = ends({"ddpo_blend": {1: line}}).rows[1:]
    assert row[2:4] == ["+0.2", "90.0 %"] and row[-1] == "450"


def test_blends_are_compared_as_trainings_are(folder):
    blend = blended(folder, BlendOf("ddpo", 0.9, 1.5, 0.5))
    trained = [{**panel(0, 0), "vendi": [10.0] * 3}, {**record(1, 0.2, 0.9), "evaluations": 5}]
    run = {"arm": "ddpo", "panels": trained}
    gain, kept, evaluations, *_ = (compare({1: blend}, {1: run}, measure) for measure in measures(0.9, None))
    # at .9 the line is between (.3, .95) and (.4, .5)
    assert gain.arm.mean == pytest.approx(0.3 + 0.1 / 9) and gain.reference.mean == pytest.approx(0.2)
    # at gain .2, two thirds of the way to .95
    assert kept.arm.mean == pytest.approx(1 - 0.05 * 2 / 3)
    assert (evaluations.arm.mean, evaluations.reference.mean) == (450, 5)


@pytest.mark.parametrize(
    ("blend", "words"),
    [
        ({**BLEND, "arm": "dpo"}, "arms.b blends 'dpo' .did you mean 'ddpo'.*; name an arm that is trained, ddpo"),
        ({**BLEND, "arm": "b"}, "arms.b blends 'b'"),
        ({**BLEND, "step": 0}, r"arms.b: step is 0; use a number from 0.01 to 1"),
        ({**BLEND, "step": 1e-9}, r"arms.b: step is 1e-09; use a number from 0.01 to 1"),
        ({**BLEND, "most": 0.5}, r"arms.b: most is 0.5; use from 1"),
        ({**BLEND, "most": 1e300}, r"arms.b: most is 1e\+300; use from 1"),
        ({**BLEND, "most": "1"}, "most and step are numbers"),
        ({"arm": "ddpo"}, "blends have arm, most, step alone"),
        ({**BLEND, "keep": 0.9}, "blends have arm, most, step alone"),
        ("ddpo", "blends have arm, most, step alone"),
    ],
)
def test_what_is_no_blend_is_refused(write_study, blend, words):
    with pytest.raises(ValueError, match=words):
        read_study(write_study(arms={"ddpo": FULL, "b": {"blend": blend}}))


def test_an_error_names_the_arm_that_is_trained(write_study):
    arms = {"b": {"blend": BLEND}, "ddpo": {"window": {"schedule": "ful"}}}
    with pytest.raises(ValueError, match="arm ddpo: window.schedule is 'ful'"):
        read_study(write_study(arms=arms)).check()
    arms = {"b": {"blend": BLEND}, "ddpo": {"optimizer": {"learning_rate": 1e-4}}}
    with pytest.raises(ValueError, match="ddpo sets optimizer.learning_rate"):
        read_study(write_study(arms=arms, tune={"seeds": [3], "learning_rates": [1e-5]}))


def test_a_blend_has_its_runs_options_alone_and_a_run_one_arm_of_blends(write_study):
    with pytest.raises(ValueError, match="blends have arm, most, step alone"):
        read_study(write_study(arms={"ddpo": FULL, "b": {"blend": BLEND, **FULL}}))
    with pytest.raises(ValueError, match="arms.c and b both blend ddpo"):
        read_study(write_study(arms={"ddpo": FULL, "b": {"blend": BLEND}, "c": {"blend": BLEND}}))
    study = read_study(write_study(arms=ARMS))
    ddpo, blend, _ = study.jobs({})[:3]
    assert list(study.arms) == list(ARMS) and blend.config == ddpo.config and blend.training == ddpo
    hashes = {ddpo.configuration, blend.configuration}
    for changed, keep in (({"most": 2.0}, 0.9), ({"step": 0.25}, 0.9), ({}, 0.8)):
        other = read_study(write_study(arms={**ARMS, "ddpo_blend": {"blend": {**BLEND, **changed}}}, keep=keep))
        hashes.add(other.jobs({})[1].configuration)
    assert len(hashes) == 5


class Instant(Workers):
    """Workers whose processes are over at once; runs leave a folder, blends nothing."""

    def __init__(self, out, results, failing=()):
        bar = SimpleNamespace(total=0, update=lambda *_: None, set_description=lambda *_, **__: None)
        super().__init__(out, results, 2, {"c1"}, bar)
        self.done, self.failing = [], failing

    def _start(self, job):
        self.done.append(job.name)
        if not job.blend and job.name not in self.failing:
            (self.out / job.name / "model").mkdir(parents=True)
            (self.out / job.name / "config.yaml").touch()
            begun = {"commit": "c1", "configuration": job.configuration}
            (self.out / f"{job.name}.json").write_text(json.dumps(begun))
        self._running[Ended()] = job, {"commit": "c1"}

    def _outcome(self, job, code):
        return {"error": "no disk"} if job.name in self.failing else {"reason": "", "seconds": 1, "panels": PANELS}


PANELS = [{"iteration": n, "evaluations": n, "reward": [n] * 3, "vendi": [10 - n] * 3} for n in range(2)]


def test_runs_come_before_their_blends_and_are_not_made_twice(write_study, tmp_path):
    tune = {"seeds": [9], "learning_rates": [1e-5, 2e-5]}
    study = read_study(write_study(arms=ARMS, tune=tune, seeds=[1]))
    workers = Instant(tmp_path / "out", Results(tmp_path / "lines.jsonl"))
    lines = workers.train(study.tuning_jobs())
    assert len(lines) == 6 and all("blend" in name for name in workers.done[4:]) and len(workers.done) == 6
    # the blends' own rate, at which their arm has no run: one is made, and it counts for nothing else
    workers.done.clear()
    rates = {("tiny", "ddpo"): 1e-5, ("tiny", "ddpo_blend"): 2e-5}
    workers.train(study.jobs(rates))
    assert workers.done == ["tiny-ddpo-1-1e-05", "tiny-ddpo-1-2e-05", "tiny-ddpo_blend-1-2e-05"]
    assert workers.bar.total == 1
    workers.done.clear()
    workers.train(study.jobs(rates))
    assert workers.done == []


def test_a_run_that_failed_is_not_tried_again_for_its_blend_and_one_without_a_folder_is(write_study, tmp_path):
    study = read_study(write_study(arms=ARMS, seeds=[1]))
    results = Results(tmp_path / "lines.jsonl")
    workers = Instant(tmp_path / "out", results, failing=["tiny-ddpo-1"])
    workers.train(study.jobs({}))
    # nor is a process begun to say so
    assert workers.done == ["tiny-ddpo-1", "tiny-hrf-1"]
    errors = {record["arm"]: record["error"] for record in results.read()[0] if "error" in record}
    assert errors["ddpo_blend"] == f"its run, tiny-ddpo-1, has failed; see {workers.out / 'tiny-ddpo-1.log'}"
    # another machine has the lines of the runs, and no folders
    lines = Results(tmp_path / "others.jsonl")
    for job in study.jobs({}):
        if not job.blend:
            lines.append(finished(job, (0, 0.0, 10.0), (1, 1.0, 9.0)))
    elsewhere = Instant(tmp_path / "elsewhere", lines)
    elsewhere.train(study.jobs({}))
    assert elsewhere.done == ["tiny-ddpo-1", "tiny-ddpo_blend-1"]


def test_a_run_of_code_whose_lines_do_not_count_is_made_again_and_its_blends_too(write_study, tmp_path):
    study, results = read_study(write_study(arms=ARMS, seeds=[1])), Results(tmp_path / "lines.jsonl")
    ddpo, blend, _ = study.jobs({})
    workers = Instant(tmp_path / "out", results)
    workers.train([ddpo])
    begun = {"commit": "c1", "configuration": ddpo.configuration}
    for record in ({**begun, "commit": "c0"}, {**begun, "configuration": "other"}):
        (workers.out / "tiny-ddpo-1.json").write_text(json.dumps(record))
        assert not workers._is_finished(ddpo)
    (workers.out / "tiny-ddpo-1.json").write_text(json.dumps(begun))
    assert workers._is_finished(ddpo)
    # code that counts has blended a run of code that does not
    line = {**finished(blend, (0, 0.0, 10.0)), "run_commit": "c0"}
    lines, (note,) = select([line], [blend], {"c1"})
    assert not lines and "of commit c0" in note and select([line], [blend], {"c1", "c0"})[0]


def test_a_process_blends_as_the_study_says_unless_another_is_at_it(write_study, tmp_path, monkeypatch):
    study = read_study(write_study(arms=ARMS, keep=0.8))
    blend, words = study.jobs({})[1], []
    started = SimpleNamespace(Popen=lambda given, **_: words.append(given), DEVNULL=subprocess.DEVNULL)
    monkeypatch.setattr("hrf_fast.study.workers.subprocess", started)
    workers = Workers(tmp_path, Results(tmp_path / "lines.jsonl"), 1, {"c1"}, None)
    run = tmp_path / "tiny-ddpo-1"
    (run / "blend").mkdir(parents=True)
    (tmp_path / "tiny-ddpo-1.json").write_text(json.dumps({"commit": "c1", "configuration": "x"}))
    workers._start(blend)
    assert words[0][3:] == ["blend", str(run), "--keep", "0.8", "--most", "1.5", "--step", "0.5"]
    assert [begun["run_commit"] for _, begun in workers._running.values()] == ["c1"]
    with blending(run / "blend"), pytest.raises(ValueError, match=r"blend is in use by process .* can't blend one run"):
        workers._start(blend)


def test_a_line_whose_blend_is_the_pretrained_model_ends_there_and_its_mean_path_goes_on(folder):
    (folder / "blend" / "blend.json").write_text(json.dumps({"alpha": 0}))
    line = blended(folder, BlendOf("ddpo", 0.9, 1.5, 0.5))
    assert line["model"] == 0 and [panel["iteration"] for panel in line["panels"]] == [0, 2, 2, 2]
    (row,) = ends({"ddpo_blend": {1: line}}).rows[1:]
    assert row[2:4] == ["+0", "100.0 %"]
    _, mean = _series("ddpo_blend", {1: line, 2: line})
    assert list(mean.x) == pytest.approx([0, 0.3, 0.4, 0.5])


def test_what_another_process_has_added_is_in_a_line_once_and_what_lacks_is_an_error(folder, tmp_path, write_study):
    front = folder / "blend" / "front.jsonl"
    front.write_text(front.read_text() + json.dumps(record(0.5, 0.3, 0.95)) + "\n")
    assert [panel["alpha"] for panel in blended(folder, BlendOf("ddpo", 0.9, 1.5, 0.5))["panels"]] == [0, 0.5, 1, 1.5]
    workers = Workers(tmp_path, Results(tmp_path / "lines.jsonl"), 1, set(), None)
    job = read_study(write_study(arms=ARMS)).jobs({})[1]
    (tmp_path / f"{job.name}.log").touch()
    assert workers._outcome(job, 0)["alpha"] == 0.5
    (folder / "blend" / "blend.json").write_text(json.dumps({"alpha": 0.75}))
    assert "KeyError: 0.75" in workers._outcome(job, 0)["error"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"alpha": 9}, "no panel is of the chosen alpha, 9"),
        ({"alpha": None}, "None"),
        ({"second_panel": []}, "a blend has 2 second panels, and here are 0"),
        ({"second_panel": [{}, {}]}, "iteration"),
        (
            {"second_panel": [{**record(0, 0, 0, seed=8), "iteration": 0, "evaluations": 1}] * 2},
            "a first panel has one of vendi, ",
        ),
    ],
)
def test_a_line_of_blends_that_is_not_whole_is_named(write_study, tmp_path, folder, damage, said):
    job = read_study(write_study(arms=ARMS)).jobs({})[1]
    results = Results(tmp_path / "lines.jsonl")
    line = {**facts(job, "c1"), **blended(folder, job.blend)}
    results.append({**line, **damage})
    results.append(line)
    records, notes = results.read()
    assert records == [line] and len(notes) == 1 and "line 1 is half-written" in notes[0] and said in notes[0]


@pytest.mark.slow
def test_the_smallest_study_with_blends_by_its_command(write_study, tmp_path, capsys):
    file, results = write_study(seeds=[1], options=TINY, arms=ARMS), tmp_path / "lines.jsonl"
    words = [str(file), "--results", str(results)]
    assert main(["study", "run", *words, "--jobs", "2", "--out", str(tmp_path / "out")]) == 0
    records = {record["arm"]: record for record in map(json.loads, results.read_text().splitlines())}
    blend, run = records["ddpo_blend"], records["ddpo"]
    assert [panel["alpha"] for panel in blend["panels"]] == [0, 0.5, 1, 1.5]
    # the tuned model, and the pretrained one, on the panel of the training
    for alpha, at in ((0, 0), (1, -1)):
        panel = next(panel for panel in blend["panels"] if panel["alpha"] == alpha)
        assert panel["reward"] == pytest.approx(run["panels"][at]["reward"])
    assert (
        blend["run_commit"] == run["commit"] and blend["panels"][0]["evaluations"] == run["panels"][-1]["evaluations"]
    )
    assert main(["study", "report", *words]) == 0 and "| ddpo_blend | 1 |" in capsys.readouterr().out
