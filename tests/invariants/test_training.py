"""Whole runs on a tiny model, through the real command: what must hold whatever the numbers are."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hrf_fast
import hrf_fast.engines.base as engine_module
import hrf_fast.training.iteration as iteration_module
import hrf_fast.training.update as update_module
from hrf_fast.config.load import load_config
from hrf_fast.errors import UserCodeError
from hrf_fast.rewards import RewardError
from hrf_fast.run.files import read_log
from hrf_fast.train import main
from tests.runs import (
    assert_equal_runs,
    assert_equal_training,
    checkpoint_weights,
    equal,
    metrics,
    panels,
    scheduled,
    train,
    weights,
    with_folder,
)

ROOT = Path(__file__).parents[2]


def bright(images, prompts=None):
    return images.mean((1, 2, 3))


class Interrupted(hrf_fast.Listener):
    """Brightness as a reward, interrupted in the rollout after `at` iterations; a listener, to know which it is in."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.done = at, 0

    def iteration(self, record):
        self.done = record["iteration"] + 1

    def __call__(self, images, prompts=None):
        # three images are a group's rollout; panels and searches have six
        if self.done == self.at and len(images) == 3:
            raise KeyboardInterrupt
        return bright(images)


def test_a_run_writes_everything_it_promises(tiny_run, tmp_path, capsys):
    from diffusers import DDPMPipeline

    assert main(tiny_run) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "evaluations.jsonl",
        "events.jsonl",
        "sources.json",
        "samples",
        "checkpoints",
        "model",
        ".lock",
        ".lock-owner",
    }
    assert load_config(["--config", str(run / "config.yaml")]) == load_config(tiny_run)
    records = read_log(run / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [0, 1]
    wanted = "reward_mean reward_std reward_min reward_max advantage_std ratio_mean ratio_max clip_fraction approx_kl"
    wanted += " grad_norm learning_rate window_starts seconds images forwards evaluations peak_memory_bytes loss"
    assert set(wanted.split()) <= set(records[0])
    assert set(records[0]["seconds"]) == {"anchors", "search", "rollout", "reward", "update", "other"}
    assert records[0]["speed"]["overhead"] > 1
    assert [record["iteration"] for record in panels(run)] == [0, 1, 2]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"iteration-00000{i}.png" for i in range(3)]
    assert DDPMPipeline.from_pretrained(run / "model").unet.config.sample_size == 16
    # not a terminal: every line of the output is JSON
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "exact" in lines[0]["note"]


def test_the_same_seed_gives_the_same_metrics_and_weights_and_another_seed_does_not(tiny_run, tmp_path):
    for name, seed, iterations in (("a", 0, 2), ("b", 0, 2), ("c", 1, 1)):
        words = [f"run.seed={seed}", f"train.iterations={iterations}"]
        assert main(with_folder(tiny_run, tmp_path / name, *words)) == 0
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "b")[0] != metrics(tmp_path / "c")[0]


@pytest.mark.parametrize("schedule", ["full", "clusters", "dynamic", "random", "sliding"])
def test_every_schedule_trains_and_changes_the_weights(tiny_run, tmp_path, tiny_model, schedule):
    assert main([*tiny_run, f"window.schedule={schedule}", "evaluation.every=0", "train.iterations=1"]) == 0
    assert not equal(weights(tiny_model), weights(tmp_path / "run"))
    # the deterministic last step, index 5 of 6, is in no window
    record = read_log(tmp_path / "run" / "metrics.jsonl")[0]
    assert record["window_steps"] == sum(5 - start for start in record["window_starts"])


def test_unet_calls_are_counted_as_the_algorithm_needs_them(tiny_run, tmp_path):
    assert main([*tiny_run, "window.schedule=full", "train.iterations=1"]) == 0
    record = metrics(tmp_path / "run")[0]
    # DDPO: 6 samples x (6 rollout + 5 replayed forwards), 6 x 5 backwards; panels are not training
    assert (record["forwards"], record["backwards"], record["evaluations"]) == (66, 30, 126)


def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(tiny_run, tmp_path):
    assert main(with_folder(tiny_run, tmp_path / "whole")) == 0
    assert main(with_folder(tiny_run, tmp_path / "halves", "train.iterations=1")) == 0
    assert main(with_folder(tiny_run, tmp_path / "halves")) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "halves")


BANDIT = ["window.schedule=dynamic", "window.kwargs.search=bandit", "window.kwargs.stride=1", "evaluation.every=0"]


@pytest.mark.slow
def test_a_bandit_resumes_with_what_it_has_measured(tiny_run, tmp_path):
    words = [*tiny_run, *BANDIT]
    assert main(with_folder(words, tmp_path / "whole", "train.iterations=4")) == 0
    assert main(with_folder(words, tmp_path / "halves", "train.iterations=2")) == 0
    saved = json.loads((tmp_path / "halves" / "checkpoints" / "iteration-000002" / "state.json").read_text())
    # two iterations of two groups, of one pull each: 2·0.95 + 2
    assert sum(saved["schedule"]["counts"]) == pytest.approx(3.9)
    assert main(with_folder(words, tmp_path / "halves", "train.iterations=4")) == 0
    # the first half ends with a panel of its own
    assert_equal_training(tmp_path / "whole", tmp_path / "halves")
    ends = [tmp_path / name / "checkpoints" / "iteration-000004" / "state.json" for name in ("whole", "halves")]
    whole, halves = (json.loads(end.read_text()) for end in ends)
    assert whole["schedule"] == halves["schedule"] and whole["calls"] == halves["calls"]


@pytest.mark.slow
def test_a_bandit_interrupted_in_mid_iteration_forgets_that_iteration(tiny_run, tmp_path):
    # Ctrl-C after the third iteration's search: the checkpoint is that of two iterations, and so are the pulls in it
    words = [*tiny_run, *BANDIT, "run.save_every=0", "train.iterations=4"]
    train(with_folder(words, tmp_path / "whole"), reward=Interrupted())
    interrupted = Interrupted(at=2)
    with pytest.raises(KeyboardInterrupt):
        train(with_folder(words, tmp_path / "broken"), reward=interrupted, listeners=[interrupted])
    saved = json.loads((tmp_path / "broken" / "checkpoints" / "iteration-000002" / "state.json").read_text())
    assert sum(saved["schedule"]["counts"]) == pytest.approx(3.9)
    train(with_folder(words, tmp_path / "broken"), reward=Interrupted())
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken")


def test_a_search_is_counted_as_it_is_made(tiny_run, tmp_path):
    # 6 steps, stride 2: candidates 0, 2, 4; two groups of three. exact: (6 + 4 + 2)·6 = 72; x0: 3·6 = 18
    found = {}
    for search in ("exact", "x0"):
        options = ["window.schedule=dynamic", f"window.kwargs.search={search}", "train.iterations=1"]
        assert main(with_folder(tiny_run, tmp_path / search, *options, "evaluation.every=0")) == 0
        (record,) = metrics(tmp_path / search)
        # less two anchors, the rollouts to the end and the replays of the windows up to step 5
        rest = sum(3 * (6 - start) + 3 * (5 - start) for start in record["window_starts"])
        found[search] = record["forwards"] - 2 * 6 - rest
    assert found == {"exact": 72, "x0": 18}


def one_window_each(num_groups):
    return [hrf_fast.Window(0, 1)] * num_groups


@pytest.mark.parametrize(
    ("candidates", "options", "said"),
    [
        ([[0, 2]], {}, ("window.schedule", "[[0, 2]]", "2 groups")),
        ([[0], [6]], {}, ("window.schedule", "start 6", "0 to 5")),
        ([[0], [1]], {"estimate": "x"}, ("estimate", "'x'", "exact, x0")),
    ],
    ids=["too few lists", "no such start", "no such estimate"],
)
def test_a_users_schedule_that_probes_what_is_not_there_is_told(tiny_run, candidates, options, said):
    def choose(num_groups, probe):
        probe(candidates, **options)
        return one_window_each(num_groups)

    with pytest.raises(ValueError) as error:
        train([*tiny_run, "evaluation.every=0"], schedule=scheduled(choose))
    assert all(part in str(error.value) for part in said)


def test_a_users_schedule_that_calls_the_probe_of_an_earlier_version_is_told_its_line(tiny_run):
    message = r"window.schedule .* failed with TypeError: .*__call__\(\) .*test_training.py:\d+ in <lambda>"
    with pytest.raises(UserCodeError, match=message):
        train(tiny_run, schedule=scheduled(lambda num_groups, probe: probe(0, [0, 2])))


def test_lines_that_outlived_their_checkpoint_are_done_again_once(tiny_run, tmp_path):
    # checkpoints after 2 of 3 iterations only: kill during iteration 3 means 1 logged line too many
    words = with_folder(tiny_run, tmp_path / "run", "run.save_every=2", "train.iterations=3", "evaluation.every=0")
    assert main(words) == 0
    whole = metrics(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "iteration-000003"
    newest.rename(tmp_path / "gone")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "torn')
    assert main(words) == 0
    assert metrics(tmp_path / "run") == whole


def test_inner_epochs_and_groups_per_step_make_the_optimizer_steps_they_say(tiny_run, tmp_path):
    assert main([*tiny_run, "train.iterations=1", "train.inner_epochs=3", "train.groups_per_step=2"]) == 0
    (record,) = metrics(tmp_path / "run")
    # both groups of 3 in every one of 3 passes, in one optimizer step each
    assert record["backwards"] == 3 * 3 * record["window_steps"]
    optimizer = load_file(tmp_path / "run" / "checkpoints" / "iteration-000001" / "optimizer.safetensors")
    assert float(optimizer["0.step"]) == 3


def test_the_budget_of_evaluations_ends_a_run_after_the_iteration_that_passes_it(tiny_run, tmp_path):
    assert main([*tiny_run, "train.iterations=50", "stop.max_evaluations=1", "evaluation.every=0"]) == 0
    assert len(metrics(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "model").is_dir()
    assert [record["iteration"] for record in panels(tmp_path / "run")] == [0, 1]


def test_the_cosine_schedule_and_warm_up_reach_the_optimizer(tiny_run, tmp_path):
    words = ["optimizer.learning_rate_schedule=cosine", "optimizer.warmup_iterations=1", "optimizer.learning_rate=1e-3"]
    assert main([*tiny_run, *words, "train.iterations=3"]) == 0
    # warm-up (0+1)/1, then cosine over 2 iterations: 1, (1 + cos(pi/2))/2 = 0.5
    assert [r["learning_rate"] for r in metrics(tmp_path / "run")] == pytest.approx([1e-3, 1e-3, 5e-4])


def test_a_run_that_ends_within_its_warm_up_says_what_rate_it_reached(tiny_run, capsys):
    words = ["optimizer.warmup_iterations=4", "optimizer.learning_rate=1e-3", "evaluation.every=0"]
    assert main([*tiny_run, *words, "train.iterations=2"]) == 0
    assert "ended within its warm-up: its last learning rate was 0.0005, of 0.001" in capsys.readouterr().out
    # the fourth iteration has the whole rate
    assert main([*tiny_run, *words, "train.iterations=4"]) == 0
    assert "within its warm-up" not in capsys.readouterr().out


def test_bf16_trains(tiny_run, tiny_model, tmp_path):
    assert main([*tiny_run, "compute.precision=bf16", "train.iterations=1"]) == 0
    tuned = weights(tmp_path / "run")
    assert tuned["conv_in.weight"].dtype == torch.float32 and not equal(tuned, weights(tiny_model))
    assert main([*with_folder(tiny_run, tmp_path / "fp32"), "train.iterations=1"]) == 0
    assert not equal(tuned, weights(tmp_path / "fp32"))


def test_fp16_and_checkpointed_activations_train(tiny_run, tmp_path):
    options = ["compute.precision=fp16", "compute.activations=checkpoint", "train.iterations=1", "evaluation.every=0"]
    assert main([*tiny_run, *options]) == 0
    record = metrics(tmp_path / "run")[0]
    # the first loss scale may be too large for one of the two steps
    assert record["skipped_steps"] < 2 and record["grad_norm"] > 0


def test_a_run_with_averaged_weights_resumes_exactly(tiny_run, tmp_path):
    options = ["optimizer.ema_decay=0.9", "evaluation.every=0"]
    assert main(with_folder([*tiny_run, *options], tmp_path / "whole")) == 0
    assert main(with_folder([*tiny_run, *options], tmp_path / "halves", "train.iterations=1")) == 0
    assert main(with_folder([*tiny_run, *options], tmp_path / "halves")) == 0
    # the first half ends with a panel of its own
    assert_equal_training(tmp_path / "whole", tmp_path / "halves")
    # the final model is the averaged one
    newest = tmp_path / "whole" / "checkpoints" / "iteration-000002"
    averaged = checkpoint_weights(newest, "ema.safetensors")
    assert equal(averaged, weights(tmp_path / "whole"))
    assert not torch.equal(averaged["conv_in.weight"], checkpoint_weights(newest)["conv_in.weight"])


def test_the_checkpoint_of_the_best_panel_outlives_newer_ones(tiny_run, tmp_path):
    # of the panels after 0, 1, 2 and 3 iterations
    rewards = iter([0, 5, 1, 2])

    def peaked(images, prompts=None):
        # the panel has six images, a group three
        return images.new_full((6,), next(rewards)) if len(images) == 6 else bright(images)

    options = ["train.iterations=3", "run.keep_best=true", "run.keep_checkpoints=1", "run.save_every=0"]
    result = train([*tiny_run, *options], reward=peaked)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"iteration-000001", "iteration-000003"}
    assert (result.best_panel["iteration"], result.last_panel["iteration"]) == (1, 3)


def test_a_reward_that_is_not_finite_skips_its_groups_step_and_is_counted(tiny_run, tmp_path, capsys):
    calls = []

    def holey(images, prompts=None):
        calls.append(1)
        values = bright(images)
        # after the panel and the first group: the second group, which is asked for once more
        if len(calls) in (3, 4):
            values[-1] = float("nan")
        return values

    train([*tiny_run, "stop.on_nan=skip", "evaluation.every=0"], reward=holey)
    first, second = metrics(tmp_path / "run")
    assert (first["skipped_steps"], second["skipped_steps"]) == (1, 0)
    assert all(value == value for value in first.values() if isinstance(value, float))
    notes = [json.loads(line).get("note", "") for line in capsys.readouterr().out.splitlines()]
    assert any("iteration 0, group 1" in note and "'holey'" in note for note in notes)


def test_a_sample_that_is_left_without_peers_makes_no_step(tiny_run, tmp_path, capsys):
    calls = []

    def holey(images, prompts=None):
        # after the panel the first of two groups of one, and once more
        calls.append(len(images))
        return [float("nan")] if calls.count(1) in (1, 2) and len(images) == 1 else bright(images)

    words = ["train.group_size=1", "train.advantages=batch", "stop.on_nan=skip", "evaluation.every=0"]
    train([*tiny_run, *words], reward=holey)
    first, second = metrics(tmp_path / "run")
    assert (first["skipped_steps"], second["skipped_steps"]) == (2, 0)
    assert all(value == value for value in first.values() if isinstance(value, float))
    notes = [json.loads(line).get("note", "") for line in capsys.readouterr().out.splitlines()]
    assert any("iteration 0, group 1: its optimizer step is skipped: no other sample" in note for note in notes)
    assert not any("nothing is learnt" in note for note in notes)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tiny_run, tmp_path, monkeypatch):
    original, calls = update_module.optimizer_step, []

    def poison(engine, policy, trajectories, advantages, *rest, **options):
        calls.append(1)
        if len(calls) == 1:
            advantages = {group: advantage * torch.nan for group, advantage in advantages.items()}
        return original(engine, policy, trajectories, advantages, *rest, **options)

    monkeypatch.setattr(update_module, "optimizer_step", poison)
    assert main([*tiny_run, "stop.on_nan=skip", "evaluation.every=0"]) == 0
    assert [record["skipped_steps"] for record in metrics(tmp_path / "run")] == [1, 0]
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "run").values())


# what goes wrong


def test_rewards_without_any_spread_are_said_and_leave_the_weights_alone(tiny_run, tmp_path, tiny_model, capsys):
    def flat(images, prompts=None):
        return [1.0] * len(images)

    train([*tiny_run, "optimizer.weight_decay=0"], reward=flat)
    notes = [json.loads(line).get("note", "") for line in capsys.readouterr().out.splitlines()]
    # once, not in every iteration
    assert len([note for note in notes if "reward.name flat" in note and "train.group_size" in note]) == 1
    assert equal(weights(tiny_model), weights(tmp_path / "run"))


class Late:
    """Brightness, until it is broken: then what `fail` returns or raises, from the second iteration on."""

    def __init__(self, fail=None) -> None:
        self.fail, self.calls = fail, 0

    def __call__(self, images, prompts=None):
        self.calls += 1
        # the first panel, the first iteration's two groups and the second panel are fine
        return self.fail(images) if self.fail and self.calls > 4 else bright(images)


def no_model(images):
    raise KeyError("no model")


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (no_model, "KeyError"),
        # how they are refused is a unit test of rewards
        pytest.param(lambda images: [float("nan")] * len(images), "nan", marks=pytest.mark.slow),
        pytest.param(lambda images: images.mean(), "[]", marks=pytest.mark.slow),
    ],
    ids=["raises", "NaN", "wrong shape"],
)
def test_a_reward_that_fails_stops_before_the_optimizer_step_with_the_checkpoint_intact(tiny_run, tmp_path, fail, said):
    with pytest.raises(RewardError) as error:
        train(tiny_run, reward=Late(fail))
    assert "'Late'" in str(error.value) and said in str(error.value)
    checkpoint = tmp_path / "run" / "checkpoints" / "iteration-000001"
    assert checkpoint.is_dir() and not (tmp_path / "run" / "model").exists()
    assert len(metrics(tmp_path / "run")) == 1
    # mended, the run goes on from there and ends as if nothing had happened
    train(tiny_run, reward=Late())
    train(with_folder(tiny_run, tmp_path / "whole"), reward=Late())
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


def test_nan_weights_are_caught_before_the_optimizer_step(tiny_run, tmp_path, monkeypatch, capsys):
    original = iteration_module.update

    def poison(components, *rest, **options):
        with torch.no_grad():
            next(components.policy.network.parameters()).fill_(float("nan"))
        return original(components, *rest, **options)

    monkeypatch.setattr(iteration_module, "update", poison)
    assert main([*tiny_run, "run.save_every=0"]) == 1
    message = capsys.readouterr().err
    assert "iteration 0, group 0" in message and "nan" in message and "optimizer.learning_rate" in message
    # an update cut in half is not saved
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_configuration_in_the_folder_is_refused_with_what_differs(tiny_run, tmp_path, capsys):
    assert main(tiny_run) == 0
    before = metrics(tmp_path / "run")
    assert main([*tiny_run, "train.group_size=4"]) == 1
    message = capsys.readouterr().err
    assert all(part in message for part in ("run.folder", "train.group_size", " 3 ", " 4"))
    assert metrics(tmp_path / "run") == before


def test_a_folder_that_holds_something_else_is_not_written_into(tiny_run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    assert main(tiny_run) == 1
    assert f"run.folder {tmp_path / 'run'}" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_folder(tiny_run, tmp_path, capsys):
    process = start([*tiny_run, "train.iterations=1000"])
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 1)
    assert main([*tiny_run, "train.iterations=1000"]) == 1
    message = capsys.readouterr().err
    assert f"run.folder {tmp_path / 'run'}" in message and f"process {process.pid} " in message
    # killed, it holds nothing any more
    process.kill()
    process.communicate(timeout=60)
    done = len(metrics(tmp_path / "run"))
    assert main([*tiny_run, f"train.iterations={done + 1}"]) == 0


def test_an_unwritable_folder_is_named(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(with_folder(tiny_run, tmp_path / "file" / "run")) == 1
    assert f"run.folder is {str(tmp_path / 'file' / 'run')!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "window.kwargs={clusters: [[0, 3], [3, 9]]}",
            ("window.kwargs.clusters[1]", "start 6", "sample.num_inference_steps is 6"),
        ),
        ("window.kwargs={clusters: [[5, 6]]}", ("window.kwargs.clusters[0]", "[5]")),
        ("window.schedule=cluster", ("window.schedule is 'cluster'", "'clusters'")),
        ("reward.name=jpeg_compresibility", ("'jpeg_compresibility'", "'jpeg_compressibility'")),
        ("reward.kwargs={qualty: 3}", ("qualty", "quality")),
        ("sample.eta=0", ("sample.eta is 0.0", "above 0")),
        ("run.device=tpu", ("run.device is 'tpu'", "cuda")),
        ("run.device=cuda:99", ("run.device is 'cuda:99'", "GPUs")),
        ("evaluation.network=fashon", ("'fashon'", "fashion")),
    ],
)
def test_what_can_not_work_is_refused_before_a_folder_is_made(tiny_run, tmp_path, capsys, word, said):
    assert main([*tiny_run, word]) == 1
    message = capsys.readouterr().err
    assert all(part in message for part in said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("choose", "said"),
    [
        (lambda num_groups, probe: [hrf_fast.Window(0, 2)], ("1 windows", "2 groups")),
        (lambda num_groups, probe: [(0, 2)] * num_groups, ("(0, 2)", "Window(start, stop)")),
        (lambda num_groups, probe: [hrf_fast.Window(0, 6)] * num_groups, ("6", "steps from 5")),
    ],
    ids=["too few", "no windows", "degenerate step"],
)
def test_a_schedule_of_the_users_is_checked(tiny_run, choose, said):
    with pytest.raises(ValueError) as error:
        train(tiny_run, schedule=scheduled(choose))
    assert all(part in str(error.value) for part in ("window.schedule", *said))


def test_calls_of_an_iteration_that_was_stopped_are_not_counted_twice(tiny_run, tmp_path):
    # stopped inside the reward of the second iteration, when its rollouts have been counted but not learnt from
    words = [*tiny_run, "run.save_every=0", "evaluation.every=0"]
    interrupted = Interrupted(at=1)
    with pytest.raises(KeyboardInterrupt):
        train(words, reward=interrupted, listeners=[interrupted])
    train(words, reward=Interrupted())
    train(with_folder(words, tmp_path / "whole"), reward=Interrupted())
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


# listeners


class Heard(hrf_fast.Listener):
    """Writes down what it hears, and answers an iteration by `answer`."""

    def __init__(self, answer=lambda record: None) -> None:
        self.answer, self.records, self.panels, self.reasons = answer, [], [], []

    def iteration(self, record):
        self.records.append(record)
        return self.answer(record)

    def panel(self, record, images):
        self.panels.append((record, images.shape))

    def finished(self, reason):
        self.reasons.append(reason)


def test_listeners_hear_every_line_that_is_logged_and_a_resumed_run_goes_on_telling(tiny_run, tmp_path):
    first, second = Heard(), Heard()
    result = train([*tiny_run, "train.iterations=1"], listeners=[first])
    assert (result.folder, result.reason) == (tmp_path / "run", first.reasons[0])
    train(tiny_run, listeners=[second])
    assert first.records + second.records == read_log(tmp_path / "run" / "metrics.jsonl")
    heard = first.panels + second.panels
    assert [record for record, _ in heard] == panels(tmp_path / "run")
    assert {shape for _, shape in heard} == {(6, 3, 16, 16)}
    assert len(first.reasons) == len(second.reasons) == 1


def test_a_listener_ends_a_run_with_its_reason_and_the_run_can_go_on(tiny_run, tmp_path):
    words = [*tiny_run, "evaluation.every=0", "run.save_every=0"]
    heard = Heard(lambda record: "seen enough")
    assert train(words, listeners=[heard]).reason == "seen enough"
    assert heard.reasons == ["seen enough"] and len(metrics(tmp_path / "run")) == 1
    assert [record["iteration"] for record in panels(tmp_path / "run")] == [0, 1]
    assert (tmp_path / "run" / "model").is_dir()
    train(words)
    train(with_folder(words, tmp_path / "whole"))
    assert_equal_training(tmp_path / "run", tmp_path / "whole")


def test_an_error_of_a_listener_ends_the_run_after_a_checkpoint_of_what_it_heard(tiny_run, tmp_path):
    words = [*tiny_run, "evaluation.every=0", "run.save_every=0"]

    def fail(record):
        raise ValueError("my plot")

    heard = Heard(fail)
    with pytest.raises(UserCodeError, match="listener Heard failed with ValueError: my plot"):
        train(words, listeners=[heard])
    assert heard.reasons == ["an error (UserCodeError)"]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration-000001"]
    train(words)
    train(with_folder(words, tmp_path / "whole"))
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


# Ctrl-C and SIGKILL


@pytest.mark.parametrize("moment", ["in", pytest.param("out", marks=pytest.mark.slow)])
def test_a_ctrl_c_while_averaged_weights_are_copied_saves_the_trained_ones(tiny_run, tmp_path, monkeypatch, moment):
    words = [*tiny_run, "optimizer.ema_decay=0.9"]
    train(with_folder(words, tmp_path / "whole"))
    original, copies = engine_module._copy, []

    def copy(parameters, values):
        # there are values at panels only: averages in and weights back, before training and after the first iteration
        copies.extend(values[:1])
        if values and len(copies) == {"in": 3, "out": 4}[moment]:
            original(parameters[:5], values[:5])
            raise KeyboardInterrupt
        original(parameters, values)

    monkeypatch.setattr(engine_module, "_copy", copy)
    with pytest.raises(KeyboardInterrupt):
        train([*words, "run.save_every=0"])
    saved, whole = (tmp_path / name / "checkpoints" / "iteration-000001" for name in ("run", "whole"))
    for file in ("weights.safetensors", "ema.safetensors"):
        assert equal(checkpoint_weights(saved, file), checkpoint_weights(whole, file))


def start(words, *before):
    return subprocess.Popen(
        [*before, sys.executable, str(ROOT / "hrf_fast" / "train.py"), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_lines(path: Path, count: int):
    for _ in range(1200):
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} never had {count} lines")


@pytest.mark.slow
def test_a_run_under_nohup_outlives_its_terminal_and_sigterm_stops_it(tiny_run, tmp_path):
    log = tmp_path / "run" / "metrics.jsonl"
    process = start([*tiny_run, "train.iterations=1000", "evaluation.every=0", "run.save_every=0"], "nohup")
    wait_for_lines(log, 1)
    process.send_signal(signal.SIGHUP)
    wait_for_lines(log, len(metrics(tmp_path / "run")) + 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    newest = f"iteration-{len(metrics(tmp_path / 'run')):06d}"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [newest]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_resumes_to_the_uninterrupted_result(tiny_run, tmp_path, stop):
    words = [*tiny_run, "train.iterations=6", "evaluation.every=3"]
    process = start(words)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130, errors
        assert "stopped by Ctrl-C" in errors
    assert not (tmp_path / "run" / "model").exists()
    assert main(words) == 0
    assert main(with_folder(words, tmp_path / "whole")) == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")
