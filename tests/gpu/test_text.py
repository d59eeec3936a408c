"""Text-to-image models of every family: halves, what waits on the CPU, and commands on a run."""

import pytest

from hrf_fast.commands.evaluate import evaluate
from hrf_fast.commands.sample import draw
from hrf_fast.run.files import read_log
from tests.conftest import tiny_words
from tests.flow_models import flow_words
from tests.gpu.conftest import FP32, check, train
from tests.runs import equal, weights, with_folder
from tests.text_models import text_model

ADAPTERS = ("lora.rank=2", "lora.alpha=2")
HALVES = ("compute.precision=bf16", "lora.base_precision=bf16", "compute.encoder_precision=bf16")


@pytest.fixture
def prompted(device, tmp_path):
    """Words of one guided iteration of Stable Diffusion or SDXL."""

    def words(kind, *more):
        small = ("sample.guidance_scale=3", "prompts.source=animals", "evaluation.panel_size=8", "evaluation.every=0")
        return [*tiny_words(text_model(kind), tmp_path / "run"), *small, f"run.device={device}", *more]

    return words


def first(words):
    """The record of one optimizer step."""
    return read_log(train([*words, "train.iterations=1", "train.groups_per_step=2"]).folder / "metrics.jsonl")[0]


@pytest.mark.parametrize("more", [ADAPTERS, (*ADAPTERS, *HALVES)], ids=["fp32", "halves"])
def test_adapters_train_alike_where_encoders_and_decoder_wait_on_the_cpu(needs_cuda, prompted, tmp_path, more):
    for name in ("false", "true"):
        train(with_folder(prompted("sdxl", *more), tmp_path / name, f"compute.offload={name}"))
    assert equal(weights(tmp_path / "false"), weights(tmp_path / "true"))


def test_channels_last_has_the_gradient_of_linear_projections_too(device, prompted, tmp_path):
    # SD 2 and SDXL, whose attention leaves maps in another order; `sd1` is in test_ratio
    plain, last = (
        first(with_folder(prompted("sdxl"), tmp_path / name, f"compute.channels_last={name}"))
        for name in ("false", "true")
    )
    check(last, plain, FP32)


@pytest.mark.parametrize(("kind", "more"), [("sd35", ADAPTERS), ("flux", ())], ids=["sd35 adapters", "flux"])
def test_a_transformer_trains_and_its_ratio_is_one(device, tmp_path, kind, more):
    record = first(flow_words(kind, tmp_path / "run", f"run.device={device}", *more))
    assert record["ratio_max"] == record["ratio_mean"] == 1 and record["grad_norm"] > 0


def test_a_copy_of_the_pretrained_model_holds_the_penalty(device, prompted, tmp_path):
    # of equal weights the means are equal, so that the first step is without a penalty
    words = prompted("sd1", "remedies.reference_penalty=0.5", "train.groups_per_step=2")
    one, two = read_log(train(words).folder / "metrics.jsonl")
    assert one["reference_kl"] < 1e-6 * two["reference_kl"]


def test_commands_draw_and_evaluate_on_the_device(device, prompted, tmp_path):
    words = prompted("sd1", *ADAPTERS, "evaluation.network=none")
    run = train([*words, "train.iterations=1"]).folder
    for model in (run, run / "checkpoints" / "iteration-000001"):
        draw(str(model), tmp_path / f"{model.name}.png", count=8, seed=0, device=str(device))
    grids = [(tmp_path / f"{name}.png").read_bytes() for name in ("run", "iteration-000001")]
    assert grids[0] == grids[1]
    assert evaluate(run, [f"run.device={device}"]).is_file()


def test_a_checkpoint_of_the_cpu_goes_on_on_the_device(needs_cuda, device, prompted, tmp_path):
    words = [word for word in prompted("sd1", *ADAPTERS) if not word.startswith("run.device")]
    train([*words, "run.device=cpu", "train.iterations=1"])
    records = read_log(train([*words, f"run.device={device}", "train.iterations=2"]).folder / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [0, 1]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
