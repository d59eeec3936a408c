"""Plans of text-to-image models: guided images count two, and what is frozen takes its place."""

import re
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from hrf_fast.config.amounts import parse_memory
from hrf_fast.config.load import load_config
from hrf_fast.memory.footprint import decoding_bytes, measure_decoding, measure_running
from hrf_fast.memory.planner import plan
from hrf_fast.policies import text_to_image
from hrf_fast.policies.files import read_model
from hrf_fast.policies.lora import add_adapters
from hrf_fast.policies.untrained import frozen_bytes, untrained_condition, untrained_network, untrained_shape
from tests.text_models import KINDS, SIDE, load_text_policy, text_model
from tests.true_models import DENOISERS, write_true_model

CONFIGS = Path(__file__).parents[2] / "configs"
# by configuration: the model, its elements, GPUs and their memory
TRUE = {
    "sd/sd15_lora": ("sd15", 859_520_964, 1, "24GB"),
    "sdxl/sdxl_lora_zero2": ("sdxl", 2_567_463_684, 8, "24GB"),
    "sdxl/sdxl_full_zero3": ("sdxl", 2_567_463_684, 8, "80GB"),
    "sd3/sd35_lora": ("sd35_medium", 2_243_171_520, 1, "24GB"),
    "flux/flux_dev_lora_zero2": ("flux_dev", 11_901_408_320, 1, "80GB"),
    "flux/flux_dev_full_zero3": ("flux_dev", 11_901_408_320, 8, "80GB"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_counts_what_the_decoder_of_the_model_itself_takes(kind, monkeypatch):
    monkeypatch.setattr(text_to_image, "_PIXELS_AT_ONCE", 3 * (2 * SIDE) ** 2)
    files, policy = read_model(str(text_model(kind)), weights=False), load_text_policy(kind)
    counted = decoding_bytes(files, None, None, offload=False)
    assert policy.decoded_at_once == 3
    _, running = measure_decoding(policy)
    # the policy maps images to [0, 1] too
    assert counted == pytest.approx(running, rel=0.25) and counted > 3 * 4 * 3 * (2 * SIDE) ** 2
    offloaded = decoding_bytes(files, None, None, offload=True)
    assert offloaded - counted == frozen_bytes(files)["vae"]


def test_a_decoder_of_the_users_own_takes_the_vaes_part_in_a_plan(tiny_decoder):
    words = [f"model.name={text_model('sd1')}", "prompts.source=builtin"]
    plain = plan(load_config(words), gpus=1, memory=10**10)
    tiny = plan(load_config([*words, f"model.decoder={tiny_decoder}"]), gpus=1, memory=10**10)
    assert 0 < tiny.any_footprint.decoding < plain.any_footprint.decoding
    weights = diffusers.AutoencoderTiny.from_pretrained(tiny_decoder).parameters()
    beside = frozen_bytes(read_model(str(text_model("sd1")), weights=False))
    assert tiny.frozen == beside["text_encoder"] + 4 * sum(weight.numel() for weight in weights)


def test_what_comes_to_the_device_counts_once_where_a_running_model_is_measured(monkeypatch):
    policy = load_text_policy("sdxl")
    plain = measure_decoding(policy)
    assert policy.visiting_bytes == 0
    policy.offload = True
    sizes = [sum(weight.nbytes for weight in each.parameters()) for each in policy._encoder.encoders]
    assert policy.visiting_bytes == max(sizes)
    # on one device nothing moves
    assert measure_decoding(policy) == plain


def test_an_offloaded_encoder_and_the_decoder_count_where_they_take_the_most():
    words = [f"model.name={text_model('sdxl')}", "prompts.source=builtin", "evaluation.panel_size=2"]
    made = {
        offload: plan(load_config([*words, f"compute.offload={offload}"]), gpus=1, memory=10**10)
        for offload in (False, True)
    }
    beside = frozen_bytes(read_model(str(text_model("sdxl")), weights=False))
    assert made[False].encoder == 0 and made[True].frozen == 0
    assert made[True].encoder == max(beside["text_encoder"], beside["text_encoder_2"])
    half = plan(load_config([*words, "compute.encoder_precision=bf16"]), gpus=1, memory=10**10)
    assert made[False].frozen - half.frozen == (beside["text_encoder"] + beside["text_encoder_2"]) / 2
    large = replace(made[True], encoder=10**9)
    assert large.need("plain", "fp32", "replay", 1) > 10**9
    footprint = replace(made[True].any_footprint, decoding=10**9)
    heavy = replace(made[True], footprints=dict.fromkeys(made[True].footprints, footprint))
    # a rollout that keeps its graphs decodes beside them
    graphs = heavy.need("plain", "fp32", "keep", 1) - heavy.need("plain", "fp32", "replay", 1)
    kept = footprint.kept.fixed * heavy.kept_samples + footprint.kept.per_image * heavy.kept_samples
    assert graphs == pytest.approx(kept * heavy.counts.longest_window)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_sees_the_shapes_of_the_model_itself(kind):
    files, policy = read_model(str(text_model(kind)), weights=False), load_text_policy(kind)
    network, shape = untrained_network(files)
    assert shape == policy.latent_shape
    with torch.no_grad():
        assert policy.decode(torch.zeros(1, *shape)).shape[1:] == untrained_shape(files).image
    ours, theirs = ({n: w.shape for n, w in each.named_parameters()} for each in (network, policy.network))
    assert ours == theirs
    for guided in (True, False):
        ours, theirs = untrained_condition(files, 3, guided), policy.condition([None] * 3, guided=guided)
        assert {n: rows.shape for n, rows in ours.inputs.items()} == {
            n: rows.shape for n, rows in theirs.inputs.items()
        }
    frozen = [module for module in policy._parts.values() if isinstance(module, torch.nn.Module)]
    weights = [weight for module in frozen for weight in module.parameters()]
    assert sum(frozen_bytes(files).values()) == sum(weight.nbytes for weight in weights)


@pytest.mark.slow
def test_a_guided_call_has_the_activations_of_two_images():
    policy = load_text_policy("sd1")
    guided, plain = (measure_running(policy, checkpointing=False, guided=guided) for guided in (True, False))
    assert guided.kept.per_image == pytest.approx(2 * plain.kept.per_image, rel=0.05)
    # panels are guided in either case
    assert guided.sampling == plain.sampling
    assert all(parameter.grad is None for parameter in policy.network.parameters())


@pytest.mark.parametrize(
    ("words", "factor"),
    [([], 1), (["sample.guidance_scale=5"], 2), (["sample.guidance_scale=5", "train.guidance=false"], 1)],
)
def test_guided_images_count_two(words, factor, not_measured):
    words += [f"model.name={text_model('sd1')}", "window.schedule=full", "sample.num_inference_steps=6"]
    counts = plan(load_config([*words, "train.group_size=3"]), gpus=1, memory=10**9).counts
    # 4 groups of 3 over 6 steps
    assert counts.rollout == counts.update == factor * 4 * 3 * 6 and counts.longest_window == 6


@pytest.mark.parametrize("word", ["sample.guidance_scale=2", "model.decoder=owner/taesd", "compute.offload=true"])
def test_options_of_other_models_are_refused(word, tiny_model):
    with pytest.raises(ValueError, match=f"{word.partition('=')[0]} is .*unconditional"):
        plan(load_config([f"model.name={tiny_model}", word]), gpus=1, memory=int(8e9))


# --- the true architectures -------------------------------------------------------------------------------------------


def counted(config, kind):
    """(elements, bytes of all weights, of gradients, of AdamW's averages) of what a configuration trains."""
    with torch.device("meta"):
        config_of = DENOISERS[kind]
        unet = getattr(diffusers, config_of["_class_name"]).from_config(config_of)
        elements = sum(weight.numel() for weight in unet.parameters())
        if config.lora.rank:
            add_adapters(unet, **vars(config.lora))
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(trained, foreach=False)
    optimizer.step()
    averages = sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    weights, gradients = sum(w.nbytes for w in unet.parameters()), sum(w.grad.nbytes for w in trained)
    return elements, weights, gradients, averages


# the layers of large models take seconds to make even on the meta device
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "sd15" not in name else name for name in TRUE]
)
def test_the_plan_has_the_counted_bytes_of_the_true_architectures(name, tmp_path, not_measured):
    kind, elements, gpus, _ = TRUE[name]
    words = ["--config", str(CONFIGS / f"{name}.yaml"), f"model.name={write_true_model(tmp_path, kind)}"]
    config = load_config(words)
    made = plan(config, gpus=gpus, memory=10**12)
    states, (found, weights, gradients, averages) = made.states(made.engine), counted(config, kind)
    assert found == elements
    # a bucket of gradients in fp32, of DeepSpeed's
    bucket = 4 * made.bucket
    assert {
        "plain": (weights, gradients, averages, 0),
        # a part of the gradients, of the weights' fp32 copy and of the averages
        "zero2": (weights, bucket + gradients / gpus, (gradients + averages) / gpus, 0),
        # whole weights while they are gathered; on the host a part of them, of their copy, the gradients and averages
        "zero3_offload": (weights, bucket, 0, (2 * weights + gradients + averages) / gpus),
    }[made.engine] == (states.parameters, states.gradients, states.optimizer, states.host)
    if config.lora.rank:
        # 2 bytes each but for the normalisations and the adapters
        assert 2 * elements < weights < 2.05 * elements and gradients < 0.02 * weights
    else:
        assert weights == gradients == averages / 2 == 4 * elements


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUE)
def test_a_configuration_needs_what_stands_on_top_of_it_and_fits(name, tmp_path):
    kind, _, gpus, memory = TRUE[name]
    path = CONFIGS / f"{name}.yaml"
    made = plan(
        load_config(["--config", str(path), f"model.name={write_true_model(tmp_path, kind)}"]),
        gpus=gpus,
        memory=parse_memory(memory, "--memory"),
    )
    compute = made.config.compute
    need = made.need(made.engine, compute.precision, compute.activations, compute.images_per_call)
    (figure,) = re.findall(r"^# `hrf plan` on the model's configs, .* GPUs?: ([0-9.]+) GB", path.read_text(), re.M)
    assert need / 1e9 == pytest.approx(float(figure), abs=0.06)
    assert made.best(made.engine, compute.precision) is not None and need < 0.9 * made.memory
