"""Run: one training run from its start to its end, on all ranks alike: time, interrupts, logs, checkpoints, listeners.

What a checkpoint may hold is said by two calls: `unbroken()` before the first update of an iteration, `log(record,
state)` after its last. In between the weights stand for no iteration, so Ctrl-C waits and nothing is saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import torch

from hrf_fast.config.options import Config
from hrf_fast.distributed import comm
from hrf_fast.engines.base import Engine
from hrf_fast.errors import NotWritten
from hrf_fast.evaluation.grids import SHOWN
from hrf_fast.evaluation.panel import PanelMetrics
from hrf_fast.policies.base import Policy
from hrf_fast.run.audience import Audience
from hrf_fast.run.checkpoint import load_first_intact, load_newest, save_checkpoint
from hrf_fast.run.events import EventLog
from hrf_fast.run.folder import RunFolder
from hrf_fast.run.interrupts import Interrupts
from hrf_fast.run.layout import METRICS
from hrf_fast.run.listeners import Listener, check_listeners
from hrf_fast.run.progress import Progress, Silence, build_progress
from hrf_fast.run.result import RunResult
from hrf_fast.run.sources import check_policy_kind
from hrf_fast.run.writers import build_writers


class Run:
    """One run's session; use as a context manager."""

    def __init__(self, config: Config, listeners: Sequence[Listener] = ()) -> None:
        self.config = config
        self.folder = RunFolder(config)
        self.reason = "an error"
        heard = check_listeners(listeners)
        comm.main_says(self.folder.claim)
        self.progress: Progress = build_progress(config.run.progress) if comm.is_main() else Silence()
        self._audience = Audience(heard, self.progress, self.note_once)
        self._events = EventLog(self.folder, self.note)
        self._stdout = redirect_stdout(self.progress.prints)
        self.interrupts = Interrupts(self.progress.note)
        self._seconds: dict[str, float] = {}
        self._began = 0.0
        # iterations in the newest checkpoint; None before there is one
        self._saved: int | None = None
        # what a checkpoint would hold beside the weights; None while these stand for no iteration
        self._state: dict[str, Any] | None = None
        self._unbroken = False
        self._claimed = False  # the folder may be another run's
        self._noted: set[str] = set()

    def __enter__(self) -> Run:
        self.interrupts.__enter__()
        self._stdout.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if self._unbroken:
            self._unbroken = False
            self.interrupts.release()
        self.interrupts.__exit__(kind)
        if kind is not None:
            self.reason = "a signal" if issubclass(kind, KeyboardInterrupt) else f"an error ({kind.__name__})"
        try:
            if comm.is_main():
                self._audience.finish(self.reason, failing=kind is not None)
        finally:
            self._stdout.__exit__(kind, *rest)
            self.folder.release()

    def note(self, text: str) -> None:
        """Show the user a line, if it says anything."""
        if text:
            self.progress.note(text)

    def note_once(self, text: str, key: str) -> None:
        """Show a line unless one of this key was shown before."""
        if key not in self._noted:
            self._noted.add(key)
            self.note(text)

    def load(self, engine: Engine, sources: Mapping[str, dict[str, str]]) -> dict[str, Any] | None:
        """Restore the newest intact checkpoint; returns the state that was committed, or None without one.

        Raises:
            ValueError: see `check_policy_kind`.
        """
        comm.main_says(lambda: check_policy_kind(self.folder.path, sources))
        return load_newest(self.folder.checkpoints, engine, warn=self.note)

    def begin(self, done: int, sources: Mapping[str, dict[str, str]] | None = None) -> None:
        """Start, or go on after `done` iterations: from here on the folder is this configuration's.

        Args:
            sources: the user's code by name, as `source_of` gives it.

        Raises:
            ValueError: see `RunFolder.begin`.
            ImportError: the package of a writer is missing.
        """
        self._saved = done or None

        def begin() -> None:
            lines = self.folder.begin(done, sources or {})
            self._events.begin(done)
            for line in lines:
                self.note(line)
            self._events.resumed(lines)
            self._audience.begin(build_writers(self.folder))

        comm.main_says(begin)
        self._claimed = True

    def ending(self) -> str | None:
        """A rule's reason to end the run after the lines that are logged so far, on all ranks."""
        return comm.main_says(lambda: self._events.ending)

    def begin_iteration(self) -> None:
        """Let time belong to the next line of the log from here on; panels and checkpoints belong to none."""
        self._seconds, self._began = {}, time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's time to the iteration's `seconds` and show its name."""
        self.interrupts.stop_if_asked()
        self.progress.phase(name)
        started = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def unbroken(self) -> None:
        """Let Ctrl-C wait and nothing be saved until `commit`: the weights stand for no iteration."""
        if not self._unbroken:
            # first, so that a Ctrl-C before it still finds the state that is to be saved
            self.interrupts.hold()
            self._unbroken, self._state = True, None

    def commit(self, state: dict[str, Any]) -> None:
        """Let the weights stand for `state`, JSON-able and with `iteration`; a Ctrl-C that has waited stops the run."""
        self._state = state
        if self._unbroken:
            self._unbroken = False
            self.interrupts.release()
            self.interrupts.stop_if_asked()

    def save(self, engine: Engine) -> None:
        """Write a checkpoint of the committed state; a no-op where there is none, or where it is saved already."""
        if self._state is None or self._state["iteration"] == self._saved:
            return
        if self._state["iteration"] == 0 and not self._events.keeps_pretrained:
            return
        run = self.config.run
        with self.interrupts.held():
            best = self.best() if self.keeps_best else None
            save_checkpoint(self.folder.checkpoints, engine, self._state, keep=run.keep_checkpoints, best=best)
            self._saved = self._state["iteration"]

    @contextmanager
    def saving_on_error(self, engine: Engine) -> Iterator[None]:
        """Save before an error ends the run, unless files can't be written, weights diverged or other ranks can't."""
        try:
            yield
        except BaseException as error:
            together = comm.world_size() == 1 or comm.said_by_main(error)
            if together and not isinstance(error, (NotWritten, FloatingPointError)):
                self.save(engine)
            if together and self._claimed and isinstance(error, Exception) and not isinstance(error, OSError):
                text = str(error) or type(error).__name__
                with suppress(OSError):
                    comm.main_says(lambda: self._events.error(text))
            raise

    def log(self, record: dict[str, Any], state: dict[str, Any], *, images: int, network_seconds: float) -> str | None:
        """Write the metrics line of a finished iteration, tell the listeners and commit `state`.

        `overhead` is the iteration's time over that of its network calls, forwards and backwards.

        Args:
            record: the line less its times; state: see `commit`; images: how many were trained on.

        Returns:
            A listener's or a rule's reason to end the run, on all ranks.
        """
        total = time.perf_counter() - self._began
        times = {
            "seconds": self._seconds | {"other": total - sum(self._seconds.values())},
            "speed": {
                "images_per_second": images / total,
                "unet_seconds": network_seconds,
                "overhead": total / network_seconds,
            },
        }
        rounded = {name: {k: round(v, 4) for k, v in values.items()} for name, values in times.items()}
        line = record | rounded

        def write() -> None:
            self._events.iteration(line)
            self.folder.append(METRICS, line)

        comm.main_says(write)
        # from here on the iteration can be saved, whatever a listener raises
        self._state = state
        asked = comm.main_says(lambda: self._audience.tell("iteration", line) or self._events.ending)
        self.commit(state)
        return asked

    def log_panel(self, iteration: int, evaluations: int, panel: PanelMetrics) -> str | None:
        """Write the evaluation line and the panel's PNG grid, and tell the listeners; returns as `log`."""
        line = {"iteration": iteration, "evaluations": evaluations, **panel.record()}
        shown = panel.images[:SHOWN]

        def write() -> str | None:
            record = self._events.panel(line, panel)
            self.folder.append_panel(record, shown)
            return self._audience.tell("panel", record, shown) or self._events.ending

        return comm.main_says(write)

    def panels(self) -> list[dict[str, Any]]:
        """The lines of evaluations.jsonl, on all ranks."""
        return comm.main_says(self.folder.panels)

    def has_panel(self, iteration: int) -> bool:
        """Whether the panel after `iteration` iterations has been evaluated and logged."""
        return comm.main_says(lambda: any(record["iteration"] == iteration for record in self.folder.panels()))

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint of the best panel is kept whatever its age."""
        return self.config.run.keep_best or self._events.keeps_pretrained

    def best(self) -> int | None:
        """After how many iterations the panel was best by the rule of `EventLog.best`; None before there is one."""
        best = comm.main_says(self._events.best)
        return None if best is None else best["iteration"]

    def reason_of(self, loop: Callable[[], str]) -> str:
        """Why `loop` has ended: what it returns, or the failure of an iteration where the best checkpoint is restored.

        Raises:
            FloatingPointError: an iteration has failed; an event says so.
        """
        try:
            return loop()
        except FloatingPointError as error:
            reason = None
            if comm.world_size() == 1 or comm.said_by_main(error):
                text = str(error)
                reason = comm.main_says(lambda: self._events.failure(text))
            if reason is None:
                raise
            self.note(reason)
            return reason

    def finish(self, policy: Policy, engine: Engine, reason: str) -> RunResult:
        """Write the tuned model, averaged if there is an average, as a diffusers folder.

        It is of the last iteration, or of the best checkpoint where stop.on_collapse is restore_best and a rule has
        ended the run or its last panel does not keep the floors.
        """
        self.reason = reason
        model: int = self.panels()[-1]["iteration"]
        if comm.main_says(lambda: self._events.restores):
            ranked = [panel["iteration"] for panel in comm.main_says(self._events.ranked)]
            state = load_first_intact(self.folder.checkpoints, ranked, engine, warn=self.note)
            if state is None:
                raise ValueError(
                    f"stop.on_collapse is restore_best, but {self.folder.checkpoints} has no intact checkpoint after "
                    f"any of {ranked} iterations; set stop.on_collapse=stop to have the last weights as the tuned model"
                )
            model = state["iteration"]
            text = f"the tuned model is that after {model} iterations, the best above the floors"
            if better := ", ".join(map(str, ranked[: ranked.index(model)])):
                text += f" that has a checkpoint (those after {better} were better)"
            self.note(text if model else f"{text}: nothing is learnt; train more gently, or lower the floors of stop")
        with engine.gathered(ema=True):
            comm.main_says(lambda: self.folder.save_model(policy, model))
        comm.main_says(lambda: self._events.end(reason, model))
        panels = self.panels()
        tuned = next(panel for panel in panels if panel["iteration"] == model)
        return RunResult(self.folder.path, reason, tuned, panels[-1], comm.main_says(self._events.best_panel))
