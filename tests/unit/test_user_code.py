"""User code: errors by file and line, also sys.exit; global state that is put back; sources that are hashed."""

import asyncio
import functools
import hashlib
import importlib
import os
import sys
import warnings

import pytest
import torch

from hrf_fast.errors import UserCodeError
from hrf_fast.registry import call_factory, load_user_function
from hrf_fast.rewards import RewardError, RewardTerm, build_reward
from hrf_fast.rewards.jpeg import jpeg_compressibility
from hrf_fast.user_code import source_of, user_code
from hrf_fast.windows.base import Window


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into a folder on the path and imports it; tmp_path is the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    def write(name, text, folder=tmp_path):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        return importlib.import_module(name)

    return write


IMAGES = torch.full((2, 3, 4, 4), 0.5)

# --- errors -----------------------------------------------------------------------------------------------------------

FAILING = """import torch


def keyerr(images, prompts=None):
    return [lookup({"a": 1}) for _ in images]


def lookup(record):
    return record["score"]


def shapes(images, prompts=None):
    return torch.cat([images, torch.zeros(1)])
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("keyerr", r"reward 'failing:keyerr' failed with KeyError: 'score' \(failing.py:9 in lookup\)$"),
        # the line of the user's that called torch
        ("shapes", r"reward 'failing:shapes' failed with RuntimeError: .*\(failing.py:13 in shapes\)$"),
    ],
)
def test_an_error_names_file_and_line_of_the_users_own_frame(module, name, message):
    module("failing", FAILING)
    with pytest.raises(RewardError, match=message):
        build_reward(f"failing:{name}")(IMAGES)


def test_an_error_of_an_installed_package_names_its_innermost_line(module, tmp_path):
    module("installed", FAILING, tmp_path / "site-packages")
    with pytest.raises(RewardError, match=r"\(site-packages.installed.py:9 in lookup\)$"):
        build_reward("installed:keyerr")(IMAGES)


@pytest.mark.parametrize("leaves", [SystemExit(), SystemExit(0), SystemExit("done"), asyncio.CancelledError()])
def test_whatever_leaves_user_code_is_an_error_that_names_it(leaves):
    def reward(images, prompts):
        raise leaves

    message = rf"reward 'reward' failed with {type(leaves).__name__}.*test_user_code.py:\d+ in reward\)$"
    with pytest.raises(RewardError, match=message) as caught:
        build_reward(reward)(IMAGES)
    assert caught.value.__cause__ is leaves
    assert ("sys.exit" in str(caught.value)) == isinstance(leaves, SystemExit)


def test_the_end_of_an_iterator_is_an_error_of_user_code_too():
    def reward(images, prompts):
        return next(iter([]))

    with pytest.raises(RewardError, match=r"'reward' failed with StopIteration.*test_user_code.py:\d+ in reward"):
        build_reward(reward)(IMAGES)


def test_a_signal_passes_through_user_code():
    def reward(images, prompts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_reward(reward)(IMAGES)


def test_what_our_own_code_refuses_passes_as_it_is():
    def schedule():
        return Window(3, 3)

    with pytest.raises(ValueError, match="^window"), user_code("schedule"):
        schedule()
    with pytest.raises(UserCodeError, match="^schedule failed with ValueError: mine"), user_code("schedule"):
        raise ValueError("mine")


def test_a_factory_that_fails_is_named_with_its_line():
    def factory(*, stop, start=1):
        return [stop][start]

    message = r"building .*factory failed with IndexError.*test_user_code.py:\d+ in factory"
    with pytest.raises(UserCodeError, match=message):
        call_factory(factory, "window.kwargs", {}, stop=5)
    # a call that does not fit has no frame of the user's
    with pytest.raises(UserCodeError, match="building .*lambda.* failed with TypeError: .*'stop'"):
        call_factory(lambda: 0, "window.kwargs", {}, stop=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", r"SyntaxError: .*broken.py:1\)"),
        ("import sys\n\nsys.exit()\n", r"SystemExit.*\(broken.py:3 in <module>\)"),
        ("x = 1\nimport nobody_has_it\n", r"ModuleNotFoundError: .*nobody_has_it.* \(broken.py:2 in"),
        (
            "import argparse\n\nargparse.ArgumentParser().parse_args(['--x'])\n",
            r"SystemExit: sys.exit\(2\).*\(broken.py:3 in",
        ),
    ],
)
def test_a_module_that_fails_at_its_import_names_the_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ValueError, match=rf"reward.name is 'broken:f' but importing 'broken' raised {message}"):
        load_user_function("broken:f", "reward.name")


# --- global state -----------------------------------------------------------------------------------------------------


def state():
    """What user code is known to change."""
    return (
        os.getcwd(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_deterministic_debug_mode(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark,
        list(warnings.filters),
    )


CHANGES = {
    "the current folder": lambda: os.chdir("/"),
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's default device": lambda: torch.set_default_device("meta"),
    "torch's number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch's deterministic mode": lambda: torch.use_deterministic_algorithms(True),
    "torch's matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "cuDNN's flags": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    # put back without a word
    "": lambda: (torch.set_grad_enabled(False), warnings.simplefilter("error")),
}


@pytest.mark.parametrize("name", CHANGES, ids=lambda name: name or "quiet")
@pytest.mark.parametrize("fails", [False, True])
def test_global_state_is_put_back_and_named_once(name, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def meddling(images, prompts):
        CHANGES[name]()
        if fails:
            raise ValueError("mine")
        return [1.0] * len(images)

    reward, before = build_reward(meddling), state()
    for _ in range(2):
        if fails:
            with pytest.raises(RewardError, match="mine"):
                reward(IMAGES)
        else:
            reward(IMAGES)
        assert state() == before
    note = f"reward 'meddling' changes {name}, which the run puts back: nothing else may depend on it"
    assert list(reward.notes) == ([note] if name and not fails else [])


def test_a_folder_that_user_code_removes_is_not_gone_back_to(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    with user_code("x") as changes:
        os.chdir(tmp_path)
        (tmp_path / "gone").rmdir()
    assert changes == ["the current folder"] and os.getcwd() == str(tmp_path)
    # nor is one that is missing from the beginning
    (tmp_path / "lost").mkdir()
    monkeypatch.chdir(tmp_path / "lost")
    (tmp_path / "lost").rmdir()
    with user_code("x") as changes:
        os.chdir(tmp_path)
    assert changes == []


def test_a_module_that_changes_state_or_prints_at_its_import_does_neither_to_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = "import torch\ntorch.set_float32_matmul_precision('high')\nprint('loaded')\nf = print\n"
    (tmp_path / "meddling.py").write_text(text)
    with pytest.warns(UserWarning, match="importing meddling changes torch's matmul precision"):
        load_user_function("meddling:f", "reward.name")
    assert torch.get_float32_matmul_precision() == "highest"
    assert capsys.readouterr() == ("", "loaded\n")


# --- sources ----------------------------------------------------------------------------------------------------------


def test_the_source_of_user_code_is_its_file(module, tmp_path):
    text = "class Edges:\n    def __call__(self, images, prompts=None): ...\n\n\ndef f(images, prompts=None): ...\n"
    mine = module("mine", text)
    expected = {"file": str(tmp_path / "mine.py"), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert source_of(mine.f) == source_of(mine.Edges()) == source_of(functools.partial(mine.f)) == expected
    reward = build_reward([RewardTerm("mine:f"), RewardTerm("jpeg_compressibility")])
    assert reward.sources == {"reward mine:f": expected, "reward jpeg_compressibility": None}


def test_plain_arguments_of_a_partial_are_part_of_its_source(module):
    mine = module("mine", "def f(images, prompts=None, sign=1): ...\n")
    one, same, other = (functools.partial(mine.f, sign=sign) for sign in (1, 1, -1))
    assert source_of(one) == source_of(same) != source_of(other)
    # a reward as the run has it
    assert build_reward(one).sources != build_reward(other).sources
    assert source_of(functools.partial(mine.f, sign=object())) == source_of(mine.f)


def test_ours_and_what_has_no_source_have_none():
    names = {"__name__": "page"}
    exec("def f(images, prompts): ...", names)
    for thing in (jpeg_compressibility(), jpeg_compressibility, max, names["f"]):
        assert source_of(thing) is None


def test_a_script_changes_for_other_reasons_so_its_function_alone_counts(module, monkeypatch):
    first = module("script", "X = 1\n\n\ndef f(images, prompts): ...\n")
    second = module("script_2", "X = 2\n\n\ndef f(images, prompts): ...\n")
    assert source_of(first.f)["sha256"] != source_of(second.f)["sha256"]
    for script in (first, second):
        script.f.__module__ = "__main__"
    assert source_of(first.f)["sha256"] == source_of(second.f)["sha256"]
