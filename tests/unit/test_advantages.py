"""Whom rewards are standardised against: the last rewards of a prompt, and a way of the user's."""

import json

import pytest
import torch

import hrf_fast
from hrf_fast.errors import UserCodeError
from hrf_fast.training.advantages import ADVANTAGES, apply_advantages, build_advantages
from tests.conftest import GOLDEN

TRACKER = json.loads((GOLDEN / "prompt_tracker.json").read_text())


def statistics(buffer=4, min_count=2):
    return build_advantages("prompt", advantage_floor=1e-6, prompt_buffer=buffer, prompt_min_count=min_count)


def tracked(advantages, epoch):
    """Advantages of an epoch of the golden numbers, whose samples are groups of one."""
    rewards = {i: torch.tensor([value]) for i, value in enumerate(TRACKER["rewards"][epoch])}
    prompts = {i: TRACKER["prompts"][number] for i, number in enumerate(TRACKER["prompt_index"][epoch])}
    return torch.cat(list(apply_advantages(advantages, rewards, prompts).values()))


def test_advantages_by_prompt_are_those_of_trls_tracker():
    advantages = statistics(TRACKER["buffer_size"], TRACKER["min_count"])
    for epoch, expected in enumerate(TRACKER["advantages"]):
        torch.testing.assert_close(tracked(advantages, epoch), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_statistics_that_were_saved_go_on_to_the_bit():
    unbroken = statistics()
    for epoch in range(3):
        resumed = statistics()
        resumed.load_state(json.loads(json.dumps(unbroken.state())))
        assert torch.equal(tracked(resumed, epoch), tracked(unbroken, epoch))
        assert resumed.state() == unbroken.state()
    state = unbroken.state()
    tracked(unbroken, 0)
    # what was saved is a copy
    assert state != unbroken.state() and max(map(len, state.values())) == 4


def test_statistics_by_hand():
    advantages = statistics(buffer=3, min_count=3)
    first = advantages({0: torch.tensor([1.0, 3.0]), 1: torch.tensor([1.0, 7.0])}, {0: "a", 1: "b"})
    # two are too few, so against 1, 3, 1, 7: mean 3; deviations -2, 0, -2, 4: squares 24, over 4: std sqrt(6)
    torch.testing.assert_close(first[0], torch.tensor([-2.0, 0.0]) / 6**0.5)
    # "a" now holds 3, 5, 7 of 1, 3, 5, 7: mean 5, std sqrt(8/3)
    second = advantages({0: torch.tensor([5.0, 7.0])}, {0: "a"})
    torch.testing.assert_close(second[0], torch.tensor([0.0, 2.0]) / (8 / 3) ** 0.5)
    assert second[0].dtype == torch.float32 and advantages.state() == {"a": [3.0, 5.0, 7.0], "b": [1.0, 7.0]}


def test_a_prompt_of_equal_rewards_teaches_nothing():
    advantages = statistics()({0: torch.full((3,), 0.1, dtype=torch.float64)}, {0: "a"})
    assert advantages[0].abs().max() < 1e-9


# --- the user's -------------------------------------------------------------------------------------------------------

MODULE = """
def centred(advantage_floor):
    return lambda rewards, prompts: {number: values - values.mean() for number, values in rewards.items()}

def wrong(answer=None):
    return lambda rewards, prompts: {0: rewards[0] * float("nan")}

def short():
    return lambda rewards, prompts: {}

def fails():
    def advantages(rewards, prompts):
        raise KeyError("here")
    return advantages

def nothing():
    return 3
"""


def test_a_factory_of_the_users_gets_the_options_that_it_names(tmp_path, monkeypatch):
    (tmp_path / "my_advantages.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)

    def build(name):
        return build_advantages(f"my_advantages:{name}", advantage_floor=1e-6, prompt_buffer=16)

    rewards = {0: torch.tensor([1.0, 3.0]), 3: torch.tensor([2.0, 2.5], dtype=torch.float64)}
    found = apply_advantages(build("centred"), rewards, {0: "", 3: ""})
    assert found[0].tolist() == [-1, 1] and found[3].tolist() == [-0.25, 0.25] and found[3].dtype == torch.float32
    with pytest.raises(ValueError, match="train.advantages my_advantages:short.* groups .0, 3. by group"):
        apply_advantages(build("short"), rewards, {})
    with pytest.raises(ValueError, match="train.advantages .*nan.* for group 0; return a tensor of 2 finite numbers"):
        apply_advantages(build("wrong"), {0: rewards[0]}, {})
    with pytest.raises(UserCodeError, match="KeyError: 'here'"):
        apply_advantages(build("fails"), rewards, {})
    with pytest.raises(ValueError, match="train.advantages my_advantages:nothing must return a callable"):
        build("nothing")


def test_advantages_may_write_into_their_rewards_and_keep_a_graph():
    rewards = {0: torch.tensor([1.0, 3.0])}

    def centred(rewards, prompts):
        rewards[0] -= rewards[0].mean()
        return {0: rewards[0] * torch.ones(2, requires_grad=True)}

    found = apply_advantages(centred, rewards, {0: ""})
    assert found[0].tolist() == [-1, 1] and not found[0].requires_grad and rewards[0].tolist() == [1, 3]


def test_an_unknown_name_answers_with_those_there_are(monkeypatch):
    with pytest.raises(ValueError, match="train.advantages is 'promt' .did you mean 'prompt'.*batch, group, prompt"):
        build_advantages("promt")
    monkeypatch.setattr(ADVANTAGES, "_entries", dict(ADVANTAGES._entries))
    hrf_fast.register_advantages("mine")(lambda: lambda rewards, prompts: rewards)
    assert build_advantages("mine", advantage_floor=1e-6)({0: 1}, {}) == {0: 1}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("group", {"prompt_buffer": 32}, "train.prompt_buffer is 32 but .* group.* use 16, or train.advantages=prompt"),
        ("batch", {"prompt_min_count": 2}, "train.prompt_min_count is 2 but train.advantages is batch"),
        ("prompt", {"advantage_floor": 0.5}, "train.advantage_floor is 0.5 but .* prompt.* use 1e-06, .*=group or"),
    ],
)
def test_an_option_that_a_way_has_no_use_for_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_advantages(name, **{"advantage_floor": 1e-6, "prompt_buffer": 16, "prompt_min_count": 16, **options})
