"""The benchmark of HRF-D's searches: its judgement by hand, a smoke run and its refusals."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_search
from benchmarks.bench_search import parse
from benchmarks.search_bench.regret import Measurements, judge
from hrf_fast.cli import main as hrf

pytestmark = pytest.mark.long


def measured(exact, x0, **options):
    """Measurements of [anchors][groups] rewards at the candidates 0, 2, 4, 6 of 8 steps; all distances are equal."""
    settings = {"steps": 8, "stride": 2, "beta": 0.5, "groups": 1, "warmup": 0, "repeats": 1, "seed": 0}
    arguments = SimpleNamespace(**{**settings, "noises": len(exact[0]), **options})
    measurements = Measurements(arguments, [0, 2, 4, 6])
    for name, tables in (("exact", exact), ("x0", x0)):
        measurements.tables[name] = [torch.stack([torch.tensor(t), torch.full((len(t), 4), 0.5)], 1) for t in tables]
    return measurements


def test_regret_and_agreement_by_hand():
    # rewards whose changes are (0, 1, 2), (2, 0, 1): criteria (0, .5, 1) choose 4, (1, 0, .5) choose 0
    late, early = [0.0, 0.0, 1.0, 3.0], [0.0, 2.0, 2.0, 3.0]
    # anchor 0: both groups like 4; anchor 1: one likes 4, the other 0. x0 is right about anchor 0 and says 4 of 1
    rows = judge(measured([[late, late], [late, early]], [[late, late], [late, late]]), {"exact": [0.5], "x0": [0.1]})
    by_name = {row["name"]: row for row in rows}
    # anchor 1: 4 by `early` scores .5 and 0 by `late` 0: regrets .5 and 1; both choices differ from the other group's
    assert by_name["exact"]["regret_of_anchors"] == pytest.approx([0, 0.75])
    assert by_name["exact"]["same_start"] == 0.5 and by_name["exact"]["evaluations_per_sample"] == 8 + 6 + 4 + 2
    assert by_name["exact"]["starts"] == {0: 1, 4: 3} and by_name["exact"]["seconds_per_sample"] == 0.5
    # 4 for anchor 1 twice: 0.5 by `early`, 0 by `late`; equal to the exact choice of the other group once
    assert by_name["x0"]["regret_of_anchors"] == pytest.approx([0, 0.25])
    assert by_name["x0"]["same_start"] == 0.75 and by_name["x0"]["evaluations_per_sample"] == 4
    assert by_name["x0"]["over_exact"][0] == pytest.approx((0 - 0.5) / 2)
    # of any start the mean of (1, .5, 0) lost
    assert by_name["uniform"]["regret_of_anchors"] == pytest.approx([0.5, 0.5])
    # for anchor 1 what anchor 0 likes, 4; for anchor 0 what both groups of anchor 1 together like: changes (1, .5, 1.5)
    assert by_name["one start"]["regret_of_anchors"] == pytest.approx([0, 0.25])


def test_a_bandit_is_warmed_up_on_other_anchors_only():
    # anchors 1 and 2 like 4, anchor 0 likes 0: warmed up, with few pulls of its own, it says 4 of anchor 0
    late, early = [0.0, 0.0, 1.0, 3.0], [0.0, 2.0, 2.0, 3.0]
    tables = [[early, early], [late, late], [late, late]]
    rows = judge(measured(tables, tables, warmup=20, groups=2, repeats=3), {})
    bandit = next(row for row in rows if row["name"] == "bandit, x0")
    assert bandit["regret_of_anchors"][0] == pytest.approx(0.5) and bandit["evaluations_per_sample"] == 2


def test_quick_search_benchmark_runs_through(tmp_path, capsys):
    assert hrf(["bench", "search", "--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "search.json").read_text())
    assert result["settings"]["quick"] and result["anchors"] == 2 and result["reward"] == "jpeg_compressibility"
    names = [row["name"] for row in result["rows"]]
    assert names == ["exact", "x0", "bandit, exact", "bandit, x0", "uniform", "one start"]
    # candidates 0, 2, 4, 6 of 8 steps
    assert [row["evaluations_per_sample"] for row in result["rows"][:2]] == [20, 4]
    assert all(row["seconds_per_sample"] > 0 for row in result["rows"][:4])
    # two anchors, three groups of noise, reward and distance of four candidates
    assert torch.tensor(result["measured"]["exact"]).shape == (2, 3, 2, 4)
    page = (tmp_path / "search.md").read_text()
    assert page in capsys.readouterr().out and "figures mean nothing" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--anchors", "1"], "--anchors is 1"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--reference-group", "7"], "--reference-group is 7"),
        (["--reference-group", "0"], "--reference-group is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--stride", "39"], r"window\.kwargs\.stride is 39"),
        (["--beta", "nan"], r"window\.kwargs\.beta is nan"),
    ],
)
def test_arguments_that_cannot_work_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        parse(words)


def test_a_model_or_option_that_does_not_exist_is_named(tmp_path, capsys):
    assert hrf(["bench", "search", "--model", "fashon", "--out", str(tmp_path)]) == 1
    assert "'fashon'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="reward.nam"):
        bench_search.main(["--quick", "--out", str(tmp_path), "reward.nam=x"])
