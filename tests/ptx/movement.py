"""Instructions that move data between threads and memories: ld, st, matrices, vector mov, shfl, redux, bar.warp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from tests.ptx.batch import Batch, Operands
from tests.ptx.formats import FORMATS
from tests.ptx.memory import WARP, load, store
from tests.ptx.opcodes import B32, PRED, U32, U64, Opcode
from tests.ptx.parser import Address, Operand, UnsupportedInstruction
from tests.ptx.warp import members, reduce_lanes, shuffle_lanes

_HINTS = (
    *("weak", "volatile", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_normal", "L1::evict_unchanged"),
    *("L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B"),
)
"""Modifiers of loads and stores that speak to caches only."""

Run = Callable[[Batch], None]


def pack(of: Operands, opcode: Opcode, operands: tuple[Operand, ...]) -> Run:
    """mov of a scalar to or from a vector of its parts, the first the lowest."""
    whole = opcode.format("b", (16, 32, 64))
    opcode.finish()
    target, source = operands
    parts = target if isinstance(target, tuple) else source
    part = FORMATS[f"b{whole.bits // len(parts)}"]
    if isinstance(target, tuple):
        read, sinks = of.source(source, whole), [of.sink(text, part) for text in parts]

        def unpack(batch: Batch) -> None:
            columns = read(batch).view(part.raw).reshape(-1, len(parts))
            for i, sink in enumerate(sinks):
                sink(batch, np.ascontiguousarray(columns[:, i]))

        return unpack
    sink, sources = of.sink(target, whole), [of.source(text, part) for text in parts]

    def run(batch: Batch) -> None:
        columns = np.broadcast_arrays(*[read(batch) for read in sources])
        sink(batch, np.stack(columns, axis=1).view(whole.raw).reshape(-1))

    return run


def access(of: Operands, opcode: Opcode, operands: tuple[Operand, ...]) -> Run:
    """ld and st, of a scalar or a vector; ld.param reads the launch's bytes."""
    format = opcode.format("usbf", (8, 16, 32, 64))
    count = int(opcode.one_of("v2", "v4", default="v1")[1])
    loads = opcode.root == "ld"
    space = opcode.one_of("global", "shared", "shared::cta", "local", *(("param",) if loads else ()))
    while opcode.one_of(*_HINTS, default=""):
        pass
    hinted = opcode.has("L2::cache_hint")  # one operand more, a policy
    opcode.finish()
    space = space.removesuffix("::cta")
    address, values = (operands[1], operands[0]) if loads else operands[:2]
    values = values if isinstance(values, tuple) else (values,)
    if len(operands) != 2 + hinted or len(values) != count or not isinstance(address, Address):
        raise UnsupportedInstruction("the operands")
    format = FORMATS[f"b{format.bits}"] if format.kind == "f" else format
    dtype = format.raw
    if loads:
        sinks = [of.sink(text, format, relaxed=True) for text in values]
    else:
        sources = [of.source(text, FORMATS[f"b{format.bits}"], relaxed=True) for text in values]
    if space == "param":
        if address.base not in of.params:
            raise UnsupportedInstruction(f"parameter {address.base}")

        def load_param(batch: Batch) -> None:
            found = np.frombuffer(batch.params[address.base], dtype, count, address.offset)
            for i, sink in enumerate(sinks):
                sink(batch, found[i : i + 1])

        return load_param
    # shared and local addresses may be in 32-bit registers
    short = space != "global" and address.base in of.index and of.dtype(address.base).itemsize == 4
    base, offset = of.source(address.base, U32 if short else U64), np.uint64(address.offset % 2**64)

    def locate(batch: Batch) -> tuple[Array, Array]:
        lanes, found = batch.lanes(), base(batch).astype(np.uint64, copy=False) + offset
        return found[lanes] if len(found) > 1 else np.broadcast_to(found, len(lanes)), lanes

    def run_load(batch: Batch) -> None:
        found, lanes = locate(batch)
        table = load(batch.spaces[space], found, lanes, dtype, count)
        for i, sink in enumerate(sinks):
            column = np.ascontiguousarray(table[:, i])
            if batch.active is not None:
                column, chosen = np.zeros(batch.count, dtype), column
                column[lanes] = chosen
            sink(batch, column)

    def run_store(batch: Batch) -> None:
        found, lanes = locate(batch)
        table = np.empty((len(lanes), count), dtype)
        for i, source in enumerate(sources):
            column = source(batch)
            table[:, i] = column[lanes] if len(column) > 1 else column
        store(batch.spaces[space], found, lanes, table)

    return run_load if loads else run_store


def shuffle(of: Operands, opcode: Opcode, operands: tuple[Operand, ...]) -> Run:
    opcode.format("b", (32,))
    opcode.one_of("sync")
    mode = opcode.one_of("up", "down", "bfly", "idx")
    opcode.finish()
    first, *rest = operands
    if len(rest) != 4:
        raise UnsupportedInstruction("the number of operands")
    sinks = [of.sink(text, format) for text, format in zip(first.split("|"), (B32, PRED), strict=False)]
    sources = [of.source(text, U32) for text in rest]

    def run(batch: Batch) -> None:
        a, b, c, membermask = (source(batch) for source in sources)
        results = shuffle_lanes(mode, a, b, c, membermask, batch.active, batch.count)
        for sink, values in zip(sinks, results, strict=False):
            sink(batch, values)

    return run


def reduce(of: Operands, opcode: Opcode, operands: tuple[Operand, ...]) -> Run:
    format = opcode.format("usb", (32,))
    opcode.one_of("sync")
    name = opcode.one_of(*(("and", "or", "xor") if format.kind == "b" else ("add", "min", "max")))
    opcode.finish()
    if len(operands) != 3:
        raise UnsupportedInstruction("the number of operands")
    sink, source, membermask = of.sink(operands[0], format), of.source(operands[1], format), of.source(operands[2], U32)
    return lambda batch: sink(batch, reduce_lanes(name, source(batch), membermask(batch), batch.active, batch.count))


def matrices(of: Operands, opcode: Opcode, operands: tuple[Operand, ...]) -> Run:
    """ldmatrix and stmatrix of 8×8 16-bit elements: lane 8·i + r has the address of row r of matrix i.

    Lane t holds, as one 32-bit register per matrix, the elements 2·(t % 4) and the next of row t // 4, or of that
    column with .trans.
    """
    opcode.format("b", (16,))
    for name in ("sync", "aligned", "m8n8"):
        opcode.one_of(name)
    count, transposed = int(opcode.one_of("x1", "x2", "x4")[1]), opcode.has("trans")
    opcode.one_of("shared", "shared::cta")
    opcode.finish()
    loads = opcode.root == "ldmatrix"
    values, address = operands if loads else operands[::-1]
    values = values if isinstance(values, tuple) else (values,)
    if len(values) != count or not isinstance(address, Address):
        raise UnsupportedInstruction("the operands")
    base, offset = of.source(address.base, U32), np.uint64(address.offset % 2**64)
    half, everyone = FORMATS["b16"].raw, np.full(1, 2**32 - 1, np.uint32)

    def locate(batch: Batch) -> tuple[Array, Array]:
        lanes = batch.lanes()
        members(batch.count, batch.active, everyone)
        lanes = lanes[lanes % WARP < 8 * count]
        return np.broadcast_to(base(batch), batch.count)[lanes].astype(np.uint64) + offset, lanes

    def turned(rows: Array) -> Array:
        """[warps, matrices, 8, 8], or its transposes, in one piece."""
        return np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows)

    def run_load(batch: Batch) -> None:
        found, lanes = locate(batch)
        rows = load(batch.spaces["shared"], found, lanes, half, 8).reshape(-1, count, 8, 8)
        pairs = turned(rows).view(B32.raw).reshape(-1, count, WARP)
        for i, sink in enumerate(sinks):
            column = np.zeros(batch.count, B32.raw)
            column[batch.lanes()] = pairs[:, i].reshape(-1)
            sink(batch, column)

    def run_store(batch: Batch) -> None:
        found, lanes = locate(batch)
        columns = [np.broadcast_to(source(batch), batch.count)[batch.lanes()].reshape(-1, WARP) for source in sources]
        pairs = np.stack(columns, axis=1).reshape(-1, count, 8, 4)
        store(batch.spaces["shared"], found, lanes, turned(pairs.view(half)).reshape(-1, 8))

    if loads:
        sinks = [of.sink(text, B32) for text in values]
        return run_load
    sources = [of.source(text, B32) for text in values]
    return run_store


def warp_barrier(of: Operands, opcode: Opcode, operands: tuple[Operand, ...]) -> Run:
    """bar.warp.sync: nothing to wait for in lock step, but its members have to be there."""
    opcode.one_of("warp")
    opcode.one_of("sync")
    opcode.finish()
    membermask = of.source(operands[0], U32)

    def run(batch: Batch) -> None:
        members(batch.count, batch.active, membermask(batch))

    return run


MOVES = {
    **{"ld": access, "st": access, "ldmatrix": matrices, "stmatrix": matrices},
    **{"shfl": shuffle, "redux": reduce, "bar": warp_barrier},
}
