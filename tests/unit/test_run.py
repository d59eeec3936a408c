"""The run folder's logs, displays and writers."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from PIL import Image

from hrf_fast.config.load import load_config
from hrf_fast.devices import choose_device
from hrf_fast.evaluation.diversity import Interval
from hrf_fast.evaluation.grids import image_grid
from hrf_fast.evaluation.panel import PanelScores, choose_network
from hrf_fast.run.files import read_log
from hrf_fast.run.folder import Run
from hrf_fast.run.lock import lock_folder
from hrf_fast.run.progress import BarProgress, JsonProgress, Progress, build_progress
from hrf_fast.run.writers import build_writers

RECORD = {"images": 8, "reward_mean": 0.5, "window_starts": [1]}


@pytest.fixture
def config(tmp_path):
    return load_config([f"run.folder={tmp_path / 'run'}", "run.progress=quiet"])


def scores(count=6):
    interval = Interval(1.0, 0.5, 1.5)
    return PanelScores(torch.rand(count, 3, 8, 8), [1.0] * count, interval, interval, None)


def test_a_torn_last_line_is_not_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iteration": 1, "rew')
    assert read_log(path) == [{"iteration": 0}]


def test_rewinding_drops_iterations_to_be_done_again_but_keeps_the_panel_before_them(config, tmp_path):
    with Run(config) as run:
        for iteration in range(4):
            run.log(iteration, RECORD, unet_seconds=1.0)
            run.log_panel(iteration + 1, scores(), {})
        run.rewind(2)
    assert [r["iteration"] for r in read_log(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert [r["iteration"] for r in read_log(tmp_path / "run" / "evaluations.jsonl")] == [1, 2]


def test_phases_add_up_within_an_iteration_and_start_again_in_the_next(config, monkeypatch):
    # a clock that moves a second at each look: 1 begins, phases of 1 s end at 3 and 5, 6 is the log
    clock = iter(range(1, 100))
    with Run(config) as run:
        monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
        run.begin_iteration()
        for _ in range(2):
            with run.phase("rollout"):
                pass
        run.log(0, RECORD, unet_seconds=4.0)
        run.begin_iteration()
        assert run.seconds == {}
    record = read_log(run.folder / "metrics.jsonl")[0]
    assert record["seconds"] == {"rollout": 2.0, "other": 3.0}
    # 4 groups of 5 in 5 seconds, of which 4 are UNet calls
    assert record["speed"] == {"images_per_second": 4.0, "unet_seconds": 4.0, "overhead": 1.25}


def test_ctrl_c_waits_for_the_end_of_an_update(config, capsys):
    steps = []
    with Run(config) as run, pytest.raises(KeyboardInterrupt), run.interrupts.held():
        signal.raise_signal(signal.SIGINT)
        steps.append("after the signal")
    assert steps == ["after the signal"]
    assert "stopping as soon as this is done" in capsys.readouterr().err


def test_a_second_ctrl_c_stops_at_once(config):
    steps = []
    with Run(config) as run, pytest.raises(KeyboardInterrupt), run.interrupts.held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("never")
    assert steps == []


def test_a_free_option_may_change_on_resume_and_the_length_only_under_a_constant_rate(config, tmp_path):
    def begin(words):
        with Run(load_config(words)) as run:
            run.begin(0)
            run.log(0, RECORD, unet_seconds=1.0)

    words = [f"run.folder={tmp_path / 'run'}", "run.progress=quiet"]
    begin(words)
    Run(load_config([*words, "run.save_every=3", "run.progress=json", "train.iterations=99"]))
    cosine = [f"run.folder={tmp_path / 'cosine'}", "optimizer.learning_rate_schedule=cosine", "run.progress=quiet"]
    begin(cosine)
    with pytest.raises(ValueError, match="train.iterations was 70 and is 99"):
        Run(load_config([*cosine, "train.iterations=99"]))


def test_the_json_display_is_json(capsys):
    display = JsonProgress()
    display.iteration(0, RECORD)
    display.panel(0, {"iteration": 0, "reward": [1, 0, 2], "rewards": [1, 1]})
    display.note("careful")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [RECORD, {"panel": {"iteration": 0, "reward": [1, 0, 2]}}, {"note": "careful"}]


def test_the_bar_shows_reward_rate_and_panels(capsys):
    display = BarProgress()
    display.start("iterations", 0, 2)
    display.phase("rollout")
    display.iteration(0, {**RECORD, "speed": {"images_per_second": 4.0, "overhead": 1.0312}})
    display.panel(1, {"reward": [1.0, 0.5, 1.5], "vendi": [7.0, 6.0, 8.0]})
    display.close()
    err = capsys.readouterr().err
    assert (
        "reward 0.5000, 4.0 images/s, 1.03x its UNet calls" in err
        and "panel after 1 iterations: reward 1 [0.5, 1.5]   vendi 7 [6, 8]" in err
    )


def test_auto_is_a_bar_on_a_terminal_and_json_elsewhere(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(build_progress("auto"), BarProgress)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(build_progress("auto"), JsonProgress)
    assert type(build_progress("quiet")) is Progress


def test_tensorboard_gets_scalars_and_the_panel(tmp_path):
    words = [f"run.folder={tmp_path / 'run'}", "run.writers=[tensorboard]", "run.progress=quiet"]
    with Run(load_config(words)) as run:
        run.begin(0)
        run.log(0, RECORD, unet_seconds=1.0)
        run.log_panel(1, scores(), {})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Scalars("reward_mean")[0].value == 0.5 and events.Images("panel")


def test_wandb_gets_the_same_and_no_key(tmp_path, monkeypatch):
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
    writer.scalars(3, {"reward_mean": 0.5})
    writer.images(3, "panel", torch.rand(4, 3, 8, 8))
    writer.close()
    assert set(options) == {"project", "name", "dir", "id", "resume"} and options["resume"] == "allow"
    # a resume is the same run
    first = options["id"]
    build_writers(["wandb"], tmp_path, 4)
    assert options["id"] == first and len(first) == 32
    assert logged == [{"iteration": 3, "reward_mean": 0.5}, {"iteration": 3, "panel": (128, 128)}, "finished"]


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_writer_says_how_to_install_it(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"hrf_fast\[writers\]"):
        build_writers([name], tmp_path)


def test_a_grid_shows_the_first_64_images_of_a_large_panel(config, tmp_path):
    with Run(config) as run:
        run.log_panel(0, scores(70), {})
    # 8 x 8 images of 8 pixels, enlarged 8 times
    assert Image.open(tmp_path / "run" / "samples" / "iteration-000000.png").size == (512, 512)


def test_the_grid_has_a_white_cell_where_no_image_is():
    # 3 black images of 2 pixels in 2 columns, not enlarged
    picture = image_grid(torch.zeros(3, 3, 2, 2), columns=2, scale=1)
    assert picture.size == (4, 4)
    assert picture.getpixel((0, 0)) == picture.getpixel((1, 3)) == (0, 0, 0)
    assert picture.getpixel((3, 3)) == (255, 255, 255)


def test_the_scorer_follows_the_model_and_may_be_turned_off():
    device = torch.device("cpu")
    assert choose_network("auto", "fashion", device).name == "fashion"
    assert choose_network("auto", "some/folder", device) is None
    assert choose_network("none", "fashion", device) is None
    assert choose_network("portraits", "some/folder", device).name == "portraits"


def test_the_device_is_checked():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="run.device is 'gpu'"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="run.device is 'meta'"):
        choose_device("meta")


def test_a_run_that_has_done_nothing_may_change_its_configuration(config, tmp_path):
    with Run(config) as run:
        run.begin(0)
        run.log_panel(0, scores(), {})
    other = load_config([f"run.folder={tmp_path / 'run'}", "run.progress=quiet", "train.group_size=9"])
    with Run(other) as run:
        run.begin(0)
    # and the panel of the configuration that never trained is gone
    assert read_log(tmp_path / "run" / "evaluations.jsonl") == []
    assert load_config(["--config", str(tmp_path / "run" / "config.yaml")]) == other


def test_fewer_iterations_than_are_done_are_refused(config):
    with Run(config) as run, pytest.raises(ValueError, match="train.iterations is 70 but .* has done 71"):
        run.begin(71)


def test_a_finished_run_without_checkpoints_is_not_trained_over(config, tmp_path):
    with Run(config) as run:
        run.begin(0)
        run.log(0, RECORD, unet_seconds=1.0)
    (tmp_path / "run" / "model").mkdir()
    with Run(config) as run, pytest.raises(ValueError, match="holds a tuned model but no checkpoint"):
        run.begin(0)
    assert len(read_log(tmp_path / "run" / "metrics.jsonl")) == 1


def test_checkpoints_must_be_a_folder(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(ValueError, match="checkpoints is not a folder"):
        Run(config)


@pytest.mark.parametrize("line", ["garbage", "{}", "[1]", '{"iteration": "x"}'])
def test_a_damaged_log_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not a record"):
        read_log(path)


def test_a_reward_without_spread_is_said_once(config, capsys):
    with Run(config) as run:
        run.check_spread(0, [torch.zeros(3), torch.tensor([1.0, -1.0])])
        assert capsys.readouterr().err == ""
        run.check_spread(1, [torch.zeros(3)])
        run.check_spread(2, [torch.zeros(3)])
    err = capsys.readouterr().err
    assert err.count("is the same for all samples of every group") == 1
    assert "reward.name jpeg_compressibility" in err and "train.group_size" in err


def test_wandb_that_does_not_start_says_how_to_log_in(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(ValueError, match="no API key.*wandb login"):
        build_writers(["wandb"], tmp_path)


def test_a_folder_is_one_runs_at_a_time(config, tmp_path):
    with Run(config), pytest.raises(ValueError, match=f"run is in use by process {os.getpid()} on .*; wait for it"):
        Run(config)
    with Run(config):
        pass


def test_a_killed_process_leaves_a_folder_that_can_be_taken_again(tmp_path):
    code = "import sys, time, pathlib; from hrf_fast.run.lock import lock_folder; "
    code += "lock = lock_folder(pathlib.Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"run.folder {tmp_path} is in use by process {child.pid} on "):
            lock_folder(tmp_path)
        child.send_signal(signal.SIGKILL)
    lock = lock_folder(tmp_path)
    with pytest.raises(ValueError, match=f"process {os.getpid()} on "):
        lock_folder(tmp_path)
    lock.release()
    # releasing removes no file: another process may have it open
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock-owner"}


def test_a_lock_whose_owner_cannot_be_written_is_not_kept(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr("hrf_fast.run.lock.write_atomically", full)
        lock_folder(tmp_path)
    lock_folder(tmp_path).release()
