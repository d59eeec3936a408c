"""Control flow, memories and warps of the interpreter, and everything that it has to refuse."""

import numpy as np
import pytest

from tests.ptx.batch import UninitialisedRegister
from tests.ptx.interpreter import DivergentBarrier
from tests.ptx.memory import MisalignedAccess, OutOfBounds, count_sectors
from tests.ptx.parser import PtxError, UnsupportedInstruction
from tests.ptx.snippets import compile_ptx, evaluate, run_ptx
from tests.ptx.warp import DivergentWarp

LANES = np.arange(32, dtype=np.uint32)

# %d9 is the address of the thread's own element of the first array
OWN = "mad.wide.u32 %d9, %r0, 4, %d0;"


def per_thread(body, threads=32, variables=""):
    """%r9 of every thread of one CTA."""
    result = np.full(threads, 0xDEAD, np.uint32)
    run_ptx(f"{OWN} {body} st.global.b32 [%d9], %r9;", result, threads=threads, variables=variables)
    return result


# --- control flow -----------------------------------------------------------------------------------------------------


def test_predicates_select_threads():
    body = "mov.b32 %r9, 1; setp.lt.u32 %p1, %r0, 10; @%p1 mov.b32 %r9, 2; @!%p1 add.u32 %r9, %r9, %r0;"
    np.testing.assert_array_equal(per_thread(body), np.where(LANES < 10, 2, 1 + LANES))


def test_a_divergent_branch_runs_both_sides_and_meets_again():
    body = """
        and.b32 %r2, %r0, 1; setp.eq.u32 %p1, %r2, 0;
        @%p1 bra EVEN;
        mul.lo.u32 %r9, %r0, 100;
        bra.uni JOIN;
    EVEN:
        mov.b32 %r9, 7;
    JOIN:
        shfl.sync.bfly.b32 %r3, %r9, 1, 31, -1;
        add.u32 %r9, %r9, %r3;
    """
    # the shuffle needs all lanes: both of a pair get 7 + 100 · the odd one
    np.testing.assert_array_equal(per_thread(body), 7 + 100 * (LANES | 1))


def test_a_loop_has_a_trip_count_per_thread():
    body = """
        mov.b32 %r9, 0; mov.b32 %r2, 0;
    LOOP:
        setp.ge.u32 %p1, %r2, %r0;
        @%p1 bra DONE;
        add.u32 %r2, %r2, 1;
        add.u32 %r9, %r9, %r2;
        bra.uni LOOP;
    DONE:
    """
    np.testing.assert_array_equal(per_thread(body), LANES * (LANES + 1) // 2)


def test_threads_leave_early_and_the_others_go_on():
    result = np.zeros(64, np.uint32)
    body = f"{OWN} setp.gt.u32 %p1, %r0, 40; @%p1 ret; bar.sync 0; st.global.b32 [%d9], 1;"
    run_ptx(body, result, threads=64)
    np.testing.assert_array_equal(result, np.arange(64) <= 40)


def test_threads_exchange_over_shared_memory_behind_a_barrier():
    body = """
        mov.b32 %r2, buffer; shl.b32 %r3, %r0, 2; add.s32 %r4, %r2, %r3;
        st.shared.b32 [%r4], %r0;
        bar.sync 0;
        sub.s32 %r5, 508, %r3; add.s32 %r6, %r2, %r5;
        ld.shared.b32 %r9, [%r6];
    """
    result = per_thread(body, threads=128, variables=".shared .align 16 .b8 buffer[512];")
    np.testing.assert_array_equal(result, 127 - np.arange(128))


def test_a_barrier_holds_the_early_threads_back_every_time():
    # the upper warp writes 1000, then 1001 + its index, behind the code where the lower one already waits to read
    body = """
        mov.b32 %r2, buffer; shl.b32 %r3, %r0, 2; add.s32 %r4, %r2, %r3; xor.b32 %r5, %r3, 128; add.s32 %r5, %r5, %r2;
        setp.ge.u32 %p1, %r0, 32; mov.b32 %r9, 0; mov.b32 %r7, 1000;
    ROUND:
        @%p1 bra WRITE;
    READ:
        bar.sync 0;
        @!%p1 ld.shared.b32 %r6, [%r5]; @!%p1 add.u32 %r9, %r9, %r6;
        bar.sync 0;
        add.u32 %r7, %r7, 1;
        setp.lt.u32 %p2, %r7, 1002;
        @%p2 bra ROUND;
        bra.uni END;
    WRITE:
        add.u32 %r6, %r0, %r7; st.shared.b32 [%r4], %r6;
        bra.uni READ;
    END:
    """
    result = per_thread(body, threads=64, variables=".shared .align 16 .b8 buffer[256];")
    np.testing.assert_array_equal(result, [*(2001 + 2 * np.arange(32, 64)), *[0] * 32])


def test_a_barrier_in_a_divergent_loop_opens_once_per_round():
    # every thread passes the barrier twice, though one half reaches it over another path
    body = """
        setp.lt.u32 %p1, %r0, 32; mov.b32 %r9, 0;
    LOOP:
        @%p1 bra HERE;
        add.u32 %r9, %r9, 10;
    HERE:
        bar.sync 0;
        add.u32 %r9, %r9, 1;
        setp.lt.u32 %p2, %r9, 2; setp.eq.u32 %p3, %r9, 11; or.pred %p2, %p2, %p3;
        @%p2 bra LOOP;
    """
    np.testing.assert_array_equal(per_thread(body, threads=64), [2] * 32 + [22] * 32)


def test_threads_at_different_barriers_are_refused():
    body = "setp.lt.u32 %p1, %r0, 5; @%p1 bra OTHER; bar.sync 0; bra.uni END; OTHER: bar.sync 0; END:"
    with pytest.raises(DivergentBarrier, match="different barriers"):
        run_ptx(body)


def test_every_cta_sees_its_own_indices_and_shared_memory():
    body = """
        mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ntid.x; mad.lo.u32 %r4, %r1, %r3, %r0;
        setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [buffer], %r1;
        bar.sync 0;
        ld.shared.b32 %r5, [buffer]; mad.lo.u32 %r5, %r5, 100, %r2;
        mad.wide.u32 %d9, %r4, 4, %d0; st.global.b32 [%d9], %r5;
    """
    # 700 CTAs of 32 threads are more than one batch
    result = np.zeros(700 * 32, np.uint32)
    run_ptx(body, result, ctas=700, variables=".shared .align 4 .b8 buffer[4];")
    np.testing.assert_array_equal(result, np.repeat(np.arange(700) * 100 + 700, 32))


# --- warps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("bfly.b32 %r9, %r2, 5, 31, -1", LANES ^ 5),
        ("idx.b32 %r9, %r2, 3, 31, -1", np.full(32, 3)),
        ("up.b32 %r9, %r2, 4, 0, -1", np.where(LANES < 4, LANES, LANES - 4)),
        ("down.b32 %r9, %r2, 4, 31, -1", np.where(LANES + 4 > 31, LANES, LANES + 4)),
        # segments of 8 lanes: the mask 24 in bits 8 to 12
        ("idx.b32 %r9, %r2, 3, 6175, -1", LANES // 8 * 8 + 3),
        ("idx.b32 %r9, %r2, 11, 6175, -1", LANES // 8 * 8 + 3),
        ("down.b32 %r9, %r2, 4, 6175, -1", np.where(LANES % 8 + 4 > 7, LANES, LANES + 4)),
        ("up.b32 %r9, %r2, 4, 6144, -1", np.where(LANES % 8 < 4, LANES, LANES - 4)),
    ],
)
def test_shuffles_read_from_the_lane_of_their_mode(text, source):
    result = per_thread(f"add.u32 %r2, %r0, 500; shfl.sync.{text};", threads=64)
    np.testing.assert_array_equal(result, np.concatenate([source, source + 32]) + 500)


def test_a_shuffle_says_whether_its_source_was_in_range():
    body = "shfl.sync.up.b32 %r2|%p1, %r0, 4, 0, -1; selp.b32 %r9, 1, 0, %p1;"
    np.testing.assert_array_equal(per_thread(body), LANES >= 4)


@pytest.mark.parametrize("text", ["shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1", "bar.warp.sync -1"])
def test_a_part_of_a_warp_is_refused_where_all_of_it_has_to_come(text):
    halved = "mov.b32 %r9, 0; setp.lt.u32 %p1, %r0, 16; @%p1"
    with pytest.raises(DivergentWarp, match="lane 16"):
        per_thread(f"{halved} {text};")
    per_thread(f"mov.b32 %r9, 0; setp.lt.u32 %p1, %r0, 32; @%p1 {text};", threads=64)


def test_reductions_over_a_warp():
    body = (
        "sub.s32 %r2, %r0, 40; redux.sync.add.s32 %r3, %r2, -1; redux.sync.min.s32 %r4, %r2, -1; sub.s32 %r9, %r3, %r4;"
    )
    # the sums of −40 … −9 and −8 … 23 and their minima −40 and −8
    np.testing.assert_array_equal(per_thread(body, threads=64).view(np.int32), [-744] * 32 + [248] * 32)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_vectors_load_and_store_in_order():
    source, target = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    body = """
        mad.wide.u32 %d8, %r0, 16, %d0; mad.wide.u32 %d9, %r0, 16, %d1;
        ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d8];
        st.global.v2.b32 [%d9+8], {%r2, %r3}; st.global.v2.b32 [ %d9 + 0 ], { %r4, %r5 };
    """
    run_ptx(body, source, target)
    np.testing.assert_array_equal(target.reshape(-1, 4), source.reshape(-1, 4)[:, [2, 3, 0, 1]])


def test_narrow_loads_extend_by_their_type():
    x = np.array([-1, 5, -128], np.int8)
    body = "ld.global.s8 %h1, [%d0]; cvt.s32.s16 %o, %h1;"
    assert evaluate(body, np.int32, x)[0] == -1
    assert evaluate(body.replace("global.s8", "global.u8"), np.int32, x)[0] == 255


def test_local_memory_belongs_to_a_thread_and_globals_are_initialised():
    variables = ".global .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 1};"
    body = """
        .local .align 4 .b8 stack[16];
        st.local.b32 [stack+4], %r0; bar.sync 0; ld.local.b32 %r2, [stack+4];
        mov.b64 %d2, table; ld.global.nc.b32 %r3, [%d2+4]; add.u32 %r9, %r2, %r3;
    """
    np.testing.assert_array_equal(per_thread(body, variables=variables), LANES + 258)


def test_an_inline_block_has_its_own_registers():
    body = "mov.b32 %r9, 1; { .reg .b32 %r9; mov.b32 %r9, 50; { mov.b32 %r2, %r9; } } add.u32 %r9, %r9, %r2;"
    np.testing.assert_array_equal(per_thread(body), np.full(32, 51))


@pytest.mark.parametrize(
    "text", ["ld.global.b32 %r2, [%d9+4]", "st.global.b32 [%d9+4], %r0", "ld.global.b32 %r2, [%d9+-8]"]
)
def test_an_access_outside_the_arrays_is_refused(text):
    array = np.zeros(32, np.uint32)
    position = -8 if "-8" in text else 128
    with pytest.raises(
        OutOfBounds, match=rf"snippet, PTX line \d+: .*{position} of the nearest tensor array0 of 128"
    ) as error:
        run_ptx(f"{OWN} {text};", array)
    assert ("write" if text.startswith("st") else "read") in str(error.value)


def test_masked_threads_may_have_wild_addresses():
    array = np.arange(4, dtype=np.uint32)
    run_ptx(f"{OWN} setp.lt.u32 %p1, %r0, 4; @%p1 ld.global.b32 %r2, [%d9]; @%p1 st.global.b32 [%d9], 9;", array)
    np.testing.assert_array_equal(array, [9, 9, 9, 9])


def test_sectors_are_counted_once_per_warp_and_instruction():
    lanes = np.arange(64)
    # 4 bytes per lane, 8 lanes to a sector, in any order within the warp
    assert count_sectors(4 * lanes.astype(np.uint64), lanes) == 8
    assert count_sectors(4 * (lanes ^ 21).astype(np.uint64), lanes) == 8
    # two sectors by turns, the same ones for both warps
    assert count_sectors(32 * (lanes % 2).astype(np.uint64), lanes) == 4
    assert count_sectors(np.zeros(64, np.uint64), lanes) == 2
    # every other lane, half of the sector each
    assert count_sectors(4 * lanes[::-2].astype(np.uint64), lanes[::2]) == 8


def test_shared_and_local_memory_have_bounds():
    with pytest.raises(OutOfBounds, match="4 bytes at 64 of 64 bytes of shared memory"):
        run_ptx("st.shared.b32 [buffer+64], %r0;", variables=".shared .align 4 .b8 buffer[64];")
    with pytest.raises(OutOfBounds, match="shared memory"):
        run_ptx("mov.b32 %r2, -4; ld.shared.b32 %r2, [%r2];", variables=".shared .align 4 .b8 buffer[64];")
    with pytest.raises(OutOfBounds, match="local memory"):
        run_ptx(".local .align 4 .b8 stack[8]; ld.local.b64 %d2, [stack+8];")


def test_shared_memory_that_nobody_wrote_reads_as_nan():
    body = "ld.shared.b32 %r9, [buffer];"
    result = per_thread(body, variables=".shared .align 4 .b8 buffer[4];")
    assert np.isnan(result.view(np.float32)).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_spread_their_rows_over_the_warp(transposed):
    trans = ".trans" if transposed else ""
    # rows of 8 half-words in shared memory: element 100 · matrix + 8 · row + column, or 10,000 more from the store
    source = (100 * np.arange(4)[:, None] + np.arange(64)).astype(np.uint16)
    target = np.zeros((64, 4), np.uint32)
    stored = np.zeros((4, 64), np.uint16)
    body = f"""
        mad.wide.u32 %d8, %r0, 16, %d0; ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d8];
        mov.b32 %r6, buffer; mad.lo.u32 %r6, %r0, 16, %r6;
        setp.lt.u32 %p1, %r0, 32; @%p1 st.shared.v4.b32 [%r6], {{%r2, %r3, %r4, %r5}};
        bar.sync 0;
        and.b32 %r7, %r0, 31; mov.b32 %r8, buffer; mad.lo.u32 %r8, %r7, 16, %r8;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r8];
        mad.wide.u32 %d9, %r0, 16, %d1; st.global.v4.b32 [%d9], {{%r10, %r11, %r12, %r13}};
        bar.sync 0;
        add.u32 %r10, %r10, 655370000;
        @%p1 stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r8], {{%r10, %r11, %r12, %r13}};
        bar.sync 0;
        ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r6];
        mad.wide.u32 %d9, %r0, 16, %d2; @%p1 st.global.v4.b32 [%d9], {{%r2, %r3, %r4, %r5}};
    """
    memory = np.concatenate([source, source])  # the second warp reads rows of its own, and drops them
    run_ptx(body, memory, target, stored, threads=64, variables=".shared .align 16 .b8 buffer[1024];")
    square = source.reshape(4, 8, 8)
    rows = square.swapaxes(1, 2) if transposed else square
    expected = np.ascontiguousarray(rows).reshape(4, 64).view(np.uint32).T
    np.testing.assert_array_equal(target.reshape(2, 32, 4), [expected, expected])
    rows = rows.copy()
    rows[0, :, ::2] += 10_000
    rows[0, :, 1::2] += 10_000
    back = rows.swapaxes(1, 2) if transposed else rows
    np.testing.assert_array_equal(stored.reshape(4, 8, 8), back)


@pytest.mark.parametrize("text", ["ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d0+4]", "st.shared.b32 [buffer+2], %r0"])
def test_a_misaligned_access_is_refused(text):
    with pytest.raises(MisalignedAccess, match="not a multiple of"):
        run_ptx(f"{text};", np.zeros(64, np.float64), variables=".shared .align 4 .b8 buffer[64];")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "frobnicate.b32 %r2, %r0",
        "atom.global.add.u32 %r2, [%d0], 1",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4}",
        "call.uni (%r1), f, (%r2)",
        "add.rz.f32 %r2, %r0, %r0",
        "add.sat.s32 %r2, %r0, %r0",
        "fma.rn.relu.bf16 %h1, %h1, %h1, %h1",
        "mul.f16x4 %r2, %r0, %r0",
        "ld.global.acquire.gpu.b32 %r2, [%d0]",
        "ld.b32 %r2, [%d0]",
        "cvt.rn.satfinite.e4m3x2.f32 %h1, %r0, %r0",
        "cvt.f16.f32 %h1, %r0",
        "bar.sync 1",
        "shfl.bfly.b32 %r2, %r0, 1, 31",
        "add.u32 %r2, %d0, 1",
        "mov.u32 %r2, %clock",
        "mov.u32 %r2, nowhere",
        "add.f32 %r2, %r0, 1",
        "setp.lo.s32 %p1, %r0, 1",
        "add.u32 %r2, %r0",
        "bra NOWHERE",
    ],
)
def test_what_is_not_known_raises_with_its_line(text):
    with pytest.raises(UnsupportedInstruction) as error:
        compile_ptx(f"{text};", 1)
    assert text in str(error.value) and "snippet, PTX line 13" in str(error.value)


def test_a_register_is_read_only_by_threads_that_wrote_it():
    with pytest.raises(UninitialisedRegister, match=r"line \d+: add.u32 %r3, %r2, 1"):
        run_ptx("add.u32 %r3, %r2, 1;")
    partly = "setp.lt.u32 %p1, %r0, 7; @%p1 mov.b32 %r2, 1;"
    with pytest.raises(UninitialisedRegister, match="thread 7"):
        run_ptx(f"{partly} add.u32 %r3, %r2, 1;")
    run_ptx(f"{partly} mov.b32 %r2, 3; add.u32 %r3, %r2, 1;")
    run_ptx(f"{partly} @%p1 add.u32 %r3, %r2, 1; @!%p1 mov.b32 %r2, 2; add.u32 %r3, %r2, 1;")


def test_an_entry_that_is_not_there_and_a_wrong_number_of_threads():
    with pytest.raises(PtxError, match="32 threads, not 64"):
        compile_ptx("").launch((1, 1, 1), 64, {}, [])
