"""LoRA: what is trained, what a checkpoint holds, how a run starts, resumes and is saved, and what is refused."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from hrf_fast.assembly.model import build_engine, build_policy
from hrf_fast.commands.evaluate import evaluate
from hrf_fast.commands.export import export
from hrf_fast.commands.sample import draw
from hrf_fast.config.load import load_config
from hrf_fast.engines.base import trained_weights
from hrf_fast.memory.planner import plan
from hrf_fast.memory.zero import model_states
from hrf_fast.policies.lora import add_adapters, merged
from hrf_fast.rewards.registry import RewardError
from tests.conftest import make_unet, tiny_words
from tests.runs import (
    assert_equal_training,
    checkpoint_weights,
    equal,
    largest_difference,
    metrics,
    panels,
    train,
    weights,
)

pytestmark = pytest.mark.long

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
# the one attention of `tiny_model` has four layers of 8 channels
LAYERS, CHANNELS, RANK = 4, 8, 2
ADAPTERS = LAYERS * 2 * CHANNELS * RANK


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def lora_words(model, folder, *more):
    small = ("evaluation.every=0", "evaluation.panel_size=2", "window.schedule=random", "optimizer.learning_rate=1e-2")
    # all groups in one step, so that every ratio is that of an unchanged policy
    return [*tiny_words(model, folder), f"lora.rank={RANK}", "train.groups_per_step=2", *small, *more]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A run of two iterations that averages its weights and checkpoints activations."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    torch.set_num_threads(1)
    words = lora_words(tiny_model, folder, "optimizer.ema_decay=0.5", "compute.activations=checkpoint")
    train(words, reward=brightness)
    return folder, words


def test_only_layers_with_adapters_change_and_a_checkpoint_holds_only_adapters(run, tiny_model):
    folder, _ = run
    before, after = weights(tiny_model), weights(folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"down_blocks.0.attentions.0.{target}.weight" for target in TARGETS}
    checkpoint = folder / "checkpoints" / "iteration-000002"
    for file in ("weights.safetensors", "ema.safetensors"):
        tensors = checkpoint_weights(checkpoint, file)
        assert len(tensors) == 2 * LAYERS and all(".lora_" in name for name in tensors)
        assert sum(tensor.numel() for tensor in tensors.values()) == ADAPTERS
    # two moments and a count of steps per tensor; names take the rest
    assert (checkpoint / "optimizer.safetensors").stat().st_size < 8 * ADAPTERS + 400 * 2 * LAYERS


def test_a_resumed_run_is_equal_to_the_bit(run, tiny_model, tmp_path):
    folder, words = run
    halves = [*words, f"run.folder={tmp_path / 'run'}"]
    train([*halves, "train.iterations=1"], reward=brightness)
    with pytest.raises(ValueError, match=r"lora\.rank"):
        train([*halves, "lora.rank=3"], reward=brightness)
    train(halves, reward=brightness)
    assert_equal_training(tmp_path / "run", folder)
    assert panels(tmp_path / "run")[-1] == panels(folder)[-1]
    for file in ("weights.safetensors", "ema.safetensors"):
        a, b = (checkpoint_weights(f / "checkpoints" / "iteration-000002", file) for f in (tmp_path / "run", folder))
        assert equal(a, b)


def other_base(model, folder):
    """A copy of a model's folder with one weight that differs in one number."""
    shutil.copytree(model, folder)
    changed = weights(folder)
    changed["conv_out.bias"][0] += 1e-3
    save_file(changed, folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "more",
    [(), ("lora.rank=0", "optimizer.learning_rate=1e-5")],
    ids=["adapters", "all weights"],
)
def test_a_base_model_that_has_changed_is_refused_and_a_run_from_before_goes_on(tiny_model, tmp_path, more):
    base, folder = tmp_path / "base", tmp_path / "run"
    words = lora_words(base, folder, *more)
    shutil.copytree(tiny_model, base)
    train([*words, "train.iterations=1"], reward=brightness)
    shutil.rmtree(base)
    other_base(tiny_model, base)
    checkpoint = folder / "checkpoints" / "iteration-000001"
    loading = (lambda: export(checkpoint, tmp_path / "exported"), lambda: evaluate(folder, []))
    for command in (lambda: train(words, reward=brightness), *loading):
        with pytest.raises(ValueError, match=f"model.name is '{base}', whose weights are not those of '{base}' when"):
            command()
    sources = json.loads((folder / "sources.json").read_text())
    del sources["base model"]
    (folder / "sources.json").write_text(json.dumps(sources))
    train(words, reward=brightness)
    assert len(metrics(folder)) == 2


def test_an_older_run_is_not_given_the_base_model_of_its_first_resume(tiny_model, tmp_path):
    words = lora_words(tiny_model, tmp_path / "run")
    train([*words, "train.iterations=1"], reward=brightness)
    (tmp_path / "run" / "sources.json").unlink()
    train(words, reward=brightness)
    assert "base model" not in json.loads((tmp_path / "run" / "sources.json").read_text())


def test_a_base_model_that_has_changed_before_any_iteration_is_a_new_run(tiny_model, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "run"
    words, failing = lora_words(base, folder), [True]

    def reward(images, prompts):
        if failing and len(images) != 2:
            raise KeyError("after the first panel")
        return images.mean((1, 2, 3))

    shutil.copytree(tiny_model, base)
    with pytest.raises(RewardError):
        train(words, reward=reward)
    (old,) = panels(folder)
    failing.clear()
    shutil.rmtree(base)
    other_base(tiny_model, base)
    train(words, reward=reward)
    assert panels(folder)[0]["iteration"] == old["iteration"] == 0 and panels(folder)[0]["rewards"] != old["rewards"]


def test_the_ratio_is_1_on_policy(run):
    folder, _ = run
    records = metrics(folder)
    assert [(record["ratio_mean"], record["ratio_max"]) for record in records] == [(1, 1), (1, 1)]
    assert all(record["grad_norm"] > 0 and record["drift"] > 0 for record in records)


def test_frozen_weights_in_bf16_give_the_numbers_of_fp32_ones_and_a_ratio_of_1(tiny_model, tmp_path):
    for stored in ("fp32", "bf16"):
        more = ("compute.precision=bf16", f"lora.base_precision={stored}", "train.iterations=1")
        train(lora_words(tiny_model, tmp_path / stored, *more), reward=brightness)
    assert metrics(tmp_path / "fp32") == metrics(tmp_path / "bf16")
    (record,) = metrics(tmp_path / "bf16")
    assert record["ratio_mean"] == record["ratio_max"] == 1 and record["grad_norm"] > 0
    a, b = (checkpoint_weights(tmp_path / f / "checkpoints" / "iteration-000001") for f in ("fp32", "bf16"))
    assert equal(a, b) and all(tensor.dtype == torch.float32 for tensor in a.values())


def test_a_run_starts_at_its_pretrained_model_whatever_the_seed():
    unet, latents = make_unet().eval(), torch.randn(2, 3, 16, 16)
    start = unet(latents, 3).sample
    before = torch.get_rng_state()
    add_adapters(unet, rank=8, targets=TARGETS, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(unet(latents, 3).sample, start)
    trained = trained_weights(unet)
    columns = torch.cat([weight.detach().flatten() for name, weight in trained.items() if "lora_A" in name])
    # 16 layers x 8 x 16 numbers of std 1/8: their std is within 5 % at four sigma
    assert float(columns.std()) == pytest.approx(1 / 8, rel=0.07) and abs(float(columns.mean())) < 0.02
    assert all(not weight.any() for name, weight in trained.items() if "lora_B" in name)
    again, other = make_unet(), make_unet()
    torch.manual_seed(9)
    add_adapters(again, rank=8, targets=TARGETS, seed=1)
    add_adapters(other, rank=8, targets=TARGETS, seed=2)
    assert equal(trained, trained_weights(again))
    assert not equal(trained, trained_weights(other))


def test_kaiming_is_peft_s_default():
    unet = make_unet()
    add_adapters(unet, rank=8, targets=TARGETS, init="kaiming")
    columns = torch.cat([weight.flatten() for name, weight in unet.named_parameters() if "lora_A" in name])
    # kaiming_uniform_(a = sqrt 5): uniform within 1/sqrt(16)
    assert 0.24 < float(columns.detach().abs().max()) <= 0.25


def test_merged_weights_are_w_plus_alpha_by_rank_times_b_a():
    unet, latents = make_unet().eval(), torch.randn(2, 3, 16, 16)
    assert merged(unet) is unet
    add_adapters(unet, rank=2, alpha=6, targets=["to_q", "conv1"], init="kaiming")
    for weight in trained_weights(unet).values():
        nn.init.normal_(weight, std=0.1)
    layer = unet.mid_block.attentions[0].to_q
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    copy = merged(unet)
    torch.testing.assert_close(copy.mid_block.attentions[0].to_q.weight, layer.base_layer.weight + 3 * b @ a)
    assert copy.state_dict().keys() == make_unet().state_dict().keys()
    torch.testing.assert_close(copy(latents, 3).sample, unet(latents, 3).sample, rtol=1e-5, atol=1e-5)


def test_checkpointed_activations_have_the_gradients_of_kept_ones(tiny_model):
    gradients = []
    for checkpoint in (False, True):
        policy = build_policy(load_config(lora_words(tiny_model, "unused")))
        policy.network.checkpoint_activations(checkpoint)
        # frozen layers before the first adapter: neither inputs nor their activations need a gradient
        policy.network(torch.ones(2, 3, 16, 16), 3).square().sum().backward()
        gradients.append({name: w.grad for name, w in trained_weights(policy.network).items() if "lora_B" in name})
        assert all(p.grad is None for p in policy.network.parameters() if not p.requires_grad)
    assert all(gradient.any() for gradient in gradients[0].values())
    assert largest_difference(*gradients) == 0


def test_a_run_its_checkpoint_and_its_export_draw_the_same(run, tmp_path):
    folder, _ = run
    checkpoint = folder / "checkpoints" / "iteration-000002"
    export(checkpoint, tmp_path / "model")
    assert largest_difference(weights(tmp_path / "model"), weights(folder)) == 0
    options = {"count": 2, "images_per_call": 2, "seed": 0, "device": "cpu"}
    for name, model in (("run", folder), ("checkpoint", checkpoint)):
        draw(str(model), tmp_path / f"{name}.png", **options)
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "checkpoint.png").read_bytes()
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert evaluate(copy, ["reward.name=jpeg_compressibility"]).is_file()


def test_a_target_that_no_layer_has_is_refused_with_those_that_there_are(tiny_model):
    for target, nearest in (("to_qq", "to_q"), ("to_out", "to_out.0")):
        with pytest.raises(
            ValueError, match=rf"lora\.targets has '{target}' \(did you mean '{nearest}'\?\).*conv1.*to_v"
        ):
            build_policy(load_config(lora_words(tiny_model, "unused", f"lora.targets=[to_v,{target}]")))
    with pytest.raises(ValueError, match=r"lora\.targets has 'attentions'"):
        plan(load_config(lora_words(tiny_model, "unused", "lora.targets=[attentions]")), gpus=1, memory=10**9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.alpha=8"], r"lora\.alpha is 8.* lora\.rank is 0"),
        (["lora.base_precision=bf16"], r"lora\.base_precision is 'bf16' but lora\.rank is 0"),
        (["lora.rank=4", "lora.targets=[]"], r"lora\.targets is \[\]"),
        (["lora.rank=4", "lora.alpha=0"], r"lora\.alpha is 0\.0; it must be above 0"),
        (["lora.rank=4", "lora.init=pissa"], r"lora\.init is 'pissa'; use gaussian, kaiming"),
        (["lora.rank=4", "lora.base_precision=fp16"], r"lora\.base_precision is fp16 but compute\.precision is fp32"),
        (
            ["lora.rank=4", "lora.base_precision=fp16", "compute.precision=bf16"],
            r"lora\.base_precision is fp16 but compute\.precision is bf16",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(words)


def test_averages_and_moments_are_of_adapters_only(tiny_model):
    config = load_config(lora_words(tiny_model, "unused", "optimizer.ema_decay=0.9"))
    engine = build_engine(build_policy(config), config)
    assert sum(part.numel() for part in engine.ema.parts) == ADAPTERS
    (group,) = engine.optimizer.param_groups
    assert sum(parameter.numel() for parameter in group["params"]) == ADAPTERS


def test_frozen_weights_have_no_gradient_no_moments_and_no_average_by_hand():
    def states(engine, **options):
        found = model_states((100,), frozen=1000, engine=engine, gpus=4, bucket=10, **options)
        return found.parameters, found.gradients, found.optimizer, found.host

    # 100 adapters in fp32: 400 bytes; 1000 bytes of frozen weights
    assert states("plain") == (1400, 400, 800, 0)
    assert states("plain", ema=True) == (1800, 400, 800, 0)
    assert states("zero2") == (1400, 100 + 40, 100 + 200, 0)
    # gathered, and a quarter of each
    assert states("zero3") == (1400 + 100 + 250, 100 + 40, 300, 0)
    assert states("zero3_offload") == (1400, 40, 0, 3 * 100 + 200 + 250)


def test_the_plan_counts_the_bytes_of_a_run(tiny_model, not_measured):
    config = load_config(
        lora_words(
            tiny_model, "unused", "compute.precision=bf16", "lora.base_precision=bf16", "optimizer.ema_decay=0.9"
        )
    )
    made = plan(config, gpus=1, memory=10**9)
    parameters = list(build_policy(config).network.parameters())
    states = made.states("plain")
    assert states.parameters == sum(parameter.nbytes for parameter in parameters) + 4 * ADAPTERS
    assert states.gradients == 4 * ADAPTERS and states.optimizer == 8 * ADAPTERS
    # two bytes each but for the norms
    frozen = sum(parameter.numel() for parameter in parameters) - ADAPTERS
    assert 2 * frozen < states.parameters - 2 * 4 * ADAPTERS < 2.2 * frozen


def test_sd15_has_797184_adapter_weights_at_rank_4():
    # on the meta device: diffusers' defaults are the UNet of Stable Diffusion 1 but for its attention's size
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
        add_adapters(unet, rank=4, targets=TARGETS, base_precision="bf16")
    assert sum(weight.numel() for weight in trained_weights(unet).values()) == 797_184
    frozen = sum(parameter.nbytes for parameter in unet.parameters() if not parameter.requires_grad)
    # half of 4 bytes but for the norms
    assert frozen == pytest.approx(2 * 859_520_964, rel=1e-3)
