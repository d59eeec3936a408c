"""Held-out rewards: measured on panels, never trained on, and shown wherever a panel's figures are."""

import json

import pytest
import torch

from hrf_fast.assembly.components import build_components
from hrf_fast.cli import main
from hrf_fast.config.load import load_config
from hrf_fast.evaluation.blend import blend_lines
from hrf_fast.evaluation.diversity import mean_interval
from hrf_fast.evaluation.panel import Panel
from hrf_fast.report import figures
from hrf_fast.report.comparison import read_runs
from hrf_fast.report.figures import curves
from hrf_fast.report.tables import findings, result_table
from hrf_fast.rewards import NotFiniteError, RewardError, build_reward
from hrf_fast.run.files import intervals_of, read_log
from hrf_fast.run.progress import BarProgress
from hrf_fast.run.writers import Writer
from tests.conftest import make_policy, tiny_words
from tests.prompted import prompted  # noqa: F401 (a fixture)
from tests.runs import assert_equal_runs, assert_equal_training, panels, train, with_folder
from tests.unit.test_report import UP_BY_2, UP_BY_3, write_log, write_run

pytestmark = pytest.mark.long

HERE = "tests.unit.test_held_out"
DARKNESS = f"evaluation.rewards=[{{name: '{HERE}:darkness', kwargs: {{scale: 2}}}}]"


def darkness(images, prompts=None, *, scale=1.0):
    return scale * (1 - images.mean((1, 2, 3)))


def length(images, prompts):
    return [float(len(prompt)) for prompt in prompts]


def draws(images, prompts=None):
    return torch.rand(len(images))


def broken(images, prompts=None):
    raise RuntimeError("no network today")


def not_finite(images, prompts=None):
    return torch.full((len(images),), float("nan"))


# --- panels -----------------------------------------------------------------------------------------------------------


def test_a_panel_has_the_mean_of_a_held_out_reward_with_its_interval():
    held_out = {
        "dark": build_reward(darkness, kwargs={"scale": 2.0}),
        "bright": build_reward(lambda i, p: 1 - darkness(i)),
    }
    metrics = Panel(12, 7, 64, held_out=held_out).evaluate(make_policy(), build_reward("jpeg_compressibility"))
    values = 2 * (1 - metrics.images.double().mean((1, 2, 3)))
    value, low, high = metrics.record()["held_out"]["dark"]
    assert value == pytest.approx(float(values.mean()), abs=1e-6)
    assert (low, high) == pytest.approx(mean_interval(values, seed=7)[1:], abs=1e-6) and low < value < high
    # the brightness is one less the darkness before its scale
    assert metrics.held_out["bright"].value == pytest.approx(1 - value / 2, abs=1e-6)
    # the reward is that of a panel without
    alone = Panel(12, 7, 64).evaluate(make_policy(), build_reward("jpeg_compressibility"))
    assert alone.rewards == metrics.rewards and "held_out" not in alone.record()


def test_a_run_measures_it_and_trains_and_resumes_as_one_without(tiny_run, tmp_path):
    words = [*tiny_run, f"evaluation.rewards=[{{name: '{HERE}:darkness'}}, {{name: '{HERE}:draws'}}]"]
    for iterations in (1, 2):
        train(with_folder(words, tmp_path / "halves", f"train.iterations={iterations}"))
    train(with_folder(words, tmp_path / "at_once"))
    train(with_folder(tiny_run, tmp_path / "without"))
    assert_equal_runs(tmp_path / "halves", tmp_path / "at_once")
    # a held-out reward that draws random numbers is no part of training either
    assert_equal_training(tmp_path / "without", tmp_path / "at_once")
    first, _, last = panels(tmp_path / "at_once")
    plain = panels(tmp_path / "without")
    assert [record["rewards"] for record in plain] == [record["rewards"] for record in panels(tmp_path / "at_once")]
    assert first["held_out"].keys() == {f"{HERE}:darkness", f"{HERE}:draws"}
    # equal draws for every panel
    assert first["held_out"][f"{HERE}:draws"] == last["held_out"][f"{HERE}:draws"]
    assert first["held_out"][f"{HERE}:darkness"] != last["held_out"][f"{HERE}:darkness"]
    sources = json.loads((tmp_path / "at_once" / "sources.json").read_text())
    assert sources[f"held-out reward {HERE}:darkness"]["file"].endswith("test_held_out.py")


def test_it_is_given_the_prompts_of_a_text_to_image_model(prompted, tiny_run, tmp_path):  # noqa: F811
    (tmp_path / "words.txt").write_text("red\ngreen\n")
    words = [*tiny_run, f"prompts.source={tmp_path / 'words.txt'}", "evaluation.images_per_prompt=2"]
    words += ["evaluation.panel_size=6", f"evaluation.rewards=[{{name: '{HERE}:length'}}]"]
    train(words, reward=darkness)
    record = panels(tmp_path / "run")[-1]
    # of three prompts, two images each
    expected = sum(map(len, record["prompts"])) / 3
    assert record["held_out"][f"{HERE}:length"][0] == pytest.approx(expected)


def test_its_networks_are_on_the_main_rank_alone_where_panels_are_rewarded(tiny_run, monkeypatch):
    config = load_config([*tiny_run, DARKNESS])
    assert build_components(config)[1].panel.held_out.keys() == {f"{HERE}:darkness"}
    monkeypatch.setattr("hrf_fast.assembly.inputs.comm.is_main", lambda: False)
    assert build_components(config)[1].panel.held_out == {}


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{kwargs: {}}]", r"evaluation.rewards\[0\].name is empty"),
        ("[{name: a:b}, {name: a:b, kwargs: {c: 1}}]", r"\[0\].name is 'a:b', which evaluation.rewards names 2 times"),
        ("[{name: a:b, weight: 2}]", r"no option evaluation.rewards\[0\].weight; .* takes name, kwargs"),
        ("[{name: jpeg_compressibility}]", r"'jpeg_compressibility', which section reward has with equal arguments"),
        ("a:b", r"evaluation.rewards is 'a:b'; it is a list"),
    ],
    ids=str,
)
def test_what_can_not_be_held_out_is_refused(value, message, tiny_run):
    with pytest.raises(ValueError, match=message):
        load_config([*tiny_run, f"evaluation.rewards={value}"])


def test_a_term_of_a_sum_is_trained_on_unless_its_weight_is_0(tiny_run):
    def words(weight):
        terms = f"[{{name: jpeg_compressibility}}, {{name: aesthetic, weight: {weight}}}]"
        return [*tiny_run, "reward.name=null", f"reward.terms={terms}", "evaluation.rewards=[{name: aesthetic}]"]

    with pytest.raises(ValueError, match="'aesthetic', which section reward has with equal arguments"):
        load_config(words(0.5))
    assert load_config(words(0)).evaluation.rewards[0].name == "aesthetic"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "[{name: jpeg_incompressible}]",
            r"evaluation.rewards\[0\].name is 'jpeg_incompressible' \(did you mean 'jpeg_inc",
        ),
        (
            "[{name: clip_score}]",
            "the reward clip_score compares images with their prompts, but prompts.source is null",
        ),
        ("[{name: nowhere:f}]", r"evaluation.rewards\[0\].name is 'nowhere:f', but there is no module 'nowhere'"),
        (f"[{{name: '{HERE}:sun'}}]", rf"evaluation.rewards\[0\].name is '{HERE}:sun' but .* no callable 'sun'"),
        ("[{name: classifier, kwargs: {goal: Bag}}]", r"evaluation.rewards\[0\].kwargs.goal is unknown"),
        (
            f"[{{name: '{HERE}:darkness', kwargs: {{size: 1}}}}]",
            rf"evaluation.rewards\[0\].name is '{HERE}:darkness', which",
        ),
    ],
    ids=str,
)
def test_one_that_can_not_be_built_is_refused_before_anything_runs(value, message, tiny_run):
    with pytest.raises(ValueError, match=message):
        build_components(load_config([*tiny_run, f"evaluation.rewards={value}"]))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("broken", RewardError, rf"reward '{HERE}:broken' .*no network today"),
        ("not_finite", NotFiniteError, rf"reward '{HERE}:not_finite' returned 6 of 6 .*a panel's images"),
    ],
)
def test_one_that_fails_ends_the_run_by_its_name(name, kind, message, tiny_run):
    with pytest.raises(kind, match=f"(?s){message}"):
        train([*tiny_run, "stop.on_nan=skip", f"evaluation.rewards=[{{name: '{HERE}:{name}'}}]"])


# --- commands and pages -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *tiny_words(tiny_model, run), DARKNESS]) == 0
    return run


def test_the_card_has_its_row(finished):
    held_out = [panels(finished)[index]["held_out"][f"{HERE}:darkness"] for index in (0, -1)]
    numbers = ["{:#.4g} [{:#.4g}, {:#.4g}]".format(*interval) for interval in held_out]
    assert (
        f"| held-out reward {HERE}:darkness | {numbers[0]} | {numbers[1]} |"
        in (finished / "model" / "README.md").read_text()
    )


def test_evaluate_measures_another_one_afterwards(finished, capsys):
    assert main(["evaluate", str(finished), f"evaluation.rewards=[{{name: '{HERE}:darkness'}}]"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("held_out/"))
    record = json.loads((finished / "evaluation.json").read_text())
    before, after = (record[title]["held_out"][f"{HERE}:darkness"][0] for title in ("pretrained", "tuned"))
    # of scale 1 where the run had 2
    assert after == pytest.approx(panels(finished)[-1]["held_out"][f"{HERE}:darkness"][0] / 2)
    assert row.split()[0] == f"held_out/{HERE}:darkness" and row.endswith(f"{after - before:+#.4g}")
    assert f"{before:#.4g}" in row and f"{after:#.4g}" in row


def test_a_blend_measures_it_and_its_first_panel_is_still_that_of_the_run(finished, capsys, monkeypatch):
    # which is asked where a panel's images or rewards are others than the run's
    monkeypatch.setattr("hrf_fast.commands.blend._own_rewards", lambda *_: pytest.fail("evaluated again"))
    words = ["evaluation.network=fashion", "--most", "1", "--step", "1", "--keep", "0.01"]
    assert main(["blend", str(finished), *words, f"evaluation.rewards=[{{name: '{HERE}:draws'}}]"]) == 0
    front = read_log_of(finished / "blend" / "front.jsonl")
    assert [line["held_out"].keys() for line in front] == [{f"{HERE}:draws"}] * len(front)
    assert f"held-out {HERE}:draws 0." in capsys.readouterr().out


def read_log_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_a_blend_end_with_it():
    panel = {"alpha": 1.0, "reward": [1.0, 0, 2], "gain": [0.5, 0, 1], "share": 0.9, "held_out": {"x": [0.25, 0, 1]}}
    line, *_ = blend_lines({"panels": [panel], "alpha": 1.0, "most": 2.0, "keep": 0.5, "quality": 0})
    assert line.endswith("90.0% of the Vendi Score, held-out x 0.25")


def test_the_bar_and_the_writers_show_it(capsys):
    record = {"iteration": 3, "evaluations": 9, "reward": [1.0, 0.5, 1.5], "held_out": {"x": [0.25, 0.0, 0.5]}}
    assert intervals_of(record) == {"reward": [1.0, 0.5, 1.5], "held_out/x": [0.25, 0.0, 0.5]}
    BarProgress().panel(record, torch.rand(2, 3, 8, 8))
    assert "reward 1 [0.5, 1.5]   held_out/x 0.25 [0, 0.5]" in capsys.readouterr().err
    sent = []

    class Service(Writer):
        def send(self, iteration, values, picture, *, panel):
            sent.append(values)

    Service().panel(record, torch.rand(2, 3, 8, 8))
    assert sent == [{"panel/reward": 1.0, "panel/held_out/x": 0.25}]


def with_held_out(run, values):
    """The run with a held-out reward x of such means, each with an interval of 0.5 around it."""
    records = read_log(run / "evaluations.jsonl")
    for record, value in zip(records, values, strict=True):
        record["held_out"] = {"x": [value, value - 0.25, value + 0.25]}
    write_log(run / "evaluations.jsonl", records)
    return run


def test_a_report_has_it_as_a_column_as_curves_and_says_where_it_fell(tmp_path, monkeypatch):
    ddpo = with_held_out(write_run(tmp_path / "ddpo", "full", UP_BY_3), [2.0, 1.75, 1.0])
    hrf = with_held_out(write_run(tmp_path / "hrf", "clusters", UP_BY_2), [2.0, 2.0, 1.75])
    logs = read_runs([ddpo, hrf])
    header, *rows = result_table(logs).rows
    column = header.index("held-out x")
    assert header[column - 1 : column + 2] == ["gain", "held-out x", "Vendi Score"]
    assert [row[column] for row in rows] == ["2.000 [1.750, 2.250]", "1.000 [0.7500, 1.250]", "1.750 [1.500, 2.000]"]
    # 1.25 is under 1.75; 2 is not
    assert [line for line in findings(logs) if "held-out" in line] == [
        "DDPO: the held-out reward x fell beyond its intervals."
    ]
    drawn = []
    monkeypatch.setattr(figures, "interval_curves", lambda series, **options: drawn.append((series, options)) or b"")
    curves(logs)
    (series, options) = drawn[1]
    assert "held-out reward of the panel (x)" in options["y_label"]
    assert [(line.y, line.low) for line in series] == [
        ([2, 1.75, 1], [1.75, 1.5, 0.75]),
        ([2, 2, 1.75], [1.75, 1.75, 1.5]),
    ]


def test_runs_of_other_held_out_rewards_are_not_compared_and_a_panel_without_is_named(tmp_path):
    one, two = (write_run(tmp_path / name, later=UP_BY_2) for name in ("one", "two"))
    config = (two / "config.yaml").read_text()
    assert "  rewards: []\n" in config
    (two / "config.yaml").write_text(config.replace("  rewards: []\n", "  rewards: [{name: aesthetic}]\n"))
    with pytest.raises(ValueError, match=r"evaluation.rewards is \[\] and \[\{'name': 'aesthetic', 'kwargs': \{\}\}\]"):
        read_runs([one, two])
    records = read_log(with_held_out(one, [2.0, 2.0, 2.0]) / "evaluations.jsonl")
    # as after a resume that has left it out
    write_log(one / "evaluations.jsonl", [*records[:2], {k: v for k, v in records[2].items() if k != "held_out"}])
    (log,) = read_runs([one])
    assert log.held_out == [] and "held-out" not in str(result_table([log]).rows)


def test_a_resume_may_leave_one_out_that_fails(tiny_run, tmp_path, capsys):
    words = with_folder(tiny_run, tmp_path / "run", "evaluation.every=1")
    assert main(["train", *words, "train.iterations=1", "evaluation.rewards=[{name: jpeg_incompressibility}]"]) == 0
    assert main(["train", *words, "train.iterations=2", "evaluation.rewards=[]"]) == 0
    first, *_, last = read_log(tmp_path / "run" / "evaluations.jsonl")
    assert "held_out" in first and "held_out" not in last and last["iteration"] == 2
    (log,) = read_runs([tmp_path / "run"])
    assert log.held_out == []
