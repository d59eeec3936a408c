"""Train the UNet of `peeps` with its text encoder: `python pretraining/train_peeps.py --data DATA --out MODEL`.

Stable Diffusion's objective on cached latents: epsilon prediction under its scheduler, min-SNR weights (arXiv
2303.09556), 10 % of the captions empty, so that guidance works. The face, a quarter of the picture, counts more, since
most of what a caption says is there. DATA holds what `peeps_data.py`, `peeps_captions.py`, `train_peeps_vae.py` and
`train_peeps_text.py` wrote; MODEL becomes a folder that `StableDiffusionPipeline.from_pretrained` loads.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peeps_captions import CAPTIONS, random_captions, tokenize, write_tokenizer
from peeps_data import load
from peeps_training import load_average, train
from torch import Tensor, nn
from train_peeps_text import WIDTH
from train_peeps_vae import to_signed
from transformers import CLIPTextModel, CLIPTokenizer

BATCH, MIN_SNR, EMPTY = 32, 5.0, 0.1
RATES = {"unet": 1e-3, "text": 3e-4}
FACE, FACE_WEIGHT = (slice(2, 6), slice(3, 7)), 2.5  # rows and columns of the 8 x 8 latents


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(80, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        attention_head_dim=2,  # diffusers reads it as the number of heads
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's own."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, cache: Path) -> tuple[Tensor, Tensor]:
    """Means and standard deviations [N, 16, 8, 8] of the posterior; from `cache` if this autoencoder made it."""
    digest = hashlib.sha256()
    for value in vae.state_dict().values():
        digest.update(value.numpy().tobytes())
    key = digest.hexdigest()
    if cache.exists() and (saved := torch.load(cache, weights_only=True))["vae"] == key:
        return saved["mean"], saved["std"]
    posteriors = [vae.encode(to_signed(part)).latent_dist for part in images.split(64)]
    mean, std = (torch.cat([getattr(posterior, name) for posterior in posteriors]) for name in ("mean", "std"))
    torch.save({"mean": mean, "std": std, "vae": key}, cache)
    return mean, std


def place_weights() -> Tensor:
    """[8, 8], of mean 1."""
    weights = torch.ones(8, 8)
    weights[FACE] = FACE_WEIGHT
    return weights / weights.mean()


def save_pipeline(
    folder: Path, tokenizer: CLIPTokenizer, networks: nn.ModuleDict, vae: AutoencoderKL, half: bool
) -> None:
    """Write Stable Diffusion's layout, in fp16 if `half`; the networks are left as they are."""
    parts = {"unet": networks["unet"], "text_encoder": networks["text"], "vae": vae}
    StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    # transformers writes its own tokenizer.json instead of the two files of Stable Diffusion's layout
    shutil.rmtree(folder / "tokenizer")
    write_tokenizer(folder / "tokenizer")
    if half:
        for name, network in parts.items():
            shutil.rmtree(folder / name)
            network.half().save_pretrained(folder / name)
            network.float()
        # the folder of this machine that the autoencoder came from
        config = json.loads((folder / "vae" / "config.json").read_text())
        config.pop("_name_or_path", None)
        (folder / "vae" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        # transformers loads in the dtype that the config names, diffusers in fp32: they must agree
        config = json.loads((folder / "text_encoder" / "config.json").read_text())
        (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of peeps_data.py; holds the checkpoint too")
    parser.add_argument("--minutes", type=float, default=60, help="CPU time; a run may be resumed with another value")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--half", action="store_true", help="write fp16")
    parser.add_argument("--snapshot", action="store_true", help="write the averaged weights of a run that goes on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    checkpoint = arguments.data / "unet.pt"
    tokenizer = CLIPTokenizer.from_pretrained(arguments.data / "tokenizer")
    vae = AutoencoderKL.from_pretrained(arguments.data / "vae", low_cpu_mem_usage=False).eval()
    text = CLIPTextModel.from_pretrained(arguments.data / "text_encoder", dtype=torch.float32)
    networks = nn.ModuleDict({"unet": build_unet(), "text": text})
    sizes = {name: f"{sum(p.numel() for p in network.parameters()):,}" for name, network in networks.items()}
    print(f"parameters {sizes}", flush=True)
    if arguments.snapshot:
        step = load_average(networks, checkpoint)
    else:
        pixels, labels = load(arguments.data, "training")
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        mean, std = encode(vae, images, arguments.data / "latents.pt")
        tokens = tokenize(tokenizer, random_captions(labels, CAPTIONS, seed=1)[0]).view(len(labels), CAPTIONS, -1)
        empty = tokenize(tokenizer, [""])[0]
        alphas = build_scheduler().alphas_cumprod
        snr = alphas / (1 - alphas)
        weights, places = snr.clamp(max=MIN_SNR) / snr, place_weights()

        def losses() -> dict[str, Tensor]:
            chosen, timesteps = torch.randint(len(mean), (BATCH,)), torch.randint(len(alphas), (BATCH,))
            clean = mean[chosen] + std[chosen] * torch.randn(BATCH, *mean.shape[1:])
            prompts = tokens[chosen, torch.randint(CAPTIONS, (BATCH,))]
            prompts = torch.where(torch.rand(BATCH, 1) < EMPTY, empty, prompts)
            alpha, noise = alphas[timesteps].view(-1, 1, 1, 1), torch.randn_like(clean)
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            states = networks["text"](prompts).last_hidden_state
            output = networks["unet"](noisy, timesteps, states).sample
            error = ((output - noise).square() * places).mean((1, 2, 3))
            return {"loss": (weights[timesteps] * error).mean()}

        step = train(networks, losses, minutes=arguments.minutes, rates=RATES, checkpoint=checkpoint)
    save_pipeline(arguments.out, tokenizer, networks, vae, arguments.half)
    print(f"{step} steps, {step * BATCH:,} images; wrote {arguments.out}")


if __name__ == "__main__":
    main()
