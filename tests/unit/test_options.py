"""What each option says of itself: range, choices, help, the generated page, and the names of earlier versions."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from hrf_fast.config.describe import describe_options, options_page
from hrf_fast.config.facts import Facts
from hrf_fast.config.load import load_config
from hrf_fast.config.options import FACTS, SECTIONS, Config
from hrf_fast.config.renamed import GONE, RENAMED

ROOT = Path(__file__).parents[2]
TYPES = {f"{s}.{name}": kind for s, part in SECTIONS.items() for name, kind in typing.get_type_hints(part).items()}


def default(option):
    section, name = option.split(".")
    return getattr(getattr(Config(), section), name)


def outside(facts, kind):
    """Values just beyond each bound."""
    step = 1 if kind is int else 1e-3
    return [
        *([] if facts.at_least is None else [facts.at_least - step]),
        *([] if facts.above is None else [facts.above]),
        *([] if facts.at_most is None else [facts.at_most + step]),
        *([] if facts.below is None else [facts.below]),
    ]


@pytest.mark.parametrize("option", [option for option, kind in TYPES.items() if kind in (int, float)])
def test_every_number_has_bounds_and_a_value_beyond_one_is_refused_by_name(option):
    facts, kind = FACTS[option], TYPES[option]
    assert facts.rule and not facts.choices
    for value in [*outside(facts, kind), *([float("nan"), float("inf")] if kind is float else [])]:
        with pytest.raises(ValueError, match=rf"^{option} is {re.escape(str(kind(value)))}; "):
            load_config([f"{option}={value}"])


@pytest.mark.parametrize("option", [option for option, facts in FACTS.items() if facts.choices])
def test_a_value_that_is_no_choice_answers_with_the_choices(option):
    for choice in FACTS[option].choices:
        FACTS[option].check(option, [choice] if TYPES[option] == list[str] else choice)
    word = f"{option}=[other]" if TYPES[option] == list[str] else f"{option}=other"
    with pytest.raises(ValueError, match=rf"^{option} .*'other'.*{', '.join(FACTS[option].choices)}"):
        load_config([word])


def test_a_bound_is_a_rule_of_its_own():
    facts = Facts(at_least=0, below=1)
    for value in (0, 0.0, 0.999):
        facts.check("a.b", value)
    for value in (-1e-9, 1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a.b is"):
            facts.check("a.b", value)
    # without bounds a float is still finite
    with pytest.raises(ValueError, match="a.b is inf"):
        Facts().check("a.b", float("inf"))


def test_a_list_or_mapping_of_one_config_is_not_shared_with_the_next():
    Config().run.writers.append("wandb")
    Config().optimizer.kwargs["eps"] = 1.0
    assert Config().run.writers == [] and Config().optimizer.eps == 1e-8


def test_kwargs_of_the_optimizer_reach_it_and_have_defaults():
    config = load_config(["optimizer.kwargs={betas: [0.5, 0.25]}"])
    assert (config.optimizer.betas, config.optimizer.eps) == ((0.5, 0.25), 1e-8)
    config = load_config(["optimizer.kwargs.eps=1e-6"])
    assert (config.optimizer.betas, config.optimizer.eps) == ((0.9, 0.999), 1e-6)


@pytest.mark.parametrize("old", [*RENAMED, *GONE])
def test_an_old_name_answers_with_the_new_one(old, tmp_path):
    section, name = old.split(".")
    answer = RENAMED.get(old) or GONE[old]
    path = tmp_path / "old.yaml"
    path.write_text(f"{section}: {{{name}: 1}}\n")
    for words, source in (([f"{old}=1"], f"{old}=1"), (["--config", str(path)], "old.yaml")):
        with pytest.raises(ValueError, match=f"{source}.*{re.escape(old)} is .*{re.escape(answer)}"):
            load_config(words)


def test_old_names_are_gone_and_new_ones_exist():
    assert not set(FACTS) & {*RENAMED, *GONE}
    sections = "|".join(SECTIONS)
    mentioned = {name for text in GONE.values() for name in re.findall(rf"\b(?:{sections})\.\w+", text)}
    for new in {*RENAMED.values(), *mentioned}:
        option = ".".join(new.split(".")[:2])
        assert option in FACTS
        # one level deeper is a key of a mapping
        assert new == option or isinstance(default(option), dict)


def test_a_file_of_an_earlier_version_names_all_its_old_options_at_once(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: {iterations: 3, learning_rate: 1e-4, tf32: false}\nsample: {batch_size: 8}\n")
    with pytest.raises(ValueError) as caught:
        load_config(["--config", str(path)])
    for text in ("optimizer.learning_rate", "train.tf32", "compute.deterministic", "compute.images_per_call"):
        assert text in str(caught.value)
    assert "iterations" not in str(caught.value)


def test_every_option_has_its_line_of_help_and_its_docstring():
    text = describe_options()
    for option, facts in FACTS.items():
        line, doc = re.search(rf"^  {re.escape(option)}=(.*)\n      (\S.*)$", text, re.MULTILINE).groups()
        assert facts.rule in line and doc
        assert ("may change on resume" in line) == facts.resumable
    assert "  train.iterations=70  (int, at least 1" in text
    assert "  model.revision=null  (str or null" in text


def test_the_page_of_options_is_fresh():
    page = (ROOT / "docs" / "options.md").read_text()
    assert page == options_page(), "python -m hrf_fast.config.describe > docs/options.md"
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) == len(FACTS)
    # bars in a docstring would end a cell
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {8}


def test_every_field_of_a_section_carries_its_facts():
    for section, part in SECTIONS.items():
        assert {f"{section}.{entry.name}" for entry in dataclasses.fields(part)} <= set(FACTS)
