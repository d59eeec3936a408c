"""Executes a PTX entry on the CPU: all threads of a batch of CTAs in lock step, one numpy array per register.

Each statement is decoded once, to a function of the batch. Threads that branch apart get a program counter each, and
those at the lowest one run until they meet the next ones. Batches follow one another, so that CTAs cannot talk to
each other; atomics are not there. Lock step also hides races: a missing barrier goes unseen where the order of the
statements happens to be right. LLVM reads registers in threads that have not written them where the bits do not matter:
what is made of them is unwritten too, and raises where it is stored, is an address or decides a branch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

from tests.ptx.instructions import INSTRUCTIONS, TYPES, Operands, Source
from tests.ptx.memory import WARP, Batch, Grid, Region, rows
from tests.ptx.parser import Address, Operand, PtxError, Statement, UnsupportedInstruction, parse

THREADS_AT_ONCE = 16384
"""Of a batch: the fastest of 2048 to 65536 for a kernel of some hundred instructions."""

_PARAMETER = re.compile(r"ld\.param\.([bus](?:32|64))")
_MATRIX = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16")
_ACCESS = re.compile(r"(ld|st)\.(global|shared)(?:\.v([24]))?\.(b(?:8|16|32|64))")

Run = Callable[[Batch], None]


class Step(NamedTuple):
    """A decoded statement. Control flow (bra, ret, bar) has no `run`."""

    statement: Statement
    run: Run | None
    guard: Source | None
    target: int = 0
    """Where control goes on to."""


class Program:
    """A decoded entry of a PTX module."""

    def __init__(self, text: str, name: str) -> None:
        self.kernel = parse(text, name)
        self.operands = Operands(self.kernel)
        self.steps: list[Step] = []
        for statement in self.kernel.statements:
            try:
                self.steps.append(self._decode(statement))
            except PtxError as error:
                raise type(error)(self._where(statement, error)) from None

    def launch(
        self, grid: Grid, threads: int, params: dict[str, bytes], regions: list[Region], shared: int = 0
    ) -> None:
        """Run every CTA of the grid, with `shared` bytes of shared memory each."""
        if threads % WARP or self.kernel.threads != threads:
            raise PtxError(f"{self.kernel.name} is for {self.kernel.threads} threads, not {threads}")
        total, at_once = math.prod(grid), max(1, THREADS_AT_ONCE // threads)
        for first in range(0, total, at_once):
            ctas = np.arange(first, min(first + at_once, total))
            with np.errstate(all="ignore"):
                self._run(Batch(self.kernel, grid, ctas, params, regions, shared))

    def _where(self, statement: Statement, error: Exception) -> str:
        return f"{self.kernel.name}, PTX line {statement.line}: {statement.text}: {error}"

    # --- control flow -------------------------------------------------------------------------------------------------

    def _run(self, batch: Batch) -> None:
        end = len(self.steps)
        counters, waiting = np.zeros(batch.count, np.int64), np.zeros(batch.count, bool)
        pc, limit = 0, end  # the active threads run from pc; others start at limit
        while pc < end:
            step, batch.unwritten = self.steps[pc], None
            try:
                if step.run is not None:
                    step.run(batch)
                    pc += 1
                    if pc < limit:
                        continue
                    counters[batch.here] = pc
                else:
                    taken = step.guard(batch) if step.guard else np.ones(1, bool)
                    batch.require_written()
                    if batch.active is None and (taken.all() or not taken.any()):
                        pc = step.target if taken[0] else pc + 1  # all threads go the same way
                        continue
                    counters[batch.here] = pc + 1
                    if batch.active is not None:
                        taken = taken & batch.active
                    counters[np.broadcast_to(taken, batch.count)] = step.target
                    if step.statement.opcode == "bar.sync":
                        waiting |= taken
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
                raise PtxError("the live threads of a CTA wait at different barriers")
            waiting[:] = False
            ready = live
        pc = int(counters[ready].min())
        active = ready & (counters == pc)
        others = counters[ready & ~active]
        batch.active = None if active.all() else active
        return pc, int(others.min()) if len(others) else end

    # --- statements ---------------------------------------------------------------------------------------------------

    def _decode(self, statement: Statement) -> Step:
        opcode, operands = statement.opcode, statement.operands
        guard = self.operands.guard(statement.guard) if statement.guard else None
        if opcode in ("bra", "bra.uni") and operands[0] in self.kernel.labels:
            return Step(statement, None, guard, self.kernel.labels[operands[0]])
        if opcode == "ret":
            return Step(statement, None, guard, len(self.kernel.statements))
        if opcode == "bar.sync" and operands == ("0",):
            return Step(statement, None, guard, len(self.steps) + 1)
        if parameter := _PARAMETER.fullmatch(opcode):
            run = self._parameter(parameter[1], operands)
        elif access := _ACCESS.fullmatch(opcode):
            run = self._access(*access.groups(default="1"), operands)
        elif matrix := _MATRIX.fullmatch(opcode):
            run = self._matrices(matrix[1], int(matrix[2]), operands)
        elif opcode in ("shfl.sync.bfly.b32", "shfl.sync.idx.b32"):
            run = self._shuffle(opcode, operands)
        elif opcode in ("mov.b32", "mov.b64") and any(isinstance(operand, tuple) for operand in operands):
            run = self._halves(opcode, operands)
        else:
            run = self._compute(opcode, operands)
        return Step(statement, _guarded(run, guard) if guard else run, None)

    def _compute(self, opcode: str, operands: tuple[Operand, ...]) -> Run:
        _expect(opcode in INSTRUCTIONS, "the opcode")
        result, arguments, compute = INSTRUCTIONS[opcode]
        _expect(len(operands) == 1 + len(arguments), "the number of operands")
        sink = self.operands.sink(operands[0], result)
        sources = [self.operands.source(text, dtype) for text, dtype in zip(operands[1:], arguments, strict=True)]
        return lambda batch: sink(batch, compute(*[source(batch) for source in sources]))

    def _halves(self, opcode: str, operands: tuple[Operand, ...]) -> Run:
        """mov of a scalar to or from a vector of its halves."""
        _expect(len(operands) == 2, "the number of operands")
        target, source = operands
        if isinstance(source, tuple):
            return self._pack(opcode, target, source)
        _expect(len(target) == 2, "the vector")
        parts = zip(("low", "high"), target, strict=True)
        runs = {part: self._compute(f"{opcode} {part}", (text, source)) for part, text in parts if text != "_"}
        index = self.operands.index.get(source)

        def run(batch: Batch) -> None:
            for part, run in runs.items():
                with batch.half(index, part):
                    run(batch)

        return run

    def _pack(self, opcode: str, target: Operand, source: tuple[str, ...]) -> Run:
        """A scalar of two halves, of which one may be unwritten."""
        pack, half = self._compute(f"{opcode} pack", (target, *source)), TYPES["b16" if opcode == "mov.b32" else "b32"]
        index, sources = self.operands.index[target], [self.operands.source(text, half) for text in source]

        def run(batch: Batch) -> None:
            missing = [batch.missing_of(each) for each in sources]
            pack(batch)
            batch.keep_halves(index, *missing)

        return run

    def _parameter(self, kind: str, operands: tuple[Operand, ...]) -> Run:
        """ld.param reads the launch's bytes."""
        _expect(operands[1:] in [(Address(name, 0),) for name in self.kernel.params], "the parameter")
        sink, name, dtype = self.operands.sink(operands[0], TYPES[kind], relaxed=True), operands[1].base, TYPES[kind]
        return lambda batch: sink(batch, np.frombuffer(batch.params[name], dtype, 1))

    def _access(self, root: str, space: str, vector: str, kind: str, operands: tuple[Operand, ...]) -> Run:
        """ld and st, of a scalar or a vector."""
        of, dtype, count = self.operands, TYPES[kind], int(vector)
        _expect(len(operands) == 2, "the number of operands")
        address, values = operands[::-1] if root == "ld" else operands
        values = values if isinstance(values, tuple) else (values,)
        _expect(isinstance(address, Address) and len(values) == count, "the address or the vector")
        base = of.source(address.base, TYPES["u32" if space == "shared" else "u64"])
        offset = np.uint64(address.offset % 2**64)

        def locate(batch: Batch, write: bool) -> tuple[Array, Array]:
            found = _of_active(base(batch), batch).astype(np.uint64) + offset
            batch.require_written()
            return rows(batch.memory[space], found, batch.everyone[batch.here], dtype, count, write)

        if root == "ld":
            sinks = [of.sink(text, dtype, relaxed=True) for text in values]

            def load(batch: Batch) -> None:
                table, index = locate(batch, False)
                loaded = table[index]
                for i, sink in enumerate(sinks):
                    column = np.zeros(batch.count, dtype)
                    column[batch.here] = loaded[:, i]
                    sink(batch, column)

            return load
        sources = [of.source(text, dtype, relaxed=True) for text in values]

        def store(batch: Batch) -> None:
            table, index = locate(batch, True)
            values = np.stack([_of_active(source(batch), batch) for source in sources], axis=1)
            batch.require_written()
            # of equal addresses the last lane's value stays
            table[index] = values

        return store

    def _matrices(self, root: str, count: int, operands: tuple[Operand, ...]) -> Run:
        """ldmatrix, stmatrix: lanes 8·i to 8·i + 7 have the addresses of matrix i's rows, of 4 bytes for each lane."""
        of, kind, read = self.operands, TYPES["b32"], root == "ld"
        _expect(len(operands) == 2, "the number of operands")
        address, values = operands[::-1] if read else operands
        values = values if isinstance(values, tuple) else (values,)
        _expect(isinstance(address, Address) and len(values) == count, "the address or the vector")
        base = of.source(address.base, TYPES["u32"])
        sinks, sources = (
            ([of.sink(x, kind) for x in values], []) if read else ([], [of.source(x, kind) for x in values])
        )

        def run(batch: Batch) -> None:
            batch.require_whole_warps()
            starts = np.broadcast_to(base(batch), batch.count).astype(np.uint64) + np.uint64(address.offset)
            batch.require_written()
            here = batch.everyone[batch.here]
            first, lane = here // WARP * WARP, here % WARP
            for matrix in range(count):
                row = starts[first + 8 * matrix + lane // 4]
                if (row % np.uint64(16)).any():
                    raise PtxError(f"a row of {root}matrix does not start at a multiple of 16")
                found = row + (4 * (lane % 4)).astype(np.uint64)
                table, index = rows(batch.memory["shared"], found, here, kind, 1, not read)
                if read:
                    column = np.zeros(batch.count, kind)
                    column[batch.here] = table[index][:, 0]
                    sinks[matrix](batch, column)
                else:
                    values = _of_active(sources[matrix](batch), batch)
                    batch.require_written()
                    table[index, 0] = values

        return run

    def _shuffle(self, opcode: str, operands: tuple[Operand, ...]) -> Run:
        """Each thread gets the value of the lane with the number (idx), or that differs in these bits (bfly)."""
        _expect(len(operands) == 5 and operands[3:] == ("31", "-1"), "a part of the warp")
        u32, butterfly = TYPES["u32"], "bfly" in opcode
        sink, value, lane = self.operands.sink(operands[0], u32), *(self.operands.source(x, u32) for x in operands[1:3])

        def run(batch: Batch) -> None:
            batch.require_whole_warps()
            number, here = lane(batch) % WARP, batch.everyone
            batch.require_written()
            source = here ^ number if butterfly else here // WARP * WARP + number
            values = np.broadcast_to(value(batch), batch.count)[source]
            if batch.unwritten is not None:
                # it is the other lane that has not written
                batch.unwritten = batch.unwritten[source]
            sink(batch, values)

        return run


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise UnsupportedInstruction(f"{what} is not supported")


def _of_active(values: Array, batch: Batch) -> Array:
    """The values of the active threads."""
    return np.broadcast_to(values, batch.count)[batch.here]


def _guarded(run: Run, guard: Source) -> Run:
    """`@%p` instruction: only the threads whose predicate holds."""

    def guarded(batch: Batch) -> None:
        outer, taken = batch.active, guard(batch)
        batch.require_written()
        if outer is not None:
            taken = taken & outer
        if taken.all():
            run(batch)
        elif taken.any():
            batch.active = np.broadcast_to(taken, batch.count)
            try:
                run(batch)
            finally:
                batch.active = outer

    return guarded
