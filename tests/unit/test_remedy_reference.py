"""The pretrained model as a reference: both terms by hand, where its outputs come from, what they cost, and resumes."""

import pytest
import torch

from hrf_fast.assembly.components import build_components
from hrf_fast.assembly.model import build_policy
from hrf_fast.config.load import load_config
from hrf_fast.config.remedy_options import RemediesConfig
from hrf_fast.memory.counts import count_calls
from hrf_fast.memory.planner import plan
from hrf_fast.noise import NoiseKey
from hrf_fast.prompts import Prompt
from hrf_fast.training.calls import Call, CallPlan, Piece
from hrf_fast.training.groups import Group
from hrf_fast.training.optimizer_step import Clips, call_surrogate
from hrf_fast.training.reference import ReferenceWeights, reference_at
from hrf_fast.training.rollout import rollout
from hrf_fast.windows.base import Window
from tests.conftest import T, make_group, make_policy, tiny_words
from tests.runs import assert_equal_training, metrics, train, with_folder
from tests.text_models import load_text_policy

pytestmark = pytest.mark.long

SIZE = 3
CLIPS = Clips(clip_range=1.0, advantage_clip=10.0, scale_by_window=False)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def reference_words(model, folder, *more):
    """A run of the full window, less the deterministic last step: 5 steps of 2 groups of 3."""
    return [*tiny_words(model, folder), "evaluation.every=0", "evaluation.panel_size=2", "window.schedule=full", *more]


def disturb(network):
    """Change what is trained, as updates would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)


def test_a_reference_is_a_copy_of_the_weights_that_all_ranks_share(tiny_model, tmp_path, monkeypatch):
    def take_main(tensors):
        with torch.no_grad():
            for tensor in tensors:
                tensor.fill_(0.25)

    monkeypatch.setattr("hrf_fast.assembly.components.comm.take_main", take_main)
    words = reference_words(tiny_model, tmp_path / "run", "remedies.reference_penalty=0.1")
    policy = build_components(load_config(words))[1].policy
    for network in (policy.network, policy._reference):
        assert all(bool((tensor == 0.25).all()) for tensor in [*network.parameters(), *network.buffers()])


# --- the terms --------------------------------------------------------------------------------------------------------


def held_at(step, weights, shift):
    """A replay at `step` of samples whose pretrained mean is the policy's less `shift`, and the std of that step."""
    policy = make_policy()
    policy.hold_reference()
    group = make_group(policy, Window(step, step + 1))
    trajectory = rollout(policy, [group], CallPlan(group.size), reference_steps=T).trajectories[0]
    coefficients = policy.sampler.coefficients[step]
    slope = coefficients.mean_output + coefficients.mean_x0 * coefficients.x0_output
    # not trained yet, the policy is its own reference
    trajectory.reference.sub_(shift / slope)
    call, advantages = Call([Piece(0, 0, group.size)], range(step, step + 1)), torch.zeros(group.size)
    surrogate = call_surrogate(policy, {0: trajectory}, {0: advantages}, call, CLIPS, reference=weights)
    return surrogate, float(coefficients.std)


def test_the_kl_of_two_gaussians_of_equal_std_by_hand():
    # KL(N(m, s²) ‖ N(m − 0.02, s²)) = 0.02²/(2 s²) at every pixel; advantages are 0, so the loss is the term alone
    surrogate, std = held_at(1, ReferenceWeights(kl=3.0), 0.02)
    kl = 0.02**2 / (2 * std**2)
    torch.testing.assert_close(surrogate.kl, torch.full((4,), kl), rtol=1e-3, atol=0)
    torch.testing.assert_close(surrogate.loss, torch.full((4,), 3 * kl), rtol=1e-3, atol=0)


def test_the_penalty_of_the_means_has_no_std_in_it():
    for step in (0, 1):
        surrogate, _ = held_at(step, ReferenceWeights(mean=5.0, mean_steps=2), 0.02)
        torch.testing.assert_close(surrogate.loss, torch.full((4,), 5 * 0.02**2), rtol=1e-3, atol=0)
    surrogate, std = held_at(1, ReferenceWeights(kl=3.0, mean=5.0, mean_steps=2), 0.02)
    together = 3 * 0.02**2 / (2 * std**2) + 5 * 0.02**2
    torch.testing.assert_close(surrogate.loss, torch.full((4,), together), rtol=1e-3, atol=0)
    # beyond its steps only the KL is left
    surrogate, std = held_at(2, ReferenceWeights(kl=3.0, mean=5.0, mean_steps=2), 0.02)
    torch.testing.assert_close(surrogate.loss, torch.full((4,), 3 * 0.02**2 / (2 * std**2)), rtol=1e-3, atol=0)
    surrogate, _ = held_at(2, ReferenceWeights(mean=5.0, mean_steps=2), 0.02)
    assert not surrogate.loss.any() and not surrogate.kl.any()


def test_the_weight_of_the_kl_is_linear_from_the_first_iteration_to_the_last():
    remedies = RemediesConfig(kl_weight=4.0, kl_weight_end=1.0, reference_penalty=2.0)
    at = reference_at(remedies, num_inference_steps=40, iterations=7)
    assert [at(i).kl for i in range(7)] == [4, 3.5, 3, 2.5, 2, 1.5, 1]
    # a third of the steps
    assert (at(3).mean, at(3).mean_steps) == (2, 13)
    constant = reference_at(RemediesConfig(kl_weight=4.0), num_inference_steps=40, iterations=7)
    assert constant(0).kl == constant(6).kl == 4
    assert reference_at(RemediesConfig(), num_inference_steps=40, iterations=7)(0).steps == 0


def test_steps_that_share_a_call_have_the_losses_of_calls_of_their_own():
    policy, weights = make_policy(), ReferenceWeights(mean=50.0, mean_steps=2)
    policy.hold_reference()
    group = make_group(policy, Window(0, 4))
    trajectory = rollout(policy, [group], CallPlan(group.size), reference_steps=weights.steps).trajectories[0]
    assert len(trajectory.reference) == 2
    disturb(policy.network)
    losses = [
        torch.cat([
            call_surrogate(policy, {0: trajectory}, {0: torch.zeros(4)}, call, CLIPS, reference=weights).loss
            for call in CallPlan(group.size, images).replay({0: group.window})
        ])
        for images in (0, 4 * group.size)
    ]  # fmt: skip
    assert losses[0][: 2 * group.size].all() and not losses[0][2 * group.size :].any()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-7)


# --- where its outputs come from --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_is_the_pretrained_model_to_the_bit_whatever_was_learnt(tiny_model, lora, precision):
    words = reference_words(tiny_model, "unused", f"lora.rank={lora}", f"compute.precision={precision}")
    policy, pretrained = (build_policy(load_config(words)) for _ in range(2))
    policy.hold_reference()
    trained = [parameter for parameter in policy.network.parameters() if parameter.requires_grad]
    disturb(policy.network)
    latents, condition = torch.randn(2, 3, 16, 16), policy.condition([None] * 2)
    with torch.no_grad():
        expected = pretrained.predict(latents, 3, condition).model_output
        before = policy.predict(latents, 3, condition).model_output
        found = policy.reference(latents, 3, condition)
        after = policy.predict(latents, 3, condition).model_output
    assert found.dtype == torch.float32 and torch.equal(found, expected.float())
    assert torch.equal(before, after) and not torch.equal(before, expected)
    # nothing of it is trained, and all that was trained still is
    assert [parameter for parameter in policy.network.parameters() if parameter.requires_grad] == trained
    assert not found.requires_grad and policy.calls.forwards == 3 * 2


def test_a_policy_without_a_reference_says_so():
    policy = make_policy()
    with pytest.raises(RuntimeError, match="hold_reference"):
        policy.reference(torch.zeros(1, 3, 16, 16), 0, policy.condition([None]))


def test_under_guidance_both_branches_are_the_pretrained_model_s():
    policy, pretrained = (load_text_policy("sd1", guidance_scale=4.0) for _ in range(2))
    policy.hold_reference()
    disturb(policy.network)
    condition = policy.condition([Prompt("a red cat", "dog")] * SIZE)
    group = Group(0, Window(0, 2), NoiseKey(3, torch.arange(SIZE)), condition)
    plan_of_calls = CallPlan(SIZE)
    trajectory = rollout(policy, [group], plan_of_calls, reference_steps=1).trajectories[0]
    # both branches of every step, and of the one that the reference is asked at
    assert policy.calls.forwards == 2 * SIZE * (len(policy.sampler) + 1)
    with torch.no_grad():
        expected = pretrained.predict(trajectory.latents[0], 0, condition).combined
    torch.testing.assert_close(trajectory.reference, expected[None], rtol=0, atol=1e-6)
    call = plan_of_calls.replay({0: group.window})[0]
    weights = ReferenceWeights(mean=1.0, mean_steps=1)
    surrogate = call_surrogate(policy, {0: trajectory}, {0: torch.zeros(SIZE)}, call, CLIPS, reference=weights)
    coefficients = policy.sampler.coefficients[0]
    with torch.no_grad():
        output = policy.predict(trajectory.latents[0], 0, condition).combined
    slope = coefficients.mean_output + coefficients.mean_x0 * coefficients.x0_output
    by_hand = ((output - expected) * slope).square().flatten(1).mean(1)
    torch.testing.assert_close(surrogate.loss, by_hand, rtol=1e-4, atol=0)
    surrogate.loss.sum().backward()
    assert all(parameter.grad is None for parameter in policy._reference.parameters())


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [(), pytest.param(("lora.rank=2", "optimizer.learning_rate=1e-2"), marks=pytest.mark.slow)]
)
def test_a_run_counts_its_calls_starts_at_a_kl_of_zero_and_resumes_to_the_bit(tiny_model, tmp_path, more):
    words = reference_words(tiny_model, tmp_path / "run", "remedies.kl_weight=1", "train.groups_per_step=2", *more)
    train(words, reward=brightness)
    first, second = metrics(tmp_path / "run")
    assert first["reference_kl"] == 0 and first["ratio_max"] == 1 and second["reference_kl"] > 0
    # per iteration 2 groups of 3: rollouts of 6 steps, 5 of them asked and trained
    assert first["forwards"] == 6 * (6 + 5 + 5) and first["backwards"] == 6 * 5
    counts = count_calls(load_config(words), 5, branches=1)
    assert counts.reference == 6 * 5 and counts.forwards("replay", 1) == first["forwards"]
    halves = with_folder(words, tmp_path / "halves")
    train([*halves, "train.iterations=1"], reward=brightness)
    train(halves, reward=brightness)
    assert_equal_training(tmp_path / "run", tmp_path / "halves")


def test_a_large_weight_holds_the_policy_back(tiny_model, tmp_path):
    kls = {}
    for weight in (1e-9, 1e6):
        words = reference_words(
            tiny_model, tmp_path / str(weight), f"remedies.kl_weight={weight}", "train.iterations=4"
        )
        train([*words, "optimizer.learning_rate=1e-3", "train.groups_per_step=2"], reward=brightness)
        kls[weight] = [record["reference_kl"] for record in metrics(tmp_path / str(weight))]
    # the first step is of a KL of zero, whose gradient is zero too
    assert kls[1e6][1] == pytest.approx(kls[1e-9][1], rel=0.05)
    assert kls[1e6][-1] < 0.5 * kls[1e-9][-1]


def test_kept_graphs_and_the_early_penalty_go_together(tiny_model, tmp_path):
    runs = {}
    for mode in ("replay", "keep"):
        more = (f"compute.activations={mode}", "train.order=on_policy", "train.groups_per_step=2")
        words = reference_words(tiny_model, tmp_path / mode, "remedies.reference_penalty=10", *more)
        train([*words, "remedies.reference_steps=3"], reward=brightness)
        runs[mode] = metrics(tmp_path / mode)
    # 6 samples: 3 steps asked
    assert [runs[mode][0]["forwards"] for mode in runs] == [6 * (6 + 3 + 5), 6 * (6 + 3)]
    for name in ("loss", "grad_norm", "reference_kl"):
        kept, replayed = (runs[mode][1][name] for mode in ("keep", "replay"))
        assert kept == pytest.approx(replayed, rel=1e-5) and kept != 0


def test_a_run_without_remedies_logs_no_kl_of_a_reference(tiny_model, tmp_path):
    train(reference_words(tiny_model, tmp_path / "run", "train.iterations=1"), reward=brightness)
    assert "reference_kl" not in metrics(tmp_path / "run")[0]


def test_a_ramp_belongs_to_its_number_of_iterations(tiny_model, tmp_path):
    words = reference_words(tiny_model, tmp_path / "run", "remedies.kl_weight_end=1", "train.iterations=2")
    train(words, reward=brightness)
    with pytest.raises(ValueError, match=r"train\.iterations"):
        train([*words, "train.iterations=3"], reward=brightness)


def test_a_penalty_of_steps_that_no_window_has_is_noted(tiny_model, tmp_path, capsys):
    # T 6: a third is 2 steps
    for clusters, said in (("[[2, 5]]", True), ("[[1, 2]]", False)):
        more = ("window.schedule=clusters", f"window.kwargs.clusters={clusters}", "remedies.reference_penalty=1")
        words = reference_words(tiny_model, tmp_path / f"run{said}", *more, "train.iterations=1")
        train(words, reward=brightness)
        output = capsys.readouterr()
        text = "every window starts after the first 2 steps, which remedies.reference_penalty is of"
        assert (text in output.out + output.err) == said


# --- plans and refusals -----------------------------------------------------------------------------------------------


def test_a_plan_counts_the_copy_and_the_outputs(tiny_model, not_measured):
    def needs(*more):
        words = reference_words(tiny_model, "unused", "compute.precision=bf16", *more)
        made = plan(load_config(words), gpus=2, memory=10**9)
        return made, made.need("zero3", "bf16", "replay", 0)

    (plain, before), (kl, after) = needs(), needs("remedies.kl_weight=1")
    policy = build_policy(load_config(reference_words(tiny_model, "unused", "compute.precision=bf16")))
    policy.hold_reference()
    copied = sum(parameter.nbytes for parameter in policy._reference.parameters())
    assert kl.copies["bf16"] == copied < kl.copies["fp32"] and not plain.copies
    # one group of 3 on each of 2 GPUs, 5 steps of 3x16x16 numbers in fp32
    outputs = 3 * 5 * 3 * 16 * 16 * 4
    assert kl.trajectories - plain.trajectories == outputs and after - before == copied + outputs
    early, _ = needs("remedies.reference_penalty=1")
    # a third of 6 steps
    assert early.trajectories - plain.trajectories == outputs * 2 / 5
    lora, _ = needs("remedies.kl_weight=1", "lora.rank=2")
    assert not lora.copies


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["remedies.kl_weight_end=0"], r"remedies\.kl_weight_end is 0 but remedies\.kl_weight 0 .* never changes"),
        (["remedies.kl_weight_end=5", "train.iterations=1"], r"remedies\.kl_weight_end is 5 .*train\.iterations 1"),
        (["remedies.kl_weight=-1"], r"remedies\.kl_weight is -1"),
        (["remedies.reference_steps=3"], r"remedies\.reference_steps is 3 but remedies\.reference_penalty is 0"),
        (
            ["remedies.reference_steps=41", "remedies.reference_penalty=1"],
            r"remedies\.reference_steps is 41 but sample\.num_inference_steps is 40",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(words)


def test_beyond_the_steps_of_the_penalty_a_call_of_several_has_the_kl_alone():
    # mean·2·std² beside the KL at step 1: 3 + 5·2·¼
    weights = ReferenceWeights(kl=3.0, mean=5.0, mean_steps=2)
    assert weights.per_row(torch.tensor([1, 2]), torch.tensor([0.5, 0.5]), 2).tolist() == [5.5, 3.0]
