"""Train the autoencoder of `peeps`: `python pretraining/train_peeps_vae.py --data DATA --minutes 15`.

An AutoencoderKL that makes 8 x 8 latents of 16 channels from 64 x 64 pixels. The loss is the absolute error, that of
the differences between neighbouring pixels (edges are what one sees of a drawing), half the squared error, the squared
error of the hue of 4 x 4 pixels (after 8 CPU-minutes without it red, green and purple were still brown) and a little
KL divergence. At the end the latents are normalised inside the network, so the pipeline's scaling_factor is 1.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from peeps_data import load
from peeps_training import load_average, train
from torch import Tensor, nn

BATCH, RATE, KL, COLOUR = 4, 1.5e-3, 5e-4, 6.0


def build_vae() -> AutoencoderKL:
    blocks = (16, 24, 48, 64)
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def to_signed(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbours, across and down."""
    return images.diff(dim=3), images.diff(dim=2)


def reconstruction_losses(vae: AutoencoderKL, images: Tensor) -> dict[str, Tensor]:
    posterior = vae.encode(images).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    error = decoded - images
    flat = F.avg_pool2d(error, 4)
    (across, down), (true_across, true_down) = edges(decoded), edges(images)
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return {
        "absolute": error.abs().mean(),
        "edges": ((across - true_across).abs().mean() + (down - true_down).abs().mean()) / 2,
        "squared": 0.5 * error.square().mean(),
        "colour": COLOUR * (flat - flat.mean(1, keepdim=True)).square().mean(),
        "kl": KL * divergence,
    }


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold each latent channel's mean and standard deviation into the convolutions on both sides of the latents."""
    means = torch.cat([vae.encode(to_signed(part)).latent_dist.mean for part in images.split(128)])
    mean, std = means.mean((0, 2, 3)), means.std((0, 2, 3))
    before, after, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    before.weight[:channels] /= std.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    # the second half of the channels are log-variances
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def signal_to_noise(vae: AutoencoderKL, images: Tensor) -> float:
    """Mean PSNR of reconstructions in decibels; images uint8 [N, 3, 64, 64]."""
    ratios = []
    for part in images.split(128):
        decoded = vae.decode(vae.encode(to_signed(part)).latent_dist.mean).sample.clamp(-1, 1)
        ratios.append(-10 * ((decoded - to_signed(part)) / 2).square().mean((1, 2, 3)).log10())
    return float(torch.cat(ratios).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of peeps_data.py; gets vae.pt and vae/")
    parser.add_argument("--minutes", type=float, default=15, help="CPU time")
    parser.add_argument("--snapshot", action="store_true", help="write the averaged weights of a run that goes on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.from_numpy(load(arguments.data, "training")[0]).permute(0, 3, 1, 2).contiguous()
    held_out = torch.from_numpy(load(arguments.data, "held_out")[0]).permute(0, 3, 1, 2)
    networks = nn.ModuleDict({"vae": build_vae()})
    vae, checkpoint = networks["vae"], arguments.data / "vae.pt"
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, {len(images):,} images", flush=True)
    if arguments.snapshot:
        step = load_average(networks, checkpoint)
    else:
        step = train(
            networks,
            lambda: reconstruction_losses(vae, to_signed(images[torch.randint(len(images), (BATCH,))])),
            minutes=arguments.minutes,
            rates={"vae": RATE},
            checkpoint=checkpoint,
            hold=0.6,
            average=0.997,
            weight_decay=1e-4,
        )
    before = signal_to_noise(vae, held_out[:256])
    normalise_latents(vae, images[:1024])
    after = signal_to_noise(vae, held_out[:256])
    print(f"{step} steps of {BATCH} images, held-out PSNR {before:.2f} dB, {after:.2f} dB with normalised latents")
    vae.save_pretrained(arguments.data / "vae")


if __name__ == "__main__":
    main()
