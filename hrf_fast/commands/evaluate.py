"""`hrf evaluate`: a run's tuned model, or a checkpoint, and its pretrained one on one panel, with every metric."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from hrf_fast.assembly.inputs import build_config_reward, build_panel, build_prompts, prompt_sources
from hrf_fast.commands.runs import ADAPTERS, BASE_MODEL, checkpoint_policy, run_of, run_policy, tuned_config
from hrf_fast.config.credentials import without_credentials
from hrf_fast.config.options import Config
from hrf_fast.devices import choose_device, set_up
from hrf_fast.errors import writing
from hrf_fast.evaluation.detail import LEAST, detail
from hrf_fast.evaluation.kept import kept_interval
from hrf_fast.evaluation.nanoflow import nanoflow_columns
from hrf_fast.policies.base import Policy
from hrf_fast.report.evaluation import evaluation_lines
from hrf_fast.run.files import write_atomically
from hrf_fast.run.finished import finished_run
from hrf_fast.run.layout import RunFiles
from hrf_fast.run.sources import edited_notes
from hrf_fast.timing.tuning import set_threads


def evaluate(model: Path, words: list[str], *, out: Path | None = None, everything: bool = False) -> Path:
    """Evaluate a tuned model and its pretrained one on a fixed panel; prints a table, writes evaluation.json.

    With an evaluation.network, also the metrics of `evaluation.detail` against samples of the pretrained model's from
    the next seed.

    Args:
        model: the folder of a finished run, or a checkpoint, whose run need not have finished.
        words: options to change, such as evaluation.panel_size=512.
        out: the file to write, None for that of `RunFiles.evaluation`.
        everything: whether all metrics are printed, or the most useful ones.

    Returns:
        The file.

    Raises:
        ValueError: neither a finished run nor a checkpoint, `out` is a folder, or see `tuned_config`.
    """
    run, checkpoint = (run, model) if (run := run_of(model)) else (finished_run(model).path, None)
    if out is not None and out.is_dir():
        raise ValueError(f"--out is {out}, which is a folder; name a JSON file")
    out = out or RunFiles(run).evaluation(checkpoint)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    config = tuned_config(run, words, (*BASE_MODEL, *ADAPTERS))
    device = choose_device(config.run.device)
    # before networks of the reward and the panel run for the first time
    set_up(device, deterministic=config.compute.deterministic)
    set_threads(config)
    (prompts, source), reward = build_prompts(config), build_config_reward(config, device)
    panel = build_panel(config, device, prompts)
    sources = reward.sources | prompt_sources(config, source, panel) | panel.held_out_sources
    for changed in edited_notes(run, sources):
        print(changed)
    result: dict[str, Any] = {
        name: without_credentials(asdict(getattr(config, name)))
        for name in ("sample", "reward", "prompts", "evaluation")
    }
    if checkpoint:
        result["checkpoint"] = checkpoint.absolute().name
    network, reference = panel.network, None
    before: Mapping[str, Tensor] = {}
    pretrained: Tensor | None = None
    if network is not None and panel.size < LEAST:
        print(f"evaluation.panel_size is {panel.size}: metrics of neighbours, which need {LEAST} images, are left out")
        network = None
    fidelity = importlib.util.find_spec("torchmetrics") is not None
    if network is not None and not fidelity:
        print('FID and KID are left out, since torchmetrics is not installed: pip install "hrf_fast[metrics]"')
    for title, load in _loaders(run, config, checkpoint).items():
        policy = load()
        metrics = panel.evaluate(policy, reward)
        result[title] = metrics.record()
        if pretrained is None:
            pretrained, before = metrics.images, metrics.halves
        elif before:
            result[title]["kept"] = {
                metric: list(kept_interval(before[metric], values, metrics.samples[metric]))
                for metric, values in metrics.halves.items()
            }
        result[title]["peer"] = nanoflow_columns(metrics.images, pretrained, panel.network, seed=panel.seed)
        if network is not None:
            if reference is None:
                reference = network.features(panel.with_next_seed().images(policy))
            features = network.features(metrics.images)
            result[title]["detail"] = detail(features, metrics.images, reference, seed=panel.seed, fidelity=fidelity)
        # a GPU that trained one model need not hold two
        del policy
    # neither a file that can't be written nor a closed output costs the other
    try:
        print("\n".join(evaluation_lines(result, everything=everything)))
    finally:
        write_atomically(out, json.dumps(result, indent=1).encode())
    return out


def _loaders(run: Path, config: Config, checkpoint: Path | None) -> dict[str, Callable[[], Policy]]:
    """Functions that load the models, by title and in the order in which they are evaluated."""
    tuned = partial(run_policy, run, config, str(RunFiles(run).model))
    if checkpoint:
        tuned = partial(checkpoint_policy, run, config, checkpoint)
    return {"pretrained": partial(run_policy, run, config), "tuned": tuned}
