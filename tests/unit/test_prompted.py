"""Prompts through the loop: groups, anchors, the search, rewards, panels and logs of a text-to-image run."""

import json
from types import SimpleNamespace

import pytest
import torch

from hrf_fast.evaluation.panel import Panel
from hrf_fast.noise import NoiseKey, noise_key
from hrf_fast.policies.sample import sample
from hrf_fast.prompts import Prompt
from hrf_fast.prompts.draw import PromptList
from hrf_fast.rewards import build_reward
from hrf_fast.training.anchors import Anchors
from hrf_fast.training.calls import CallPlan
from hrf_fast.training.collect import begin, collect
from hrf_fast.training.components import Components
from hrf_fast.training.groups import Groups
from hrf_fast.training.probe import probe_starts
from hrf_fast.training.rewarding import Rewarder
from tests.conftest import make_algorithm, tiny_words
from tests.prompted import WORDS, make_prompted_policy, prompted  # noqa: F401 (a fixture)
from tests.runs import assert_equal_training, metrics, panels, scheduled, train, with_folder
from tests.unit.test_collect import Phases, Schedule, late

pytestmark = pytest.mark.long

SEED = 7
SOURCE = PromptList("words", tuple(Prompt(word, metadata={"length": len(word)}) for word in WORDS), (1.0,) * 4)


class Colour:
    """A reward that reads prompts and metadata, as TRL's do; `asked` keeps both."""

    def __init__(self):
        self.asked = []

    def __call__(self, images, prompts, metadata):
        self.asked.append((prompts, metadata))
        return images.mean((1, 2, 3)).tolist(), {"note": "ignored"}


def make_components(choose=late, *, needs_anchors=True, rank=0, ranks=1, guided=True, images_per_call=0):
    colour = Colour()
    reward = build_reward(colour)
    groups = Groups(per_iteration=4, size=3, per_step=2, rank=rank, ranks=ranks)
    components = SimpleNamespace(
        policy=make_prompted_policy(),
        reward=reward,
        colour=colour,
        rewarder=Rewarder(reward, torch.device("cpu")),
        schedule=Schedule(choose, needs_anchors=needs_anchors),
        groups=groups,
        call_plan=CallPlan(3, images_per_call),
        anchors=Anchors(),
        algorithm=make_algorithm(SEED, guided=guided),
        prompts=SOURCE,
    )
    components.draw_prompts = lambda iteration: Components.draw_prompts(components, iteration)
    return components


# --- groups -----------------------------------------------------------------------------------------------------------


def test_a_groups_anchor_condition_and_samples_share_its_prompt():
    components = make_components()
    _, groups = begin(components, Phases(), iteration=5)
    drawn = SOURCE.draw(SEED, 5, 4)
    assert [group.prompt for group in groups.values()] == drawn and len({prompt.text for prompt in drawn}) > 1
    for number, group in groups.items():
        assert group.condition.conditional["class_labels"].tolist() == [WORDS.index(drawn[number].text)] * 3
    key = NoiseKey(noise_key(SEED, 5, "anchors"), torch.arange(4))
    expected = sample(components.policy, key, drawn, images_per_call=64)
    assert all(torch.equal(group.anchor, expected[number]) for number, group in groups.items())


def test_samples_have_their_own_prompts_however_calls_are_split():
    policy, prompts = make_prompted_policy(), [Prompt(word) for word in ("red", "blue", "red", "grey", "green")]
    key = NoiseKey(3, torch.arange(5))
    together = sample(policy, key, prompts, images_per_call=5)
    torch.testing.assert_close(sample(policy, key, prompts, images_per_call=2), together, atol=1e-5, rtol=1e-5)
    other = sample(policy, key, [Prompt("red")] * 5, images_per_call=5)
    assert torch.equal(other[0], together[0]) and not torch.allclose(other[1], together[1])


def test_any_number_of_ranks_draws_the_prompts_of_one():
    alone = begin(make_components(), Phases(), iteration=2)[1]
    for rank in (0, 1):
        groups = begin(make_components(rank=rank, ranks=2), Phases(), iteration=2)[1]
        assert len(groups) == 2 and all(alone[number].prompt == group.prompt for number, group in groups.items())


def test_groups_are_guided_or_not_as_the_algorithm_says_and_panels_always_are():
    for guided in (True, False):
        components = make_components(lambda n, probe: [probe([[3]] * n), late(n, probe)][1], guided=guided)
        begin(components, Phases(), iteration=0)
        # all groups, anchors, the search's lanes
        assert len(components.policy.asked) == 1 + 1 + 4
        assert {guided for _, guided in components.policy.asked} == {guided}
        components.policy.asked.clear()
        Panel(4, 1, 64).with_prompts(SOURCE, 2).evaluate(components.policy, components.reward)
        assert components.policy.asked == [(["red", "red", "green", "green"], True)]


# --- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images_per_call", [0, 6])
def test_rewards_get_the_prompt_and_the_metadata_of_every_image(images_per_call):
    components = make_components(images_per_call=images_per_call)
    _, groups = begin(components, Phases(), iteration=5)
    _, pending = collect(components, Phases(), list(groups.values()), 0)
    rewards = {number: group for future in pending for number, group in future.result().items()}
    assert {number: group.prompt for number, group in rewards.items()} == {n: g.prompt.text for n, g in groups.items()}
    order = [number for future in pending for number in future.result()]
    texts = [text for prompts, _ in components.colour.asked for text in prompts]
    assert texts == [groups[number].prompt.text for number in order for _ in range(3)]
    metadata = [each for _, batch in components.colour.asked for each in batch]
    assert metadata == [{"length": len(text)} for text in texts]


@pytest.mark.parametrize("estimate", ["exact", "x0"])
def test_the_search_denoises_and_rewards_each_group_by_its_prompt(estimate):
    policy, colour = make_prompted_policy(), Colour()
    anchors = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) / 4
    noises = [NoiseKey(5, torch.arange(3)), NoiseKey(5, torch.arange(3, 6))]
    prompts, candidates = [Prompt("red"), Prompt("blue", metadata={"a": 1})], [[2, 4], [4]]

    def measure(numbers, images_per_call):
        chosen = ([things[number] for number in numbers] for things in (anchors, candidates, noises, prompts))
        options = {"estimate": estimate, "images_per_call": images_per_call}
        return probe_starts(policy, build_reward(colour), *chosen, **options)

    together = measure([0, 1], 64)
    assert {text for texts, _ in colour.asked for text in texts} == {"red", "blue"}
    assert all(
        (text == "blue") == (each == {"a": 1}) for batch in colour.asked for text, each in zip(*batch, strict=True)
    )
    for number in (0, 1):
        (alone,) = measure([number], 3)
        torch.testing.assert_close(torch.stack(together[number]), torch.stack(alone), atol=1e-4, rtol=1e-4)
    # another prompt is another image
    prompts[0] = Prompt("grey")
    assert not torch.allclose(measure([0], 64)[0][0], together[0][0])


def test_a_reward_of_images_and_prompts_gets_a_list_of_texts_or_none():
    asked = []

    def score(images, prompts):
        asked.append(prompts)
        return torch.zeros(len(images))

    images = torch.rand(2, 3, 4, 4)
    reward = build_reward(score)
    reward(images, [Prompt("a"), Prompt("b")])
    reward(images, ["c", "d"])
    reward(images, [None, None])
    reward(images)
    assert asked == [["a", "b"], ["c", "d"], None, None]


# --- runs -------------------------------------------------------------------------------------------------------------


def words(tmp_path, *more):
    path = tmp_path / "words.txt"
    if not path.exists():
        path.write_text("\n".join(WORDS))
    words = [*tiny_words("any", tmp_path / "run"), f"prompts.source={path}", "evaluation.panel_size=8"]
    return [*words, "evaluation.images_per_prompt=2", "evaluation.every=0", *more]


def searching(num_groups, probe):
    probe([[2, 4]] * num_groups)
    return late(num_groups, probe)


@pytest.mark.slow
def test_a_run_logs_its_prompts_and_resumes_to_equal_numbers(tmp_path, prompted):  # noqa: F811
    schedule = scheduled(searching)
    statistics = ["train.advantages=prompt", "train.prompt_buffer=4", "train.prompt_min_count=2"]
    train(words(tmp_path, *statistics), reward=Colour(), schedule=schedule)
    drawn = [[prompt.text for prompt in SOURCE.draw(0, iteration, 2)] for iteration in range(2)]
    assert [record["prompts"] for record in metrics(tmp_path / "run")] == drawn
    assert panels(tmp_path / "run")[0]["prompts"] == list(WORDS)
    runs = tmp_path / "run", tmp_path / "again"
    again = with_folder(words(tmp_path, *statistics), tmp_path / "again")
    for iterations in (1, 2):
        train([*again, f"train.iterations={iterations}"], reward=Colour(), schedule=schedule)
    states = [json.loads(next((run / "checkpoints").glob("*2/state.json")).read_text()) for run in runs]
    remembered = states[0]["advantages"]
    # two groups of 3 an iteration, of which the last 4 are remembered
    assert set(remembered) == {text for texts in drawn for text in texts} and remembered == states[1]["advantages"]
    assert all(3 <= len(buffer) <= 4 for buffer in remembered.values())
    assert_equal_training(*runs)


def test_a_run_draws_each_prompt_once_an_iteration_or_refuses_to(tmp_path, prompted):  # noqa: F811
    distinct = ["prompts.distinct=true", "train.groups_per_iteration=4", "train.groups_per_step=4"]
    train(words(tmp_path, *distinct), reward=Colour())
    drawn = [record["prompts"] for record in metrics(tmp_path / "run")]
    # four groups, four words
    assert [sorted(texts) for texts in drawn] == [sorted(WORDS)] * 2 and drawn[0] != drawn[1]
    more = [*distinct, "train.groups_per_iteration=5", "train.groups_per_step=5"]
    with pytest.raises(ValueError, match="has 4 different prompts for train.groups_per_iteration 5"):
        train(words(tmp_path, *more), reward=Colour())


def test_an_edited_file_of_prompts_is_noticed_on_resume(tmp_path, prompted):  # noqa: F811
    train(words(tmp_path, "train.iterations=1"), reward=Colour())
    (tmp_path / "words.txt").write_text("red\ngreen\nblue\ngrey\ngrey\n")
    with pytest.raises(ValueError, match=r"prompts .*words.txt has changed since the run began"):
        train(words(tmp_path, "train.iterations=2", "run.edited_code=refuse"), reward=Colour())


def test_an_edited_file_of_the_panels_prompts_is_noticed_too(tmp_path, prompted):  # noqa: F811
    shown = tmp_path / "shown.txt"
    shown.write_text("red\ngreen\nblue\ngrey\n")
    train(words(tmp_path, f"evaluation.prompts={shown}", "train.iterations=1"), reward=Colour())
    shown.write_text("grey\ngrey\nblue\ngrey\n")
    with pytest.raises(ValueError, match=r"panel's prompts .*shown.txt has changed since the run began"):
        train(words(tmp_path, f"evaluation.prompts={shown}", "run.edited_code=refuse"), reward=Colour())


def test_a_model_with_prompts_needs_them_and_one_without_refuses_them(tmp_path, tiny_run, prompted):  # noqa: F811
    with pytest.raises(ValueError, match="prompts.source is null, but model.name any"):
        train(words(tmp_path, "prompts.source=null", "evaluation.images_per_prompt=4"))
    with pytest.raises(ValueError, match="evaluation.panel_size is 7, which evaluation.images_per_prompt 2 .* use 8"):
        train(words(tmp_path, "evaluation.panel_size=7"))


def test_an_unconditional_model_takes_no_prompts(tiny_run):
    with pytest.raises(ValueError, match="prompts.source is 'animals', but model.name .*takes no prompts"):
        train([*tiny_run, "prompts.source=animals"])
