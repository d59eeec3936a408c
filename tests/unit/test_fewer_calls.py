"""Fewer network calls: anchors by few steps and used again, a share of a window's steps, groups without spread."""

from types import SimpleNamespace

import pytest
import torch

from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.memory.counts import count_calls
from hrf_fast.noise import NoiseKey
from hrf_fast.policies.sample import deterministic_jumps, sample_deterministic, starting_noise
from hrf_fast.training.anchors import Anchors
from hrf_fast.training.calls import Call, CallPlan, Piece
from hrf_fast.training.groups import Groups
from hrf_fast.training.rollout import Rollout
from hrf_fast.training.thinning import Thinning, draw_offsets
from hrf_fast.training.update import update
from hrf_fast.windows.base import Window
from tests.conftest import make_policy
from tests.runs import assert_equal_training, equal, metrics, train, weights, with_folder
from tests.waits import loop_parts

pytestmark = pytest.mark.long


def bright(images, prompts=None):
    return images.mean((1, 2, 3))


# --- anchors by few deterministic steps -------------------------------------------------------------------------------


def test_jumps_are_ddim_with_eta_0_between_the_chosen_steps():
    policy = make_policy()
    steps, jumps = deterministic_jumps(policy.sampler, 3)
    assert steps == [0, 2, 4]
    latents, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    from hrf_kernels import gaussian_mean

    for index, (step, following) in enumerate(zip(steps, (2, 4, None), strict=True)):
        signal, noise = policy.sampler.signal[step], policy.sampler.noise[step]
        x0 = (latents - noise * output) / signal
        # epsilon prediction: the output is the noise; the last jump goes to the clean image
        expected = x0 if following is None else policy.sampler.signal[following] * x0
        expected = expected + (0 if following is None else policy.sampler.noise[following] * output)
        torch.testing.assert_close(gaussian_mean(output, latents, jumps[index]), expected, rtol=1e-4, atol=1e-4)


def test_jumps_over_every_step_are_the_sampler_s_deterministic_steps():
    sampler = make_policy().sampler
    steps, jumps = deterministic_jumps(sampler, len(sampler))
    assert steps == list(range(len(sampler)))
    for name, value in jumps.tensors().items():
        torch.testing.assert_close(value, getattr(sampler.deterministic, name), rtol=1e-5, atol=1e-5)


def test_an_anchor_by_few_steps_costs_as_many_calls_and_does_not_depend_on_the_batch():
    policy = make_policy()
    noise = NoiseKey(3, torch.arange(3))
    clean = sample_deterministic(policy, noise, [None] * 3, steps=2, images_per_call=64)
    assert policy.calls.forwards == 3 * 2 and clean.shape == starting_noise(policy, noise).shape
    alone = sample_deterministic(policy, noise[1:2], [None], steps=2, images_per_call=1)
    torch.testing.assert_close(alone[0], clean[1], rtol=1e-4, atol=1e-4)


# --- anchors that serve several iterations ----------------------------------------------------------------------------

REUSED = ["window.anchor_reuse=2", "window.anchor_steps=3", "evaluation.every=0", "window.schedule=random"]


def test_anchors_serve_two_iterations_and_a_run_stopped_between_them_resumes_bit_for_bit(tiny_run, tmp_path):
    words = [*tiny_run, *REUSED, "train.iterations=3"]
    train(with_folder(words, tmp_path / "whole"), reward=bright)
    # after one iteration of the two that the first anchors serve
    for iterations in (1, 3):
        train(with_folder(words, tmp_path / "halves", f"train.iterations={iterations}"), reward=bright)
    assert_equal_training(tmp_path / "whole", tmp_path / "halves")
    records = metrics(tmp_path / "whole")
    # two anchors of three steps each in iterations 0 and 2; the rest is groups of 3 from their starts, and replays
    for before, record in zip([{"forwards": 0}, *records], records, strict=False):
        group_forwards = sum(3 * (6 - start) + 3 * (5 - start) for start in record["window_starts"])
        drawn = record["forwards"] - before["forwards"] - group_forwards
        assert drawn == (0 if record["iteration"] == 1 else 2 * 3)
    assert count_calls(load_config(words), 5, branches=1).anchors == 2 * 3 * 2 / 3


def test_every_rank_has_all_anchors_in_order_and_sends_its_rows_once(monkeypatch):
    sent = []

    def gather(value):
        sent.append(value)
        return [value, ([1, 3], torch.tensor([[1.0], [3.0]]))]

    monkeypatch.setattr("hrf_fast.training.anchors.comm.gather", gather)
    anchors = Anchors(reuse=2)
    drawn = anchors.take(0, [2, 0], torch.device("cpu"), lambda: torch.tensor([[2.0], [0.0]]))
    assert {number: float(anchor) for number, anchor in drawn.items()} == {2: 2.0, 0: 0.0}
    assert anchors.state()["tensors"]["anchors"].tolist() == [[0.0], [1.0], [2.0], [3.0]]
    # a view of each row would be pickled with all rows
    assert len(sent) == 1 and torch.is_tensor(sent[0][1])


@pytest.mark.parametrize("option", ["window.anchor_steps=3", "window.anchor_reuse=2"])
def test_options_of_anchors_are_refused_where_there_are_none(tiny_run, option):
    with pytest.raises(ValueError, match=option.split("=")[0]):
        build_components(load_config([*tiny_run, "window.schedule=full", option]))


def test_more_anchor_steps_than_steps_are_refused(tiny_run):
    with pytest.raises(ValueError, match="window.anchor_steps is 7 .* 6"):
        load_config([*tiny_run, "window.anchor_steps=7"])


# --- a share of the window's steps ------------------------------------------------------------------------------------


def calls_of(steps, groups=(0,)):
    return [Call([Piece(group, 0, 3) for group in groups], range(step, step + 1)) for step in steps]


@pytest.mark.parametrize(
    ("offset", "expected"),
    # chosen where floor((i + 1)/2 + offset) > floor(i/2 + offset)
    [(0.3, [1, 3, 5]), (0.6, [0, 2, 4])],
)
def test_half_of_the_steps_are_every_second_one(offset, expected):
    chosen, factor = Thinning(0.5).thin(calls_of(range(6)), offset=offset, steps_per_call=1, flat=())
    assert ([call.steps.start for call in chosen], factor) == (expected, 2.0)


def test_every_step_is_chosen_with_the_probability_of_the_share():
    counts = torch.zeros(7)
    for offset in torch.arange(1000) / 1000:
        chosen, _ = Thinning(0.3).thin(calls_of(range(7)), offset=float(offset), steps_per_call=1, flat=())
        for call in chosen:
            counts[call.steps.start] += call.images > 0
    # a grid of 1000 offsets counts a share to its ends
    assert counts.tolist() == pytest.approx([300] * 7, abs=2)


def test_of_calls_of_several_steps_whole_ones_are_chosen():
    calls = [Call([Piece(0, 0, 3)], range(first, min(first + 2, 7))) for first in (1, 3, 5)]
    chosen, _ = Thinning(0.5).thin(calls, offset=0.6, steps_per_call=2, flat=())
    # their numbers are 0, 1 and 2
    assert [call.steps for call in chosen] == [range(1, 3), range(5, 7)]


def test_where_no_step_is_chosen_the_gradient_is_zero_and_not_missing():
    chosen, factor = Thinning(0.2).thin(calls_of([0]), offset=0.1, steps_per_call=1, flat=())
    assert ([call.steps.start for call in chosen], factor) == ([0], 0.0)


def gradient(components, offset, monkeypatch):
    """The gradient of one update, which is not applied."""
    found = {}

    def step():
        found["gradient"] = torch.cat([part.flatten() for part in components.engine.gradients()])
        return torch.zeros(())

    monkeypatch.setattr(components.engine, "step", step)
    monkeypatch.setattr("hrf_fast.training.update.draw_offsets", lambda *_: [[offset]])
    roll_out, learn = loop_parts(components)
    roll_out()
    learn()
    return found["gradient"]


@pytest.mark.parametrize("more", [[], ["compute.images_per_call=6"], ["compute.activations=keep"]], ids=str)
def test_the_two_halves_of_the_steps_have_the_whole_gradient_as_their_mean(tiny_run, monkeypatch, more):
    order = ["train.order=on_policy"] if "keep" in str(more) else []
    words = [*tiny_run, "train.groups_per_step=2", "window.schedule=full", *order, *more]
    whole = gradient(build_components(load_config(words))[1], 0.0, monkeypatch)
    components = build_components(load_config([*words, "train.step_share=0.5"]))[1]
    halves = [gradient(components, offset, monkeypatch) for offset in (0.3, 0.6)]
    assert not torch.allclose(*halves, rtol=0.1, atol=0)
    # fp32 sums in another order
    assert (sum(halves) / 2 - whole).norm() < 1e-4 * whole.norm()


def test_a_share_saves_the_backwards_of_the_other_steps(tiny_run, tmp_path):
    words = [*tiny_run, "window.schedule=full", "sample.num_inference_steps=7", "train.step_share=0.5"]
    train([*words, "train.iterations=1", "evaluation.every=0", "train.groups_per_step=2"])
    record = metrics(tmp_path / "run")[0]
    # two groups of 3 samples: 7 steps of a rollout, and 3 of the 6 stochastic ones again with a backward
    assert (record["forwards"], record["backwards"]) == (6 * 7 + 6 * 3, 6 * 3)
    assert record["ratio_mean"] == 1
    assert count_calls(load_config(words), 6, branches=1).update == 6 * 3


# --- groups without spread --------------------------------------------------------------------------------------------


def test_groups_of_equal_rewards_are_left_out_and_the_weights_are_the_same_bits(tiny_run, tmp_path):
    def of_one_group(images, prompts=None):
        # the groups come one after the other, panels of six images at the ends
        of_one_group.calls += len(images) == 3
        return bright(images) * (of_one_group.calls % 2)

    words = [*tiny_run, "evaluation.every=0", "window.schedule=full", "train.iterations=2"]
    for name in ("false", "true"):
        of_one_group.calls = 0
        train(with_folder(words, tmp_path / name, f"train.skip_flat_groups={name}"), reward=of_one_group)
    assert equal(weights(tmp_path / "false"), weights(tmp_path / "true"))
    counts = [metrics(tmp_path / name)[-1]["backwards"] for name in ("false", "true")]
    # a step of a group of equal rewards is made with one of its five calls: AdamW's momentum moves on
    assert counts == [2 * 2 * 3 * 5, 2 * (3 * 5 + 3)]


def test_flat_groups_are_not_left_out_under_a_term_of_the_pretrained_model(tiny_run):
    with pytest.raises(ValueError, match="train.skip_flat_groups is true"):
        load_config([*tiny_run, "train.skip_flat_groups=true", "remedies.kl_weight=0.1"])


def thinned_components(thinning, groups, inner_epochs=1):
    algorithm = SimpleNamespace(
        seed=3, inner_epochs=inner_epochs, thinning=thinning, clips=None, reference=lambda iteration: None
    )
    engine = SimpleNamespace(lockstep=False)
    return SimpleNamespace(algorithm=algorithm, groups=groups, call_plan=CallPlan(3), engine=engine, policy=None)


def test_every_pass_over_the_rollouts_leaves_out_steps_of_its_own(monkeypatch):
    offsets = []
    monkeypatch.setattr("hrf_fast.training.update._step", lambda *args: offsets.append(args[-1]))
    components = thinned_components(Thinning(0.5), Groups(per_iteration=4, size=3, per_step=2), inner_epochs=2)
    advantages = dict.fromkeys(range(4), torch.ones(3))
    update(components, Rollout(), [Window(0, 5)] * 4, advantages, range(2), iteration=1, note=print)
    assert offsets == [offset for epoch in draw_offsets(3, 1, 2, 2) for offset in epoch]
    assert len(set(offsets)) == 4


def test_a_group_whose_advantages_are_all_negative_is_learnt_from(monkeypatch):
    # as one of a prompt, or of a batch, whose other groups did better
    monkeypatch.setattr(
        "hrf_fast.training.update.optimizer_step", lambda *given, **_: [c.steps.start for c in given[4]]
    )
    components = thinned_components(Thinning(skip_flat=True), Groups(per_iteration=2, size=3, per_step=1))
    advantages = {0: torch.tensor([-1.0, -2.0, -1.0]), 1: torch.zeros(3)}
    rolled_out = Rollout(dict.fromkeys(range(2)))
    made, _ = update(components, rolled_out, [Window(2, 5)] * 2, advantages, range(2), iteration=0, note=print)
    # all steps of the first; of the flat one a single call, of weight 0
    assert made == [[2, 3, 4], [2]]


def test_the_means_of_a_thinned_update_are_over_the_calls_of_all_ranks(monkeypatch):
    monkeypatch.setattr("hrf_fast.training.update.optimizer_step", lambda *_, **named: named["pairs"])
    monkeypatch.setattr("hrf_fast.training.update.draw_offsets", lambda *_: [[0.3]])
    components = thinned_components(Thinning(0.5), Groups(per_iteration=2, size=3, per_step=2, rank=0, ranks=2))
    windows, advantages = [Window(0, 5), Window(2, 5)], dict.fromkeys(range(2), torch.ones(3))
    made, _ = update(components, Rollout({0: None}), windows, advantages, [0], iteration=0, note=print)
    # of the steps 1 and 3 are chosen: two of this rank's group, one of the other's, each of 3 samples
    assert made == [3 * (2 + 1)]
