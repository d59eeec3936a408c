"""Signal and noise of the gradient by start and by step: how much of one optimizer step is direction, how much chance.

    hrf bench signal --starts ddpo 0 5 10 14 --groups 24 train.group_size=8
    hrf bench signal --starts ddpo 5 --groups 12 --config configs/peeps.yaml
    hrf bench signal --starts ddpo 10 --groups 24 model.name=fashion window.shared_noise=true train.gae_lambda=0

The words after the options are a configuration, of which what makes advantages and weighs steps has no part here: every
group is standardised by itself without a floor, and there are no clips, no remedies and no schedule. At the pretrained
weights, groups of each start are rolled out and rewarded, and the gradient of every group's loss is taken step by step.
`ddpo` starts from pure noise; a number takes an anchor of each group back to that step. With n groups of gradients g_k
at step k and step weights w_k:

    g = Σ w_k g_k of a group,   noise = tr Cov(g),   signal = |mean of g|² − noise/n,   ratio = signal/noise per group

A step that averages 1/ratio groups is half noise (McCandlish et al., arXiv 1812.06162). A ratio may come out negative
where n groups are too few to tell the signal from 0. The weights: equal, as published; std, see train.step_weights; and
equal without the last step, to show what that step alone does. The groups of all numbered starts are put together too,
as a step of HRF has them. Writes signal.json after each start, and in the end signal.md and signal.png: the ratios of
the numbered starts, with those of other measurements that `--beside` names.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.machine import describe, machine
from benchmarks.tables import markdown_table
from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.distributed import comm
from hrf_fast.noise import NoiseKey, noise_key
from hrf_fast.policies.sample import sample
from hrf_fast.report.plots import Series, interval_curves
from hrf_fast.training.advantages import group as peers
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.collect import group_noise
from hrf_fast.training.components import Components
from hrf_fast.training.credit import standardise
from hrf_fast.training.groups import Group
from hrf_fast.training.optimizer_step import Clips, call_surrogate
from hrf_fast.training.rewarding import gather_rewards
from hrf_fast.training.rollout import rollout
from hrf_fast.windows.base import Window, with_noise

HEAD = ("start", "spread of a group's rewards", "ratio, equal", "ratio, equal less the last step", "ratio, std")


def gradients(components: Components, start: int | None, number: int) -> tuple[Tensor, float]:
    """Gradients [S, P] of one group's loss by window step, at equal weights, and the spread of its rewards.

    Args:
        start: None for pure noise; number: of the group.
    """
    policy, groups, seed = components.policy, components.groups, components.algorithm.seed
    prompts = [components.draw_prompts(number)[0]]
    anchor = None
    if start is not None:
        key = NoiseKey(noise_key(seed, number, "anchors"), torch.zeros(1, dtype=torch.int64, device=policy.device))
        anchor = sample(policy, key, prompts, images_per_call=1, guided=components.algorithm.guided)[0]
    (window,) = with_noise([Window(start or 0, policy.sampler.stochastic_steps)], components.algorithm.shared_noise)
    noise = group_noise(components, number, "rollout", 0)
    condition = policy.condition(prompts, guided=components.algorithm.guided).expand(groups.size)
    group = Group(0, window, noise, condition, anchor, prompts[0])
    gae_lambda = components.algorithm.gae_lambda
    plan = CallPlan(groups.size, 0, "on_policy")
    rolled_out = rollout(policy, [group], plan, keep_from=window.start, estimate=gae_lambda is not None)
    trajectory = rolled_out.trajectories[0]
    states = {"estimates": rolled_out.estimates, "after": rolled_out.after}
    pending = components.rewarder.submit(rolled_out.images, {0: prompts[0]}, **states)
    rewarded = gather_rewards([pending], iteration=number, skip_not_finite=False)
    advantages = standardise(rewarded, peers(advantage_floor=1e-9), policy.device, gae_lambda=gae_lambda)
    clips = Clips(clip_range=1e9, advantage_clip=math.inf, scale_by_window=False)
    weights = [parameter for parameter in policy.network.parameters() if parameter.requires_grad]
    by_step = []
    for call in rolled_out.calls:
        surrogate = call_surrogate(policy, {0: trajectory}, advantages, call, clips, loss_weight=1 / groups.size)
        parts = torch.autograd.grad(surrogate.loss.sum(), weights, allow_unused=True)
        by_step.append(torch.cat([part.flatten() for part in parts if part is not None]))
    rewards = rewarded[0].rewards
    assert rewards is not None, "what is not finite is not skipped"
    return torch.stack(by_step), float(rewards.double().std())


def weightings(std: Tensor, mean: float) -> dict[str, Tensor]:
    """The step weights [S] that are compared, for steps of these std.

    Args:
        mean: std of all stochastic steps, by which train.step_weights=std divides: late windows have small weights.
    """
    equal = torch.ones_like(std)
    return {"equal": equal, "without_last": torch.cat([equal[:-1], equal.new_zeros(1)]), "std": std / mean}


def ratio(total: Tensor, squares: float, count: int) -> float:
    """Signal over noise of one group's gradient; NaN where there is no noise.

    Args:
        total: [P], sum of the gradients of `count` groups; squares: sum of their squared norms.
    """
    mean_square = float((total / count).square().sum())
    noise = (squares / count - mean_square) * count / (count - 1)
    return (mean_square - noise / count) / noise if noise > 0 else math.nan


class Mixture:
    """Gradients of groups of several starts, as an optimizer step averages them, under powers of each group's spread.

    Power 0 is the standardised advantage, 1 the advantage in units of the reward (train.advantage_scale=none).
    """

    powers = (0.0, 0.5, 1.0)

    def __init__(self) -> None:
        self.count = 0
        self._totals: dict[float, Any] = dict.fromkeys(self.powers, 0.0)
        self._squares = dict.fromkeys(self.powers, 0.0)

    def add(self, gradient: Tensor, spread: float) -> None:
        """Add a group's gradient [P], made with standardised advantages, and the spread of its rewards."""
        self.count += 1
        for power in self.powers:
            weighted = gradient * spread**power
            self._totals[power] = self._totals[power] + weighted
            self._squares[power] += float(weighted.square().sum())

    def ratios(self) -> dict[str, float]:
        """By power, the signal over the noise of one group."""
        return {str(power): ratio(self._totals[power], self._squares[power], self.count) for power in self.powers}


def measure(components: Components, start: int | None, count: int, mixture: Mixture) -> dict[str, Any]:
    """The ratios of one start over `count` groups, which are added to the mixture too."""
    stds = components.policy.sampler.coefficients.std[: components.policy.sampler.stochastic_steps].double().cpu()
    std = stds[start or 0 :]
    kinds = weightings(std, float(stds.mean()))
    totals: dict[str, Any] = dict.fromkeys(kinds, 0.0)
    squares = dict.fromkeys(kinds, 0.0)
    by_step_squares, spreads = torch.zeros_like(std), []
    for number in tqdm(range(count), desc="ddpo" if start is None else f"start {start}", unit="group"):
        by_step, spread = gradients(components, start, number)
        spreads.append(spread)
        by_step_squares += by_step.double().square().sum(1).cpu()
        for name, weights in kinds.items():
            gradient = (weights.to(by_step)[:, None] * by_step).sum(0).double()
            totals[name], squares[name] = totals[name] + gradient, squares[name] + float(gradient.square().sum())
            if name == "std" and start is not None:
                mixture.add(gradient, spread)
    return {
        "start": "ddpo" if start is None else start,
        "groups": count,
        "spread": sum(spreads) / count,
        **{name: ratio(totals[name], squares[name], count) for name in kinds},
        "std_by_step": std.tolist(),
        # mean squared norm of a group's gradient
        "square_by_step": (by_step_squares / count).tolist(),
    }


def curves(measurements: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> list[Series]:
    """Two lines for each measurement, over its numbered starts: the ratios of equal weights and of std.

    Args:
        measurements: a name and the results of each.
    """
    lines = []
    for name, results in measurements:
        numbered = sorted((r for r in results if r["start"] != "ddpo"), key=lambda result: result["start"])
        starts = [float(result["start"]) for result in numbered]
        lines += [Series(f"{name}, {kind}", starts, [r[kind] for r in numbered]) for kind in ("equal", "std")]
    return lines


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results of a signal.json.

    Raises:
        ValueError: the file is none.
    """
    try:
        results = json.loads(path.read_text())["results"]
        curves([("", results)])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--beside {path} is no signal.json of `hrf bench signal` ({error})") from error
    return list(results)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `words` are those of the configuration.

    Raises:
        ValueError: fewer than two groups, or a configuration that can't work.
    """
    parser = argparse.ArgumentParser(
        prog="hrf bench signal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--starts", nargs="+", default=["ddpo", "0", "5", "10", "14"], help="ddpo, or a step")
    parser.add_argument("--groups", type=int, default=24, help="groups of each start, at least 2")
    parser.add_argument("--out", type=Path, default=Path("runs/signal"), help="folder of signal.json and signal.md")
    beside = "a signal.json to draw beside, named after its folder; may repeat"
    parser.add_argument("--beside", action="append", type=Path, default=[], metavar="FILE", help=beside)
    arguments, arguments.words = parser.parse_known_args(words)
    if arguments.groups < 2:
        raise ValueError(f"--groups is {arguments.groups}; noise takes at least 2")
    for start in arguments.starts:
        if start != "ddpo" and not start.isdecimal():
            raise ValueError(f"--starts has {start!r}; use ddpo, or the number of a step")
    load_config(arguments.words)
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Measure every start and print the table.

    Raises:
        ValueError: a start outside the steps, or what `parse` refuses.
    """
    arguments = parse(words)
    others = [(path.resolve().parent.name, read_results(path)) for path in arguments.beside]
    config = load_config([*arguments.words, f"run.folder={arguments.out}"])
    with comm.job(config.run.lost_after):
        _, components = build_components(replace(config, train=replace(config.train, gradient_noise=False)))
        stop = components.policy.sampler.stochastic_steps
        starts = [None if start == "ddpo" else int(start) for start in arguments.starts]
        for start in starts:
            if start is not None and not 0 <= start < stop:
                raise ValueError(f"--starts has {start}; use ddpo, or a step from 0 to {stop - 1}")
        facts = machine(components.policy.device, torch.get_num_threads())
        arguments.out.mkdir(parents=True, exist_ok=True)
        results: list[dict[str, Any]] = []
        mixture = Mixture()
        for start in starts:
            results.append(measure(components, start, arguments.groups, mixture))
            record: dict[str, Any] = {"machine": facts, "words": arguments.words, "results": results}
            if mixture.count > 1:
                record["mixture"] = {"groups": mixture.count, **mixture.ratios()}
            (arguments.out / "signal.json").write_text(json.dumps(record, indent=1) + "\n")
        rows = [[r["start"], r["spread"], r["equal"], r["without_last"], r["std"]] for r in results]
        page = f"{describe(facts)}\n\n{markdown_table(HEAD, rows)}\n"
        if mixture.count > 1:
            shown = ", ".join(f"power {power}: {value:.3g}" for power, value in mixture.ratios().items())
            page += f"\nAll numbered starts together, weights by std, groups by a power of their spread: {shown}\n"
        (arguments.out / "signal.md").write_text(page)
        lines = curves([*others, (arguments.out.resolve().name, results)])
        picture = interval_curves(lines, x_label="start of the window", y_label="signal over noise of a group")
        (arguments.out / "signal.png").write_bytes(picture)
        print(page)
