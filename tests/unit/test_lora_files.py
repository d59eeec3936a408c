"""Adapters of text-to-image models as files: diffusers loads them and draws as the run did; merged, and wrong ones."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hrf_fast.assembly.model import build_policy
from hrf_fast.commands.evaluate import evaluate
from hrf_fast.commands.export import export
from hrf_fast.commands.runs import with_sampler
from hrf_fast.commands.sample import draw
from hrf_fast.config.load import load_config
from hrf_fast.config.run_options import ComputeConfig
from hrf_fast.engines.base import trained_weights
from hrf_fast.evaluation import panel as panel_module
from hrf_fast.evaluation.panel import Panel
from hrf_fast.memory.planner import plan
from hrf_fast.noise import NoiseKey
from hrf_fast.policies.lora import LORA_WEIGHTS, add_adapters, load_adapters
from hrf_fast.policies.parts import quiet
from hrf_fast.policies.sample import sample
from hrf_fast.prompts import Prompt
from hrf_kernels import philox_normal
from tests.conftest import tiny_words
from tests.loading import load_policy
from tests.runs import equal, panels, train
from tests.text_models import SIDE, load_text_policy, text_model

pytestmark = pytest.mark.long

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
DRAWING = (
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_ddpm",
)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An iteration of LoRA on the smallest Stable Diffusion 1: (folder, its words)."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    prompts = folder.with_name("prompts.txt")
    prompts.write_text("cat\n")
    torch.set_num_threads(1)
    words = [*tiny_words(text_model("sd1"), folder), "train.iterations=1", "optimizer.learning_rate=0.03"]
    words += [
        "lora.rank=2",
        "lora.alpha=6",
        "sample.guidance_scale=5",
        "evaluation.every=0",
        "evaluation.panel_size=16",
        "evaluation.images_per_prompt=2",
        f"prompts.source={prompts}",
        "prompts.negative=dog",
    ]
    train([*words, "window.schedule=random", "train.groups_per_iteration=1"], reward=brightness)
    return folder, words


def lines_of(folder) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    return block


def drawn(code, policy, noise, folder, monkeypatch):
    """The images of lines of Python, run in a folder, whose noise is that of hrf's panel instead of PyTorch's."""
    steps = iter(range(-1, 1000))

    def randn_tensor(asked, **_):
        step = next(steps)
        shape = policy.latent_shape
        return philox_normal(shape, seed=noise.key, sample_id=noise.sample_id, step=0xFFFFFFFF if step < 0 else step)

    names = {}
    with quiet(), monkeypatch.context() as patch:
        for module in DRAWING:
            patch.setattr(f"{module}.randn_tensor", randn_tensor)
        patch.chdir(folder)
        exec(code, names)
    return names["images"]


def test_the_lines_of_the_card_load_the_adapters_and_draw_the_last_panel(run, monkeypatch):
    folder, words = run
    assert {path.name for path in (folder / "model").iterdir()} == {"README.md", LORA_WEIGHTS}
    policy = build_policy(load_config(words), str(folder / "model"))
    noise, prompts = Panel(16, 1234, 16).noise(policy), [Prompt("cat", "dog")] * 16
    code = lines_of(folder / "model").replace("your prompt", "cat").replace('"sd1"', f'"{text_model("sd1")}"')
    assert 'pipeline.load_lora_weights(".")' in code and str(text_model("sd1")) in code
    expected = policy.decode(sample(policy, noise, prompts, images_per_call=16))
    torch.testing.assert_close(drawn(code, policy, noise, folder / "model", monkeypatch), expected, atol=1e-5, rtol=0)
    assert panels(folder)[-1]["reward"][0] == pytest.approx(float(brightness(expected, None).mean()), abs=1e-5)
    # and the adapters have moved it
    pretrained = build_policy(load_config(words))
    start = pretrained.decode(sample(pretrained, noise, prompts, images_per_call=16))
    assert float((start - expected).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "scheduler", "sampler"),
    [
        ("sd1", "DPMSolverMultistepScheduler", "ddim"),
        ("sd1", "PNDMScheduler", "ddim_trl"),
        ("sdxl", "EulerDiscreteScheduler", "ddim"),
        ("sdxl", "PNDMScheduler", "ddim"),
        ("sdxl", "UniPCMultistepScheduler", "ddpm"),
    ],
)
def test_the_lines_draw_by_the_policys_settings_where_the_base_says_none(
    kind, scheduler, sampler, tmp_path, monkeypatch
):
    base = shutil.copytree(text_model(kind), tmp_path / "base")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": scheduler, **betas}))
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", scheduler]}))
    policy = load_policy(str(base), scheduler=sampler, num_inference_steps=6, guidance_scale=5.0)
    add_adapters(policy.unet, rank=2, alpha=6, targets=TARGETS)
    policy.save(tmp_path / "adapters")
    code = policy.example(sampler, 6, 1.0, f'"{base}"', negative="dog").replace("your prompt", "cat")
    noise = NoiseKey(3, torch.arange(16))
    expected = policy.decode(sample(policy, noise, [Prompt("cat", "dog")] * 16, images_per_call=16))
    images = drawn(code, policy, noise, tmp_path / "adapters", monkeypatch)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_diffusers_has_the_network_of_the_policy_with_alpha(kind, tmp_path):
    policy = load_text_policy(kind)
    # a scale of 4, which rounds nothing where the file has it in B
    add_adapters(policy.unet, rank=2, alpha=8, targets=TARGETS)
    for weight in trained_weights(policy.unet).values():
        nn.init.normal_(weight, std=0.3)
    policy.save(tmp_path)
    pipeline = getattr(diffusers, policy._pipeline).from_pretrained(text_model(kind))
    pipeline.load_lora_weights(tmp_path)
    condition = policy.condition([None, None], guided=False)
    inputs = dict(condition.inputs)
    added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
    latents = torch.randn(2, 4, SIDE, SIDE)
    with torch.no_grad():
        theirs = pipeline.unet(latents, 5, **inputs, added_cond_kwargs=added or None).sample
        assert torch.equal(policy.network(latents, 5, **condition.inputs), theirs)
        pipeline.unload_lora_weights()
        # who reads no header takes alpha for the rank
        pipeline.load_lora_weights(load_file(tmp_path / LORA_WEIGHTS))
        assert torch.equal(pipeline.unet(latents, 5, **inputs, added_cond_kwargs=added or None).sample, theirs)
        pipeline.unload_lora_weights()
        base = pipeline.unet(latents, 5, **inputs, added_cond_kwargs=added or None).sample
    assert float((theirs - base).abs().max()) > 1e-3


def test_files_of_adapters_are_read_whatever_alpha_they_have(tmp_path):
    policy = load_text_policy("sd1")
    add_adapters(policy.unet, rank=2, alpha=8, targets=TARGETS)
    for weight in trained_weights(policy.unet).values():
        nn.init.normal_(weight, std=0.3)
    policy.save(tmp_path)
    weights = {name: weight.clone() for name, weight in trained_weights(policy.unet).items()}
    with safe_open(tmp_path / LORA_WEIGHTS, "pt") as opened:
        metadata = opened.metadata()
    header = json.loads(metadata["lora_adapter_metadata"])
    assert header == {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": sorted(TARGETS)}
    # as an older version and other trainers write them: B as it is, and alpha in the header
    tensors = load_file(tmp_path / LORA_WEIGHTS)
    older = {name: tensor / 4 if ".lora_B" in name else tensor for name, tensor in tensors.items()}
    (tmp_path / "older").mkdir()
    metadata["lora_adapter_metadata"] = json.dumps({**header, "unet.lora_alpha": 8})
    save_file(older, tmp_path / "older" / LORA_WEIGHTS, metadata)
    for folder in (tmp_path, tmp_path / "older"):
        for weight in trained_weights(policy.unet).values():
            nn.init.zeros_(weight)
        load_adapters(policy.unet, folder)
        assert equal(trained_weights(policy.unet), weights)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_model_with_an_adapter_fused_is_a_model_to_start_from(kind, tmp_path):
    """The calls that docs/models.md names."""
    policy = load_text_policy(kind)
    add_adapters(policy.unet, rank=2, alpha=6, targets=TARGETS)
    for weight in trained_weights(policy.unet).values():
        nn.init.normal_(weight, std=0.3)
    policy.save(tmp_path / "adapters")
    with quiet():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(text_model(kind))
        pipeline.load_lora_weights(tmp_path / "adapters")
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        pipeline.save_pretrained(tmp_path / "fused")
    fused = load_policy(str(tmp_path / "fused"), num_inference_steps=6, guidance_scale=5.0)
    latents, condition = torch.randn(2, *policy.latent_shape), policy.condition([Prompt("cat")] * 2)
    ours, theirs, start = (
        each.predict(latents, 2, condition).combined.detach() for each in (policy, fused, load_text_policy(kind))
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert float((ours - start).abs().max()) > 0.1


def test_a_run_its_checkpoint_and_its_merged_pipeline_draw_the_same(run, tmp_path):
    folder, words = run
    checkpoint = folder / "checkpoints" / "iteration-000001"
    export(checkpoint, tmp_path / "adapters")
    assert equal(*(load_file(f / LORA_WEIGHTS) for f in (tmp_path / "adapters", folder / "model")))
    export(checkpoint, tmp_path / "whole", merge=True)
    assert "load_lora_weights" not in lines_of(tmp_path / "whole")
    export(folder, tmp_path / "of_run", merge=True)
    unet = Path("unet") / "diffusion_pytorch_model.safetensors"
    # saved adapters have alpha / rank within B, which rounds otherwise
    torch.testing.assert_close(*(load_file(tmp_path / name / unet) for name in ("of_run", "whole")))
    with quiet():
        merged = StableDiffusionPipeline.from_pretrained(tmp_path / "whole").unet
    policy = build_policy(load_config(words), str(folder / "model"))
    latents, condition = torch.randn(2, 4, SIDE, SIDE), policy.condition([None, None], guided=False)
    with torch.no_grad():
        ours = policy.network(latents, 5, **condition.inputs)
        torch.testing.assert_close(merged(latents, 5, **condition.inputs).sample, ours, atol=1e-5, rtol=0)
    options = {"count": 2, "images_per_call": 2, "seed": 0, "device": "cpu"}
    for name, model in (("run", folder), ("checkpoint", checkpoint)):
        draw(str(model), tmp_path / f"{name}.png", **options)
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "checkpoint.png").read_bytes()
    assert evaluate(folder, ["reward.name=jpeg_compressibility", "evaluation.panel_size=2"]).is_file()


def test_a_run_is_drawn_in_full_precision_on_a_cpu_and_in_its_own_on_a_gpu(monkeypatch):
    words = ["compute.precision=bf16", "lora.rank=2", "lora.base_precision=bf16", "compute.images_per_call=4"]
    config = load_config([f"model.name={text_model('sd1')}", *words, "compute.offload=true"])
    drawn = with_sampler(config, "cpu", {"scheduler": "ddpm"})
    assert drawn.sample.scheduler == "ddpm" and drawn.compute == ComputeConfig() and drawn.lora.base_precision == "fp32"
    monkeypatch.setattr("hrf_fast.commands.runs.choose_device", torch.device)
    drawn = with_sampler(config, "cuda", {})
    assert (drawn.compute.precision, drawn.compute.offload, drawn.lora.base_precision) == ("bf16", True, "bf16")


def test_a_call_of_a_drawn_grid_is_one_that_fits(run, tmp_path, monkeypatch):
    asked, folder = [], run[0]
    draws = panel_module.sample

    def watched(*arguments, **options):
        asked.append(options["images_per_call"])
        return draws(*arguments, **options)

    monkeypatch.setattr(panel_module, "sample", watched)
    monkeypatch.setattr("hrf_fast.policies.text_to_image._PIXELS_AT_ONCE", 2 * (2 * SIDE) ** 2)
    options = {"count": 2, "seed": 0, "device": "cpu"}
    draw(str(folder), tmp_path / "run.png", **options)
    draw(str(text_model("sd1")), tmp_path / "model.png", prompts=["cat"], **options)
    draw(str(text_model("sd1")), tmp_path / "one.png", prompts=["cat"], images_per_call=1, **options)
    assert asked == [64, 2, 1]


def test_adapters_of_another_rank_are_refused_by_name(run, tmp_path):
    folder, words = run
    with pytest.raises(
        ValueError, match=rf"{LORA_WEIGHTS} can't be used .*another shape .*lora_A.* is \[2, 4\] instead"
    ):
        build_policy(load_config([*words, "lora.rank=3"]), str(folder / "model"))
    tensors = load_file(folder / "model" / LORA_WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * torch.nan}, tmp_path / LORA_WEIGHTS)
    policy = build_policy(load_config(words))
    with pytest.raises(ValueError, match="NaN or infinity"):
        load_adapters(policy.network.unet, tmp_path)
    (tmp_path / LORA_WEIGHTS).write_bytes((folder / "model" / LORA_WEIGHTS).read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{tmp_path / LORA_WEIGHTS} can't be read .*; restore the run's folder"):
        load_adapters(policy.network.unet, tmp_path)


def test_only_adapters_of_text_to_image_models_are_merged(tiny_model, tmp_path):
    words = [*tiny_words(tiny_model, tmp_path / "run"), "train.iterations=1", "evaluation.panel_size=2"]
    train([*words, "window.schedule=random"], reward=brightness)
    with pytest.raises(ValueError, match="--merge is for adapters"):
        export(tmp_path / "run" / "checkpoints" / "iteration-000001", tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_plan_of_a_text_to_image_model_has_its_adapters():
    words = [
        f"model.name={text_model('sdxl')}",
        "prompts.source=animals",
        "lora.rank=4",
        "lora.base_precision=bf16",
        "compute.precision=bf16",
    ]
    config = load_config([*words, "sample.guidance_scale=5", "sample.num_inference_steps=6"])
    made, policy = plan(config, gpus=1, memory=10**9), build_policy(config)
    states, parameters = made.states("plain"), list(policy.network.parameters())
    assert states.parameters == sum(parameter.nbytes for parameter in parameters)
    assert states.gradients == 4 * sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
