"""Networks of transformers: tiny random ones in the published formats, compared with transformers' own pipeline."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from hrf_fast.vision.base import FeatureClassifier
from hrf_fast.vision.load import load_classifier, load_feature_network
from tests.hub import ID, Hub

transformers = pytest.importorskip("transformers", minversion="5.4")
pytestmark = pytest.mark.usefixtures("offline")

OPTION = "evaluation.network"
SIDE = 16
TINY = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=8
)
COLOURS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}


@pytest.fixture
def vit(tmp_path):
    """The folder of a ViT with its image settings."""
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**TINY)).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, **COLOURS).save_pretrained(tmp_path)
    return tmp_path


def settings(folder, **changes):
    """Change the image settings of a folder."""
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def pictures(count=3, height=40, width=56):
    """Smooth random pictures of whole byte levels, as PIL images and as a tensor in [0, 1]."""
    noise = torch.rand(count, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    pixels = (F.interpolate(noise, (height, width), mode="bilinear") * 255).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels], pixels.float() / 255


def features(folder, images):
    return load_feature_network(OPTION, str(folder)).features(images)


# --- features


@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 56), (8, 24)])
def test_vit_features_are_its_pooled_output_behind_its_own_processor(vit, height, width):
    originals, images = pictures(3, height, width)
    with torch.no_grad():
        pixels = transformers.ViTImageProcessorPil.from_pretrained(vit)(originals, return_tensors="pt")
        expected = transformers.ViTModel.from_pretrained(vit)(**pixels).pooler_output
    network = load_feature_network(OPTION, str(vit))
    # bytes in, so the processor sees what it sees of a file
    assert torch.allclose(network.features(images), expected, atol=1e-6)
    assert network.name == str(vit) and not network.features(images.requires_grad_()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(network.features(images), expected, atol=1e-6)


def test_a_classification_checkpoint_has_no_pooler_and_gives_its_class_token(vit):
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)).eval()
    model.save_pretrained(vit)
    settings(vit, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    _, images = pictures(3, SIDE, SIDE)
    with torch.no_grad():
        expected = model.vit(pixel_values=images).last_hidden_state[:, 0]
    # twice: a random pooler would differ between the two
    for _ in range(2):
        assert torch.allclose(features(vit, images), expected, atol=1e-5)


def save_classifier(folder, kind, config):
    """Write a random classifier of three classes, whose images are those of the ViT above."""
    torch.manual_seed(0)
    model = kind(config).eval()
    model.save_pretrained(folder)
    settings(folder, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    return model


CLASSES = {"num_labels": 3, "id2label": {0: "cat", 1: "dog", 2: "cow"}}


@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_a_panel_network_that_is_a_classifier_has_classes_too(vit, kind):
    own = dict(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1]) if kind == "ResNet" else TINY
    config = getattr(transformers, f"{kind}Config")(**own, **CLASSES)
    model = save_classifier(vit, getattr(transformers, f"{kind}ForImageClassification"), config)
    network, (_, images) = load_feature_network(OPTION, str(vit)), pictures(3, SIDE, SIDE)
    assert isinstance(network, FeatureClassifier) and network.labels == {"label": ["cat", "dog", "cow"]}
    with torch.no_grad():
        expected = model(pixel_values=images).logits.log_softmax(1)
    assert torch.allclose(network.log_probs_of(network.features(images))["label"], expected, atol=1e-5)
    assert torch.allclose(network.log_probs(images)["label"], expected, atol=1e-5)
    assert network.features(images).dim() == 2 and network.name == str(vit)


def test_a_classifier_whose_last_layer_sees_something_else_gives_the_features_that_it_gave(vit):
    # DINOv2's sees the class token and the mean of the patches: others than a panel of an older version has
    model = save_classifier(
        vit, transformers.Dinov2ForImageClassification, transformers.Dinov2Config(**TINY, **CLASSES)
    )
    network, (_, images) = load_feature_network(OPTION, str(vit)), pictures(3, SIDE, SIDE)
    with torch.no_grad():
        expected = model.dinov2(pixel_values=images).pooler_output
    assert not isinstance(network, FeatureClassifier)
    assert torch.allclose(network.features(images), expected, atol=1e-5)


def test_a_network_of_several_labels_or_of_one_gives_a_panel_features_alone(vit):
    for more in ({"problem_type": "multi_label_classification", **CLASSES}, {"num_labels": 1}):
        save_classifier(vit, transformers.ViTForImageClassification, transformers.ViTConfig(**TINY, **more))
        assert not isinstance(load_feature_network(OPTION, str(vit)), FeatureClassifier)


def test_clip_gives_the_features_of_its_vision_half_in_the_centre_of_the_picture(tmp_path):
    torch.manual_seed(0)
    text = dict(TINY, vocab_size=50, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    del text["image_size"], text["patch_size"]
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=TINY)).eval()
    model.save_pretrained(tmp_path / "whole")
    transformers.CLIPVisionModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "vision")
    _, images = pictures(3, SIDE, 2 * SIDE)
    crop = {"height": SIDE, "width": SIDE}
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=crop, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    with torch.no_grad():
        expected = model.vision_model(pixel_values=images[..., SIDE // 2 : SIDE // 2 + SIDE]).pooler_output
    for folder in ("whole", "vision"):
        processor.save_pretrained(tmp_path / folder)
        assert torch.allclose(features(tmp_path / folder, images), expected, atol=1e-5)


def test_a_convolutional_network_gives_one_vector_an_image_and_keeps_its_crop_pct(tmp_path):
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    settings(tmp_path, size={"shortest_edge": 64}, crop_pct=0.5, **COLOURS)
    originals, images = pictures(2)
    processor = transformers.ConvNextImageProcessorPil.from_pretrained(tmp_path)
    with torch.no_grad():
        pixels = processor(originals, return_tensors="pt")
        expected = transformers.ResNetModel.from_pretrained(tmp_path).eval()(**pixels).pooler_output.flatten(1)
    assert torch.allclose(features(tmp_path, images), expected, atol=1e-5) and expected.shape == (2, 12)
    settings(tmp_path, crop_pct=1.0)
    assert not torch.allclose(features(tmp_path, images), expected, atol=1e-3)


def test_a_model_without_its_image_settings_says_what_it_assumes(vit):
    _, images = pictures(2, SIDE, SIDE)
    settings(vit, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    expected = features(vit, images)
    (vit / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match=f"{OPTION} is .*16 x 16 pixels .*mean 0.5 and std 0.5"):
        assert torch.equal(features(vit, images), expected)


def test_a_text_model_is_refused(tmp_path):
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{OPTION} is .*BertModel"):
        load_feature_network(OPTION, str(tmp_path))


# --- classifiers


def test_a_classifier_gives_the_log_softmax_of_its_logits_for_the_names_in_its_config(vit):
    torch.manual_seed(1)
    names = {0: "child", 1: "adult", 2: "old"}
    config = transformers.ViTConfig(**TINY, initializer_range=0.5, id2label=names, label2id={})
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(vit)
    originals, images = pictures(5)
    with torch.no_grad():
        pixels = transformers.ViTImageProcessorPil.from_pretrained(vit)(originals, return_tensors="pt")
        expected = model(**pixels).logits.log_softmax(1)
    for batch_size in (64, 2):
        classifier = load_classifier("classifier.model", str(vit), batch_size=batch_size)
        torch.testing.assert_close(classifier.log_probs(images), {"label": expected}, atol=1e-5, rtol=1e-5)
    assert classifier.labels == {"label": ["child", "adult", "old"]}


# --- refusals, the same for every loader


@pytest.mark.parametrize("load", [load_feature_network, load_classifier])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        # transformers' processor of a ViT reads neither, and would say nothing
        ({"crop_pct": 0.875}, "crop_pct = 0.875"),
        ({"do_flip_channels": True}, "do_flip_channels = True"),
        ({"auto_map": {"AutoImageProcessor": "code.Processor"}, "image_processor_type": "Own"}, "custom code"),
        ({"size": {"height": 24, "width": 24}}, "24"),
        ({"do_resize": False}, "48"),
        ({"resample": 17}, "17"),
        ({"image_mean": [0.5]}, "mean"),
        ({"image_mean": ["a", "b", "c"]}, "'a'"),
        ({"size": {"depth": 3}}, "depth"),
    ],
)
def test_image_settings_that_would_be_ignored_or_do_not_fit_are_refused_while_loading(vit, load, changes, named):
    transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)).save_pretrained(vit)
    load(OPTION, str(vit))
    settings(vit, **changes)
    with pytest.raises(ValueError) as caught:
        load(OPTION, str(vit))
    message = str(caught.value)
    assert message.startswith(f"{OPTION} is {str(vit)!r}, whose image settings") and "\n" not in message
    assert named in message


@pytest.mark.parametrize("text", ["{", "[1]", '{"image_processor": 3}'])
def test_a_settings_file_that_is_no_json_object_is_refused_by_name(vit, text):
    (vit / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{OPTION} is .*whose image settings"):
        load_feature_network(OPTION, str(vit))


@pytest.mark.parametrize(
    ("load", "weight"),
    [(load_feature_network, "layernorm.weight"), (load_classifier, "classifier.weight")],
)
def test_a_checkpoint_with_holes_is_refused_by_the_name_of_a_missing_weight(vit, load, weight):
    if load is load_classifier:
        transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)).save_pretrained(vit)
    weights = load_file(vit / "model.safetensors")
    del weights[weight]
    save_file(weights, vit / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{OPTION} is .*used as ViT.*: missing tensors \({weight}\)"):
        load(OPTION, str(vit))


@pytest.mark.parametrize("load", [load_feature_network, load_classifier])
@pytest.mark.parametrize("fault", ["shape", "nan", "too few layers in the config"])
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(vit, load, fault):
    config = transformers.ViTConfig(**TINY | {"num_hidden_layers": 2})
    (transformers.ViTForImageClassification if load is load_classifier else transformers.ViTModel)(
        config
    ).save_pretrained(vit)
    load(OPTION, str(vit))
    weights = load_file(vit / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("embeddings.cls_token"))
    if fault == "shape":
        weights[name], message = (
            torch.zeros(1, 1, 3),
            rf"another shape \({name} is \[1, 1, 3\] instead of \[1, 1, 16\]\)",
        )
    elif fault == "nan":
        weights[name][0, 0, 1], message = float("nan"), rf"NaN or infinity in tensors \({name}\)"
    else:
        values = json.loads((vit / "config.json").read_text())
        (vit / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 1}))
        message = r"unexpected tensors \(.*layers?\.1\."
    save_file(weights, vit / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{OPTION} is .*{message}"):
        load(OPTION, str(vit))


@pytest.mark.parametrize("load", [load_feature_network, load_classifier])
def test_a_folder_without_a_model_or_with_a_damaged_one_is_one_clear_error(vit, load):
    (vit / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{OPTION} is .*could not be loaded"):
        load(OPTION, str(vit))
    (vit / "config.json").unlink()
    with pytest.raises(ValueError, match=f"{OPTION} is .*config.json") as caught:
        load(OPTION, str(vit))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_feature_network, load_classifier])
def test_a_hub_id_is_fetched_by_the_files_that_are_needed(vit, load, monkeypatch, tmp_path_factory):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY))
    model.save_pretrained(vit)
    hub = Hub(monkeypatch, vit, tmp_path_factory.mktemp("cache"))
    for name in (
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "tf_model.h5",
        "tokenizer.json",
        "onnx/model.safetensors",
    ):
        (vit / name).parent.mkdir(exist_ok=True)
        (vit / name).write_text("{}")
    load(OPTION, ID)
    assert hub.downloaded == ["config.json", "preprocessor_config.json", "model.safetensors"]
    hub.online = False
    load(OPTION, ID)


def test_shards_and_pickles_of_the_hub_are_fetched_where_there_is_nothing_else(vit, monkeypatch, tmp_path_factory):
    model = transformers.ViTModel(transformers.ViTConfig(**TINY))
    (vit / "model.safetensors").unlink()
    model.save_pretrained(vit, max_shard_size="5KB")
    hub = Hub(monkeypatch, vit, tmp_path_factory.mktemp("cache"))
    shards = sorted(path.name for path in vit.glob("model-*.safetensors"))
    load_feature_network(OPTION, ID)
    assert len(shards) > 1 and hub.downloaded[-len(shards) :] == shards
    for path in vit.glob("model*.safetensors*"):
        path.unlink()
    torch.save(model.state_dict(), vit / "pytorch_model.bin")
    hub = Hub(monkeypatch, vit, tmp_path_factory.mktemp("cache"))
    load_feature_network(OPTION, ID)
    assert hub.downloaded == ["config.json", "preprocessor_config.json", "pytorch_model.bin"]
    (vit / "pytorch_model.bin").unlink()
    hub = Hub(monkeypatch, vit, tmp_path_factory.mktemp("cache"))
    with pytest.raises(ValueError, match=f"{OPTION} is 'owner/model'.*no model.safetensors or pytorch_model.bin"):
        load_feature_network(OPTION, ID)


@pytest.mark.parametrize("load", [load_feature_network, load_classifier])
def test_without_transformers_the_error_names_the_extra_before_anything_is_downloaded(load, monkeypatch):
    # None in sys.modules is how Python marks a module that must not be imported
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(ImportError, match=rf"{OPTION} is 'owner/model'.*transformers>=5"):
        load(OPTION, "owner/model")
