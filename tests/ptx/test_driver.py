"""Triton kernels, compiled for sm_80 and sm_90, on the interpreter: results to the bit where the kernel allows it."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from hrf_kernels.formulas import natural_log
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
def scale_kernel(x, out, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + i, i < n, other=0.0).to(tl.float32) * factor + 1.0
    tl.store(out + i, values.to(out.dtype.element_ty), i < n)


@triton.jit
def strided_kernel(x, out, stride, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i * stride, i < n, other=0.0), i < n)


@triton.jit
def reduce_kernel(x, total, largest, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    values = tl.load(x + row * BLOCK + tl.arange(0, BLOCK))
    tl.store(total + row, tl.sum(values))
    tl.store(largest + row, tl.max(values, 0))


@triton.jit
def table_kernel(x, sums, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(x + rows[:, None] * COLUMNS + columns[None, :])
    tl.store(sums + (columns if AXIS == 0 else rows), tl.sum(values, AXIS))


@triton.jit
def functions_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(out + i, tl.exp(values))
    tl.store(out + n + i, natural_log(values))
    tl.store(out + 2 * n + i, tl.sqrt_rn(values))


@triton.jit
def philox_kernel(words, seed, first, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, first + i)
    tl.store(words + 4 * i, a)
    tl.store(words + 4 * i + 1, b)
    tl.store(words + 4 * i + 2, c)
    tl.store(words + 4 * i + 3, d)


@triton.jit
def arguments_kernel(out, small, large, one, number, missing, offset: tl.constexpr):
    tl.store(out, small)
    tl.store(out + 1, (large >> 20).to(tl.int32))
    tl.store(out + 2, one + offset)
    tl.store(out + 3, number)
    if missing is None:
        tl.store(out + 4, 1.0)


@triton.jit
def indices_kernel(out):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(out + (z * tl.num_programs(1) + y) * tl.num_programs(0) + x, x + 10 * y + 100 * z)


@triton.jit
def collatz_kernel(x, out):
    i = tl.program_id(0)
    value, steps = tl.load(x + i), 0
    while value != 1:
        value = tl.where(value % 2 == 0, value // 2, 3 * value + 1)
        steps += 1
    tl.store(out + i, steps)


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


def test_add_of_a_ragged_size(machine):
    n = 5003
    x, y, out = torch.randn(n), torch.randn(n), torch.full((n + 100,), NAN)
    add_kernel[(triton.cdiv(n, 1024),)](x, y, out, n, 1024, **EXACT)
    assert torch.equal(out[:n], x + y)
    assert out[n:].isnan().all()  # nobody wrote behind the mask


@pytest.mark.parametrize("n", [4096, 5003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_at_the_end_only(machine, dtype, n):
    x, out = torch.randn(n).to(dtype), torch.full((n,), NAN, dtype=dtype)
    scale_kernel[(triton.cdiv(n, 1024),)](x, out, n, 1.7, 1024, **EXACT)
    assert torch.equal(out, (x.float() * torch.tensor(1.7) + 1.0).to(dtype))


def test_sum_and_max_over_2048_elements(machine):
    # whole numbers, so that every order of summation is exact
    x = torch.randint(-100, 100, (3, 2048)).float()
    total, largest = torch.full((3,), NAN), torch.full((3,), NAN)
    reduce_kernel[(3,)](x, total, largest, 2048, **EXACT)
    assert torch.equal(total, x.sum(1)) and torch.equal(largest, x.amax(1))


@pytest.mark.parametrize("axis", [0, 1])
def test_sums_over_one_side_of_a_table(machine, axis):
    x = torch.randint(-100, 100, (16, 256)).float()
    sums = torch.full((256 if axis == 0 else 16,), NAN)
    table_kernel[(1,)](x, sums, axis, 16, 256, **EXACT)
    assert torch.equal(sums, x.sum(axis))


def test_functions(machine):
    x = torch.rand(512) * 20 + 1e-3
    out = torch.full((3, 512), NAN)
    functions_kernel[(1,)](x, out, 512, 512, **EXACT)
    wide = x.double()
    # exp is 2^(x·log2 e): the product's half ulp, times x up to 20, in the exponent
    torch.testing.assert_close(out[0].double(), wide.exp(), rtol=2.0**-24 * 30, atol=0)
    torch.testing.assert_close(out[1].double(), wide.log(), rtol=2.0**-22, atol=1e-7)
    # numpy's: torch.sqrt of CPU tensors is not rounded correctly where MKL computes it
    np.testing.assert_array_equal(out[2].numpy(), np.sqrt(x.numpy()))


@pytest.mark.parametrize("first", [0, 2**32 - 100])
def test_philox_to_the_bit(machine, first):
    n, seed = 256, 0x123456789ABCDEF
    words = torch.zeros(4 * n, dtype=torch.int32)
    philox_kernel[(1,)](words, seed, first, n, **EXACT)
    expected = philox(np.arange(first, first + n, dtype=np.uint64), seed).view(np.int32)
    np.testing.assert_array_equal(words.numpy().reshape(n, 4).T, expected)


def test_loops_of_different_length(machine):
    x, out = torch.arange(1, 40, dtype=torch.int32), torch.zeros(39, dtype=torch.int32)
    collatz_kernel[(39,)](x, out, **EXACT)

    def steps(value):
        return 0 if value == 1 else 1 + steps(value // 2 if value % 2 == 0 else 3 * value + 1)

    assert out.tolist() == [steps(value) for value in range(1, 40)]


# --- launching --------------------------------------------------------------------------------------------------------


def test_arguments_of_every_kind(machine):
    out = torch.full((5,), NAN)
    arguments_kernel[(1,)](out, -5, 2**40, 1, 0.1, None, 3, **EXACT)
    assert out.tolist() == [-5, 2**20, 4, np.float32(0.1).item(), 1]
    arguments_kernel[(1,)](out.zero_(), 6, 2**33, 2, 4.0, out, 3, **EXACT)
    assert out.tolist() == [6, 2**13, 5, 4, 0]


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


def test_a_program_is_decoded_once(machine):
    x, out = torch.randn(64), torch.full((64,), NAN)
    add_kernel[(1,)](x, x, out, 64, 64, **EXACT)
    decoded = _program.cache_info().misses
    add_kernel[(1,)](x, x, out, 64, 64, **EXACT)
    assert _program.cache_info().misses == decoded
    assert len(machine.launches) == 2 and machine.launches[0].num_warps == 4


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


def test_add_moves_three_tensors_in_whole_sectors(machine):
    n = 8192
    x, y, out = (torch.ones(n) for _ in range(3))
    add_kernel[(8,)](x, y, out, n, 1024, **EXACT)
    read = Traffic(read_bytes=4 * n, read_sectors=n // 8)
    written = Traffic(written_bytes=4 * n, written_sectors=n // 8)
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
    with pytest.raises(OutOfBounds, match="add_kernel, PTX line .* of x of 252 bytes"):
        add_kernel[(1,)](view[:-1], torch.ones(64), out, 64, 64, **EXACT)


def test_a_write_past_the_end_is_refused(machine):
    x, out = torch.ones(100), torch.full((99,), NAN)
    with pytest.raises(OutOfBounds, match=r"write of 4 bytes .* which is byte 396 of out of 396 bytes"):
        add_kernel[(1,)](x, x, out, 100, 128, **EXACT)


def test_an_empty_tensor_has_no_memory(machine):
    with pytest.raises(OutOfBounds, match="of out of 0 bytes"):
        add_kernel[(1,)](torch.ones(8), torch.ones(8), torch.empty(0), 8, 128, **EXACT)


def test_elements_that_a_kernel_forgot_stay_nan(machine):
    x, out = torch.ones(100), torch.full((100,), NAN)
    add_kernel[(1,)](x, x, out, 90, 128, **EXACT)
    assert out.isnan().nonzero().flatten().tolist() == list(range(90, 100))


def test_atomics_and_fused_multiply_adds_are_refused(machine):
    with pytest.raises(UnsupportedInstruction, match="atomic_kernel, PTX line .*atom"):
        atomic_kernel[(4,)](torch.zeros(1), **EXACT)
    with pytest.raises(UnsupportedInstruction, match="scale_kernel, PTX line .*fma.rn.f32"):
        scale_kernel[(1,)](torch.zeros(8), torch.zeros(8), 8, 1.7, 128, enable_fp_fusion=True)
