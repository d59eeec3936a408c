"""Commands on a text-to-image run: its panel's prompts in grids, `hrf sample --prompt`, `hrf evaluate`, the report."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from hrf_fast.cli import main
from hrf_fast.config.load import load_config
from hrf_fast.evaluation.diversity import mean_interval
from hrf_fast.evaluation.grids import Grid, _shortened, image_grid
from hrf_fast.evaluation.panel import Panel
from hrf_fast.evaluation.vendi import vendi_score
from hrf_fast.prompts import Prompt
from hrf_fast.rewards import build_reward
from tests.conftest import tiny_words
from tests.prompted import make_prompted_policy
from tests.runs import panels, train
from tests.text_models import text_model

pytestmark = pytest.mark.long


def to_text(images, prompts):
    """More for red images, and for long prompts."""
    return images[:, 0].mean((1, 2)) + torch.tensor([0.01 * len(text) for text in prompts])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "prompts.txt").write_text("a cat\na dog\na red cat\n")
    (folder / "unseen.jsonl").write_text('{"prompt": "<b>a dog & a cat</b>", "negative": "red"}\n"cat"\n')
    words = [*tiny_words(text_model("sd1"), folder / "run"), "train.iterations=1", "sample.guidance_scale=2"]
    words += [f"prompts.source={folder / 'prompts.txt'}", f"evaluation.prompts={folder / 'unseen.jsonl'}"]
    words += ["evaluation.panel_size=12", "evaluation.network=fashion", "train.advantages=prompt"]
    train(words, reward=to_text)
    return folder / "run"


def grid(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_panel_has_fixed_prompts_that_it_records_and_uses_again(finished):
    first, last = panels(finished)
    # 12 images of 4 each: three prompts, of which the source has two
    texts = ["<b>a dog & a cat</b>", "cat", "<b>a dog & a cat</b>"]
    assert first["prompts"] == last["prompts"] == texts
    assert 1 <= first["vendi_per_prompt"][0] <= first["vendi"][0] and len(first["vendi_per_prompt"]) == 3


def test_the_diversity_per_prompt_is_the_mean_of_its_prompts(monkeypatch):
    class Pixels:
        name = "pixels"

        def features(self, images):
            return images.flatten(1)

    panel = Panel(8, 1, 64, Pixels(), tuple(map(Prompt, ("red", "green", "blue"))), 2)
    metrics = panel.evaluate(make_prompted_policy(), build_reward(lambda images, prompts: [0.0] * len(images)))
    scores = [vendi_score(part.flatten(1)) for part in metrics.images.split(2)]
    assert metrics.vendi_per_prompt == mean_interval(torch.tensor(scores, dtype=torch.float64), seed=1)
    assert metrics.prompts == ("red", "green", "blue", "red")
    assert panel.note.endswith("source has 3: they are used again from the first")


# --- grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "share", "columns"), [(64, 4, 8), (12, 4, 4), (64, 3, 9), (64, 16, 8), (12, 12, 3), (7, 7, 7), (5, 1, 2)]
)
def test_a_grid_has_whole_blocks_in_a_row_or_whole_rows_in_a_block(count, share, columns):
    images = torch.rand(count, 3, 64, 64)
    captions = [f"prompt {number}" for number in range(-(-count // share))]
    layout = Grid(count, share)
    picture = image_grid(images, captions=captions, images_per_prompt=share)
    assert layout.columns == columns and picture.width == 64 * columns
    for image, cut in zip(images, layout.cut(picture), strict=True):
        assert np.abs(np.asarray(cut) / 255 - image.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def test_captions_stand_above_their_images_and_are_cut_to_their_width():
    images = torch.full((8, 3, 64, 64), 0.5)
    plain, short, long = (
        np.asarray(image_grid(images, captions=[text, ""], images_per_prompt=4)) for text in ("", "a cat", "cats " * 99)
    )
    assert plain.shape == short.shape == long.shape
    band = Grid(8, 4).caption_height(256)
    for picture in (short, long):
        rows, columns = np.nonzero((picture != plain).any(2))
        assert len(rows) and rows.max() < band and columns.max() < 256
    assert (long != plain).any(2).sum() > (short != plain).any(2).sum()


# --- commands ---------------------------------------------------------------------------------------------------------


def test_sample_draws_a_prompt_of_the_command_line_and_a_run_its_panel(finished, tmp_path, capsys):
    def draw(name, *words):
        assert main(["sample", *words, "--out", str(tmp_path / name), "--device=cpu"]) == 0
        return grid(tmp_path / name)

    # the images of the panel before training, which are those of the model under the run's sampler
    drawn = draw("run.png", str(finished), "--count=12", "--seed=1234")
    expected = grid(finished / "samples" / "iteration-000001.png")
    assert np.abs(drawn - expected).max() <= 1
    model = [str(text_model("sd1")), "--count=4", "--steps=3"]
    cat = draw("cat.png", *model, "--prompt=a cat")
    assert cat.shape == (2 * 64 + 2 * 12, 2 * 64, 3)
    # an image of each, and not two of the first ones
    capsys.readouterr()
    draw("three.png", *model, "--prompt=a", "--prompt=b", "--prompt=c")
    assert "three.png: 3 images of" in capsys.readouterr().out
    band = Grid(4, 4).caption_height(128)
    guided = draw("guided.png", *model, "--prompt=a cat", "--negative=a dog", "--guidance=4")
    assert (guided[:band] == cat[:band]).all() and (guided[band:] != cat[band:]).any()
    both = draw("both.png", *model, "--prompt=a cat", "--prompt=a dog")
    assert both.shape == cat.shape


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt=a", "--prompt=b", "--prompt=c", "--negative=x", "--negative=y"], "--negative is given 2 times"),
        (["--prompt=a", "--prompt=b", "--count=1"], "--prompt is given 2 times but --count is 1"),
        ([], "draws what a prompt says.*--prompt"),
        (["--prompt=a", "--negative=x"], "--negative is given, but acts through guidance.*--guidance 5"),
        (["--prompt=a", "--guidance=0.5"], "sample.guidance_scale is 0.5; it must be at least 1"),
    ],
)
def test_sample_refuses_prompts_that_do_not_fit(words, message, tmp_path, capsys):
    words = ["sample", str(text_model("sd1")), "--steps=2", "--out", str(tmp_path / "x.png"), *words]
    assert main(words) == 1
    assert re.search(message, capsys.readouterr().err)


def test_sample_of_an_unconditional_model_refuses_a_prompt(tiny_model, tmp_path, capsys):
    assert main(["sample", str(tiny_model), "--prompt=a cat", "--out", str(tmp_path / "x.png")]) == 1
    assert f"{tiny_model} takes no prompts; leave --prompt, --prompts and" in capsys.readouterr().err


def test_evaluate_and_report_show_the_prompts(finished, tmp_path, capsys, monkeypatch):
    words, drawn, images = ["evaluate", str(finished), "reward.name=jpeg_compressibility"], [], Panel.images

    def counted(panel, policy):
        drawn.append(panel.seed)
        return images(panel, policy)

    with monkeypatch.context() as patch:
        patch.setattr(Panel, "images", counted)
        assert main([*words, "evaluation.panel_size=12"]) == 0
    # both models are compared with the pretrained one's images of other noise
    assert drawn == [load_config(["--config", str(finished / "config.yaml")]).evaluation.seed + 1]
    detail = json.loads((finished / "evaluation.json").read_text())["tuned"]["detail"]
    brief = capsys.readouterr().out
    assert {"precision", "vendi_rbf", "fid", "duplicates"} <= set(detail)
    assert "precision" in brief and "coverage" not in brief
    assert main([*words, "--all", "evaluation.panel_size=12"]) == 0
    assert {"coverage", "jpeg_bpp", "vendi_q2"} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert main([*words, "evaluation.panel_size=8"]) == 0
    assert "need 12 images" in capsys.readouterr().out
    result = json.loads((finished / "evaluation.json").read_text())
    assert result["tuned"]["prompts"] == ["<b>a dog & a cat</b>", "cat"] and "vendi_per_prompt" in result["pretrained"]
    assert "detail" not in result["tuned"]
    assert {"jpeg_bpp", "png_bpp", "total_variation", "duplicates"} <= set(result["tuned"]["peer"])
    page = tmp_path / "page.html"
    assert main(["report", str(finished), "--out", str(page), "--strip", str(tmp_path / "strip.png")]) == 0
    html = page.read_text()
    assert "<li>&lt;b&gt;a dog &amp; a cat&lt;/b&gt;</li><li>cat</li></ol>" in html and "per prompt" in html
    card = (finished / "model" / "README.md").read_text()
    assert "text-to-image" in card and "12 images, 4 to a prompt" in card and "Vendi Score per prompt" in card


def test_an_option_of_drawing_prompts_for_training_is_refused_where_nothing_trains(finished, capsys):
    assert main(["evaluate", str(finished), "prompts.distinct=true"]) == 1
    assert "prompts.distinct would change nothing here, since nothing is trained" in capsys.readouterr().err


def test_a_caption_of_any_length_is_measured_a_few_times():
    asked = []

    def measure(text):
        asked.append(text)
        return len(text)

    assert _shortened("word " * 2000, measure, 12) == "word word w…" and len(asked) < 20
    assert _shortened("word", measure, 4) == "word" and _shortened("word", measure, 0) == ""
