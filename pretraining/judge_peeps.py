"""Figures of the model card of `peeps`: `python pretraining/judge_peeps.py --model MODEL --picture sheet.png`.

Every caption of captions.txt names all attributes of a held-out drawing; the shipped classifier says which of them an
image has. It looks at the drawings, at their reconstructions by the autoencoder, and at images of the captions by DDIM
(eta 0), for several guidance scales. Whatever is imported here, the model is used as a user has it: by
`StableDiffusionPipeline.from_pretrained`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hrf_fast.assets import ASSETS
from hrf_fast.evaluation.vendi import vendi_score
from hrf_fast.vision.base import to_bytes
from hrf_fast.vision.shipped import ShippedClassifier, load_reference, load_shipped

IMAGES_PER_CALL = 64


@torch.no_grad()
def reconstruct(pipeline: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """Images [N, 3, 64, 64] in [0, 1] through the autoencoder and back."""
    parts = []
    for part in images.split(IMAGES_PER_CALL):
        latents = pipeline.vae.encode(part * 2 - 1).latent_dist.mean
        parts.append(pipeline.vae.decode(latents).sample / 2 + 0.5)
    return torch.cat(parts).clamp(0, 1)


def generate(pipeline: StableDiffusionPipeline, captions: list[str], guidance: float, steps: int) -> Tensor:
    """One image [N, 3, 64, 64] in [0, 1] per caption."""
    parts = []
    for start in range(0, len(captions), IMAGES_PER_CALL):
        images = pipeline(
            captions[start : start + IMAGES_PER_CALL],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(start),
            output_type="pt",
        ).images
        parts.append(images)
    return torch.cat(parts)


def judge(classifier: ShippedClassifier, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of images whose attribute is the caption's, of every attribute and their mean, and the Vendi Score."""
    log_probs = classifier.log_probs(images)
    figures = {
        name: float((values.argmax(1) == labels[:, column]).double().mean())
        for column, (name, values) in enumerate(log_probs.items())
    }
    figures["mean"] = sum(figures.values()) / len(figures)
    figures["vendi"] = vendi_score(classifier.features(images))
    return {name: round(value, 3) for name, value in figures.items()}


def sheet(rows: list[Tensor], columns: int) -> Image.Image:
    """The first images of every row of `rows` beneath one another, twice their size."""
    lines = [torch.cat(list(to_bytes(images[:columns])), dim=1) for images in rows]
    picture = Image.fromarray(torch.cat(lines).numpy())
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ASSETS / "peeps" / "model")
    parser.add_argument("--count", type=int, default=512, help="captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 5.0])
    parser.add_argument("--picture", type=Path, help="PNG: drawings, reconstructions and images beneath one another")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count = arguments.count
    captions = (ASSETS / "peeps" / "captions.txt").read_text().splitlines()[:count]
    labels = load_file(ASSETS / "peeps" / "reference.safetensors")["labels"][:count].long()
    classifier, drawings = load_shipped("peeps"), load_reference("peeps")[:count]
    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model)
    pipeline.set_progress_bar_config(disable=True)
    rows = {"drawings": drawings, "reconstructions": reconstruct(pipeline, drawings)}
    error = (rows["reconstructions"] - drawings).square().mean((1, 2, 3))
    print(f"PSNR of reconstructions {float(-10 * error.log10().mean()):.2f} dB")
    for guidance in arguments.guidance:
        began = time.process_time()
        rows[f"guidance {guidance:g}"] = generate(pipeline, captions, guidance, arguments.steps)
        print(f"guidance {guidance:g}: {(time.process_time() - began) / count:.3f} CPU-s an image", flush=True)
    for name, images in rows.items():
        print(f"{name}: {json.dumps(judge(classifier, images, labels))}", flush=True)
    if arguments.picture:
        parts = [images[start : start + 12] for start in (0, 12) for images in rows.values()]
        sheet([part for part in parts if len(part) == 12], 12).save(arguments.picture)


if __name__ == "__main__":
    main()
