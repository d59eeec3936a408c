"""Events: what the rules of `stop` see in a run's lines, in events.jsonl; on the main rank.

An event is written before the line that it is about and known by its iteration and name: a run that is killed in
between evaluates that line again, to the same event, and writes it once. What the rules remember is read from the lines
that a resumed run goes on after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hrf_fast.config.credentials import without_credentials
from hrf_fast.evaluation.diversity import mean_of
from hrf_fast.evaluation.kept import LEAST, halves, kept_interval
from hrf_fast.evaluation.neighbours import inside
from hrf_fast.evaluation.panel import PanelMetrics
from hrf_fast.run.folder import PRETRAINED, RunFolder
from hrf_fast.run.layout import EVENTS
from hrf_fast.stopping import Event, StopRules, above_floors, by_merit, check_first_panel, floors, unwatched_note

# the pretrained panel's features among its halves
FEATURES = "features"


class EventLog:
    """The rules of one run and the events that they have found."""

    def __init__(self, folder: RunFolder, note: Callable[[str], None]) -> None:
        """`note` shows the user a line."""
        self._folder, self._note = folder, note
        self._stop, self._seed = folder.config.stop, folder.config.evaluation.seed
        self._watch = StopRules(self._stop, seed=self._seed)
        self._known: set[tuple[Any, ...]] = set()
        self._pretrained: Mapping[str, Tensor] = {}
        self._failure: str | None = None
        self._done = 0

    def begin(self, done: int) -> None:
        """Read the lines of the first `done` iterations again, of which the folder has no later ones.

        Raises:
            ValueError: the run began without what a floor under precision compares with.
        """
        self._done = done
        self._known = {_key(record) for record in self._folder.events()}
        self._pretrained = self._folder.pretrained()
        if self._pretrained and FEATURES not in self._pretrained and self._stop.quality == "precision":
            lacks = (
                f"can't be judged: {self._folder.path / PRETRAINED} lacks the features that stop.quality=precision "
                "compares with, since the run began without; set stop.quality=inception, or begin again in another "
                "run.folder"
            )
            if self._stop.on_collapse != "warn" or self._stop.quality_floor:
                raise ValueError(f"stop.quality_floor {lacks}")
            self._note(f"quality {lacks}")
        for record, panel in self._folder.lines():
            (self._watch.panel if panel else self._watch.iteration)(record)

    @property
    def ending(self) -> str | None:
        """A rule's reason to end the run after the lines so far."""
        return self._failure or self._watch.ending

    @property
    def restores(self) -> bool:
        """Whether the best checkpoint's weights are to be the tuned model: where a rule has ended the run, and where it
        has reached its end with a panel that does not keep the floors."""
        if not self.keeps_pretrained:
            return False
        return self.ending is not None or not above_floors(self._folder.panels()[-1], self._stop)

    @property
    def keeps_pretrained(self) -> bool:
        """Whether a run may come back to its pretrained weights."""
        return self._stop.on_collapse == "restore_best"

    def iteration(self, record: dict[str, Any]) -> None:
        """Hear of a line of metrics.jsonl before it is written."""
        self._write(self._watch.iteration(record))
        self._done = record["iteration"] + 1

    def panel(self, record: dict[str, Any], panel: PanelMetrics) -> dict[str, Any]:
        """Hear of a line of evaluations.jsonl before it is written; returns it with the shares that are kept.

        Raises:
            ValueError: the first panel, or the absence of its file, makes a floor one that can't be judged.
        """
        if record["iteration"] == 0:
            check_first_panel(self._stop, record)
            if line := unwatched_note(self._stop, record, panel.halves):
                self._note(line)
            features = self._features(panel)
            self._pretrained = {**panel.halves, **({} if features is None else {FEATURES: features})}
            if self._pretrained:
                self._folder.save_pretrained(self._pretrained)
        else:
            self._check_pretrained(panel)
            shares = {
                name: list(kept_interval(self._pretrained[name], values, panel.samples[name]))
                for name, values in panel.halves.items()
                if name in self._pretrained
            }
            features = self._features(panel)
            if features is not None and FEATURES in self._pretrained:
                before, after = (self._precision(of) for of in (self._pretrained[FEATURES], features))
                shares["precision"] = list(kept_interval(before, after, len(features)))
            # the long list stays at the end of the line
            rewards = record.pop("rewards")
            record |= ({"kept": shares} if shares else {}) | {"rewards": rewards}
        self._write(self._watch.panel(record))
        return record

    def _features(self, panel: PanelMetrics) -> Tensor | None:
        """The features of a panel whose precision is judged."""
        if self._stop.quality != "precision" or panel.features is None or len(panel.features) < LEAST:
            return None
        return panel.features.float()

    def _precision(self, features: Tensor) -> Tensor:
        """The halves of a panel's precision; half an image more on both sides gives a share of none an interval too."""
        near = inside(self._pretrained[FEATURES], features, same_noise=True)
        count = len(near)
        return (halves(mean_of(near), count, seed=self._seed) * count + 0.5) / (count + 1)

    def _check_pretrained(self, panel: PanelMetrics) -> None:
        measured = {*panel.halves, *([] if self._features(panel) is None else ["precision"])}
        known = {"precision" if name == FEATURES else name for name in self._pretrained}
        # an older version had no Inception Score by a classifier of the hub, and nobody has asked for its floor
        unasked = {"stop.quality_floor"} if known and self._stop.quality_floor is None else set()
        watched = floors(self._stop, measured).items()
        lacking = [option for name, (option, _) in watched if name not in known and option not in unasked]
        if lacking and self._stop.on_collapse != "warn":
            raise ValueError(
                f"{lacking[0]} can't be judged: {self._folder.path / PRETRAINED}, which panels are compared with, is "
                "gone, or the run began without it; set stop.on_collapse=warn, or begin again in another run.folder"
            )

    def error(self, text: str) -> None:
        """Write that the next iteration has failed; reports show it, so without logins and tokens of addresses."""
        self._write([Event(self._done + 1, "error", without_credentials(text))])

    def failure(self, text: str) -> str | None:
        """Write that the next iteration has failed; returns the reason to end in order where the best is restored.

        Before the first panel there is none.
        """
        self.error(text)
        self._failure = text if self.keeps_pretrained and self._folder.panels() else None
        return self._failure

    def resumed(self, lines: Sequence[str]) -> None:
        """Write what a resumed run has otherwise than before: edited code, lost lines."""
        if lines:
            self._write([Event(self._done, "changed", "; ".join(lines))])

    def end(self, reason: str, model: int) -> None:
        """Write why the run has ended, and of how many iterations its tuned model is."""
        end = Event(self._done, "end", reason, {"model": model})
        # a run may end at one iteration several times: for another reason, or with another model restored
        if [event for event in self._folder.events() if event["event"] == "end"][-1:] != [end.record()]:
            self._append(end)

    def _write(self, events: Sequence[Event]) -> None:
        for event in events:
            record = event.record()
            if _key(record) in self._known:
                continue
            self._known.add(_key(record))
            self._append(event)
            if event.event not in ("error", "changed"):
                self._note(f"after {event.iteration} iterations: {event.text}")

    def _append(self, event: Event) -> None:
        self._folder.append(EVENTS, event.record())

    def best(self) -> dict[str, Any] | None:
        """The panel whose checkpoint is the best: of highest reward above the floors; None before there is one.

        The pretrained model's counts where the run may come back to it.
        """
        ranked = self.ranked()
        return ranked[0] if ranked else None

    def ranked(self) -> list[dict[str, Any]]:
        """The panels that may be restored, the best first."""
        first = 0 if self.keeps_pretrained else 1
        return by_merit([panel for panel in self._folder.panels() if panel["iteration"] >= first], self._stop)

    def best_panel(self) -> dict[str, Any]:
        """The best of all panels, by the same rule; the pretrained model's is always above the floors."""
        return by_merit(self._folder.panels(), self._stop)[0]


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """An event's identity: a rule finds one thing at an iteration, but it may fail or be changed in several ways."""
    return record["iteration"], record["event"], record["text"] if record["event"] in ("error", "changed") else ""
