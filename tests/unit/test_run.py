"""A run's session: its logs and times, what signals and listeners do to it."""

import errno
import io
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from PIL import Image

from hrf_fast.config.load import load_config
from hrf_fast.config.options import RewardTerm
from hrf_fast.errors import Interrupted
from hrf_fast.evaluation.diversity import Interval
from hrf_fast.evaluation.panel import Panel, PanelMetrics
from hrf_fast.rewards import build_reward
from hrf_fast.run.events import EventLog
from hrf_fast.run.files import read_log
from hrf_fast.run.folder import RunFolder
from hrf_fast.run.interrupts import Interrupts
from hrf_fast.run.listeners import Listener, check_listeners
from hrf_fast.run.session import Run
from tests.conftest import make_policy

INTERVAL = Interval(1.0, 0.5, 1.5)


@pytest.fixture
def config(tmp_path):
    return load_config([f"run.folder={tmp_path / 'run'}", "run.progress=quiet"])


def panel(count=6):
    return PanelMetrics(torch.rand(count, 3, 8, 8), [1.0] * count, INTERVAL, INTERVAL, None)


def log(run, iteration, **options):
    record, state = {"iteration": iteration, "reward_mean": 0.5}, {"iteration": iteration + 1}
    return run.log(record, state, **{"images": 8, "network_seconds": 1.0, **options})


# --- logs -------------------------------------------------------------------------------------------------------------


def test_a_panel_is_logged_with_its_evaluations_and_intervals(config, tmp_path):
    with Run(config) as run:
        run.log_panel(3, 40, panel(2))
        assert run.has_panel(3) and not run.has_panel(2)
    (record,) = read_log(tmp_path / "run" / "evaluations.jsonl")
    interval = [1.0, 0.5, 1.5]
    assert record == {"iteration": 3, "evaluations": 40, "reward": interval, "vendi": interval, "rewards": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("rewards", "logged"),
    [
        # six decimals, as long as six digits of the largest are among them
        ([0.123456789, -1.0], [0.123457, -1.0]),
        ([1.23456789e-9, -4e-10], [1.23457e-9, -4e-10]),
        ([0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_rewards_of_a_panel_keep_six_digits_in_any_unit(rewards, logged):
    record = PanelMetrics(torch.rand(2, 3, 8, 8), rewards, INTERVAL, None, None).record()
    assert record["rewards"] == logged


def test_other_ranks_are_sent_no_image_of_a_panel(monkeypatch):
    sent = []
    monkeypatch.setattr(Panel, "_sample", lambda *_: torch.rand(4, 3, 8, 8))
    monkeypatch.setattr("hrf_fast.evaluation.panel.comm.broadcast", sent.append)
    policy = types.SimpleNamespace(decode=lambda latents: latents)
    metrics = Panel(4, 0, 4).evaluate(policy, build_reward("jpeg_compressibility"))
    assert metrics.images.shape == (4, 3, 8, 8) and sent[0].rewards == metrics.rewards
    # pickled, a view of no image would take all of them along
    assert sent[0].images.untyped_storage().nbytes() == 0


def test_a_panel_has_the_mean_of_each_term_of_a_sum_and_no_terms_of_one_reward():
    names = ["jpeg_compressibility", "jpeg_incompressibility"]
    terms = [RewardTerm(name, weight) for name, weight in zip(names, (1.0, 0.5), strict=True)]
    record = Panel(3, 0, 64).evaluate(make_policy(), build_reward(terms)).record()
    smaller, larger = (record["terms"][name] for name in names)
    assert smaller < 0 and larger == -smaller
    # -size + size / 2
    assert record["reward"][0] == pytest.approx(smaller / 2) and len(record["rewards"]) == 3
    assert "terms" not in Panel(3, 0, 64).evaluate(make_policy(), build_reward(names[0])).record()


def test_phases_add_up_within_an_iteration_and_start_again_in_the_next(config, tmp_path, monkeypatch):
    # a clock that moves a second at each look: 1 begins, phases of 1 s end at 3 and 5, 6 is the log
    clock = iter(range(1, 100))
    with Run(config) as run:
        monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
        run.begin_iteration()
        for _ in range(2):
            with run.phase("rollout"):
                pass
        log(run, 0, images=20, network_seconds=4.0)
        run.begin_iteration()
        log(run, 1)
    first, second = read_log(tmp_path / "run" / "metrics.jsonl")
    assert first["seconds"] == {"rollout": 2.0, "other": 3.0}
    # 20 images in 5 seconds, of which 4 are network calls
    assert first["speed"] == {"images_per_second": 4.0, "unet_seconds": 4.0, "overhead": 1.25}
    assert second["seconds"] == {"other": 1.0}


def test_a_grid_shows_the_first_64_images_of_a_large_panel(config, tmp_path):
    with Run(config) as run:
        run.log_panel(0, 0, panel(70))
    # 8 x 8 images of 8 pixels, enlarged 8 times
    assert Image.open(tmp_path / "run" / "samples" / "iteration-000000.png").size == (512, 512)


def test_the_best_panel_is_the_first_highest_one_that_is_not_the_starts(config):
    with Run(config) as run:
        assert run.best() is None
        for iteration, reward in enumerate((9.0, 1.0, 3.0, 3.0)):
            metrics = PanelMetrics(torch.rand(2, 3, 8, 8), [reward] * 2, Interval(reward, 0.0, 9.0), None, None)
            run.log_panel(iteration, 0, metrics)
        assert run.best() == 2 and run._events.best_panel()["iteration"] == 0


# --- signals ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_waits_for_the_end_of_an_update(config, capsys):
    steps = []
    with Run(config) as run, pytest.raises(KeyboardInterrupt), run.interrupts.held():
        signal.raise_signal(signal.SIGINT)
        steps.append("after the signal")
    assert steps == ["after the signal"]
    assert "SIGINT" in capsys.readouterr().err


def test_a_second_ctrl_c_stops_at_once(config):
    steps = []
    with Run(config) as run, pytest.raises(KeyboardInterrupt), run.interrupts.held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        steps.append("never")
    assert steps == []


def test_a_signal_waits_from_unbroken_to_commit(config):
    reached = []
    with pytest.raises(Interrupted) as caught, Run(config) as run:
        run.unbroken()
        signal.raise_signal(signal.SIGTERM)
        reached.append("update")
        run.commit({"iteration": 1})
        reached.append("never")
    assert reached == ["update"] and caught.value.number == signal.SIGTERM


def test_a_signal_in_the_middle_of_a_print_waits_like_any_other():
    class Screen(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            if b"progress" in bytes(data):
                signal.raise_signal(signal.SIGINT)
            return len(data)

    screen = io.TextIOWrapper(io.BufferedWriter(Screen()))
    reached, interrupts = [], Interrupts(lambda line: print(line, file=screen, flush=True))
    with interrupts, pytest.raises(Interrupted), interrupts.held():
        # Python refuses the note: "reentrant call inside <_io.BufferedWriter>"
        print("progress", file=screen, flush=True)
        reached.append("update")
    assert reached == ["update"]


@pytest.mark.parametrize("problem", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "I/O error")])
def test_a_signal_waits_where_nobody_reads_the_output_any_more(problem):
    # `tee` got the same Ctrl-C, or the terminal was closed
    def note(line):
        raise problem

    reached = []
    with Interrupts(note) as interrupts, pytest.raises(Interrupted), interrupts.held():
        signal.raise_signal(signal.SIGINT)
        reached.append("update")
    assert reached == ["update"]


def test_a_process_that_user_code_forks_can_be_ended_in_an_update():
    # as a Pool's workers, which its `terminate` ends; in a process without the threads of other tests
    code = """
import multiprocessing, time
from hrf_fast.run.interrupts import Interrupts
context, interrupts = multiprocessing.get_context("fork"), Interrupts(print)
ready = context.Event()
def wait():
    # a signal in the middle of a fork is lost, whoever handles it
    ready.set()
    time.sleep(60)
with interrupts, interrupts.held():
    process = context.Process(target=wait, daemon=True)
    process.start()
    ready.wait(60)
    process.terminate()
    process.join(30)
    code = process.exitcode
    process.kill()
print(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [str(-signal.SIGTERM)]


def test_a_handler_that_is_not_pythons_stays(monkeypatch):
    put = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *arguments: put.append(arguments))
    with Interrupts(print):
        pass
    assert put == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_an_update_a_signal_stops_at_once_and_handlers_are_put_back(config, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted), Run(config):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_every_end_says_the_model_that_it_left(config):
    folder = RunFolder(config)
    folder.path.mkdir()
    for reason, model in (("the end", 70), ("the end", 60), ("the end", 60), ("the end", 70)):
        log = EventLog(folder, print)
        log.begin(70)
        log.end(reason, model)
    # once for each change, and the last one is the model's
    assert [event["figures"]["model"] for event in folder.events()] == [70, 60, 70]


# --- listeners --------------------------------------------------------------------------------------------------------


class Recorder(Listener):
    """Keeps what it hears; `reason` is its answer to an iteration."""

    def __init__(self, reason=None):
        self.heard, self.reason = [], reason

    def iteration(self, record):
        self.heard.append(("iteration", record["iteration"]))
        return self.reason

    def panel(self, record, images):
        self.heard.append(("panel", record["iteration"], tuple(images.shape)))

    def finished(self, reason):
        self.heard.append(("finished", reason))


def test_listeners_hear_of_iterations_panels_and_the_end(config):
    first, second = Recorder("enough"), Recorder("also")
    with Run(config, [first, second]) as run:
        run.begin(0)
        assert run.log_panel(0, 0, panel(70)) is None
        # the first reason is the run's
        assert log(run, 0) == "enough"
        run.reason = "enough"
    assert first.heard == second.heard
    assert first.heard == [("panel", 0, (64, 3, 8, 8)), ("iteration", 0), ("finished", "enough")]


@pytest.mark.parametrize(
    ("error", "reason"), [(ZeroDivisionError, "an error (ZeroDivisionError)"), (KeyboardInterrupt, "a signal")]
)
def test_listeners_hear_of_an_end_by_error(config, error, reason):
    recorder = Recorder()
    with pytest.raises(error), Run(config, [recorder]) as run:
        run.begin(0)
        raise error
    assert recorder.heard == [("finished", reason)]


def test_a_listener_whose_end_fails_lets_the_folder_go(config):
    class Failing(Recorder):
        def finished(self, reason):
            raise RuntimeError("no connection")

    with pytest.raises(RuntimeError, match="no connection"), Run(config, [Failing()]):
        pass
    with Run(config):
        pass


def test_an_object_that_is_no_listener_is_refused_before_the_folder_is_made(config, tmp_path):
    class Half:
        def iteration(self, record):
            return None

    for listener in (Half(), print):
        with pytest.raises(TypeError, match="lacks .*panel, finished"):
            Run(config, [listener])
    assert not (tmp_path / "run").exists()
    assert check_listeners([]) == []


def test_a_reward_that_draws_draws_the_same_for_every_panel():
    policy, panel = make_policy(), Panel(size=4, seed=3, images_per_call=4)
    reward = build_reward(lambda images, prompts=None: torch.rand(len(images)))
    first = panel.evaluate(policy, reward).rewards
    # as training would between two panels
    torch.rand(5)
    assert panel.evaluate(policy, reward).rewards == first
