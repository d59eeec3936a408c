"""Text-to-image on two ranks against one process: prompts, guidance, adapters, statistics, anchors and the search.

Every pair of method, weights, engine, activations and guidance is in a case; `make test` has one run and one gradient.
"""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch

from hrf_fast.assembly.model import build_policy
from hrf_fast.config.load import load_config
from hrf_fast.engines.base import trained_weights
from hrf_fast.run.checkpoint import list_checkpoints
from hrf_fast.train import main
from tests.distributed import cases
from tests.distributed.ranks import run_cases
from tests.runs import (
    assert_equal_checkpoints,
    assert_equal_training,
    checkpoint_weights,
    metrics,
    panels,
    weights,
)
from tests.text_models import text_model

pytest.importorskip("deepspeed")
CASES = "tests.distributed.cases"
METHODS = {
    "ddpo": {
        "window.schedule": "full",
        "train.advantages": "prompt",
        "train.prompt_buffer": 3,
        "train.prompt_min_count": 3,
    },
    "hrf": {"window.schedule": "clusters", "window.kwargs": "{clusters: [[0, 2], [2, 4]], iterations_per_cluster: 1}"},
    "hrf_d": {"window.schedule": "dynamic", "window.kwargs.search": "exact", "train.iterations": 1},
}
WEIGHTS = {"full": {}, "lora": {"lora.rank": 2}}
ENGINES = {
    "plain": {},
    **{name: {"engine.deepspeed": f"configs/deepspeed/{name}.json"} for name in ("zero2", "zero3")},
}
ACTIVATIONS = {
    "replay": {},
    "checkpoint": {"compute.activations": "checkpoint"},
    "keep": {"compute.activations": "keep", "train.order": "on_policy"},
}
GUIDANCE = {"guided": {"sample.guidance_scale": 3}, "unguided": {}}
CHOICES = (METHODS, WEIGHTS, ENGINES, ACTIVATIONS, GUIDANCE)
QUICK = "ddpo lora zero2 replay guided"
RUNS = (
    QUICK,
    "ddpo full plain keep unguided",
    "ddpo full zero3 checkpoint guided",
    "hrf lora plain checkpoint unguided",
    "hrf full zero2 keep guided",
    "hrf full zero3 replay unguided",
    "hrf_d full plain replay guided",
    "hrf_d full zero2 checkpoint unguided",
    "hrf_d lora zero3 checkpoint guided",
    "hrf_d lora zero2 keep guided",
    "hrf lora plain replay guided",
)
GRADIENTS = {
    # the model, and what else differs from a run
    "zero3 guided": ("sdxl", ENGINES["zero3"] | ACTIVATIONS["checkpoint"] | GUIDANCE["guided"]),
    "zero2 keep guided": ("sdxl", ENGINES["zero2"] | ACTIVATIONS["keep"] | GUIDANCE["guided"]),
    "zero3 lora": ("sd2", ENGINES["zero3"] | WEIGHTS["lora"]),
}
QUICK_GRADIENT = "zero3 guided"
# see test_engines.py
GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 2e-5


def quick(names, *chosen):
    """Parameters of a test, of which all but the chosen ones are slow."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


def words(kind, *options):
    """A run of 2 groups of 2 in one optimizer step an iteration, on prompts that a function draws."""
    values = {
        "model.name": text_model(kind),
        "prompts.source": f"{CASES}:drawn",
        "sample.num_inference_steps": 4,
        # so that calls are equal whatever a rank holds of anchors, groups and panels
        "compute.images_per_call": 1,
        "reward.name": f"{CASES}:fine",
        "train.iterations": 2,
        "train.groups_per_iteration": 2,
        "train.groups_per_step": 2,
        "train.group_size": 2,
        "optimizer.learning_rate": 0.02,
        "stop.max_drift": 0,
        "optimizer.kwargs.eps": 0.01,
        "evaluation.every": 0,
        "evaluation.panel_size": 2,
        "evaluation.images_per_prompt": 1,
        "evaluation.network": "none",
        "run.progress": "quiet",
    }
    for more in options:
        values |= more
    return [f"{name}={value}" for name, value in values.items()]


def options_of(name):
    return [choice[word] for choice, word in zip(CHOICES, name.split(), strict=True)]


def reference(name):
    """The method, weights and guidance of a case: what its one-process run depends on."""
    method, trained, _, _, guidance = name.split()
    return f"{method} {trained} plain replay {guidance}"


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """Every case, those of one process in this one: (results of the gradients, folder of the runs)."""
    every = "not slow" not in request.config.getoption("markexpr")
    runs, gradients = (RUNS, tuple(GRADIENTS)) if every else ((QUICK,), (QUICK_GRADIENT,))
    folder = tmp_path_factory.mktemp("text")
    torch.set_num_threads(1)

    def run(name, *more):
        return words("sd1", *options_of(name), {"run.folder": folder / name.replace(" ", "-")}, *more)

    def step(name, *without):
        kind, options = GRADIENTS[name]
        options = {key: value for key, value in options.items() if not key.startswith(without)}
        four = {"train.groups_per_iteration": 4, "train.groups_per_step": 4, "optimizer.max_grad_norm": 0}
        return words(kind, options, four, {"sample.num_inference_steps": 6, "compute.images_per_call": 0})

    two = {name: ("run", run(name)) for name in runs}
    two |= {f"gradient {name}": ("gradient", step(name)) for name in gradients}
    if every:
        # half of a run of two, then the rest of it
        halves = "ddpo lora zero3 replay guided"
        two["whole"] = ("run", run(halves))
        for iterations in (1, 2):
            more = {"run.folder": folder / "halves", "train.iterations": iterations}
            two[f"half {iterations}"] = ("run", run(halves, more))
    found = run_cases(CASES, two, timeout=1800)
    assert {name: code for name, code in found.items() if not name.startswith("gradient") and code} == {}
    for name in sorted({reference(name) for name in runs}):
        more = {"run.folder": folder / f"one-{name.replace(' ', '-')}"}
        assert main(run(name, more)) == 0
    for name in gradients:
        found[f"one {name}"] = cases.gradient(step(name, "engine.", "compute.activations", "train.order"))
    return found, folder


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def trained(run: Path, iterations: int):
    """By file, what a run has come to."""
    checkpoint = run / "checkpoints" / f"iteration-{iterations:06d}"
    return {"checkpoint": flat(checkpoint_weights(checkpoint)), "model": flat(weights(run))}


def state(run: Path):
    return json.loads((list_checkpoints(run / "checkpoints")[0] / "state.json").read_text())


def test_every_pair_of_choices_is_in_a_case():
    chosen = [tuple(name.split()) for name in RUNS]
    for first, second in combinations(range(len(CHOICES)), 2):
        pairs = {(words[first], words[second]) for words in chosen}
        possible = {(a, b) for a in CHOICES[first] for b in CHOICES[second]}
        # kept graphs need whole weights
        assert pairs == possible - {("zero3", "keep")}


@pytest.mark.parametrize("name", quick(RUNS, QUICK))
def test_two_ranks_come_to_the_weights_metrics_and_panels_of_one_process(results, name):
    _, folder = results
    ours, one = folder / name.replace(" ", "-"), folder / f"one-{reference(name).replace(' ', '-')}"
    before = trained_weights(build_policy(load_config(words("sd1", *options_of(name)))).network)
    start = flat({weight.removeprefix("unet."): value.detach() for weight, value in before.items()})
    iterations = len(metrics(one))
    whole, two = trained(one, iterations), trained(ours, iterations)
    change = (whole["checkpoint"] - start).abs().max()
    assert change > 1e-3
    for file, values in whole.items():
        assert float((two[file] - values).abs().max() / change) < WEIGHT_TOLERANCE, file
    drawn = set()
    for record, expected in zip(metrics(ours), metrics(one), strict=True):
        drawn |= set(record["prompts"])
        for key in ("window_starts", "window_stops", "prompts"):
            assert record.pop(key) == expected.pop(key)
        if "keep" in name:
            # a forward of each sample and step is saved, and the call in the middle is another one
            assert expected["forwards"] - record["forwards"] == expected["backwards"]
            expected |= {key: record[key] for key in ("forwards", "batches", "evaluations", "drift")}
        assert record == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # the function draws this word on the second rank, whose groups have other prompts
    assert drawn and not any("red" in prompt for prompt in drawn)
    assert len(drawn) > 1 or name.startswith("hrf_d")
    for record, expected in zip(panels(ours), panels(one), strict=True):
        assert record["prompts"] == expected["prompts"] and record["rewards"] == expected["rewards"]
    # the statistics of prompts, where there are any
    assert state(ours).get("advantages") == state(one).get("advantages")


@pytest.mark.parametrize("name", quick(GRADIENTS, QUICK_GRADIENT))
def test_two_ranks_have_the_gradient_of_one_process_over_windows_and_prompts(results, name):
    found, _ = results
    whole, norm = found[f"one {name}"]
    gradient, found_norm = found[f"gradient {name}"]
    assert float((gradient - whole).norm() / whole.norm()) < GRADIENT_TOLERANCE
    assert found_norm == pytest.approx(norm, rel=1e-6) and norm > 0


@pytest.mark.slow
def test_adapters_and_statistics_of_prompts_resume_under_zero_3_to_the_bit(results):
    _, folder = results
    whole, halves = folder / "ddpo-lora-zero3-replay-guided", folder / "halves"
    assert_equal_training(whole, halves)
    assert_equal_checkpoints(whole, halves)
    assert state(whole)["advantages"]
