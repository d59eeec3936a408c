"""The kernel benchmark on a small case, its counter by hand, and the compile matrix with its rules."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import bench_kernels
from benchmarks.kernel_bench import page, timing
from benchmarks.kernel_bench.counting import Count, Traffic, count, count_analytic
from benchmarks.kernel_bench.providers import NAMES, Disagreement, Result, check, exact, make_case, providers
from hrf_fast.cli import main

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
EAGER = ("literal eager", "folded eager", "analytic")
interpreted = pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="nothing is compiled")


def small_case(clamp=True, shape=(3, 8, 8), dtype=torch.float32):
    return make_case(shape, 4, clamp=clamp, dtype=dtype, device="cpu", seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clamp", [False, True])
def test_every_eager_provider_agrees_with_float64(clamp, dtype):
    case = small_case(clamp, dtype=dtype)
    for name, run in providers(EAGER, (3, 8, 8)).items():
        assert check(name, run(case), exact(case))["log_prob"] < 1e-6


def test_the_case_has_clamped_elements_and_both_kinds_of_samples():
    case = make_case((3, 32, 32), 32, clamp=True, dtype=torch.float32, device="cpu", seed=0)
    x0 = case.coef.x0_latents * case.latents + case.coef.x0_output * case.model_output
    assert 0.05 < (x0.abs() > 1).float().mean() < 0.95
    moved = exact(case).gradient.flatten(1).abs().sum(1) > 0
    assert moved.any() and not moved.all()


@pytest.mark.parametrize("field", ["loss", "log_prob", "gradient"])
@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_an_error_of_a_percent_is_red(field, wrong):
    truth = exact(small_case())
    spoilt = truth._replace(**{field: getattr(truth, field) * wrong})
    with pytest.raises(Disagreement, match=f"analytic: {field} is off by"):
        check("analytic", Result(*(value.float() for value in spoilt)), truth)


def test_red_stops_the_run_before_anything_is_timed(monkeypatch, capsys):
    def no_clock(*args, **kwargs):
        raise AssertionError("timed")

    monkeypatch.setattr(
        "benchmarks.kernel_bench.providers.analytic", lambda case: exact(small_case(clamp=not case.coef.x0_clip))
    )
    monkeypatch.setattr(timing, "interleaved", no_clock)
    words = ["bench", "kernels", "--shapes", "3x8x8", "--batch", "4", "--clamp", "off", "--providers", "analytic"]
    monkeypatch.setattr(bench_kernels, "count_all", lambda *args: {})
    assert main(words) == 1
    assert "error: analytic: gradient is off by" in capsys.readouterr().err


def test_traffic_by_hand():
    x, y, z = (torch.ones(2, 10) for _ in range(3))
    with Traffic(sample=10) as traffic:
        torch.mul(x, y, out=z)  # reads 2, writes 1
        z.add_(x)  # reads 2, writes 1
        z.view(4, 5).sum()  # reads 1; a view and a scalar cost nothing
        torch.zeros_like(x)  # writes 1
        x * torch.ones(1, 1).expand(2, 10)  # reads 1, writes 1: what is expanded is small
    assert traffic.bytes == 10 * x.nbytes
    assert traffic.calls == 6


def test_the_literal_formula_moves_several_times_what_ours_does():
    case = small_case(clamp=False)
    runs = providers(EAGER, (3, 8, 8))
    literal, folded = count(runs["literal eager"], case), count(runs["folded eager"], case)
    assert literal.tensors > 2 * count_analytic(case).tensors > folded.tensors
    assert literal.calls > 60


def test_a_run_prints_tables_and_writes_json(tmp_path, capsys):
    out = tmp_path / "k.json"
    words = ["--shapes", "3x8x8", "--batch", "4", "--seconds", "0", "--threads", "1", "--out", str(out)]
    assert main(["bench", "kernels", *words, "--providers", *EAGER, "two-stage", "one-program"]) == 0
    printed = capsys.readouterr().out
    assert "GPU columns" in printed and "are empty" in printed and "GB/s |" not in printed
    assert "| two-stage | 7 | 3 | 7 | 3 |" in printed and "| one-program | 4 | 2 | 4 | 2 |" in printed
    assert "fashion" in printed and "of the step" in printed
    result = json.loads(out.read_text())
    assert {"device", "cpu", "versions", "python", "commit", "threads"} <= set(result["machine"])
    assert result["machine"]["commit"] in printed and {"seed", "dtype", "clock"} <= set(result)
    assert [(case["shape"], case["batch"], case["clamp"]) for case in result["cases"]] == [
        ([3, 8, 8], 4, False),
        ([3, 8, 8], 4, True),
    ]
    for case in result["cases"]:
        assert set(case["providers"]) == set(EAGER)
        assert case["providers"]["analytic"]["vs"]["literal eager"] > 0
    assert 0 < result["unet"]["share_of_step"]["analytic"] < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "3x32"], "--shapes has '3x32'"),
        (["--shapes", "3x32x0"], "--shapes has '3x32x0'"),
        (["--batch", "0"], "--batch is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--seconds", "-1"], "--seconds is -1.0"),
        (["--providers", "magic"], "--providers has 'magic'"),
        (["--clock", "cpu"], "--clock cpu"),
        (["--out", "nowhere/k.json"], "--out is nowhere"),
        (["--device", "abacus"], "--device is 'abacus'"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    assert main(["bench", "kernels", *words]) == 1
    assert message in capsys.readouterr().err


def test_without_the_repository_the_command_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("hrf_fast.cli.__file__", str(tmp_path / "hrf_fast" / "cli.py"))
    assert main(["bench", "kernels"]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_gpu_numbers_by_hand(monkeypatch):
    # 8e6 bytes in 2 ms are 4 GB/s, a hundredth of a peak of 400
    import triton.testing

    ran = []

    def graph_ms(calls, keep):
        if not keep:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        ran.extend(call() for call in calls)
        return [2.0, 0.8, 3.2]

    monkeypatch.setattr(triton.testing, "do_bench", lambda function, quantiles: [100 * q / 5 for q in quantiles])
    monkeypatch.setattr(triton.testing, "get_dram_gbps", lambda: 400.0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "launches", lambda function: 3)
    monkeypatch.setattr(timing, "graph_ms", graph_ms)
    times = timing.gpu_times(lambda case: case, ["a", "b"], 8e6)
    # each case in its turn
    assert ran == ["a", "b"]
    assert times["cold_gb_per_s"] == pytest.approx(4) and times["cold_share_of_peak"] == pytest.approx(0.01)
    # the median, and the 20th and 80th percentile
    assert times["cold_ms"] == 2 and times["cold_ms_spread"] == [0.8, 3.2]
    assert times["launched_ms"] == 10 and times["launched_ms_spread"] == [4, 16]
    assert times["warm_ms"] is None and times["warm_gb_per_s"] is None
    assert times["not_captured"] == "operation not permitted when stream is capturing"
    case = {"shape": [3, 8, 8], "batch": 4, "clamp": True, "providers": {"two-stage": {"gpu": times, "errors": {}}}}
    text = page._gpu({"cases": [case], "peak_gb_per_s": 400.0, "read_write_gb_per_s": 350.0})
    assert "| 3×8×8 | 4 | on | two-stage | 2 [0.8, 3.2] |  | 10 [4, 16] | 4 | 0.01 |  | 3 |" in text
    assert "which the share is of: 400; of a kernel that reads and writes 1 GB: 350." in text
    # as files of before that kernel have it
    older = page._gpu({"cases": [case], "peak_gb_per_s": 400.0, "copy_gb_per_s": 300.0})
    assert "of a copy of 1 GB: 300." in older


@pytest.mark.parametrize(("size", "count"), [(30 * 2**20, 7), (2**30, 2), (1000, 64)])
def test_cases_in_turn_are_four_times_the_cache(monkeypatch, size, count):
    # 200 MB over cases of 30 MB; never one alone, nor thousands of launches
    properties = types.SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert timing.rotation(size, torch.device("cuda", 0)) == count


def test_copies_of_a_case_are_equal_and_have_memory_of_their_own():
    case = make_case((3, 4, 4), 2, clamp=True, dtype=torch.bfloat16, device="cpu", seed=0)
    first, second = case.copies(2)
    # output and gradient in bf16, latents and next latents in fp32, of 96 numbers each
    assert first is case and case.nbytes == 96 * (2 + 2 + 4 + 4)
    for name in ("model_output", "latents", "next_latents"):
        one, two = getattr(first, name), getattr(second, name)
        assert one.equal(two) and one.data_ptr() != two.data_ptr()


def test_a_case_that_time_does_not_allow_is_named():
    words = ["--shapes", "3x8x8", "--batch", "4", "--seconds", "0", "--unet", "none", "--providers", "literal eager"]
    result = bench_kernels.benchmark(bench_kernels.parse(words), until=0.0)
    assert result["unfinished"] == ["3x8x8 B 4 clamp off", "3x8x8 B 4 clamp on", "UNet"] and result["cases"] == []
    assert "not measured, time was up: 3x8x8 B 4 clamp off" in page.page(result)


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    # 10/5, 30/10, 8/2: the median is 3, whatever a loaded round did to both
    assert timing.median_ratio([10.0, 30.0, 8.0], [5.0, 10.0, 2.0]) == 3


def test_inductor_is_left_out_where_there_is_no_compiler(monkeypatch):
    from benchmarks.kernel_bench.providers import compile_fails

    assert compile_fails(torch.device("cuda")) is None
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: (_ for _ in ()).throw(RuntimeError()))
    assert "install g++" in compile_fails(torch.device("cpu"))


@pytest.mark.slow
def test_torch_compile_agrees_and_counts_itself():
    from benchmarks.kernel_bench.counting import count_compiled

    case = small_case(clamp=False, shape=(3, 16, 16))
    run = providers(("torch.compile",), (3, 16, 16))["torch.compile"]
    counted = count_compiled(run, case)
    check("torch.compile", run(case), exact(case))
    # it reads three inputs, and writes and reads at least one result
    assert (
        isinstance(counted, Count)
        and 5 <= counted.tensors < count(providers(EAGER, (3, 16, 16))["literal eager"], case).tensors
    )


def test_the_fused_providers_agree_in_the_interpreter():
    code = (
        "import sys; sys.path.insert(0, '.');"
        "from benchmarks.kernel_bench.providers import *;"
        "case = make_case((3, 8, 8), 2, clamp=True, dtype=torch.float32, device='cpu', seed=0);"
        "runs = providers(('two-stage', 'one-program'), (3, 8, 8));"
        "print([check(name, run(case), exact(case))['gradient'] < 2e-6 for name, run in runs.items()])"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    assert result.stdout == "[True, True]\n"


def test_the_one_program_plan_is_offered_up_to_its_limit():
    assert "one-program" in providers(NAMES[3:], (2, 64, 64))
    assert "one-program" not in providers(NAMES[3:], (3, 64, 64))


@interpreted
def test_the_rules_hold_on_sm_90():
    from benchmarks.compile_kernels import KERNELS, NORM_KERNELS, matrix, table

    rows = matrix(["sm_90"], dtypes=["bf16"], shapes=[(3, 32, 32), (3, 256, 256), (3, 33, 33)], options=["all"])
    assert [fault for row in rows for fault in row.faults()] == []
    expected = {kernel.__name__.removesuffix("_kernel") for kernel in (*KERNELS, *NORM_KERNELS)}
    assert {row.kernel.split(",")[0] for row in rows} == expected
    # with every option a gradient reads 3 bf16 and 2 fp32 tensors and writes 2 bf16 ones
    one = next(row for row in rows if row.kernel == "one_program" and row.aligned)
    named = {access.argument for access in one.reading.accesses}
    assert {"model_output", "unconditional", "reference", "latents", "next_latents", "gradient"} <= named
    # a block's pixels lie a sample's channels apart, and its channels side by side
    assert one.narrowest == 128 == next(row for row in rows if row.kernel == "moments" and row.aligned).narrowest
    assert "| one_program; bf16 |" in table(rows)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_rules_hold_everywhere(target):
    from benchmarks.compile_kernels import matrix

    assert [fault for row in matrix([target]) for fault in row.faults()] == []


@interpreted
def test_each_broken_rule_is_a_sentence():
    from benchmarks.compile_kernels import Row
    from benchmarks.kernel_bench.assembly import Access, Reading

    def faults(shape, **changed):
        good = Reading(registers=128, spilled=0, accesses=[Access("latents", 128), Access("loss", 32)], fused=0)
        return Row("sm_90", "fp32", shape, "plain", "step", good._replace(**changed)).faults()

    aligned, ragged = (3, 32, 32), (3, 33, 33)
    narrow = [Access("gradient", 64)]
    assert faults(aligned) == faults(ragged) == []
    assert faults(aligned, spilled=8) == ["step on sm_90, fp32 3×32×32, options plain: spills 8 bytes"]
    assert len(faults(ragged, fused=1, spilled=4)) == 2
    assert "129 registers, more than 128" in faults(aligned, registers=129)[0]
    assert "access of 64 bits" in faults(aligned, accesses=narrow)[0]
    # Triton can't know the alignment of a ragged sample's start
    assert faults(ragged, registers=200, accesses=narrow) == []


@interpreted
def test_the_table_is_written_between_its_markers(tmp_path):
    from benchmarks.compile_kernels import MARKERS
    from benchmarks.tables import write_between

    page = tmp_path / "README.md"
    page.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    write_between(page, MARKERS, "new")
    assert page.read_text() == f"before\n{MARKERS[0]}\nnew\n{MARKERS[1]}\nafter\n"
    page.write_text("none")
    with pytest.raises(ValueError, match="to write between"):
        write_between(page, MARKERS, "new")


@interpreted
def test_compiling_leaves_triton_as_it_was_and_refuses_the_unknown():
    import triton
    from triton.backends.compiler import GPUTarget

    from benchmarks.compile_kernels import KERNELS, matrix
    from benchmarks.kernel_bench.compile_only import collect

    before = triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), collect(GPUTarget("cuda", 90, 32), KERNELS):
        1 / 0  # noqa: B018 (raises)
    assert triton.runtime.driver._active is before
    with pytest.raises(ValueError, match="'sm_1' is not known; use one of sm_80"):
        matrix(["sm_1"])


def test_accesses_are_followed_to_their_arguments():
    from benchmarks.kernel_bench.assembly import _llvm_accesses, _ptx_accesses

    ptx = """
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_1];
	mul.wide.s32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
	add.s64 	%rd5, %rd2, %rd3;
	@%p1 st.global.b16 [ %rd5 + 0 ], { %rs1 };
	"""
    assert list(_ptx_accesses(ptx)) == [({0}, 128), ({1}, 16)]
    ir = """
define amdgpu_kernel void @k(ptr addrspace(1) inreg %0, ptr addrspace(1) inreg %1, i32 inreg %2) #0 {
  %4 = getelementptr float, ptr addrspace(1) %0, i64 %9
  %5 = load <4 x float>, ptr addrspace(1) %4, align 16
  %6 = tail call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %1, i16 0, i64 9, i32 1)
  tail call void @llvm.amdgcn.raw.ptr.buffer.store.i16(i16 %8, ptr addrspace(8) %6, i32 %7, i32 0, i32 0)
  %8 = load <4 x float>, ptr addrspace(3) @global_smem, align 16
}
"""
    assert list(_llvm_accesses(ir)) == [({0}, 128), ({1}, 16)]
