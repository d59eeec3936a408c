"""Small PTX programs for the tests: a body between the declarations and the `ret` that every program needs."""

from __future__ import annotations

import numpy as np

from tests.ptx.interpreter import Program
from tests.ptx.memory import Region

_MODULE = """
.extern .shared .align 16 .b8 buffer[];
.visible .entry snippet({params})
.reqntid {threads}
{{
    .reg .pred %p<10>;
    .reg .b16 %h<20>;
    .reg .b32 %r<40>;
    .reg .b64 %d<20>;
    {body}
    ret;
}}
"""


def compile_ptx(body: str, params: int = 0, threads: int = 32) -> Program:
    """`[p0]`, `[p1]`, … are the parameters of the body, all pointers; `buffer` is the shared memory."""
    text = ", ".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(params))
    return Program(_MODULE.format(params=text, threads=threads, body=body), "snippet")


def run_ptx(body: str, *arrays: np.ndarray, threads: int = 32, ctas: int = 1, shared: int = 0) -> None:
    """Run the body with %d0, %d1, … the addresses of the arrays, %r0 the thread and %r1 the CTA."""
    loads = "".join(f"ld.param.b64 %d{i}, [p{i}]; " for i in range(len(arrays)))
    program = compile_ptx(f"{loads} mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;\n{body}", len(arrays), threads)
    addresses = {f"p{i}": array.ctypes.data.to_bytes(8, "little") for i, array in enumerate(arrays)}
    regions = [Region(f"array{i}", array.ctypes.data, array.nbytes) for i, array in enumerate(arrays)]
    program.launch((ctas, 1, 1), threads, addresses, regions, shared)


def evaluate(body: str, dtype: np.typing.DTypeLike, *inputs: np.ndarray) -> np.ndarray:
    """What the body leaves in `%o`, one thread per element; `%a`, `%b` and `%c` are the elements of the inputs."""
    count, threads = len(inputs[0]), 128
    ctas = -(-count // threads)
    padded = [np.concatenate([x, np.repeat(x[-1:], ctas * threads - count)]) for x in inputs]
    result = np.zeros(ctas * threads, dtype)
    lines = ["mul.lo.s32 %r2, %r1, 128; add.s32 %r2, %r2, %r0;"]
    for i, (name, array) in enumerate(zip("abc"[: len(inputs)] + "o", [*padded, result], strict=True)):
        size = array.itemsize
        lines.append(f".reg .b{size * 8} %{name}; mad.wide.u32 %d{10 + i}, %r2, {size}, %d{i};")
        if name != "o":
            lines.append(f"ld.global.b{size * 8} %{name}, [%d{10 + i}];")
    lines += [body, f"st.global.b{result.itemsize * 8} [%d{10 + len(inputs)}], %o;"]
    run_ptx("\n".join(lines), *padded, result, threads=threads, ctas=ctas)
    return result[:count]
