"""Runs with user code that misbehaves, and what a user is told about rewards, models and edited files."""

import errno
import json
import sys

import pytest
import torch

import hrf_fast
from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.errors import UserCodeError
from hrf_fast.rewards import RewardError, check_names
from hrf_fast.run.checkpoint import list_checkpoints
from hrf_fast.run.files import read_log
from hrf_fast.train import main
from hrf_fast.windows.base import Window
from tests.runs import assert_equal_training, metrics, panels, scheduled, train, with_folder

pytestmark = pytest.mark.long


@pytest.fixture
def words(tiny_run):
    """A short run of two iterations, with panels before and after and no checkpoint that is asked for."""
    small = ["sample.num_inference_steps=3", "train.group_size=2", "evaluation.panel_size=3"]
    return [*tiny_run, *small, "evaluation.every=0", "run.save_every=0"]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes my_rewards.py into the current folder, tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    def write(text):
        sys.modules.pop("my_rewards", None)
        (tmp_path / "my_rewards.py").write_text(text)

    return write


def bright(images, prompts=None):
    return images.mean((1, 2, 3))


def notes(capsys, part):
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line["note"] for line in lines if part in line.get("note", "")]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_sys_exit_in_a_reward_ends_the_run_as_an_error_after_a_checkpoint(words, tmp_path, write, capsys):
    # the first panel, then the first iteration's two groups; the fourth call is in the second iteration
    write(
        "import sys\n\nn = [0]\n\n\ndef exits(images, prompts=None):\n    n[0] += 1\n    if n[0] == 4:\n"
        "        sys.exit()\n    return images.mean((1, 2, 3))\n"
    )
    assert main([*words, "reward.name=my_rewards:exits"]) == 1
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: reward 'my_rewards:exits' failed with SystemExit: sys.exit() ")
    assert error.endswith("(my_rewards.py:9 in exits)") and "HRF_TRACEBACK=1" in hint
    assert hint.endswith("mend it, and the same command resumes the run")
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["iteration-000001"]
    # the folder says it too
    (event,) = read_log(tmp_path / "run" / "events.jsonl")
    assert (event["iteration"], event["event"]) == (2, "error") and error == f"error: {event['text']}"


def test_sys_exit_in_a_schedule_or_a_listener_is_an_error_too(words, tmp_path):
    with pytest.raises(UserCodeError, match=r"window.schedule .*Chosen failed with SystemExit.*test_user_runs.py:"):
        train(words, schedule=scheduled(lambda groups, probe: sys.exit()))

    class Exits(hrf_fast.Listener):
        def iteration(self, record):
            sys.exit(0)

    with pytest.raises(UserCodeError, match=r"listener Exits failed with SystemExit: sys.exit\(0\)"):
        train(with_folder(words, tmp_path / "other"), listeners=[Exits()])
    assert len(list_checkpoints(tmp_path / "other" / "checkpoints")) == 1


def test_an_error_between_two_updates_is_an_event_and_shows_no_login_or_token(words, tmp_path):
    calls = []

    def away(images, prompts):
        calls.append(1)
        # the first panel, the first group, whose update is made then, and the second group
        if len(calls) == 3:
            raise ConnectionError("no answer of https://me:hunter2@host/score?token=SECRET&size=1")
        return bright(images)

    with pytest.raises(RewardError, match="hunter2"):
        train([*words, "train.order=on_policy", "train.groups_per_step=1"], reward=away)
    (event,) = read_log(tmp_path / "run" / "events.jsonl")
    assert event["event"] == "error" and "no answer of https://host/score?token=&size=1" in event["text"]


def test_an_os_error_of_a_listener_is_no_full_disk(words, tmp_path):
    class Away(hrf_fast.Listener):
        def iteration(self, record):
            raise ConnectionError("no route")

    with pytest.raises(UserCodeError, match="Away failed with ConnectionError: no route"):
        train(words, listeners=[Away()])
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


def test_an_output_that_nobody_reads_loses_no_iteration(words, tmp_path, monkeypatch):
    def broken(self, record):
        raise BrokenPipeError

    monkeypatch.setattr("hrf_fast.run.progress.JsonProgress.iteration", broken)
    with pytest.raises(BrokenPipeError):
        train(words)
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


def test_an_os_error_of_our_own_code_loses_no_iteration(words, tmp_path, monkeypatch):
    def away(self, record):
        raise OSError(errno.EIO, "the terminal is gone")

    monkeypatch.setattr("hrf_fast.run.progress.JsonProgress.iteration", away)
    with pytest.raises(OSError, match="the terminal is gone"):
        train(words)
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


def test_a_reward_that_fails_in_the_probe_of_a_schedule_is_named_as_a_reward(words):
    def failing(images, prompts):
        if len(images) == 4:
            raise KeyError("weights")
        return bright(images)

    # two groups of two
    schedule = scheduled(lambda groups, probe: probe([[1]] * groups) and [Window(1, 2)] * groups)
    with pytest.raises(RewardError, match="^reward 'failing' failed with KeyError: 'weights'"):
        train(words, reward=failing, schedule=schedule)


def test_a_panel_with_a_value_that_is_not_finite_ends_the_run_whatever_is_skipped(words):
    def no_number(images, prompts):
        # panels have three images, and the two groups two each
        return bright(images) * (float("nan") if len(images) == 3 else 1)

    with pytest.raises(RewardError, match="3 of 3 values that are NaN .* a panel's images, and stop.on_nan=skip is ab"):
        train([*words, "stop.on_nan=skip"], reward=no_number)


# --- global state -----------------------------------------------------------------------------------------------------


def test_a_reward_that_changes_the_folder_has_one_run_folder_and_the_same_command_resumes(
    words, tmp_path, write, capsys, monkeypatch
):
    code = "import os\n\n\ndef chdir(images, prompts=None):\n    os.chdir({!r})\n    return images.mean((1, 2, 3))\n"
    (tmp_path / "elsewhere").mkdir()
    write(code.format(str(tmp_path / "elsewhere")))
    moved = with_folder([*words, "run.save_every=1"], "runs/moved", "reward.name=my_rewards:chdir")
    assert main([*moved, "train.iterations=1"]) == 0
    (note,) = notes(capsys, "changes the current folder")
    assert note.startswith("reward 'my_rewards:chdir' changes the current folder, which the run puts back")
    assert main(moved) == 0
    assert not list((tmp_path / "elsewhere").iterdir())
    # the folder is written as the user has written it
    assert load_config(["--config", "runs/moved/config.yaml"]).run.folder == "runs/moved"
    sys.modules.pop("my_rewards")
    write(code.format(str(tmp_path)))
    assert main(with_folder(moved, "runs/still")) == 0
    assert_equal_training(tmp_path / "runs" / "moved", tmp_path / "runs" / "still")


def test_a_schedule_that_changes_state_is_named_too(words, tmp_path, capsys):
    def choose(groups, probe):
        torch.set_default_dtype(torch.float64)
        return [Window(1, 2)] * groups

    train([*words, "train.iterations=1"], schedule=scheduled(choose))
    (note,) = notes(capsys, "torch's default dtype")
    assert note.startswith("window.schedule ") and torch.get_default_dtype() == torch.float32


def test_a_window_of_a_users_schedule_that_can_not_be_is_named_by_it(words):
    with pytest.raises(ValueError, match=r"window.schedule .*Chosen: window \[2, 2\) is empty"):
        train(words, schedule=scheduled(lambda groups, probe: [Window(2, 2)] * groups))


class Counting:
    """A user's schedule with a counter."""

    needs_anchors = False

    def __init__(self, *, num_inference_steps, stop):
        self.stop, self.calls = stop, 0

    def __call__(self, iteration, num_groups, *, generator, probe):
        self.calls += 1
        return [Window(0, self.stop)] * num_groups


class Remembering(Counting):
    def state(self):
        return {"calls": self.calls}

    def load_state(self, state):
        self.calls = state["calls"]


@pytest.mark.parametrize(("schedule", "said"), [(Counting, 1), (Remembering, 0)])
def test_a_schedule_that_remembers_without_a_state_is_said_once(words, capsys, schedule, said):
    train(words, schedule=schedule)
    assert len(notes(capsys, "remembers something and has no state()")) == said


class Advising:
    """A user's advantages with a running mean, and an attribute whose text can't be made."""

    class Silent:
        def __repr__(self):
            raise RuntimeError("no text")

    def __init__(self):
        self.mean, self.silent = 0.0, self.Silent()

    def __call__(self, rewards, prompts):
        self.mean += 0.1
        return {group: values - self.mean for group, values in rewards.items()}


class RememberingAdvantages(Advising):
    def state(self):
        return {"mean": self.mean}

    def load_state(self, state):
        self.mean = state["mean"]


@pytest.mark.parametrize(("name", "said"), [("Advising", 1), ("RememberingAdvantages", 0)])
def test_advantages_that_remember_without_a_state_are_said_once(words, capsys, name, said):
    train([*words, f"train.advantages={__name__}:{name}"], reward=bright)
    assert len(notes(capsys, "remembers something and has no state()")) == said


def test_what_user_code_prints_is_not_taken_for_a_line_of_json(words, capsys):
    class Chatty(hrf_fast.Listener):
        def panel(self, record, images):
            print("panel seen")

    def chatty(images, prompts):
        print("rewarding", end="\n\n")
        return bright(images)

    print("before")
    train([*words, "train.iterations=1"], reward=chatty, listeners=[Chatty()])
    print("after")
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert (lines[0], lines[-1]) == ("before", "after") and all(json.loads(line) for line in lines[1:-1])
    assert err.count("rewarding") == 4 and err.count("panel seen") == 2


# --- small rewards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "part"),
    [
        (lambda images, prompts: 1e-9 * bright(images), "which is under train.advantage_floor 1e-06"),
        (lambda images, prompts: 1e4 + bright(images), "numbers of float32 are 0.0012 apart"),
    ],
    ids=["small units", "large offset"],
)
def test_a_reward_whose_spread_is_too_small_is_said_once(words, capsys, reward, part):
    train(words, reward=reward)
    (note,) = notes(capsys, part)
    assert note.startswith("iteration 0: the rewards of 2 of 2 groups spread by ")


def test_a_reward_in_fp64_keeps_its_spread_beside_any_offset(words, tmp_path, capsys):
    train([*words, "train.iterations=1"], reward=lambda images, prompts: 1e6 + bright(images).double())
    assert notes(capsys, "spread by") == []
    train(with_folder(words, tmp_path / "plain", "train.iterations=1"), reward=bright)
    (offset,), (plain,) = metrics(tmp_path / "run"), metrics(tmp_path / "plain")
    assert offset["group_reward_std"] == pytest.approx(plain["group_reward_std"], rel=1e-6)
    # in fp32 the advantages would be those of numbers 0.06 apart
    assert offset["advantage_max"] == pytest.approx(plain["advantage_max"], rel=1e-6)


# --- what is said -----------------------------------------------------------------------------------------------------


def test_an_edited_reward_is_said_at_a_resume_and_refused_by_option(words, tmp_path, write, capsys):
    text = "def bright(images, prompts=None):\n    return images.mean((1, 2, 3))\n"
    words = [*words, "reward.name=my_rewards:bright", "run.save_every=1"]
    write(text)
    assert main([*words, "train.iterations=1"]) == 0
    write(text.replace("mean", "amax"))
    assert main([*words, "run.edited_code=refuse"]) == 1
    error = capsys.readouterr().err
    assert "reward my_rewards:bright has changed since the run began" in error and "run.edited_code is refuse" in error
    assert str(tmp_path / "my_rewards.py") in error and len(metrics(tmp_path / "run")) == 1
    assert main(words) == 0
    assert len(notes(capsys, "reward my_rewards:bright has changed since the run began")) == 1
    # and a report says so ever after
    changed = [event for event in read_log(tmp_path / "run" / "events.jsonl") if event["event"] == "changed"]
    assert [event["iteration"] for event in changed] == [1] and "my_rewards:bright has changed" in changed[0]["text"]
    # what the run began with is no change
    write(text)
    assert main([*words, "train.iterations=3", "run.edited_code=refuse"]) == 0
    assert notes(capsys, "has changed") == []


def test_an_edited_factory_of_a_shipped_schedule_is_said_too(words, tmp_path, write, capsys):
    text = (
        "from hrf_fast.windows.schedules import build_schedule\n\n\n"
        "def mine(*, num_inference_steps, stop):\n"
        "    kwargs = {'clusters': [[1, 3]]}\n"
        "    return build_schedule('clusters', kwargs, num_inference_steps=num_inference_steps, stop=stop)\n"
    )
    words = [*words, "window.schedule=my_rewards:mine"]
    write(text)
    assert main([*words, "train.iterations=1"]) == 0
    write(text.replace("[1, 3]", "[1, 2]"))
    assert main(words) == 0
    assert len(notes(capsys, "schedule my_rewards:mine has changed since the run began")) == 1


def test_an_edited_reward_of_a_run_that_never_trained_is_a_new_run(words, tmp_path, write, capsys):
    write(
        "def f(images, prompts=None):\n    if len(images) == 2:\n        raise KeyError\n    return [1.0, 2.0, 3.0]\n"
    )
    words = [*words, "reward.name=my_rewards:f", "run.edited_code=refuse", "train.iterations=1"]
    assert main(words) == 1
    write("def f(images, prompts=None):\n    return [3.0] * len(images)\n")
    assert main(words) == 0
    # the first panel is of the mended reward
    assert [panel["rewards"] for panel in panels(tmp_path / "run")] == [[3.0, 3.0, 3.0]] * 2


@pytest.mark.parametrize(("network", "count"), [("auto", 1), ("none", 0), ("fashion", 0)])
def test_a_model_without_a_network_for_diversity_is_said_before_the_run(words, network, count):
    notes = build_components(load_config([*words, f"evaluation.network={network}"]))[1].notes
    assert len([note for note in notes if "set evaluation.network=openai/clip-vit-base-patch32" in note]) == count


# --- refused by name, before anything is loaded -----------------------------------------------------------------------


@pytest.fixture
def nothing_loads(monkeypatch):
    """Fails the test where a policy or a network of the hub is asked for."""

    def load(*_, **__):
        raise AssertionError("asked for a network")

    monkeypatch.setattr("hrf_fast.assembly.components.build_policy", load)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", load)


@pytest.mark.parametrize(
    "reward",
    [["reward.name=pickscore"], ["reward.name=null", "reward.terms=[{name: jpeg_compressibility},{name: pickscore}]"]],
)
def test_a_reward_that_reads_prompts_is_refused_without_them(nothing_loads, tmp_path, capsys, reward):
    assert main(["model.name=fashion", f"run.folder={tmp_path / 'run'}", *reward]) == 1
    error = capsys.readouterr().err
    assert "the reward pickscore compares images with their prompts, but prompts.source is null" in error
    assert "model.name is fashion" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("my_module:my_reward", "reward.name is 'my_module:my_reward', but there is no module 'my_module' in the "),
        ("away.deep:f", "there is no module 'away' in the current folder or on PYTHONPATH"),
        ("pickskore", "reward.name is 'pickskore' (did you mean 'pickscore'?)"),
        ("a:b:c", 'write "module:function"'),
    ],
)
def test_a_reward_that_is_nowhere_is_refused(nothing_loads, tmp_path, capsys, name, problem):
    assert main([f"reward.name={name}", f"run.folder={tmp_path / 'run'}"]) == 1
    assert problem in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_looking_for_the_module_of_a_reward_does_not_import_it(write):
    write("raise SystemExit\n")
    assert check_names(["my_rewards:f", "clip_score", "aesthetic"]) == ["clip_score"]
    assert "my_rewards" not in sys.modules


# --- kwargs -----------------------------------------------------------------------------------------------------------


def test_a_callable_and_the_configurations_own_name_get_its_kwargs_and_another_name_does_not(words):
    def level(images, prompts, *, quality):
        return bright(images) - quality

    own = load_config([*words, "reward.kwargs.quality=50"])
    for reward, kwargs in (
        (None, {"quality": 50}),
        ("jpeg_compressibility", {"quality": 50}),
        (level, {"quality": 50}),
    ):
        config, components = build_components(own, reward=reward)
        assert config.reward.kwargs == kwargs
    # grey of 0.5, less 50
    assert components.reward(torch.full((1, 3, 4, 4), 0.5)).total.tolist() == [-49.5]
    assert build_components(own, reward="jpeg_incompressibility")[0].reward.kwargs == {}
    with pytest.raises(ValueError, match="called as bright.images, prompts, quality=….*change the kwargs"):
        build_components(own, reward=bright)
