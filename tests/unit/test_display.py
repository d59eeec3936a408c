"""What a run shows and sends: displays, writers, and images as one picture."""

import json
import sys
import types

import pytest
import torch

from hrf_fast.config.load import load_config
from hrf_fast.evaluation.grids import image_grid
from hrf_fast.evaluation.panel import choose_network
from hrf_fast.run.files import read_log
from hrf_fast.run.progress import BarProgress, JsonProgress, Progress, build_progress
from hrf_fast.run.session import Run
from hrf_fast.run.writers import build_writers
from tests.unit.test_run import log, panel

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
    display.panel(PANEL, IMAGES)
    display.note("careful")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shown = {name: value for name, value in PANEL.items() if name != "rewards"}
    assert lines == [RECORD, {"panel": shown}, {"note": "careful"}]


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


# --- writers ----------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_scalars_and_the_panel(tmp_path):
    words = [f"run.folder={tmp_path / 'run'}", "run.writers=[tensorboard]", "run.progress=quiet"]
    with Run(load_config(words)) as run:
        run.begin(0)
        log(run, 0)
        run.log_panel(1, 0, panel())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Scalars("reward_mean")[0].value == 0.5 and events.Scalars("panel/reward")[0].step == 1
    assert events.Images("panel")


def test_wandb_gets_numbers_and_the_panel_and_no_key(tmp_path, monkeypatch):
    logged, options = [], {}

    class FakeRun:
        def log(self, values):
            logged.append(values)

        def finish(self):
            logged.append("finished")

    def init(**kwargs):
        options.update(kwargs)
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Image=lambda picture: picture.size))
    (writer,) = build_writers(["wandb"], tmp_path)
    writer.iteration(RECORD)
    writer.panel(PANEL, IMAGES)
    writer.finished("train.iterations is 4")
    assert set(options) == {"project", "name", "dir", "id", "resume"} and options["resume"] == "allow"
    # a resume is the same run
    first = options["id"]
    build_writers(["wandb"], tmp_path, 4)
    assert options["id"] == first and len(first) == 32
    times = {"seconds/rollout": 2.0, "speed/images_per_second": 4.0, "speed/overhead": 1.0312}
    assert logged == [
        {"iteration": 3, "reward_mean": 0.5, **times},
        {"iteration": 4, "panel/reward": 1.0, "panel/vendi": 7.0},
        # four images of 8 pixels, two by two, enlarged 8 times
        {"iteration": 4, "panel": (128, 128)},
        "finished",
    ]


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_writer_says_how_to_install_it(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"run.writers has {name}.*hrf_fast\[writers\]"):
        build_writers([name], tmp_path)


def test_wandb_that_does_not_start_says_how_to_log_in(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(ValueError, match="run.writers has wandb.*no API key.*wandb login"):
        build_writers(["wandb"], tmp_path)


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
