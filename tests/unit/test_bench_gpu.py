"""The GPU check where there is no GPU: its dry run, its record, its page, and what it refuses."""

import json
import math
import threading
import time
import types
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import bench_gpu, bench_training
from benchmarks.gpu_bench import page, parts, record
from benchmarks.gpu_bench.layouts import write_layout
from benchmarks.gpu_bench.training import LAYOUTS, fitting, rows
from benchmarks.tables import write_between
from benchmarks.training_bench import turns
from benchmarks.training_bench.ceiling import network_flops
from benchmarks.training_bench.configurations import Row, base_words, method_words
from benchmarks.training_bench.workers import OutOfTime
from hrf_fast.assembly.components import build_components
from hrf_fast.cli import main
from hrf_fast.config.load import load_config
from hrf_fast.memory.activations import choose_activations, memory_for
from tests.loading import load_policy

pytestmark = pytest.mark.long

CPU = torch.device("cpu")


def facts(**changes):
    return {**record.facts_of(CPU, dry_run=True), **changes}


def test_without_a_gpu_the_check_says_what_was_skipped_and_exits_with_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "gpu", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "no GPU" in said and "tests: kernels; " in said and "training: sdxl-lora" in said and "--dry-run" in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_part_writes_its_result_and_a_second_one_skips_it(tmp_path, capsys, monkeypatch):
    # the tree may be edited between two runs
    here = facts(commit="abc", changes="")
    monkeypatch.setattr(bench_gpu, "facts_of", lambda device, dry_run: here)
    words = ["--dry-run", "--parts", "kernels: fp32", "--out", str(tmp_path)]
    bench_gpu.main(words)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert list(written["parts"]) == ["kernels: fp32"] and written["parts"]["kernels: fp32"]["state"] == "whole"
    text = (tmp_path / "gpu.md").read_text()
    assert "A dry run on a CPU" in text and "| tests: ratio | not run |" in text
    assert "- kernels: fp32: ran on a CPU with tiny sizes" in text and "- training: sd15: not run" in text
    bench_gpu.main(words)
    assert "kernels: fp32: whole already" in capsys.readouterr().err


def test_a_failed_part_stops_no_other_and_runs_again(tmp_path):
    made = record.Record(tmp_path / "gpu.json", facts())
    ran = []

    def fails(left):
        ran.append("fails")
        raise RuntimeError("CUDA out of memory")

    def works(left):
        ran.append("works")
        return {"state": record.WHOLE}

    for _ in range(2):
        bench_gpu.run({"a": fails, "b": works}, made, minutes=1)
    assert ran == ["fails", "works", "fails"]
    assert made.parts["a"]["reason"] == "RuntimeError: CUDA out of memory"
    bench_gpu.run({"c": works}, made, minutes=0)
    assert "c" not in made.parts


def test_proofs_run_side_by_side_and_before_what_is_timed(tmp_path):
    made, ran = record.Record(tmp_path / "gpu.json", facts()), []
    both = threading.Barrier(2, timeout=30)

    def proof(left):
        both.wait()
        ran.append("proof")
        return {"state": record.WHOLE}

    def timed(left):
        ran.append("timed")
        return {"state": record.WHOLE}

    bench_gpu.run({"kernels: x": timed, "tests: a": proof, "tests: b": proof}, made, minutes=1, together=2)
    assert ran == ["proof", "proof", "timed"] and all(map(made.is_whole, ("tests: a", "tests: b", "kernels: x")))


def test_an_interrupt_ends_the_proofs_that_run_and_those_that_wait(tmp_path, monkeypatch):
    path, ran = tmp_path / "test_it.py", []
    path.write_text("import time\ndef test_sleeps():\n    time.sleep(60)\n")
    made = record.Record(tmp_path / "gpu.json", facts())

    def interrupted(running):
        while not parts._RUNNING:
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_gpu, "as_completed", interrupted)
    proofs = {"tests: a": partial(parts.run_tests, path, dry_run=True), "tests: b": ran.append}
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.run(proofs, made, minutes=5)
    assert time.monotonic() - began < 30 and not ran and not parts._RUNNING


def test_a_file_of_tests_runs_without_a_limit_and_is_cut_off_at_one(tmp_path):
    path = tmp_path / "test_it.py"
    path.write_text("def test_passes():\n    pass\n")
    assert parts.run_tests(path, math.inf, dry_run=True)["passed"] == ["test_passes"]
    assert parts.run_tests(path, 0.01, dry_run=True) == {"state": record.UNFINISHED, "reason": "0 s were not enough"}


class Late:
    """A worker that is ready at once, or never."""

    def __init__(self, row, words, **_):
        self.ready_at = float(row.name)
        self.stopped = False
        Late.made.append(self)

    def ready(self, until=math.inf):
        if self.ready_at > until:
            raise OutOfTime("it did not start in time")
        return {"seconds": 1.0, "record": {}}

    def iterate(self):
        counts = {"batches": 1, "images": 1, "images_with_gradient": 1, "peak_bytes": 1}
        return {"seconds": 1.0, "record": {"window_starts": [0]}, **counts}

    def bare(self):
        return 1.0

    def stop(self):
        self.stopped = True


def measured(monkeypatch, tmp_path, starts, until, left_out=None):
    monkeypatch.setattr(turns, "start_worker", Late)
    Late.made = []
    table = [(Row(str(at), {}, kind="literal" if n == 0 else "ours"), []) for n, at in enumerate(starts)]
    common = {"where": "x", "folder": tmp_path, "threads": 1, "rounds": 3, "per_round": 1, "images": 2, "clock": "wall"}
    return turns.measure(table, **common, advance=lambda *_: None, until=until, left_out=left_out)


def test_rows_and_rounds_that_time_does_not_allow_are_left_out(monkeypatch, tmp_path):
    far = time.monotonic() + 3600
    left_out = []
    rows_of = measured(monkeypatch, tmp_path, [0, far * 10, 0], far, left_out)
    assert left_out == [f"{far * 10}: it did not start in time"]
    assert [row["name"] for row in rows_of] == ["0", "0"]
    assert len(rows_of[0]["seconds"]) == 3 and all(worker.stopped for worker in Late.made)


@pytest.mark.parametrize(
    ("starts", "until", "message"),
    [([0, 0], 1.0, "no time left for a round"), ([0, 9e9], 9e8, "no row beside the first"), ([9e9, 0], 9e8, "in time")],
)
def test_a_layout_without_a_round_is_unfinished(monkeypatch, tmp_path, starts, until, message):
    monkeypatch.setattr(turns.time, "monotonic", lambda: 9e8 if message.startswith("no row") else 2.0)
    with pytest.raises(OutOfTime, match=message):
        measured(monkeypatch, tmp_path, starts, until)
    assert all(worker.stopped for worker in Late.made)


@pytest.mark.slow
def test_the_dry_run_of_tests_and_of_a_layout_is_whole(tmp_path):
    bench_gpu.main(["--dry-run", "--parts", "tests: ratio", "training: celebahq-256", "--out", str(tmp_path)])
    parts_of = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["state"] for name, part in parts_of.items()} == {
        "tests: ratio": "whole",
        "training: celebahq-256": "whole",
    }


def test_memory_of_others_is_read_before_this_process_has_a_context(monkeypatch):
    called = []
    numbers = {"memory.used": "1234 MiB"}
    monkeypatch.setattr(record, "_smi", lambda field, device: called.append(field) or numbers.get(field))
    monkeypatch.setattr(record, "machine", lambda device, threads: called.append("context") or {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert record.facts_of(torch.device("cuda", 0), dry_run=False)["memory_used_by_others"] == "1234 MiB"
    assert called.index("memory.used") < called.index("context")


def test_nvidia_smi_is_asked_for_the_card_that_torch_counts(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        return types.SimpleNamespace(stdout="580\n")

    monkeypatch.setattr(record.subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert record._smi("driver_version", torch.device("cuda", 1)) == "580"
    assert commands[0][-1] == "--id=5"


def test_missing_packages_are_named_and_what_is_installed_later_is_proven(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "find_spec", lambda name: None if name == "xformers" else name)
    monkeypatch.setattr(bench_gpu, "all_parts", lambda device, dry_run: {"a": lambda left: {"state": record.WHOLE}})
    bench_gpu.main(["--dry-run", "--out", str(tmp_path)])
    line = "xformers is not installed; `make install-gpu gpu-check` proves what needs it"
    assert line in capsys.readouterr().err and f"- {line}" in (tmp_path / "gpu.md").read_text()
    made = record.Record(tmp_path / "other.json", facts(missing=["xformers"]))
    made.add("a", {"state": record.WHOLE})
    assert not record.Record(made.path, facts(missing=[])).is_whole("a")


def test_a_record_of_other_code_or_another_card_is_not_gone_on_with(tmp_path):
    made = record.Record(tmp_path / "gpu.json", facts(commit="abc"))
    made.add("a", {"state": record.WHOLE})
    assert record.Record(made.path, facts(commit="abc")).is_whole("a")
    for change in ({"commit": "abd"}, {"commit": "abc", "device": "another card"}, {"commit": "abc", "dry_run": False}):
        assert not record.Record(made.path, facts(**change)).is_whole("a")


def test_outcomes_of_tests_are_read_by_name(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b">'
        f'<failure message="{parts.ROOT / "b.py"}: 1 != 2"/></testcase>'
        '<testcase name="c"><skipped message="TF32 is CUDA\'s"/></testcase></testsuite></testsuites>'
    )
    outcome = {"passed": ["a"], "failed": {"b": "b.py: 1 != 2"}, "skipped": {"c": "TF32 is CUDA's"}}
    assert parts.read_report(report) == outcome
    text = page.page(facts(), {"tests: x": {"state": "failed", **outcome}}, ["tests: x"])
    assert "| tests: x | failed: 1 passed, 1 failed, 1 skipped |" in text
    assert "- tests: x: c: TF32 is CUDA's" in text and "- tests: x: b: b.py: 1 != 2" in text


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--parts", "all"], "--parts 'all' names no part"),
        (["--minutes", "0"], "--minutes is 0.0"),
        (["--write", "Makefile"], "--write is Makefile, which has no lines '<!-- hrf bench gpu -->'"),
        (["--write", "nowhere.md"], "--write is nowhere.md, which is no file"),
        (["--dry-run", "--write", "README.md"], "--write is README.md"),
    ],
)
def test_what_cannot_be_is_refused(words, refusal):
    with pytest.raises(ValueError, match=refusal):
        bench_gpu.main(words)


def test_a_dry_run_has_all_the_time_unless_minutes_are_given(tmp_path, monkeypatch):
    limits = []

    def part(left):
        limits.append(left)
        return {"state": record.WHOLE}

    monkeypatch.setattr(bench_gpu, "all_parts", lambda device, dry_run: {"a": part})
    for index, minutes in enumerate(([], ["--minutes", "2"])):
        bench_gpu.main(["--dry-run", "--out", str(tmp_path / str(index)), *minutes])
    assert limits[0] == float("inf") and 100 < limits[1] <= 120
    assert bench_gpu.parse([]).minutes == 10


def test_markers_are_whole_lines(tmp_path):
    first, last = page.MARKERS
    path = tmp_path / "page.md"
    path.write_text(f"between `{first}` and `{last}`:\n\n{first}\nold\n{last}\n")
    write_between(path, page.MARKERS, "new")
    assert path.read_text() == f"between `{first}` and `{last}`:\n\n{first}\nnew\n{last}\n"


def test_the_readme_and_the_page_of_speed_have_the_markers():
    for name in ("README.md", "docs/speed.md"):
        assert bench_gpu.parse(["--write", str(parts.ROOT / name)]).write == parts.ROOT / name


def result(name, seconds):
    numbers = {"images_per_second": 40 / seconds, "speedup": 8 / seconds, "speedups": [8 / seconds], "mfu": 0.5}
    numbers |= {"seconds": [seconds], "seconds_median": seconds, "overhead": 1.02, "peak_bytes": 2e9}
    return {"name": name, **numbers}


def test_the_readme_s_table_has_the_fastest_of_ours_and_the_kernels(tmp_path):
    trained = {"title": "DDPM", "rows": [result("loop", 8.0), result("slow", 4.0), result("fast", 2.0)]}
    gpu = {"cold_ms": 0.035, "cold_ms_spread": [0.0342, 0.0366], "cold_gb_per_s": 2500.0, "cold_share_of_peak": 0.82}
    providers = {"two-stage": {"gpu": gpu}, "literal eager": {"gpu": {"cold_ms": 0.35}}}
    case = {"shape": [3, 256, 256], "batch": 16, "clamp": True, "providers": providers}
    measured = {"training: x": trained, "kernels: fp32": {"result": {"cases": [case]}}}
    text = page.table(facts(device="a card", commit="abc"), measured)
    speed = "20.00 trained images/s, MFU 50%, time over bare calls 1.020, peak 2.00 GB"
    assert f"| DDPM: fast | {speed} | 4.00× [4.00, 4.00] the published loop |" in text
    speed = "35.0 [34.2, 36.6] µs, 2500 GB/s, 82% of the card's"
    assert f"| kernels: fp32, loss and gradient at 16×3×256² | {speed} | 10.0× literal eager |" in text
    assert text.startswith("| a card, torch ") and "commit abc" in text
    path = tmp_path / "README.md"
    path.write_text(f"before\n{page.MARKERS[0]}\nold\n{page.MARKERS[1]}\nafter\n")
    write_between(path, page.MARKERS, text)
    assert path.read_text() == f"before\n{page.MARKERS[0]}\n{text}\n{page.MARKERS[1]}\nafter\n"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="--write is .*README.md"):
        write_between(path, page.MARKERS, text)


# --- the layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_tiny_layout_loads_and_its_activations_keep_their_size(kind, tmp_path):
    policy = load_policy(write_layout(kind, tmp_path, tiny=True), num_inference_steps=4)
    condition = policy.condition([None] * 2)
    latents = torch.randn(2, *policy.latent_shape)
    with torch.no_grad():
        output = policy.predict(latents, 1, condition).model_output
    assert 1e-3 < float(output.std()) < 1e3
    assert policy.decode(latents).isfinite().all()


def test_what_is_counted_of_a_call_is_less_for_adapters_and_a_forward_is_a_third_of_both(tmp_path):
    model = write_layout("sd15", tmp_path, tiny=True)
    flops = [network_flops(load_config([f"model.name={model}", *more])) for more in ([], ["lora.rank=2"])]
    (forward, both), (_, adapted) = flops
    # a backward to all weights is two forwards, less the first layer's inputs
    assert 2.7 * forward < both <= 3 * forward and forward < adapted < both


def test_rows_that_do_not_fit_are_named(tmp_path, monkeypatch):
    layout = replace(LAYOUTS["celebahq-256"], groups=2, group_size=3)
    model = write_layout("celebahq", tmp_path, tiny=True)
    words = base_words(model, steps=6, groups=2, group_size=3, device="cpu", seed=0, schedule="full")
    table = [(row, [*words, *row.words]) for row in rows(layout, CPU)]
    assert fitting(table, None) == (table, [])
    # 3 images a call as published, 6 in ours
    needs = types.SimpleNamespace(need=lambda engine, precision, mode, images: {3: 4e9, 6: 9e9}[images])
    monkeypatch.setattr("benchmarks.gpu_bench.training.plan", lambda *_, **__: needs)
    chosen, left_out = fitting(table, 10 * 10**9)
    assert [row.name for row, _ in chosen] == ["the published loop", "published order"]
    # in order: the loop 4 of 9 GB; ours 9 of the 5 that are left; the published order 4 of 5
    assert left_out == ["on_policy, one step, channels_last: too little memory: it needs 9 GB, 5 GB are left"]


# planned needs in GB of the loop, the published order, ours, ours in bf16
NEEDS = {"celebahq-256": (13, 13, 46.3, 25.4), "sd15": (22.2, 22.2, 29.8, 25.8), "sdxl-lora": (36.9, 36.9, 36.9, 32.9)}
BF16, AUTO = ", channels_last, bf16", ", channels_last, bf16, compile unet, activations auto in "
# 76 GB usable: the loop, compiled bf16 with what the others leave, bf16
CHOSEN_OF_80_GB = {
    "celebahq-256": [AUTO + "33 GB"],  # 13 + 30 + 25.4, 7.6 left
    "sd15": [AUTO + "28 GB", BF16],  # 22.2 + 2 · 25.8, 2.2 left
    "sdxl-lora": [AUTO + "38 GB"],  # 36.9 + 32.9, 6.2 left, but no more than half
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_card_of_80_gb_runs_the_rows_that_matter(name, tmp_path, monkeypatch):
    layout, (loop, order, ours, bf16) = LAYOUTS[name], NEEDS[name]
    model = write_layout("celebahq", tmp_path, tiny=True)
    words = base_words(model, steps=6, groups=layout.groups, group_size=3, device="cpu", seed=0, schedule="full")
    table = [(row, [*words, *row.words]) for row in rows(replace(layout, lora_rank=0), torch.device("cuda"))]
    few = layout.group_size

    def need(engine, precision, mode, images):
        return 1e9 * (bf16 if precision == "bf16" else order if images == few else ours)

    assert loop == order and need("plain", "fp32", "replay", few) == loop * 1e9
    monkeypatch.setattr("benchmarks.gpu_bench.training.plan", lambda *_, **__: types.SimpleNamespace(need=need))
    chosen, left_out = fitting(table, int(76e9 / 0.9), tried=layout.tried)
    first, *others = [row.name for row, _ in chosen]
    prefix = "on_policy, one step"
    assert first == "the published loop" and others == [prefix + text for text in CHOSEN_OF_80_GB[name]]
    assert len(left_out) == len(table) - len(chosen) and all("too little memory" in line for line in left_out)


def test_the_row_that_keeps_plans_with_the_budget_that_was_set_aside_for_it(tmp_path):
    layout = replace(LAYOUTS["celebahq-256"], groups=2, group_size=3)
    model = write_layout("celebahq", tmp_path, tiny=True)
    words = base_words(model, steps=6, groups=2, group_size=3, device="cpu", seed=0, schedule="full")
    table = [(row, [*words, *row.words]) for row in rows(layout, torch.device("cuda"))]
    free = 10**9
    chosen, left_out = fitting(table, free)
    assert left_out == []
    ((auto, auto_words),) = ((row, words) for row, words in chosen if "auto" in row.name)
    # half of what is usable, 0.45 GB; auto keeps its own tenth of 0.5 GB in reserve
    assert auto.name.endswith("activations auto in 0.45 GB")
    assert auto.options["compute.memory_budget"] == "500MB" and "compute.memory_budget=500MB" in auto_words
    on_cpu = ["compute.precision=fp32", "compute.compile=none", "compute.deterministic=true"]
    config, components = build_components(load_config([*auto_words, *on_cpu]))
    choice = choose_activations(config, components.policy, memory_for(config, components.policy))
    assert "of 500 MB (left for training by compute.memory_budget" in choice.reason and choice.kept_pairs > 0


# --- rows of the training benchmark -----------------------------------------------------------------------------------


def test_windows_may_be_chosen_and_each_has_its_iteration_of_a_turn():
    arguments = bench_training.parse(["--methods", "hrf", "--starts", "10", "30"])
    assert "window.kwargs.clusters=[[10,11],[30,31]]" in method_words("fashion", "hrf", arguments)
    assert bench_training.per_round("hrf", arguments) == 2
    for words in (["--starts", "39", "--methods", "hrf"], ["--starts", "10"]):
        with pytest.raises(ValueError, match="--starts"):
            bench_training.parse(words)


@pytest.mark.parametrize("units", [[], ["avx512_bf16"]])
def test_bf16_rows_are_left_out_where_bf16_is_emulated(monkeypatch, units):
    from benchmarks.training_bench.configurations import table_of

    monkeypatch.setattr("hrf_fast.cpu.cpu_bf16_units", lambda: units)
    arguments = bench_training.parse(["--methods", "hrf", "--device", "cpu"])
    names = [row.name for row, _ in table_of("hrf", [], arguments)]
    assert "on_policy, keep, one step, channels_last, compile unet" in names
    assert any("bf16" in name for name in names) == bool(units)
