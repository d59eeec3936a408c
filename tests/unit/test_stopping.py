"""The rules of `stop`: what each finds in lines by hand, and what a run does then."""

import math
import shutil
from pathlib import Path

import pytest
import torch

import hrf_fast
from hrf_fast.config.load import load_config
from hrf_fast.config.run_options import StopConfig
from hrf_fast.errors import NotWritten
from hrf_fast.evaluation.diversity import Interval
from hrf_fast.evaluation.kept import DRAWS, halves, kept_interval, panel_halves
from hrf_fast.evaluation.panel import Panel
from hrf_fast.evaluation.vendi import vendi_of
from hrf_fast.report.page import write_report
from hrf_fast.run.checkpoint import list_checkpoints
from hrf_fast.run.files import read_log
from hrf_fast.run.finished import finished_run
from hrf_fast.stopping import StopRules, above_floors, by_merit, check_first_panel, check_floors, unwatched_note
from tests.runs import checkpoint_weights, equal, metrics, panels, train, weights, with_folder

pytestmark = pytest.mark.long


def line(iteration, rewards=(1.0, 2.0), **kept):
    return {
        "iteration": iteration,
        "reward": [sum(rewards) / len(rewards), 0, 9],
        "rewards": list(rewards),
        "kept": {name: list(interval) for name, interval in kept.items()},
    }


def names(events):
    return [event.event for event in events]


# --- the share that is kept -------------------------------------------------------------------------------------------


def test_halves_are_of_distinct_samples_and_equal_in_every_panel():
    seen = []

    def count_and_mean(weights):
        if weights is None:
            return torch.tensor(0.0, dtype=torch.float64)
        seen.append(weights)
        return weights @ torch.arange(9.0, dtype=torch.float64)

    first, second = (halves(count_and_mean, 9, seed=3) for _ in range(2))
    drawn = torch.cat(seen[: len(seen) // 2])
    # 4 of 9, each with a weight of 1/4
    assert drawn.shape == (DRAWS, 9) and (drawn > 0).sum(1).unique().tolist() == [4]
    assert torch.allclose(drawn.sum(1), torch.ones(DRAWS, dtype=torch.float64))
    assert torch.equal(first, second) and len(first) == 1 + DRAWS


def test_the_share_is_a_ratio_and_what_both_panels_have_in_common_cancels():
    before = torch.linspace(1, 2, 1 + DRAWS, dtype=torch.float64)
    # half of it at every half: certain, however much the halves differ
    assert kept_interval(before, before / 2, 10) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_of_a_share_by_hand():
    # log ratios of the halves are spread evenly over [0, 1]: less their mean, ±0.475 at 2.5 % and 97.5 %; the ratio of
    # all is 1; of 9 samples halves of 4, whose spread counts sqrt(4/5)
    ratios = torch.cat([torch.zeros(1), torch.linspace(0, 1, DRAWS)]).double()
    found = kept_interval(torch.ones_like(ratios), ratios.exp(), 9)
    width = 0.475 * math.sqrt(4 / 5)
    assert found == pytest.approx((1, math.exp(-width), math.exp(width)), rel=1e-6)


def test_the_share_of_a_panel_that_repeats_half_of_its_images():
    features = torch.eye(16)
    repeated = features[torch.arange(16) // 2]
    kept = kept_interval(*(halves(vendi_of(f), 16, seed=0) for f in (features, repeated)), 16)
    # 16 different images, then 8 pairs
    assert kept.value == pytest.approx(0.5) and kept.low < 0.5 < kept.high < 0.8


def test_a_panel_of_few_images_has_no_share():
    features = torch.eye(7)
    assert panel_halves(features, {}, None, seed=0) == {} and set(panel_halves(torch.eye(8), {}, None, seed=0)) == {
        "vendi"
    }
    with pytest.raises(ValueError, match="count is 7"):
        halves(vendi_of(features), 7, seed=0)


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "found"),
    [
        ({"vendi": (0.5, 0.45, 0.59)}, ["diversity"]),
        # a part of the interval is above
        ({"vendi": (0.5, 0.45, 0.61)}, []),
        ({"inception": (0.4, 0.3, 0.5), "vendi": (1.1, 1.0, 1.2)}, ["quality"]),
        # another metric than stop.diversity
        ({"looks": (0.1, 0.1, 0.1)}, []),
    ],
)
def test_a_panel_has_collapsed_where_the_whole_interval_is_under_the_floor(kept, found):
    assert names(StopRules(StopConfig(), seed=0).panel(line(4, **kept))) == found


def test_an_event_has_its_figures_and_comes_when_a_rule_begins_to_hold():
    watch, low, high = StopRules(StopConfig(diversity_floor=0.7), seed=0), (0.5, 0.4, 0.6), (0.8, 0.75, 0.9)
    found = [names(watch.panel(line(i, vendi=kept))) for i, kept in enumerate((high, low, low, high))]
    assert found == [[], ["diversity"], [], []]
    (event,) = watch.panel(line(5, vendi=low))
    assert event.iteration == 5 and event.figures == {"kept": 0.5, "low": 0.4, "high": 0.6, "floor": 0.7}
    assert "vendi is 0.5 [0.4, 0.6]" in event.text and "stop.diversity_floor 0.7" in event.text


@pytest.mark.parametrize(("answer", "ends"), [("warn", False), ("stop", True), ("restore_best", True)])
def test_only_a_warning_lets_the_run_go_on_while_a_panel_is_under_the_floor(answer, ends):
    watch = StopRules(StopConfig(on_collapse=answer), seed=0)
    for iteration in (1, 2):
        watch.panel(line(iteration, vendi=(0.5, 0.4, 0.5)))
        assert bool(watch.ending) == ends


def test_patience_counts_panels_without_a_gain_beyond_its_interval():
    watch = StopRules(StopConfig(patience=2), seed=0)
    # a gain of 1 in every image is certain; then ±1 is none, and so is less
    rewards = ([1.0, 2.0], [2.0, 3.0], [3.0, 2.0], [1.0, 1.0])
    found = [names(watch.panel(line(i, values))) for i, values in enumerate(rewards)]
    assert found == [[], [], [], ["patience"]] and "iteration 1" in watch.ending
    # which ends a run whatever on_collapse is, and is off by default
    assert StopRules(StopConfig(), seed=0).panel(line(9)) == []


def test_a_panel_at_the_target_ends_the_run():
    watch = StopRules(StopConfig(target_reward=2.0), seed=0)
    found = [names(watch.panel(line(i, values))) for i, values in enumerate(([1.0, 2.9], [1.0, 3.0]))]
    assert found == [[], ["target"]] and "stop.target_reward 2" in watch.ending
    # a target may be 0, and none is the default
    assert names(StopRules(StopConfig(target_reward=0.0), seed=0).panel(line(0, [0.0, 0.0]))) == ["target"]
    assert StopRules(StopConfig(), seed=0).panel(line(0, [9.0, 9.0])) == []


UPDATE = {"ratio_max": 1.0, "clip_fraction": 0.0, "approx_kl": 0.0, "grad_norm": 1.0, "skipped_steps": 0}


def updates(watch, *records):
    return [names(watch.iteration({"iteration": i, **UPDATE, **record})) for i, record in enumerate(records)]


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [("max_ratio", "ratio_max", 3.0), ("max_clip_fraction", "clip_fraction", 0.6), ("max_kl", "approx_kl", 0.6)],
)
def test_statistics_of_the_update_have_limits(option, name, value):
    watch = StopRules(StopConfig(**{option: value / 2, "on_collapse": "stop"}), seed=0)
    assert updates(watch, {name: value / 2}, {name: value}) == [[], [name]]
    assert name in watch.ending and f"stop.{option}" in watch.ending
    assert updates(watch, {name: math.nan}, {name: 0.0}) == [[], []] and watch.ending is None
    # without optimizer steps there is nothing to judge, and 0 is no limit
    assert updates(StopRules(StopConfig(**{option: 0.0}), seed=0), {name: None}, {name: 1e9}) == [[], []]


def test_a_gradient_norm_is_judged_by_the_median_of_the_runs_own():
    # ten of norm 1, and then 11 for three iterations in a row; one spike is none
    norms = [1.0] * 10 + [11.0, 1.0, 11.0, 11.0, 11.0]
    found = updates(StopRules(StopConfig(), seed=0), *({"grad_norm": norm} for norm in norms))
    assert found == [[]] * 14 + [["grad_norm"]]
    assert updates(StopRules(StopConfig(), seed=0), *({"grad_norm": norm} for norm in norms[5:])) == [[]] * 10
    # a factor below 1 has the same ten to know first
    strict = updates(StopRules(StopConfig(max_norm_factor=0.5), seed=0), *[{"grad_norm": 1.0}] * 13)
    assert strict == [[]] * 12 + [["grad_norm"]]


def test_skipped_steps_are_an_event_and_no_end():
    watch = StopRules(StopConfig(on_collapse="stop"), seed=0)
    assert updates(watch, {"skipped_steps": 2}) == [["not_finite"]] and watch.ending is None


def test_the_best_panel_is_the_highest_above_all_floors():
    stop = StopConfig(diversity_floor=0.7)
    low, good, higher = (0.69, 0.5, 0.9), (0.7, 0.6, 0.8), (0.9, 0.8, 1.0)
    lines = [line(0, (1.0, 1.0)), line(1, (3.0, 3.0), vendi=good), line(2, (9.0, 9.0), vendi=low)]
    lines += [line(3, (3.0, 3.0), vendi=higher), line(4, (8.0, 8.0), vendi=higher, inception=(0.1, 0.1, 0.1))]
    assert [panel["iteration"] for panel in by_merit(lines, stop)] == [1, 3, 0]
    assert above_floors(lines[2], StopConfig(diversity_floor=0.0))


# --- floors that can't be judged --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shares", "message"),
    [
        ({"diversity_floor": 0.8}, set(), r"stop.diversity_floor is 0.8.*vendi.*evaluation.network.*diversity_floor=0"),
        ({"quality_floor": 0.8}, {"vendi"}, r"stop.quality_floor is 0.8.*inception"),
        ({"diversity_floor": 0.8, "diversity": "looks"}, {"vendi"}, r"diversity_floor is 0.8.*looks"),
        ({"on_collapse": "stop"}, {"inception"}, r"stop.on_collapse is stop.*vendi.*stop.diversity_floor=0"),
        # what was asked for by name is no default that goes without a word
        ({"diversity": "looks"}, {"vendi"}, r"stop.diversity is looks.*nothing would watch.*stop.diversity_floor=0"),
        ({"quality": "precision"}, {"vendi"}, "stop.quality is precision"),
        ({"diversity": "looks", "diversity_floor": 0.0}, {"vendi"}, None),
        ({"diversity": "looks"}, {"looks"}, None),
        ({}, set(), None),
        ({"on_collapse": "stop", "diversity_floor": 0.0}, set(), None),
        ({"on_collapse": "stop"}, {"vendi"}, None),
    ],
)
def test_a_floor_under_what_the_panel_does_not_measure_is_refused(options, shares, message):
    if message is None:
        check_floors(StopConfig(**options), shares)
    else:
        with pytest.raises(ValueError, match=message):
            check_floors(StopConfig(**options), shares)


@pytest.mark.parametrize(("option", "rule"), [("diversity_floor=1.0", "below 1"), ("quality_floor=1.01", "at most 1")])
def test_a_floor_that_the_pretrained_model_itself_misses_is_refused(option, rule):
    name, value = option.split("=")
    with pytest.raises(ValueError, match=rf"stop.{name} is {value}; it must be at least 0 and {rule}"):
        load_config([f"stop.{option}"])
    # its own share is 1
    assert load_config(["stop.quality_floor=1"]).stop.quality_floor == 1


def test_a_floor_that_no_panel_can_fall_under_is_refused_at_the_first_panel():
    record = {"vendi": [1.5, 1.4, 1.6], "inception": [1.1, 1.0, 1.2]}
    # 0.6 of 1.5 is 0.9, and the Vendi Score of equal images is 1
    for options in ({"diversity_floor": 0.6}, {"on_collapse": "stop"}, {"quality_floor": 0.9}):
        with pytest.raises(ValueError, match=r"stop\.\w+_floor is .* none is under 1"):
            check_first_panel(StopConfig(**options), record)
    check_first_panel(StopConfig(), record)
    check_first_panel(StopConfig(on_collapse="stop", diversity_floor=0.7), record)


def test_a_panel_that_nothing_watches_says_so():
    low, high = {"vendi": [1.5, 1.4, 1.6]}, {"vendi": [9.0, 8.0, 10.0]}
    assert "nothing watches vendi: 0.6 of the pretrained model's 1.5 is under 1" in unwatched_note(
        StopConfig(), low, {"vendi"}
    )
    assert "panel_size of at least 8" in unwatched_note(StopConfig(), high, set())
    assert unwatched_note(StopConfig(), high, {"vendi"}) == ""
    # nobody asked, or no network: `no_network_note` speaks of that
    assert unwatched_note(StopConfig(diversity_floor=0.0), low, set()) == unwatched_note(StopConfig(), {}, set()) == ""


def test_a_panel_knows_which_metrics_have_a_share():
    network = hrf_fast.vision.load.load_feature_network("evaluation.network", "fashion")
    assert Panel(8, 0, 4, network).shares == {"vendi", "inception", "precision"}
    assert Panel(7, 0, 4, network).shares == Panel(8, 0, 4).shares == set()


# --- runs -------------------------------------------------------------------------------------------------------------

# how much of the pretrained model's diversity panels 1, 2, … keep, and the rewards of panels 0, 1, …
SHARES = (0.9, 0.8, 0.5, 0.4)
REWARDS = (0.0, 2.0, 1.0, 5.0, 6.0)


class Different:
    """A network that finds all images different; what panels keep is set by `judged`."""

    name = "different"

    def features(self, images):
        return torch.eye(len(images))


def judged(monkeypatch, shares=SHARES):
    values = iter(shares)

    def kept(before, after, count):
        value = next(values)
        return Interval(value, value - 0.01, value + 0.01)

    monkeypatch.setattr("hrf_fast.run.events.kept_interval", kept)
    monkeypatch.setattr("hrf_fast.evaluation.panel.load_feature_network", lambda *_: Different())


def peaked(rewards=REWARDS):
    values = iter(rewards)

    def reward(images, prompts=None):
        # the panel has eight images, a group two
        return images.new_full((8,), next(values)) if len(images) == 8 else images.mean((1, 2, 3))

    return reward


def watched(words, folder, *more):
    options = ["evaluation.panel_size=8", "evaluation.network=fashion", "train.iterations=4", "run.keep_checkpoints=1"]
    options += ["sample.num_inference_steps=3", "train.groups_per_iteration=1", "train.group_size=2"]
    return with_folder(words, folder, *options, "stop.diversity_floor=0.6", *more)


def events(folder: Path):
    return [(record["iteration"], record["event"]) for record in read_log(folder / "events.jsonl")]


def test_a_collapse_is_a_warning_by_default(tiny_run, tmp_path, monkeypatch, capsys):
    judged(monkeypatch)
    result = train(watched(tiny_run, tmp_path / "run"), reward=peaked())
    assert result.reason == "train.iterations is 4"
    assert events(result.folder) == [(3, "diversity"), (4, "end")]
    assert [panel["kept"]["vendi"][0] for panel in panels(result.folder)[1:]] == list(SHARES)
    assert "stop.diversity_floor" in capsys.readouterr().out
    # the highest above the floor
    assert (result.best_panel["iteration"], result.last_panel["iteration"]) == (1, 4)
    assert result.panel == result.last_panel


class Leaving(Different):
    """A network whose images leave where the pretrained ones lie: all of panel 0 are there, half of 1, none of 2."""

    def __init__(self):
        self.panels = iter((0, 4, 8))

    def features(self, images):
        apart = torch.zeros(len(images))
        apart[: next(self.panels)] = 100.0
        return torch.eye(len(images)) + apart[:, None]


QUALITY = ["stop.quality=precision", "stop.quality_floor=0.4", "stop.diversity_floor=0", "stop.on_collapse=stop"]


def test_a_run_is_stopped_where_images_leave_the_pretrained_ones(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("hrf_fast.evaluation.panel.load_feature_network", lambda *_: Leaving())
    result = train(watched(tiny_run, tmp_path / "run", *QUALITY), reward=peaked())
    # half an image added to 4 and to 0 of 8, over 8 of 8
    kept = [panel["kept"]["precision"][0] for panel in panels(result.folder)[1:]]
    assert kept == pytest.approx([4.5 / 8.5, 0.5 / 8.5])
    first, *later = panels(result.folder)
    for panel in later:
        assert panel["kept"]["vendi"][0] == pytest.approx(panel["vendi"][0] / first["vendi"][0]) != 1
    # at half the interval reaches above the floor
    assert events(result.folder) == [(2, "quality"), (2, "end")]
    assert "precision is 0.0588 [" in result.reason and "under stop.quality_floor 0.4" in result.reason


def test_precision_can_not_be_judged_by_a_run_that_began_without(tiny_run, tmp_path, capsys):
    train(watched(tiny_run, tmp_path / "run", "train.iterations=1"), reward=peaked())
    with pytest.raises(ValueError, match=r"stop.quality_floor can't be judged: .*lacks the features .*=inception"):
        train(watched(tiny_run, tmp_path / "run", "train.iterations=2", *QUALITY), reward=peaked())
    train(watched(tiny_run, tmp_path / "run", "train.iterations=2", "stop.quality=precision"), reward=peaked())
    assert "quality can't be judged: " in capsys.readouterr().out


def test_a_floor_under_precision_needs_a_network_and_no_classes():
    check_floors(StopConfig(quality="precision", quality_floor=0.8), {"vendi", "precision"})
    with pytest.raises(ValueError, match="quality_floor is 0.8, a share of the pretrained model's precision"):
        check_floors(StopConfig(quality="precision", quality_floor=0.8), set())


def test_a_run_that_ends_at_the_pretrained_model_goes_on_where_its_rule_changes(tiny_run, tmp_path):
    words = [*tiny_run, "stop.target_reward=-1e9"]
    for _ in range(2):
        # by the same command it ends again
        assert "stop.target_reward" in train(words).reason and not metrics(tmp_path / "run")
    with pytest.raises(ValueError, match="ended before its first iteration"):
        write_report([tmp_path / "run"])

    class Looks(hrf_fast.Listener):
        def iteration(self, record):
            with pytest.raises(ValueError, match="no model/ yet"):
                finished_run(tmp_path / "run")

    hrf_fast.train(load_config([*words, "stop.target_reward=1e9"]), listeners=[Looks()])
    assert len(metrics(tmp_path / "run")) == 2 and finished_run(tmp_path / "run")


@pytest.mark.parametrize("options", [[], ["optimizer.ema_decay=0.5"]])
def test_the_best_checkpoint_is_restored_bit_for_bit(tiny_run, tmp_path, monkeypatch, options):
    judged(monkeypatch)
    words = [*options, "stop.on_collapse=restore_best", "run.save_every=0"]
    words = watched(tiny_run, tmp_path / "run", *words)
    result = train(words, reward=peaked())
    assert "vendi is 0.5" in result.reason
    assert [panel["iteration"] for panel in (result.panel, result.best_panel, result.last_panel)] == [1, 1, 3]
    assert events(result.folder) == [(3, "diversity"), (3, "end")]
    assert read_log(result.folder / "events.jsonl")[-1]["figures"] == {"model": 1}
    best = result.folder / "checkpoints" / "iteration-000001"
    file = "ema.safetensors" if options else "weights.safetensors"
    assert equal(weights(result.folder), checkpoint_weights(best, file))
    assert "1 iterations" in (result.folder / "model" / "README.md").read_text()
    # the same command ends at once, the same
    again = train(words, reward=peaked())
    assert again.reason == result.reason and len(events(result.folder)) == 2
    assert equal(weights(result.folder), checkpoint_weights(best, file))


def test_a_better_panel_whose_checkpoint_is_gone_is_named(tiny_run, tmp_path, monkeypatch, capsys):
    judged(monkeypatch)
    words = ["stop.on_collapse=restore_best", "run.save_every=1", "run.keep_checkpoints=3"]
    words = watched(tiny_run, tmp_path / "run", *words)
    result = train(words, reward=peaked())
    assert result.panel["iteration"] == 1 and "has a checkpoint" not in capsys.readouterr().out
    shutil.rmtree(result.folder / "checkpoints" / "iteration-000001")
    again = train(words, reward=peaked())
    assert again.panel["iteration"] != 1 and again.best_panel["iteration"] == 1
    assert "above the floors that has a checkpoint (those after 1" in capsys.readouterr().out


@pytest.mark.parametrize(("last", "model"), [(0.595, 3), (0.605, 4)])
def test_a_run_that_ends_with_a_share_under_the_floor_restores_the_best_too(
    tiny_run, tmp_path, monkeypatch, last, model
):
    # both intervals hold the floor of 0.6, so no rule has ended the run
    judged(monkeypatch, shares=[0.9, 0.8, 0.7, last])
    words = watched(tiny_run, tmp_path / "run", "stop.on_collapse=restore_best", "run.save_every=0")
    result = train(words, reward=peaked())
    assert result.reason == "train.iterations is 4" and events(result.folder) == [(4, "end")]
    assert read_log(result.folder / "events.jsonl")[-1]["figures"] == {"model": model}
    checkpoint = result.folder / "checkpoints" / f"iteration-{model:06d}"
    assert equal(weights(result.folder), checkpoint_weights(checkpoint, "weights.safetensors"))
    assert result.best_panel["iteration"] == model


def test_where_every_panel_has_collapsed_the_pretrained_weights_come_back(tiny_run, tiny_model, tmp_path, monkeypatch):
    judged(monkeypatch, shares=[0.5])
    words = ["stop.on_collapse=restore_best"]
    result = train(watched(tiny_run, tmp_path / "run", *words), reward=peaked())
    assert [path.name for path in list_checkpoints(result.folder / "checkpoints")][-1] == "iteration-000000"
    assert result.best_panel["iteration"] == 0 and equal(weights(result.folder), weights(tiny_model))


def test_a_wrecked_step_is_an_event_and_restores_the_best(tiny_run, tmp_path, monkeypatch):
    judged(monkeypatch, [])
    words = ["stop.max_drift=1e-12", "train.iterations=2"]
    with pytest.raises(FloatingPointError, match="max_drift"):
        train(watched(tiny_run, tmp_path / "run", *words), reward=peaked())
    assert events(tmp_path / "run") == [(1, "error")]
    words = watched(tiny_run, tmp_path / "best", *words, "stop.on_collapse=restore_best")
    result = train(words, reward=peaked())
    assert "stop.max_drift" in result.reason and events(result.folder) == [(1, "error"), (0, "end")]


def test_a_run_that_gave_back_the_pretrained_model_before_its_first_checkpoint_goes_on(tiny_run, tmp_path, monkeypatch):
    judged(monkeypatch, [0.9])
    reached = []

    def drifts(drift, limit, iteration):
        reached.append(iteration)
        if iteration == 1 and len(reached) == 2:
            raise FloatingPointError("stop.max_drift")

    monkeypatch.setattr("hrf_fast.training.iteration.check_drift", drifts)
    words = ["train.iterations=2", "run.save_every=0", "stop.on_collapse=restore_best", "evaluation.every=0"]
    words = watched(tiny_run, tmp_path / "run", *words)
    first = train(words, reward=peaked())
    assert "stop.max_drift" in first.reason and read_log(first.folder / "events.jsonl")[-1]["figures"] == {"model": 0}
    second = train(words, reward=peaked())
    assert second.reason == "train.iterations is 2" and reached == [0, 1, 0, 1]


def test_a_first_panel_that_fails_is_an_error_for_there_is_nothing_to_restore(tiny_run, tmp_path, monkeypatch):
    def fails(*arguments):
        raise FloatingPointError("the images are not finite")

    monkeypatch.setattr(Panel, "evaluate", fails)
    with pytest.raises(FloatingPointError, match="the images are not finite"):
        train(watched(tiny_run, tmp_path / "run", "stop.on_collapse=restore_best"), reward=peaked())
    assert events(tmp_path / "run") == [(1, "error")]


@pytest.mark.parametrize("moment", ["before the line", "after the line"])
def test_a_kill_between_an_event_and_its_line_neither_loses_nor_repeats_it(tiny_run, tmp_path, monkeypatch, moment):
    from hrf_fast.run.folder import RunFolder

    words = ["stop.on_collapse=stop"]
    judged(monkeypatch)
    whole = train(watched(tiny_run, tmp_path / "whole", *words), reward=peaked())
    append, words = RunFolder.append_panel, watched(tiny_run, tmp_path / "broken", *words)

    def kill(folder, record, images):
        if moment == "after the line":
            append(folder, record, images)
        if record["iteration"] == 3:
            # as SIGKILL does, without a checkpoint after it
            raise NotWritten("killed")
        if moment == "before the line":
            append(folder, record, images)

    judged(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_panel", kill)
        with pytest.raises(OSError, match="killed"):
            train(words, reward=peaked())
    assert events(tmp_path / "broken") == [(3, "diversity")]
    # the third iteration is done again, after the checkpoint of the second
    judged(monkeypatch, SHARES[2:])
    result = train(words, reward=peaked(REWARDS[3:]))
    assert result.reason == whole.reason
    assert read_log(result.folder / "events.jsonl") == read_log(whole.folder / "events.jsonl")
    assert panels(result.folder) == panels(whole.folder)


def test_a_run_that_a_rule_has_ended_ends_again_unless_the_rule_has_changed(tiny_run, tmp_path, monkeypatch):
    judged(monkeypatch)
    words = watched(tiny_run, tmp_path / "run", "stop.on_collapse=stop")
    first = train(words, reward=peaked())
    assert train(words, reward=peaked()).reason == first.reason
    judged(monkeypatch, SHARES[3:])
    result = train([*words, "stop.on_collapse=warn"], reward=peaked(REWARDS[4:]))
    assert result.reason == "train.iterations is 4"
    assert events(result.folder) == [(3, "diversity"), (3, "end"), (4, "end")]


def test_a_floor_without_a_network_is_refused_before_anything_runs(tiny_run, tmp_path):
    with pytest.raises(ValueError, match=r"stop.diversity_floor is 0.8.*evaluation.network"):
        train([*tiny_run, "stop.diversity_floor=0.8"])
    assert not (tmp_path / "run").exists()


def test_a_gain_begins_the_count_of_patience_anew():
    watch = StopRules(StopConfig(patience=2), seed=0)
    # stale, a gain of 1 in every image, stale, and stale a second time
    rewards = ([1.0, 2.0], [1.0, 2.0], [2.0, 3.0], [2.0, 3.0], [2.0, 3.0])
    found = [names(watch.panel(line(i, values))) for i, values in enumerate(rewards)]
    assert found == [[], [], [], [], ["patience"]] and "2 panels" in watch.ending and "iteration 2" in watch.ending


def test_a_gradient_norm_is_judged_by_the_last_fifty():
    watch = StopRules(StopConfig(max_norm_factor=5.0, on_collapse="stop"), seed=0)
    # of the last 50 over half are 1, though of all 83 most are 10; three above 5·1 in a row
    found = updates(watch, *({"grad_norm": norm} for norm in [10.0] * 50 + [1.0] * 30 + [8.0] * 3))
    assert found == [[]] * 82 + [["grad_norm"]]
