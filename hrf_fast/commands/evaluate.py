"""`hrf evaluate`: a run's tuned model and its pretrained one on one panel, with every metric."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from hrf_fast.assembly.inputs import build_config_reward, build_panel, build_prompts, prompt_sources
from hrf_fast.commands.runs import ADAPTERS, BASE_MODEL, run_policy, tuned_config
from hrf_fast.config.credentials import without_credentials
from hrf_fast.devices import choose_device
from hrf_fast.evaluation.detail import LEAST, detail
from hrf_fast.evaluation.kept import kept_interval
from hrf_fast.evaluation.nanoflow import nanoflow_columns
from hrf_fast.report.evaluation import evaluation_lines
from hrf_fast.run.files import write_atomically
from hrf_fast.run.layout import RunFiles
from hrf_fast.run.sources import edited_notes


def evaluate(run: Path, words: list[str], *, everything: bool = False) -> Path:
    """Evaluate a run's tuned model and its pretrained one on a fixed panel; prints a table, writes evaluation.json.

    With an evaluation.network, also the metrics of `evaluation.detail` against samples of the pretrained model's from
    the next seed.

    Args:
        words: options to change, such as evaluation.panel_size=512.
        everything: whether all metrics are printed, or the most useful ones.

    Raises:
        ValueError: see `tuned_config`.
    """
    config = tuned_config(run, words, (*BASE_MODEL, *ADAPTERS))
    device = choose_device(config.run.device)
    (prompts, source), reward = build_prompts(config), build_config_reward(config, device)
    panel = build_panel(config, device, prompts)
    sources = reward.sources | prompt_sources(config, source, panel) | panel.held_out_sources
    for changed in edited_notes(run, sources):
        print(changed)
    result: dict[str, Any] = {
        name: without_credentials(asdict(getattr(config, name)))
        for name in ("sample", "reward", "prompts", "evaluation")
    }
    network, reference = panel.network, None
    before: Mapping[str, Tensor] = {}
    pretrained: Tensor | None = None
    if network is not None and panel.size < LEAST:
        print(
            f"evaluation.panel_size is {panel.size}: metrics of neighbours and shares kept, which need {LEAST} images, "
            "are left out"
        )
        network = None
    fidelity = importlib.util.find_spec("torchmetrics") is not None
    if network is not None and not fidelity:
        print('FID and KID are left out, since torchmetrics is not installed: pip install "hrf_fast[metrics]"')
    for title, name in (("pretrained", None), ("tuned", str(RunFiles(run).model))):
        policy = run_policy(run, config, name)
        metrics = panel.evaluate(policy, reward)
        result[title] = metrics.record()
        pretrained = metrics.images if pretrained is None else pretrained
        result[title]["peer"] = nanoflow_columns(metrics.images, pretrained, panel.network, seed=panel.seed)
        if network is not None:
            if reference is None:
                reference, before = network.features(panel.with_next_seed().images(policy)), metrics.halves
            features = network.features(metrics.images)
            result[title]["detail"] = detail(features, metrics.images, reference, seed=panel.seed, fidelity=fidelity)
            if name is not None:
                result[title]["kept"] = {
                    metric: list(kept_interval(before[metric], values, metrics.samples[metric]))
                    for metric, values in metrics.halves.items()
                }
        # a GPU that trained one model need not hold two
        del policy
    # neither a file that can't be written nor a closed output costs the other
    try:
        print("\n".join(evaluation_lines(result, everything=everything)))
    finally:
        write_atomically(run / "evaluation.json", json.dumps(result, indent=1).encode())
    return run / "evaluation.json"
