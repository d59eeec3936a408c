"""What a run shows: displays, and images as one picture."""

import contextlib
import errno
import io
import json
import sys

import pytest
import torch

from hrf_fast.config.load import load_config
from hrf_fast.evaluation.grids import image_grid
from hrf_fast.evaluation.panel import choose_network
from hrf_fast.run.files import read_log
from hrf_fast.run.progress import BarProgress, JsonProgress, Progress, build_progress
from hrf_fast.run.session import Run
from tests.unit.test_run import log

CPU = torch.device("cpu")
RECORD = {
    "iteration": 3,
    "reward_mean": 0.5,
    "window_starts": [1],
    "seconds": {"rollout": 2.0},
    "speed": {"images_per_second": 4.0, "overhead": 1.0312},
}
PANEL = {"iteration": 4, "evaluations": 9, "reward": [1.0, 0.5, 1.5], "vendi": [7.0, 6.0, 8.0], "rewards": [1.0, 1.0]}
IMAGES = torch.rand(4, 3, 8, 8)


# --- displays ---------------------------------------------------------------------------------------------------------


def test_the_json_display_is_json(capsys):
    display = JsonProgress()
    display.iteration(RECORD)
    # of every image, prompt and value of an attribute: they are in the log
    display.panel({**PANEL, "prompts": ["a", "b"], "attributes": {"hat": {"none": 1.0, "cap": 0.0}}}, IMAGES)
    display.note("careful")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shown = {name: value for name, value in PANEL.items() if name != "rewards"}
    assert lines == [RECORD, {"panel": shown}, {"note": "careful"}]


def test_json_lines_say_how_long_it_took_and_takes(capsys, monkeypatch):
    clock = iter([100.0, 106.0, 100.0, 110.0])
    monkeypatch.setattr("hrf_fast.run.progress.time.perf_counter", lambda: next(clock))
    # a run resumed at 2 of 10 iterations has done 2 in 6 seconds: 6 more take 18
    display = JsonProgress()
    display.start("iterations", 2, 10)
    display.iteration(RECORD)
    # 50 evaluations in 10 seconds, and the last iteration has passed the 100 of the budget
    display.start("evaluations", 60, 100)
    display.iteration({**RECORD, "evaluations": 110})
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first == {**RECORD, "elapsed_seconds": 6.0, "seconds_left": 18.0}
    assert (second["elapsed_seconds"], second["seconds_left"]) == (10.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "out", "err"), [("json", "", "one\ntwo"), ("bar", "one\ntwo\n", ""), ("quiet", "one\ntwo", "")]
)
def test_prints_of_others_stay_out_of_the_display(capsys, kind, out, err):
    display = build_progress(kind)
    with contextlib.redirect_stdout(display.prints):
        print("o", end="")
        print("ne")
        print("two", end="")
    # above a bar lines are whole
    display.finished("train.iterations is 4")
    assert capsys.readouterr() == (out, err)


class Closed(io.TextIOBase):
    """A terminal that was closed, or a pipe whose reader is gone."""

    def __init__(self, number):
        self.number = number

    def write(self, text):
        raise OSError(self.number, "gone")


@pytest.mark.parametrize("kind", ["json", "bar", "quiet"])
def test_a_run_outlives_its_terminal_but_not_the_reader_of_its_pipe(monkeypatch, kind):
    for number, ends in ((errno.EIO, contextlib.nullcontext()), (errno.EPIPE, pytest.raises(OSError, match="gone"))):
        monkeypatch.setattr(sys, "stdout", Closed(number))
        monkeypatch.setattr(sys, "stderr", Closed(number))
        with ends:
            build_progress(kind).note("a panel")


def test_the_bar_shows_reward_rate_and_panels(capsys):
    display = BarProgress()
    display.start("iterations", 0, 4)
    display.phase("rollout")
    display.iteration(RECORD)
    display.panel(PANEL, IMAGES)
    display.finished("train.iterations is 4")
    err = capsys.readouterr().err
    assert "reward 0.5000, 4.0 images/s, 1.03x" in err
    assert "panel after 4 iterations: reward 1 [0.5, 1.5]   vendi 7 [6, 8]" in err


def test_auto_is_a_bar_on_a_terminal_and_json_elsewhere(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(build_progress("auto"), BarProgress)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(build_progress("auto"), JsonProgress)
    assert type(build_progress("quiet")) is Progress


def test_the_display_comes_last_so_that_a_line_that_is_shown_has_been_written(tmp_path, monkeypatch):
    written = []

    class Display(Progress):
        def iteration(self, record):
            written.append(read_log(tmp_path / "run" / "metrics.jsonl"))

    monkeypatch.setattr("hrf_fast.run.session.build_progress", lambda kind: Display())
    with Run(load_config([f"run.folder={tmp_path / 'run'}"])) as run:
        run.begin(0)
        log(run, 0)
    assert [[record["iteration"] for record in records] for records in written] == [[0]]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_the_grid_has_a_white_cell_where_no_image_is():
    # 3 black images of 2 pixels in 2 columns, not enlarged
    picture = image_grid(torch.zeros(3, 3, 2, 2), columns=2, scale=1)
    assert picture.size == (4, 4)
    assert picture.getpixel((0, 0)) == picture.getpixel((1, 3)) == (0, 0, 0)
    assert picture.getpixel((3, 3)) == (255, 255, 255)


def test_the_panels_network_follows_the_model_and_may_be_turned_off():
    assert choose_network("auto", "fashion", CPU).name == "fashion"
    assert choose_network("auto", "some/folder", CPU) is None
    assert choose_network("none", "fashion", CPU) is None
    assert choose_network("portraits", "some/folder", CPU).name == "portraits"
