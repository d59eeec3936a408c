"""Files of a model: every layout that diffusers reads loads, and weights that are not whole are refused by name."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from hrf_fast.cli import main
from hrf_fast.policies.parts import DIFFUSERS
from hrf_fast.weights import digest
from tests.conftest import tiny_words
from tests.hub import ID, Hub
from tests.loading import load_policy
from tests.text_models import text_model

pytestmark = pytest.mark.long

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VARIANT = "unet/diffusion_pytorch_model.fp16.safetensors"


def load(name, **options):
    return load_policy(str(name), **{"num_inference_steps": 4, **options})


def edit(path, change):
    """Rewrite a file of weights by a function of their mapping."""
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def shard(folder, **options):
    """Save the UNet of a folder again in shards, and remove the single file."""
    (folder / WEIGHTS).unlink()
    unet = UNet2DModel.from_pretrained(options.pop("source") / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="20KB", **options)
    assert len(list((folder / "unet").glob("*-of-*"))) > 1


def pickle(folder, name="diffusion_pytorch_model.bin"):
    """Put the weights of a folder into a .bin file instead."""
    torch.save(load_file(folder / WEIGHTS), folder / "unet" / name)
    (folder / WEIGHTS).unlink()


def equal(policy, folder):
    saved = load_file(folder / WEIGHTS)
    return all(torch.equal(saved[name], value) for name, value in policy.unet.state_dict().items())


@pytest.fixture
def copy(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "copy")


# --- diffusers --------------------------------------------------------------------------------------------------------


def test_the_oldest_diffusers_and_peft_are_those_that_work_beside_transformers_5():
    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    assert {"diffusers>=0.36", "peft>=0.18", "transformers>=5.4"} <= set(re.findall(r'"(\w+>=[\d.]+)"', setup))
    assert DIFFUSERS == "diffusers>=0.36"


@pytest.mark.parametrize("kind", ["DDPMPipeline", "StableDiffusionPipeline"])
def test_a_diffusers_that_can_not_import_what_is_saved_is_refused_before_weights_are_read(
    kind, tiny_model, monkeypatch
):
    def broken(*_):
        raise RuntimeError("Failed to import diffusers.pipelines") from ImportError("no FLAX_WEIGHTS_NAME")

    # it remembers what it has imported
    monkeypatch.delattr(diffusers, kind)
    monkeypatch.setattr(type(diffusers), "_get_module", broken)
    monkeypatch.setattr("hrf_fast.policies.load.load_module", None)
    version = re.escape(diffusers.__version__)
    message = rf'diffusers {version} can\'t import its {kind}.*\(ImportError: no FLAX_W.*pip install "diffusers>=0\.36"'
    with pytest.raises(ImportError, match=message):
        load(tiny_model if kind == "DDPMPipeline" else text_model("sd1"))


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_load_without_a_word(copy, tiny_model, safe, variant, capsys):
    shard(copy, source=tiny_model, safe_serialization=safe, variant=variant)
    capsys.readouterr()
    assert equal(load(copy, variant=variant), tiny_model)
    # a bar would be among the JSON lines of a run
    assert capsys.readouterr() == ("", "")


def test_weights_in_a_bin_file_load(copy, tiny_model):
    pickle(copy)
    assert equal(load(copy), tiny_model)


def test_safetensors_go_before_a_bin_file(copy, tiny_model):
    torch.save({"other": torch.zeros(1)}, copy / "unet" / "diffusion_pytorch_model.bin")
    assert equal(load(copy), tiny_model)


def test_attention_under_the_names_of_older_models_loads(copy, tiny_model):
    # as in google/ddpm-celebahq-256
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights):
        for name in [*weights]:
            for new_name, old_name in old.items():
                if f".{new_name}." in name:
                    weights[name.replace(new_name, old_name)] = weights.pop(name)

    edit(copy / WEIGHTS, rename)
    assert any(".proj_attn." in name for name in load_file(copy / WEIGHTS))
    assert equal(load(copy), tiny_model)


def test_a_variant_loads_where_it_is_asked_for_and_is_named_where_the_plain_file_is_missing(copy, tiny_model):
    edit(copy / WEIGHTS, lambda weights: weights.update({name: value.half() for name, value in weights.items()}))
    shutil.move(copy / WEIGHTS, copy / VARIANT)
    policy = load(copy, variant="fp16")
    expected = load_file(tiny_model / WEIGHTS)["conv_in.weight"]
    assert torch.equal(policy.unet.conv_in.weight, expected.half().float())
    with pytest.raises(ValueError, match=f"model.name is '{copy}'.*model.variant to one of fp16"):
        load(copy)
    with pytest.raises(ValueError, match="model.variant to one of fp16"):
        load(copy, variant="bf16")
    # and as an option of runs and of hrf sample
    words = [*tiny_words(copy, copy.parent / "run"), "train.iterations=1", "evaluation.every=0"]
    assert main(["train", *words]) == 1
    assert main(["train", *words, "model.variant=fp16"]) == 0
    out = ["--out", str(copy.parent / "g.png"), "--count", "2", "--steps", "2"]
    assert main(["sample", str(copy), *out, "--variant", "fp16"]) == 0


def test_a_variant_that_a_model_does_not_have_is_refused_with_those_it_has(copy):
    with pytest.raises(ValueError, match=f"model.variant is 'bf16', but '{copy}' has no weights of it; use null"):
        load(copy, variant="bf16")
    shutil.copy(copy / WEIGHTS, copy / VARIANT)
    with pytest.raises(ValueError, match="use fp16 or null"):
        load(copy, variant="bf16")


def test_a_folder_without_weights_is_refused(copy):
    (copy / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"model.name is '{copy}'.*unet has no diffusion_pytorch_model.safetensors"):
        load(copy)


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(copy, tmp_path, monkeypatch):
    """A repository with what the trainer does not need: a duplicate, flax weights, another part and a picture."""
    others = (
        "unet/diffusion_flax_model.msgpack",
        "text_encoder/model.safetensors",
        "text_encoder/config.json",
        "a.png",
    )
    for name in others:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("{}")
    torch.save(load_file(copy / WEIGHTS), copy / "unet" / "diffusion_pytorch_model.bin")
    return Hub(monkeypatch, copy, tmp_path / "cache")


CONFIGS = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]


def test_only_the_files_that_are_read_are_downloaded(hub, tiny_model):
    assert equal(load(ID), tiny_model)
    assert hub.downloaded == [*CONFIGS, WEIGHTS]


def test_pickles_are_downloaded_where_only_another_part_has_safetensors(hub, tiny_model):
    (hub.source / WEIGHTS).unlink()
    assert equal(load(ID), tiny_model)
    assert hub.downloaded == [*CONFIGS, "unet/diffusion_pytorch_model.bin"]


def test_shards_of_the_hub_are_those_of_the_index(hub, tiny_model):
    shard(hub.source, source=tiny_model)
    (hub.source / "unet" / "diffusion_pytorch_model-99999-of-99999.safetensors").write_text("of an older version")
    assert equal(load(ID), tiny_model)
    index = json.loads((hub.source / f"{WEIGHTS}.index.json").read_text())
    shards = sorted({f"unet/{name}" for name in index["weight_map"].values()})
    assert hub.downloaded == [*sorted([*CONFIGS, f"{WEIGHTS}.index.json"]), *shards]


def test_a_variant_of_the_hub_is_named_and_downloaded_alone(hub):
    (hub.source / "unet" / "diffusion_pytorch_model.bin").unlink()
    shutil.move(hub.source / WEIGHTS, hub.source / VARIANT)
    with pytest.raises(ValueError, match="model.name is 'owner/model'.*model.variant to one of fp16"):
        load(ID)
    assert hub.downloaded == CONFIGS
    load(ID, variant="fp16")
    assert hub.downloaded == [*CONFIGS, VARIANT]


def test_a_model_that_cannot_be_driven_is_refused_before_its_weights_are_downloaded(hub):
    (hub.source / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(ValueError, match="PixArtAlphaPipeline"):
        load(ID)
    assert hub.downloaded == CONFIGS


@pytest.mark.parametrize("extra", [(), ("*.json", "*.bin")], ids=["diffusers' own download", "a partial one"])
def test_offline_the_cache_of_another_program_is_enough(hub, tiny_model, extra):
    hub.put_into_cache(*CONFIGS, *(extra or [WEIGHTS]))
    hub.online = False
    assert equal(load(ID, revision="main"), tiny_model)
    # what is in that cache is what diffusers takes from it
    pipeline = DiffusionPipeline.from_pretrained(hub.snapshot, use_safetensors=not extra)
    assert torch.equal(pipeline.unet.conv_in.weight, load(ID).unet.conv_in.weight)


def test_offline_a_cache_without_weights_says_so_and_a_plan_needs_none(hub, not_measured, capsys):
    hub.put_into_cache(*CONFIGS)
    hub.online = False
    with pytest.raises(ValueError, match="model.name is 'owner/model'.*no .*OfflineModeIsEnabled"):
        load(ID)
    assert main(["plan", "--memory", "8GB", *tiny_words(ID, "run")]) == 0
    assert "it fits" in capsys.readouterr().out


def test_a_hub_id_without_network_says_how_to_bring_the_model(hub):
    hub.online = False
    with pytest.raises(ValueError, match="model.name is 'owner/model'.*hf download"):
        load(ID)


# --- weights that are not whole ---------------------------------------------------------------------------------------


def drop(weights):
    del weights["conv_out.bias"]


def add(weights):
    weights["conv_out.bias2"] = weights["conv_out.bias"].clone()


def reshape(weights):
    weights["conv_out.bias"] = torch.zeros(4)


def spoil(value):
    def change(weights):
        weights["conv_out.bias"][1] = value

    return change


FAULTS = {
    "missing": (drop, r"missing tensors \(conv_out.bias\)"),
    "unexpected": (add, r"unexpected tensors \(conv_out.bias2\)"),
    "shape": (reshape, r"tensors of another shape \(conv_out.bias is \[4\] instead of \[3\]\)"),
    "nan": (spoil(float("nan")), r"NaN or infinity in tensors \(conv_out.bias\)"),
    "inf": (spoil(float("-inf")), r"NaN or infinity in tensors \(conv_out.bias\)"),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin", "half"])
@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(copy, kind, fault):
    change, message = FAULTS[fault]
    edit(copy / WEIGHTS, change)
    if kind == "half":
        edit(copy / WEIGHTS, lambda weights: weights.update({name: value.half() for name, value in weights.items()}))
    if kind == "bin":
        pickle(copy)
    with pytest.raises(
        ValueError, match=f"model.name is '{copy}', whose weights in {copy}/unet can't be used: {message}"
    ):
        load(copy)


def test_a_run_is_refused_before_it_has_a_folder(copy, tmp_path, capsys):
    edit(copy / WEIGHTS, drop)
    assert main(["train", *tiny_words(copy, tmp_path / "run")]) == 1
    assert "missing tensors (conv_out.bias)" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_several_faults_are_told_at_once(copy):
    edit(copy / WEIGHTS, lambda weights: [add(weights), drop(weights), weights.pop("conv_in.bias")])
    message = r"missing tensors \(conv_in.bias, conv_out.bias\) and unexpected tensors \(conv_out.bias2\)"
    with pytest.raises(ValueError, match=message):
        load(copy)


@pytest.mark.parametrize("safe", [True, False])
def test_a_shard_without_what_the_index_promises_is_refused_by_name(copy, tiny_model, safe):
    shard(copy, source=tiny_model, safe_serialization=safe)
    suffix = "safetensors" if safe else "bin"
    index = json.loads((copy / "unet" / f"diffusion_pytorch_model.{suffix}.index.json").read_text())
    path = copy / "unet" / index["weight_map"]["conv_out.bias"]
    weights = load_file(path) if safe else torch.load(path, weights_only=True)
    drop(weights)
    save_file(weights, path) if safe else torch.save(weights, path)
    with pytest.raises(ValueError, match=r"model.name.*missing tensors \(conv_out.bias\)"):
        load(copy)
    path.unlink()
    with pytest.raises(ValueError, match=f"model.name is .*do not load.*{path.name}"):
        load(copy)


@pytest.mark.parametrize("weight_map", [None, {"conv_in.bias": 3}, {"conv_in.bias": "../conv_in.safetensors"}], ids=str)
def test_an_index_of_another_form_is_refused_by_its_path(copy, tiny_model, weight_map):
    shard(copy, source=tiny_model)
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match="model.name: .*index.json has no weight_map"):
        load(copy)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_bin_file_with_code_in_it_is_refused_and_not_run(copy, tiny_model, tmp_path, sharded):
    marker = tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    if sharded:
        shard(copy, source=tiny_model, safe_serialization=False)
        path = next(iter((copy / "unet").glob("*-of-*.bin")))
    else:
        (copy / WEIGHTS).unlink()
        path = copy / "unet" / "diffusion_pytorch_model.bin"
    torch.save({"conv_in.weight": Malicious()}, path)
    with pytest.raises(ValueError, match="model.name.*do not load"):
        load(copy)
    assert not marker.exists()


def test_a_digest_is_of_numbers_and_not_of_where_they_lie():
    numbers = torch.arange(9.0)
    # begins 4 bytes behind a multiple of 8
    view = numbers[1:]
    assert view.data_ptr() % 8 == 4
    assert digest({"weight": view}) == digest({"weight": view.clone()}) != digest({"weight": view + 1})
    assert digest({"weight": view.view(2, 4)}) == digest({"weight": view.clone().view(2, 4)})
