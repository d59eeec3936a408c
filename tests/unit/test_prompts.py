"""Prompts: the sources, what is refused, and drawing by weight and by a function."""

import json
import random

import numpy as np
import pytest
import torch

from hrf_fast.assets import PROMPT_LISTS
from hrf_fast.errors import UserCodeError
from hrf_fast.prompts import Prompt
from hrf_fast.prompts.draw import PromptList, draw_distinct
from hrf_fast.prompts.sources import LISTS, check_prompts, load_prompts

OPTION = "prompts.source"


def load(value, kwargs=None, negative=""):
    return load_prompts(OPTION, str(value), kwargs, negative=negative)[0]


def refused(value, message, kwargs=None):
    with pytest.raises(ValueError, match=message):
        load(value, kwargs)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_text_file_has_a_prompt_on_each_line(tmp_path):
    path = tmp_path / "prompts.txt"
    # with the mark of Windows' editors, and its line ends
    path.write_bytes("\ufeff# mine\r\na cat\r\n\r\n  ein Bär  \n # no prompt\na cat, 4k".encode())
    prompts, source = load_prompts(OPTION, str(path), negative="blurry")
    assert prompts.prompts == (Prompt("a cat", "blurry"), Prompt("ein Bär", "blurry"), Prompt("a cat, 4k", "blurry"))
    assert prompts.weights == (1, 1, 1) and source["file"] == str(path) and len(source["sha256"]) == 64


def test_json_lines_have_weights_negatives_and_metadata(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a cat", "weight": 3, "metadata": {"question": "is it?"}}\n\n'
        '{"prompt": "a dog", "negative": "wet"}\n{"prompt": "one\u2028line", "negative": "", "weight": 0}\n"plain"\n',
        encoding="utf-8",
    )
    prompts = load(path, negative="blurry")
    assert prompts.prompts == (
        Prompt("a cat", "blurry", {"question": "is it?"}),
        Prompt("a dog", "wet"),
        Prompt("one\u2028line"),
        Prompt("plain", "blurry"),
    )
    assert prompts.weights == (3, 1, 0, 1)


def test_other_keys_of_a_line_without_metadata_are_its_metadata_as_in_genevals_files(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    lines = [
        {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [], "prompt": "two cats"},
        {"tag": "color_attr", "include": [{"class": "cat", "color": "red"}], "prompt": "a red cat", "weight": 3},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = load(path, negative="blurry")
    first, second = prompts.prompts
    assert first.metadata == {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": []}
    assert second == Prompt("a red cat", "blurry", {"tag": "color_attr", "include": lines[1]["include"]})
    assert prompts.weights == (1, 3)


@pytest.mark.parametrize("name", PROMPT_LISTS)
def test_the_shipped_lists_are_of_distinct_prompts(name):
    prompts, source = load_prompts(OPTION, name)
    texts = [prompt.text for prompt in prompts.prompts]
    assert LISTS[name].is_file() and source is None and len(texts) == len(set(texts)) >= 45
    known = {
        "animals": "cat",
        "activities": "a cat riding a bike",
        "peeps": "a character, in love, in a green top, by a purple wall",
    }
    assert known[name] in texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"# only\n\n", "holds no prompt"),
        ("a.jsonl", b"", "holds no prompt"),
        ("a.json", b'["a cat"]', "write JSON lines .*, or a text file"),
        ("a.csv", b"prompt,weight\na cat,1\n", "holds a table or a tree .*write JSON lines .*, or a text file"),
        ("a.TSV", b"prompt\tweight\na cat\t1\n", "holds a table or a tree"),
        ("a.yaml", b"- a cat\n", "holds a table or a tree"),
        ("a.yml", b"- a cat\n", "holds a table or a tree"),
        ("a.txt", b"a cat\n\xff\n", "not UTF-8 text .byte 6"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is no JSON"),
        ("a.jsonl", b"[1, 2, 3]", "line 1 is .1, 2, 3."),
        ("a.jsonl", b'{"text": "a cat"}', "line 1 is .*prompt"),
        (
            "a.jsonl",
            b'{"prompt": "a", "weigth": 2}',
            "line 1 has weigth .did you mean 'weight'.*correct it, or .*metadata",
        ),
        ("a.jsonl", b'{"prompt": "a", "WEIGHT": 2}', "line 1 has WEIGHT .did you mean 'weight'"),
        ("a.jsonl", b'{"prompt": "a", "prompt_2": "b"}', "line 1 has prompt_2 .did you mean 'prompt'"),
        ("a.jsonl", b'{"prompt": "a", "negative_prompt": "b"}', "line 1 has negative_prompt .did you mean 'negative'"),
        ("a.jsonl", b'{"prompt": "a", "tag": "b", "metadata": {}}', "line 1 has tag beside metadata; its keys are"),
        ("a.jsonl", b'{"prompt": " "}', "line 1 has the prompt ' '"),
        ("a.jsonl", b'{"prompt": "\\ud83d cat"}', "line 1 has the prompt .*half of a character"),
        ("a.jsonl", b'{"prompt": "a", "negative": ["b", "c"]}', "line 1 has the negative prompt .*one text"),
        ("a.jsonl", b'{"prompt": "a", "metadata": [1]}', "line 1 has the metadata"),
        ("a.jsonl", b'{"prompt": "a", "weight": -1}', "line 1 has the weight -1"),
        ("a.jsonl", b'{"prompt": "a", "weight": NaN}', "line 1 has the weight nan"),
        ("a.jsonl", b'{"prompt": "a", "weight": Infinity}', "line 1 has the weight inf"),
        ("a.jsonl", b'{"prompt": "a", "weight": 1' + b"0" * 400 + b"}", "line 1 has the weight 10+; use a finite"),
        ("a.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("a.jsonl", b'{"prompt": "a", "weight": "1"}', "line 1 has the weight '1'"),
        ("a.jsonl", b'{"prompt": "a", "weight": 0}', "every weight is 0"),
    ],
)
def test_a_file_that_can_not_be_drawn_from_is_refused_with_its_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, f"{name}.*{message}")


def test_a_source_that_is_nothing_answers_with_the_lists():
    refused("animal", "prompts.source is 'animal' .did you mean 'animals'.*no such file.*animals, activities")
    refused("missing.txt", "prompts.source is 'missing.txt'.*no such file")
    refused("animals", "prompts.kwargs has count.*'animals'", {"count": 3})


FUNCTIONS = """
import random
import numpy as np
import torch

def words(count=2, noun="cat"):
    return [noun, (noun + "s", {"plural": True}), {"prompt": "dog", "weight": 2, "negative": "wet"}][:count]

def trl(nouns=("cat", "dog", "owl")):
    return f"{random.choice(nouns)} {np.random.randint(1000)} {torch.rand(()):.6f}", {}

def fails():
    raise KeyError("here")

def nothing():
    return None

def one():
    return {"prompt": "a cat"}

def unordered():
    return {"a cat", "a dog"}

def wrong():
    return ["a", 3]

def late(calls=[]):
    calls.append(1)
    return ("a", {}) if len(calls) < 3 else "a"
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "my_prompts.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)


def test_a_function_returns_a_list_of_texts_pairs_and_mappings(functions):
    prompts, source = load_prompts(OPTION, "my_prompts:words", {"count": 3, "noun": "owl"}, negative="blurry")
    assert prompts.prompts == (
        Prompt("owl", "blurry"),
        Prompt("owls", "blurry", {"plural": True}),
        Prompt("dog", "wet"),
    )
    assert prompts.weights == (1, 1, 2) and source["file"].endswith("my_prompts.py")


def test_a_function_that_returns_a_pair_is_trls_and_is_called_for_every_group(functions):
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    prompts = load("my_prompts:trl", negative="blurry")
    drawn = prompts.draw(7, 3, 4)
    # a function of (seed, iteration), whatever was drawn in between
    assert prompts.draw(7, 3, 4) == drawn and prompts.draw(7, 3, 2) == drawn[:2]
    assert len({prompt.text for prompt in drawn}) == 4 and {prompt.negative for prompt in drawn} == {"blurry"}
    assert prompts.draw(7, 4, 4) != drawn and prompts.draw(8, 3, 4) != drawn
    assert prompts.fixed(5, 3) == prompts.fixed(5, 3)
    # the generators that rewards draw from are as before
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])


def test_a_function_that_answers_otherwise_is_refused(functions):
    refused("my_prompts:nothing", "prompts.source is 'my_prompts:nothing', which returned None")
    refused("my_prompts:one", "which returned {'prompt': 'a cat'}; return a list of prompts")
    refused("my_prompts:unordered", "which returned {.*}; return a list of prompts")
    refused("my_prompts:wrong", "prompts.source 'my_prompts:wrong', item 1 is 3")
    refused("my_prompts:words", "prompts.kwargs.nuon is unknown .did you mean 'noun'", {"nuon": 1})
    refused("my_prompts:word", "prompts.source is 'my_prompts:word'.*did you mean 'words'")
    with pytest.raises(UserCodeError, match="KeyError: 'here'.*my_prompts.py"):
        load("my_prompts:fails")
    drawn = load("my_prompts:late")
    # text alone is a prompt too
    assert drawn.draw(0, 0, 2) == [Prompt("a"), Prompt("a")]


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_prompts_are_drawn_by_weight_with_replacement_by_seed_and_iteration():
    prompts = PromptList("list", tuple(map(Prompt, "abc")), (3.0, 1.0, 0.0))
    drawn = prompts.draw(0, 0, 4000)
    # 3 to 1: 3000 ± 27 of 4000
    assert abs(sum(prompt.text == "a" for prompt in drawn) - 3000) < 110
    assert {prompt.text for prompt in drawn} == {"a", "b"}
    assert prompts.draw(0, 0, 4000) == drawn and prompts.draw(0, 1, 4000) != drawn and prompts.draw(1, 0, 4000) != drawn


def test_a_seed_draws_what_it_has_always_drawn():
    prompts = PromptList("list", tuple(map(Prompt, "abcd")), (3.0, 1.0, 0.0, 2.0))
    # recorded before prompts.distinct was an option
    drawn = ["".join(prompt.text for prompt in prompts.draw(7, iteration, 8)) for iteration in range(3)]
    assert drawn == ["aabbaabb", "dddddadb", "baddadaa"]


def test_distinct_prompts_are_successive_draws_by_weight_of_texts_that_are_left():
    prompts = draw_distinct(PromptList("list", tuple(map(Prompt, "abcd")), (2.0, 1.0, 1.0, 0.0)), "list", 2)
    draws = ["".join(prompt.text for prompt in prompts.draw(0, iteration, 2)) for iteration in range(4000)]
    assert all(len(set(drawn)) == 2 and "d" not in drawn for drawn in draws)
    # a comes first with 2/4, and second with 2/3 after b or c: 1/2 + 1/2·2/3 = 5/6, 3333 ± 24 of 4000
    assert abs(sum(drawn[0] == "a" for drawn in draws) - 2000) < 130
    assert abs(sum("a" in drawn for drawn in draws) - 3333) < 95
    assert prompts.draw(0, 5, 2) == prompts.draw(0, 5, 2)
    assert len(set(draws)) > 4 and draws[:50] != [
        "".join(prompt.text for prompt in prompts.draw(1, iteration, 2)) for iteration in range(50)
    ]


def test_a_text_on_two_lines_is_drawn_once_and_as_often_as_both():
    items = (Prompt("a", metadata={"line": 1}), Prompt("b"), Prompt("a", metadata={"line": 3}), Prompt("c"))
    prompts = draw_distinct(PromptList("list", items, (1.0,) * 4), "list", 3)
    draws = [prompts.draw(0, iteration, 3) for iteration in range(2000)]
    assert {tuple(sorted(prompt.text for prompt in drawn)) for drawn in draws} == {("a", "b", "c")}
    # two lines of four: 1000 ± 22 begin with a, half of them with its first line
    first = [drawn[0] for drawn in draws if drawn[0].text == "a"]
    assert abs(len(first) - 1000) < 90 and abs(sum(prompt.metadata["line"] == 1 for prompt in first) - 500) < 90


def test_distinct_prompts_are_refused_where_a_source_can_not_promise_them(functions):
    # the last weight vanishes beside the others
    few = PromptList("few.txt", tuple(map(Prompt, "aabc")), (1.0, 1e308, 1e308, 1e-320))
    message = "prompts.distinct is true but prompts.source 'few.txt' has 2 different prompts for train.groups_per_iter"
    with pytest.raises(ValueError, match=f"{message}ation 3; .* at most 2 groups"):
        draw_distinct(few, "few.txt", 3)
    assert {prompt.text for prompt in draw_distinct(few, "few.txt", 2).draw(0, 0, 2)} == {"a", "b"}
    with pytest.raises(
        ValueError, match="prompts.source 'my_prompts:trl' is a function .* may answer twice alike; let"
    ):
        draw_distinct(load("my_prompts:trl"), "my_prompts:trl", 2)
    # a function that returned a list is a list
    assert len(draw_distinct(load("my_prompts:words"), "my_prompts:words", 2).draw(0, 0, 2)) == 2


def test_weights_of_any_size_are_relative():
    prompts = PromptList("list", tuple(map(Prompt, "abc")), (1e308, 1e308, 1e-320))
    assert {prompt.text for prompt in prompts.draw(0, 0, 100)} == {"a", "b"}


def test_a_panel_has_the_first_prompts_that_can_be_drawn():
    prompts = PromptList("list", tuple(map(Prompt, "abcd")), (1.0, 0.0, 1.0, 1.0))
    assert [prompt.text for prompt in prompts.fixed(9, 2)] == ["a", "c"]
    assert [prompt.text for prompt in prompts.fixed(9, 8)] == ["a", "c", "d"]


# --- what goes together -----------------------------------------------------------------------------------------------


def test_prompts_and_models_that_do_not_go_together_are_refused():
    none = {"prompts.source": None, "evaluation.prompts": None}
    check_prompts(False, "fashion", none)
    some = {**none, "prompts.source": "animals"}
    check_prompts(True, "peeps", some)
    check_prompts(True, "peeps", some, negative="red")
    with pytest.raises(ValueError, match="prompts.negative is 'red', but model.name flux has no negative prompts"):
        check_prompts(True, "flux", some, negative="red", negatable=False)
    with pytest.raises(ValueError, match="prompts.source is null, but model.name peeps .*animals"):
        check_prompts(True, "peeps", {**none, "evaluation.prompts": "animals"})
    for option in none:
        with pytest.raises(ValueError, match=f"{option} is 'animals', but model.name fashion takes no prompts"):
            check_prompts(False, "fashion", {**none, option: "animals"})
