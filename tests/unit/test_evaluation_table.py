"""The table of `hrf evaluate`: its rows, its changes by hand arithmetic, and where it sends a reader."""

import re
from pathlib import Path

from hrf_fast.report.evaluation import EXPLAINED, evaluation_lines

ROOT = Path(__file__).parents[2]


def model(rewards, vendi, **more):
    mean = sum(rewards) / len(rewards)
    panel = {"reward": [mean, mean - 1, mean + 1], "vendi": [vendi, vendi - 1, vendi + 1], "rewards": rewards}
    return {**panel, "peer": {"jpeg_bpp": [2.0, 1.5, 2.5], "duplicates": [0.0]}, **more}


def record(**tuned):
    before = model(
        [0.0, 1.0],
        20.0,
        detail={"vendi_q2": [8.0, 7.0, 9.0], "precision": [0.75, 0.5, 1.0], "fid": [3.0], "duplicates": [0.0]},
        attributes={
            "hat": {"none": 0.5, "cap": 0.5},
            "skin": {"light": 0.5, "dark": 0.5},
            "wall": {"red": 0.25, "blue": 0.75},
        },
    )
    after = model(
        [2.0, 3.0],
        15.0,
        detail={"vendi_q2": [2.0, 1.5, 2.5], "precision": [0.5, 0.25, 0.75], "fid": [5.0], "duplicates": [0.0]},
        attributes={
            "hat": {"none": 0.0, "cap": 1.0},
            "skin": {"light": 0.5, "dark": 0.5},
            "wall": {"red": 0.5, "blue": 0.5},
        },
    )
    return {"evaluation": {"seed": 0}, "pretrained": before, "tuned": after | tuned}


def rows(lines):
    """Cells of the table by metric, without the header and the line below."""
    cells = [re.split(r"  +", line) for line in lines[1:-1]]
    return {name: values for name, *values in cells}


def test_the_table_has_the_most_useful_rows_and_their_changes():
    lines = evaluation_lines(record(kept={"vendi": [0.75, 0.5, 1.0]}))
    assert re.split(r"  +", lines[0]) == ["metric", "pretrained", "tuned", "difference or share kept"]
    assert rows(lines) == {
        # both images gain 2
        "reward": ["0.5000 [-0.5000, 1.500]", "2.500 [1.500, 3.500]", "+2.000 [+2.000, +2.000]"],
        "Vendi Score": ["20.00 [19.00, 21.00]", "15.00 [14.00, 16.00]", "75.0 % [50.0 %, 100.0 %]"],
        "precision": ["0.7500 [0.5000, 1.000]", "0.5000 [0.2500, 0.7500]", "-0.2500"],
        # of an attribute the value that changed most
        "hat: none": ["50.0 %", "0.0 %", "-50.0 %"],
        "wall: red": ["25.0 %", "50.0 %", "+25.0 %"],
    }
    # skin, the looks of three attributes, vendi_q2, fid, duplicates and jpeg_bpp
    assert lines[-1].endswith(f"What the metrics mean: {EXPLAINED}; 8 more metrics: --all")


def test_of_an_attribute_that_did_not_change_the_commonest_value_is_shown():
    figures = record()
    for title in ("pretrained", "tuned"):
        figures[title]["attributes"] = {"hair": {"none": 0.0, "long": 0.25, "short": 0.75}}
    assert rows(evaluation_lines(figures))["hair: short"] == ["75.0 %", "75.0 %", "+0.0 %"]


def test_the_terms_of_a_sum_are_below_its_reward():
    figures = record(terms={"jpeg": -1.5, "sneaker": 2.0})
    figures["pretrained"]["terms"] = {"jpeg": -2.0, "sneaker": 0.5}
    table = rows(evaluation_lines(figures))
    assert list(table)[:4] == ["reward", "reward/jpeg", "reward/sneaker", "Vendi Score"]
    assert table["reward/jpeg"] == ["-2.000", "-1.500", "+0.5000"]


def test_all_metrics_are_there_on_request_and_each_once():
    lines = evaluation_lines(record(), everything=True)
    table = rows(lines)
    assert len(table) == len(lines) - 2 == 13 and lines[-1].endswith(EXPLAINED)
    # two values in use, and one; of 1/4 and 3/4 the entropy is (ln 4)/4 + 3 (ln 4/3)/4 = 0.5623
    assert table["looks of hat"] == ["2.000", "1.000", "50.0 %"]
    assert table["looks of wall"] == ["1.755", "2.000", "114.0 %"]
    # without halves a share has no interval; another order of the score is compared by its share too
    assert table["Vendi Score"][-1] == "75.0 %" and table["vendi_q2"][-1] == "25.0 %"
    assert table["fid"] == ["3.000", "5.000", "+2.000"] and "skin: light" in table


def test_duplicates_keep_the_interval_that_the_detail_has():
    figures = record()
    figures["tuned"]["detail"]["duplicates"] = [0.25, 0.125, 0.5]
    figures["tuned"]["peer"]["duplicates"] = [0.25]
    table = rows(evaluation_lines(figures, everything=True))
    assert table["duplicates"] == ["0.000", "0.2500 [0.1250, 0.5000]", "+0.2500"]


def test_without_a_network_the_table_has_the_reward_alone():
    bare = {"reward": [1.0, 0.5, 1.5], "rewards": [0.5, 1.5], "peer": {"jpeg_bpp": [2.0, 1.5, 2.5]}}
    lines = evaluation_lines({"evaluation": {"seed": 0}, "pretrained": bare, "tuned": bare})
    assert list(rows(lines)) == ["reward"] and lines[-1].endswith("; 1 more metrics: --all")


def test_the_page_that_explains_the_metrics_has_that_heading():
    page, anchor = EXPLAINED.split("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
