"""Blends over seeds: means by hand arithmetic, the second panel, and what is refused."""

import json

import pytest

from benchmarks.bench_blend import main
from hrf_fast.commands.blend import _claim_blend
from hrf_fast.config.load import load_config

# gain and share by alpha of two seeds of each method
FRONTS = {
    "ddpo-1": {0: (0, 1), 1: (0.2, 0.8), 2: (0.3, 0.4)},
    "ddpo-2": {0: (0, 1), 1: (0.4, 0.6), 2: (0.5, 0.4)},
    "hrf-1": {0: (0, 1), 1: (0.2, 1.0), 2: (0.4, 0.9)},
    "hrf-2": {0: (0, 1), 1: (0.2, 0.9), 2: (0.4, 0.8)},
}


def panel(alpha, gain, share, seed):
    rewards = [1 + gain] * 4
    vendi = [10 * share] * 3
    return {"alpha": alpha, "seed": seed, "reward": [1 + gain] * 3, "vendi": vendi, "rewards": rewards}


@pytest.fixture
def runs(tmp_path):
    for name, front in FRONTS.items():
        folder = tmp_path / name / "blend"
        folder.mkdir(parents=True)
        lines = [panel(alpha, *front[alpha], seed=7) for alpha in (0, 1, 2)]
        (folder / "front.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "settings.json").write_text(json.dumps({"reward": {"name": "r"}, "weights": {"unet": name}}))
        # the second panel: a tenth less of each gain
        points = [
            {"alpha": alpha, "gain": [front[alpha][0] - 0.1] * 3, "share": front[alpha][1], "inception_share": 0.5}
            for alpha in (0, 1, 2)
        ]
        result = {"alpha": 2, "most": 2, "keep": 0.4, "quality": 0, "panels": points}
        (folder / "blend.json").write_text(json.dumps(result))
    return [tmp_path / name for name in FRONTS]


def rows_of(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_means_over_seeds_by_hand(runs, tmp_path, capsys):
    main([*map(str, runs), "--keep", "0.9", "--out", str(tmp_path / "out")])
    rows = rows_of(capsys.readouterr().out)
    # DDPO's gains .2 and .4; the half-width is t(1) = 12.71 times .1
    assert ["ddpo", "1", "+0.300 [-0.971, +1.571]", "70.0 [-57.1, 197.1] %", ""] in rows
    hrf = [row for row in rows if row[0] == "hrf" and "chosen, alpha 2" in row]
    assert hrf[0][2:] == ["2", "+0.300 [+0.300, +0.300]", "85.0 [21.5, 148.5] %", "50.0 [50.0, 50.0] %"]
    # with 90 % kept, linear between alphas: DDPO gains .1 and .1, HRF .4 and .2
    kept = next(row for row in rows if row[:2] == ["gain with 90 % kept", "hrf"])
    assert kept[3:5] == ["+0.3", "+0.1"]
    assert (tmp_path / "out" / "blend.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "blend.json").read_text())["hrf"]["2"]["result"]["alpha"] == 2


def test_a_learning_rate_behind_the_seed_is_no_seed_and_how_often_panels_were_made_no_setting(runs, tmp_path, capsys):
    for every, run in enumerate(runs):
        (run / "blend" / "settings.json").unlink()
        _claim_blend(run / "blend", run, load_config([f"evaluation.every={every}"]), {})
    main([*map(str, runs), "--out", str(tmp_path / "out")])
    expected = capsys.readouterr().out
    for rate, run in zip(("2.5e-05", "1e-05", "0.000225", "2.5e-05"), runs, strict=True):
        run.rename(run.with_name(f"{run.name}-{rate}"))
    main([*(str(run) for run in sorted(tmp_path.glob("*-*-*"))), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == expected


def test_lines_are_compared_at_the_alphas_of_all_runs(runs, tmp_path, capsys):
    words = [*map(str, runs), "--keep", "0.9", "--out", str(tmp_path / "out")]
    main(words)
    expected, picture = capsys.readouterr().out, (tmp_path / "out" / "blend.png").read_bytes()
    # HRF's seeds have a step of .5, at which the gain with 90 % kept would be another
    for run in runs[2:]:
        with (run / "blend" / "front.jsonl").open("a") as file:
            file.write(json.dumps(panel(0.5, 0.9, 0.95, seed=7)) + "\n")
    main(words)
    assert capsys.readouterr().out == expected and (tmp_path / "out" / "blend.png").read_bytes() == picture


@pytest.mark.parametrize(("option", "value", "first"), [("keep", 0.9, 0.4), ("quality", 0.5, 0), ("most", 1.5, 2)])
def test_blends_of_other_floors_or_lengths_are_refused(runs, option, value, first):
    path = runs[2] / "blend" / "blend.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    message = f"hrf-1 was blended with --{option} {value} and .*ddpo-1 with --{option} {first}; blend again with equal"
    with pytest.raises(ValueError, match=f"{message} --keep, --quality and --most"):
        main([*map(str, runs)])


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    (runs[1] / "blend" / "settings.json").write_text(json.dumps({"reward": {"name": "other"}}))
    with pytest.raises(ValueError, match="ddpo-2 is a blend of another reward than .*ddpo-1"):
        main([*map(str, runs)])
    (runs[1] / "blend" / "blend.json").unlink()
    with pytest.raises(ValueError, match="ddpo-2 has no whole blend"):
        main([*map(str, runs)])
    with pytest.raises(ValueError, match="no number at its end"):
        main([str(tmp_path / "runs")])
    with pytest.raises(ValueError, match="--keep is 0"):
        main([*map(str, runs), "--keep", "0"])
