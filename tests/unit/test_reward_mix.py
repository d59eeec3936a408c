"""Terms of a reward that are standardised one by one: by hand, beside the sum, in runs, and what is refused."""

import math

import pytest
import torch

from hrf_fast.cli import main
from hrf_fast.config.load import load_config
from hrf_fast.rewards import RewardTerm, build_reward
from hrf_fast.training.advantages import build_advantages
from hrf_fast.training.credit import spread_notes, standardise
from hrf_fast.training.rewarding import GroupRewards, reward_groups
from tests.runs import assert_equal_training, metrics, train, with_folder

CPU = torch.device("cpu")
PICKSCORE, HPS = [20.0, 21.0, 22.0], [0.28, 0.30, 0.26]


def group_of(**terms):
    """A group with these rewards by term; what their sum is does not matter."""
    by_term = {name: torch.tensor(values) for name, values in terms.items()}
    return GroupRewards(torch.stack([*by_term.values()]).sum(0), {}, by_term=by_term)


def mixed(groups, weights, name="group", **options):
    """Advantages by group."""
    estimator = build_advantages(name, **{"advantage_floor": 1e-6, **options})
    return standardise(dict(enumerate(groups)), estimator, CPU, term_weights=weights)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_terms_of_different_units_count_alike():
    # mean 21, std 1: −1, 0, 1; mean 0.28, std 0.02: 0, 1, −1
    group = group_of(pickscore=PICKSCORE, hps=HPS)
    (found,) = mixed([group], {"pickscore": 1.0, "hps": 1.0}).values()
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0]), atol=1e-5, rtol=0)
    # of the sums 20.28, 21.3 and 22.26 the third is the best by far
    (summed,) = standardise({0: group}, build_advantages("group", advantage_floor=1e-6), CPU).values()
    assert summed.argmax() == 2 and summed[1].abs() < 0.1


def test_weights_are_of_advantages_and_terms_without_one_are_only_logged():
    group = group_of(pickscore=PICKSCORE, hps=HPS, logged=[5.0, 1.0, 9.0])
    (found,) = mixed([group], {"pickscore": 0.5, "hps": -2.0}).values()
    torch.testing.assert_close(found, torch.tensor([-0.5, -2.0, 2.5]), atol=1e-4, rtol=0)


def test_a_batch_standardises_each_term_over_all_groups():
    groups = [group_of(a=[1.0, 3.0], b=[0.0, 0.0]), group_of(a=[10.0, 30.0], b=[400.0, 400.0])]
    found = mixed(groups, {"a": 1.0, "b": 1.0}, "batch")
    # a: mean 11, squared deviations 100 + 64 + 1 + 361 = 526 over 3; b: mean 200, 4·200² over 3
    first, second = math.sqrt(526 / 3), math.sqrt(4 * 200**2 / 3)
    torch.testing.assert_close(found[0], torch.tensor([-10 / first - 200 / second, -8 / first - 200 / second]))
    torch.testing.assert_close(found[1], torch.tensor([-1 / first + 200 / second, 19 / first + 200 / second]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["group", "batch"])
def test_one_term_of_weight_one_has_the_bits_of_the_sum(name, dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(5, generator=generator, dtype=dtype) * 7 + 20 for _ in range(3)]
    rewards = {number: GroupRewards(each, {}, by_term={"a": each}) for number, each in enumerate(values)}
    options = {"advantage_floor": 1e-6, "advantage_baseline": "leave_one_out", "reward_band": 1.0}
    summed, one_by_one = (
        standardise(rewards, build_advantages(name, **options), CPU, term_weights=weights)
        for weights in (None, {"a": 1.0})
    )
    assert all(torch.equal(summed[number], one_by_one[number]) for number in rewards)


def test_a_term_that_is_equal_in_a_group_adds_zeros_there():
    groups = [group_of(a=PICKSCORE, b=[0.1, 0.1, 0.1]), group_of(a=PICKSCORE, b=HPS)]
    flat, other = mixed(groups, {"a": 1.0, "b": 1.0}).values()
    torch.testing.assert_close(flat, torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(other, torch.tensor([-1.0, 1.0, 0.0]), atol=1e-5, rtol=0)


def test_the_floor_and_the_band_are_of_each_term():
    group = group_of(a=[1.0, 2.0, 6.0], b=[-0.1, 0.0, 0.1])
    # a has std √7 above the floor of 1, b has 0.1 below it
    (found,) = mixed([group], {"a": 1.0, "b": 1.0}, advantage_floor=1.0).values()
    torch.testing.assert_close(found, torch.tensor([-2.0, -1.0, 3.0]) / math.sqrt(7) + torch.tensor([-0.1, 0.0, 0.1]))
    # a band of half a std, of one term as in a sum of that term
    (found,) = mixed([group], {"a": 1.0}, reward_band=0.5).values()
    (alone,) = standardise(
        {0: GroupRewards(torch.tensor([1.0, 2.0, 6.0]), {})},
        build_advantages("group", advantage_floor=1e-6, reward_band=0.5),
        CPU,
    ).values()
    assert torch.equal(found, alone)


def test_novelty_multiplies_the_advantages_that_are_positive_once_they_are_summed():
    group = group_of(a=[-1.0, 0.0, 1.0], b=[0.0, 1.0, -1.0])
    novel = GroupRewards(group.rewards, {}, by_term=group.by_term, novelty=torch.tensor([3.0, 2.0, 1.0]))
    (found,) = mixed([novel], {"a": 1.0, "b": 1.0}).values()
    # −1, 1, 0
    assert found.tolist() == [-1, 2, 0]


def test_groups_of_equal_sums_whose_terms_differ_are_not_flat():
    # a + 2b is 2 for both; a: ∓1/√2, b: ±1/√2 twice
    group = group_of(a=[0.0, 2.0], b=[1.0, 0.0])
    (found,) = mixed([group], {"a": 1.0, "b": 2.0}).values()
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0]) / math.sqrt(2))


def test_a_skipped_group_has_no_terms_and_is_nobodys_peer():
    groups = [group_of(a=[1.0, 3.0]), GroupRewards(None, {}, "NaN at 0"), group_of(a=[10.0, 30.0])]
    assert list(mixed(groups, {"a": 1.0})) == [0, 2]
    alone = [group_of(a=[1.0]), GroupRewards(None, {}, "NaN at 0")]
    assert mixed(alone, {"a": 1.0}, "batch") == {}


def test_notes_name_the_term_whose_spread_is_small():
    rewards = {0: group_of(a=[1.0, 2.0, 3.0], b=[1e-4, 2e-4, 3e-4], c=[1e9, 1e9 + 64, 1e9])}
    estimator = build_advantages("group", advantage_floor=0.1)
    notes = spread_notes(rewards, estimator, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert list(notes) == ["b: floor, all", "c: rounding"]
    assert notes["b: floor, all"].startswith("reward 'b': the rewards spread by 0.0001, which is under")
    assert list(spread_notes(rewards, estimator)) == ["rounding"]
    assert spread_notes({0: GroupRewards(None, {}, "NaN")}, estimator, {"a": 1.0}) == {}


# --- from rewards to groups -------------------------------------------------------------------------------------------


def test_each_group_has_its_part_of_every_term():
    # the mean of an image times 200
    coarse = "tests.distributed.cases:coarse"
    reward = build_reward([RewardTerm(coarse, 2.0), RewardTerm(coarse, 0.0)])
    images = {7: torch.tensor([0.25, 0.5]), 3: torch.tensor([0.5, 1.0])}
    rewards = reward_groups(reward, {group: v.view(-1, 1, 1, 1).expand(-1, 3, 4, 4) for group, v in images.items()})
    assert {group: result.rewards.tolist() for group, result in rewards.items()} == {7: [100, 200], 3: [200, 400]}
    by_term = {group: {name: v.tolist() for name, v in result.by_term.items()} for group, result in rewards.items()}
    assert by_term == {
        7: {coarse: [50, 100], f"{coarse}_2": [50, 100]},
        3: {coarse: [100, 200], f"{coarse}_2": [100, 200]},
    }
    # the mean over the batch of both
    assert rewards[3].terms == {coarse: 112.5, f"{coarse}_2": 112.5}
    assert reward.weights == {coarse: 2.0}


# --- runs -------------------------------------------------------------------------------------------------------------

TERMS = "{name: tests.distributed.cases:coarse}, {name: jpeg_compressibility, weight: -2}"
WORDS = ["reward.name=null", f"reward.terms=[{TERMS}]", "evaluation.every=0", "evaluation.panel_size=2"]


@pytest.mark.long
def test_a_run_mixes_advantages_logs_the_sum_and_resumes_bit_for_bit(tiny_run, tmp_path, capsys):
    words = [*tiny_run, *WORDS, "reward.mix=advantages"]
    train(with_folder(words, tmp_path / "all"))
    for iterations in (1, 2):
        train(with_folder(words, tmp_path / "halves", f"train.iterations={iterations}"))
    assert_equal_training(tmp_path / "all", tmp_path / "halves")
    train(with_folder([*tiny_run, *WORDS], tmp_path / "sum"))
    (one, _), (other, _) = metrics(tmp_path / "all"), metrics(tmp_path / "sum")
    # the first images are the same, and so are their rewards
    names = [name for name in one if name.startswith(("reward", "group_reward"))]
    assert {name: one[name] for name in names} == {name: other[name] for name in names} and len(names) == 7
    assert one["reward_mean"] == pytest.approx(
        one["reward/tests.distributed.cases:coarse"] - 2 * one["reward/jpeg_compressibility"], rel=1e-5
    )
    assert one["advantage_std"] != other["advantage_std"] and one["grad_norm"] != other["grad_norm"]
    # the run is over, and its panels are of the sum; a reward without terms leaves nothing to mix
    assert main(["evaluate", str(tmp_path / "all"), "reward.mix=sum"]) == 1
    assert "reward.mix would change nothing here, since nothing is trained" in capsys.readouterr().err
    plain = ["reward.name=jpeg_compressibility", "reward.terms=[]", "reward.mix=sum"]
    assert main(["evaluate", str(tmp_path / "all"), *plain]) == 0


MODULE = """
import torch

groups = 0

def rising(images, prompts=None):
    global groups
    groups += len(images) == 3
    return torch.arange(len(images)) * float(groups % 2)

def falling(images, prompts=None):
    return -torch.arange(len(images)) * float(groups % 2) / 2
"""


@pytest.mark.long
def test_only_groups_whose_terms_are_all_equal_are_left_out_of_the_update(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "flat_terms.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    # the sum is 0 for every image; of the first group the terms differ
    terms = "reward.terms=[{name: 'flat_terms:rising'}, {name: 'flat_terms:falling', weight: 2}]"
    words = [*tiny_run, *WORDS, terms, "reward.mix=advantages", "train.skip_flat_groups=true", "window.schedule=full"]
    train([*words, "train.iterations=1"])
    (record,) = metrics(tmp_path / "run")
    assert record["reward_std"] == 0 and record["advantage_max"] == pytest.approx(1)
    # of the group that is left out one call of its five is made, at factor 0
    assert record["backwards"] == 3 * 5 + 3


# --- what goes with what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward.name=jpeg_compressibility", "reward.terms=[]"], r"reward.terms is empty.*use reward.mix=sum"),
        (["train.gae_lambda=0"], r"train.gae_lambda is 0.* but reward.mix is advantages: .*; use null"),
        (
            ["train.advantages=prompt", "prompts.source=animals"],
            r"train.advantages is prompt but reward.mix is advantages: .*; use group or batch",
        ),
        (["train.advantages=mine:ours"], r"train.advantages is mine:ours but .*; use group or batch"),
        (["train.advantage_scale=none"], r"train.advantage_scale is none but .*; use std"),
        (["remedies.matching=1", "train.groups_per_step=4"], r"remedies.matching is 1.* but .*; use 0"),
        (["reward.mix=advantage"], r"reward.mix is 'advantage' .did you mean 'advantages'"),
    ],
)
def test_what_has_no_meaning_by_term_is_refused(words, message):
    mix = [*WORDS, "reward.mix=advantages"]
    load_config([*mix, "train.advantages=batch", "remedies.reward_band=2", "train.advantage_baseline=leave_one_out"])
    with pytest.raises(ValueError, match=message):
        load_config([*mix, *words])
