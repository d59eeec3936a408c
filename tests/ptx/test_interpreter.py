"""Control flow, memories and warps of the interpreter, and everything that it has to refuse."""

import numpy as np
import pytest

from tests.ptx.interpreter import Program
from tests.ptx.memory import OutOfBounds, Region, count_sectors
from tests.ptx.parser import PtxError, UnsupportedInstruction
from tests.ptx.snippets import compile_ptx, run_ptx

LANES = np.arange(32, dtype=np.uint32)

# %d9 is the address of the thread's own element of the first array
OWN = "mad.wide.u32 %d9, %r0, 4, %d0;"


def per_thread(body, threads=32, shared=0):
    """%r9 of every thread of one CTA."""
    result = np.full(threads, 0xDEAD, np.uint32)
    run_ptx(f"{OWN} {body} st.global.b32 [%d9], %r9;", result, threads=threads, shared=shared)
    return result


# --- control flow -----------------------------------------------------------------------------------------------------


def test_predicates_select_threads():
    body = "mov.b32 %r9, 1; setp.lt.u32 %p1, %r0, 10; @%p1 mov.b32 %r9, 2; @!%p1 add.s32 %r9, %r9, %r0;"
    np.testing.assert_array_equal(per_thread(body), np.where(LANES < 10, 2, 1 + LANES))


def test_a_predicate_of_a_divergent_branch_selects_among_its_own_threads():
    body = """
        mov.b32 %r9, 0; and.b32 %r2, %r0, 1; setp.eq.b32 %p1, %r2, 1; setp.lt.u32 %p2, %r0, 16;
        @%p2 bra END;
        @%p1 mov.b32 %r9, 5;
    END:
    """
    np.testing.assert_array_equal(per_thread(body), np.where((LANES >= 16) & (LANES % 2 == 1), 5, 0))


def test_a_divergent_branch_runs_both_sides_and_meets_again():
    body = """
        and.b32 %r2, %r0, 1; setp.eq.b32 %p1, %r2, 0;
        @%p1 bra EVEN;
        mul.lo.s32 %r9, %r0, 100;
        bra.uni JOIN;
    EVEN:
        mov.b32 %r9, 7;
    JOIN:
        shfl.sync.bfly.b32 %r3, %r9, 1, 31, -1;
        add.s32 %r9, %r9, %r3;
    """
    # the shuffle needs all lanes: both of a pair get 7 + 100 · the odd one
    np.testing.assert_array_equal(per_thread(body), 7 + 100 * (LANES | 1))


def test_a_loop_has_a_trip_count_per_thread():
    body = """
        mov.b32 %r9, 0; mov.b32 %r2, 0;
    LOOP:
        setp.ge.u32 %p1, %r2, %r0;
        @%p1 bra DONE;
        add.s32 %r2, %r2, 1;
        add.s32 %r9, %r9, %r2;
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
    np.testing.assert_array_equal(per_thread(body, threads=128, shared=512), 127 - np.arange(128))


def test_a_barrier_holds_the_early_threads_back_every_time():
    # the upper warp writes 1000, then 1001 + its index, behind the code where the lower one already waits to read
    body = """
        mov.b32 %r2, buffer; shl.b32 %r3, %r0, 2; add.s32 %r4, %r2, %r3; xor.b32 %r5, %r3, 128; add.s32 %r5, %r5, %r2;
        setp.ge.u32 %p1, %r0, 32; mov.b32 %r9, 0; mov.b32 %r7, 1000;
    ROUND:
        @%p1 bra WRITE;
    READ:
        bar.sync 0;
        @!%p1 ld.shared.b32 %r6, [%r5]; @!%p1 add.s32 %r9, %r9, %r6;
        bar.sync 0;
        add.s32 %r7, %r7, 1;
        setp.lt.u32 %p2, %r7, 1002;
        @%p2 bra ROUND;
        bra.uni END;
    WRITE:
        add.s32 %r6, %r0, %r7; st.shared.b32 [%r4], %r6;
        bra.uni READ;
    END:
    """
    result = per_thread(body, threads=64, shared=256)
    np.testing.assert_array_equal(result, [*(2001 + 2 * np.arange(32, 64)), *[0] * 32])


def test_a_barrier_in_a_divergent_loop_opens_once_per_round():
    # every thread passes the barrier twice, though one half reaches it over another path
    body = """
        setp.lt.u32 %p1, %r0, 32; mov.b32 %r9, 0;
    LOOP:
        @%p1 bra HERE;
        add.s32 %r9, %r9, 10;
    HERE:
        bar.sync 0;
        add.s32 %r9, %r9, 1;
        setp.lt.u32 %p2, %r9, 2; setp.eq.b32 %p3, %r9, 11; or.pred %p2, %p2, %p3;
        @%p2 bra LOOP;
    """
    np.testing.assert_array_equal(per_thread(body, threads=64), [2] * 32 + [22] * 32)


def test_threads_at_different_barriers_are_refused():
    body = "setp.lt.u32 %p1, %r0, 5; @%p1 bra OTHER; bar.sync 0; bra.uni END; OTHER: bar.sync 0; END:"
    with pytest.raises(PtxError, match="snippet, PTX line .* different barriers"):
        run_ptx(body)


def test_every_cta_sees_its_own_indices_and_shared_memory():
    body = """
        mov.u32 %r2, %nctaid.x; mad.lo.s32 %r4, %r1, 32, %r0; mov.b32 %r3, buffer;
        setp.eq.b32 %p1, %r0, 0; @%p1 st.shared.b32 [%r3], %r1;
        bar.sync 0;
        ld.shared.b32 %r5, [%r3]; mad.lo.s32 %r5, %r5, 100, %r2;
        mad.wide.u32 %d9, %r4, 4, %d0; st.global.b32 [%d9], %r5;
    """
    # 700 CTAs of 32 threads are more than one batch
    result = np.zeros(700 * 32, np.uint32)
    run_ptx(body, result, ctas=700, shared=4)
    np.testing.assert_array_equal(result, np.repeat(np.arange(700) * 100 + 700, 32))


# --- warps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("bfly.b32 %r9, %r2, 5, 31, -1", LANES ^ 5),
        ("idx.b32 %r9, %r2, 3, 31, -1", np.full(32, 3)),
        ("idx.b32 %r9, %r2, %r3, 31, -1", LANES * 5 % 32),
    ],
)
def test_shuffles_read_from_the_lane_of_their_mode(text, source):
    result = per_thread(f"add.s32 %r2, %r0, 500; mul.lo.s32 %r3, %r0, 5; shfl.sync.{text};", threads=64)
    np.testing.assert_array_equal(result, np.concatenate([source, source + 32]) + 500)


def test_matrices_go_by_rows_of_sixteen_bytes_between_lanes_and_shared_memory():
    # lanes 0 to 7 name the rows in reverse, and each lane has a quarter of a row
    body = """
        and.b32 %r3, %r0, 7; sub.s32 %r3, 7, %r3; shl.b32 %r3, %r3, 4; add.s32 %r2, %r0, 500;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r2}; bar.sync 0;
        shl.b32 %r4, %r0, 2; ld.shared.b32 %r9, [%r4];
    """
    rows = np.arange(32).reshape(8, 4)[::-1].ravel() + 500
    np.testing.assert_array_equal(per_thread(body, shared=128), rows)
    again = f"{body} bar.sync 0; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r9}}, [%r3];"
    np.testing.assert_array_equal(per_thread(again, shared=128), np.arange(32) + 500)
    with pytest.raises(PtxError, match="multiple of 16"):
        per_thread("shl.b32 %r3, %r0, 2; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r3];", shared=128)


def test_a_part_of_a_warp_is_refused_where_all_of_it_has_to_come():
    body = "mov.b32 %r9, 0; setp.lt.u32 %p1, %r0, {}; @%p1 shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1;"
    with pytest.raises(PtxError, match="lane 16"):
        per_thread(body.format(16))
    per_thread(body.format(32), threads=64)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["global", "shared"])
def test_vectors_load_and_store_in_order(space):
    source, target = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    body = """
        mad.wide.u32 %d8, %r0, 16, %d0; mad.wide.u32 %d9, %r0, 16, %d1; shl.b32 %r10, %r0, 4;
        ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d8];
        st.space.v2.b32 [ADDRESS+8], {%r2, %r3}; st.space.v2.b32 [ ADDRESS + 0 ], { %r4, %r5 };
        ld.space.v4.b32 {%r2, %r3, %r4, %r5}, [ADDRESS]; st.global.v4.b32 [%d9], {%r2, %r3, %r4, %r5};
    """
    body = body.replace("space", space).replace("ADDRESS", "%d9" if space == "global" else "%r10")
    run_ptx(body, source, target, shared=512)
    np.testing.assert_array_equal(target.reshape(-1, 4), source.reshape(-1, 4)[:, [2, 3, 0, 1]])


def test_bytes_live_in_16_bit_registers():
    x, y = np.arange(250, 282).astype(np.uint8), np.zeros(64, np.uint8)
    body = """
        cvt.u64.u32 %d8, %r0; add.s64 %d2, %d0, %d8; add.s64 %d3, %d1, %d8;
        ld.global.b8 %h1, [%d2]; mov.b32 %r2, {%h1, %h1}; add.s32 %r2, %r2, 256; mov.b32 {%h2, %h3}, %r2;
        st.global.b8 [%d3], %h2; shr.u32 %r2, %r2, 8; mov.b32 {%h2, %h3}, %r2; st.global.b8 [%d3+32], %h2;
    """
    run_ptx(body, x, y)
    # the load left zeros above the byte, the stores left them out
    np.testing.assert_array_equal(y, [*x, *[1] * 32])


def test_parameters_extend_by_their_type():
    for kind, expected in {"s32": -5, "u32": 2**32 - 5}.items():
        result = np.zeros(1, np.int64)
        program = compile_ptx(f"ld.param.b64 %d0, [p0]; ld.param.{kind} %d1, [p1]; st.global.b64 [%d0], %d1;", 2)
        address = result.ctypes.data.to_bytes(8, "little")
        region = Region("result", result.ctypes.data, 8)
        program.launch((1, 1, 1), 32, {"p0": address, "p1": (-5 % 2**64).to_bytes(8, "little")}, [region])
        assert result[0] == expected


@pytest.mark.parametrize(
    "text", ["ld.global.b32 %r2, [%d9+4]", "st.global.b32 [%d9+4], %r0", "ld.global.b32 %r2, [%d9+-8]"]
)
def test_an_access_outside_the_arrays_is_refused(text):
    position, verb = -8 if "-8" in text else 128, "write" if text.startswith("st") else "read"
    with pytest.raises(
        OutOfBounds, match=rf"snippet, PTX line \d+: .*{verb} .* byte {position} of array0 of 128 bytes"
    ):
        run_ptx(f"{OWN} {text};", np.zeros(32, np.uint32))


def test_a_vector_that_begins_inside_and_ends_outside_is_refused():
    with pytest.raises(OutOfBounds, match="16 bytes .* byte 496 of array0 of 504 bytes"):
        run_ptx(
            "mad.wide.u32 %d9, %r0, 16, %d0; ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d9];", np.zeros(126, np.uint32)
        )


def test_one_access_may_not_run_over_from_one_array_to_the_next():
    array = np.zeros(64, np.uint32)
    with pytest.raises(OutOfBounds, match="byte 160 of array0 of 160 bytes"):
        run_ptx(f"{OWN} st.global.b32 [%d9], %r0;", array[:40], array[40:], threads=64)


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


@pytest.mark.parametrize(
    ("base", "offset", "place"), [(64, 0, 64), (0, 64, 64), (0, -4, 2**64 - 4), (-4, 0, 2**32 - 4)]
)
def test_shared_memory_has_bounds(base, offset, place):
    with pytest.raises(OutOfBounds, match=f"4 bytes at .* byte {place} of shared memory of 64 bytes"):
        run_ptx(f"mov.b32 %r2, {base}; st.shared.b32 [%r2+{offset}], %r0;", shared=64)


def test_shared_memory_that_nobody_wrote_reads_as_nan():
    result = per_thread("mov.b32 %r2, buffer; ld.shared.b32 %r9, [%r2];", shared=4)
    assert np.isnan(result.view(np.float32)).all()


@pytest.mark.parametrize("text", ["ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d0+4]", "st.shared.b32 [buffer+2], %r0"])
def test_a_misaligned_access_is_refused(text):
    with pytest.raises(PtxError, match="not a multiple of"):
        run_ptx(f"{text};", np.zeros(64, np.float64), shared=64)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "frobnicate.b32 %r2, %r0",
        "fma.rn.f32 %r2, %r0, %r0, %r0",
        "atom.global.add.u32 %r2, [%d0], 1",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4}",
        "call.uni (%r1), f, (%r2)",
        ".local .align 4 .b8 stack[8]",
        "{ .reg .b32 %inner",
        "add.rz.f32 %r2, %r0, %r0",
        "add.sat.s32 %r2, %r0, %r0",
        "add.f32 %r2, %r0, %r0",
        "fma.rn.relu.bf16 %h1, %h1, %h1, %h1",
        "mul.rn.ftz.f32 %r2, %r0, %r0",
        "ld.global.acquire.gpu.b32 %r2, [%d0]",
        "ld.global.L1::evict_last.b32 %r2, [%d0]",
        "ld.global.b32 %r2, [%d0], %d1",
        "ld.global.v4.b32 {%r2, %r3}, [%d0]",
        "ld.global.b32 %r2, [%r0]",
        "ld.global.b64 %r2, [%d0]",
        "ld.param.b64 %d2, [p7]",
        "ld.b32 %r2, [%d0]",
        "cvt.f16.f32 %h1, %r0",
        "cvt.rn.satfinite.e4m3x2.f32 %h1, %r0, %r0",
        "setp.lo.s32 %p1, %r0, 1",
        "bar.sync 1",
        "shfl.bfly.b32 %r2, %r0, 1, 31",
        "shfl.sync.bfly.b32 %r2, %r0, 1, 6175, -1",
        "shfl.sync.bfly.b32 %r2|%p1, %r0, 1, 31, -1",
        "add.s32 %r2, %d0, 1",
        "add.s32 %p1, %r0, 1",
        "mov.b32 {%h1, %h2, %h3}, %r0",
        "mov.u32 %r2, %clock",
        "mov.b32 %r2, nowhere",
        "mov.b64 %d2, buffer",
        "add.rn.f32 %r2, %r0, 1",
        "add.s32 %r2, %r0",
        "bra NOWHERE",
    ],
)
def test_what_is_not_known_raises_with_its_line(text):
    with pytest.raises(UnsupportedInstruction) as error:
        compile_ptx(f"{text};", 1)
    assert text in str(error.value) and "snippet, PTX line 10" in str(error.value)


def test_a_register_is_read_only_by_threads_that_wrote_it():
    # a sum may be made of it, but neither stored, nor an address, nor decide anything
    store = "mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %d0, %d1; st.global.b32 [%d1], %r3;"
    result = np.zeros(32, np.int32)
    with pytest.raises(PtxError, match=r"line \d+: st.global.b32 \[%d1\], %r3: a source was not written by thread 0"):
        run_ptx(f"add.s32 %r3, %r2, 1; {store}", result)
    partly = "setp.lt.u32 %p1, %r0, 7; @%p1 mov.b32 %r2, 1;"
    for use in (
        f"add.s32 %r3, %r2, 1; {store}",
        "mul.wide.u32 %d1, %r2, 4; add.s64 %d1, %d0, %d1; ld.global.b32 %r3, [%d1];",
        "setp.lt.u32 %p2, %r2, 7; @%p2 bra END; END:",
        "setp.lt.u32 %p2, %r2, 7; @%p2 mov.b32 %r3, 1;",
        f"mov.b32 %r3, 5; add.s32 %r3, %r2, 1; {store}",
    ):
        with pytest.raises(PtxError, match="not written by thread 7"):
            run_ptx(f"{partly} {use}", result)
    # a lane that takes it of another has not written either
    with pytest.raises(PtxError, match="not written by thread 6"):
        run_ptx(f"{partly} shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; {store}", result)
    run_ptx(f"{partly} shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; mov.b32 %r3, 2; {store}", result)
    assert (result == 2).all()
    # of a register that was packed of halves each half is by itself
    halves = "setp.lt.u32 %p1, %r0, 7; @%p1 mov.b16 %h2, 1; mov.b16 %h3, 9; mov.b32 %r2, {%h2, %h3};"
    run_ptx(f"{halves} mov.b32 {{_, %h4}}, %r2; mov.b32 %r3, {{%h4, %h4}}; {store}", result)
    assert (result == 9 + (9 << 16)).all()
    with pytest.raises(PtxError, match="not written by thread 7"):
        run_ptx(f"{halves} mov.b32 {{%h4, _}}, %r2; mov.b32 %r3, {{%h4, %h4}}; {store}", result)
    run_ptx(f"{partly} mov.b32 %r2, 3; add.s32 %r3, %r2, 1; {store}", result)
    assert (result == 4).all()
    run_ptx(f"{partly} @%p1 add.s32 %r3, %r2, 1; @!%p1 mov.b32 %r2, 2; add.s32 %r3, %r2, 1; {store}", result)
    assert result.tolist() == [2] * 7 + [3] * 25


def test_a_launch_of_another_number_of_threads_and_a_missing_entry_are_refused():
    with pytest.raises(PtxError, match="32 threads, not 64"):
        compile_ptx("").launch((1, 1, 1), 64, {}, [])
    with pytest.raises(PtxError, match="no entry other"):
        Program("", "other")
