import builtins
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hrf_fast.assets import ASSETS, SHIPPED
from hrf_fast.evaluation.diversity import vendi_interval, vendi_score
from hrf_fast.vision import shipped as scorers
from hrf_fast.vision.shipped import Scorer, ScoringNetwork, load_feature_network, load_reference, load_scorer

TINY_VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)


@pytest.fixture(params=SHIPPED)
def name(request):
    return request.param


def near_copies(images, count=256, noise=0.02):
    generator = torch.Generator().manual_seed(0)
    copies = images.repeat(count // len(images), 1, 1, 1)
    return (copies + noise * torch.randn(copies.shape, generator=generator)).clamp(0, 1)


def processor(folder, mean, std):
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))


# ---- the shipped networks


def test_importing_scorers_needs_neither_transformers_nor_diffusers():
    code = "import sys, hrf_fast.scorers; print([m for m in ('transformers', 'diffusers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_reference_is_512_different_real_images(name):
    reference = load_reference(name)
    assert reference.shape == (512, 3, 32, 32) and reference.dtype == torch.float32
    assert reference.min() == 0 and reference.max() == 1
    assert len(reference.flatten(1).unique(dim=0)) > 505


def test_a_grey_reference_repeats_its_channel():
    reference = load_reference("fashion")
    assert torch.equal(reference[:, 0], reference[:, 1]) and torch.equal(reference[:, 0], reference[:, 2])


def test_log_probs_are_normalised_and_as_many_as_the_labels(name):
    scorer, images = load_scorer(name), load_reference(name)[:8]
    log_probs = scorer.log_probs(images)
    assert list(log_probs) == list(scorer.labels)
    for head, values in log_probs.items():
        assert values.shape == (8, len(scorer.labels[head])) and len(set(scorer.labels[head])) == values.shape[1]
        assert torch.allclose(values.exp().sum(1), torch.ones(8), atol=1e-5)


def test_the_fashion_classifier_knows_the_reference_garments():
    labels = load_file(ASSETS / "fashion" / "reference.safetensors")["labels"].long()
    scorer = load_scorer("fashion")
    predicted = scorer.log_probs(load_reference("fashion"))["label"].argmax(1)
    assert (predicted == labels).float().mean() >= 0.88
    # image 0 of the test split is an ankle boot, image 2 a pair of trousers
    assert scorer.labels["label"][predicted[0]] == "Ankle boot"
    assert scorer.labels["label"][predicted[2]] == "Trouser"


def test_the_portraits_classifier_names_the_background_that_is_in_the_corner():
    scorer, images = load_scorer("portraits"), load_reference("portraits")
    names = [scorer.labels["background"][i] for i in scorer.log_probs(images)["background"].argmax(1)]
    colours = torch.tensor([[int(name[i : i + 2], 16) for i in (0, 2, 4)] for name in names]) / 255
    # the top left pixel is background in every drawing; half a grey level of rounding
    right = ((images[:, :, 0, 0] - colours).abs() < 0.6 / 255).all(1)
    assert right.float().mean() >= 0.98


def test_the_files_say_what_they_were_measured_at(name):
    config = json.loads((ASSETS / name / "scorer" / "config.json").read_text())
    assert set(config["held_out"]) == set(load_scorer(name).labels)
    for quality in config["held_out"].values():
        assert quality["accuracy"] > quality["guess"]
    # the recorded diversity of real images is the one that a user measures
    measured = vendi_score(load_scorer(name).features(load_reference(name)[:128]))
    assert config["reference"]["128"]["vendi"] == pytest.approx(measured, rel=2e-3)


def test_the_shipped_files_are_small(name):
    files = [path for path in (ASSETS / name).rglob("*") if path.parent.name == "scorer" or "reference" in path.name]
    assert {path.name for path in files} >= {"model.safetensors", "config.json", "README.md", "reference.safetensors"}
    assert all(path.stat().st_size < 2e6 for path in files if path.is_file())


def test_vendi_sees_a_collapse_from_many_images_to_four_to_one(name):
    scorer, real = load_scorer(name), load_reference(name)[:256]
    many = vendi_interval(scorer.features(real), resamples=100, seed=0)
    four = vendi_interval(scorer.features(near_copies(real[:4])), resamples=100, seed=0)
    one = vendi_interval(scorer.features(near_copies(real[:1])), resamples=100, seed=0)
    # four images count as four at most, and the noise of the copies adds a little
    assert many.low > 2 * four.high and four.low > 2 * one.high
    assert 2 < four.value < 4.5 and 1 <= one.value < 1.2


def test_noise_looks_alike_to_the_networks(name):
    # a network that never saw noise finds it all the same kind of thing: a low score, unlike Vendi on pixels
    noise = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert vendi_score(load_scorer(name).features(noise)) < 4
    assert vendi_score(noise.flatten(1) - 0.5) > 200


def test_features_of_an_image_do_not_depend_on_its_batch_or_on_autocast(name, monkeypatch):
    scorer, images = load_scorer(name), load_reference(name)[:5]
    features = scorer.features(images)
    monkeypatch.setattr(scorers, "BATCH", 2)
    with torch.autocast("cpu", torch.bfloat16):
        split = scorer.features(images)
        log_probs = scorer.log_probs(images)
    assert split.dtype == torch.float32 and all(values.dtype == torch.float32 for values in log_probs.values())
    assert torch.allclose(split, features, atol=1e-4)
    assert not split.requires_grad


def test_images_of_another_size_are_averaged_down():
    scorer, images = load_scorer("portraits"), load_reference("portraits")[:16]
    enlarged = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    direct = F.interpolate(enlarged, (32, 32), mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(scorer.features(enlarged), scorer.features(direct))
    assert F.cosine_similarity(scorer.features(enlarged), scorer.features(images)).min() > 0.5


def test_a_grey_network_looks_at_the_mean_of_the_channels():
    network = ScoringNetwork(1, [4, 4, 4, 4], 6, {"label": 3})
    scorer = Scorer("tiny", network, {"label": ["a", "b", "c"]})
    colour = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    grey = colour.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert torch.allclose(scorer.features(colour), scorer.features(grey), atol=1e-6)
    assert scorer.features(colour).shape == (2, 6)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(2, 1, 32, 32), r"torch.float32 of shape \[2, 1, 32, 32\]"),
        (torch.zeros(3, 32, 32), r"of shape \[3, 32, 32\]"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_images_of_another_form_are_refused(images, found):
    with pytest.raises(ValueError, match=rf"images are .*{found}.*; pass floating point \[B, 3, H, W\] in \[0, 1\]"):
        load_scorer("fashion").features(images)


@pytest.mark.parametrize("load", [load_scorer, load_reference])
def test_an_unknown_name_is_answered_with_the_nearest(load):
    message = r"'fashions' \(did you mean 'fashion'\?\) does not ship with the package; use one of fashion, portraits"
    with pytest.raises(ValueError, match=message):
        load("fashions")


# ---- networks of others


def test_a_shipped_name_is_a_feature_network():
    images = load_reference("fashion")[:3]
    assert torch.equal(load_feature_network("fashion").features(images), load_scorer("fashion").features(images))


@pytest.mark.parametrize("spec", ["portrait", "./no/such/folder", "/no/such", "gpt2"])
def test_an_unknown_feature_network_is_refused_before_the_hub_is_asked(spec):
    message = r"no feature network .*a folder that exists or a hub id \(owner/model\)"
    with pytest.raises(ValueError, match=message) as error:
        load_feature_network(spec)
    assert ("did you mean 'portraits'" in str(error.value)) == (spec == "portrait")


def test_vit_features_are_its_pooled_output_of_normalised_images(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**TINY_VISION)).eval()
    model.save_pretrained(tmp_path)
    processor(tmp_path, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    network = load_feature_network(str(tmp_path))
    images = torch.rand(3, 3, 16, 16)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=(images - mean) / std).pooler_output
    assert torch.allclose(network.features(images), expected, atol=1e-5)
    assert network.name == str(tmp_path)
    # other sizes become the model's 16 pixels
    assert network.features(torch.rand(2, 3, 40, 24)).shape == (2, 16)


def test_a_classification_checkpoint_has_no_pooler_and_gives_its_class_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY_VISION)).eval()
    model.save_pretrained(tmp_path)
    processor(tmp_path, [0.0] * 3, [1.0] * 3)
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        expected = model.vit(pixel_values=images).last_hidden_state[:, 0]
    # twice: a random pooler would differ between the two
    for _ in range(2):
        assert torch.allclose(load_feature_network(str(tmp_path)).features(images), expected, atol=1e-5)


def test_clip_gives_the_features_of_its_vision_half(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = dict(TINY_VISION, vocab_size=50, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    del text["image_size"], text["patch_size"]
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=TINY_VISION)).eval()
    model.save_pretrained(tmp_path / "whole")
    transformers.CLIPVisionModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "vision")
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        expected = model.vision_model(pixel_values=images).pooler_output
    for folder in ("whole", "vision"):
        processor(tmp_path / folder, [0.0] * 3, [1.0] * 3)
        features = load_feature_network(str(tmp_path / folder)).features(images)
        assert torch.allclose(features, expected, atol=1e-5)


def test_a_convolutional_network_gives_one_vector_an_image(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_size": {"height": 64, "width": 64}})
    )
    assert load_feature_network(str(tmp_path)).features(torch.rand(2, 3, 32, 32)).shape == (2, 12)


def test_a_model_without_its_image_processor_says_what_it_assumes(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTModel(transformers.ViTConfig(**TINY_VISION)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no preprocessor_config.json: images are normalised with mean 0.5"):
        bare = load_feature_network(str(tmp_path))
    processor(tmp_path, [0.5] * 3, [0.5] * 3)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(bare.features(images), load_feature_network(str(tmp_path)).features(images))


def test_a_text_model_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a BertModel, which does not look at images; name a vision model"):
        load_feature_network(str(tmp_path))


def test_a_checkpoint_with_holes_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    transformers.ViTModel(transformers.ViTConfig(**TINY_VISION)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights that its config asks for \(layernorm.weight"):
        load_feature_network(str(tmp_path))


def test_a_folder_that_holds_no_model_is_one_clear_error(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(OSError, match="can't load the feature network .*hf download .*local folder or one of"):
        load_feature_network(str(tmp_path))


def test_a_hub_id_without_network_is_one_clear_error_with_the_way_out(monkeypatch):
    transformers = pytest.importorskip("transformers")

    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your internet connection")

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", unreachable)
    with pytest.raises(OSError, match="couldn't connect.*To go on, fetch it once with network") as error:
        load_feature_network("openai/clip-vit-base-patch32")
    assert "hf download openai/clip-vit-base-patch32" in str(error.value) and "\n" not in str(error.value)


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    real_import = builtins.__import__

    def no_transformers(name, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ImportError("No module named 'transformers'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_transformers)
    with pytest.raises(ImportError, match=r'needs transformers; run `pip install "hrf_fast\[rewards\]"`'):
        load_feature_network("openai/clip-vit-base-patch32")
