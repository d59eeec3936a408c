"""Names chosen by a config: nearest-name answers, user functions, and options checked against a signature."""

import sys
from functools import partial

import pytest
import torch

from hrf_fast.registry import Registry, call_factory, load_user_function, nearest, qualified_name, state_of
from hrf_fast.training.advantages import apply_advantages, build_advantages
from hrf_fast.windows.schedules import build_schedule
from tests.unit.test_readme import ROOT, blocks, run_block


@pytest.fixture
def registry():
    registry = Registry("window schedule", "window.schedule")

    @registry.register("clusters")
    def clusters():
        return "a clusters"

    @registry.register("sliding")
    def sliding():
        return "a sliding"

    return registry


# --- names ------------------------------------------------------------------------------------------------------------


def test_what_a_factory_should_return_is_no_factory():
    def late(iteration, num_groups, *, generator, probe):
        return []

    with pytest.raises(
        ValueError, match=r"late takes \(iteration, num_groups, generator, probe\) itself; name a fact"
    ) as e:
        build_schedule(late, {}, num_inference_steps=4, stop=3)
    assert str(e.value).endswith("(docs/windows.md has an example)")


def test_advantages_that_are_no_factory_name_the_page_of_advantages(folder):
    (folder / "my_adv.py").write_text("def direct(rewards, prompts):\n    return rewards\n")
    with pytest.raises(
        ValueError, match=r"my_adv:direct takes \(rewards, prompts\) .* \(docs/remedies.md has an example"
    ):
        build_advantages("my_adv:direct")


def test_the_advantages_of_the_docs_are_ones(folder):
    (code,) = blocks(ROOT / "docs" / "remedies.md", "python")
    (folder / "my_advantages.py").write_text(code)
    answer = apply_advantages(build_advantages("my_advantages:beaten"), {3: torch.tensor([5.0, 1.0, 5.0])}, {3: ""})
    # of three, the first beats one, ties with one and itself; the second is beaten by two
    torch.testing.assert_close(answer[3], torch.tensor([1 / 3, -2 / 3, 1 / 3]))


def test_the_factory_of_the_docs_makes_a_schedule(monkeypatch):
    (code,) = blocks(ROOT / "docs" / "windows.md", "python")
    every_second = run_block(code, monkeypatch, [])["every_second"]
    schedule = build_schedule(every_second, {}, num_inference_steps=12, stop=11)
    assert [schedule(i, 1, generator=None, probe=None)[0].start for i in range(3)] == [8, 10, 8]


def test_the_nearest_name_is_offered_if_one_is_near():
    assert nearest("clustrs", ["sliding", "clusters"]) == " (did you mean 'clusters'?)"
    assert nearest("xyz", ["sliding", "clusters"]) == ""
    assert nearest("x", []) == ""


def test_a_registered_entry_is_found_and_left_as_it_was(registry):
    assert registry["sliding"]() == "a sliding"
    assert list(registry) == ["clusters", "sliding"]

    def entry():
        return 3

    assert registry.register("third")(entry) is entry


def test_a_name_that_is_taken_is_refused_and_keeps_its_entry(registry):
    with pytest.raises(ValueError, match="window schedule named 'sliding'"):
        registry.register("sliding")(lambda: "another")
    assert registry["sliding"]() == "a sliding"


def test_an_unknown_name_answers_with_the_nearest_and_all_names(registry):
    with pytest.raises(ValueError, match=r"window\.schedule is 'slide'.*'sliding'.*clusters, sliding"):
        registry["slide"]


def test_an_unknown_name_far_from_all_answers_with_all_names(registry):
    with pytest.raises(ValueError, match=r"window\.schedule is 'zzz'.*clusters, sliding"):
        registry["zzz"]


def test_registries_are_separate(registry):
    assert list(Registry("reward", "reward.name")) == []


# --- module:function --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module of the user's that nobody has imported."""
    (tmp_path / "brightness_of_mine.py").write_text(
        "LIMIT = 3\n\n\ndef brightness(images):\n    return 'bright'\n\n\ndef _hidden():\n    return 0\n"
    )
    (tmp_path / "broken_of_mine.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    return tmp_path


def test_a_function_in_the_current_folder_is_found(folder):
    assert load_user_function("brightness_of_mine:brightness", "reward.name")(None) == "bright"


def test_the_current_folder_is_put_on_the_path_once(folder):
    load_user_function("brightness_of_mine:brightness", "reward.name")
    load_user_function("brightness_of_mine:brightness", "reward.name")
    assert sys.path.count(str(folder)) == 1


@pytest.mark.parametrize("spec", ["brightness", "brightness_of_mine:", ":brightness", ":", ""])
def test_a_malformed_name_says_how_to_write_one(folder, spec):
    with pytest.raises(ValueError, match=rf"reward\.name is '{spec}'.*module:function"):
        load_user_function(spec, "reward.name")


def test_a_module_that_does_not_exist_is_refused(folder):
    with pytest.raises(ValueError, match=r"reward\.name is 'not_mine:f'.*No module named 'not_mine'.*PYTHONPATH"):
        load_user_function("not_mine:f", "reward.name")


def test_a_module_whose_own_import_fails_says_which(folder):
    with pytest.raises(ValueError, match="'broken_of_mine:f'.*No module named 'a_module_that_nobody_has'"):
        load_user_function("broken_of_mine:f", "reward.name")


@pytest.mark.parametrize(("body", "name"), [("def f(:\n", "SyntaxError"), ("undefined\n", "NameError")])
def test_a_module_that_raises_anything_at_import_says_what(folder, body, name):
    (folder / "broken_of_mine.py").write_text(body)
    with pytest.raises(ValueError, match=rf"window\.schedule is 'broken_of_mine:f'.* {name}: ") as caught:
        load_user_function("broken_of_mine:f", "window.schedule")
    assert type(caught.value.__cause__).__name__ == name


def test_a_relative_module_name_is_refused_by_name(folder):
    with pytest.raises(ValueError, match=r"reward\.name is '\.brightness_of_mine:brightness'"):
        load_user_function(".brightness_of_mine:brightness", "reward.name")


def test_a_function_that_does_not_exist_answers_with_the_nearest(folder):
    with pytest.raises(ValueError, match=r"reward\.name is '\S+'.*'brightnes' .*'brightness'"):
        load_user_function("brightness_of_mine:brightnes", "reward.name")


def test_something_that_cannot_be_called_is_refused(folder):
    with pytest.raises(ValueError, match="reward.name is 'brightness_of_mine:LIMIT'.*callable"):
        load_user_function("brightness_of_mine:LIMIT", "reward.name")


def test_private_names_are_not_offered(folder):
    with pytest.raises(ValueError, match=r"has no callable 'hidden'$"):
        load_user_function("brightness_of_mine:hidden", "reward.name")


# --- options ----------------------------------------------------------------------------------------------------------


def factory(*, stop, stride=1, beta=0.5):
    return stop, stride, beta


def test_given_arguments_and_options_reach_the_factory():
    assert call_factory(factory, "window.kwargs", {"beta": 2}, stop=7) == (7, 1, 2)


def test_an_unknown_option_answers_with_the_nearest_and_all_options():
    with pytest.raises(ValueError, match=r"window\.kwargs\.strid .*'stride'.* beta, stride$"):
        call_factory(factory, "window.kwargs", {"strid": 2}, stop=7)


def test_a_factory_without_options_says_so():
    with pytest.raises(ValueError, match=r"reward\.kwargs\.size .* none$"):
        call_factory(lambda: 0, "reward.kwargs", {"size": 2})


def test_what_the_program_gives_is_no_option():
    with pytest.raises(ValueError, match=r"window\.kwargs\.stop .* beta, stride$"):
        call_factory(factory, "window.kwargs", {"stop": 3}, stop=7)


def test_what_the_program_gives_is_no_option_of_an_open_ended_factory_either():
    with pytest.raises(ValueError, match=r"window\.kwargs\.stop"):
        call_factory(lambda **options: options, "window.kwargs", {"stop": 3}, stop=7)


def test_a_needed_option_that_is_missing_is_named():
    def needy(path, *, stop, size):
        return path, stop, size

    with pytest.raises(ValueError, match=r"reward\.kwargs\.size is missing"):
        call_factory(needy, "reward.kwargs", {"path": "x"}, stop=1)
    with pytest.raises(ValueError, match=r"reward\.kwargs\.path is missing"):
        call_factory(needy, "reward.kwargs", {"size": 1}, stop=1)
    assert call_factory(needy, "reward.kwargs", {"size": 2, "path": "x"}, stop=1) == ("x", 1, 2)


def test_an_open_ended_factory_takes_any_option():
    assert call_factory(lambda **options: options, "reward.kwargs", {"a": 1}, b=2) == {"a": 1, "b": 2}


def test_a_class_is_a_factory():
    class Reward:
        def __init__(self, *, size=1):
            self.size = size

    assert call_factory(Reward, "reward.kwargs", {"size": 3}).size == 3
    with pytest.raises(ValueError, match=r"reward\.kwargs\.self .* size$"):
        call_factory(Reward, "reward.kwargs", {"self": 3})


# --- names of things --------------------------------------------------------------------------------------------------


def test_a_thing_is_named_by_its_module_and_its_own_name_or_its_classs():
    assert qualified_name(factory) == f"{__name__}:factory"
    assert qualified_name(Registry) == qualified_name(Registry("reward", "reward.name")) == "hrf_fast.registry:Registry"
    assert qualified_name(partial(factory, stop=3)) == "functools:partial"


def test_a_state_that_no_checkpoint_can_hold_is_refused_by_name():
    class Remembers:
        def state(self):
            return {"seen": torch.zeros(2)}

    with pytest.raises(ValueError, match=r"window.schedule .*Remembers.*state\(\) is no JSON \(.*Tensor"):
        state_of(Remembers(), "schedule", "window.schedule")


def test_a_state_that_goes_on_changing_is_a_checkpoints_as_it_was():
    class Remembers:
        def __init__(self):
            self.seen = [1]

        def state(self):
            return {"seen": self.seen}

    schedule = Remembers()
    saved = state_of(schedule, "schedule", "window.schedule")
    schedule.seen.append(2)
    assert saved == {"schedule": {"seen": [1]}}
