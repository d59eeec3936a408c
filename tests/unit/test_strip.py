"""The strip of `hrf report --strip`: which images it shows, and what is written beside them."""

import json

import pytest
import torch
from PIL import Image

from hrf_fast.cli import main
from hrf_fast.config.load import to_yaml
from hrf_fast.config.options import Config, TrainConfig, WindowConfig
from hrf_fast.config.run_options import EvaluationConfig, RunConfig
from hrf_fast.evaluation.grids import Grid, image_grid, save_grid
from hrf_fast.report.strip import CELL, GAP, IMAGES, Row, draw_strip, write_strip
from tests.runs import REPORTED

pytestmark = pytest.mark.long


def greys(count, height, width, first=0):
    """Images [count, 3, height, width], image i all of the grey (first + i)/255."""
    values = torch.arange(first, first + count) / 255
    return values[:, None, None, None].expand(count, 3, height, width)


def write_run(folder, schedule, *, size, first):
    """A run of one iteration whose panels have `size` images of 8 pixels, from grey 0 and from grey `first` on."""
    config = Config(window=WindowConfig(schedule=schedule), train=TrainConfig(iterations=1))
    config.evaluation, config.run = EvaluationConfig(panel_size=size), RunConfig(folder=str(folder))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    panels = []
    for i, start in enumerate((0, first)):
        save_grid(greys(min(64, size), 8, 8, start), folder / "samples" / f"iteration-{i:06d}.png")
        reward, vendi = [1.0 + i, 0.5, 2.5], [4.0 - i, 3.0, 5.0]
        panels.append({"iteration": i, "evaluations": i, "reward": reward, "vendi": vendi, "rewards": [1.0] * size})
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(panel) + "\n" for panel in panels))
    (folder / "metrics.jsonl").write_text(json.dumps({"iteration": 0, **REPORTED}) + "\n")
    return folder


@pytest.mark.parametrize(
    "count, height, width",
    [(1, 8, 8), (5, 8, 8), (12, 8, 16), (64, 32, 32), (7, 128, 64)],
    ids=["one", "a cell is empty", "wide", "shipped", "tall and not enlarged"],
)
def test_a_grid_is_cut_into_the_images_it_was_made_of(count, height, width):
    cut = Grid(count).cut(image_grid(greys(count, height, width)))
    scale = max(1, 64 // width)
    assert [image.size for image in cut] == [(width * scale, height * scale)] * count
    # each image has one colour, its own
    assert [image.getcolors() for image in cut] == [
        [(width * height * scale**2, (grey, grey, grey))] for grey in range(count)
    ]


def test_rows_are_the_pretrained_panel_and_every_runs_last_one_from_the_left(tmp_path):
    hrf = write_run(tmp_path / "hrf", "clusters", size=256, first=100)
    ddpo = write_run(tmp_path / "ddpo", "full", size=256, first=150)
    strip = Image.open(write_strip([hrf, ddpo], tmp_path / "new" / "strip.png"))
    assert strip.height == 3 * CELL + 2 * GAP
    left = strip.width - IMAGES * CELL
    centres = [left + column * CELL + CELL // 2 for column in range(IMAGES)]
    for row, first in enumerate((0, 100, 150)):
        y = row * (CELL + GAP) + CELL // 2
        assert [strip.getpixel((x, y))[0] for x in centres] == list(range(first, first + IMAGES))


def test_labels_stand_left_of_the_images_and_fit():
    images = [Image.new("RGB", (64, 64), "white")] * 2
    long = "a reward with a long name, unfinished"
    strip = draw_strip([Row([long, "reward -1.492", "Vendi Score 43.37"], images), Row(["b"], images)])
    label = strip.crop((0, 0, strip.width - 2 * CELL, strip.height)).convert("L")
    ink = [x for x in range(label.width) if min(label.crop((x, 0, x + 1, label.height)).tobytes()) < 128]
    assert ink[0] > 0 and ink[-1] < label.width - 1
    # the images are white: no letter has run into them
    assert strip.crop((label.width, 0, *strip.size)).getcolors() == [(2 * CELL * strip.height, (255, 255, 255))]


def test_what_is_written_beside_a_row(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("hrf_fast.report.strip.draw_strip", lambda rows: drawn.extend(rows) or draw_strip(rows))
    write_strip([write_run(tmp_path / "run", "clusters", size=6, first=50)], tmp_path / "strip.png")
    assert [row.lines for row in drawn] == [
        ["pretrained", "reward 1", "Vendi Score 4"],
        # no model/ folder: the run has not finished
        ["HRF (unfinished)", "reward 2", "Vendi Score 3"],
    ]
    # a panel smaller than the strip is shown whole
    assert [len(row.images) for row in drawn] == [6, 6]


def test_a_grid_of_any_size_is_read(tmp_path, monkeypatch):
    # Pillow refuses pictures of twice as many pixels, which all of the grid has
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    run = write_run(tmp_path / "run", "clusters", size=6, first=50)
    assert write_strip([run], tmp_path / "strip.png").is_file() and Image.MAX_IMAGE_PIXELS == 5000


def test_names_stand_beside_the_rows(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("hrf_fast.report.strip.draw_strip", lambda rows: drawn.extend(rows) or draw_strip(rows))
    runs = [write_run(tmp_path / name, "clusters", size=6, first=50) for name in ("a", "b")]
    write_strip(runs, tmp_path / "strip.png", names=["first", "second"])
    assert [row.lines[0] for row in drawn] == ["pretrained", "first (unfinished)", "second (unfinished)"]


def test_the_strip_is_of_the_tuned_model_where_an_earlier_one_was_restored(tmp_path):
    run = write_run(tmp_path / "run", "clusters", size=6, first=50)
    end = {"iteration": 1, "event": "end", "text": "", "figures": {"model": 0}}
    (run / "events.jsonl").write_text(json.dumps(end) + "\n")
    strip = Image.open(write_strip([run], tmp_path / "strip.png")).convert("RGB")
    right, below = strip.width - CELL // 2, CELL + GAP
    assert strip.getpixel((right, CELL // 2)) == strip.getpixel((right, below + CELL // 2))


def test_a_run_without_its_grids_is_refused(tmp_path):
    run = write_run(tmp_path / "run", "clusters", size=6, first=50)
    (run / "samples" / "iteration-000001.png").unlink()
    with pytest.raises(ValueError, match="iteration-000001.png"):
        write_strip([run], tmp_path / "strip.png")


def test_the_command_writes_the_strip_beside_the_page(tiny_run, tmp_path, capsys):
    assert main(["train", *tiny_run]) == 0
    strip = tmp_path / "strip.png"
    assert main(["report", str(tmp_path / "run"), "--strip", str(strip)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [str(tmp_path / "run" / "report.html"), str(strip)]
    # six images of 16 pixels in each of two rows
    assert Image.open(strip).height == 2 * CELL + GAP
