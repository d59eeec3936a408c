"""`hrf export`: a checkpoint as a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path

from hrf_fast.commands.runs import checkpoint_policy, run_of, with_sampler
from hrf_fast.policies.lora import merged
from hrf_fast.run.card import save_model
from hrf_fast.run.layout import RunFiles


def export(checkpoint: Path, out: Path, *, merge: bool = False) -> None:
    """Write a checkpoint as a diffusers folder, with averaged weights where the run averages.

    Args:
        merge: write a whole pipeline where a policy saves its adapters only.

    Raises:
        ValueError: not a checkpoint of a run, a folder that is there already, or nothing to merge.
    """
    run = run_of(checkpoint)
    if run is None:
        raise ValueError(f"{checkpoint} is no checkpoint of a run; give RUN/checkpoints/iteration-…")
    if out.exists():
        raise ValueError(f"--out is {out}, which is there already; name a new folder")
    config = RunFiles(run).read_config()
    policy = checkpoint_policy(run, with_sampler(config, "cpu", {}), checkpoint)
    if merge:
        if not (policy.takes_prompts and config.lora.rank):
            raise ValueError(
                "--merge is for adapters of a text-to-image model; this checkpoint is written whole anyway"
            )
        policy.network.unet = merged(policy.network.unet)
    out.parent.mkdir(parents=True, exist_ok=True)
    iterations = json.loads((checkpoint / "state.json").read_text())["iteration"]
    # the card's figures were measured in the run's own precision
    save_model(out, policy, config, RunFiles(run).panels(), iterations)
