"""Schedules of the user's: what a factory may return, its options, its memory, and what is refused before the run."""

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest

from hrf_fast.registry import load_state_of, state_of
from hrf_fast.windows.base import Window
from hrf_fast.windows.schedules import build_schedule
from tests.unit.test_windows import draw, make

NAMES = ("schedule", "window.schedule")


class Fixed:
    """A user's schedule: one start for all."""

    needs_anchors = True

    def __init__(self, *, num_inference_steps, stop, start=1):
        self.window = Window(start, stop)

    def __call__(self, iteration, num_groups, *, generator, probe):
        return [self.window] * num_groups


@pytest.fixture
def user_module(monkeypatch):
    module = ModuleType("my_schedules")
    monkeypatch.setitem(sys.modules, "my_schedules", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return module


def test_a_users_class_is_a_schedule(user_module):
    user_module.fixed = Fixed
    schedule = make("my_schedules:fixed", {"start": 4}, T=7)
    assert draw(schedule, num_groups=2) == [Window(4, 6), Window(4, 6)]


def test_a_users_function_may_return_a_plain_function(user_module):
    # "must return a callable (iteration, num_groups, *, generator, probe)": a closure is one
    def factory(*, num_inference_steps, stop):
        def schedule(iteration, num_groups, *, generator, probe):
            return [Window(2, stop)] * num_groups

        schedule.needs_anchors = True
        return schedule

    user_module.factory = factory
    assert draw(make("my_schedules:factory", T=7), num_groups=2) == [Window(2, 6), Window(2, 6)]


def test_a_users_schedule_takes_its_own_options_only(user_module):
    user_module.fixed = Fixed
    with pytest.raises(ValueError, match=r"window\.kwargs\.begin is unknown.* start"):
        make("my_schedules:fixed", {"begin": 4}, T=7)


class NoProbe:
    needs_anchors = True

    def __call__(self, iteration, num_groups, *, generator):
        return []


@pytest.mark.parametrize("product", [None, 3, SimpleNamespace(needs_anchors=True), NoProbe()])
def test_a_users_factory_that_returns_no_schedule_is_refused(user_module, product):
    user_module.bad = lambda *, num_inference_steps, stop: product
    with pytest.raises(ValueError, match=r"window\.schedule my_schedules:bad must return .*iteration, num_groups"):
        make("my_schedules:bad")


def test_a_users_schedule_that_does_not_say_whether_it_needs_anchors_is_refused_before_the_run(user_module):
    class Silent:
        def __call__(self, iteration, num_groups, *, generator, probe):
            return [Window(0, 1)] * num_groups

    user_module.silent = lambda *, num_inference_steps, stop: Silent()
    with pytest.raises(ValueError, match=r"window\.schedule.*needs_anchors"):
        make("my_schedules:silent")


def test_a_users_module_or_function_that_does_not_exist_is_refused(user_module):
    with pytest.raises(ValueError, match=r"window\.schedule is 'no_such_module:f'.*No module named"):
        make("no_such_module:f")
    with pytest.raises(ValueError, match=r"window\.schedule is 'my_schedules:nothing'.*'nothing'"):
        make("my_schedules:nothing")


def test_a_users_schedule_that_remembers_is_saved_and_restored(user_module):
    class Counting(Fixed):
        calls = 0

        def state(self):
            return {"calls": self.calls}

        def load_state(self, state):
            self.calls = state["calls"]

    user_module.counting = Counting
    schedule = make("my_schedules:counting", T=7)
    schedule.calls = 3
    other = make("my_schedules:counting", T=7)
    load_state_of(other, {"calls": {}, **state_of(schedule, *NAMES)}, *NAMES)
    assert other.calls == 3
    # a checkpoint without a state changes nothing
    load_state_of(other, {"calls": {}}, *NAMES)
    assert other.calls == 3


def test_a_schedule_without_a_state_adds_nothing_to_a_checkpoint(user_module):
    user_module.fixed = Fixed
    schedule = make("my_schedules:fixed", T=7)
    assert state_of(schedule, *NAMES) == state_of(make("clusters"), *NAMES) == {}
    load_state_of(schedule, {"calls": {}, "schedule": {"calls": 3}}, *NAMES)


def test_a_state_that_could_not_be_restored_is_refused_before_the_run(user_module):
    class Half(Fixed):
        def state(self):
            return {}

    user_module.half = Half
    with pytest.raises(ValueError, match=r"window\.schedule my_schedules:half .* both state\(\) and load_state"):
        make("my_schedules:half", T=7)


def test_a_factory_itself_is_as_good_as_its_name():
    schedule = build_schedule(Fixed, {"start": 4}, num_inference_steps=7, stop=6)
    assert draw(schedule, num_groups=2) == [Window(4, 6)] * 2
    with pytest.raises(ValueError, match=r"window\.kwargs\.begin"):
        build_schedule(Fixed, {"begin": 4}, num_inference_steps=7, stop=6)


def test_a_partial_of_a_factory_is_a_factory():
    schedule = build_schedule(partial(Fixed, start=4), {}, num_inference_steps=7, stop=6)
    assert draw(schedule, num_groups=2) == [Window(4, 6)] * 2


def test_a_factory_that_returns_no_schedule_is_refused_under_its_module_and_name():
    def bad(*, num_inference_steps, stop):
        return None

    with pytest.raises(ValueError, match=r"window\.schedule \S+test_user_schedules:\S*bad "):
        build_schedule(bad, {}, num_inference_steps=7, stop=6)
