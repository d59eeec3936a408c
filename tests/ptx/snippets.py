"""Small PTX programs for the tests: a body between the declarations and the `ret` that every program needs."""

from __future__ import annotations

import numpy as np

from tests.ptx.interpreter import Program
from tests.ptx.memory import Region

_MODULE = """
.version 8.0
.target sm_90
.address_size 64
{variables}
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


def compile_ptx(body: str, params: int = 0, threads: int = 32, variables: str = "") -> Program:
    """`[p0]`, `[p1]`, … are the parameters of the body, all pointers."""
    params_text = ", ".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(params))
    return Program(_MODULE.format(variables=variables, params=params_text, threads=threads, body=body), "snippet")


def run_ptx(body: str, *arrays: np.ndarray, threads: int = 32, ctas: int = 1, variables: str = "") -> None:
    """Run the body with %d0, %d1, … the addresses of the arrays, %r0 the thread and %r1 the CTA."""
    loads = "".join(f"ld.param.u64 %d{i}, [p{i}]; " for i in range(len(arrays)))
    start = loads + "mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;\n"
    program = compile_ptx(start + body, len(arrays), threads, variables)
    addresses = {f"p{i}": array.ctypes.data.to_bytes(8, "little") for i, array in enumerate(arrays)}
    regions = [Region(f"array{i}", array.ctypes.data, array.nbytes) for i, array in enumerate(arrays)]
    program.launch((ctas, 1, 1), threads, addresses, regions)


def evaluate(body: str, dtype: type, *inputs: np.ndarray) -> np.ndarray:
    """What the body leaves in `%o`, one thread per element; `%a`, `%b`, `%c`, `%e` are the elements of the inputs."""
    count, threads = len(inputs[0]), 128
    ctas = -(-count // threads)
    padded = [np.concatenate([x, np.repeat(x[-1:], ctas * threads - count)]) for x in inputs]
    result = np.zeros(ctas * threads, dtype)
    lines = ["mad.lo.u32 %r0, %r1, 128, %r0;"]
    for i, (name, array) in enumerate(zip("abceo"[: len(inputs)] + "o", [*padded, result], strict=True)):
        size = array.itemsize
        lines.append(f".reg .b{max(size, 2) * 8} %{name}; mad.wide.u32 %d{10 + i}, %r0, {size}, %d{i};")
        if name != "o":
            lines.append(f"ld.global.b{size * 8} %{name}, [%d{10 + i}];")
    lines += [body, f"st.global.b{result.itemsize * 8} [%d{10 + len(inputs)}], %o;"]
    run_ptx("\n".join(lines), *padded, result, threads=threads, ctas=ctas)
    return result[:count]
