"""StableDiffusionPolicy: images as the pipelines make them, whole folders, and the one loop under guidance."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from hrf_fast.assembly.components import build_components
from hrf_fast.assembly.inputs import guidance_note, negatives_note
from hrf_fast.config.load import load_config
from hrf_fast.evaluation.panel import Panel
from hrf_fast.memory.planner import plan
from hrf_fast.noise import NoiseKey
from hrf_fast.policies import compilation, text_to_image
from hrf_fast.policies.sample import starting_noise
from hrf_fast.prompts import Prompt
from hrf_fast.prompts.draw import PromptList
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.collect import begin
from hrf_fast.training.groups import Group
from hrf_fast.training.optimizer_step import Clips, optimizer_step, replay_ratios
from hrf_fast.training.rollout import rollout
from hrf_fast.training.self_check import self_check
from hrf_fast.windows.base import Window
from tests.conftest import make_engine, tiny_words
from tests.flow_models import load_flow_policy
from tests.loading import load_policy
from tests.runs import metrics, panels, train, weights
from tests.text_models import KINDS, SIDE, load_text_policy, text_model

SIZE = 3
# what transformers 5 writes
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def latents_of(policy, count=SIZE):
    return starting_noise(policy, NoiseKey(0, torch.arange(count)))


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_decode_is_the_vae_of_the_pipeline_in_chunks_and_fp32(kind, monkeypatch):
    policy, vae = load_text_policy(kind), DiffusionPipeline.from_pretrained(text_model(kind)).vae
    latents = latents_of(policy)
    with torch.no_grad():
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    sizes = []
    policy.decoder.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    monkeypatch.setattr(policy, "decoded_at_once", 2)
    with torch.autocast("cpu", torch.bfloat16):
        images = policy.decode(latents)
    assert sizes == [2, 1] and images.dtype == torch.float32 and not images.requires_grad
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    with pytest.raises(FloatingPointError):
        policy.decode(torch.full_like(latents, float("nan")))


def test_chunks_hold_as_many_images_as_pixels_allow(monkeypatch):
    # 8 images of 256 x 256 pixels; ours have 16 x 16
    assert load_text_policy("sd1").decoded_at_once == 8 * 256
    monkeypatch.setattr(text_to_image, "_PIXELS_AT_ONCE", 1)
    assert load_text_policy("sd1").decoded_at_once == 1


def test_sdxl_reads_a_vaes_mean_and_std_and_stable_diffusion_does_not():
    config = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0, 2.0, 4.0, 4.0], "scaling_factor": 0.5}
    for kind, expected in (("sdxl", [4.1, 4.2, 8.3, 8.4]), ("sd1", [2.0] * 4)):
        policy = load_text_policy(kind)
        policy.decoder.register_to_config(**config)
        # 1 · std / 0.5 + mean, or 1 / 0.5
        assert policy._unscaled(torch.ones(1, 4, 1, 1)).flatten().tolist() == pytest.approx(expected)


def test_a_tiny_decoder_decodes_and_the_vae_is_saved(tiny_decoder, tmp_path):
    policy = load_text_policy("sd1", decoder=str(tiny_decoder))
    latents = latents_of(policy)
    with torch.no_grad():
        expected = (AutoencoderTiny.from_pretrained(tiny_decoder).decode(latents).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(policy.decode(latents), expected, rtol=0, atol=1e-6)
    policy.save(tmp_path / "saved")
    vae = "vae/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(tmp_path / "saved" / vae), load_file(text_model("sd1") / vae)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    # its name alone: where the folder lies is no one else's business
    assert 'pipeline.vae = AutoencoderTiny.from_pretrained("taesd")' in policy.example("ddim", 4, 1.0)


@pytest.mark.parametrize("value", ["vae", "unet"])
def test_another_decoder_is_refused_by_name(value):
    folder = str(text_model("sd1") / value)
    with pytest.raises(ValueError, match=f"model.decoder is '{folder}'.*AutoencoderTiny"):
        load_text_policy("sd1", decoder=folder)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"latent_channels": 16}, "of 16 channels, but those of model.name .* have 4; .*taesd3 .SD3.*taef1 .FLUX"),
        ({"decoder_block_out_channels": [4, 4, 4]}, "of 4 pixels a side, but those of model.name .* have 2; .*taef1"),
        ({"upsampling_scaling_factor": 3}, "of 3 pixels a side, but those of model.name .* have 2; .*taef1"),
    ],
)
def test_a_tiny_decoder_of_other_latents_is_refused_before_weights_are_read(
    values, match, tiny_decoder, tmp_path, monkeypatch
):
    file = shutil.copytree(tiny_decoder, tmp_path / "copy") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    decoder = str(file.parent)
    monkeypatch.setattr("hrf_fast.policies.load.load_module", None)
    words = [f"model.name={text_model('sd1')}", "prompts.source=animals", f"model.decoder={decoder}"]
    for ask in (
        lambda: load_text_policy("sd1", decoder=decoder),
        lambda: plan(load_config(words), gpus=1, memory=10**10),
    ):
        with pytest.raises(ValueError, match=f"model.decoder is '{decoder}', which makes images of latents {match}"):
            ask()


def test_a_tiny_decoder_without_some_weight_is_refused(tiny_decoder, tmp_path):
    folder = shutil.copytree(tiny_decoder, tmp_path / "copy")
    file = folder / "diffusion_pytorch_model.safetensors"
    kept = dict(list(load_file(file).items())[1:])
    file.unlink()
    torch.save(kept, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=f"model.decoder is '{folder}'.*missing tensors"):
        load_text_policy("sd1", decoder=str(folder))


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_saved_policy_is_a_whole_pipeline_with_the_tuned_unet(kind, tmp_path):
    policy = load_text_policy(kind, channels_last=True)
    with torch.no_grad():
        policy.unet.conv_out.bias += 1
    policy.save(tmp_path)
    pipeline, original = (DiffusionPipeline.from_pretrained(folder) for folder in (tmp_path, text_model(kind)))
    assert type(pipeline) is type(original)
    assert {n for n, c in pipeline.components.items() if c} == {n for n, c in original.components.items() if c}
    for name, part in original.components.items():
        if isinstance(part, torch.nn.Module) and name != "unet":
            saved = pipeline.components[name].state_dict()
            assert all(torch.equal(saved[key], tensor) for key, tensor in part.state_dict().items())
    assert torch.equal(pipeline.unet.conv_out.bias, original.unet.conv_out.bias + 1)
    # the model has tokenizer.json alone; what is saved has the files of older libraries too
    assert {path.name for path in (text_model(kind) / "tokenizer").iterdir()} == TOKENIZER
    assert {path.name for path in (tmp_path / "tokenizer").iterdir()} == TOKENIZER | {"vocab.json", "merges.txt"}
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    old = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    for tokenizer in (pipeline.tokenizer, old):
        assert tokenizer("a red dog, cat").input_ids == original.tokenizer("a red dog, cat").input_ids
    again = load_policy(str(tmp_path), guidance_scale=5.0, num_inference_steps=6)
    condition, latents = policy.condition([Prompt("cat")] * SIZE), latents_of(policy)
    ours, theirs = (each.predict(latents, 2, condition).combined for each in (again, load_text_policy(kind)))
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, policy.predict(latents, 2, condition).combined, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "sampler"), [("sd1", "ddim_trl"), ("sd2", "ddim"), ("sdxl", "ddpm")])
def test_the_example_draws_in_the_folder_with_the_policys_sampler(kind, sampler, tmp_path, monkeypatch):
    policy = load_text_policy(kind, scheduler=sampler)
    policy.save(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(policy.example(sampler, 6, 1.0), names)
    assert names["images"].shape == (16, 3, 2 * SIDE, 2 * SIDE) and 0 <= names["images"].min() <= names["images"].max()
    assert names["pipeline"].guidance_scale == 5.0
    assert names["pipeline"].scheduler.timesteps.tolist() == policy.sampler.timesteps.tolist()
    if sampler == "ddim_trl":
        assert not names["pipeline"].scheduler.config.set_alpha_to_one


def test_another_image_size_is_that_of_latents_images_time_ids_and_the_example():
    policy = load_text_policy("sdxl", image_size=32)
    assert policy.latent_shape == (4, 16, 16)
    condition = policy.condition([Prompt("cat")])
    assert condition.inputs["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    latents = latents_of(policy, 1)
    assert policy.predict(latents, 2, condition).combined.shape == latents.shape
    assert policy.decode(latents).shape == (1, 3, 32, 32)
    assert "height=32,\n    width=32," in policy.example("ddim", 4, 1.0)
    # two levels of the VAE, two of the UNet
    with pytest.raises(ValueError, match="model.image_size is 30.*multiple of 4.*use 32"):
        load_text_policy("sdxl", image_size=30)


@pytest.mark.parametrize(("scale", "noted"), [(1, True), (3, False)])
def test_a_run_without_guidance_says_so_at_its_start(scale, noted, tmp_path):
    words = [word for word in text_words(tmp_path / "run") if not word.startswith("sample.guidance_scale")]
    _, components = build_components(load_config([*words, f"sample.guidance_scale={scale}"]))
    assert any("set sample.guidance_scale=5" in note for note in components.notes) == noted


def test_a_shipped_model_and_one_without_an_unconditional_branch_need_no_guidance(tiny_model):
    assert guidance_note("some/model", load_text_policy("sd1", guidance_scale=1.0))
    for name, policy in (
        ("peeps", load_text_policy("sd1", guidance_scale=1.0)),
        ("some/flux", load_flow_policy("schnell")),
        (str(tiny_model), load_policy(str(tiny_model))),
    ):
        assert guidance_note(name, policy) == ""


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("option", ["prompts.source", "evaluation.prompts"])
def test_negative_prompts_of_a_list_are_noted_where_nothing_guides(option, scale, tmp_path):
    (tmp_path / "list.jsonl").write_text('{"prompt": "cat"}\n{"prompt": "dog", "negative": "red"}\n')
    words = text_words(tmp_path / "run", f"{option}={tmp_path / 'list.jsonl'}", "evaluation.images_per_prompt=1")
    # the last word of an option decides
    words = [word for word in words if option == "evaluation.prompts" or word != "prompts.source=animals"]
    _, components = build_components(load_config([*words, f"sample.guidance_scale={scale}"]))
    notes = [note for note in components.notes if "'red' of 'dog'" in note]
    assert len(notes) == (scale == 1) and all("sample.guidance_scale is 1: " in note for note in notes)


def test_negative_prompts_of_a_list_are_noted_for_a_model_that_has_none():
    panel, policy = Panel(2, 0, 2), load_flow_policy("flux")
    plain, negated = (PromptList("list", (Prompt("cat", negative),), (1.0,)) for negative in ("", "red"))
    assert "model.name some/flux has no negative prompts" in negatives_note("some/flux", policy, negated, panel)
    assert "'red' of 'cat'" in negatives_note("some/flux", policy, plain, panel.with_prompts(negated, 1))
    assert negatives_note("some/flux", policy, plain, panel) == negatives_note("some/flux", policy, None, panel) == ""


# --- the loop ---------------------------------------------------------------------------------------------------------

MODES = {
    # (order, images_per_call, activations)
    "replay": ("on_policy", 0, "replay"),
    "keep": ("on_policy", 0, "keep"),
    "checkpoint": ("on_policy", 0, "checkpoint"),
    "groups share a call": ("on_policy", 2 * SIZE, "replay"),
    "split": ("on_policy", 2, "keep"),
}


CASES = [
    *(("sd1", "fp32", True, mode) for mode in MODES),
    *(("sdxl", "bf16", True, mode) for mode in ("replay", "keep")),
    ("sd2", "fp32", False, "replay"),
]


@pytest.mark.parametrize(("kind", "precision", "guided", "mode"), CASES)
def test_on_policy_the_ratio_is_exactly_one(kind, precision, guided, mode):
    order, images_per_call, activations = MODES[mode]
    policy = load_text_policy(kind, precision=precision)
    if activations == "checkpoint":
        policy.network.checkpoint_activations()
    plan, window = CallPlan(SIZE, images_per_call, order), Window(1, 4)
    groups = [
        Group(
            number,
            window,
            NoiseKey(3, torch.arange(number * SIZE, (number + 1) * SIZE)),
            policy.condition([Prompt(text, "red")] * SIZE, guided=guided),
        )
        for number, text in enumerate(("a red cat", "dog"))
    ]
    rolled_out = rollout(policy, groups, plan, keep_from=window.start if activations == "keep" else None)
    calls = plan.update(rolled_out.calls, {group.number: window for group in groups})
    if activations != "keep":
        ratios = replay_ratios(policy, rolled_out.trajectories, calls, as_in_update=True)
        assert ratios.tolist() == [1.0] * (2 * SIZE * len(window))
    forwards = policy.calls.forwards
    engine = make_engine(policy)
    advantages = dict.fromkeys((0, 1), torch.tensor([1.0, -0.5, 0.25]))
    stats = optimizer_step(engine, policy, rolled_out.trajectories, advantages, calls, Clips(1e-4, 2.5, False))
    assert float(stats.ratio_mean) == float(stats.ratio_max) == 1.0 and float(stats.grad_norm) > 0
    # every sample and step once, both branches counted
    pairs = 2 * SIZE * len(window) * (2 if guided else 1)
    assert policy.calls.backwards == pairs
    assert policy.calls.forwards - forwards == (0 if activations == "keep" else pairs)


def test_several_steps_a_call_repeat_the_prompts_rows():
    policy = load_text_policy("sdxl")
    window, plan = Window(1, 5), CallPlan(SIZE, 2 * SIZE)
    condition = policy.condition([Prompt("cat"), Prompt("dog", "red"), Prompt("a")])
    result = rollout(policy, [Group(0, window, NoiseKey(3, torch.arange(SIZE)), condition)], plan)
    ratios = replay_ratios(policy, result.trajectories, plan.replay({0: window}))
    # another batch rounds otherwise
    torch.testing.assert_close(ratios, torch.ones(SIZE * len(window)), rtol=0, atol=1e-5)
    turned = Group(
        0, window, NoiseKey(3, torch.arange(SIZE)), policy.condition([Prompt("a"), Prompt("dog"), Prompt("cat")])
    )
    object.__setattr__(result.trajectories[0], "group", turned)
    assert float((replay_ratios(policy, result.trajectories, plan.replay({0: window})) - 1).abs().max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["unet", "blocks"])
def test_compiled_calls_take_conditions_of_any_batch(mode, monkeypatch):
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    policy, plain = load_text_policy("sdxl"), load_text_policy("sdxl")
    policy.compile(mode)
    prompts = [Prompt("cat"), Prompt("dog"), Prompt("a", "red")]
    for count in (3, 1):
        condition, latents = plain.condition(prompts[:count]), latents_of(plain, count)
        with torch.no_grad():
            ours, theirs = (each.predict(latents, 1, condition).combined for each in (policy, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # a guided call is never of one row
    assert len(made) == {"unet": 1, "blocks": 5}[mode]


def text_words(folder, *more):
    words = [*tiny_words(text_model("sd1"), folder), "sample.guidance_scale=3", "train.clip_range=1", *more]
    words += ["prompts.source=animals", "evaluation.images_per_prompt=2"]
    return [word for word in words if not word.startswith("evaluation.every")] + ["evaluation.every=0"]


SCHEDULES = [pytest.param("full", marks=pytest.mark.slow), pytest.param("clusters", marks=pytest.mark.slow), "dynamic"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_trains_the_unet_alone_from_clean_latents_and_counts_both_branches(schedule, tmp_path):
    kwargs = {"clusters": ["window.kwargs={clusters: [[0, 3], [3, 6]], iterations_per_cluster: 1}"]}.get(schedule, [])
    train(text_words(tmp_path / "run", f"window.schedule={schedule}", *kwargs))
    assert len(metrics(tmp_path / "run")) == 2 and len(panels(tmp_path / "run")) == 2
    before, after = weights(text_model("sd1")), weights(tmp_path / "run")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        theirs, ours = (load_file(f / f"{part}.safetensors") for f in (text_model("sd1"), tmp_path / "run" / "model"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "tags: [text-to-image, " in card and "guidance_scale=3.0" in card
    if schedule == "full":
        # two iterations of 2 groups of 3 over 6 steps: a forward, a replay and a backward of two, each of two branches
        assert metrics(tmp_path / "run")[-1]["evaluations"] == 2 * 2 * (2 * 3 * 6) * (1 + 1 + 2)


@pytest.mark.parametrize("guided", [True, False])
def test_groups_are_guided_by_option_and_panels_always(guided, tmp_path):
    words = text_words(tmp_path / "run", f"train.guidance={str(guided).lower()}")
    _, components = build_components(load_config(words))
    policy, branches = components.policy, 2 if guided else 1
    run = SimpleNamespace(phase=lambda name: nullcontext(), note_once=lambda *_, **__: None)
    _, groups = begin(components, run, 0)
    assert [group.condition.branches for group in groups.values()] == [branches] * 2
    policy.calls.forwards = 0
    images = components.evaluate_panel().images
    assert images.shape == (6, 3, 2 * SIDE, 2 * SIDE) and policy.calls.forwards == 0
    components.panel._sample(policy)
    assert policy.calls.forwards == 2 * 6 * 6
    assert "exact" in self_check(components)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"guidance_scale": 2.0}, "sample.guidance_scale is 2.0.*unconditional.*leave it at 1"),
        ({"decoder": "madebyollin/taesd"}, "model.decoder is madebyollin/taesd.*leave it at None"),
        ({"offload": True}, "compute.offload is True.*leave it at False"),
        ({"encoder_precision": "bf16"}, "compute.encoder_precision is bf16.*leave it at fp32"),
        ({"image_size": 32}, "model.image_size is 32.*leave it at None"),
        ({"max_sequence_length": 9}, "model.max_sequence_length is 9.*no T5; leave it out"),
    ],
)
def test_options_of_text_to_image_models_are_refused_for_others(tiny_model, options, match):
    with pytest.raises(ValueError, match=match):
        load_policy(str(tiny_model), **options)


def test_offload_is_refused_where_there_is_nowhere_to_go():
    with pytest.raises(ValueError, match="compute.offload is true.*CPU"):
        load_text_policy("sd1", offload=True)


def test_guidance_below_one_is_refused():
    with pytest.raises(ValueError, match="sample.guidance_scale is 0.5.*at least 1"):
        train(["sample.guidance_scale=0.5"])
