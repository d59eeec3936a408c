"""Train the shipped flow-matching model: `python pretraining/train_flow.py fashion-flow --out folder --minutes 40`.

Flow matching on straight lines (arXiv 2210.02747, 2209.03003): of x = (1 - sigma)·x0 + sigma·noise the network predicts
noise - x0. Sigmas are logit-normal (arXiv 2403.03206), the network is the one of train_ddpm.py, and its weights start
from the shipped DDPM's, which saves hours on one core. One thread, bf16 autocast; see peeps_training.py for the budget.
"""

import argparse
from pathlib import Path

import torch
from data import fashion
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler, UNet2DModel
from peeps_training import load_average, train
from torch import Tensor, nn
from train_ddpm import build_unet

from hrf_fast.assets import ASSETS

# the shipped DDPM that each model's weights start from
START = {"fashion-flow": "fashion"}
BATCH, LEARNING_RATE, AVERAGE, MEAN, SPREAD = 32, 6e-4, 0.999, 0.0, 1.2


def flow_loss(unet: UNet2DModel, clean: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean squared error of the velocity at a sigma per image [B, C, H, W] in [-1, 1]."""
    sigmas, noise = torch.sigmoid(MEAN + SPREAD * torch.randn(len(clean))), torch.randn_like(clean)
    level = sigmas.view(-1, 1, 1, 1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = unet((1 - level) * clean + level * noise, 1000 * sigmas).sample
    return (output.float() - (noise - clean)).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(START))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0, help="budget of CPU time")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--shift", type=float, default=1.0, help="of the saved scheduler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--average", action="store_true", help="only save the averaged weights of a run that goes on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.precision]
    images = torch.from_numpy(fashion("train")[0]).permute(0, 3, 1, 2)
    start, checkpoint = START[arguments.name], arguments.out / "checkpoint.pt"
    unet = build_unet(start, images.shape[1])
    weights = UNet2DModel.from_pretrained(ASSETS / start / "model" / "unet", low_cpu_mem_usage=False)
    unet.load_state_dict(weights.state_dict())
    networks = nn.ModuleDict({"unet": unet})

    def losses() -> dict[str, Tensor]:
        clean = images[torch.randint(len(images), (BATCH,))].float() / 127.5 - 1
        return {"velocity": flow_loss(unet, clean, dtype)}

    if arguments.average:
        step = load_average(networks, checkpoint)
    else:
        step = train(
            networks,
            losses,
            minutes=arguments.minutes,
            rates={"unet": LEARNING_RATE},
            checkpoint=checkpoint,
            average=AVERAGE,
            weight_decay=1e-4,
            seed=arguments.seed,
        )
    print(f"{step} optimizer steps of {BATCH} images")
    # sigmas end at 0.05 and not at 0.001, which would waste the last step
    scheduler = FlowMatchEulerDiscreteScheduler(shift=arguments.shift, shift_terminal=0.05)
    # a loader converts to fp32; the file is half as large
    DDPMPipeline(unet.half(), scheduler).save_pretrained(arguments.out / "model")


if __name__ == "__main__":
    main()
