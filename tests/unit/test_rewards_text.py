"""Rewards that compare an image with its prompt: tiny random CLIPs, recomputed with transformers or by hand."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hrf_fast.rewards import RewardTerm, build_reward
from hrf_fast.rewards.registry import reads_prompts
from hrf_fast.rewards.serve import serve
from hrf_fast.vision import clip as clip_module
from tests.text_models import make_tokenizer

transformers = pytest.importorskip("transformers", minversion="5.4")
pytestmark = pytest.mark.usefixtures("offline")

SIDE, LENGTH = 32, 12
PROMPTS = ["a cat", "a red dog", "a cat", "dog dog dog dog dog dog dog dog dog dog dog dog cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP of 32 pixels and 12 tokens with a tokenizer of letters and a logit scale of e²."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = make_tokenizer(LENGTH)
    half = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "initializer_factor": 30.0, **half}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"image_size": SIDE, "patch_size": 8, "initializer_factor": 30.0, **half}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    model.logit_scale.data.fill_(2.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    side = {"height": SIDE, "width": SIDE}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def images():
    """Four pictures of whole byte levels."""
    levels = torch.randint(256, (4, 3, 5, 7), generator=torch.Generator().manual_seed(0)).float()
    return (torch.nn.functional.interpolate(levels, (40, 56), mode="bilinear").round() / 255).clamp(0, 1)


def logits(folder, images, prompts):
    """What transformers' own CLIP says of each image and its prompt, logit scale and all."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pictures = [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in images + 0.25 / 255]
    inputs = tokenizer(prompts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs, pixel_values=processor(images=pictures, return_tensors="pt")["pixel_values"])
    return output.logits_per_image.diagonal()


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_clip_score_is_a_hundred_cosines_of_transformers_clip(folder, images, batch_size):
    reward = build_reward("clip_score", kwargs={"model": str(folder), "batch_size": batch_size})
    with pytest.warns(UserWarning, match=r"a prompt of 15 tokens is cut to 12: 'dog dog"):
        values = reward(images, PROMPTS).total
    expected = logits(folder, images, PROMPTS) / np.exp(2) * 100
    assert expected.std() > 1
    torch.testing.assert_close(values, expected, atol=2e-3, rtol=1e-4)


def test_pickscore_is_the_logit_of_its_clip_behind_another_folders_processor(folder, images, tmp_path):
    bare, settings = tmp_path / "bare", tmp_path / "settings"
    for to, keep in ((bare, ("config.json", "model.safetensors")), (settings, None)):
        to.mkdir()
        for path in folder.iterdir():
            if (path.name in keep) if keep else (path.name not in ("config.json", "model.safetensors")):
                (to / path.name).write_bytes(path.read_bytes())
    kwargs = {"model": str(bare), "processor": str(settings)}
    values = build_reward("pickscore", kwargs=kwargs)(images[:3], PROMPTS[:3]).total
    torch.testing.assert_close(values, logits(folder, images[:3], PROMPTS[:3]), atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="reward.kwargs.model is .*bare.*no preprocessor_config.json"):
        build_reward("clip_score", kwargs={"model": str(bare)})


def test_a_shipped_clip_goes_by_name(folder, images, monkeypatch):
    monkeypatch.setitem(clip_module.FOLDERS, "peeps", folder)
    named = build_reward("clip_score", kwargs={"model": "peeps"})(images[:1], ["a cat"]).total
    assert torch.equal(named, build_reward("clip_score", kwargs={"model": str(folder)})(images[:1], ["a cat"]).total)


def test_what_is_no_clip_or_lacks_a_tokenizer_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="reward.kwargs.model is .*tokenizer does not load"):
        build_reward("clip_score", kwargs={"model": str(tmp_path)})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    with pytest.raises(ValueError, match="reward.kwargs.model is .*'siglip' network"):
        build_reward("clip_score", kwargs={"model": str(tmp_path)})
    with pytest.raises(ValueError, match="reward.kwargs.model is 'nowhere/clip'"):
        build_reward("clip_score", kwargs={"model": "nowhere/clip"})


@pytest.mark.parametrize(
    ("name", "argument", "files"),
    [
        ("clip_score", "model", ""),
        ("pickscore", "model", ""),
        ("aesthetic", "head", "/aesthetic-model.pth"),
        ("hps", "checkpoint", "/HPS_v2.1_compressed.pt"),
        ("image_reward", "text_config", "/med_config.json"),
    ],
)
def test_out_of_reach_the_error_names_the_option_that_sets_the_folder(packages, name, argument, files):
    with pytest.raises(ValueError) as caught:
        build_reward(name)
    message = str(caught.value)
    assert message.startswith(f"reward.kwargs.{argument} is ")
    assert message.endswith(f"and set reward.kwargs.{argument}=some/folder{files}")
    with pytest.raises(ValueError) as caught:
        build_reward([RewardTerm("jpeg_compressibility"), RewardTerm(name, 0.5)])
    message = str(caught.value)
    assert message.startswith(f"reward.terms[1].kwargs.{argument} is ")
    assert message.endswith(f"and set reward.terms[1].kwargs.{argument}=some/folder{files}")


def test_out_of_reach_a_reward_server_names_its_own_words():
    with pytest.raises(ValueError, match="^clip_score model is 'a/b'.* and set clip_score model=some/folder$"):
        serve("clip_score", ["model=a/b"], host="127.0.0.1", port=0, max_bytes=1, device="cpu")


def test_rewards_of_prompts_are_known_to_need_them():
    assert [
        name for name in ("clip_score", "pickscore", "hps", "image_reward", "aesthetic") if reads_prompts(name)
    ] == [
        "clip_score",
        "pickscore",
        "hps",
        "image_reward",
    ]


# --- rewards of other packages ----------------------------------------------------------------------------------------


class Tower(nn.Module):
    """Stands in for open_clip's CLIP and for ImageReward: mean colours against the number of letters."""

    def __init__(self, **options):
        super().__init__()
        self.options, self.scale = options, nn.Parameter(torch.ones(()))

    def encode_image(self, pixels):
        return pixels.mean((2, 3)) * self.scale

    def encode_text(self, lengths):
        return torch.cat([lengths, torch.ones(len(lengths), 2)], 1)

    def score(self, prompt, picture):
        return float(self.scale) * len(prompt) + picture.getpixel((0, 0))[0]


def install(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def packages(monkeypatch):
    made = []

    def create(architecture, **options):
        made.append((architecture, options))
        return Tower(), None, lambda picture: torch.tensor(np.asarray(picture)).permute(2, 0, 1).float()

    tokenize = lambda name: lambda texts: torch.tensor([[float(len(text))] for text in texts])  # noqa: E731
    install(monkeypatch, "open_clip", create_model_and_transforms=create, get_tokenizer=tokenize)
    install(monkeypatch, "ImageReward")
    install(monkeypatch, "ImageReward.ImageReward", ImageReward=Tower)
    return made


def checkpoint(tmp_path, weights):
    torch.save(weights, tmp_path / "weights.pt")
    return str(tmp_path / "weights.pt")


def test_hps_is_the_cosine_under_its_clip(packages, tmp_path, images):
    path = checkpoint(tmp_path, {"state_dict": {"scale": torch.tensor(3.0)}})
    reward = build_reward("hps", kwargs={"checkpoint": path, "batch_size": 3})
    values = reward(images, PROMPTS).total
    rows = torch.tensor([[len(text), 1.0, 1.0] for text in PROMPTS])
    colours = (images * 255).round().mean((2, 3))
    torch.testing.assert_close(values, torch.cosine_similarity(colours, rows))
    # the authors resize the longest side and pad
    assert packages == [("ViT-H-14", {"image_resize_mode": "longest", "image_interpolation": "bicubic"})]


def test_image_reward_asks_its_package_for_each_picture(packages, tmp_path, images):
    (tmp_path / "med.json").write_text("{}")
    kwargs = {
        "checkpoint": checkpoint(tmp_path, {"scale": torch.tensor(2.0)}),
        "text_config": str(tmp_path / "med.json"),
    }
    values = build_reward("image_reward", kwargs=kwargs)(images, PROMPTS).total
    expected = [
        2 * len(text) + float((image[0, 0, 0] * 255).round()) for text, image in zip(PROMPTS, images, strict=True)
    ]
    assert values.tolist() == expected


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hps", "image_reward"])
def test_images_without_prompts_are_refused_with_the_way_out(packages, folder, tmp_path, images, name):
    weights = {"checkpoint": checkpoint(tmp_path, {"scale": torch.tensor(2.0)})}
    (tmp_path / "med.json").write_text("{}")
    kwargs = {
        **dict.fromkeys(("clip_score", "pickscore"), {"model": str(folder)}),
        **{"hps": weights, "image_reward": {**weights, "text_config": str(tmp_path / "med.json")}},
    }[name]
    if name == "pickscore":
        kwargs = {**kwargs, "processor": str(folder)}
    reward = build_reward(name, kwargs=kwargs)
    message = f"^reward '{name}' compares images with their prompts and got none for 4 of 4 images; give a prompt for"
    for prompts in (None, [None] * 4):
        with pytest.raises(ValueError, match=f"{message} each, or use a reward of images alone"):
            reward(images, prompts)
    with pytest.raises(ValueError, match="got none for 1 of 4 images"):
        reward(images, [*PROMPTS[:3], None])


def test_weights_of_another_network_and_code_in_a_file_are_refused(packages, tmp_path):
    path = checkpoint(tmp_path, {"other": torch.zeros(())})
    with pytest.raises(ValueError, match="reward.kwargs.checkpoint is .*weights.pt.*lacks scale"):
        build_reward("hps", kwargs={"checkpoint": path})
    torch.save({"scale": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(ValueError, match="reward.kwargs.checkpoint is .*weights.pt.*can't be used"):
        build_reward("hps", kwargs={"checkpoint": path})


@pytest.mark.parametrize(
    ("name", "module", "way_out"),
    [("hps", "open_clip", r"hrf_fast\[hps\]"), ("image_reward", "ImageReward", "image-reward.*reward.name=remote")],
)
def test_a_missing_package_is_one_error_with_the_way_out(name, module, way_out, monkeypatch):
    # None in sys.modules is how Python marks a module that must not be imported
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"reward '{name}' needs {module}.*{way_out}"):
        build_reward(name)
