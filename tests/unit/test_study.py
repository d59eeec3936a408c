"""The study's arithmetic on hand-made runs; its training goes through the same command as every run."""

import importlib.util
import json
from pathlib import Path

import pytest

from hrf_fast.config.load import load_config, to_yaml

PATH = Path(__file__).parents[2] / "benchmarks" / "study.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    record = {"iteration": panels[-1][0] - 1, "evaluations": panels[-1][1]}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_one_seed_by_hand(study, tmp_path):
    hrf = write_run(tmp_path / "hrf", "clusters", [(0, 0, [1.0, 3.0], 10.0), (4, 100, [2.0, 4.0], 9.0)])
    # DDPO passes HRF's final reward 3.0 half way between panels of 2.5 and 3.5
    panels = [(0, 0, [1.0, 3.0], 10.0), (1, 50, [2.0, 3.0], 8.0), (2, 150, [3.0, 4.0], 4.0)]
    result = study.compare(hrf, write_run(tmp_path / "ddpo", "full", panels))
    assert result["hrf_gain"] == pytest.approx([1.0, 1.0, 1.0])
    assert result["hrf_vendi_share"] == pytest.approx(0.9)
    assert result["ddpo_vendi_share_at_hrf_reward"] == pytest.approx(0.6)
    assert result["ddpo_evaluations_at_hrf_reward"] == pytest.approx(100)
    assert result["ddpo_vendi_share"] == pytest.approx(0.4)


def test_a_level_that_ddpo_never_reached_is_said_so(study, tmp_path):
    hrf = write_run(tmp_path / "hrf", "clusters", [(0, 0, [1.0, 3.0], 10.0), (4, 100, [5.0, 6.0], 9.0)])
    ddpo = write_run(tmp_path / "ddpo", "full", [(0, 0, [1.0, 3.0], 10.0), (4, 100, [2.0, 3.0], 9.0)])
    page = study.markdown("t", {0: study.compare(hrf, ddpo)})
    assert "never reached it" in page and "+3.5000" in page and "90.0%" in page


def test_a_run_that_fails_names_method_seed_and_reason(study, tmp_path):
    with pytest.raises(RuntimeError, match="hrf with seed 3 failed: error: --config"):
        study.train(tmp_path / "none.yaml", "hrf", 3, tmp_path / "x", 1, [])
