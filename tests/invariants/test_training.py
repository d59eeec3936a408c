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

import hrf_fast.training.iteration as iteration_module
import hrf_fast.training.update as learn_module
from hrf_fast.run.files import read_log
from hrf_fast.train import main

ROOT = Path(__file__).parents[2]


def weights(run: Path):
    return load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def metrics(run: Path):
    """Metrics without what time and memory say."""
    records = read_log(run / "metrics.jsonl")
    for record in records:
        del record["seconds"], record["speed"], record["peak_memory_bytes"]
    return records


def assert_equal_weights(a: Path, b: Path):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def with_folder(words, folder, *more):
    return [word for word in words if not word.startswith("run.folder=")] + [f"run.folder={folder}", *more]


def bright(images, prompts=None):
    return images.mean((1, 2, 3))


def test_a_run_writes_everything_it_promises(tiny_run, tmp_path, capsys):
    from diffusers import DDPMPipeline

    from hrf_fast.config.load import load_config

    assert main(tiny_run) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "evaluations.jsonl",
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
    assert [record["iteration"] for record in read_log(run / "evaluations.jsonl")] == [0, 1, 2]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"iteration-00000{i}.png" for i in range(3)]
    assert DDPMPipeline.from_pretrained(run / "model").unet.config.sample_size == 16
    # not a terminal: every line of the output is JSON
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "exact" in lines[0]["note"]


def test_the_same_seed_gives_the_same_metrics_and_weights_and_another_seed_does_not(tiny_run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main(with_folder(tiny_run, tmp_path / name, f"run.seed={seed}")) == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")
    assert_equal_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("schedule", ["full", "clusters", "dynamic", "random", "sliding"])
def test_every_schedule_trains_and_changes_the_weights(tiny_run, tmp_path, tiny_model, schedule):
    assert main([*tiny_run, f"window.schedule={schedule}", "evaluation.every=0", "train.iterations=1"]) == 0
    before = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    after = weights(tmp_path / "run")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # the deterministic last step, index 5 of 6, is in no window
    record = read_log(tmp_path / "run" / "metrics.jsonl")[0]
    assert record["window_steps"] == sum(5 - start for start in record["window_starts"])


def test_unet_calls_are_counted_as_the_algorithm_needs_them(tiny_run, tmp_path):
    assert main([*tiny_run, "window.schedule=full", "train.iterations=1"]) == 0
    record = metrics(tmp_path / "run")[0]
    # DDPO: 6 samples x (6 rollout + 5 replayed forwards), 6 x 5 backwards; panels are not training
    assert (record["forwards"], record["backwards"], record["evaluations"]) == (66, 30, 126)


def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(tiny_run, tmp_path):
    assert main(with_folder(tiny_run, tmp_path / "whole", "train.iterations=4")) == 0
    assert main(with_folder(tiny_run, tmp_path / "halves", "train.iterations=2")) == 0
    assert main(with_folder(tiny_run, tmp_path / "halves", "train.iterations=4")) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")
    assert read_log(tmp_path / "whole" / "evaluations.jsonl") == read_log(tmp_path / "halves" / "evaluations.jsonl")
    assert_equal_weights(tmp_path / "whole", tmp_path / "halves")


BANDIT = ["window.schedule=dynamic", "window.kwargs.search=bandit", "window.kwargs.stride=1", "evaluation.every=0"]


def test_a_bandit_resumes_with_what_it_has_measured(tiny_run, tmp_path):
    words = [*tiny_run, *BANDIT]
    assert main(with_folder(words, tmp_path / "whole", "train.iterations=4")) == 0
    assert main(with_folder(words, tmp_path / "halves", "train.iterations=2")) == 0
    saved = json.loads((tmp_path / "halves" / "checkpoints" / "iteration-000002" / "state.json").read_text())
    # two iterations of two groups, of one pull each: 2·0.95 + 2
    assert sum(saved["schedule"]["counts"]) == pytest.approx(3.9)
    assert main(with_folder(words, tmp_path / "halves", "train.iterations=4")) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")
    assert_equal_weights(tmp_path / "whole", tmp_path / "halves")
    ends = [tmp_path / name / "checkpoints" / "iteration-000004" / "state.json" for name in ("whole", "halves")]
    whole, halves = (json.loads(end.read_text()) for end in ends)
    assert whole["schedule"] == halves["schedule"] and whole["calls"] == halves["calls"]


def test_a_bandit_interrupted_in_mid_iteration_forgets_that_iteration(tiny_run, tmp_path, monkeypatch):
    # Ctrl-C after the third iteration's search: the checkpoint is that of two iterations, and so are the pulls in it
    words = [*tiny_run, *BANDIT, "run.save_every=0"]
    assert main(with_folder(words, tmp_path / "whole", "train.iterations=4")) == 0
    original, calls = iteration_module.collect, []

    def interrupted(*arguments):
        calls.append(original(*arguments))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return calls[-1]

    with monkeypatch.context() as patched:
        patched.setattr(iteration_module, "collect", interrupted)
        assert main(with_folder(words, tmp_path / "broken", "train.iterations=4")) == 130
    saved = json.loads((tmp_path / "broken" / "checkpoints" / "iteration-000002" / "state.json").read_text())
    assert sum(saved["schedule"]["counts"]) == pytest.approx(3.9)
    assert main(with_folder(words, tmp_path / "broken", "train.iterations=4")) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    assert_equal_weights(tmp_path / "whole", tmp_path / "broken")


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


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("probe(0, [0, 2])", "positional"),
        ("probe([[0, 2]])", r"probes \[\[0, 2\]\] for 2 groups; give one list of starts per group"),
        ("probe([[0], [6]])", "probes start 6; use starts from 0 to 5"),
        ("probe([[0], [1]], estimate='x')", "estimate is 'x' .*use one of exact, x0"),
    ],
)
def test_a_users_schedule_that_probes_what_is_not_there_is_told(tiny_run, tmp_path, monkeypatch, capsys, body, message):
    (tmp_path / "probing.py").write_text(
        "from hrf_fast.trajectory import Window\n"
        "class Probing:\n    needs_anchors = True\n    def __init__(self, *, num_inference_steps, stop): pass\n"
        f"    def __call__(self, iteration, num_groups, *, generator, probe):\n        {body}\n"
        "        return [Window(0, 1)] * num_groups\n"
    )
    monkeypatch.chdir(tmp_path)
    words = [*tiny_run, "window.schedule=probing:Probing", "evaluation.every=0"]
    if message == "positional":
        # what was written for an earlier version is a programming error, with its traceback
        with pytest.raises(TypeError, match=message):
            main(words)
        return
    assert main(words) == 1
    import re

    assert re.search(message, capsys.readouterr().err)


def test_lines_that_outlived_their_checkpoint_are_done_again_once(tiny_run, tmp_path):
    # checkpoints after 2 of 3 iterations only: kill during iteration 3 means 1 logged line too many
    words = with_folder(tiny_run, tmp_path / "run", "run.save_every=2", "train.iterations=3")
    assert main(words) == 0
    whole = metrics(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "iteration-000003"
    newest.rename(tmp_path / "gone")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "torn')
    assert main(words) == 0
    assert metrics(tmp_path / "run") == whole


def test_inner_epochs_and_groups_per_step_make_the_optimizer_steps_they_say(tiny_run, tmp_path, monkeypatch):
    calls = []
    original = learn_module.update
    monkeypatch.setattr(learn_module, "update", lambda *a, **k: calls.append(len(a[2])) or original(*a, **k))
    assert main([*tiny_run, "train.iterations=1", "train.inner_epochs=3", "train.groups_per_step=2"]) == 0
    assert calls == [2, 2, 2]


def test_the_budget_of_evaluations_ends_a_run_after_the_iteration_that_passes_it(tiny_run, tmp_path):
    assert main([*tiny_run, "train.iterations=50", "stop.max_evaluations=1", "evaluation.every=0"]) == 0
    assert len(metrics(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "model").is_dir()
    assert [record["iteration"] for record in read_log(tmp_path / "run" / "evaluations.jsonl")] == [0, 1]


def test_the_cosine_schedule_and_warm_up_reach_the_optimizer(tiny_run, tmp_path):
    words = ["optimizer.learning_rate_schedule=cosine", "optimizer.warmup_iterations=1", "optimizer.learning_rate=1e-3"]
    assert main([*tiny_run, *words, "train.iterations=3"]) == 0
    # warm-up (0+1)/1, then cosine over 2 iterations: 1, (1 + cos(pi/2))/2 = 0.5
    assert [r["learning_rate"] for r in metrics(tmp_path / "run")] == pytest.approx([1e-3, 1e-3, 5e-4])


def test_bf16_trains(tiny_run, tmp_path):
    assert main([*tiny_run, "compute.precision=bf16", "train.iterations=1"]) == 0
    assert weights(tmp_path / "run")["conv_in.weight"].dtype == torch.float32


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
    assert_equal_weights(tmp_path / "whole", tmp_path / "halves")
    # the final model is the averaged one
    newest = tmp_path / "whole" / "checkpoints" / "iteration-000002"
    averaged = load_file(newest / "ema.safetensors")
    assert all(torch.equal(averaged[name], value) for name, value in weights(tmp_path / "whole").items())
    assert not torch.equal(averaged["conv_in.weight"], weights(newest)["conv_in.weight"])


def test_the_checkpoint_of_the_best_panel_outlives_newer_ones(tiny_run, tmp_path, monkeypatch):
    # panels after 0, 1, 2 and 3 iterations score 0, 5, 1, 2; two groups are scored in between
    (tmp_path / "peaked.py").write_text(
        "scores = iter([0, None, None, 5, None, None, 1, None, None, 2])\n"
        "def score(images, prompts=None):\n    value = next(scores)\n"
        "    return images.mean((1, 2, 3)) if value is None else images.new_full((len(images),), value)\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["reward.name=peaked:score", "train.iterations=3", "run.keep_best=true", "run.keep_checkpoints=1"]
    assert main([*tiny_run, *options, "run.save_every=0"]) == 0
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"iteration-000001", "iteration-000003"}


def test_a_reward_that_is_not_finite_skips_its_groups_step_and_is_counted(tiny_run, tmp_path, monkeypatch, capsys):
    # the second group in the first iteration; a group that is not finite is asked for once more
    (tmp_path / "holey.py").write_text(
        "calls = 0\ndef score(images, prompts=None):\n    global calls\n    calls += 1\n"
        "    values = images.mean((1, 2, 3))\n    if calls in (3, 4):\n        values[-1] = float('nan')\n"
        "    return values\n"
    )
    monkeypatch.chdir(tmp_path)
    # calls: panel, both groups, then each group again
    assert main([*tiny_run, "reward.name=holey:score", "stop.on_nan=skip", "evaluation.every=0"]) == 0
    first, second = metrics(tmp_path / "run")
    assert (first["skipped_steps"], second["skipped_steps"]) == (1, 0)
    assert all(value == value for value in first.values() if isinstance(value, float))
    assert "iteration 0, group 1: its optimizer step is skipped: reward 'holey:score'" in capsys.readouterr().out


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tiny_run, tmp_path, monkeypatch):
    original, calls = learn_module.update, []

    def poison(engine, policy, trajectories, advantages, *rest, **options):
        calls.append(1)
        if len(calls) == 1:
            advantages = {group: advantage * torch.nan for group, advantage in advantages.items()}
        return original(engine, policy, trajectories, advantages, *rest, **options)

    monkeypatch.setattr(learn_module, "update", poison)
    assert main([*tiny_run, "stop.on_nan=skip", "evaluation.every=0"]) == 0
    assert [record["skipped_steps"] for record in metrics(tmp_path / "run")] == [1, 0]
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "run").values())


# what goes wrong


def test_rewards_without_any_spread_are_said_and_leave_the_weights_alone(
    tiny_run, tmp_path, tiny_model, monkeypatch, capsys
):
    (tmp_path / "flat_reward.py").write_text("def flat(images, prompts=None):\n    return [1.0] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    assert main([*tiny_run, "reward.name=flat_reward:flat", "optimizer.weight_decay=0"]) == 0
    assert "is the same for all samples of every group" in capsys.readouterr().out
    before = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "run").items())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('no model')", "reward 'late_reward:score' failed with KeyError"),
        ("return [float('nan')] * len(images)", "late_reward:score.*(NaN|nan)"),
        ("return images.mean()", "late_reward:score"),
    ],
    ids=["raises", "NaN", "wrong shape"],
)
def test_a_reward_that_fails_stops_before_the_optimizer_step_with_the_checkpoint_intact(
    tiny_run, tmp_path, monkeypatch, capsys, body, message
):
    # the first panel, the first iteration's two groups and the second panel are fine, the second iteration's fail
    (tmp_path / "late_reward.py").write_text(
        f"calls = 0\ndef score(images, prompts=None):\n    global calls\n    calls += 1\n"
        f"    if calls > 4:\n        {body}\n    return images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main([*tiny_run, "reward.name=late_reward:score"]) == 1
    import re

    assert re.search(message, capsys.readouterr().err)
    checkpoint = tmp_path / "run" / "checkpoints" / "iteration-000001"
    assert checkpoint.is_dir() and not (tmp_path / "run" / "model").exists()
    assert len(metrics(tmp_path / "run")) == 1
    # mended, the same command goes on from there and ends as if nothing had happened
    (tmp_path / "late_reward.py").write_text("def score(images, prompts=None):\n    return images.mean((1, 2, 3))\n")
    del sys.modules["late_reward"]
    assert main([*tiny_run, "reward.name=late_reward:score"]) == 0
    assert main(with_folder(tiny_run, tmp_path / "whole", "reward.name=late_reward:score")) == 0
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


def test_nan_weights_are_caught_before_the_optimizer_step(tiny_run, tmp_path, monkeypatch, capsys):
    original = iteration_module.learn

    def poison(parts, *rest, **options):
        with torch.no_grad():
            next(parts.policy.unet.parameters()).fill_(float("nan"))
        return original(parts, *rest, **options)

    monkeypatch.setattr(iteration_module, "learn", poison)
    assert main([*tiny_run, "run.save_every=0"]) == 1
    assert "was not made" in capsys.readouterr().err
    # an update cut in half is not saved
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_configuration_in_the_folder_is_refused_with_what_differs(tiny_run, tmp_path, capsys):
    assert main(tiny_run) == 0
    before = metrics(tmp_path / "run")
    assert main([*tiny_run, "train.group_size=4"]) == 1
    message = capsys.readouterr().err
    assert "train.group_size was 3 and is 4" in message and "choose another run.folder" in message
    assert metrics(tmp_path / "run") == before


def test_a_folder_that_holds_something_else_is_not_written_into(tiny_run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    assert main(tiny_run) == 1
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_two_processes_do_not_train_in_one_folder(tiny_run, tmp_path, capsys):
    process = start([*tiny_run, "train.iterations=1000"])
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 1)
    assert main([*tiny_run, "train.iterations=1000"]) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / 'run'} is in use by process {process.pid} on " in message and "choose another" in message
    # killed, it holds nothing any more
    process.kill()
    process.communicate(timeout=60)
    done = len(metrics(tmp_path / "run"))
    assert main([*tiny_run, f"train.iterations={done + 1}"]) == 0


def test_an_unwritable_folder_is_named(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(with_folder(tiny_run, tmp_path / "file" / "run")) == 1
    assert "can't be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["window.kwargs={clusters: [[0, 3], [3, 9]]}"],
            r"clusters\[1\] has start 6 but sample.num_inference_steps is 6",
        ),
        (["window.kwargs={clusters: [[5, 6]]}"], r"clusters\[0\] is empty"),
        (["window.schedule=cluster"], r"did you mean 'clusters'\?"),
        (["reward.name=jpeg_compresibility"], "did you mean 'jpeg_compressibility'"),
        (["reward.kwargs={qualty: 3}"], "quality"),
        (["sample.eta=0"], "sample.eta is 0.0"),
        (["run.device=tpu"], "run.device is 'tpu'"),
        (["run.device=cuda:99"], "torch sees"),
        (["evaluation.network=fashon"], "fashion"),
    ],
)
def test_what_can_not_work_is_refused_before_a_folder_is_made(tiny_run, tmp_path, capsys, words, message):
    import re

    assert main([*tiny_run, *words]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [Window(0, 2)]", "returned 1 windows for 2 groups"),
        ("return [(0, 2)] * num_groups", "return a list of Window"),
        ("return [Window(0, 6)] * num_groups", "steps from 5 are deterministic"),
    ],
    ids=["too few", "no windows", "degenerate step"],
)
def test_a_schedule_of_the_users_is_checked(tiny_run, tmp_path, monkeypatch, capsys, body, message):
    (tmp_path / "my_schedule.py").write_text(
        "from hrf_fast.trajectory import Window\n"
        "def build(*, num_inference_steps, stop):\n"
        "    def schedule(iteration, num_groups, *, generator, probe):\n"
        f"        {body}\n"
        "    schedule.needs_anchors = False\n"
        "    return schedule\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main([*tiny_run, "window.schedule=my_schedule:build"]) == 1
    assert message in capsys.readouterr().err


def test_calls_of_an_iteration_that_was_stopped_are_not_counted_twice(tiny_run, tmp_path, monkeypatch):
    # stopped inside the reward of the third iteration, when its rollouts have been counted but not learnt from
    (tmp_path / "pausing.py").write_text(
        "stop_at = 3\ncalls = 0\ndef score(images, prompts=None):\n    global calls\n    calls += 1\n"
        "    if calls == stop_at:\n        raise KeyboardInterrupt\n    return images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["reward.name=pausing:score", "run.save_every=0", "evaluation.every=0", "train.iterations=3"]
    # calls: the first panel, then one an iteration
    assert main([*tiny_run, *options]) == 130
    sys.modules["pausing"].stop_at = None
    assert main([*tiny_run, *options]) == 0
    assert main(with_folder([*tiny_run, *options], tmp_path / "whole")) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


def start(words, **environment):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "hrf_fast" / "train.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def wait_for_lines(path: Path, count: int):
    for _ in range(1200):
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} never had {count} lines")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_resumes_to_the_uninterrupted_result(tiny_run, tmp_path, stop):
    words = [*tiny_run, "train.iterations=12", "evaluation.every=6"]
    process = start(words)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    if stop == signal.SIGINT:
        assert process.returncode == 130, errors
        assert "stopped by Ctrl-C" in errors
    assert not (tmp_path / "run" / "model").exists()
    assert main(words) == 0
    assert main(with_folder(words, tmp_path / "whole")) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")
