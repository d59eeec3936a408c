"""Networks that look at images: the shipped classifiers, and transformers' networks behind their own processors."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hrf_fast.assets import ASSETS, DATA, SHIPPED
from hrf_fast.evaluation.diversity import inception_interval, vendi_interval
from hrf_fast.evaluation.panel import Panel
from hrf_fast.evaluation.vendi import vendi_score
from hrf_fast.rewards import build_reward
from hrf_fast.vision.base import Classifier, in_batches, to_bytes
from hrf_fast.vision.load import load_classifier, load_feature_network
from hrf_fast.vision.shipped import ShippedClassifier, ShippedNetwork, load_reference, load_shipped

OPTION = "evaluation.network"
TINY_VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)


@pytest.fixture(params=[name for name in SHIPPED if name not in DATA])
def name(request):
    return request.param


def near_copies(images, count=256, noise=0.02):
    generator = torch.Generator().manual_seed(0)
    copies = images.repeat(count // len(images), 1, 1, 1)
    return (copies + noise * torch.randn(copies.shape, generator=generator)).clamp(0, 1)


def test_importing_the_package_needs_neither_transformers_nor_diffusers():
    code = "import sys, hrf_fast.vision.load; print([m for m in ('transformers', 'diffusers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_reference_is_512_different_real_images(name):
    reference = load_reference(name)
    side = 64 if name == "peeps" else 32
    assert reference.shape == (512, 3, side, side) and reference.dtype == torch.float32
    assert reference.min() == 0 and reference.max() == 1
    assert len(reference.flatten(1).unique(dim=0)) > 505


def test_a_grey_reference_repeats_its_channel():
    reference = load_reference("fashion")
    assert torch.equal(reference[:, 0], reference[:, 1]) and torch.equal(reference[:, 0], reference[:, 2])


def test_log_probs_are_normalised_and_as_many_as_the_labels(name):
    classifier, images = load_shipped(name), load_reference(name)[:8]
    log_probs = classifier.log_probs(images)
    assert list(log_probs) == list(classifier.labels)
    for head, values in log_probs.items():
        assert (
            values.shape == (8, len(classifier.labels[head])) and len(set(classifier.labels[head])) == values.shape[1]
        )
        assert torch.allclose(values.exp().sum(1), torch.ones(8), atol=1e-5)


def test_the_fashion_classifier_knows_the_reference_garments():
    labels = load_file(ASSETS / "fashion" / "reference.safetensors")["labels"].long()
    classifier = load_shipped("fashion")
    predicted = classifier.log_probs(load_reference("fashion"))["label"].argmax(1)
    assert (predicted == labels).float().mean() >= 0.88
    # image 0 of the test split is an ankle boot, image 2 a pair of trousers
    assert classifier.labels["label"][predicted[0]] == "Ankle boot"
    assert classifier.labels["label"][predicted[2]] == "Trouser"


def test_the_portraits_classifier_names_the_background_that_is_in_the_corner():
    classifier, images = load_shipped("portraits"), load_reference("portraits")
    names = [classifier.labels["background"][i] for i in classifier.log_probs(images)["background"].argmax(1)]
    colours = torch.tensor([[int(name[i : i + 2], 16) for i in (0, 2, 4)] for name in names]) / 255
    # the top left pixel is background in every drawing; half a grey level of rounding
    right = ((images[:, :, 0, 0] - colours).abs() < 0.6 / 255).all(1)
    assert right.float().mean() >= 0.98


def test_the_files_say_what_they_were_measured_at(name):
    config = json.loads((ASSETS / name / "classifier" / "config.json").read_text())
    assert set(config["held_out"]) == set(load_shipped(name).labels)
    for quality in config["held_out"].values():
        assert quality["accuracy"] > quality["guess"]
    # the recorded diversity of real images is the one that a user measures
    measured = vendi_score(load_shipped(name).features(load_reference(name)[:128]))
    assert config["reference"]["128"]["vendi"] == pytest.approx(measured, rel=2e-3)


def test_the_shipped_files_are_small(name):
    files = [
        path for path in (ASSETS / name).rglob("*") if path.parent.name == "classifier" or "reference" in path.name
    ]
    assert {path.name for path in files} >= {"model.safetensors", "config.json", "README.md", "reference.safetensors"}
    # 512 drawings of 64 x 64 pixels are 6.3 MB
    limit = 6.5e6 if name == "peeps" else 2e6
    assert all(path.stat().st_size < limit for path in files if path.is_file())


def test_vendi_sees_a_collapse_from_many_images_to_four_to_one(name):
    classifier, real = load_shipped(name), load_reference(name)[:256]
    many = vendi_interval(classifier.features(real), seed=0)
    four = vendi_interval(classifier.features(near_copies(real[:4])), seed=0)
    one = vendi_interval(classifier.features(near_copies(real[:1])), seed=0)
    # four images count as four at most, and the noise of the copies adds a little
    assert many.low > 2 * four.high and four.low > 2 * one.high
    assert 2 < four.value < 4.5 and 1 <= one.value < 1.2


def test_noise_looks_alike_to_the_networks(name):
    # a network that never saw noise finds it all the same kind of thing: a low score, unlike Vendi on pixels
    noise = torch.rand(256, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert vendi_score(load_shipped(name).features(noise)) < 4
    assert vendi_score(noise.flatten(1) - 0.5) > 200


def test_features_of_an_image_do_not_depend_on_its_batch_or_on_autocast(name):
    classifier, images = load_shipped(name), load_reference(name)[:5]
    features = classifier.features(images)
    with torch.autocast("cpu", torch.bfloat16):
        split = torch.cat([classifier.features(images[:2]), classifier.features(images[2:])])
        log_probs = classifier.log_probs(images)
    assert split.dtype == torch.float32 and all(values.dtype == torch.float32 for values in log_probs.values())
    assert torch.allclose(split, features, atol=1e-4)
    assert not split.requires_grad


def test_images_go_through_a_network_a_batch_at_a_time_in_their_order():
    sizes = []

    def mean(images):
        sizes.append(len(images))
        return images.mean((1, 2, 3))

    levels = torch.arange(5) / 5
    images = levels.double().view(5, 1, 1, 1).expand(5, 3, 2, 2)
    torch.testing.assert_close(in_batches(mean, images, torch.device("cpu"), 2), levels)
    assert sizes == [2, 2, 1]


def test_levels_are_rounded_to_the_nearest_and_rounding_noise_outside_the_range_is_clamped():
    # 0.499·255 = 127.245 -> 127; 0.5·255 = 127.5 -> 128 (to even); 127.9/255 truncated would give 127
    levels = torch.tensor([-0.0005, 0.499, 0.5, 127.9 / 255, 1.0005])
    assert to_bytes(levels.view(5, 1, 1, 1).expand(5, 3, 1, 1))[:, 0, 0, 0].tolist() == [0, 127, 128, 128, 255]


def test_images_of_another_size_are_averaged_down():
    classifier, images = load_shipped("portraits"), load_reference("portraits")[:16]
    enlarged = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    direct = F.interpolate(enlarged, (32, 32), mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(classifier.features(enlarged), classifier.features(direct))
    assert F.cosine_similarity(classifier.features(enlarged), classifier.features(images)).min() > 0.5


def test_a_grey_network_looks_at_the_mean_of_the_channels():
    network = ShippedNetwork(1, [4, 4, 4, 4], 6, {"label": 3})
    classifier = ShippedClassifier("tiny", network, {"label": ["a", "b", "c"]})
    colour = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    grey = colour.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert torch.allclose(classifier.features(colour), classifier.features(grey), atol=1e-6)
    assert classifier.features(colour).shape == (2, 6)


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
        load_shipped("fashion").features(images)


@pytest.mark.parametrize("load", [load_shipped, load_reference])
def test_an_unknown_name_is_answered_with_the_nearest(load):
    message = r"'fashions' \(did you mean 'fashion'\?\) does not ship with the package; use one of fashion, portraits"
    with pytest.raises(ValueError, match=message):
        load("fashions")


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "cut"])
@pytest.mark.parametrize(("load", "file"), [(load_shipped, "classifier/model"), (load_reference, "reference")])
def test_a_damaged_file_of_the_package_is_refused_by_its_path(tmp_path, monkeypatch, load, file, fault):
    shutil.copytree(ASSETS / "fashion", tmp_path / "fashion", ignore=shutil.ignore_patterns("model"))
    monkeypatch.setattr("hrf_fast.vision.shipped.ASSETS", tmp_path)
    load("fashion")
    path = tmp_path / "fashion" / f"{file}.safetensors"
    weights = load_file(path)
    name = max(weights, key=lambda name: weights[name].numel())
    if fault == "missing":
        del weights[name]
    elif fault == "shape":
        weights[name] = weights[name][:5].clone()
    elif fault == "nan":
        weights[name] = torch.full(weights[name].shape, float("nan"))
    save_file(weights, path)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    words = {"missing": "missing tensors", "shape": "another shape", "nan": "NaN or infinity", "cut": "incomplete"}[
        fault
    ]
    with pytest.raises(ValueError, match=f"{path}, a file of this package, is damaged: .*(?i:{words})"):
        load("fashion")


def test_a_shipped_name_is_a_feature_network_and_a_classifier():
    images, shipped = load_reference("fashion")[:3], load_shipped("fashion")
    assert isinstance(shipped, Classifier)
    assert torch.equal(load_feature_network("evaluation.network", "fashion").features(images), shipped.features(images))
    classifier = load_classifier("classifier.model", "fashion")
    assert classifier.labels == shipped.labels
    assert torch.equal(classifier.log_probs(images)["label"], shipped.log_probs(images)["label"])


def test_a_panel_runs_its_classifier_once(monkeypatch):
    calls, shipped = [], load_shipped("fashion")
    features = ShippedNetwork.features
    monkeypatch.setattr(ShippedNetwork, "features", lambda *inputs: calls.append(1) or features(*inputs))
    images = load_reference("fashion")[:8]
    metrics = Panel(8, 1, 8, shipped)._measure(images, build_reward(lambda images, prompts: [0.0] * len(images)))
    assert calls == [1]
    assert metrics.inception == inception_interval(shipped.log_probs(images)["label"], seed=1)
    assert metrics.vendi == vendi_interval(shipped.features(images), seed=1)


def test_a_reference_is_opened_without_its_classifier(monkeypatch):
    monkeypatch.setattr(ShippedNetwork, "__init__", None)
    for name, size in (("fashion", 32), ("portraits", 32), ("peeps", 64)):
        assert load_reference(name).shape[1:] == (3, size, size)


@pytest.mark.parametrize("load", [load_feature_network, load_classifier])
@pytest.mark.parametrize("value", ["portrait", "./no/such/folder", "/no/such", "gpt2", 5, ["fashion"]])
def test_an_unknown_network_is_refused_by_name_before_the_hub_is_asked(load, value):
    with pytest.raises(ValueError) as error:
        load("evaluation.network", value)
    assert f"evaluation.network is {value!r}" in str(error.value) and "fashion, portraits" in str(error.value)
    assert ("did you mean 'portraits'" in str(error.value)) == (value == "portrait")
