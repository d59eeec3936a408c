"""Rewards that read a network: tiny random ones in the published formats, compared with transformers' own pipeline."""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from hrf_fast.rewards import RewardTerm, build_reward
from hrf_fast.rewards.aesthetic import build_head
from hrf_fast.rewards.classifier import find_classes
from hrf_fast.vision.shipped import load_reference, load_shipped
from tests.hub import ID, Hub

transformers = pytest.importorskip("transformers", minversion="5.4")
pytestmark = pytest.mark.usefixtures("offline")

WIDTH = 24
CLIP_SIDE = 32


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of 32 pixels, both halves, with the file of image settings."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    half = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 8, "max_position_embeddings": 4, "bos_token_id": 1, "eos_token_id": 2, **half}
    vision = {"image_size": CLIP_SIDE, "patch_size": 8, "initializer_factor": 30.0, **half}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    # the vision part keeps its own projection_dim of 512, which must not be believed
    assert config.vision_config.projection_dim != WIDTH
    transformers.CLIPModel(config).save_pretrained(folder)
    side = {"height": CLIP_SIDE, "width": CLIP_SIDE}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": CLIP_SIDE}, crop_size=side).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """An "age" classifier of 16 pixels with three classes."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(1)
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        initializer_range=0.5,
        id2label={0: "child", 1: "adult", 2: "old"},
        label2id={"child": 0, "adult": 1, "old": 2},
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def copied(folder, to, **settings):
    """A copy of a model folder with some image settings replaced; None takes the file away."""
    for source in folder.iterdir():
        (to / source.name).write_bytes(source.read_bytes())
    path = to / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return to


def byte_images(count=5, height=40, width=56, seed=0):
    """Smooth random pictures of whole byte levels, as PIL images and as a tensor in [0, 1]."""
    noise = torch.rand(count, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(noise, (height, width), mode="bilinear")
    texture = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed + 1))
    pixels = ((0.8 * smooth + 0.2 * texture) * 255).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels], pixels.float() / 255


def save_linear(path, seed=0):
    torch.manual_seed(seed)
    head = nn.Linear(WIDTH, 1)
    torch.save(head.state_dict(), path)
    return head


def save_mlp(path, seed=0):
    """The improved predictor, as its authors train and save it: dropout in between shifts the indexes."""
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Linear(WIDTH, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    weights = {f"layers.{key}": value for key, value in layers.state_dict().items()}
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return layers.eval()


def aesthetic(**kwargs):
    return build_reward("aesthetic", kwargs={key: str(value) for key, value in kwargs.items()})


def ratings(images, **kwargs):
    return aesthetic(**kwargs)(images).total


# --- aesthetic


@pytest.mark.parametrize(
    ("save", "filename"), [(save_linear, "v1.pth"), (save_mlp, "v2.safetensors"), (save_mlp, "v2.pt")]
)
def test_the_aesthetic_score_is_the_head_on_the_normalised_clip_embedding(clip_folder, tmp_path, save, filename):
    head = save(tmp_path / filename)
    pictures, images = byte_images()
    reward = aesthetic(clip=clip_folder, head=tmp_path / filename)
    with torch.no_grad():
        pixels = transformers.CLIPImageProcessorPil.from_pretrained(clip_folder)(pictures, return_tensors="pt")
        features = transformers.CLIPModel.from_pretrained(clip_folder).get_image_features(**pixels).pooler_output
        expected = head(features / features.norm(dim=-1, keepdim=True)).squeeze(1)
    scores = reward(images).total
    assert scores.shape == (5,) and scores.dtype == torch.float32
    # the pictures are bytes, so the processor makes the same pixels of them
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    # without normalising the embedding, whose norm is far from 1, it is another number
    assert (head(features).squeeze(1) - expected).abs().max() > expected.std()


def test_the_aesthetic_score_does_not_depend_on_the_batch_size(clip_folder, tmp_path):
    save_linear(tmp_path / "v1.pth")
    _, images = byte_images(5)
    kwargs = {"clip": str(clip_folder), "head": str(tmp_path / "v1.pth")}
    whole = build_reward("aesthetic", kwargs=kwargs)(images).total
    split = build_reward("aesthetic", kwargs=kwargs | {"batch_size": 2})(images).total
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="reward.kwargs.batch_size is 0; use a whole number of at least 1"):
        build_reward("aesthetic", kwargs=kwargs | {"batch_size": 0})


def test_without_a_settings_file_clip_gets_the_constants_of_clip(clip_folder, tmp_path):
    save_linear(tmp_path / "v1.pth")
    bare = tmp_path / "bare"
    bare.mkdir()
    copied(clip_folder, bare)
    (bare / "preprocessor_config.json").unlink()
    _, images = byte_images()
    head = tmp_path / "v1.pth"
    assert torch.equal(ratings(images, clip=bare, head=head), ratings(images, clip=clip_folder, head=head))


def test_a_settings_file_changes_the_score_also_inside_a_processor_file(clip_folder, tmp_path):
    save_linear(tmp_path / "v1.pth")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    other = copied(clip_folder, tmp_path / "a", image_mean=[0.0, 0.0, 0.0])
    nested = copied(clip_folder, tmp_path / "b", image_mean=[0.0, 0.0, 0.0])
    settings = json.loads((nested / "preprocessor_config.json").read_text())
    (nested / "preprocessor_config.json").unlink()
    (nested / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    _, images = byte_images()
    head = tmp_path / "v1.pth"
    standard, changed = ratings(images, clip=clip_folder, head=head), ratings(images, clip=other, head=head)
    assert (standard - changed).abs().max() > 1e-3
    assert torch.equal(ratings(images, clip=nested, head=head), changed)


def test_the_vision_half_alone_and_a_pickled_checkpoint_are_clips_too(clip_folder, tmp_path):
    save_linear(tmp_path / "v1.pth")
    _, images = byte_images()
    expected = ratings(images, clip=clip_folder, head=tmp_path / "v1.pth")
    config = transformers.CLIPConfig.from_pretrained(clip_folder).vision_config
    config.projection_dim = WIDTH
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(clip_folder, config=config)
    vision.save_pretrained(tmp_path / "vision")
    assert torch.equal(ratings(images, clip=tmp_path / "vision", head=tmp_path / "v1.pth"), expected)
    whole = transformers.CLIPModel.from_pretrained(clip_folder)
    (tmp_path / "pickled").mkdir()
    whole.config.save_pretrained(tmp_path / "pickled")
    torch.save(whole.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert torch.equal(ratings(images, clip=tmp_path / "pickled", head=tmp_path / "v1.pth"), expected)


def test_a_clip_saved_in_half_precision_is_run_in_fp32(clip_folder, tmp_path):
    save_linear(tmp_path / "v1.pth")
    half = copied(clip_folder, tmp_path)
    transformers.CLIPModel.from_pretrained(clip_folder).half().save_pretrained(half)
    assert load_file(half / "model.safetensors")["visual_projection.weight"].dtype == torch.float16
    _, images = byte_images()
    scores = ratings(images, clip=half, head=tmp_path / "v1.pth")
    expected = ratings(images, clip=clip_folder, head=tmp_path / "v1.pth")
    # the weights are rounded to 11 bits, the arithmetic is not
    assert 0 < (scores - expected).abs().max() < 0.1 * expected.std()


def test_a_head_for_another_clip_or_a_network_that_is_no_clip_is_refused(clip_folder, vit_folder, tmp_path):
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "l14.pth")
    with pytest.raises(
        ValueError, match="reward.kwargs.head reads embeddings of 768 numbers but reward.kwargs.clip .* gives 24"
    ):
        aesthetic(clip=clip_folder, head=tmp_path / "l14.pth")
    with pytest.raises(ValueError, match="reward.kwargs.clip is .*, a 'vit' network; use a CLIP"):
        aesthetic(clip=vit_folder, head=tmp_path / "l14.pth")


@pytest.mark.parametrize(
    "weights",
    [
        # with ReLU in between the indexes of the layers differ
        {f"layers.{i}.{kind}": torch.zeros(1) for i in (0, 3, 6, 9, 11) for kind in ("weight", "bias")},
        {"weight": torch.zeros(2, WIDTH), "bias": torch.zeros(2)},
        {"weight": torch.tensor(1.0), "bias": torch.zeros(1)},
        {"weight": [1, 2], "bias": torch.zeros(1)},
        {"state_dict": {}},
        {},
        [1, 2],
    ],
)
def test_a_head_of_another_layout_is_refused(weights):
    with pytest.raises(ValueError, match=r"'h.pth' is not a LAION head: .*expected weight \[1, D\] and bias \[1\], or"):
        build_head(weights, "h.pth", "reward.kwargs.head")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_head_that_is_not_finite_is_refused_by_name(value):
    weights = {"weight": torch.zeros(1, WIDTH), "bias": torch.tensor([value])}
    with pytest.raises(ValueError, match=r"reward.kwargs.head is 'h.pth', .*NaN or infinity in tensors \(bias\)"):
        build_head(weights, "h.pth", "reward.kwargs.head")


def test_a_head_with_code_in_its_pickle_is_refused_and_not_run(clip_folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"weight": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="a pickle that holds more than tensors and is not run"):
        aesthetic(clip=clip_folder, head=tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_a_head_that_is_no_file_no_known_kind_or_damaged_says_so(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="reward.kwargs.head is .*nowhere.pth.*owner/repository:filename"):
        aesthetic(clip=clip_folder, head=tmp_path / "nowhere.pth")
    (tmp_path / "head.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"reward.kwargs.head is .*head.ckpt'.* .safetensors, .pth or .pt"):
        aesthetic(clip=clip_folder, head=tmp_path / "head.ckpt")
    (tmp_path / "head.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"reward.kwargs.head is .*head.safetensors'.*SafetensorError"):
        aesthetic(clip=clip_folder, head=tmp_path / "head.safetensors")


def test_clip_and_head_on_the_hub_are_downloaded_by_the_files_that_are_needed(clip_folder, tmp_path, monkeypatch):
    save_linear(tmp_path / "v1.pth")
    asked = []

    def download(repository, filename):
        asked.append((repository, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    hub = Hub(monkeypatch, clip_folder, tmp_path / "cache")
    _, images = byte_images(2)
    local = ratings(images, clip=clip_folder, head=tmp_path / "v1.pth")
    assert asked == []
    assert torch.equal(ratings(images, clip=ID, head="owner/heads:v1.pth"), local)
    assert asked == [("owner/heads", "v1.pth")]
    assert hub.downloaded == ["config.json", "preprocessor_config.json", "model.safetensors"]


def test_a_clip_that_cannot_be_reached_or_found_is_one_line_with_the_way_out(tmp_path):
    save_linear(tmp_path / "v1.pth")
    with pytest.raises(ValueError) as caught:
        aesthetic(clip="owner/clip", head=tmp_path / "v1.pth")
    message = str(caught.value)
    assert message.startswith("reward.kwargs.clip is 'owner/clip'") and "hf download owner/clip" in message
    assert message.endswith("and set reward.kwargs.clip=some/folder")
    assert "\n" not in message
    with pytest.raises(ValueError, match="reward.kwargs.clip is .*nowhere"):
        aesthetic(clip=tmp_path / "nowhere", head=tmp_path / "v1.pth")


def test_a_clip_folder_without_weights_or_with_half_of_them_is_refused(clip_folder, tmp_path):
    save_linear(tmp_path / "v1.pth")
    folder = copied(clip_folder, tmp_path)
    whole = transformers.CLIPModel.from_pretrained(clip_folder).state_dict()
    text_only = {key: value.clone() for key, value in whole.items() if key.startswith("text")}
    save_file(text_only, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="reward.kwargs.clip is .* CLIPVisionModelWithProjection: missing tensors"):
        aesthetic(clip=folder, head=tmp_path / "v1.pth")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="reward.kwargs.clip is .*model.safetensors"):
        aesthetic(clip=folder, head=tmp_path / "v1.pth")


# --- classifier


class FakeClassifier:
    """Two heads; the probabilities of "label" follow the brightness of the image."""

    labels = {"label": ["Shirt", "Sneaker", "Bag"], "colour": ["red", "green"]}

    def log_probs(self, images):
        bright = images.mean((1, 2, 3))
        label = torch.stack([bright / 2, bright / 2, 1 - bright], 1)
        return {"label": label.log(), "colour": torch.tensor([[0.25, 0.75]]).log().expand(len(images), 2)}


@pytest.fixture
def shipped(monkeypatch):
    """The networks of the classifier reward, replaced; the list holds what was asked for."""
    asked = []

    def load_classifier(*arguments):
        asked.append(arguments)
        return FakeClassifier()

    monkeypatch.setattr("hrf_fast.rewards.classifier.load_classifier", load_classifier)
    return asked


@pytest.mark.parametrize(
    ("target", "probability"),
    [
        ("Bag", 0.75),
        ("bag", 0.75),
        ("label=Bag", 0.75),
        ("label=2", 0.75),
        ("colour=red", 0.25),
        ("green", 0.75),
        # 0.25/2 + 0.75, and a class named twice counts once
        (["Shirt", "Bag", "label=0"], 0.875),
        (["Shirt", "Sneaker", "Bag"], 1.0),
    ],
)
def test_the_reward_is_the_log_of_the_probability_of_the_classes(shipped, target, probability):
    image = torch.full((2, 3, 4, 4), 0.25)
    reward = build_reward("classifier", "cpu", {"target": target, "model": "portraits"})
    torch.testing.assert_close(reward(image).total.exp(), torch.full((2,), probability))
    assert shipped == [("reward.kwargs.model", "portraits", "cpu", 64)]


def test_an_impossible_class_is_refused_as_infinite_rather_than_trained_on(shipped):
    reward = build_reward("classifier", kwargs={"target": "Bag"})
    with pytest.raises(RuntimeError, match=r"reward 'classifier' returned 1 of 1 values .*index 0 \(-inf\)"):
        reward(torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "Sneeker",
            "'Sneeker', which is not a class; the nearest are Sneaker; the classes are label .0 to 2.: Shirt, Sn",
        ),
        ("colour=blue", r"'colour=blue', which is not a class; the classes are colour \(0 to 1\): red, green$"),
        ("size=big", "'size=big', which is not a class; .*the classes are label"),
        (7, "7, which is not a class"),
        (-1, "-1, which is not a class"),
        (1, "1, which fits 2 classes; write label=1 or colour=1"),
        (["red", "Bag"], "mixes the heads colour, label; use one reward term for each head"),
        ([], r"is \[\]; give a class name, an index or a list of them"),
        (2.5, "is 2.5; give a class name"),
    ],
)
def test_a_target_that_is_not_a_class_gets_the_nearest_names(target, message):
    with pytest.raises(ValueError, match=f"reward.kwargs.target.* {message}"):
        find_classes(target, FakeClassifier.labels, "reward.kwargs.target")


def test_classes_of_equal_name_need_their_index_and_long_lists_are_cut():
    labels = {"label": ["crane", "crane"] + [f"class {index}" for index in range(30)]}
    with pytest.raises(ValueError, match="'crane', which fits 2 classes; write label=0 or label=1"):
        find_classes("crane", labels, "target")
    assert find_classes(1, labels, "target") == ("label", [1])
    with pytest.raises(ValueError, match=r"label \(0 to 31\): crane, .*class 17, …$"):
        find_classes("zebra", labels, "target")


def test_a_name_made_of_digits_is_a_name_before_it_is_an_index():
    assert find_classes("1", {"digit": ["1", "0"]}, "target") == ("digit", [0])
    assert find_classes(1, {"digit": ["1", "0"]}, "target") == ("digit", [1])
    assert find_classes("a=b", {"label": ["x", "a=b"]}, "target") == ("label", [1])


@pytest.mark.parametrize("batch_size", [64, 2])
def test_a_transformers_classifier_gives_the_log_softmax_of_its_logits(vit_folder, batch_size):
    pictures, images = byte_images()
    kwargs = {"model": str(vit_folder), "target": "old", "batch_size": batch_size}
    rewards = build_reward("classifier", kwargs=kwargs)(images).total
    with torch.no_grad():
        pixels = transformers.ViTImageProcessorPil.from_pretrained(vit_folder)(pictures, return_tensors="pt")
        logits = transformers.ViTForImageClassification.from_pretrained(vit_folder)(**pixels).logits
    expected = logits.double().log_softmax(1)[:, 2].float()
    torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-5)
    assert np.all(rewards.numpy() <= 0)


def test_a_transformers_classifier_knows_its_class_names(vit_folder):
    with pytest.raises(ValueError, match=r"'aged'.*the classes are label \(0 to 2\): child, adult, old"):
        build_reward("classifier", kwargs={"model": str(vit_folder), "target": "aged"})


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("model", "fashon", "did you mean 'fashion'"),
        ("model", "./gone", "no such folder"),
        ("model", "someone/age", "hf download someone/age"),
        ("batch_size", 0, "at least 1"),
    ],
)
def test_a_model_that_is_neither_shipped_nor_a_hub_id_nor_a_folder_is_refused(argument, value, named):
    with pytest.raises(ValueError) as caught:
        build_reward("classifier", kwargs={"target": "Bag", argument: value})
    assert f"reward.kwargs.{argument} is {value!r}" in str(caught.value) and named in str(caught.value)


def test_a_folder_that_would_give_meaningless_scores_is_refused(vit_folder, tmp_path):
    kwargs = {"model": str(tmp_path), "target": 0}
    copied(vit_folder, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="reward.kwargs.model is .*no preprocessor_config.json"):
        build_reward("classifier", kwargs=kwargs)
    copied(vit_folder, tmp_path)
    transformers.ViTModel.from_pretrained(vit_folder).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="reward.kwargs.model is .*missing tensors .classifier.bias, classifier.weight"
    ):
        build_reward("classifier", kwargs=kwargs)
    config = transformers.ViTConfig.from_pretrained(vit_folder, problem_type="multi_label_classification")
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reward.kwargs.model is .*several labels per image"):
        build_reward("classifier", kwargs=kwargs)


@pytest.mark.parametrize(
    ("reward", "argument", "value"),
    [
        *(("classifier", "batch_size", value) for value in ("abc", 2.5, True, 0)),
        ("classifier", "model", 5),
        ("classifier", "model", ["fashion"]),
        *(("aesthetic", "batch_size", value) for value in ("abc", None, -1)),
        ("aesthetic", "head", None),
    ],
)
def test_an_argument_of_the_wrong_type_is_refused_by_name(reward, argument, value):
    kwargs = {"target": 0} if reward == "classifier" else {}
    with pytest.raises(ValueError) as caught:
        build_reward(reward, kwargs=kwargs | {argument: value})
    assert str(caught.value).startswith(f"reward.kwargs.{argument} is {value!r};")


def test_the_shipped_fashion_classifier_rewards_its_own_classes():
    images, names = load_reference("fashion")[:32], load_shipped("fashion").labels["label"]
    terms = [RewardTerm("classifier", kwargs={"target": index}) for index in range(len(names))]
    log_probs = torch.stack([build_reward([term])(images).total for term in terms], 1)
    # the classes exclude each other, so their probabilities sum to 1
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(32))
    by_name = build_reward("classifier", kwargs={"target": names[3]})(images).total
    torch.testing.assert_close(by_name, log_probs[:, 3])
