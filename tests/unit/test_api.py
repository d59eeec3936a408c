"""The Python API: rewards, schedules and listeners as values, what a run returns, and what importing costs."""

import importlib
import signal
import subprocess
import sys

import pytest

import hrf_fast
from hrf_fast.errors import Interrupted, UserCodeError
from hrf_fast.run.files import read_log
from tests.runs import metrics, panels, train, with_folder

pytestmark = pytest.mark.long


@pytest.fixture
def words(tiny_run):
    """A run of two iterations with a panel before and after."""
    return [*tiny_run, "evaluation.every=0", "evaluation.panel_size=2", "window.schedule=full", "run.save_every=0"]


def brightness(images, prompts=None):
    return images.mean((1, 2, 3))


class Recorder(hrf_fast.Listener):
    """Keeps the numbers of iterations and panels; `answer` is what it says to an iteration."""

    def __init__(self, answer=lambda record: None):
        self.iterations, self.panels, self.reasons, self.answer = [], [], [], answer

    def iteration(self, record):
        self.iterations.append(record["iteration"])
        return self.answer(record)

    def panel(self, record, images):
        self.panels.append((record["iteration"], tuple(images.shape)))

    def finished(self, reason):
        self.reasons.append(reason)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_callable_is_trained_on_and_the_result_says_where_and_why(words, tmp_path):
    seen, recorder = [], Recorder()

    def score(images, prompts):
        seen.append((tuple(images.shape[1:]), float(images.min()) >= 0 and float(images.max()) <= 1))
        return brightness(images)

    result = train(words, reward=score, listeners=[recorder])
    assert set(seen) == {((3, 16, 16), True)}
    assert result.folder == tmp_path / "run" and result.reason == "train.iterations is 2"
    first, last = panels(result.folder)
    assert (first["iteration"], last["iteration"]) == (0, 2)
    assert result.last_panel == last and result.best_panel == max(first, last, key=lambda record: record["reward"][0])
    assert (recorder.iterations, recorder.reasons) == ([0, 1], ["train.iterations is 2"])
    assert recorder.panels == [(0, (2, 3, 16, 16)), (2, (2, 3, 16, 16))]
    # the run's folder names the callable
    config = hrf_fast.load_config(["--config", str(result.folder / "config.yaml")])
    assert config.reward.name == f"{__name__}:{score.__qualname__}"
    # the rewards of the log are those of the callable: brightness, and not a JPEG's size in kB
    assert all(0 <= record["reward_min"] <= record["reward_max"] <= 1 for record in metrics(result.folder))


def test_a_callable_of_another_name_is_another_run(words):
    train([*words, "train.iterations=1"], reward=brightness)
    with pytest.raises(ValueError, match=f"reward.name was '{__name__}:brightness'"):
        train([*words, "train.iterations=1"], reward=lambda images, prompts: brightness(images))


def test_names_stand_for_a_reward_and_a_schedule(words):
    result = train([*words, "train.iterations=1"], reward="jpeg_incompressibility", schedule="sliding")
    config = hrf_fast.load_config(["--config", str(result.folder / "config.yaml")])
    assert (config.reward.name, config.window.schedule) == ("jpeg_incompressibility", "sliding")
    (record,) = metrics(result.folder)
    # a JPEG has more than its header's 0.6 kB; sliding starts at 0
    assert record["reward_min"] > 0.6 and record["window_starts"] == [0, 0]


def test_a_reward_as_trl_calls_it_works(words):
    calls = []

    def score(images, prompts, metadata):
        calls.append((len(images), prompts, metadata))
        return brightness(images), {"seen": len(images)}

    train([*words, "train.iterations=1"], reward=score)
    # two groups of 3, between panels of 2
    assert [count for count, _, _ in calls] == [2, 3, 3, 2]
    assert all(prompts is None and metadata == ({},) * count for count, prompts, metadata in calls)


class Late:
    """A user's schedule: all groups from one start."""

    needs_anchors = True

    def __init__(self, *, num_inference_steps, stop, start=1):
        self.window = hrf_fast.Window(start, stop)

    def __call__(self, iteration, num_groups, *, generator, probe):
        return [self.window] * num_groups


def test_a_factory_of_schedules_gets_the_kwargs_of_the_configuration(words):
    result = train([*words, "window.kwargs.start=3", "train.iterations=1"], reward=brightness, schedule=Late)
    (record,) = metrics(result.folder)
    # of 6 steps the last is deterministic
    assert (record["window_starts"], record["window_steps"]) == ([3, 3], 4)
    config = hrf_fast.load_config(["--config", str(result.folder / "config.yaml")])
    assert (config.window.schedule, config.window.kwargs) == (f"{__name__}:Late", {"start": 3})


def test_a_reward_without_spread_is_said_once(words, capsys):
    train(words, reward=lambda images, prompts: [1.0] * len(images))
    notes = [line for line in capsys.readouterr().out.splitlines() if '"note"' in line and "reward.name" in line]
    assert len(notes) == 1 and "train.group_size" in notes[0] and "iteration 0" in notes[0]


# --- listeners --------------------------------------------------------------------------------------------------------


def test_a_reason_of_a_listener_ends_the_run_which_the_same_command_resumes(words, tmp_path):
    recorder = Recorder(lambda record: "bright enough" if record["iteration"] == 0 else None)
    result = train(words, reward=brightness, listeners=[recorder])
    assert result.reason == "bright enough" and recorder.reasons == ["bright enough"]
    assert recorder.iterations == [0] and [iteration for iteration, _ in recorder.panels] == [0, 1]
    assert (result.folder / "model" / "model_index.json").is_file()
    assert result.last_panel["iteration"] == 1
    # without the listener the run goes on to the end of an unbroken one
    assert train(words, reward=brightness).reason == "train.iterations is 2"
    train(with_folder(words, tmp_path / "unbroken"), reward=brightness)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "unbroken")
    assert panels(tmp_path / "run")[-1] == panels(tmp_path / "unbroken")[-1]


def test_a_panel_may_end_the_run_too(words):
    class Sated(Recorder):
        def panel(self, record, images):
            return "seen it all"

    recorder = Sated()
    assert train(words, reward=brightness, listeners=[recorder]).reason == "seen it all"
    assert recorder.iterations == []


def test_an_exception_of_a_listener_ends_the_run_as_an_error(words, tmp_path):
    def fail(record):
        raise LookupError("no such column")

    failing, other = Recorder(fail), Recorder()
    message = r"listener Recorder failed with LookupError: no such column \(.*test_api.py:\d+ in fail\)"
    with pytest.raises(UserCodeError, match=message):
        train(words, reward=brightness, listeners=[other, failing])
    assert failing.reasons == other.reasons == ["an error (UserCodeError)"]
    assert not (tmp_path / "run" / "model").exists()
    # the folder is free again, and the run goes on after the iteration that was heard of
    recorder = Recorder()
    assert train(words, reward=brightness, listeners=[recorder]).reason == "train.iterations is 2"
    assert recorder.iterations == [1]
    assert [record["iteration"] for record in read_log(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def test_an_object_that_is_no_listener_is_refused_with_the_methods_that_it_lacks(words, tmp_path):
    class Half:
        def panel(self, record, images):
            return None

    with pytest.raises(TypeError, match="Half.* lacks iteration, finished"):
        train(words, listeners=[Half()])
    assert not (tmp_path / "run").exists()


def test_a_class_of_listeners_is_no_listener_and_a_listener_is_no_list(words):
    with pytest.raises(TypeError, match=r"listener Recorder is a class; pass an object of it, Recorder\(\)"):
        train(words, listeners=[Recorder])
    with pytest.raises(TypeError, match="listeners is .*Recorder.*pass a list"):
        train(words, listeners=Recorder())


def test_a_reason_that_is_no_text_is_an_error_of_the_listener(words):
    with pytest.raises(UserCodeError, match=r"listener Recorder failed with TypeError: iteration\(\) returned True"):
        train(words, reward=brightness, listeners=[Recorder(lambda record: True)])


def test_what_finished_returns_is_nobody_s_business(words):
    class Writes(Recorder):
        def finished(self, reason):
            return len(reason)

    assert train(words, reward=brightness, listeners=[Writes()]).reason == "train.iterations is 2"


# --- refusals and names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "jpeg_compresibility"}, "reward.name is 'jpeg_compresibility'.*'jpeg_compressibility'"),
        ({"reward": lambda images: images}, "reward.name.*<lambda>"),
        ({"schedule": "cluster"}, "window.schedule is 'cluster'.*'clusters'"),
        ({"schedule": lambda **options: None}, f"window.schedule {__name__}:<lambda> "),
    ],
)
def test_what_can_not_work_is_refused_before_the_folder_is_made(words, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(words, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["model.name=fashion", {"model": {"name": "fashion"}}, [3], None])
def test_words_that_are_no_list_of_words_are_refused(given):
    with pytest.raises(TypeError, match="load_config takes a list of words"):
        hrf_fast.load_config(given)
    with pytest.raises(TypeError, match="config is of .*load_config"):
        hrf_fast.train(given)


def test_words_may_come_from_any_iterable_and_files_be_paths(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {iterations: 7}\n")
    loaded = hrf_fast.load_config(word for word in ("--config", file, "run.seed=5"))
    assert (loaded.train.iterations, loaded.run.seed) == (7, 5)


@pytest.mark.parametrize("option", ["reward", "schedule"])
def test_a_reward_or_schedule_that_is_neither_a_name_nor_a_function_is_refused(words, option):
    with pytest.raises(TypeError, match=f"{option} is of <class 'int'>; pass a name or a function"):
        train(words, **{option: 3})


def test_the_package_shows_its_names_before_their_first_use():
    code = "import hrf_fast; print(*dir(hrf_fast))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(hrf_fast.__all__) <= set(shown) and not {"Any", "importlib", "annotations"} & set(shown)


def test_a_signal_says_in_a_notebook_what_to_do():
    assert str(Interrupted(signal.SIGINT)) == "stopped by Ctrl-C; the same call resumes the run"


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, hrf_fast; print(sorted(set(sys.modules) & {'torch', 'numpy', 'diffusers', 'omegaconf'}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert all(callable(getattr(hrf_fast, name)) for name in hrf_fast.__all__ if name != "__version__")


def test_train_is_a_function_before_and_after_its_module_is_imported(words, monkeypatch):
    module = importlib.import_module("hrf_fast.train")
    config = hrf_fast.load_config([*words, "model.name=./nowhere"])
    for value in (module, module.train):
        monkeypatch.setattr(hrf_fast, "train", value)
        with pytest.raises(ValueError, match="model.name is './nowhere'"):
            hrf_fast.train(config)
    # as the first use of the name finds it
    monkeypatch.delattr(hrf_fast, "train")
    assert hrf_fast.train is module.train


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'trian'"):
        _ = hrf_fast.trian


def test_a_configuration_that_was_changed_after_it_was_loaded_is_checked(tiny_run, tmp_path):
    config = hrf_fast.load_config(tiny_run)
    config.train.clip_range = -1.0
    with pytest.raises(ValueError, match="train.clip_range is -1.0"):
        hrf_fast.train(config)
    assert not (tmp_path / "run").exists()
