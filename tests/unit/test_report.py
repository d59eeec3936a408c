import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from hrf_fast.cli import main
from hrf_fast.config.load import to_yaml
from hrf_fast.config.options import (
    Config,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RewardTerm,
    RunConfig,
    StopConfig,
    TrainConfig,
    WindowConfig,
)
from hrf_fast.evaluation.grids import save_grid
from hrf_fast.report import figures
from hrf_fast.report.comparison import at_reward, gain, read_runs
from hrf_fast.report.figures import MID_RUN_GRIDS
from hrf_fast.report.page import summary_lines, write_report
from hrf_fast.report.tables import findings, result_table, run_line

START = [0.0, 1.0, 2.0, 3.0]  # rewards of the pretrained panel, mean 1.5
UP_BY_3 = [(1.0, 3.0), (3.0, 1.0)]  # (gain, Vendi Score) of the panels after the pretrained one, whose Vendi is 4
UP_BY_2 = [(1.0, 3.8), (2.0, 3.6)]


def write_run(folder, schedule="clusters", later=UP_BY_3, *, start=START, vendi=True, finished=True, **sections):
    """A run whose panel i after the first adds later[i][0] to every reward, with 100 UNet evaluations a panel."""
    folder.mkdir(parents=True)
    config = Config(window=WindowConfig(schedule=schedule), train=TrainConfig(iterations=len(later) or 1))
    config.evaluation = EvaluationConfig(panel_size=len(start))
    config.run = RunConfig(folder=str(folder))
    (folder / "config.yaml").write_text(to_yaml(replace(config, **sections)))
    panels = []
    for i, (rise, diversity) in enumerate([(0.0, 4.0), *later]):
        rewards = [value + rise for value in start]
        mean = sum(rewards) / len(rewards)
        panel = {"iteration": i, "evaluations": 100 * i, "reward": [mean, mean - 1, mean + 1]}
        if vendi:
            panel["vendi"] = [diversity, diversity - 0.5, diversity + 0.5]
        panels.append(panel | {"rewards": rewards})
        save_grid(torch.full((4, 3, 8, 8), 0.1 * i), folder / "samples" / f"iteration-{i:06d}.png")
    write_log(folder / "evaluations.jsonl", panels)
    done = range(len(later) or 1)
    numbers = {"reward_mean": 1.0, "reward_std": 0.5, "approx_kl": 1e-6, "clip_fraction": 0.1, "grad_norm": 2.0}
    seconds = {"rollout": 1.0, "update": 3.0}
    counters = [{"images": 20 * (i + 1), "evaluations": 100 * (i + 1), "seconds": seconds} for i in done]
    write_log(folder / "metrics.jsonl", [{"iteration": i, **numbers, **counters[i]} for i in done])
    if finished:
        (folder / "model").mkdir()
    return folder


def write_log(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Page(HTMLParser):
    """Text, tags and image sources of a page; fails where tags don't nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], set()
        self.policies, self.sources, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        self.policies += [value for name, value in attributes if name == "content"]
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def no_plots(monkeypatch):
    """Figures of one pixel, for tests of what is beside them."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, format="png")
    for name in ("interval_curves", "frontier", "diagnostics", "window_bars"):
        monkeypatch.setattr(figures, name, lambda *_, **__: buffer.getvalue())


@pytest.fixture
def ddpo_and_hrf(tmp_path):
    return [write_run(tmp_path / "ddpo", "full", UP_BY_3), write_run(tmp_path / "hrf", "clusters", UP_BY_2)]


def test_page_and_summary_say_who_keeps_more_diversity_at_equal_reward(ddpo_and_hrf, capsys):
    out = write_report(ddpo_and_hrf)
    assert out == ddpo_and_hrf[0] / "report.html" and capsys.readouterr() == ("", "")
    page = Page(out.read_text())
    # last panels: rewards 1.5 + 3 and 1.5 + 2; 1 and 3.6 of a Vendi Score of 4 are 25 % and 90 %
    for cell in ("1.500 [0.5000, 2.500]", "+3.000 [+3.000, +3.000]", "+2.000 [+2.000, +2.000]", "25.0 %", "90.0 %"):
        assert cell in page.text
    # level 3.5 is half of DDPO's way from 2.5 to 4.5: Vendi half-way from 3 to 1, 150 UNet evaluations
    assert {"2.000 [1.500, 2.500]", "50.0 %", "150"} <= set(page.text)
    assert any("first reaches 3.5," in text for text in page.text)
    # 3 curves, 3 grids, one on the way for each run, diagnostics of each
    assert page.tags.count("img") == 3 + 3 + 2 + 2 and "script" not in page.tags and "link" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page.policies
    # 2 iterations of 1 s + 3 s; 40 images in 8 s
    assert {"2.0 (25%)", "6.0 (75%)", "8.0", "5"} <= set(page.text)
    assert {"window.schedule", "'full'", "'clusters'"} <= set(page.text)

    lines = "\n".join(summary_lines(ddpo_and_hrf))
    assert "at equal reward, 3.5:" in lines and "no gain" not in lines and "overlap" not in lines
    assert [line.split()[0] for line in lines.splitlines() if "[+" in line] == ["DDPO", "HRF"]
    assert "They say nothing about other training seeds" in lines


def test_grids_are_of_the_panels_nearest_to_the_level_and_the_ends_follow(tmp_path, no_plots):
    # the level is 2.5; of rewards 2.6, 4 and 5.5 the first is nearest, and the end is shown too
    fast = write_run(tmp_path / "fast", "full", [(1.1, 3.9), (2.5, 3.0), (4.0, 2.0)])
    slow = write_run(tmp_path / "slow", "clusters", [(1.0, 3.9)])
    text = [data for data in Page(write_report([fast, slow]).read_text()).text if ", iteration" in data]
    assert [caption.split(":")[0] for caption in text[:5]] == [
        *("pretrained, iteration 0", "DDPO, iteration 1", "HRF, iteration 1"),
        *("DDPO, iteration 3", "HRF, iteration 1"),
    ]
    # alone there is no level: the end
    text = [data for data in Page(write_report([fast]).read_text()).text if ", iteration" in data]
    assert text[1].startswith("DDPO, iteration 3")


def test_grids_are_beside_the_first_crossing_that_the_table_reads(tmp_path, no_plots):
    # the level is 2.5: rewards of 1.5, 2.4 and 3.5 cross it after the first panel, and a collapsed one is at 2.5 again
    later = [(0.9, 3.9), (2.0, 3.0), (3.0, 2.0), (1.0, 1.0)]
    fast = write_run(tmp_path / "fast", "full", later, train=TrainConfig(iterations=9))
    write_log(fast / "events.jsonl", [{"iteration": 4, "event": "end", "text": "why", "figures": {"model": 3}}])
    slow = write_run(tmp_path / "slow", "clusters", [(0.5, 3.9), (1.0, 3.9)])
    # the pretrained panel, .1 below the level, is none of a tuned model
    far = write_run(tmp_path / "far", "dynamic", [(5.0, 3.9)])
    text = Page(write_report([fast, slow, far]).read_text()).text
    captions = [data.split(":")[0] for data in text if ", iteration" in data]
    assert captions[:4] == [
        *("pretrained, iteration 0", "DDPO, iteration 1"),
        *("HRF, iteration 2", "HRF-D, iteration 1"),
    ]
    assert any("first reaches 2.5, the smallest panel reward of the tuned models" in data for data in text)


def test_windows_and_signal_are_drawn_where_they_are_logged(tmp_path, monkeypatch, no_plots):
    drawn = {}
    monkeypatch.setattr(figures, "window_bars", lambda counts, **_: drawn.setdefault("starts", counts) and b"")
    monkeypatch.setattr(figures, "diagnostics", lambda panels, **_: drawn.setdefault("panels", panels) and b"")
    run = write_run(tmp_path / "run", train=TrainConfig(iterations=2, groups_per_iteration=4, groups_per_step=4))
    assert "<h2>Windows</h2>" not in write_report([run]).read_text() and len(drawn["panels"]) == 4
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[0] |= {"window_starts": [3, 0, 3], "window_stops": [5, 2, 5], "gradient_signal": 1.0, "gradient_noise": 8.0}
    lines[1] |= {"window_starts": [1, 1, 1], "gradient_signal": 2.0, "gradient_noise": 4.0}
    write_log(run / "metrics.jsonl", lines)
    drawn.clear()
    assert "<h2>Windows</h2>" in write_report([run]).read_text()
    # the second line is of an older version, without ends
    assert drawn["starts"] == [(1, 0, 2, 1), (1, 3, 5, 2), (2, 1, 2, 3)]
    # steps of 4 groups: 4 · 1/8, then 4 · (1 + 2)/(8 + 4)
    assert drawn["panels"][-1][1].y == [0.5, 1.0]


def test_the_signal_by_start_is_shown_where_it_was_measured(tmp_path, no_plots):
    run = write_run(tmp_path / "run")
    result = {"start": "ddpo", "groups": 24, "spread": 0.1, "equal": 0.00125, "std": 0.25}
    (run / "signal.json").write_text(json.dumps({"results": [result]}))
    assert {"ddpo", "24", "0.00125", "0.25"} <= set(Page(write_report([run]).read_text()).text)
    (run / "signal.json").write_text("{}")
    with pytest.raises(ValueError, match="signal.json is not what `hrf bench signal` writes"):
        write_report([run])


def test_a_run_in_one_line(tmp_path):
    reward = RewardConfig(name=None, terms=[RewardTerm("a", 0.5), RewardTerm("b", -1.0)])
    folder = write_run(tmp_path / "run", "dynamic", reward=reward)
    counts = "2 of 2 iterations · 40 images trained · 200 UNet evaluations"
    assert run_line(read_runs([folder])[0]) == f"HRF-D · fashion · 0.5 a + -1 b · T 40 · {counts} · seed 0 · {folder}"


def test_the_gain_is_paired_by_image(tmp_path):
    log = read_runs([write_run(tmp_path / "run")])[0]
    # the means differ by 1.5, the images by 2, 1, 1 and 2: surer than the spread of the rewards
    log.panels[-1]["rewards"] = [2.0, 2.0, 3.0, 5.0]
    value, low, high = gain(log, log)
    assert value == 1.5 and 1 <= low < value < high <= 2


def test_the_first_crossing_counts_and_levels_at_the_start_or_never_reached_have_none(tmp_path):
    log = read_runs([write_run(tmp_path / "run", later=[(1.0, 3.0), (0.5, 2.0), (3.0, 1.0)])])[0]
    # a quarter of the way from 1.5 to 2.5: 25 evaluations, Vendi 4 - 1/4
    assert at_reward(log, 1.75) == (25, (3.75, 3.25, 4.25))
    assert at_reward(log, 2.5) == (100, (3.0, 2.5, 3.5))
    assert at_reward(log, 1.5) is None and at_reward(log, 4.6) is None


def test_findings_don_t_claim_what_the_intervals_don_t_show(tmp_path):
    good = write_run(tmp_path / "good", "full", [(3.0, 3.9)])
    weak, fell = write_run(tmp_path / "weak"), write_run(tmp_path / "fell", "dynamic", [(-1.0, 4.0)])
    panels = [json.loads(line) for line in (weak / "evaluations.jsonl").read_text().splitlines()]
    # changes of +1, -1, +1, -0.8: mean 0.05
    panels[-1] |= {"rewards": [1.0, 0.0, 3.0, 2.2], "reward": [1.55, 0.5, 2.5], "vendi": [3.9, 3.4, 4.4]}
    write_log(weak / "evaluations.jsonl", [panels[0], panels[-1]])
    said = " ".join(summary_lines([good, weak]))
    assert "HRF: no gain beyond its interval." in said and "DDPO: no gain" not in said
    assert "The level of equal reward is HRF's, no gain beyond its interval: it says little." in said
    assert "the intervals of the Vendi Scores overlap" in said
    said = " ".join(summary_lines([good, fell]))
    assert "HRF-D: the reward fell." in said and "at equal reward," not in said
    assert "No comparison at equal reward: HRF-D did not end above the pretrained model." in said


@pytest.mark.usefixtures("no_plots")
def test_without_vendi_scores_the_page_has_no_diversity_and_says_so(tmp_path):
    folders = [write_run(tmp_path / name, name, vendi=False) for name in ("full", "clusters")]
    assert result_table(read_runs(folders)).rows[0] == ["", "reward", "gain", "UNet evaluations"]
    text = write_report(folders, tmp_path / "new" / "page.html").read_text()
    assert "No Vendi Score: evaluation.network" in text and "<th>Vendi" not in text
    assert Page(text).tags.count("img") == 1 + 3 + 2 + 2


def test_a_classifier_s_inception_score_gets_a_column(tmp_path):
    folder = write_run(tmp_path / "run", later=[])
    panel = json.loads((folder / "evaluations.jsonl").read_text()) | {"inception": [3.0, 2.5, 3.5]}
    write_log(folder / "evaluations.jsonl", [panel])
    assert "3.000 [2.500, 3.500]" in result_table(read_runs([folder])).rows[1]


def test_an_unfinished_run_is_labelled_also_while_it_is_extended_or_young(tmp_path):
    stopped = write_run(tmp_path / "a", finished=False)
    extended = write_run(tmp_path / "b", train=TrainConfig(iterations=9))
    young, budget = write_run(tmp_path / "c", later=[]), StopConfig(max_evaluations=200)
    for folder in (stopped, extended, young):
        assert run_line(read_runs([folder])[0]).startswith("HRF (unfinished) ·")
    assert "HRF: no panel after the pretrained one yet." in findings(read_runs([young]))
    assert read_runs([write_run(tmp_path / "d", train=TrainConfig(iterations=9), stop=budget)])[0].finished


def test_what_the_rules_have_seen_is_on_the_page_and_a_restored_model_is_the_runs_end(tmp_path, no_plots):
    # of panels of gain 1, 3 and 5 the first came back; the run was to have 9 iterations
    later = [(1.0, 3.9), (3.0, 2.0), (5.0, 1.0)]
    folder = write_run(tmp_path / "run", "full", later, train=TrainConfig(iterations=9))
    low = {"iteration": 2, "event": "diversity", "text": "vendi is 0.5 of <it>", "figures": {"kept": 0.5}}
    write_log(folder / "events.jsonl", [low, {"iteration": 3, "event": "end", "text": "why", "figures": {"model": 1}}])
    (log,) = read_runs([folder])
    assert log.finished and log.end == 2.5 and gain(log, log).value == 1.0 and log.metric("vendi").value == 3.9
    text = "\n".join(Page(write_report([folder]).read_text()).text)
    assert "DDPO, after 2 iterations: vendi is 0.5 of <it>" in text
    assert "DDPO, after 3 iterations: the end: why; the tuned model is that after 1" in text
    # an end of an earlier iteration is none: the run is being extended
    write_log(folder / "events.jsonl", [{"iteration": 2, "event": "end", "text": "why", "figures": {"model": 1}}])
    assert not read_runs([folder])[0].finished


def test_runs_of_one_method_are_told_apart_by_folder(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("s0/hrf", "s1/hrf", "s2/other")]
    folders.append(write_run(tmp_path / "d", "full"))
    names = [log.name for log in read_runs(folders)]
    assert names == [f"HRF ({folders[0]})", f"HRF ({folders[1]})", "HRF (other)", "DDPO"]


def test_names_are_the_runs_titles_in_page_and_table(tmp_path, no_plots, capsys):
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    out = tmp_path / "page.html"
    assert main(["report", *map(str, folders), "--name", "weak $x", "--name=strong", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[0] for line in lines[:2]] == ["weak $x", "strong"]
    # two tables
    for name in ("weak $x", "strong"):
        assert sum(line.startswith(f"{name}  ") for line in lines) == 2
    page = Page(out.read_text())
    assert any(text.startswith("weak $x vs strong:") for text in page.text) and "HRF" not in " ".join(page.text)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["one"], "the number of --name is 1 and that of runs 2; give a name for each run, in the order of the runs"),
        (["one", "two", "three"], "the number of --name is 3 and that of runs 2"),
        (["one", "one"], "--name 'one' is given 2 times; give every run a name of its own"),
    ],
)
def test_names_that_do_not_fit_the_runs_are_refused(tmp_path, names, message, capsys):
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    assert main(["report", *map(str, folders), *(f"--name={name}" for name in names)]) == 1
    assert f"error: {message}" in capsys.readouterr().err and not (folders[0] / "report.html").exists()


def test_what_users_name_is_escaped(tmp_path):
    name = '<script>alert("$x$ & _y")</script>'
    schedule = '_mine:<i>" onerror="x'
    folder = write_run(
        tmp_path / "<b>", schedule, model=ModelConfig(name=name), reward=RewardConfig(name="my:</style>漢$")
    )
    text = write_report([folder]).read_text()
    page = Page(text)
    assert not {"script", "b", "i"} & set(page.tags) and text.count("</style>") == 1
    # in the attributes of a figure too
    assert page.attributes == {"alt", "charset", "class", "content", "http-equiv", "lang", "name", "src"}
    assert any(name in data and "my:</style>漢$" in data and "/<b>" in data for data in page.text)


@pytest.mark.usefixtures("no_plots")
def test_a_long_run_shows_five_grids_on_the_way_and_large_grids_are_shrunk(tmp_path):
    folder = write_run(tmp_path / "run", later=[(0.1 * i, 4.0) for i in range(1, 10)])
    for iteration in (8, 9):
        save_grid(torch.zeros(1, 3, 2000, 1000), folder / "samples" / f"iteration-{iteration:06d}.png")
    page = Page(write_report([folder]).read_text())
    captions = [text for text in page.text if text.startswith(("pretrained, iteration", "HRF, iteration"))]
    # the ends, then five of the eight between them
    assert [int(text.split()[2].strip(":")) for text in captions] == [0, 9, 1, 3, 5, 6, 8]
    assert len(captions) == 2 + MID_RUN_GRIDS
    sizes = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).size for source in page.sources]
    assert (512, 1024) in sizes and (192, 384) in sizes and max(map(max, sizes)) == 1024


def test_close_starts_are_noted(tmp_path):
    folders = [write_run(tmp_path / "a", "full"), write_run(tmp_path / "b", start=[0.0, 1.0, 2.0, 3.001])]
    assert any("close but not identical" in line for line in summary_lines(folders))


def test_runs_whose_panels_differ_are_refused(tmp_path):
    first = write_run(tmp_path / "a")
    other = write_run(
        tmp_path / "b",
        evaluation=EvaluationConfig(seed=7, panel_size=4, every=5),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
    with pytest.raises(ValueError, match=r"a and .*b can't be compared.*: evaluation.seed is 1234 and 7\. Report each"):
        write_report([first, other])
    for folder, code in ((first, "1"), (write_run(tmp_path / "d"), "2")):
        (folder / "sources.json").write_text(json.dumps({"reward r:f": {"file": "r.py", "sha256": code}}))
    with pytest.raises(ValueError, match=r"reward r:f had other code in each \(r.py\)"):
        summary_lines([first, tmp_path / "d"])
    far = write_run(tmp_path / "c", start=[5.0, 6.0, 7.0, 8.0])
    with pytest.raises(ValueError, match=r"same weights: .* 6.5, outside the first's \[0.5, 2.5\]"):
        summary_lines([first, far])


def test_a_page_holds_no_credential(tmp_path):
    reward = RewardConfig(name="my:reward", kwargs={"api_key": "hidden", "url": "http://u:hidden@h"})
    text = write_report([write_run(tmp_path / "run", reward=reward)]).read_text()
    assert "my:reward" in text and "http://h" in text
    assert "api_key" not in text and "hidden" not in text


def test_folders_without_a_run_name_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="no run folder was given; name at least one"):
        write_report([])
    with pytest.raises(ValueError, match="empty is not a run folder: it has no config.yaml; give one"):
        write_report([tmp_path / "empty"])
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="run is given twice; name each run once"):
        write_report([run, tmp_path / "x" / ".." / "run"])
    with pytest.raises(ValueError, match="which is a folder; name an HTML file"):
        write_report([run], tmp_path)


def test_logs_that_lack_something_name_the_folder_and_the_way_out(tmp_path):
    run = write_run(tmp_path / "run")
    panels = (run / "evaluations.jsonl").read_text()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="run has no finished iteration in metrics.jsonl; wait .*, or resume the run"):
        write_report([run])
    (run / "events.jsonl").write_text('{"iteration": 0, "event": "end", "text": "", "figures": {"model": 0}}\n')
    with pytest.raises(ValueError, match="run ended before its first iteration, as its events.jsonl says"):
        write_report([run])
    (run / "events.jsonl").write_text('{"iteration": 1, "event": "end", "text": "", "figures": {"model": 1}}\n')
    with pytest.raises(ValueError, match="run has no finished iteration in metrics.jsonl"):
        write_report([run])
    (run / "evaluations.jsonl").write_text(panels.split("\n", 1)[1])
    with pytest.raises(ValueError, match="run has no panel of the pretrained model in .*; wait for it, or start"):
        write_report([run])
    (run / "evaluations.jsonl").unlink()
    with pytest.raises(ValueError, match="run has no panel of the pretrained model"):
        write_report([run])
    (run / "evaluations.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match="evaluations.jsonl, line 1 is not a record of a run .*; mend or delete it"):
        write_report([run])


@pytest.mark.parametrize("damage", ["rewards", "vendi", "zero", "model"])
def test_logs_that_do_not_go_together_name_the_file(tmp_path, damage):
    run = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    if damage == "rewards":
        lines[-1]["rewards"].pop()
    elif damage == "vendi":
        del lines[-1]["vendi"]
        # one more is no harm
        lines[-1]["looks"] = [1.0, 1.0, 1.0]
    elif damage == "zero":
        lines[0]["vendi"] = [0.0, 0.0, 0.0]
    else:
        (run / "events.jsonl").write_text('{"iteration": 0, "event": "end", "text": "", "figures": {}}\n')
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    name = "events.jsonl has an end whose" if damage == "model" else "evaluations.jsonl has panels of other images"
    with pytest.raises(ValueError, match=f"run/{name}.*; mend or delete"):
        write_report([run])


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("evaluations.jsonl", b'{"iteration": 1}', "it lacks 'evaluations'"),
        (
            "evaluations.jsonl",
            b'{"iteration": 1, "evaluations": 1, "reward": [NaN, 1, 2], "rewards": [1]}',
            r"its 'reward' is '\[nan, 1, 2\]', no interval",
        ),
        (
            "evaluations.jsonl",
            b'{"iteration": 1, "evaluations": 1, "reward": [1, 2], "rewards": [1]}',
            r"its 'reward' is '\[1, 2\]', no interval",
        ),
        (
            "evaluations.jsonl",
            b'{"iteration": 1, "evaluations": 1, "reward": [1, 0, 2], "rewards": [1], "vendi": 3}',
            "its 'vendi' is '3', no interval",
        ),
        ("evaluations.jsonl", b'{"iteration": 1, "rewards": "\xff"}', "'utf-8' codec can't decode"),
        ("evaluations.jsonl", b"[1]", "it is no mapping"),
        ("metrics.jsonl", b'{"iteration": 1, "images": 5, "evaluations": 5}', "it lacks 'seconds'"),
        (
            "metrics.jsonl",
            b'{"iteration": 1, "images": 5, "evaluations": 5, "seconds": {"update": "long"}}',
            "its 'seconds' is .*, no mapping of numbers",
        ),
        ("metrics.jsonl", b"\xfe\xff", "codec can't decode"),
    ],
)
def test_a_line_of_a_log_that_is_no_record_names_file_line_and_reason(tmp_path, name, line, reason, capsys):
    run = write_run(tmp_path / "run")
    with open(run / name, "ab") as file:
        file.write(line + b"\n")
    number = (run / name).read_bytes().count(b"\n")
    assert main(["report", str(run)]) == 1
    error, *_ = capsys.readouterr().err.splitlines()
    assert re.search(f"{name}, line {number} is not a record of a run \\(.*{reason}.*; mend or delete it", error)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"?")], ids=["missing", "damaged"])
def test_a_grid_that_can_t_be_read_names_the_folder_and_the_way_out(tmp_path, damage):
    run = write_run(tmp_path / "run")
    damage(run / "samples" / "iteration-000002.png")
    with pytest.raises(ValueError, match="run lacks a grid, .*iteration-000002.png: .*; copy the whole run folder"):
        write_report([run])


@pytest.mark.usefixtures("no_plots")
def test_the_command_prints_the_summary_and_then_the_path(tmp_path, capsys):
    run, out = write_run(tmp_path / "run"), tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [*summary_lines([run]), str(out)] and out.is_file()
