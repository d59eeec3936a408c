"""Train a shipped classifier and write its reference images: `python pretraining/train_classifiers.py fashion`.

A few epochs of AdamW with one cycle of the learning rate, one core, a few minutes. It writes what ships in
`hrf_fast/assets/<name>/`: classifier/{model.safetensors,config.json,README.md} and reference.safetensors; for `peeps`,
whose drawings `peeps_data.py --data DATA` makes first, captions.txt too.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import fashion, labelled_portraits
from peeps_captions import full_captions
from peeps_data import ATTRIBUTES, load
from safetensors.torch import save_file
from torch import Tensor

from hrf_fast.assets import ASSETS
from hrf_fast.evaluation.diversity import inception_score
from hrf_fast.evaluation.vendi import vendi_score
from hrf_fast.vision.shipped import ShippedNetwork, load_reference, load_shipped

FASHION_LABELS = (
    ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"] + ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
)  # fmt: skip
ARCHITECTURE = {
    "fashion": {"channels": 1, "widths": [24, 48, 64, 64], "feature_dim": 64},
    "portraits": {"channels": 3, "widths": [32, 64, 64, 64], "feature_dim": 128},
    "peeps": {"channels": 3, "widths": [24, 48, 64, 48], "feature_dim": 128, "pixels": 64},
}
EPOCHS = {"fashion": 6, "portraits": 15, "peeps": 8}
BATCH, LEARNING_RATE, WEIGHT_DECAY, NOISE = 128, 4e-3, 2e-2, 0.06
# the DDPM saw the drawings of seeds 0 to 11,999
PORTRAITS = {"train": {"first_seed": 100_000, "count": 24_000}, "held out": {"first_seed": 200_000, "count": 4_000}}
REFERENCE = 512

CARD = {
    "fashion": """Data: Fashion-MNIST (Zalando SE, MIT), 28 x 28 grey product photographs padded to 32 x 32; trained
on the 60,000 training images, measured on the 10,000 test images. `reference.safetensors` holds the first 512 test
images (`images`, uint8 [512, 1, 32, 32]) and their `labels`; the shipped DDPM saw training images only.

Licence: MIT, as the data.

Limits: ten classes of garments, centred on black. It names one of them for any picture, noise included, and its
probabilities were never calibrated for pictures unlike its data. Shirt is recognised least (74 %), being confused
with T-shirt/top, Coat and Pullover. Figures made with it compare with each other only.
""",
    "portraits": """Data: drawings by the `open-peeps` style of DiceBear (packages dicebear-core, dicebear-styles and
resvg-py), a remix of Open Peeps by Pablo Stanley, CC0 1.0; trained on the drawings of 24,000 seeds from 100,000,
measured on 4,000 from 200,000, while the shipped DDPM saw seeds 0 to 11,999. `reference.safetensors` holds the first
512 of the held-out drawings (`images`, uint8 [512, 3, 32, 32]). Two seeds can draw the same face: 1.8 % of the
held-out drawings are also among the training ones (without them no accuracy changes by more than 0.2 points), and 4
of the 512 have the same parts and colours as one that the DDPM saw.

Licence: CC0 1.0, as the drawings.

Limits: these are random combinations of one artist's hand-drawn parts, not photographs, and say nothing about real
faces. At 32 pixels small parts blur, and a mask or glasses hide parts that the labels still name, so an expression is
often misread. `headContrast` is the hair colour of the ten hairstyles that are not black, and of some beards. Class
names are those of the style; colours are six hex digits. Figures made with it compare with each other only.
""",
    "peeps": """Data: the drawings of `pretraining/peeps_data.py`, altered parts of the `open-peeps` style of DiceBear
(packages dicebear-core, dicebear-styles and resvg-py), a remix of Open Peeps by Pablo Stanley, CC0 1.0; trained on the
10,000 drawings that the text-to-image model saw, measured on 1,536 of other people, each of whom differs from every
training one in some attribute. `reference.safetensors` holds the first 512 of those (`images`, uint8 [512, 3, 64, 64];
`labels`, uint8 [512, 7], in the order of the table), `captions.txt` a caption of each that names every attribute.

Licence: CC0 1.0, as the drawings.

Limits: these are combinations of one artist's hand-drawn parts, not photographs, and say nothing about real faces. It
names a value of every attribute for any picture, noise included. `hair_colour` is none for bald heads, hats and
turbans. Figures made with it compare with each other only.
""",
}


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [B, C, H, W] -> float [B, 3, H, W] in [0, 1]."""
    return (pixels.float() / 255).expand(-1, 3, -1, -1)


def augment(images: Tensor, mirror: bool) -> Tensor:
    """Shift the batch by up to two pixels, mirror half of it (garments; a hairstyle has its side), blur, add noise.

    Blur and noise make the network read a generated image, which is never quite sharp nor clean, like the real image
    it resembles: without blur, a 3 x 3 mean filter halved the Vendi Score of the portraits.
    """
    if mirror:
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    # half of the batch stays sharp
    images = images.lerp(blurred, (2 * torch.rand(len(images), 1, 1, 1) - 1).clamp(min=0))
    images = images + NOISE * torch.rand(len(images), 1, 1, 1) * torch.randn(images.shape)
    (height, width), (down, right) = images.shape[2:], torch.randint(0, 5, (2,)).tolist()
    return F.pad(images.clamp(0, 1), (2, 2, 2, 2), mode="replicate")[:, :, down : down + height, right : right + width]


def train(network: ShippedNetwork, images: Tensor, targets: dict[str, Tensor], epochs: int, mirror: bool) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(images) // BATCH)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    started, step = time.time(), 0
    for _ in range(epochs):
        for chosen in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            features = network.features(augment(to_unit(images[chosen]), mirror))
            log_probs = network.log_probs(features)
            loss = torch.stack([F.nll_loss(log_probs[name], targets[name][chosen]) for name in targets]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            step += 1
            if step % 100 == 0:
                print(f"step {step}/{steps} loss {loss.item():.3f} {time.time() - started:.0f} s", flush=True)


@torch.no_grad()
def evaluate(network: ShippedNetwork, images: Tensor, targets: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Accuracy and mean negative log-likelihood (nats) of every head; `guess`: accuracy of its commonest class."""
    network.eval()
    batches = [network.log_probs(network.features(to_unit(part))) for part in images.split(500)]
    log_probs = {name: torch.cat([batch[name] for batch in batches]) for name in targets}
    return {
        name: {
            "accuracy": round((log_probs[name].argmax(1) == target).double().mean().item(), 4),
            "guess": round(target.bincount().max().item() / len(target), 4),
            "negative_log_likelihood": round(F.nll_loss(log_probs[name], target).item(), 4),
        }
        for name, target in targets.items()
    }


def measure_reference(name: str) -> dict[str, dict[str, float]]:
    """Vendi Score and the Inception Score of every head, of the first 128, 256 and 512 reference images."""
    classifier, images = load_shipped(name), load_reference(name)
    figures = {}
    for count in (128, 256, REFERENCE):
        log_probs = classifier.log_probs(images[:count])
        figures[str(count)] = {"vendi": round(vendi_score(classifier.features(images[:count])), 2)} | {
            f"inception_score/{head}": round(inception_score(values), 2) for head, values in log_probs.items()
        }
    return figures


def split(name: str, part: str, data: Path | None) -> tuple[Tensor, dict[str, list[str]], dict[str, Tensor]]:
    """Images uint8 [N, C, H, W], the class names of each head, and the labels {head: [N]}; part: train, held out."""
    if name == "fashion":
        pixels, garments = fashion("train" if part == "train" else "t10k")
        names, labels = {"label": FASHION_LABELS}, garments.astype(np.int64)[:, None]
    elif name == "peeps":
        names, (pixels, labels) = ATTRIBUTES, load(data, {"train": "training", "held out": "held_out"}[part])
    else:
        pixels, names, labels = labelled_portraits(**PORTRAITS[part])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return images, names, {head: torch.from_numpy(labels[:, i].copy()) for i, head in enumerate(names)}


def model_card(name: str, config: dict) -> str:
    rows, pixels = [], config["architecture"].get("pixels", 32)
    for head, quality in config["held_out"].items():
        accuracy, guess, nll = quality["accuracy"], quality["guess"], quality["negative_log_likelihood"]
        rows.append(f"| {head} | {len(config['labels'][head])} | {accuracy:.1%} | {guess:.1%} | {nll:.2f} |")
    vendi = ", ".join(f"{figures['vendi']:.1f} of {count}" for count, figures in config["reference"].items())
    return "\n".join(
        [
            f"# {name} classifier\n",
            f"A convolutional network of {config['parameters']:,} parameters with which `hrf_fast` measures diversity:",
            f"{config['architecture']['feature_dim']} centred features for the Vendi Score and class probabilities for",
            f"the Inception Score and the `classifier` reward. Input: {pixels} x {pixels} pixels.\n",
            f"Training: `python pretraining/train_classifiers.py {name}` (one CPU core, minutes).\n",
            "Held-out quality (guess: always the commonest class; NLL in nats):\n",
            "| head | classes | accuracy | guess | NLL |\n|---|---|---|---|---|",
            *rows,
            f"\nVendi Score of real images with these features: {vendi} images.",
            "More figures are in config.json.\n",
            CARD[name],
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(ARCHITECTURE))
    parser.add_argument("--data", type=Path, help="folder of peeps_data.py, for peeps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    name = arguments.name
    if name == "peeps" and arguments.data is None:
        parser.error("peeps needs --data, the folder that peeps_data.py wrote")
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)

    images, labels, targets = split(name, "train", arguments.data)
    test_images, _, test_targets = split(name, "held out", arguments.data)
    network = ShippedNetwork(**ARCHITECTURE[name], heads={head: len(classes) for head, classes in labels.items()})
    network.to(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{parameters:,} parameters, {len(images):,} images", flush=True)
    train(network, images, targets, EPOCHS[name], mirror=name == "fashion")
    quality = evaluate(network, test_images, test_targets)

    folder = ASSETS / name / "classifier"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / "model.safetensors")
    reference = {"images": test_images[:REFERENCE].contiguous()}
    if name == "fashion":
        reference["labels"] = test_targets["label"][:REFERENCE].to(torch.uint8)
    if name == "peeps":
        reference["labels"] = torch.stack(list(test_targets.values()), 1)[:REFERENCE].to(torch.uint8)
        captions = full_captions(reference["labels"].numpy(), seed=0)
        (ASSETS / name / "captions.txt").write_text("\n".join(captions) + "\n")
    save_file(reference, ASSETS / name / "reference.safetensors")
    config = {"architecture": ARCHITECTURE[name], "labels": labels, "parameters": parameters, "held_out": quality}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    config["reference"] = measure_reference(name)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "README.md").write_text(model_card(name, config))
    for path in (folder / "model.safetensors", ASSETS / name / "reference.safetensors"):
        path.chmod(0o644)
    print(json.dumps({"held_out": quality, "reference": config["reference"]}, indent=1))


if __name__ == "__main__":
    main()
