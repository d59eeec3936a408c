"""`hrf export`: a run's tuned model, or a checkpoint, as a diffusers folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hrf_fast.commands.runs import checkpoint_policy, model_of_run, run_of, run_policy, with_sampler
from hrf_fast.policies.lora import merged
from hrf_fast.run.card import save_model
from hrf_fast.run.layout import RunFiles


def export(model: Path, out: Path, *, merge: bool = False) -> None:
    """Write a tuned model or a checkpoint as a diffusers folder, with averaged weights where the run averages.

    Args:
        model: the folder of a finished run, or a checkpoint, whose run need not have finished.
        merge: write a whole pipeline where a policy saves its adapters only.

    Raises:
        ValueError: neither a finished run nor a checkpoint, a folder that is there already, or nothing to merge.
    """
    run, tuned = (run, None) if (run := run_of(model)) else model_of_run(model) or (None, None)
    if run is None:
        raise ValueError(f"{model} is no checkpoint and no run; give RUN, or RUN/checkpoints/iteration-…")
    files = RunFiles(run)
    if tuned not in (None, files.model):
        raise ValueError(f"{model} is a blend, and {tuned} is its diffusers folder already; use that")
    if out.exists():
        raise ValueError(f"--out is {out}, which is there already; name a new folder")
    config = files.read_config()
    on_cpu = with_sampler(config, "cpu", {})
    # text encoders as the run has had them: in fp32 a merged pipeline would be twice as large
    on_cpu = replace(on_cpu, compute=replace(on_cpu.compute, encoder_precision=config.compute.encoder_precision))
    if tuned:
        policy, iterations = run_policy(run, on_cpu, str(tuned)), files.model_iteration()
    else:
        policy = checkpoint_policy(run, on_cpu, model)
        iterations = json.loads((model / "state.json").read_text())["iteration"]
    if merge:
        if not (policy.takes_prompts and config.lora.rank):
            raise ValueError("--merge is for adapters of a text-to-image model; this one is written whole anyway")
        policy.network.unet = merged(policy.network.unet)
    out.parent.mkdir(parents=True, exist_ok=True)
    # the card's figures were measured in the run's own precision
    save_model(out, policy, config, files.panels(), iterations)
