"""The study's arithmetic on hand-made runs, its refusals, and one of the smallest runs by its command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import study
from hrf_fast.config.load import load_config, to_yaml
from tests.runs import REPORTED

ROOT = Path(__file__).parents[2]


def write_run(folder, schedule, panels):
    """panels: (iteration, evaluations, rewards per image, vendi)."""
    folder.mkdir()
    words = [f"window.schedule={schedule}", "evaluation.panel_size=2"]
    (folder / "config.yaml").write_text(to_yaml(load_config(words)))
    lines = []
    for iteration, evaluations, rewards, vendi in panels:
        mean = sum(rewards) / len(rewards)
        record = {"iteration": iteration, "evaluations": evaluations, "rewards": rewards}
        lines.append(record | {"reward": [mean, mean - 1, mean + 1], "vendi": [vendi, vendi - 1, vendi + 1]})
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {**REPORTED, "iteration": panels[-1][0] - 1, "evaluations": panels[-1][1]}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_one_seed_by_hand(tmp_path):
    hrf = write_run(tmp_path / "hrf", "clusters", [(0, 0, [1.0, 3.0], 10.0), (4, 100, [2.0, 4.0], 9.0)])
    # DDPO passes HRF's final reward 3.0 half way between panels of 2.5 and 3.5
    panels = [(0, 0, [1.0, 3.0], 10.0), (1, 50, [2.0, 3.0], 8.0), (2, 150, [3.0, 4.0], 4.0)]
    result = study.compare(hrf, write_run(tmp_path / "ddpo", "full", panels))
    assert result["hrf_gain"] == pytest.approx([1.0, 1.0, 1.0])
    assert result["hrf_vendi_share"] == pytest.approx(0.9)
    assert result["ddpo_vendi_share_at_hrf_reward"] == pytest.approx(0.6)
    assert result["ddpo_evaluations_at_hrf_reward"] == pytest.approx(100)
    assert result["ddpo_vendi_share"] == pytest.approx(0.4)


def test_a_level_that_ddpo_never_reached_is_said_so(tmp_path):
    hrf = write_run(tmp_path / "hrf", "clusters", [(0, 0, [1.0, 3.0], 10.0), (4, 100, [5.0, 6.0], 9.0)])
    ddpo = write_run(tmp_path / "ddpo", "full", [(0, 0, [1.0, 3.0], 10.0), (4, 100, [2.0, 3.0], 9.0)])
    page = study.markdown("t", {0: study.compare(hrf, ddpo)})
    assert "never reached it" in page and "+3.5000" in page and "90.0%" in page


def test_a_run_that_fails_names_method_and_seed(tmp_path):
    with pytest.raises(ValueError, match=r"hrf with seed 3 failed: .*none\.yaml"):
        study.train(tmp_path / "none.yaml", "hrf", 3, tmp_path / "x", 1, [])


def test_a_configuration_without_features_is_refused_before_anything_is_trained(tmp_path, tiny_run):
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(load_config([*tiny_run, "evaluation.network=none"])))
    with pytest.raises(ValueError, match=r"evaluation\.network is 'none'"):
        study.main([str(config), "--out", str(tmp_path / "study")])
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_the_smallest_study_by_its_command(tmp_path):
    config = ROOT / "configs" / "demo_fashion.yaml"
    words = ["train.iterations=1", "evaluation.panel_size=8", "evaluation.every=0"]
    words += ["train.groups_per_iteration=1", "train.groups_per_step=1", "train.group_size=2"]
    command = [sys.executable, ROOT / "benchmarks/study.py", config, "--seeds", "0", "--out", tmp_path, *words]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "study.json").read_text()).values()
    assert row["hrf_evaluations"] > 0 and row["ddpo_evaluations"] > 0 and row["pretrained_vendi"] > 1
    assert "| 0 |" in (tmp_path / "study.md").read_text() and "| mean |" in result.stdout
