"""Every engine on two ranks against one process: gradients, weights after iterations, resume, over gloo on the CPU."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hrf_fast.cli import main
from tests.distributed import cases as cases_of_ranks
from tests.distributed.ranks import run_cases
from tests.runs import checkpoint_weights, equal, metrics, panels, weights

pytest.importorskip("deepspeed")
CASES = "tests.distributed.cases"
ENGINES = {
    "plain": [],
    **{name: [f"engine.deepspeed=configs/deepspeed/{name}.json"] for name in ("zero0", "zero1", "zero2", "zero3")},
    "overlap": ["engine.deepspeed=configs/deepspeed/zero2_overlap.json"],
    "offload2": ["engine.deepspeed=configs/deepspeed/zero2_offload.json"],
    "offload": ["engine.deepspeed=configs/deepspeed/zero3_offload.json"],
}
SEARCH = {
    "dynamic": ["window.schedule=dynamic", "window.kwargs.search=exact"],
    "bandit": ["window.schedule=dynamic", "window.kwargs.search=bandit"],
}
LOW = ("bf16", "fp16")
LORA = ["lora.rank=2"]
# adapters and normalisations are fp32
MIXED = [*LORA, "compute.precision=bf16", "lora.base_precision=bf16"]
CHECKPOINTED = ("plain", "zero2", "zero3")
# with all forwards before the first backward
KEPT = ("plain", "zero0", "zero1", "zero2")
# cases of `make test`; the others are slow ones, of engines and modes between these
QUICK = {"plain", "zero2", "zero3", "zero3 checkpoint"}
# relative: sums over ranks in another order
GRADIENT_TOLERANCE = 1e-6
# of the largest change
WEIGHT_TOLERANCE = 2e-5


def cases(*names):
    """Parameters of a test, of which all but the quick ones are slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def words(model, **options):
    """A run of 2 groups of 3 in one optimizer step an iteration, windows of any length, in 4 denoising steps."""
    values = {
        "model.name": model,
        "sample.num_inference_steps": 4,
        # so that calls are equal whatever a rank holds of anchors, groups and panels
        "compute.images_per_call": 1,
        "window.schedule": "random",
        "reward.name": f"{CASES}:coarse",
        "train.iterations": 2,
        "train.groups_per_iteration": 2,
        "train.groups_per_step": 2,
        "train.group_size": 3,
        # steps so large that their fp32 rounding is below the tolerance, and no division by tiny gradients
        "optimizer.learning_rate": 0.02,
        "stop.max_drift": 0,
        "optimizer.kwargs.eps": 0.01,
        "evaluation.every": 0,
        "evaluation.panel_size": 2,
        "run.progress": "quiet",
        **options,
    }
    return [f"{name}={value}" for name, value in values.items()]


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def trained(run: Path) -> dict[str, torch.Tensor]:
    """By file, what a run has come to after two iterations."""
    checkpoint = run / "checkpoints" / "iteration-000002"
    files = {name: flat(checkpoint_weights(checkpoint, name)) for name in ("weights.safetensors", "ema.safetensors")}
    return {**files, "model": flat(weights(run))}


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory, request):
    """Every case below, those of one process in this one: (results of the cases, folder of their runs)."""
    every = "not slow" not in request.config.getoption("markexpr")
    engines = {name: options for name, options in ENGINES.items() if every or name in QUICK}
    folder = tmp_path_factory.mktemp("engines")

    def run(name, *more, **options):
        return ("run", [*words(tiny_model, **{"run.folder": folder / name, **options}), *more])

    def step(*more):
        return (
            "gradient",
            [
                *words(tiny_model, **{"compute.images_per_call": 0, "sample.num_inference_steps": 6}),
                "train.groups_per_iteration=4",
                "train.groups_per_step=4",
                "optimizer.max_grad_norm=0",
                *more,
            ],
        )

    checkpoint, ema, split = "compute.activations=checkpoint", "optimizer.ema_decay=0.5", "compute.images_per_call=1"
    one = {
        "gradient": step(),
        "gradient micro": step(split),
        **{f"gradient {precision}": step(f"compute.precision={precision}") for precision in LOW},
        "gradient lora": step(*MIXED),
        "weights": run("one", ema),
        "weights lora": run("one-lora", ema, *LORA),
        # the search draws rewards of small windows: one rank's groups must reach the other's
        "weights dynamic": run("one-dynamic", *SEARCH["dynamic"], "train.iterations=1"),
        "weights bandit": run("one-bandit", *SEARCH["bandit"], "train.iterations=3"),
    }
    two = {f"gradient {name}": step(*engine) for name, engine in engines.items()}
    two |= {f"gradient {name} checkpoint": step(*ENGINES[name], checkpoint) for name in CHECKPOINTED}
    two |= {f"gradient {name} micro": step(*engine, split) for name, engine in engines.items()}
    keep = ("train.order=on_policy", "compute.activations=keep")
    two |= {f"gradient {name} keep": step(*ENGINES[name], *keep) for name in KEPT}
    for precision, name in ((precision, name) for precision in LOW for name in ("zero0", "zero2")):
        two[f"gradient {name} {precision}"] = step(*ENGINES[name], f"compute.precision={precision}")
    two |= {f"weights {name}": run(name, *engine, ema) for name, engine in engines.items()}
    two["weights dynamic"] = run("dynamic", *SEARCH["dynamic"], "train.iterations=1")
    two["weights bandit"] = run("bandit", *SEARCH["bandit"], "train.iterations=3")
    best = [f"reward.name={CASES}:peaked", "stop.on_collapse=restore_best", "stop.diversity_floor=0", "stop.patience=1"]
    best += ["evaluation.every=1", "run.keep_checkpoints=1", "train.iterations=3"]
    two |= {f"restored {name}": run(f"restored-{name}", *engine, ema, *best) for name, engine in engines.items()}
    two["restored zero3 lora"] = run("restored-zero3 lora", *ENGINES["zero3"], *LORA, *best)
    # weights that the first step wrecks: both ranks find images that are not finite in the second rollout
    wrecked = ["optimizer.learning_rate=1e30", "stop.max_drift=0", "evaluation.every=0", "train.iterations=3"]
    two["restored wrecked"] = run("restored-wrecked", *best[1:3], *wrecked)
    # and one rank alone, while the other is at its second pack
    four = ["train.groups_per_iteration=4", "train.groups_per_step=4", "evaluation.every=0", "train.iterations=3"]
    two["restored one rank"] = ("wrecked_on_one_rank", run("restored-one-rank", *best[1:3], *four)[1])
    two["collectives"] = ("collectives",)
    two["experts"] = ("experts",)
    two |= {f"not finite {name}": ("not_finite", step(*ENGINES[name])[1]) for name in list(engines)[:5]}
    # half of a run, then the rest of it, on the same engine
    for name in ("plain", "zero2", "zero3"):
        for iterations in (1, 2):
            two[f"resume {name} {iterations}"] = run(
                f"{name}-halves", *ENGINES[name], ema, f"train.iterations={iterations}"
            )
    # frozen weights, of two types, which have no gradient and no state
    two |= {f"gradient {name} lora": step(*ENGINES[name], checkpoint, *MIXED) for name in ("zero2", "zero3")}
    two["weights zero2 lora"] = run("zero2-lora", *ENGINES["zero2"], ema, *LORA)
    for iterations in (1, 2):
        two[f"resume zero3 lora {iterations}"] = run(
            "zero3-lora", *ENGINES["zero3"], ema, checkpoint, *LORA, f"train.iterations={iterations}"
        )
    # and on another number of ranks, or another engine
    two["moved from"] = run("moved", *ENGINES["zero3"], ema, "train.iterations=1")
    if not every:
        names = {f"{kind} {name}" for kind in ("gradient", "weights") for name in QUICK}
        names |= {"gradient zero2 micro", "not finite zero2", "collectives", "restored zero2", "restored wrecked"}
        names |= {"restored one rank", "experts"}
        kinds = ("resume zero2", "resume zero3 lora")
        two = {name: case for name, case in two.items() if name in names or name.startswith(kinds)}
        one = {name: one[name] for name in ("gradient", "gradient micro", "weights", "weights lora")}
    found = {f"one {name}": getattr(cases_of_ranks, function)(arguments) for name, (function, arguments) in one.items()}
    found |= run_cases(CASES, two)
    if every:
        shutil.copytree(folder / "moved", folder / "moved-to-zero1")
        found["moved to one"] = cases_of_ranks.run(run("moved", ema)[1])
        found |= run_cases(CASES, {"moved to zero1": run("moved-to-zero1", *ENGINES["zero1"], ema)})
    return found, folder


def test_every_run_ends_well(results):
    found, _ = results
    failed = {
        name: result
        for name, result in found.items()
        if name.startswith(("weights", "resume", "moved", "restored", "one w"))
    }
    assert {name: result for name, result in failed.items() if result != 0} == {}


RESTORED = [pytest.param(name, marks=[] if name == "zero2" else pytest.mark.slow) for name in (*ENGINES, "zero3 lora")]


@pytest.mark.parametrize("name", RESTORED)
def test_the_best_checkpoint_of_a_sharded_run_is_its_model_bit_for_bit(results, tmp_path, name):
    _, folder = results
    run = folder / f"restored-{name}"
    # panels of 0, 5 and 1: the second has no gain over the first
    assert [panel["iteration"] for panel in panels(run)] == [0, 1, 2]
    best = run / "checkpoints" / "iteration-000001"
    if "lora" in name:
        # an unconditional model is saved with its adapters merged
        assert main(["export", str(best), "--out", str(tmp_path / "exported")]) == 0
        assert equal(weights(run), weights(tmp_path / "exported"))
    else:
        assert equal(weights(run), checkpoint_weights(best, "ema.safetensors"))
        assert not equal(weights(run), checkpoint_weights(run / "checkpoints" / "iteration-000002", "ema.safetensors"))


@pytest.mark.parametrize("name", ["wrecked", "one-rank"])
def test_a_run_whose_images_are_not_finite_restores_its_best_on_all_ranks(results, name):
    _, folder = results
    run = folder / f"restored-{name}"
    assert [panel["iteration"] for panel in panels(run)] == [0]
    assert equal(weights(run), checkpoint_weights(run / "checkpoints" / "iteration-000000"))
    assert "the images are not finite" in (run / "events.jsonl").read_text()


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "name", cases(*ENGINES, *(f"{name} checkpoint" for name in CHECKPOINTED), *(f"{name} keep" for name in KEPT))
)
def test_two_ranks_have_the_gradient_of_one_process_over_windows_of_different_lengths(results, name):
    found, _ = results
    whole, norm = found["one gradient"]
    gradient, found_norm = found[f"gradient {name}"]
    assert relative(gradient, whole) < GRADIENT_TOLERANCE
    assert found_norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("case", cases(*(f"{name} {precision}" for name in ("zero0", "zero2") for precision in LOW)))
def test_two_ranks_have_the_gradient_of_one_process_in_low_precision(results, case):
    found, _ = results
    precision = case.split()[1]
    whole, norm = found[f"one gradient {precision}"]
    gradient, found_norm = found[f"gradient {case}"]
    # a rank's loss, the mean over fewer groups, is larger than one process's: other gradients underflow in fp16
    tolerance = {"bf16": GRADIENT_TOLERANCE, "fp16": 1e-3}[precision]
    assert relative(gradient, whole) < tolerance
    assert found_norm == pytest.approx(norm, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_ranks_have_the_gradient_of_one_process_for_adapters_beside_frozen_bf16_weights(results, name):
    found, _ = results
    whole, norm = found["one gradient lora"]
    gradient, found_norm = found[f"gradient {name} lora"]
    # ZeRO-3 rounds in bf16 otherwise, by 0.3 % with and without adapters
    tolerance = {"zero2": GRADIENT_TOLERANCE, "zero3": 1e-2}[name]
    assert relative(gradient, whole) < tolerance and norm > 0
    assert found_norm == pytest.approx(norm, rel=tolerance)


def test_micro_batches_of_one_have_the_gradient_of_a_whole_group(results):
    found, _ = results
    # the rollouts are split alike, so the data differ by the rounding of batched convolutions
    assert relative(found["one gradient micro"][0], found["one gradient"][0]) < 1e-4
    micro = [name for name in ENGINES if f"gradient {name} micro" in found]
    assert "zero2" in micro
    for name in micro:
        assert relative(found[f"gradient {name} micro"][0], found["one gradient micro"][0]) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("name", cases(*ENGINES))
def test_two_ranks_have_the_weights_of_one_process_after_two_iterations(results, tiny_model, name):
    _, folder = results
    start, whole, ours = flat(weights(tiny_model)), trained(folder / "one"), trained(folder / name)
    for file, values in whole.items():
        change = (values - start).abs().max()
        assert change > 0.01
        assert float((ours[file] - values).abs().max() / change) < WEIGHT_TOLERANCE, file


@pytest.mark.parametrize("name", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_two_ranks_have_the_adapters_of_one_process_and_a_sharded_run_resumes(results, tiny_model, name):
    _, folder = results
    whole, ours = trained(folder / "one-lora"), trained(folder / f"{name}-lora")
    change = (whole["model"] - flat(weights(tiny_model))).abs().max()
    assert change > 1e-3
    assert len(whole["weights.safetensors"]) == len(whole["ema.safetensors"]) < len(whole["model"]) / 10
    for file, values in whole.items():
        assert float((ours[file] - values).abs().max() / change) < WEIGHT_TOLERANCE, file


def test_the_final_model_is_the_averaged_one_and_differs_from_the_trained_one(results):
    _, folder = results
    for name in ("one", "plain", "zero3"):
        files = trained(folder / name)
        assert torch.equal(files["model"], files["ema.safetensors"])
        assert not torch.equal(files["model"], files["weights.safetensors"])


@pytest.mark.parametrize("name", cases(*ENGINES, *SEARCH))
def test_metrics_are_those_of_the_whole_iteration(results, name):
    _, folder = results
    whole = f"one-{name}" if name in SEARCH else "one"
    one = metrics(folder / whole)
    for ours, theirs in zip(metrics(folder / name), one, strict=True):
        # the starts are drawn or searched equally, and differ between groups and iterations
        for key in ("window_starts", "window_stops"):
            assert ours.pop(key) == theirs.pop(key)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    if name not in SEARCH:
        assert len({tuple(record["window_starts"]) for record in metrics(folder / name)}) == 2
    ours, theirs = (panels(folder / run) for run in (name, whole))
    assert [record["rewards"] for record in ours] == [record["rewards"] for record in theirs]


@pytest.mark.parametrize(
    "name", ["zero2", pytest.param("plain", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(results, name):
    _, folder = results
    whole, halves = folder / name, folder / f"{name}-halves"
    assert trained(whole).keys() == trained(halves).keys()
    assert all(torch.equal(value, trained(halves)[file]) for file, value in trained(whole).items())
    ends = [load_file(run / "checkpoints" / "iteration-000002" / "optimizer.safetensors") for run in (whole, halves)]
    assert equal(*ends)
    assert metrics(whole) == metrics(halves)


@pytest.mark.parametrize("name", cases("moved", "moved-to-zero1"))
def test_a_run_goes_on_with_another_engine_and_another_number_of_ranks(results, name):
    _, folder = results
    for ours, theirs in zip(metrics(folder / name), metrics(folder / "one"), strict=True):
        for key in ("window_starts", "window_stops"):
            assert ours.pop(key) == theirs.pop(key)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    step = load_file(folder / name / "checkpoints" / "iteration-000002" / "optimizer.safetensors")["0.step"]
    # one optimizer step in each of 2 iterations
    assert float(step) == 2.0


def test_a_checkpoint_of_a_sharded_run_holds_no_pickle_and_whole_tensors(results):
    _, folder = results
    checkpoint = folder / "zero3" / "checkpoints" / "iteration-000002"
    assert {path.suffix for path in checkpoint.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert json.loads((checkpoint / "manifest.json").read_text())
    ours, theirs = (
        load_file(folder / name / "checkpoints" / "iteration-000002" / "optimizer.safetensors")
        for name in ("zero3", "one")
    )
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "zero2" else pytest.mark.slow) for name in list(ENGINES)[:5]]
)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all_and_names_the_groups(results, name):
    found, _ = results
    made, skipped, kept, steps, finite, notes, error = found[f"not finite {name}"]
    assert (made, skipped, kept, steps, finite) == (0, 1, True, 1, True)
    (note,) = notes
    assert all("iteration 7, groups 0 to 3: " in text and "gradient norm is" in text for text in (note, error))


def test_a_weight_that_one_rank_has_not_used_counts_as_no_gradient_there(results):
    found, _ = results
    # AdamW's first step is g/(|g| + 1)
    both, untouched = [[1 - 1 / 2, 1 - 2 / 3], [1 - 3 / 4, 1 - 4 / 5]], [1.0, 1.0]
    for rank in found["experts"]:
        assert rank == [*(pytest.approx(each, rel=1e-6) for each in both), untouched]


def test_collectives(results):
    found, _ = results
    assert found["collectives"] == [
        [0, 1],
        [0, 1],
        "from 0",
        [[0.5, 0.5], [[5.0]]],
        0,
        [("a", 5.0)],
        "rank 1: only here",
        "list index out of range",
        [1, True],
    ]
