"""The training loop that all networks of `peeps` share: AdamW within a budget of CPU time, resumable, averaged.

The learning rate follows the spent share of the budget, so that a run ends annealed on a slow or contended machine too;
a stopped process spends nothing. A checkpoint is written every few minutes, whole or not at all, and the same command
goes on from it. Losses depend on the seed alone, the number of steps on the machine.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

WARMUP, FLOOR = 100, 0.02  # optimizer steps; the last learning rate as a share of the peak
SAVE_SECONDS, LOG_STEPS = 120, 100


def learning_rate_factor(step: int, share: float, hold: float) -> float:
    """Warm up, hold until `hold` of the budget is spent, then fall in a line to `FLOOR`."""
    fall = max(FLOOR, (1 - share) / (1 - hold)) if share > hold else 1.0
    return min(1.0, (step + 1) / WARMUP) * fall


def train(
    networks: nn.ModuleDict,
    losses: Callable[[], dict[str, Tensor]],
    *,
    minutes: float,
    rates: dict[str, float],
    checkpoint: Path,
    hold: float = 0.5,
    average: float = 0.998,
    weight_decay: float = 1e-2,
    seed: int = 0,
) -> int:
    """Train until the budget is spent; the networks end with their averaged weights, in evaluation mode.

    Args:
        losses: the terms of one batch's loss, which are added up and logged; draws from torch's generator.
        minutes: CPU time of this process, of earlier ones too where `checkpoint` exists.
        rates: peak learning rate of each network.
        checkpoint: file to resume from and to write.
        hold: share of the budget at which the learning rate begins to fall.
        average: decay of the exponential moving average of weights and buffers.

    Returns:
        The number of optimizer steps.
    """
    groups = [{"params": list(networks[name].parameters()), "peak": rate} for name, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=weight_decay, betas=(0.9, 0.99))
    weights = [value for value in networks.state_dict().values() if value.is_floating_point()]
    averaged = [value.clone() for value in weights]
    step, spent = 0, 0.0
    torch.manual_seed(seed)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        networks.load_state_dict(saved["networks"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["generator"])
        averaged, step, spent = saved["averaged"], saved["step"], saved["spent"]
        print(f"resumed at step {step}, {spent / 60:.1f} minutes", flush=True)
    networks.train()
    began, last_save, totals = time.process_time() - spent, spent, {}
    while (spent := time.process_time() - began) < 60 * minutes:
        factor = learning_rate_factor(step, spent / (60 * minutes), hold)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        terms = losses()
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        step += 1
        # a young average forgets its random start quickly
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1 - min(average, (1 + step) / (10 + step)))
        totals = {name: totals.get(name, 0.0) + float(term.detach()) for name, term in terms.items()}
        if step % LOG_STEPS == 0:
            means = " ".join(f"{name} {total / LOG_STEPS:.4f}" for name, total in totals.items())
            print(f"{time.strftime('%H:%M:%S')} step {step} {spent / 60:.2f} min lr {factor:.2f} {means}", flush=True)
            totals = {}
        if spent - last_save > SAVE_SECONDS:
            last_save = spent
            _save(checkpoint, networks, optimizer, averaged, step, spent)
    _save(checkpoint, networks, optimizer, averaged, step, spent)
    with torch.no_grad():
        torch._foreach_copy_(weights, averaged)
    networks.eval()
    return step


def load_average(networks: nn.ModuleDict, checkpoint: Path) -> int:
    """Give the networks the averaged weights of a run that may still go on; returns its optimizer step."""
    saved = torch.load(checkpoint, weights_only=True)
    networks.load_state_dict(saved["networks"])
    with torch.no_grad():
        weights = [value for value in networks.state_dict().values() if value.is_floating_point()]
        torch._foreach_copy_(weights, saved["averaged"])
    networks.eval()
    return int(saved["step"])


def _save(
    path: Path,
    networks: nn.ModuleDict,
    optimizer: torch.optim.Optimizer,
    averaged: list[Tensor],
    step: int,
    spent: float,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "networks": networks.state_dict(),
        "optimizer": optimizer.state_dict(),
        "averaged": averaged,
        "generator": torch.get_rng_state(),
        "step": step,
        "spent": spent,
    }
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)
