"""Train one of the shipped DDPMs: `python pretraining/train_ddpm.py fashion --out some/folder`.

Plain epsilon prediction with min-SNR weights (arXiv 2303.09556), squared-cosine betas, AdamW with warm-up and
cosine decay, and an exponential moving average of the weights, which is what is saved. One core, bf16 autocast.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from data import fashion, portraits
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

BLOCKS = {"fashion": (32, 64, 64), "portraits": (32, 64, 64, 64)}
STEPS = 10_000
BATCH, LEARNING_RATE, WARMUP, MIN_SNR, EMA = 32, 1e-3, 200, 5.0, 0.999


def build_unet(name: str, channels: int) -> UNet2DModel:
    blocks = BLOCKS[name]
    return UNet2DModel(
        sample_size=32,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=blocks,
        down_block_types=("DownBlock2D",) * len(blocks),
        up_block_types=("UpBlock2D",) * len(blocks),
        norm_num_groups=8,
        attention_head_dim=32,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(BLOCKS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of 32 images")
    parser.add_argument("--init", type=Path, help="start from the weights of this folder instead of from scratch")
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    steps = arguments.steps
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)

    pixels = fashion("train")[0] if arguments.name == "fashion" else portraits(12_000)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    unet = build_unet(arguments.name, images.shape[1])
    if arguments.init:
        start = UNet2DModel.from_pretrained(arguments.init / "unet", low_cpu_mem_usage=False)
        unet.load_state_dict(start.state_dict())
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(EMA))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    )
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = snr.clamp(max=MIN_SNR) / snr
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters, {len(images):,} images", flush=True)

    started, total_loss = time.time(), 0.0
    for step in range(1, steps + 1):
        clean = images[torch.randint(len(images), (BATCH,))].float() / 127.5 - 1
        noise, timesteps = torch.randn_like(clean), torch.randint(1000, (BATCH,))
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
        loss = (weights[timesteps] * (output.float() - noise).square().mean((1, 2, 3))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(unet)
        total_loss += loss.detach()
        if step % 100 == 0:
            print(f"step {step} loss {float(total_loss) / 100:.4f} {time.time() - started:.0f} s", flush=True)
            total_loss = 0.0
        if step % arguments.save_every == 0 or step == steps:
            DDPMPipeline(average.module, scheduler).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
