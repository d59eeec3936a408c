"""Executes a PTX entry on the CPU: all threads of a batch of CTAs in lock step, one numpy array per register.

Each statement is decoded once, to a function of the batch. Threads that branch apart get a program counter each, and
those at the lowest one run until they meet the next ones. Batches follow one another, so that CTAs cannot talk to
each other; atomics are not there. Lock step also hides races: a missing barrier goes unseen where the order of the
statements happens to be right. LLVM may read a register that nobody wrote where its bits do not matter (seen where it
packs bytes); that raises like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

from tests.ptx import arithmetic, conversion, logic, movement  # noqa: F401 (three register their opcodes)
from tests.ptx.batch import Batch, Operands, Source
from tests.ptx.memory import WARP, GlobalMemory, OwnedMemory, Region
from tests.ptx.opcodes import PRED, Opcode, decode
from tests.ptx.parser import PtxError, Statement, UnsupportedInstruction, parse

THREADS_AT_ONCE = 16384
"""Of a batch: the fastest of 2048 to 65536 for a kernel of some hundred instructions."""


class DivergentBarrier(PtxError):
    """Live threads of one CTA wait at different barriers, so that none is ever complete."""


class Step(NamedTuple):
    """A decoded statement. Control flow (bra, ret, bar) has no `run`."""

    statement: Statement
    run: Callable[[Batch], None] | None
    control: str = ""
    guard: Source | None = None
    target: int = 0


class Program:
    """A decoded entry of a PTX module."""

    def __init__(self, text: str, name: str) -> None:
        self.kernel = parse(text, name)
        symbols, self.constants = {}, []
        self.sizes = {"shared": 0, "local": 0}
        for name, (space, offset, size, data) in self.kernel.variables.items():
            if data is not None:
                symbols[name] = data.ctypes.data
                self.constants.append(Region(name, data.ctypes.data, size))
            elif space in self.sizes:
                symbols[name] = offset
                self.sizes[space] = max(self.sizes[space], offset + size)
        self.operands = Operands(self.kernel, symbols)
        self.steps = []
        for statement in self.kernel.statements:
            try:
                self.steps.append(self._decode(statement))
            except PtxError as error:
                raise type(error)(self._where(statement, error)) from None

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        params: dict[str, bytes],
        regions: list[Region],
        dynamic_shared: int = 0,
    ) -> None:
        """Run every CTA of the grid; `dynamic_shared` bytes lie behind the declared shared variables."""
        if threads % WARP or self.kernel.threads not in (None, threads):
            raise PtxError(f"{self.kernel.name} is for {self.kernel.threads} threads, not {threads}")
        total, at_once = int(np.prod(grid)), max(1, THREADS_AT_ONCE // threads)
        memory = GlobalMemory(regions + self.constants)
        for first in range(0, total, at_once):
            batch = Batch(len(self.kernel.registers), np.arange(first, min(first + at_once, total)), grid, threads)
            cta = batch.everyone // threads
            batch.params = params
            batch.spaces["global"] = memory
            batch.spaces["shared"] = OwnedMemory("shared", self.sizes["shared"] + dynamic_shared, cta)
            batch.spaces["local"] = OwnedMemory("local", self.sizes["local"], batch.everyone)
            with np.errstate(all="ignore"):
                self._run(batch)

    def _where(self, statement: Statement, error: Exception) -> str:
        return f"{self.kernel.name}, PTX line {statement.line}: {statement.text}: {error}"

    # --- control flow -------------------------------------------------------------------------------------------------

    def _run(self, batch: Batch) -> None:
        steps, end = self.steps, len(self.steps)
        counters, waiting = np.zeros(batch.count, np.int64), np.zeros(batch.count, bool)
        pc, limit = 0, end  # the active threads run from pc; others start at limit
        step = steps[0] if steps else None
        try:
            while pc < end:
                step = steps[pc]
                if step.run is not None:
                    step.run(batch)
                    pc += 1
                    if pc < limit:
                        continue
                    counters[slice(None) if batch.active is None else batch.active] = pc
                else:
                    taken = step.guard(batch) if step.guard else np.ones(1, bool)
                    if batch.active is None and step.control != "exit" and (taken.all() or not taken.any()):
                        pc = step.target if taken[0] else pc + 1  # all threads go the same way
                        continue
                    if batch.active is not None:
                        taken = taken & batch.active
                    counters[slice(None) if batch.active is None else batch.active] = pc + 1
                    if step.control == "bar":
                        waiting |= taken
                    else:
                        np.putmask(counters, np.broadcast_to(taken, batch.count), step.target)
                pc, limit = self._schedule(batch, counters, waiting)
        except PtxError as error:
            raise type(error)(self._where(step.statement, error)) from None

    def _schedule(self, batch: Batch, counters: Array, waiting: Array) -> tuple[int, int]:
        """Activate the threads at the lowest program counter; returns it, and the next one of other threads."""
        end = len(self.steps)
        live = counters < end
        if not live.any():
            return end, end
        ready = live & ~waiting
        if not ready.any():
            # nobody can go on before a barrier opens: it does where the whole CTA has come to the same one
            table, alive = counters.reshape(-1, batch.threads), live.reshape(-1, batch.threads)
            lowest, highest = np.where(alive, table, end).min(1), np.where(alive, table, -1).max(1)
            if (alive.any(1) & (lowest != highest)).any():
                raise DivergentBarrier("the live threads of a CTA wait at different barriers")
            waiting[:] = False
            ready = live
        pc = int(counters[ready].min())
        active = ready & (counters == pc)
        others = counters[ready & ~active]
        batch.active = None if active.all() else active
        return pc, int(others.min()) if len(others) else end

    def _decode_control(self, statement: Statement, opcode: Opcode, guard: Source | None) -> Step:
        operands = statement.operands
        if opcode.root == "bra":
            opcode.has("uni")
            opcode.finish()
            if operands[0] not in self.kernel.labels:
                raise UnsupportedInstruction(f"there is no label {operands[0]}")
            return Step(statement, None, "bra", guard, self.kernel.labels[operands[0]])
        if opcode.root in ("ret", "exit"):
            opcode.finish()
            return Step(statement, None, "exit", guard, len(self.kernel.statements))
        opcode.one_of("cta", default="")
        opcode.one_of("sync")
        aligned = opcode.has("aligned") or opcode.root == "bar"
        opcode.finish()
        if operands != ("0",) or not aligned:
            raise UnsupportedInstruction("only barrier 0, of all threads of the CTA, is there")
        return Step(statement, None, "bar", guard, len(self.steps) + 1)

    # --- statements ---------------------------------------------------------------------------------------------------

    def _decode(self, statement: Statement) -> Step:
        guard = self.operands.source(statement.guard, PRED) if statement.guard else None
        opcode = Opcode(statement.opcode)
        if opcode.root in ("bra", "ret", "exit", "bar", "barrier") and "warp" not in opcode.modifiers:
            return self._decode_control(statement, opcode, guard)
        if opcode.root == "mov" and any(isinstance(operand, tuple) for operand in statement.operands):
            run = movement.pack(self.operands, opcode, statement.operands)
        elif opcode.root in movement.MOVES:
            run = movement.MOVES[opcode.root](self.operands, opcode, statement.operands)
        else:
            run = self._compute(statement)
        return Step(statement, _guarded(run, guard) if guard else run)

    def _compute(self, statement: Statement) -> Callable[[Batch], None]:
        results, arguments, compute = decode(statement.opcode)
        first, *rest = statement.operands
        destinations = list(first.split("|")) if isinstance(first, str) else []
        root, *modifiers = statement.opcode.split(".")
        if "cc" in modifiers:
            destinations.append("%cc")
        if root in ("addc", "madc"):
            rest.append("%cc")
        if len(destinations) > len(results) or len(rest) != len(arguments):
            raise UnsupportedInstruction("the number of operands")
        relaxed, of = root == "cvt", self.operands
        sources = [of.source(text, format, relaxed=relaxed) for text, format in zip(rest, arguments, strict=True)]
        sinks = [of.sink(text, format, relaxed=relaxed) for text, format in zip(destinations, results, strict=False)]
        if len(results) > 1:

            def run(batch: Batch) -> None:
                for sink, values in zip(sinks, compute(*[source(batch) for source in sources]), strict=False):
                    sink(batch, values)

            return run
        sink = sinks[0]
        return lambda batch: sink(batch, compute(*[source(batch) for source in sources]))


def _guarded(run: Callable[[Batch], None], guard: Source) -> Callable[[Batch], None]:
    """`@%p` instruction: only the threads whose predicate holds."""

    def guarded(batch: Batch) -> None:
        outer, taken = batch.active, guard(batch)
        if outer is not None:
            taken = taken & outer
        if taken.all():
            run(batch)
        elif taken.any():
            batch.active = taken
            try:
                run(batch)
            finally:
                batch.active = outer

    return guarded
