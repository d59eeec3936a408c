"""`hrf blend`: the models on the line from a run's pretrained one through its tuned one, and the best of them saved."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hrf_fast.assembly.inputs import build_config_reward, build_panel, build_prompts
from hrf_fast.assembly.model import build_policy
from hrf_fast.commands.runs import ADAPTERS, run_policy, tuned_config
from hrf_fast.config.credentials import without_credentials
from hrf_fast.config.load import differences
from hrf_fast.config.options import FACTS, Config, LoraConfig
from hrf_fast.devices import choose_device, set_up
from hrf_fast.evaluation import blend as blends
from hrf_fast.evaluation.panel import Panel
from hrf_fast.policies.base import Policy
from hrf_fast.report.plots import blend_front
from hrf_fast.rewards import CombinedReward
from hrf_fast.run.card import save_model
from hrf_fast.run.files import append_line, read_object, remove_folder, sha256, write_atomically
from hrf_fast.run.finished import finished_run
from hrf_fast.run.layout import RunFiles
from hrf_fast.run.lock import blending
from hrf_fast.run.sources import BASE, edited, read_sources
from hrf_fast.timing.tuning import set_threads

# in settings.json: of all options of its sections
_DIGEST = "option"
# which say what is measured on a panel besides its reward
_MEASURING = ("evaluation.network", "evaluation.rewards")
# which may say what the panel shows
_PROMPTS = ("prompts.source", "prompts.kwargs", "prompts.negative", "evaluation.prompts")


class Front:
    """Panels of blends, one JSON line each in a file, so that a stop loses none of them."""

    def __init__(self, path: Path, line: blends.WeightLine, policy: Policy, reward: CombinedReward) -> None:
        """Args: path, of the file; line, of the policy's network.

        Raises:
            ValueError: the file has a line that is no panel of a blend.
        """
        self._path, self._line, self._policy, self._reward = path, line, policy, reward
        self._known = {(record["alpha"], record["seed"]): record for record in blends.read_front(path)}

    def at(
        self, alpha: float, panel: Panel, *, accept: Callable[[Sequence[float]], None] | None = None
    ) -> dict[str, Any]:
        """The panel's record at α with `alpha` and `seed`; evaluated unless the file has it.

        Args:
            accept: raises for rewards that must not get into the file.
        """
        key = alpha, panel.seed
        if key not in self._known:
            self._line.move(alpha)
            metrics = panel.evaluate(self._policy, self._reward)
            if accept is not None:
                accept(metrics.rewards)
            self._known[key] = {"alpha": alpha, "seed": panel.seed, **metrics.record()}
            append_line(self._path, json.dumps(self._known[key]))
        return self._known[key]


def blend(run: Path, words: Sequence[str], *, keep: float, quality: float = 0.0, most: float, step: float) -> list[str]:
    """Choose the best model on the line from a run's pretrained model through its tuned one, and save it in RUN/blend.

    Args:
        words: options to change, such as run.device=cpu.
        keep, quality: least shares of the pretrained model's Vendi Score and, where above 0, of its Inception Score.
        most, step: of α, see `steps_to`.

    Returns:
        Lines about the blend that was chosen, the tuned model and the pretrained one.

    Raises:
        ValueError: an unfinished run, another pretrained model than the run's, a front of other settings, or a panel
            without a network for the Vendi Score, or for the Inception Score where `quality` asks for it; or another
            process blends the run.
    """
    alphas, files = blends.steps_to(most, step), finished_run(run)
    folder = files.blend
    blends.check_shares(keep, quality)
    # another model.name is judged by its rewards
    config = tuned_config(run, words, ADAPTERS)
    device = choose_device(config.run.device)
    # before networks of the reward and the panel run for the first time
    set_up(device, deterministic=config.compute.deterministic)
    set_threads(config)
    panel = build_panel(config, device, build_prompts(config)[0])
    if panel.network is None:
        raise ValueError(
            f"evaluation.network is {config.evaluation.network}, which gives no Vendi Score here; name a network, such "
            "as fashion, which ships, or openai/clip-vit-base-patch32"
        )
    if quality and "inception" not in panel.shares:
        raise ValueError(
            f"--quality is {quality:g}, but the panel has no Inception Score: evaluation.network "
            f"{config.evaluation.network} gives none, or evaluation.panel_size {config.evaluation.panel_size} is too "
            "few images; leave it at 0"
        )
    # first, and then on the CPU: a GPU that trained one model need not hold two
    pretrained = None if config.lora.rank else run_policy(run, config).network.cpu()
    policy = run_policy(run, config, str(files.model))
    line = blends.WeightLine(policy.network, pretrained)
    del pretrained
    folder.mkdir(exist_ok=True)
    with blending(folder):
        reward = build_config_reward(config, device)
        _claim_blend(folder, run, config, reward.sources | panel.held_out_sources)
        front = Front(folder / "front.jsonl", line, policy, reward)
        panels = files.panels()
        before = files.read_config()
        changed = differences(config, before)
        apart = [option for option in changed if option not in _MEASURING]
        if not any(FACTS[option].panel or option in _PROMPTS for option in apart):
            code = list(edited(run, reward.sources).values())
            check = functools.partial(blends.check_pretrained, panels[0]["rewards"], edited=code)
            front.at(0.0, panel, accept=check)
        elif not (folder / "front.jsonl").exists() and (rewards := _own_rewards(run, before, config)):
            blends.check_pretrained(panels[0]["rewards"], rewards)
        records = [front.at(alpha, panel) for alpha in tqdm(alphas, desc="blend", unit="panel")]
        chosen = blends.choose(records, keep, quality)["alpha"]
        # the choice has looked at the first panel, whose figures flatter it
        other = panel.with_next_seed()
        base, *others = (front.at(alpha, other) for alpha in dict.fromkeys((0.0, 1.0, chosen)))
        write_atomically(folder / "front.png", blend_front(records, chosen=chosen, keep=keep))
        result = {
            "alpha": chosen,
            "most": max(alphas),
            "keep": keep,
            "quality": quality,
            "panels": [blends.summary(record, base) for record in (base, *others)],
        }
        # of an earlier choice
        (folder / "blend.json").unlink(missing_ok=True)
        remove_folder(folder / "model")
        if chosen:
            line.move(chosen)
            described = replace(config, evaluation=replace(config.evaluation, seed=other.seed))
            _save(folder / "model", policy, described, run, [base, others[-1]])
        write_atomically(folder / "blend.json", json.dumps(result, indent=1).encode())
    return blends.blend_lines(result)


def _save(folder: Path, policy: Policy, config: Config, run: Path, panels: Sequence[dict[str, Any]]) -> None:
    """The policy as a model, with a card of two panels: the pretrained model's and the blend's."""
    tuned = RunFiles(run).model_iteration()
    table = [{**panel, "iteration": iteration} for panel, iteration in zip(panels, (0, tuned), strict=True)]
    save_model(folder, policy, config, table, tuned, alpha=panels[1]["alpha"])


def _own_rewards(run: Path, before: Config, config: Config) -> Sequence[float]:
    """Rewards of a run's own first panel from the pretrained model that `config` names.

    Empty where the run's reward or prompts went with its script and can't be built: the digest of the weights, which
    `run_policy` has held, must do then.
    """
    evaluation = replace(before.evaluation, network=config.evaluation.network, rewards=[])
    before = replace(before, model=config.model, run=config.run, lora=LoraConfig(), evaluation=evaluation)
    device = choose_device(before.run.device)
    try:
        panel, reward = build_panel(before, device, build_prompts(before)[0]), build_config_reward(before, device)
    except ValueError:
        if BASE in read_sources(run):
            return []
        raise
    return panel.evaluate(build_policy(before), reward).rewards


def _claim_blend(folder: Path, run: Path, config: Config, sources: Mapping[str, Mapping[str, str] | None]) -> None:
    """Begin RUN/blend, or go on in it where panels would be equal.

    Args:
        sources: of the reward and the held-out ones, as `source_of` gives them.

    Raises:
        ValueError: it holds panels of other settings or of another tuned model; says which. Or its settings.json is
            damaged.
    """
    weights = {str(file.relative_to(run)): sha256(file) for file in sorted(RunFiles(run).model.rglob("*.safetensors"))}
    options = {name: asdict(getattr(config, name)) for name in ("model", "sample", "reward", "prompts", "evaluation")}
    sections = {name: without_credentials(section) for name, section in options.items()}
    # a credential tells two rewards apart too
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
    now = {"precision": config.compute.precision, **sections, "weights": weights, _DIGEST: digest}
    if code := {name: source["sha256"] for name, source in sources.items() if source}:
        now["code of the reward"] = code
    path, front = folder / "settings.json", folder / "front.jsonl"
    # a try that was refused before its first panel holds nobody to its settings
    begun = path.exists() and front.exists() and front.stat().st_size > 0
    before = read_object(path, f"restore it, or move {folder} away to begin again") if begun else now
    # an older file has no digest, and credentials
    before = {_DIGEST: digest} | {name: without_credentials(value) for name, value in before.items()}
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(f"{folder} holds blends of another {name}; move it away, or use its own ({path} has it)")
    write_atomically(path, json.dumps(now, indent=1).encode())
