"""Orders of updates, kept graphs and shared UNet calls, through the real command: what must not change the numbers."""

import pytest
import torch

import hrf_fast.build as build_module
import hrf_fast.memory.activations as activations_module
import hrf_fast.train as train_module
from hrf_fast.build import build_parts, build_policy
from hrf_fast.config.load import load_config
from hrf_fast.config.rules import check_job
from hrf_fast.memory.activations import memory_for
from hrf_fast.policies.pixel import Policy
from hrf_fast.train import main
from hrf_fast.training.rewarding import Background
from tests.invariants.test_training import assert_equal_weights, metrics, weights, with_folder

ON_POLICY = ["train.order=on_policy", "evaluation.every=0", "window.schedule=random", "train.iterations=3"]


def run(tiny_run, folder, *words):
    assert main(with_folder([*tiny_run, *ON_POLICY], folder, *words)) == 0
    return metrics(folder)


def largest_difference(a, b):
    first, second = weights(a), weights(b)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(
    "words", [[], ["train.groups_per_step=2"], ["train.groups_per_step=2", "compute.max_batch=6"]], ids=" ".join
)
def test_keep_is_replay_is_checkpoint(tiny_run, tmp_path, words):
    kept = run(tiny_run, tmp_path / "keep", "compute.activations=keep", *words)
    replayed = run(tiny_run, tmp_path / "replay", *words)
    assert_equal_weights(tmp_path / "keep", tmp_path / "replay")
    run(tiny_run, tmp_path / "checkpoint", "compute.activations=checkpoint", *words)
    assert largest_difference(tmp_path / "keep", tmp_path / "checkpoint") < 1e-6
    for keep, replay in zip(kept, replayed, strict=True):
        # no window step is forwarded again
        assert replay["forwards"] - keep["forwards"] == keep["backwards"]
        assert keep["backwards"] == replay["backwards"]
        # on-policy, to the bit
        assert keep["ratio_mean"] == keep["ratio_max"] == replay["ratio_mean"] == replay["ratio_max"] == 1.0
        assert keep["loss"] == replay["loss"] and keep["grad_norm"] == replay["grad_norm"]


def test_only_window_steps_run_with_gradient(tiny_run, tmp_path, monkeypatch):
    seen, original = [], Policy.model_output

    def watched(policy, latents, timesteps):
        output = original(policy, latents, timesteps)
        seen.append((int(timesteps), output.requires_grad))
        return output

    monkeypatch.setattr(Policy, "model_output", watched)
    # which replays with gradient too
    monkeypatch.setattr(train_module, "self_check", lambda *_: "")
    # 6 steps, window [3, 5) of both groups
    words = ["window.schedule=clusters", "window.kwargs.clusters=[{steps: [3]}]", "compute.activations=keep"]
    run(tiny_run, tmp_path / "run", *words, "train.iterations=1", "compute.max_batch=6", "train.groups_per_step=2")
    timesteps = build_parts(load_config(with_folder(tiny_run, tmp_path / "other"))).policy.timestep_list
    with_gradient = {timesteps.index(timestep) for timestep, gradient in seen if gradient}
    assert with_gradient == {3, 4}
    # one call per step for both groups; no step of the window runs twice with gradient
    assert sum(gradient for _, gradient in seen) == 2


def test_on_policy_learns_each_step_from_the_policy_that_the_step_before_left(tiny_run, tmp_path):
    # one group an iteration, or two in one iteration: the second group's rollout comes after the first update
    whole = ["window.schedule=full", "train.iterations=1"]
    on_policy = run(tiny_run, tmp_path / "on_policy", *whole)[0]
    collect = run(tiny_run, tmp_path / "collect", *whole, "train.order=collect")[0]
    assert on_policy["ratio_max"] == 1.0 and collect["ratio_max"] > 1.0
    assert on_policy["reward_mean"] != collect["reward_mean"]
    # with one optimizer step an iteration the orders are the same
    words = [*whole, "train.groups_per_step=2"]
    run(tiny_run, tmp_path / "a", *words)
    run(tiny_run, tmp_path / "b", *words, "train.order=collect")
    assert_equal_weights(tmp_path / "a", tmp_path / "b")


def test_groups_that_share_calls_have_the_numbers_of_groups_alone(tiny_run, tmp_path):
    # fp32: a UNet's sums depend on the batch in the last digits; a large epsilon, so that AdamW doesn't magnify them
    for order, steps in (("collect", 1), ("collect", 2), ("on_policy", 1)):
        words = [f"train.order={order}", f"compute.steps_per_forward={steps}", "train.groups_per_step=2"]
        words += ["train.iterations=1", "optimizer.kwargs.eps=0.01"]
        alone = run(tiny_run, tmp_path / f"alone-{order}-{steps}", *words)
        shared = run(tiny_run, tmp_path / f"shared-{order}-{steps}", *words, "compute.max_batch=6")
        assert [record["forwards"] for record in shared] == [record["forwards"] for record in alone]
        assert shared[0]["batches"] < alone[0]["batches"]
        assert shared[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-4)
        assert largest_difference(tmp_path / f"alone-{order}-{steps}", tmp_path / f"shared-{order}-{steps}") < 1e-6


def test_inner_epochs_of_an_on_policy_step_replay(tiny_run, tmp_path):
    record = run(tiny_run, tmp_path / "run", "train.inner_epochs=3", "train.iterations=1")[0]
    # the second and third epochs are off-policy
    assert record["ratio_max"] > 1.0
    # 3 samples x window steps x 3 epochs
    assert record["backwards"] == 9 * record["window_steps"]


def test_rewards_in_the_background_are_those_in_line(tiny_run, tmp_path, monkeypatch):
    words = ["train.order=collect"]
    run(tiny_run, tmp_path / "background", *words)
    monkeypatch.setattr(build_module, "Background", lambda **_: Background(thread=False))
    run(tiny_run, tmp_path / "inline", *words)
    assert metrics(tmp_path / "background") == metrics(tmp_path / "inline")
    assert_equal_weights(tmp_path / "background", tmp_path / "inline")


def test_an_interrupted_on_policy_iteration_is_finished_and_resumes_to_the_uninterrupted_result(
    tiny_run, tmp_path, monkeypatch
):
    import os
    import signal

    import hrf_fast.training.iteration as iteration_module

    words = with_folder([*tiny_run, *ON_POLICY], tmp_path / "run", "compute.activations=keep", "run.save_every=0")
    original, updates = iteration_module.learn, []

    def learn(*arguments, **options):
        updates.append(1)
        if len(updates) == 3:
            # in the first of two optimizer steps of the second iteration
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments, **options)

    monkeypatch.setattr(iteration_module, "learn", learn)
    assert main(words) == 130
    assert len(metrics(tmp_path / "run")) == 2 and len(updates) == 4
    assert main(words) == 0
    run(tiny_run, tmp_path / "whole", "compute.activations=keep")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


# auto


@pytest.fixture
def measured_once(monkeypatch):
    """The tiny UNet is measured once in this file: it takes seconds."""
    original = activations_module.measure_running

    def measure(unet, precision, *, checkpointing):
        if checkpointing not in _MEASURED:
            _MEASURED[checkpointing] = original(unet, precision, checkpointing=checkpointing)
        return _MEASURED[checkpointing]

    monkeypatch.setattr(activations_module, "measure_running", measure)


_MEASURED = {}


def parts_with(tiny_run, tmp_path, *words):
    return build_parts(load_config(with_folder([*tiny_run, *ON_POLICY], tmp_path / "run", *words)))


def test_auto_keeps_what_fits_and_says_so(tiny_run, tmp_path, capsys, measured_once):
    words = ["compute.activations=auto", "train.group_size=8"]
    chosen = [
        parts_with(tiny_run, tmp_path, *words, f"compute.memory_budget={budget}").activations
        for budget in ("1GB", "16MB", "8MB", "5MB")
    ]
    assert chosen[0].kept_pairs == float("inf") and "activations: keep, " in chosen[0].reason
    # at 0.55 MB for a sample and step, beside 5.4 MB that replay needs: some steps of a group of 8
    assert 8 <= chosen[1].kept_pairs < 40 and "replay for the rest" in chosen[1].reason
    assert chosen[2].kept_pairs == chosen[3].kept_pairs == 0
    assert "activations: replay, " in chosen[2].reason and "activations: checkpoint, " in chosen[3].reason
    assert [choice.checkpoint for choice in chosen] == [False, False, False, True]
    # the choice reaches the user, and the numbers do not depend on it
    run(tiny_run, tmp_path / "whole", *words, "compute.memory_budget=1GB")
    assert "activations: keep, " in capsys.readouterr().out
    run(tiny_run, tmp_path / "mixed", *words, "compute.memory_budget=16MB")
    assert_equal_weights(tmp_path / "whole", tmp_path / "mixed")


def test_several_steps_a_call_are_replayed_beside_kept_ones(tiny_run, tmp_path, capsys, measured_once):
    words = ["train.group_size=8", "compute.steps_per_forward=2", "train.iterations=1", "optimizer.kwargs.eps=0.01"]
    words += ["window.schedule=full"]
    mixed = run(tiny_run, tmp_path / "mixed", *words, "compute.activations=auto", "compute.memory_budget=18MB")[0]
    assert "replay for the rest" in capsys.readouterr().out
    replayed = run(tiny_run, tmp_path / "replay", *words)[0]
    assert 0 < replayed["forwards"] - mixed["forwards"] < replayed["backwards"] == mixed["backwards"]
    # fp32: a UNet's sums depend on the batch in the last digits
    assert largest_difference(tmp_path / "mixed", tmp_path / "replay") < 1e-6


def test_auto_says_what_would_fit(tiny_run, tmp_path, measured_once):
    words = ["compute.activations=auto", "train.group_size=64", "compute.batch_size=64"]
    with pytest.raises(ValueError, match=r"nothing fits: the least, checkpoint, needs .* of 3 MB .*micro_batch_size="):
        parts_with(tiny_run, tmp_path, *words, "compute.memory_budget=3MB")
    with pytest.raises(ValueError, match=r"nothing fits.*even one image at a time needs .*offload"):
        parts_with(tiny_run, tmp_path, *words, "compute.memory_budget=10KB")


def test_auto_looks_for_free_memory_where_no_budget_is_given(tiny_run, tmp_path, monkeypatch, measured_once):
    chosen = parts_with(tiny_run, tmp_path, "compute.activations=auto").activations
    assert chosen.kept_pairs == float("inf") and "(free, " in chosen.reason
    # published order: nothing can be kept
    assert parts_with(tiny_run, tmp_path, "compute.activations=auto", "train.order=collect").activations.kept_pairs == 0
    monkeypatch.setattr(activations_module, "_MEMINFO", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not say how much memory is free; set compute.memory_budget"):
        parts_with(tiny_run, tmp_path, "compute.activations=auto")


def test_measuring_leaves_no_trace(tiny_run, tmp_path):
    parts = parts_with(tiny_run, tmp_path, "compute.activations=auto")
    assert parts.policy.calls.forwards == 0
    assert all(parameter.grad is None for parameter in parts.policy.unet.parameters())
    assert not parts.policy.unet.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compute.activations=keep"], "compute.activations is keep but train.order is collect"),
        (
            ["compute.activations=keep", "train.order=on_policy", "train.inner_epochs=2"],
            "train.inner_epochs is 2: a kept graph serves one epoch; use train.inner_epochs=1",
        ),
        (["train.order=on_policy", "train.advantages=batch"], "peers must be rolled out together; .*groups_per_step=2"),
        (["compute.max_batch=2"], "compute.max_batch is 2 but train.group_size is 3: .*use at least that, 0"),
        (["compute.max_batch=6", "compute.micro_batch_size=2"], "compute.max_batch is 6, which joins groups, but"),
        (["compute.max_batch=-1"], "compute.max_batch is -1"),
        (["train.order=onpolicy"], "train.order is 'onpolicy'.*on_policy"),
        (
            ["compute.activations=keep", "train.order=on_policy", "compute.steps_per_forward=2"],
            "compute.steps_per_forward is 2, .*kept steps are not replayed; use compute.steps_per_forward=1",
        ),
        (["compute.memory_budget=8GB"], "compute.activations is replay, which plans nothing"),
        (["compute.activations=auto", "compute.memory_budget=much"], "compute.memory_budget is 'much'; use a number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_t_work_together_is_refused(tiny_run, words, message):
    with pytest.raises(ValueError, match=message):
        load_config([*tiny_run, *words])


def test_max_batch_is_refused_where_a_rank_rolls_out_one_group_at_a_time(tiny_run):
    words = [*tiny_run, "train.order=on_policy", "train.groups_per_iteration=4", "compute.max_batch=6"]
    for world_size, per_step in ((1, 1), (2, 2)):
        with pytest.raises(ValueError, match="compute.max_batch is 6, .* that is one; use more groups per step"):
            check_job(load_config([*words, f"train.groups_per_step={per_step}"]), world_size)
    check_job(load_config([*words, "train.groups_per_step=2"]), 1)
    # what holds one group joins none
    check_job(load_config([*words, "compute.max_batch=3"]), 1)


def test_keep_is_refused_where_the_weights_go_away(tiny_run, tmp_path, capsys):
    words = ["compute.activations=keep", "engine.deepspeed=configs/deepspeed/zero3.json"]
    assert main(with_folder([*tiny_run, *ON_POLICY], tmp_path / "run", *words)) == 1
    assert "is ZeRO-3, which takes the weights away after each forward; use replay" in capsys.readouterr().err


def test_kept_graphs_are_gone_after_the_update(tiny_run, tmp_path):
    # what autograd holds at most: one optimizer step's windows, however many steps an iteration has
    from benchmarks.training_bench.memory import SavedTensors

    def peak(*words):
        saved = SavedTensors()
        with saved.counting():
            run(tiny_run, tmp_path / "-".join(["run", *words]).replace("=", ""), "train.iterations=2", *words)
        assert saved.live == 0
        return saved.peak

    words = ["window.schedule=full", "compute.activations=keep"]
    assert peak(*words, "train.groups_per_iteration=3") < 1.1 * peak(*words, "train.groups_per_iteration=1")


def test_a_skipped_step_s_graphs_are_gone_before_the_next_rollout(tiny_run, tmp_path, monkeypatch):
    from benchmarks.training_bench.memory import SavedTensors

    (tmp_path / "holey.py").write_text(
        "import torch\ncalls = []\n"
        "def score(images, prompts=None):\n    calls.append(len(images))\n"
        "    values = torch.arange(len(images), dtype=torch.float32)\n"
        # the first group of the first iteration, whole and by itself, after the panel before it
        "    return values * float('nan') if len(calls) in BAD else values\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import holey

    words = ["window.schedule=full", "compute.activations=keep", "stop.on_nan=skip", "reward.name=holey:score"]
    words += ["train.iterations=1", "train.groups_per_iteration=3"]
    peaks, records = [], []
    for bad in ((), (2, 3)):
        monkeypatch.setattr(holey, "BAD", bad, raising=False)
        holey.calls.clear()
        saved = SavedTensors()
        with saved.counting():
            records += run(tiny_run, tmp_path / f"run-{len(bad)}", *words)
        assert saved.live == 0
        peaks.append(saved.peak)
    assert [record["skipped_steps"] for record in records] == [0, 1]
    assert peaks[1] < 1.1 * peaks[0]
    # 3 samples x 5 window steps a group: forwards all the same, and a backward less
    assert [record["backwards"] for record in records] == [45, 30]
    assert records[0]["forwards"] == records[1]["forwards"]


def test_counting_calls_leaves_the_bandit_s_memory_empty(tiny_run, tmp_path, measured_once):
    words = ["window.schedule=dynamic", "window.kwargs.search=bandit", "window.kwargs.stride=1"]
    parts = parts_with(tiny_run, tmp_path, *words, "compute.activations=auto")
    assert parts.schedule.counts == [0.0] * 4


def test_auto_plans_for_a_container_that_has_less_than_the_machine(tiny_run, tmp_path, monkeypatch):
    config = load_config(with_folder([*tiny_run, *ON_POLICY], tmp_path / "run", "compute.activations=auto"))
    policy = build_policy(config)
    weights = sum(parameter.nbytes for parameter in policy.unet.parameters())
    monkeypatch.setattr(activations_module, "_CGROUP", tmp_path)
    machine = memory_for(config, policy)
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 300\n")
    (tmp_path / "memory.max").write_text("max\n")
    # nothing but noise between two looks at the machine
    assert memory_for(config, policy) > machine / 2
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory_for(config, policy) == 600 + weights


def test_a_window_that_ends_early_leaves_nothing_after_it(tiny_run, tmp_path, monkeypatch):
    # a user's schedule: windows [1, 3) and [2, 5) of 6 steps share calls inside and beyond
    (tmp_path / "early.py").write_text(
        "from hrf_fast.trajectory import Window\n"
        "class Early:\n    needs_anchors = True\n    def __init__(self, *, num_inference_steps, stop):\n        pass\n"
        "    def __call__(self, iteration, num_groups, *, generator, probe):\n"
        "        return [Window(1, 3), Window(2, 5)]\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["window.schedule=early:Early", "train.groups_per_step=2", "compute.max_batch=6", "train.iterations=1"]
    kept = run(tiny_run, tmp_path / "keep", *words, "compute.activations=keep")[0]
    run(tiny_run, tmp_path / "replay", *words)
    assert_equal_weights(tmp_path / "keep", tmp_path / "replay")
    # 3 samples x (2 + 3 window steps)
    assert kept["backwards"] == 15 and torch.isfinite(torch.tensor(kept["loss"]))
