"""Triton kernels, compiled for sm_80 and sm_90, on the interpreter: results to the bit where the kernel allows it."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from tests.ptx.driver import Traffic, _program, ptx_machine
from tests.ptx.memory import OutOfBounds
from tests.ptx.parser import UnsupportedInstruction

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled to PTX")

NAN = float("nan")
EXACT = {"num_warps": 4, "enable_fp_fusion": False}


@pytest.fixture(params=[80, 90])
def machine(request):
    with ptx_machine(request.param) as machine:
        yield machine


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, i < n, other=0.0) + tl.load(y + i, i < n, other=0.0), i < n)


@triton.jit
def strided_kernel(x, out, stride, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i * stride, i < n, other=0.0), i < n)


@triton.jit
def reduce_kernel(x, total, largest, where, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    values = tl.load(x + row * BLOCK + tl.arange(0, BLOCK))
    tl.store(total + row, tl.sum(values.to(tl.float32)))
    top, index = tl.max(values.to(tl.float32), 0, return_indices=True)
    tl.store(largest + row, top)
    tl.store(where + row, index)


@triton.jit
def table_kernel(x, by_row, by_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(x + rows[:, None] * COLUMNS + columns[None, :])
    tl.store(by_row + rows, tl.sum(values, 1))
    tl.store(by_column + columns, tl.sum(values, 0))


@triton.jit
def functions_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(out + i, tl.exp(values))
    tl.store(out + n + i, tl.log(values))
    tl.store(out + 2 * n + i, tl.sqrt_rn(values))
    tl.store(out + 3 * n + i, tl.cos(values))
    tl.store(out + 4 * n + i, tl.sin(values * 1e6))


@triton.jit
def philox_kernel(words, uniform, seed, first, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, first + i)
    tl.store(words + 4 * i, a)
    tl.store(words + 4 * i + 1, b)
    tl.store(words + 4 * i + 2, c)
    tl.store(words + 4 * i + 3, d)
    tl.store(uniform + i, tl.rand(seed, first + i))


@triton.jit
def partial_kernel(x, partial, n, BLOCK: tl.constexpr):
    chunk, sample = tl.program_id(0), tl.program_id(1)
    i = chunk * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + sample * n + i, i < n, other=0.0).to(tl.float32)
    tl.store(partial + sample * tl.num_programs(0) + chunk, tl.sum(values * values))


@triton.jit
def finish_kernel(partial, out, chunks, SAMPLES: tl.constexpr, CHUNKS: tl.constexpr):
    sample, chunk = tl.arange(0, SAMPLES)[:, None], tl.arange(0, CHUNKS)[None, :]
    values = tl.load(partial + sample * chunks + chunk, chunk < chunks, other=0.0)
    tl.store(out + tl.arange(0, SAMPLES), tl.sum(values, 1))


@triton.jit
def arguments_kernel(out, small, large, one, number, flag, missing, pair, offset: tl.constexpr):
    tl.store(out, small.to(tl.float64))
    tl.store(out + 1, large.to(tl.float64))
    tl.store(out + 2, one + offset)
    tl.store(out + 3, number)
    if flag:
        tl.store(out + 4, 1.0)
    if missing is None:
        tl.store(out + 5, 1.0)
    tl.store(out + 6, pair[0] + tl.load(pair[1]))


@triton.jit
def indices_kernel(out):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(out + (z * tl.num_programs(1) + y) * tl.num_programs(0) + x, x + 10 * y + 100 * z)


@triton.jit
def collatz_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    value, steps = tl.load(x + i), 0
    while value != 1:
        value = tl.where(value % 2 == 0, value // 2, 3 * value + 1)
        steps += 1
    tl.store(out + i, steps)


@triton.jit
def scan_kernel(x, out, out_flipped, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(out + i, tl.cumsum(values, 0))
    tl.store(out_flipped + i, tl.flip(values))


@triton.jit
def atomic_kernel(out):
    tl.atomic_add(out, 1.0)


def philox(counter, seed):
    """Philox-4x32-10 (Salmon et al., SC 2011) of 64-bit counters in numpy: [4, counters] uint32."""
    mask = np.uint64(0xFFFFFFFF)
    c = [counter & mask, counter >> np.uint64(32), np.zeros_like(counter), np.zeros_like(counter)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> 32 ^ c[1] ^ np.uint64(k[0]), b & mask, a >> 32 ^ c[3] ^ np.uint64(k[1]), a & mask]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c).astype(np.uint32)


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_of_a_ragged_size(machine, dtype):
    n = 5003
    x, y = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    out = torch.full((n + 100,), NAN, dtype=dtype)
    add_kernel[(triton.cdiv(n, 1024),)](x, y, out, n, 1024, **EXACT)
    assert torch.equal(out[:n], x + y)
    assert out[n:].isnan().all()  # nobody wrote behind the mask


def test_sum_and_max_over_2048_elements(machine):
    # whole numbers, so that every order of summation is exact
    x = torch.randint(-100, 100, (3, 2048)).float()
    total, largest, where = torch.full((3,), NAN), torch.full((3,), NAN), torch.full((3,), -1, dtype=torch.int32)
    reduce_kernel[(3,)](x, total, largest, where, 2048, **EXACT)
    assert torch.equal(total, x.sum(1)) and torch.equal(largest, x.amax(1))
    first = torch.tensor([row.tolist().index(row.max()) for row in x])
    assert torch.equal(where.long(), first)


def test_sums_over_both_sides_of_a_table(machine):
    x = torch.randint(-100, 100, (16, 32)).float()
    by_row, by_column = torch.full((16,), NAN), torch.full((32,), NAN)
    table_kernel[(1,)](x, by_row, by_column, 16, 32, **EXACT)
    assert torch.equal(by_row, x.sum(1)) and torch.equal(by_column, x.sum(0))


def test_functions(machine):
    x = torch.rand(512) * 20 + 1e-3
    out = torch.full((5, 512), NAN)
    functions_kernel[(1,)](x, out, 512, 512, **EXACT)
    wide = x.double()
    # exp is 2^(x·log2 e): the product's half ulp, times x up to 20, in the exponent
    torch.testing.assert_close(out[0].double(), wide.exp(), rtol=2.0**-24 * 30, atol=0)
    torch.testing.assert_close(out[1].double(), wide.log(), rtol=2.0**-22, atol=1e-7)
    # numpy's: torch.sqrt of CPU tensors is not rounded correctly where MKL computes it
    np.testing.assert_array_equal(out[2].numpy(), np.sqrt(x.numpy()))
    torch.testing.assert_close(out[3].double(), wide.cos(), rtol=0, atol=2e-7)
    # radians above 105,615 take libdevice's slow path: a table in global memory, local memory, carries
    torch.testing.assert_close(out[4].double(), (x * 1e6).double().sin(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("first", [0, 2**32 - 100])
def test_philox_to_the_bit(machine, first):
    n, seed = 256, 0x123456789ABCDEF
    words, uniform = torch.zeros(4 * n, dtype=torch.int32), torch.full((n,), NAN)
    philox_kernel[(1,)](words, uniform, seed, first, n, **EXACT)
    expected = philox(np.arange(first, first + n, dtype=np.uint64), seed).view(np.int32)
    np.testing.assert_array_equal(words.numpy().reshape(n, 4).T, expected)
    # tl.rand folds the sign away and scales by the float below 2^-31
    folded = np.where(expected[0] < 0, -expected[0] - 1, expected[0])
    np.testing.assert_array_equal(uniform.numpy(), folded.astype(np.float32) * np.float32(4.6566127342e-10))


def test_partial_sums_and_their_sum(machine):
    samples, n, block = 4, 5000, 1024
    x = torch.randn(samples, n).to(torch.bfloat16)
    chunks = triton.cdiv(n, block)
    results = []
    for _ in range(2):
        partial, out = torch.full((samples, chunks), NAN), torch.full((samples,), NAN)
        partial_kernel[(chunks, samples)](x, partial, n, block, **EXACT)
        finish_kernel[(1,)](partial, out, chunks, samples, 8, **EXACT)
        results.append(out)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].double(), x.double().square().sum(1), rtol=1e-6, atol=0)


def test_loops_of_different_length(machine):
    x, out = torch.arange(1, 40), torch.zeros(39, dtype=torch.int32)
    collatz_kernel[(39,)](x, out, 1, **EXACT)

    def steps(value):
        return 0 if value == 1 else 1 + steps(value // 2 if value % 2 == 0 else 3 * value + 1)

    assert out.tolist() == [steps(value) for value in range(1, 40)]


def test_scan_and_flip(machine):
    x, out, flipped = torch.randint(-9, 9, (1024,)).float(), torch.full((1024,), NAN), torch.full((1024,), NAN)
    scan_kernel[(1,)](x, out, flipped, 1024, **EXACT)
    assert torch.equal(out, x.cumsum(0)) and torch.equal(flipped, x.flip(0))


# --- launching --------------------------------------------------------------------------------------------------------


def test_arguments_of_every_kind(machine):
    out = torch.full((7,), NAN, dtype=torch.float64)
    arguments_kernel[(1,)](out, -5, 2**40, 1, 0.1, True, None, (7, torch.tensor([0.5])), 3, **EXACT)
    # 0.1 travels as a float32
    assert out.tolist() == [-5, 2**40, 4, np.float32(0.1).item(), 1, 1, 7.5]
    arguments_kernel[(1,)](out.zero_(), 6, 2**33, 2, 4.0, False, None, (1, torch.tensor([2.0])), 3, **EXACT)
    assert out.tolist() == [6, 2**33, 5, 4, 0, 1, 3]


def test_grids_of_up_to_three_dimensions_and_of_a_function(machine):
    out = torch.full((4, 3, 2), -1, dtype=torch.int32)
    indices_kernel[(2, 3, 4)](out, **EXACT)
    z, y, x = torch.meshgrid(torch.arange(4), torch.arange(3), torch.arange(2), indexing="ij")
    assert torch.equal(out.long(), x + 10 * y + 100 * z)
    line = torch.full((6,), -1, dtype=torch.int32)
    indices_kernel[lambda meta: (len(line),)](line, **EXACT)
    assert line.tolist() == [0, 1, 2, 3, 4, 5]
    assert [launch.grid for launch in machine.launches] == [(2, 3, 4), (6, 1, 1)]
    assert {launch.kernel for launch in machine.launches} == {"indices_kernel"}


def test_launch_hooks_are_called_and_a_program_is_decoded_once(machine):
    names = []

    def enter(launch):
        names.append(launch.get()["name"])

    x, out = torch.randn(64), torch.full((64,), NAN)
    add_kernel[(1,)](x, x, out, 64, 64, **EXACT)
    decoded = _program.cache_info().misses
    knobs.runtime.launch_enter_hook.add(enter)
    try:
        for _ in range(3):
            add_kernel[(1,)](x, x, out, 64, 64, **EXACT)
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
    assert names == ["add_kernel"] * 3 and _program.cache_info().misses == decoded
    assert len(machine.launches) == 4 and machine.launches[0].num_warps == 4


def test_the_driver_is_there_only_inside():
    before = driver._active
    with ptx_machine(80) as outer:
        with ptx_machine(90) as inner:
            assert driver.active is inner and inner.get_current_target().arch == 90
        assert driver.active is outer
    assert driver._active is before
    with pytest.raises(ValueError, match="capability is 75"), ptx_machine(75):
        pass


def test_triton_s_own_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), ptx_machine():
        pass


# --- traffic and faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_moves_three_tensors_in_whole_sectors(machine, dtype):
    n = 8192
    x, y, out = (torch.ones(n, dtype=dtype) for _ in range(3))
    add_kernel[(8,)](x, y, out, n, 1024, **EXACT)
    size = n * dtype.itemsize
    read = Traffic(read_bytes=size, read_sectors=size // 32)
    written = Traffic(written_bytes=size, written_sectors=size // 32)
    assert machine.launches[-1].traffic == {"x": read, "y": read, "out": written}


def test_strided_reads_touch_more_sectors(machine):
    n = 1024
    x, out = torch.arange(n * 8).float(), torch.full((n,), NAN)
    strided_kernel[(1,)](x, out, 8, n, 1024, **EXACT)
    assert torch.equal(out, x[::8])
    # 8 floats apart, every element lies in a sector of its own
    assert machine.launches[-1].traffic["x"] == Traffic(read_bytes=4 * n, read_sectors=n)


def test_shared_memory_of_two_arguments_counts_for_the_first(machine):
    x = torch.arange(1024).float()
    add_kernel[(1,)](x, x, x, 1024, 1024, **EXACT)
    assert torch.equal(x, 2 * torch.arange(1024).float())
    assert machine.launches[-1].traffic == {"x": Traffic(8192, 4096, 256, 128), "y": Traffic(), "out": Traffic()}


def test_views_are_as_long_as_what_they_show(machine):
    x = torch.arange(200).float()
    view, out = x[3:67], torch.full((64,), NAN)
    add_kernel[(1,)](view, view, out, 64, 64, **EXACT)
    assert torch.equal(out, 2 * view)
    with pytest.raises(OutOfBounds, match="add_kernel, PTX line .* nearest tensor x of 252 bytes"):
        add_kernel[(1,)](view[:-1], torch.ones(64), out, 64, 64, **EXACT)


def test_a_write_past_the_end_is_refused(machine):
    x, out = torch.ones(100), torch.full((99,), NAN)
    with pytest.raises(OutOfBounds, match=r"write of 4 bytes .* which is byte 396 of the nearest tensor out of 396"):
        add_kernel[(1,)](x, x, out, 100, 128, **EXACT)


def test_elements_that_a_kernel_forgot_stay_nan(machine):
    x, out = torch.ones(100), torch.full((100,), NAN)
    add_kernel[(1,)](x, x, out, 90, 128, **EXACT)
    assert out.isnan().nonzero().flatten().tolist() == list(range(90, 100))


def test_atomics_are_refused(machine):
    with pytest.raises(UnsupportedInstruction, match="atomic_kernel, PTX line .*atom"):
        atomic_kernel[(4,)](torch.zeros(1), **EXACT)
