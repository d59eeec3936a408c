"""Training SD3 and FLUX: adapters and whole weights by the one loop, their files, resumes, and what is refused."""

import json
import shutil

import pytest
import torch
from torch import nn

from hrf_fast.engines.base import trained_weights
from hrf_fast.noise import NoiseKey
from hrf_fast.policies.files import read_model
from hrf_fast.policies.lora import LORA_WEIGHTS, WrongTarget, add_adapters
from hrf_fast.policies.sample import starting_noise
from hrf_fast.prompts import Prompt
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.groups import Group
from hrf_fast.training.optimizer_step import Clips, optimizer_step, replay_ratios
from hrf_fast.training.rollout import rollout
from hrf_fast.windows.base import Window
from tests.conftest import make_engine
from tests.flow_models import SIZE, flow_model, flow_words, load_flow_policy, load_pipeline
from tests.runs import assert_equal_checkpoints, assert_equal_training, metrics, train, weights, with_folder

SD3_TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
SD3_TARGETS += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
FLUX_TARGETS = [*SD3_TARGETS, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
TARGETS = {"sd35": SD3_TARGETS, "flux": FLUX_TARGETS}


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize(("kind", "lora", "checkpoint"), [("sd35", True, False), ("flux", False, True)])
def test_an_optimizer_step_starts_at_ratio_one_and_moves_what_is_trained(kind, lora, checkpoint):
    policy, window = load_flow_policy(kind), Window(0, 3)
    if lora:
        add_adapters(policy.unet, rank=2, targets=TARGETS[kind])
    if checkpoint:
        policy.network.checkpoint_activations()
    group = Group(0, window, NoiseKey(3, torch.arange(2)), policy.condition([Prompt("cat", "red")] * 2))
    plan = CallPlan(2, 0, "on_policy")
    rolled_out = rollout(policy, [group], plan)
    calls = plan.update(rolled_out.calls, {0: window})
    assert replay_ratios(policy, rolled_out.trajectories, calls, as_in_update=True).tolist() == [1.0] * 2 * len(window)
    engine = make_engine(policy)
    engine.set_learning_rate(0.01)
    before = {name: weight.detach().clone() for name, weight in policy.network.named_parameters()}
    advantages = {0: torch.tensor([1.0, -1.0])}
    stats = optimizer_step(engine, policy, rolled_out.trajectories, advantages, calls, Clips(1e-4, 2.5, False))
    assert float(stats.ratio_max) == 1 and float(stats.grad_norm) > 0
    moved = {name for name, weight in policy.network.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all((".lora_" in name) == lora for name in moved)
    # a guided call of SD3 has two rows
    rows = (2 if kind == "sd35" else 1) * 2 * len(window)
    assert policy.calls.backwards == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora", "schedule"),
    [("sd35", True, "full"), ("flux", False, "clusters"), ("flux", True, "full"), ("sd3", False, "dynamic")],
)
def test_a_run_starts_at_ratio_one_resumes_to_the_bit_and_trains_the_transformer(kind, lora, schedule, tmp_path):
    more = ["lora.rank=2", f"lora.targets=[{','.join(TARGETS[kind])}]"] if lora else []
    more += [f"window.schedule={schedule}", "train.groups_per_step=2"]
    if schedule == "clusters":
        more += ["window.kwargs={clusters: [[0, 2], [2, 3]], iterations_per_cluster: 1}"]
    words = flow_words(kind, tmp_path / "run", "remedies.kl_weight=0.1", *more)
    train(words, reward=brightness)
    first, second = metrics(tmp_path / "run")
    # a sum of an adapter's zeros may lie elsewhere in memory, which some matrix products round by
    assert first["ratio_max"] == 1 and first["reference_kl"] < 1e-12 < second["reference_kl"]
    halves = with_folder(words, tmp_path / "halves")
    train([*halves, "train.iterations=1"], reward=brightness)
    train(halves, reward=brightness)
    assert_equal_training(tmp_path / "run", tmp_path / "halves")
    assert_equal_checkpoints(tmp_path / "run", tmp_path / "halves")
    tuned = weights(tmp_path / "run")
    if lora:
        assert all(name.startswith("transformer.") for name in tuned)
    else:
        before = weights(flow_model(kind))
        assert before.keys() == tuned.keys() and any(not torch.equal(before[name], tuned[name]) for name in before)


@torch.no_grad()
def velocity(policy, transformer=None):
    """The policy's velocities for two prompts, through another transformer of its kind if one is given."""
    network, condition = policy.network, policy.condition([Prompt("a red cat"), Prompt("dog")], guided=False)
    network.unet, own = transformer or network.unet, network.unet
    latents = starting_noise(policy, NoiseKey(0, torch.arange(2)))
    output = network(latents, policy.sampler.timesteps[1], **condition.inputs)
    network.unet = own
    return output


@pytest.mark.parametrize("kind", TARGETS)
def test_diffusers_loads_adapters_and_whole_pipelines_and_has_the_policys_network(kind, tmp_path):
    policy = load_flow_policy(kind)
    start = velocity(policy)
    # a scale of 4, which rounds nothing where the file has it in B
    add_adapters(policy.unet, rank=2, alpha=8, targets=TARGETS[kind])
    assert torch.equal(velocity(policy), start)
    for weight in trained_weights(policy.unet).values():
        nn.init.normal_(weight, std=0.3)
    policy.save(tmp_path / "adapters")
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [LORA_WEIGHTS]
    pipeline = load_pipeline(flow_model(kind), kind)
    pipeline.load_lora_weights(tmp_path / "adapters")
    assert float((velocity(policy) - start).abs().max()) > 1e-3
    assert torch.equal(velocity(policy, pipeline.transformer), velocity(policy))
    whole = load_flow_policy(kind)
    with torch.no_grad():
        whole.unet.proj_out.bias += 1
    whole.save(tmp_path / "whole")
    saved = load_pipeline(tmp_path / "whole", kind)
    assert torch.equal(velocity(whole, saved.transformer), velocity(whole))
    assert {name for name, part in saved.components.items() if part is not None} == {
        name for name, part in pipeline.components.items() if part is not None
    }


def test_a_static_shift_takes_the_place_of_the_model_s_own():
    # 3t/(1 + 2t) of t = 1, 3/4, 1/2, 1/4, as `--shift 3` of DanceGRPO and MixGRPO
    policy = load_flow_policy("flux", shift=3.0)
    torch.testing.assert_close(policy.sampler.noise, torch.tensor([1, 0.9, 0.75, 0.5]))
    assert not torch.equal(policy.sampler.noise, load_flow_policy("flux").sampler.noise)
    assert policy.scheduler.config.shift == 3 and policy.scheduler.config.use_dynamic_shifting is False


def test_the_card_of_adapters_draws_with_the_shift_that_they_were_trained_with(tmp_path):
    train([*flow_words("flux", tmp_path / "run", "lora.rank=2", "train.iterations=1"), "sample.shift=3"])
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "shift=3.0, use_dynamic_shifting=False" in card


@pytest.mark.parametrize("kind", ["sd3_no_t5", "flux"])
def test_the_lines_of_the_card_draw_in_the_folder(kind, tmp_path, monkeypatch):
    policy = load_flow_policy(kind, max_sequence_length=9)
    policy.save(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    code = policy.example("flow_sde", 4, 1.0, negative="red")
    # FLUX has no unconditional branch
    assert ("negative_prompt='red'" in code) == (kind != "flux") and "max_sequence_length=9," in code
    exec(code, names)
    assert names["images"].shape == (16, 3, SIZE, SIZE)
    assert torch.equal(names["pipeline"].scheduler.timesteps, policy.sampler.timesteps)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("sd3", {"scheduler": "ddim"}, "sample.scheduler is 'ddim'.*flow"),
        ("schnell", {"guidance_scale": 3.5}, "sample.guidance_scale is 3.5.*guidance_embeds"),
        ("sd3", {"image_size": 18}, "model.image_size is 18.*multiple of 4.*use 16"),
        ("flux", {"image_size": 18}, "model.image_size is 18.*multiple of 4.*use 16"),
        ("sd3", {"image_size": 64}, "model.image_size is 64.*32 pixels at most"),
        ("sd3", {"channels_last": True}, "compute.channels_last is True.*transformer"),
        ("flux", {"attention": "xformers"}, "compute.attention is xformers.*transformer"),
    ],
)
def test_options_that_a_transformer_cant_follow_are_refused(kind, options, match):
    with pytest.raises(ValueError, match=match):
        load_flow_policy(kind, **options)


def test_a_condition_of_flux_has_its_guidance_as_an_input_and_one_row():
    policy = load_flow_policy("flux")
    for guided, scale in ((True, 3.5), (False, 1.0)):
        condition = policy.condition([Prompt("cat", "red")] * 2, guided=guided)
        assert condition.branches == 1 and condition.inputs["guidance"].tolist() == [scale] * 2
    assert "guidance" not in load_flow_policy("schnell").condition([Prompt("cat")]).inputs


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("kind", "part", "values", "match"),
    [
        ("sd3", "text_encoder_3", None, "holds no text_encoder_3/config.json"),
        ("flux", "vae", None, "holds no vae/config.json"),
        ("flux", "text_encoder_2/config.json", {"d_model": 20}, "joint_attention_dim: 24 but whose T5 makes 20"),
        ("sd3", "text_encoder/config.json", {"projection_dim": 9}, "pooled_projection_dim: 20 but whose CLIP makes 21"),
        ("flux", "transformer/config.json", {"in_channels": 12, "out_channels": 12}, "in_channels: 12 .*VAE makes 16"),
        ("flux", "transformer/config.json", {"out_channels": 12}, "takes 16 channels and returns 12"),
        ("sd3", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "whose scheduler is DDIMSch"),
        ("sd3", "model_index.json", {"tokenizer_3": [None, None]}, "has a text_encoder_3 but no tokenizer_3 for it"),
        ("flux", "model_index.json", {"_class_name": "FluxFillPipeline"}, "says FluxFillPipeline; .*FluxPipeline"),
    ],
)
def test_parts_that_are_missing_or_of_another_model_are_refused_by_name(kind, part, values, match, tmp_path):
    folder = shutil.copytree(flow_model(kind), tmp_path / "model")
    shutil.rmtree(folder / part) if values is None else edit(folder / part, **values)
    with pytest.raises(ValueError, match=f"model.name is '{folder}'.*{match}"):
        read_model(str(folder), weights=False)


def test_a_target_that_the_transformer_lacks_is_refused_with_those_it_has():
    with pytest.raises(WrongTarget, match="lora.targets has 'attn.to_qq'.*add_q_proj"):
        add_adapters(load_flow_policy("sd3").unet, rank=2, targets=["attn.to_qq"])
