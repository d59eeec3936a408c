"""Files of text-to-image models: layouts that load, the files that a hub is asked for, and what is refused by name."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from hrf_fast.policies.files import read_model
from hrf_fast.policies.parts import quiet
from hrf_fast.policies.untrained import untrained_shape
from hrf_fast.prompts import Prompt
from tests.hub import ID, Hub
from tests.loading import load_policy
from tests.text_models import SIDE, make_pipeline, text_model

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}


def load(name, **options):
    return load_policy(str(name), **{"num_inference_steps": 4, "guidance_scale": 2.0, **options})


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def parts_of(policy):
    """Every weight of a policy by part and name."""
    modules = {"unet": policy.unet} | {n: p for n, p in policy._parts.items() if isinstance(p, torch.nn.Module)}
    return {f"{part}.{name}": value for part, module in modules.items() for name, value in module.state_dict().items()}


def assert_equal(policy, other):
    ours, theirs = parts_of(policy), parts_of(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(text_model("sd1"), tmp_path / "sd1")


@pytest.fixture
def copy_xl(tmp_path):
    return shutil.copytree(text_model("sdxl"), tmp_path / "sdxl")


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_shards_load(tmp_path):
    with quiet():
        make_pipeline("sdxl").save_pretrained(tmp_path, max_shard_size="6KB")
    indexes = {path.parent.name for path in tmp_path.glob("*/*.index.json")}
    assert indexes == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert_equal(load(tmp_path), load(text_model("sdxl")))


def test_variants_load_in_fp32_and_parts_without_one_have_the_plain_file(copy_xl):
    expected = parts_of(load(copy_xl))
    for part, stem in WEIGHTS.items():
        path = copy_xl / part / f"{stem}.safetensors"
        half = {name: value.half() if value.is_floating_point() else value for name, value in load_file(path).items()}
        if part != "vae":
            save_file(half, copy_xl / part / f"{stem}.fp16.safetensors", {"format": "pt"})
            path.unlink()
    loaded = parts_of(load(copy_xl, variant="fp16"))
    assert all(value.dtype != torch.float16 for value in loaded.values())
    for name, value in expected.items():
        halved = value.half().float() if value.is_floating_point() and not name.startswith("vae") else value
        assert torch.equal(loaded[name], halved), name
    with pytest.raises(ValueError, match="model.name is .*unet has no .*model.variant to one of fp16"):
        load(copy_xl)


def test_bin_files_load_and_code_in_them_is_not_run(copy, tmp_path):
    expected = parts_of(load(copy))
    for part, stem in WEIGHTS.items():
        if (path := copy / part / f"{stem}.safetensors").exists():
            name = "pytorch_model.bin" if part == "text_encoder" else f"{stem}.bin"
            # as in old files
            more = {"text_model.embeddings.position_ids": torch.arange(3)} if part == "text_encoder" else {}
            torch.save(load_file(path) | more, copy / part / name)
            path.unlink()
    loaded = parts_of(load(copy))
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())

    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"embeddings.weight": Malicious()}, copy / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.name.*text_encoder do not load"):
        load(copy)
    assert not (tmp_path / "executed").exists()


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(copy_xl, tmp_path, monkeypatch):
    """A repository with what the trainer does not need."""
    for name in (
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "image_encoder/config.json",
        "a.ckpt",
    ):
        (copy_xl / name).parent.mkdir(exist_ok=True)
        (copy_xl / name).write_text("{}")
    for part in ("unet", "text_encoder"):
        (copy_xl / part / f"{WEIGHTS[part]}.fp16.safetensors").write_bytes(b"of another variant")
        (copy_xl / part / "flax_model.msgpack").write_bytes(b"of another framework")
    return Hub(monkeypatch, copy_xl, tmp_path / "cache")


def test_the_hub_is_asked_for_the_files_that_are_read(hub):
    assert_equal(load(ID), load(text_model("sdxl")))
    networks = [f"{part}/{file}" for part, stem in WEIGHTS.items() for file in ("config.json", f"{stem}.safetensors")]
    tokenizers = [f"tokenizer{n}/{file}.json" for n in ("", "_2") for file in ("tokenizer", "tokenizer_config")]
    expected = ["model_index.json", "scheduler/scheduler_config.json", *networks, *tokenizers]
    assert sorted(hub.downloaded) == sorted(expected)


def test_a_refused_model_has_no_weights_downloaded(hub):
    edit(hub.source / "unet" / "config.json", time_cond_proj_dim=256)
    with pytest.raises(ValueError, match="time_cond_proj_dim: 256"):
        load(ID)
    assert hub.downloaded and not [name for name in hub.downloaded if name.endswith(("safetensors", "bin"))]


def test_offline_the_cache_is_enough(hub):
    hub.put_into_cache("*")
    hub.online = False
    assert_equal(load(ID), load(text_model("sdxl")))


# --- weights that are not whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "nan"])
def test_weights_of_every_part_are_judged(copy_xl, part, fault):
    path = copy_xl / part / f"{WEIGHTS[part]}.safetensors"
    weights = load_file(path)
    name = next(key for key in sorted(weights) if key.endswith("bias"))
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        name = f"{name}2"
        weights[name] = torch.zeros(1)
    elif fault == "shape":
        weights[name] = torch.zeros(len(weights[name]) + 1)
    else:
        weights[name][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    message = {"missing": "missing tensors", "unexpected": "unexpected", "shape": "another shape", "nan": "NaN"}[fault]
    with pytest.raises(
        ValueError, match=f"model.name is '{copy_xl}', whose weights in {copy_xl}/{part} can't.*{message}"
    ):
        load(copy_xl)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusionInpaintPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "LatentConsistencyModelPipeline",
        "PixArtAlphaPipeline",
    ],
)
def test_other_pipelines_are_refused_by_their_class(copy, kind):
    edit(copy / "model_index.json", _class_name=kind)
    with pytest.raises(ValueError, match=f"model.name is '{copy}'.*says {kind}.*StableDiffusionXLPipeline"):
        load(copy)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("StableDiffusionImg2ImgPipeline", "StableDiffusionPipeline"),
        ("StableDiffusionInpaintPipeline", "StableDiffusionPipeline"),
        ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline"),
        ("StableDiffusionXLInpaintPipeline", "StableDiffusionXLPipeline"),
    ],
)
def test_pipelines_that_begin_with_a_picture_name_the_class_to_write(copy, kind, base):
    edit(copy / "model_index.json", _class_name=kind)
    with pytest.raises(ValueError, match=f"says {kind}.*if its UNet takes 4 channels .*write {base} into"):
        load(copy)


def test_a_pipeline_of_custom_code_is_refused_by_name(copy):
    edit(copy / "model_index.json", _class_name=["pipeline", "MyPipe"])
    with pytest.raises(ValueError, match=rf"model.name is '{copy}'.*says \['pipeline', 'MyPipe'\].*code of its own"):
        load(copy)


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("name", ["sd15.safetensors", "sd15.CKPT", "sd15.gguf", "index.json"])
def test_a_single_file_is_refused_with_the_way_to_a_folder(name, absolute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m" / name
    path.parent.mkdir()
    path.write_bytes(b"")
    # relative, it has the form of a hub id
    value = str(path) if absolute else f"m/{name}"
    way_out = {
        "sd15.gguf": "quantised.*name the diffusers folder or the hub id",
        "index.json": "name the folder",
    }.get(name, f"StableDiffusionPipeline.from_single_file.'{value}'..save_pretrained.*XL.*and name that folder")
    with pytest.raises(ValueError, match=f"^model.name is '{value}', a single file.*{way_out}"):
        load(value)


@pytest.mark.parametrize(
    ("part", "values", "match"),
    [
        ("unet", {"in_channels": 9}, "takes 9 channels and returns 4.*inpainting"),
        ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim: 256.*unconditional branch"),
        ("unet", {"num_class_embeds": 10}, "num_class_embeds: 10"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet", {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type: 'image'"),
        ("unet", {"attention_type": "gated"}, "attention_type: 'gated'"),
        ("unet", {"time_embedding_type": "fourier"}, "time_embedding_type: 'fourier'"),
        ("unet", {"cross_attention_dim": 16}, "embeddings of 16 numbers.*make 8"),
        ("unet", {"sample_size": None}, "no sample_size"),
        ("unet", {"sample_size": 9}, "sample_size is 9"),
        ("unet", {"_class_name": "UNet2DModel"}, "unet is a UNet2DModel.*UNet2DConditionModel"),
        ("vae", {"latent_channels": 16}, "4 channels but whose VAE 16"),
        ("vae", {"_class_name": "VQModel"}, "vae is a VQModel"),
        ("text_encoder", {"architectures": ["T5EncoderModel"]}, "text_encoder is a T5EncoderModel"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_configs_that_cannot_be_driven_are_refused_by_the_setting(copy, part, values, match):
    edit(copy / part / "config.json", **values)
    with pytest.raises(ValueError, match=f"model.name is '{copy}'.*{match}"):
        load(copy)


@pytest.mark.parametrize(
    ("part", "values", "match"),
    [
        ("unet", {"addition_embed_type": None}, "addition_embed_type: None"),
        ("unet", {"projection_class_embeddings_input_dim": 20}, "projection_class_embeddings_input_dim 20.*36 numbers"),
        ("text_encoder_2", {"architectures": ["CLIPTextModel"]}, "text_encoder_2 is a CLIPTextModel"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_configs_of_sdxl_that_cannot_be_driven_are_refused_by_the_setting(copy_xl, part, values, match):
    edit(copy_xl / part / "config.json", **values)
    with pytest.raises(ValueError, match=f"model.name is '{copy_xl}'.*{match}"):
        load(copy_xl)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part)
    with pytest.raises(ValueError, match=f"model.name is '{copy}', which holds no {part}/"):
        load(copy)


def test_a_tokenizer_of_more_tokens_than_the_encoder_takes_is_refused(copy):
    edit(copy / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    with pytest.raises(ValueError, match=f"model.name is '{copy}'.*makes 77 tokens.*takes 16"):
        load(copy)


def test_a_damaged_tokenizer_is_refused(copy):
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"model.name is '{copy}'.*tokenizer do not load"):
        load(copy)


@pytest.mark.parametrize(
    ("values", "side"),
    [
        ({"_diffusers_version": "0.6.0"}, 64),
        ({"_diffusers_version": "0.8.1.dev0", "sample_size": 9}, 64),
        ({"_diffusers_version": "0.6.0", "sample_size": 66}, 66),
        ({"_diffusers_version": "0.9.0.dev0"}, SIDE),
        ({"_diffusers_version": "0.10.2"}, SIDE),
        ({"_diffusers_version": None}, SIDE),
    ],
    ids=str,
)
def test_images_have_the_size_of_the_pipeline_whatever_old_configs_say(copy, tmp_path, values, side):
    path = copy / "unet" / "config.json"
    edit(path, **values)
    path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_text()).items() if value is not None})
    )
    policy, plan = load(copy), untrained_shape(read_model(str(copy), weights=False))
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(copy)
        policy.save(tmp_path / "saved")
        saved = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert policy.latent_shape == plan.latents == (4, side, side)
    assert pipeline.unet.config.sample_size == saved.unet.config.sample_size == side
    assert policy.shape.size == (side * pipeline.vae_scale_factor,) * 2


def test_sdxls_pipeline_takes_old_configs_at_their_word(copy_xl):
    edit(copy_xl / "unet" / "config.json", _diffusers_version="0.6.0")
    assert load(copy_xl).latent_shape == (4, SIDE, SIDE)


def test_an_euler_scheduler_is_driven_and_saved_as_ddim(copy, tmp_path):
    edit(copy / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")
    policy, plain = load(copy), load(text_model("sd1"))
    assert torch.equal(policy.sampler.coefficients.std, plain.sampler.coefficients.std)
    policy.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler" and not config["clip_sample"] and config["steps_offset"] == 1
    assert policy.condition([Prompt("cat")]).branches == 2
