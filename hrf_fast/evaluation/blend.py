"""Blends: the weights on the line from a pretrained model through its tuned one and beyond, and which of them to take.

θ(α) = θ_pretrained + α·(θ_tuned − θ_pretrained): α = 0 is the pretrained model and α = 1 the tuned one. Between
them lie averages (WiSE-FT, arXiv 2109.01903); beyond 1 the direction that training took goes on (ExPO, arXiv
2404.16792). Left out: a line of more than two models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hrf_fast.evaluation.diversity import paired_difference_interval

# of the spread of the rewards over images: what another machine or precision may change on average
_SAME_MODEL = 0.25


class WeightLine:
    """A network that can be put at any place on the line."""

    def __init__(self, network: nn.Module, pretrained: nn.Module | None) -> None:
        """Begin at the tuned model.

        Args:
            network: with tuned weights; of adapters, those that require a gradient, α is the scale.
            pretrained: the network of the pretrained model; None for a network with adapters.

        Raises:
            ValueError: the weights are those of another architecture.
        """
        self._weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self._tuned = {name: weight.detach().cpu().clone() for name, weight in self._weights.items()}
        if pretrained is None:
            # B·A is the whole of an adapter's change
            self._pretrained = {
                name: torch.zeros_like(weight) if ".lora_B." in name else weight for name, weight in self._tuned.items()
            }
            return
        self._pretrained = {name: weight.detach().cpu() for name, weight in pretrained.named_parameters()}
        shapes, others = ({name: tuple(w.shape) for name, w in ws.items()} for ws in (self._tuned, self._pretrained))
        if shapes != others:
            name = sorted(set(shapes.items()) ^ set(others.items()))[0][0]
            raise ValueError(
                f"model.name has another architecture than the run's tuned model: {name} is {others.get(name)} in it "
                f"and {shapes.get(name)} in RUN/model; restore the model that the run began with"
            )

    @torch.no_grad()
    def move(self, alpha: float) -> None:
        """Put the network at α; at 0 and 1 its weights are those of the models to the bit."""
        for name, weight in self._weights.items():
            weight.copy_(torch.lerp(self._pretrained[name], self._tuned[name], alpha))


def read_front(path: Path) -> list[dict[str, Any]]:
    """The lines of RUN/blend/front.jsonl, panels of blends; one that is half-written or without its end is not one.

    Raises:
        ValueError: a line that is no panel of a blend, by number.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            # left by a full disk: its panel is evaluated again
            continue
        try:
            _ = float(record["alpha"]), int(record["seed"]), float(record["vendi"][0]), float(record["reward"][0])
            _ = sum(record["rewards"])
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{path}, line {number} is no panel of a blend ({error}); delete the line") from error
        records.append(record)
    return records


def steps_to(most: float, step: float) -> list[float]:
    """The α of a front: 0, then 1, then the other multiples of `step` up to `most`.

    Raises:
        ValueError: a step that is not in [0.01, 1], or a `most` that is not in [1, 100].
    """
    if not 0.01 <= step <= 1:
        raise ValueError(f"--step is {step:g}; use a number from 0.01 to 1, such as 0.2")
    if not 1 <= most <= 100:
        raise ValueError(f"--most is {most:g}; use from 1, which is the tuned model itself, to 100")
    # as written in decimals, so that a rerun finds its lines
    multiples = [round(step * count, 6) for count in range(int(most / step + 1e-9) + 1)]
    return list(dict.fromkeys([0.0, 1.0, *multiples]))


def check_pretrained(before: Sequence[float], now: Sequence[float], edited: Sequence[str] = ()) -> None:
    """Refuse a pretrained model that is not the one that the run began with.

    Args:
        before: rewards of the run's first panel; now: of the same noises at α = 0.
        edited: files of the reward that have changed since.

    Raises:
        ValueError: they differ as those of different images do.
    """
    count = min(len(before), len(now))
    first, second = (torch.tensor(list(values)[:count], dtype=torch.float64) for values in (before, now))
    spread, change = float(first.std()), float((second - first).abs().mean())
    if change > _SAME_MODEL * spread + 1e-4 * float(first.abs().max()):
        if edited:
            raise ValueError(
                f"{', '.join(edited)} has changed since the run began, and with it the rewards of its first panel; "
                "restore the file, or train again"
            )
        raise ValueError(
            "model.name is not the model that the run began with: from equal noise the rewards of its images differ by "
            f"{change:.3g} on average, and images among each other by {spread:.3g}; restore the model"
        )


def share_kept(record: Mapping[str, Any], pretrained: Mapping[str, Any], metric: str = "vendi") -> float:
    """A metric, the Vendi Score by default, as a share of the pretrained model's on the same panel."""
    return float(record[metric][0] / pretrained[metric][0])


def check_shares(keep: float, quality: float) -> None:
    """Raise ValueError for a share that the pretrained model itself does not keep, or for no diversity at all."""
    if not 0 < keep <= 1:
        raise ValueError(f"--keep is {keep:g}; use a share above 0 and at most 1, such as 0.95")
    if not 0 <= quality <= 1:
        raise ValueError(f"--quality is {quality:g}; use a share from 0, which asks for none, to 1, such as 0.95")


def choose(front: Sequence[dict[str, Any]], keep: float, quality: float = 0.0) -> dict[str, Any]:
    """The record of the highest reward above both floors.

    Args:
        front: α = 0 among them; keep, quality: least shares of its Vendi Score and, where above 0, Inception Score.
    """
    pretrained = next(record for record in front if record["alpha"] == 0)
    above = [record for record in front if share_kept(record, pretrained) >= keep]
    if quality:
        above = [record for record in above if share_kept(record, pretrained, "inception") >= quality]
    return max(above, key=lambda record: float(record["reward"][0]))


def summary(record: Mapping[str, Any], pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """A record less its single rewards, with the share kept and the gain over the pretrained model on equal noise.

    The gain is [value, low, high], a paired 95 % interval.
    """
    before, after = (torch.tensor(each["rewards"], dtype=torch.float64) for each in (pretrained, record))
    gain = paired_difference_interval(before, after, seed=record["seed"])
    figures = {name: value for name, value in record.items() if name not in ("rewards", "prompts")}
    shares = {"share": share_kept(record, pretrained)}
    if "inception" in record:
        shares["inception_share"] = share_kept(record, pretrained, "inception")
    return {**figures, **shares, "gain": list(gain)}


def blend_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines about the panels of a result: alpha (chosen), most (tried), keep, quality and panels, each a `summary`."""
    lines = []
    for panel in result["panels"]:
        alpha = panel["alpha"]
        names = [{0.0: "pretrained", 1.0: "tuned"}.get(alpha), "chosen" if alpha == result["alpha"] else None]
        named = ", ".join(filter(None, names))
        lines.append(
            f"alpha {alpha:<4g} ({named}): reward {panel['reward'][0]:.4g}, gain {panel['gain'][0]:+.4g} "
            f"[{panel['gain'][1]:+.4g}, {panel['gain'][2]:+.4g}], {panel['share']:.1%} of the Vendi Score"
            + (f", {panel['inception_share']:.1%} of the Inception Score" if "inception_share" in panel else "")
            + "".join(f", held-out {name} {interval[0]:.4g}" for name, interval in panel.get("held_out", {}).items())
        )
    quality = f", and {100 * result['quality']:g}% of the Inception Score," if result["quality"] else ""
    if not result["alpha"]:
        lines.append(
            f"no blend that keeps {100 * result['keep']:g}%{quality} has a higher reward than the pretrained model, so "
            "none is saved; lower the floor"
        )
    elif result["panels"][-1]["gain"][0] <= 0:
        lines.append("on this second panel the chosen blend gains nothing: what it had on the first one was chance")
    if result["alpha"] == result["most"]:
        lines.append(f"{result['most']:g} is the largest alpha that was tried, and a larger one may be better: --most")
    return lines
