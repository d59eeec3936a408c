"""Loading models: every layout that diffusers writes, and a clear refusal of what can't be driven."""

import json
import re
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file

from hrf_fast.assets import ASSETS
from hrf_fast.noise import NoiseKey
from hrf_fast.policies import denoiser
from hrf_fast.policies.base import Condition, Prediction
from hrf_fast.policies.calling import Shape
from hrf_fast.policies.network import NetworkCalls
from hrf_fast.policies.sample import sample
from hrf_fast.policies.sampler import build_sampler
from hrf_fast.policies.unconditional import UnconditionalPolicy
from hrf_fast.run.files import read_log
from tests.conftest import make_scheduler, make_unet
from tests.loading import load_policy
from tests.unit.test_readme import ROOT, blocks, run_block


def load(name, **options):
    return load_policy(str(name), **{"num_inference_steps": 4, **options})


def edit(path, **values):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | values))


@pytest.fixture
def copy(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "copy")


def test_a_pipeline_folder_loads_with_its_weights(tiny_model):
    policy = load(tiny_model)
    saved = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in policy.unet.state_dict().items())
    assert policy.latent_shape == (3, 16, 16) and not policy.unet.training


def test_the_flat_layout_of_older_hub_repositories_loads(tiny_model, tmp_path):
    # as google/ddpm-celebahq-256: unet and scheduler files side by side
    for path in (*(tiny_model / "unet").iterdir(), *(tiny_model / "scheduler").iterdir()):
        shutil.copy(path, tmp_path)
    assert torch.equal(load(tmp_path).unet.conv_in.weight, load(tiny_model).unet.conv_in.weight)


@pytest.mark.parametrize("name", ["fashion", "portraits", "fashion-flow"])
def test_the_shipped_models_load_and_draw(name):
    policy = load(name, **({"scheduler": "flow_sde"} if name == "fashion-flow" else {}))
    images = policy.decode(sample(policy, NoiseKey(0, torch.arange(2)), images_per_call=2))
    assert images.shape == (2, 3, 32, 32)
    if name != "portraits":
        assert torch.equal(images[:, 0], images[:, 2])


@pytest.mark.parametrize("name", ["fashion", "portraits", "fashion-flow"])
def test_the_shipped_folders_load_as_diffusers_pipelines(name):
    pipeline = DDPMPipeline.from_pretrained(ASSETS / name / "model")
    assert pipeline.unet.config.sample_size == 32


def test_a_tuned_model_is_saved_as_what_it_was_loaded_from(tiny_model, tmp_path):
    policy = load(tiny_model)
    with torch.no_grad():
        policy.unet.conv_in.weight.add_(1.0)
    policy.save(tmp_path / "tuned")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "tuned")
    assert torch.equal(pipeline.unet.conv_in.weight, policy.unet.conv_in.weight)
    assert list((tmp_path / "tuned").rglob("*.safetensors")) and not list((tmp_path / "tuned").rglob("*.bin"))


def test_a_tuned_model_of_a_pndm_scheduler_is_saved_as_the_ddim_that_it_was_sampled_with(tmp_path):
    # saved by hand: the folder of a hub model whose scheduler is PNDM
    DDPMPipeline(make_unet(), make_scheduler("PNDMScheduler")).save_pretrained(tmp_path / "given")
    make_scheduler("PNDMScheduler").save_pretrained(tmp_path / "given" / "scheduler")
    policy = load(tmp_path / "given")
    policy.save(tmp_path / "tuned")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "tuned")
    assert isinstance(pipeline.scheduler, DDIMScheduler) and not pipeline.scheduler.config.clip_sample
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    # and here it draws what it drew before
    key = NoiseKey(0, torch.arange(2))
    assert torch.equal(sample(load(tmp_path / "tuned"), key, images_per_call=2), sample(policy, key, images_per_call=2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashon", "'fashon'.*'fashion'"),
        ("./nowhere", "'./nowhere'"),
        ("/nowhere/at/all", "'/nowhere/at/all'"),
    ],
)
def test_an_unknown_model_is_named_with_the_ways_out(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


def test_a_folder_without_a_unet_is_refused(copy):
    shutil.rmtree(copy / "unet")
    with pytest.raises(ValueError, match="model.name.*unet/config.json"):
        load(copy)


def test_a_folder_without_a_scheduler_is_refused(copy):
    shutil.rmtree(copy / "scheduler")
    with pytest.raises(ValueError, match="model.name.*scheduler/scheduler_config.json"):
        load(copy)


def test_a_config_that_is_not_json_is_named(copy):
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="model.name.*config.json.*not valid JSON"):
        load(copy)


@pytest.mark.parametrize("path", ["unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("text", ["[1]", "3", "null"])
def test_a_config_that_is_no_json_object_is_named(copy, path, text):
    (copy / path).write_text(text)
    with pytest.raises(ValueError, match=f"model.name: .*{path} holds a JSON"):
        load(copy)


@pytest.mark.parametrize(
    "values", [{"num_train_timesteps": "a"}, {"beta_start": None}, {"beta_schedule": "no"}], ids=str
)
def test_a_scheduler_config_of_wrong_values_is_refused(copy, values):
    edit(copy / "scheduler" / "scheduler_config.json", **values)
    with pytest.raises(ValueError, match="model.name is .*scheduler_config.json does not load: "):
        load(copy)


@pytest.mark.parametrize("values", [{"block_out_channels": 5}, {"down_block_types": ["NoBlock", "NoBlock"]}], ids=str)
def test_a_unet_config_of_wrong_values_is_refused(copy, values):
    edit(copy / "unet" / "config.json", **values)
    with pytest.raises(ValueError, match="model.name is .*do not load: "):
        load(copy)


def test_a_conditional_unet_is_refused_by_name(copy):
    edit(copy / "unet" / "config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(ValueError, match="model.name.*UNet2DConditionModel"):
        load(copy)


@pytest.mark.parametrize(
    "values",
    [
        {"num_class_embeds": 10},
        {"class_embed_type": "timestep"},
        {"cross_attention_dim": 768},
        {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]},
    ],
    ids=str,
)
def test_a_unet_that_is_conditioned_is_refused_by_name(copy, values):
    edit(copy / "unet" / "config.json", **values)
    ((key, value),) = values.items()
    with pytest.raises(ValueError, match=rf"model.name.*{key}: {re.escape(repr(value))}"):
        load(copy)


def test_a_unet_that_takes_noise_levels_is_refused_by_name(copy):
    # as in google/ncsnpp-ffhq-256: it divides its output by the timestep, which is 0 at the last step
    edit(copy / "unet" / "config.json", time_embedding_type="fourier")
    with pytest.raises(ValueError, match="model.name.*noise level.*time_embedding_type: 'fourier'.*positional"):
        load(copy)


def test_learned_steps_load_where_they_are_as_many_as_the_schedulers(tmp_path):
    unet = UNet2DModel(**{**make_unet().config, "time_embedding_type": "learned", "num_train_timesteps": 1000})
    DDPMPipeline(unet, make_scheduler("DDPMScheduler")).save_pretrained(tmp_path)
    policy = load(tmp_path)
    latents = torch.zeros(2, 3, 16, 16)
    assert policy.predict(latents, torch.tensor([0, 3]), Condition()).model_output.isfinite().all()
    edit(tmp_path / "scheduler" / "scheduler_config.json", num_train_timesteps=2000)
    with pytest.raises(ValueError, match="model.name.*1000 steps.*2000"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("unet/config.json", {"sample_size": "16"}),
        ("unet/config.json", {"sample_size": 16.0}),
        ("unet/config.json", {"time_embedding_type": "learned", "num_train_timesteps": "1000"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}),
    ],
    ids=str,
)
def test_a_value_of_a_wrong_type_is_refused_by_the_models_name(copy, part, values):
    edit(copy / part, **values)
    with pytest.raises(ValueError, match=re.escape(f"model.name is {str(copy)!r}")):
        load(copy)


def test_a_foreign_scheduler_is_refused_by_name(copy):
    edit(copy / "scheduler" / "scheduler_config.json", _class_name="ScoreSdeVeScheduler")
    with pytest.raises(ValueError, match="model.name.*ScoreSdeVeScheduler"):
        load(copy)


@pytest.mark.parametrize("values", [{"sample_size": None}, {"in_channels": 4, "out_channels": 4}], ids=str)
def test_a_model_without_pixels_or_size_is_refused(tmp_path, values):
    unet = make_unet(channels=values.get("in_channels", 3), size=values.get("sample_size", 16))
    DDPMPipeline(unet, make_scheduler("DDPMScheduler")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.name.*(size None|4 channels)"):
        load(tmp_path)


def test_an_image_size_that_the_unet_can_not_halve_is_refused(tmp_path):
    # of two blocks, the first of which halves it
    DDPMPipeline(make_unet(size=15), make_scheduler("DDPMScheduler")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.name.*sample_size is 15.* 2"):
        load(tmp_path)


def test_an_unknown_precision_is_refused(tiny_model):
    with pytest.raises(ValueError, match="compute.precision is 'fp8'"):
        load(tiny_model, precision="fp8")


def test_the_environment_chooses_the_kernels_and_a_wrong_choice_is_refused_by_name(tiny_model, monkeypatch):
    monkeypatch.setenv("HRF_KERNELS", "eager")
    policy = load(tiny_model)
    assert (policy.kernels, policy.kernels_reason) == ("eager", "asked for")
    # unset and empty are one
    monkeypatch.setenv("HRF_KERNELS", "")
    assert load(tiny_model).kernels_reason != "asked for"
    monkeypatch.setenv("HRF_KERNELS", "fused")
    with pytest.raises(ValueError, match="HRF_KERNELS is 'fused'.*auto, eager, triton"):
        load(tiny_model)


def test_calls_inside_uncounted_are_not_counted(tiny_model):
    policy = load(tiny_model)
    latents = torch.zeros(2, 3, 16, 16)
    with policy.uncounted(), torch.no_grad():
        policy.predict(latents, 1, Condition())
    assert policy.calls == NetworkCalls() and policy.stopwatch.restart() == 0
    policy.predict(latents, 1, Condition())
    assert policy.stopwatch.restart() > 0
    # one call of two images; a backward is counted where it is made
    assert policy.calls == NetworkCalls(batches=1, forwards=2, backwards=0)
    # 5 forwards and 2 for each of 3 backwards
    assert NetworkCalls(batches=4, forwards=5, backwards=3).evaluations == 11


def test_a_step_is_the_samplers_timestep_for_one_or_for_each(tiny_model):
    policy = load(tiny_model)
    latents = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    asked = []
    policy.unet.register_forward_pre_hook(lambda unet, given: asked.append(given[1]))
    with torch.no_grad():
        single, each = (policy.predict(latents, steps, Condition()) for steps in (3, torch.tensor([3, 1])))
    timesteps = policy.sampler.timesteps
    assert asked[0] == timesteps[3] and torch.equal(asked[1], timesteps[[3, 1]])
    torch.testing.assert_close(each.model_output[0], single.model_output[0], atol=1e-5, rtol=1e-5)
    assert single.unconditional_output is None and single.combined is single.model_output


def test_guidance_is_combined_in_fp32():
    # 1 + 7.5·(1.0078125 − 1), which bf16 rounds to 1.0625
    outputs = torch.tensor([1.0078125, 1.0], dtype=torch.bfloat16)
    combined = Prediction(outputs[:1], outputs[1:], 7.5).combined
    assert combined.dtype == torch.float32 and combined.item() == 1.05859375


def test_calls_with_gradient_go_through_what_is_attached(tiny_model):
    policy, attached = load(tiny_model), []

    def forward(*inputs, **named):
        attached.append(len(inputs[0]))
        return policy.network(*inputs, **named)

    policy.attach(forward)
    latents = torch.zeros(2, 3, 16, 16)
    with torch.no_grad():
        policy.predict(latents, 0, Condition())
    assert attached == []
    assert policy.predict(latents, 0, Condition()).model_output.requires_grad and attached == [2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_images_that_are_not_finite_stop_the_run(tiny_model, value):
    latents = torch.zeros(2, 3, 16, 16)
    latents[1, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match="not finite.*optimizer.learning_rate.*model.name"):
        load(tiny_model).decode(latents)


# --- a policy of the user's -------------------------------------------------------------------------------------------


def run_own_policy(monkeypatch, folder, iterations):
    """Run the script on docs/models.md in seconds; returns its names."""
    (code,) = (code for code in blocks(ROOT / "docs" / "models.md", "python") if "build_components" in code)
    assert len([line for line in code.splitlines() if line]) <= 30
    words = ["sample.num_inference_steps=4", "train.groups_per_iteration=2", "train.groups_per_step=2"]
    words += ["train.group_size=3", f"train.iterations={iterations}", "evaluation.panel_size=4"]
    return run_block(code, monkeypatch, [*words, "run.progress=quiet", f"run.folder={folder}"])


def test_the_policy_of_the_docs_trains_and_its_script_resumes(tmp_path, monkeypatch):
    names = run_own_policy(monkeypatch, tmp_path / "run", 1)
    saved = load_file(tmp_path / "run" / "model" / "mlp.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in names["mlp"].state_dict().items())
    assert names["components"].panel.images(names["policy"]).shape == (4, 3, 1, 1)
    run_own_policy(monkeypatch, tmp_path / "run", 2)
    assert [record["iteration"] for record in read_log(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def own(**options):
    scheduler = DDPMScheduler()
    sampler = build_sampler(scheduler, kind="ddim", num_inference_steps=4, eta=1.0)
    mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3))
    return UnconditionalPolicy(mlp, scheduler, sampler, **options)


def test_a_network_that_says_no_shape_is_named_with_the_way_out():
    with pytest.raises(ValueError, match=r"Sequential has no config of diffusers.*shape=Shape\(.*docs/models.md"):
        own()


def test_blocks_of_ones_own_are_compiled_and_those_of_the_reference_too(monkeypatch):
    compiled = []
    monkeypatch.setattr(denoiser, "compile_network", compiled.extend)
    policy = own(shape=Shape((3,), lambda mlp, latents, timesteps, inputs: latents, size=None))
    # an MLP has no blocks of a UNet, which nobody asks for then
    policy.compile("none")
    assert compiled == [] and policy.compiled == "none"
    policy.hold_reference()
    policy.blocks = lambda: [policy.unet[1]]
    policy.compile("blocks")
    assert compiled == [policy.unet[1], policy._reference.unet[1]] and policy.compiled == "blocks"
