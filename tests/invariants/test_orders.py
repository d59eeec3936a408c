"""Orders of updates, kept graphs and shared network calls in whole runs: what must not change the numbers."""

import math
import os
import signal
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

import hrf_fast
import hrf_fast.memory.activations as activations_module
from hrf_fast.assembly.components import build_components
from hrf_fast.assembly.model import build_policy
from hrf_fast.config.load import load_config
from hrf_fast.memory.activations import memory_for
from hrf_fast.policies.denoiser import DenoiserPolicy
from hrf_fast.train import main
from hrf_fast.training.rewarding import Rewarder, reward_groups
from tests.runs import (
    assert_equal_runs,
    equal,
    largest_difference,
    metrics,
    scheduled,
    train,
    weights,
    with_folder,
)

ON_POLICY = ["train.order=on_policy", "evaluation.every=0", "window.schedule=random"]


def run(tiny_run, folder, *words, **options):
    train(with_folder([*tiny_run, *ON_POLICY], folder, *words), **options)
    return metrics(folder)


def difference(a, b):
    return largest_difference(weights(a), weights(b))


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["train.groups_per_step=2"], marks=pytest.mark.slow),
        ["train.groups_per_step=2", "compute.images_per_call=6"],
    ],
    ids=" ".join,
)
def test_keep_is_replay_is_checkpoint(tiny_run, tmp_path, words):
    kept = run(tiny_run, tmp_path / "keep", "compute.activations=keep", *words)
    replayed = run(tiny_run, tmp_path / "replay", *words)
    assert equal(weights(tmp_path / "keep"), weights(tmp_path / "replay"))
    run(tiny_run, tmp_path / "checkpoint", "compute.activations=checkpoint", *words)
    assert difference(tmp_path / "keep", tmp_path / "checkpoint") < 1e-6
    for keep, replay in zip(kept, replayed, strict=True):
        # no window step is forwarded again
        assert replay["forwards"] - keep["forwards"] == keep["backwards"]
        assert keep["backwards"] == replay["backwards"]
        # on-policy, to the bit
        assert keep["ratio_mean"] == keep["ratio_max"] == replay["ratio_mean"] == replay["ratio_max"] == 1.0
        assert keep["loss"] == replay["loss"] and keep["grad_norm"] == replay["grad_norm"]


def test_only_window_steps_run_with_gradient(tiny_run, tmp_path, monkeypatch):
    seen, original = [], DenoiserPolicy.predict

    def watched(policy, latents, steps, condition):
        prediction = original(policy, latents, steps, condition)
        seen.append((steps, prediction.model_output.requires_grad))
        return prediction

    class AfterFirstPanel(hrf_fast.Listener):
        # the self-check before it runs with gradient too
        def panel(self, record, images):
            if record["iteration"] == 0:
                seen.clear()

    monkeypatch.setattr(DenoiserPolicy, "predict", watched)
    # 6 steps, window [3, 5) of both groups
    words = ["window.schedule=clusters", "window.kwargs.clusters=[{steps: [3]}]", "compute.activations=keep"]
    words += ["train.iterations=1", "compute.images_per_call=6", "train.groups_per_step=2"]
    run(tiny_run, tmp_path / "run", *words, listeners=[AfterFirstPanel()])
    # one call per step for both groups; no step of the window runs twice with gradient
    assert [step for step, gradient in seen if gradient] == [3, 4]
    # anchors, rollouts and the last panel run the other steps
    assert {step for step, gradient in seen if not gradient} == set(range(6))


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
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("order", ["collect", "on_policy"])
def test_groups_that_share_calls_have_the_numbers_of_groups_alone(tiny_run, tmp_path, order):
    # fp32: a UNet's sums depend on the batch in the last digits; a large epsilon, so that AdamW doesn't magnify them
    words = [f"train.order={order}", "train.groups_per_step=2", "train.iterations=1", "optimizer.kwargs.eps=0.01"]
    alone = run(tiny_run, tmp_path / "alone", *words)[0]
    # collect replays two steps of a group in a call, on_policy one step of both groups
    shared = run(tiny_run, tmp_path / "shared", *words, "compute.images_per_call=6")[0]
    assert shared["forwards"] == alone["forwards"]
    assert shared["batches"] < alone["batches"]
    assert shared["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert difference(tmp_path / "alone", tmp_path / "shared") < 1e-6


def test_inner_epochs_of_an_on_policy_step_replay(tiny_run, tmp_path):
    record = run(tiny_run, tmp_path / "run", "train.inner_epochs=3", "train.iterations=1")[0]
    # the second and third epochs are off-policy
    assert record["ratio_max"] > 1.0
    # 3 samples x window steps x 3 epochs
    assert record["backwards"] == 9 * record["window_steps"]


def test_rewards_of_the_thread_are_those_in_line(tiny_run, tmp_path, monkeypatch):
    run(tiny_run, tmp_path / "thread", "train.order=collect")

    def in_line(rewarder, images, prompts=None, log_probs=None, estimates=None, after=None):
        future = Future()
        future.set_result(reward_groups(rewarder.reward, images, prompts))
        return future

    monkeypatch.setattr(Rewarder, "submit", in_line)
    run(tiny_run, tmp_path / "in line", "train.order=collect")
    assert_equal_runs(tmp_path / "thread", tmp_path / "in line")


class CtrlC(hrf_fast.Listener):
    """Brightness as a reward; with it comes a Ctrl-C in the second iteration, after the first of its two updates."""

    def __init__(self, presses: bool) -> None:
        self.presses, self.rewarded, self.records = presses, 0, []

    def iteration(self, record):
        self.records.append(record)

    def __call__(self, images, prompts=None):
        # a panel has six images, a group three; in the second iteration the third and fourth group
        self.rewarded += len(images) == 3
        if self.presses and len(images) == 3 and self.rewarded == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return images.mean((1, 2, 3))


def test_an_interrupted_on_policy_iteration_is_finished_and_resumes_to_the_uninterrupted_result(tiny_run, tmp_path):
    words = ["compute.activations=keep", "run.save_every=0", "train.iterations=3"]
    pressed = CtrlC(presses=True)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_run, tmp_path / "run", *words, reward=pressed, listeners=[pressed])
    # the iteration has been finished and told, and no other was begun
    assert [record["iteration"] for record in pressed.records] == [0, 1] and pressed.rewarded == 4
    assert len(metrics(tmp_path / "run")) == 2
    run(tiny_run, tmp_path / "run", *words, reward=CtrlC(presses=False))
    run(tiny_run, tmp_path / "whole", *words, reward=CtrlC(presses=False))
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


# auto


@pytest.fixture
def measured_once(monkeypatch):
    """The tiny UNet is measured once in this file: it takes seconds."""
    original = activations_module.measure_running

    def measure(policy, *, checkpointing, guided):
        if checkpointing not in _MEASURED:
            _MEASURED[checkpointing] = original(policy, checkpointing=checkpointing, guided=guided)
        return _MEASURED[checkpointing]

    monkeypatch.setattr(activations_module, "measure_running", measure)


_MEASURED = {}


def components_with(tiny_run, tmp_path, *words):
    return build_components(load_config(with_folder([*tiny_run, *ON_POLICY], tmp_path / "run", *words)))[1]


@pytest.mark.slow
def test_auto_keeps_what_fits_and_says_so(tiny_run, tmp_path, capsys, measured_once):
    words = ["compute.activations=auto", "train.group_size=8", "compute.images_per_call=8"]
    chosen = [
        components_with(tiny_run, tmp_path, *words, f"compute.memory_budget={budget}")
        for budget in ("1GB", "10MB", "6MB", "3MB")
    ]
    kept = [components.call_plan.kept_pairs for components in chosen]
    reasons = [next(note for note in components.notes if "activations" in note) for components in chosen]
    assert kept[0] == math.inf and "activations: keep, " in reasons[0]
    # at 0.39 MB for a sample and step, beside 3.6 MB that replay needs: some steps of a group of 8
    assert 8 <= kept[1] < 40 and f"keep for up to {kept[1]} " in reasons[1] and "replay" in reasons[1]
    assert kept[2] == kept[3] == 0
    assert "activations: replay, " in reasons[2] and "activations: checkpoint, " in reasons[3]
    checkpointed = [components.policy.unet.is_gradient_checkpointing for components in chosen]
    assert checkpointed == [False, False, False, True]
    # the choice reaches the user, and the numbers do not depend on it
    run(tiny_run, tmp_path / "whole", *words, "compute.memory_budget=1GB")
    assert "activations: keep, " in capsys.readouterr().out
    run(tiny_run, tmp_path / "mixed", *words, "compute.memory_budget=10MB")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "mixed"))


def test_steps_of_joined_groups_are_replayed_beside_kept_ones(tiny_run, tmp_path, capsys, measured_once):
    words = ["train.group_size=8", "train.groups_per_step=2", "compute.images_per_call=16", "train.iterations=1"]
    words += ["window.schedule=full"]
    mixed = run(tiny_run, tmp_path / "mixed", *words, "compute.activations=auto", "compute.memory_budget=30MB")[0]
    assert "keep for up to" in capsys.readouterr().out
    replayed = run(tiny_run, tmp_path / "replay", *words)[0]
    assert 0 < replayed["forwards"] - mixed["forwards"] < replayed["backwards"] == mixed["backwards"]
    assert mixed["ratio_mean"] == mixed["ratio_max"] == 1.0
    assert equal(weights(tmp_path / "mixed"), weights(tmp_path / "replay"))


@pytest.mark.parametrize(
    ("budget", "said"), [("3MB", "compute.images_per_call="), ("10KB", "engine.deepspeed=")], ids=["smaller", "none"]
)
def test_auto_says_what_would_fit(tiny_run, tmp_path, measured_once, budget, said):
    words = ["compute.activations=auto", "train.group_size=64", f"compute.memory_budget={budget}"]
    with pytest.raises(ValueError, match="compute.activations is auto") as error:
        components_with(tiny_run, tmp_path, *words)
    assert "checkpoint" in str(error.value) and said in str(error.value)


def test_auto_looks_for_free_memory_where_no_budget_is_given(tiny_run, tmp_path, monkeypatch, measured_once):
    chosen = components_with(tiny_run, tmp_path, "compute.activations=auto")
    assert chosen.call_plan.kept_pairs == math.inf and "free" in chosen.notes[0]
    # published order: nothing can be kept
    published = components_with(tiny_run, tmp_path, "compute.activations=auto", "train.order=collect")
    assert published.call_plan.kept_pairs == 0


def test_measuring_leaves_no_trace(tiny_run, tmp_path):
    policy = components_with(tiny_run, tmp_path, "compute.activations=auto").policy
    assert policy.calls.forwards == 0
    assert all(parameter.grad is None for parameter in policy.network.parameters())
    assert not policy.unet.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compute.activations=keep"], ("compute.activations is keep", "train.order is collect")),
        (
            ["compute.activations=keep", "train.order=on_policy", "train.inner_epochs=2"],
            ("compute.activations is keep", "train.inner_epochs is 2"),
        ),
        (
            ["train.order=on_policy", "train.advantages=batch"],
            ("train.advantages is batch", "train.order is on_policy", "train.groups_per_step=2"),
        ),
        (["compute.images_per_call=-1"], ("compute.images_per_call is -1", "at least 0")),
        (["train.order=onpolicy"], ("train.order is 'onpolicy'", "on_policy")),
        (["compute.memory_budget=8GB"], ("compute.memory_budget is 8GB", "compute.activations is replay")),
        (["compute.activations=auto", "compute.memory_budget=much"], ("compute.memory_budget is 'much'", "8")),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_can_t_work_together_is_refused(tiny_run, words, said):
    with pytest.raises(ValueError) as error:
        load_config([*tiny_run, *words])
    assert all(part in str(error.value) for part in said)


def test_keep_is_refused_where_the_weights_go_away(tiny_run, tmp_path, capsys):
    words = ["compute.activations=keep", "engine.deepspeed=configs/deepspeed/zero3.json"]
    assert main(with_folder([*tiny_run, *ON_POLICY], tmp_path / "run", *words)) == 1
    message = capsys.readouterr().err
    assert all(part in message for part in ("compute.activations is keep", "zero3.json", "replay"))


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


def test_a_skipped_step_s_graphs_are_gone_before_the_next_rollout(tiny_run, tmp_path):
    from benchmarks.training_bench.memory import SavedTensors

    words = ["window.schedule=full", "compute.activations=keep", "stop.on_nan=skip"]
    words += ["train.iterations=1", "train.groups_per_iteration=3"]
    peaks, records = [], []
    # the first group of the first iteration, and again by itself, after the panel before it
    for bad in ((), (2, 3)):
        calls = []

        def holey(images, prompts=None, bad=bad, calls=calls):
            calls.append(len(images))
            values = torch.arange(len(images), dtype=torch.float32)
            return values * float("nan") if len(calls) in bad else values

        saved = SavedTensors()
        with saved.counting():
            records += run(tiny_run, tmp_path / f"run-{len(bad)}", *words, reward=holey)
        assert saved.live == 0
        peaks.append(saved.peak)
    assert [record["skipped_steps"] for record in records] == [0, 1]
    assert peaks[1] < 1.1 * peaks[0]
    # 3 samples x 5 window steps a group: forwards all the same, and a backward less
    assert [record["backwards"] for record in records] == [45, 30]
    assert records[0]["forwards"] == records[1]["forwards"]


def test_counting_calls_leaves_the_bandit_s_memory_empty(tiny_run, tmp_path, measured_once):
    words = ["window.schedule=dynamic", "window.kwargs.search=bandit", "window.kwargs.stride=1"]
    components = components_with(tiny_run, tmp_path, *words, "compute.activations=auto")
    assert components.schedule.counts == [0.0] * 4


def test_auto_plans_for_a_container_that_has_less_than_the_machine(tiny_run, tmp_path, monkeypatch):
    config = load_config(with_folder([*tiny_run, *ON_POLICY], tmp_path / "run", "compute.activations=auto"))
    policy = build_policy(config)
    weights = sum(parameter.nbytes for parameter in policy.network.parameters())
    monkeypatch.setattr(activations_module, "_CGROUP", tmp_path)
    machine = memory_for(config, policy)
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 300\n")
    (tmp_path / "memory.max").write_text("max\n")
    # nothing but noise between two looks at the machine
    assert memory_for(config, policy) > machine / 2
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory_for(config, policy) == 600 + weights


def test_a_budget_counts_what_else_lies_on_a_gpu(tiny_run, tmp_path, monkeypatch):
    words = ["compute.activations=auto", "compute.memory_budget=1MB"]
    config = load_config(with_folder([*tiny_run, *ON_POLICY], tmp_path / "run", *words))
    network = build_policy(config).network
    weights = sum(parameter.nbytes for parameter in network.parameters())
    # encoders, decoder and a reward's network of 300,000 bytes
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: weights + 300_000)
    on_gpu = SimpleNamespace(network=network, device=torch.device("cuda", 0))
    assert memory_for(config, on_gpu) == 700_000
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: weights + 2_000_000)
    assert memory_for(config, on_gpu) == 0


def test_a_window_that_ends_early_leaves_nothing_after_it(tiny_run, tmp_path):
    # windows of 6 steps that share calls inside and beyond
    early = scheduled(lambda num_groups, probe: [hrf_fast.Window(1, 3), hrf_fast.Window(2, 5)])
    words = ["train.groups_per_step=2", "compute.images_per_call=6", "train.iterations=1"]
    kept = run(tiny_run, tmp_path / "keep", *words, "compute.activations=keep", schedule=early)[0]
    run(tiny_run, tmp_path / "replay", *words, schedule=early)
    assert equal(weights(tmp_path / "keep"), weights(tmp_path / "replay"))
    # 3 samples x (2 + 3 window steps)
    assert kept["backwards"] == 15 and math.isfinite(kept["loss"])
