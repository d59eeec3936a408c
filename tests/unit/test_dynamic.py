"""HRF-D: the criterion by hand, and the three searches that feed it."""

import json
import math

import pytest
import torch

from hrf_fast.windows.bandit import Bandit
from hrf_fast.windows.base import Window
from hrf_fast.windows.criterion import select_start
from tests.unit.test_windows import draw, make, starts

# --- the criterion ----------------------------------------------------------------------------------------------------


def select(rewards, distances, beta=0.5, candidates=None):
    candidates = candidates or [2 * i for i in range(len(rewards))]
    return select_start(candidates, torch.tensor(rewards), torch.tensor(distances), beta=beta)


def test_the_chosen_start_by_hand():
    # Δ (1, 2, 0.5) → (1/3, 1, 0); d[1:] (0.1, 0.3, 0.2) → (0, 1, 0.5); the distance of the first, 9, has no part
    rewards, distances = [0.0, 1.0, 3.0, 3.5], [9.0, 0.1, 0.3, 0.2]
    # β 0.5: (0.333, 0.5, −0.25); β 1: (0.333, 0, −0.5); β 0: Δ̂ alone
    assert select(rewards, distances, beta=0.5) == 2
    assert select(rewards, distances, beta=1.0) == 0
    assert select(rewards, distances, beta=0.0) == 2


def test_a_falling_reward_is_not_a_large_change():
    # Δ (−3, 0.5) → (0, 1), not its absolute value; the distances are equal
    assert select([3.0, 0.0, 0.5], [0.1, 0.1, 0.1]) == 2


def test_a_constant_list_counts_as_zeros():
    # rewards rise by the same: −β·d̂ decides, d[1:] (0.5, 0.2, 0.4) is least for the second
    assert select([1.0, 2.0, 3.0, 4.0], [0.0, 0.5, 0.2, 0.4]) == 2
    # distances equal: Δ (1, 1, 3) decides
    assert select([1.0, 2.0, 3.0, 6.0], [0.3] * 4) == 4
    # both constant: all scores 0, the first
    assert select([1.0] * 4, [0.3] * 4) == 0


def test_two_candidates_leave_the_first():
    assert select([5.0, 1.0], [0.0, 0.9]) == 0


def test_the_last_candidate_is_never_chosen():
    # the largest change and the smallest distance both belong to the last difference, which is candidate 4's
    assert select([0.0, 0.0, 0.0, 10.0], [0.9, 0.9, 0.9, 0.0]) == 4


def test_candidates_need_no_regular_spacing():
    assert select([0.0, 1.0, 3.0, 3.5], [9.0, 0.1, 0.3, 0.2], candidates=[1, 5, 6, 30]) == 5


# --- exact and x0 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["exact", "x0"])
def test_every_second_step_of_all_groups_is_asked_at_once(search):
    # T 40: candidates 0, 2, …, 38; group 0's reward jumps between 6 and 8, group 1's between 20 and 22
    asked = []

    def probe(candidates, *, estimate):
        asked.append((candidates, estimate))
        jumps = (6, 20)
        rewards = [torch.tensor([float(c > jumps[g]) for c in starts]) for g, starts in enumerate(candidates)]
        return [(values, torch.full((len(values),), 0.1)) for values in rewards]

    windows = draw(make("dynamic", {"search": search}), iteration=3, num_groups=2, probe=probe)
    assert asked == [([list(range(0, 40, 2))] * 2, search)]
    assert windows == [Window(6, 39), Window(20, 39)]


def test_stride_and_beta_reach_the_search():
    # T 10, stride 3: candidates 0, 3, 6 (9 is deterministic); Δ (1, 2) → (0, 1), d̂ (0, 1);
    # scores at β 0.9 (0, 0.1), at β 2 (0, −1)
    def probe(candidates, *, estimate):
        assert candidates == [[0, 3, 6]]
        return [(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 0.1, 0.2]))]

    kwargs = {"stride": 3, "search": "exact"}
    assert starts(make("dynamic", {**kwargs, "beta": 0.9}, T=10), probe=probe) == [3]
    assert starts(make("dynamic", {**kwargs, "beta": 2.0}, T=10), probe=probe) == [0]


# --- bandit -----------------------------------------------------------------------------------------------------------


def make_bandit(T=8, **kwargs):
    """By default candidates 0, 2, 4, 6: arms 0, 1, 2."""
    return make("dynamic", {"search": "bandit", **kwargs}, T=T)


class Recorder:
    """A probe whose reward is the start squared and whose distance falls by 0.1 a step; it keeps what it was asked."""

    def __init__(self):
        self.asked, self.estimates = [], []

    def __call__(self, candidates, *, estimate):
        self.asked.append([list(starts) for starts in candidates])
        self.estimates.append(estimate)
        return [(torch.tensor([float(s * s) for s in c]), torch.tensor([1 - 0.1 * s for s in c])) for c in candidates]

    def arms(self, call=-1):
        return [starts[0] // 2 for starts in self.asked[call]]


def test_a_pull_is_the_difference_of_two_neighbours_on_one_anchor():
    bandit, probe = make_bandit(), Recorder()
    draw(bandit, num_groups=3, probe=probe)
    # every group asks for its arm and the next candidate; each of the three arms is pulled by one group
    assert sorted(probe.asked[0]) == [[0, 2], [2, 4], [4, 6]]
    # Δ = 4 − 0, 16 − 4, 36 − 16; the distances of candidates 2, 4, 6
    assert bandit.changes == [4.0, 12.0, 20.0] and bandit.counts == [1.0, 1.0, 1.0]
    assert bandit.distances == pytest.approx([0.8, 0.6, 0.4])


def test_all_groups_train_from_the_best_of_what_was_tried():
    # Δ̂ (0, 0.5, 1) − 0.5·d̂ (1, 0.5, 0): the last arm, candidate 4
    assert draw(make_bandit(), num_groups=3, probe=Recorder()) == [Window(4, 7)] * 3
    # one arm tried: that one
    probe = Recorder()
    (window,) = draw(make_bandit(), num_groups=1, probe=probe)
    assert window == Window(probe.asked[0][0][0], 7)


def test_what_is_old_counts_less():
    # counts and sums are halved before every iteration's pulls: arm a in iterations 0 and 3, b in 1, c in 2
    bandit, probe = make_bandit(discount=0.5, exploration=100.0), Recorder()
    for iteration in range(4):
        draw(bandit, iteration, probe=probe)
    a, b, c, again = (probe.arms(call)[0] for call in range(4))
    assert {a, b, c} == {0, 1, 2} and again == a
    assert bandit.counts[a] == 1 + 0.125 and bandit.counts[b] == 0.25 and bandit.counts[c] == 0.5
    change = [4.0, 12.0, 20.0]
    assert [bandit.changes[arm] for arm in (a, b, c)] == [1.125 * change[a], 0.25 * change[b], 0.5 * change[c]]


def test_a_discounted_mean_follows_a_reward_that_drifts():
    # one arm (T 4: candidates 0, 2) whose change is 1, then 5: (0.5·1 + 5) / 1.5
    bandit, value = make_bandit(T=4, discount=0.5), iter([1.0, 5.0])
    for iteration in range(2):
        change = next(value)
        draw(bandit, iteration, probe=lambda c, *, estimate, r=change: [(torch.tensor([0.0, r]), torch.zeros(2))])
    assert bandit.changes[0] / bandit.counts[0] == pytest.approx(5.5 / 1.5)


def test_arms_never_tried_come_first_in_an_order_of_the_generator():
    orders = set()
    for seed in range(12):
        bandit, probe = make_bandit(exploration=0.0), Recorder()
        for iteration in range(3):
            draw(bandit, iteration, seed=seed + 100 * iteration, probe=probe)
        order = tuple(probe.arms(call)[0] for call in range(3))
        assert sorted(order) == [0, 1, 2]
        orders.add(order)
    assert len(orders) > 1


def test_groups_choose_one_after_the_other():
    # 7 groups over 3 arms, all equally uncertain: 2 or 3 pulls each
    bandit, probe = make_bandit(exploration=100.0), Recorder()
    draw(bandit, num_groups=7, probe=probe)
    assert sorted(bandit.counts) == [2.0, 2.0, 3.0]
    # without exploration the best arm is pulled by all, once every arm was tried
    bandit, probe = make_bandit(exploration=0.0), Recorder()
    draw(bandit, num_groups=3, probe=probe)
    draw(bandit, 1, num_groups=3, probe=probe)
    assert probe.asked[1] == [[4, 6]] * 3


def test_the_choice_is_that_of_discounted_ucb_by_hand():
    bandit, probe = make_bandit(discount=1.0, exploration=0.8), Recorder()
    bandit.load_state({"counts": [4.0, 1.0, 4.0], "changes": [0.0, 1.0, 8.0], "distances": [2.0, 0.5, 2.0]})
    # means Δ (0, 1, 2) → (0, 0.5, 1), distances equal; n = 9, so the bonus is 0.8·sqrt(ln 9 / N): 0.593, 1.186, 0.593;
    # indices 0.593, 1.686, 1.593. With arm 1 pulled, N = 2 and n = 10: 0.858 + 0.5 = 1.358 < 1 + 0.607 of arm 2
    assert 0.8 * math.sqrt(math.log(9) / 1) + 0.5 == pytest.approx(1.686, abs=1e-3)
    draw(bandit, num_groups=2, probe=probe)
    assert probe.arms() == [1, 2]


def test_several_pulls_of_a_group_are_different_arms_and_share_candidates():
    bandit, probe = make_bandit(pulls=3), Recorder()
    draw(bandit, num_groups=1, probe=probe)
    assert probe.asked == [[[0, 2, 4, 6]]] and bandit.counts == [1.0, 1.0, 1.0]
    assert bandit.changes == [4.0, 12.0, 20.0]


def test_a_state_goes_through_json_and_back():
    used, probe = make_bandit(T=40), Recorder()
    for iteration in range(7):
        draw(used, iteration, 4, seed=iteration, probe=probe)
    fresh = make_bandit(T=40)
    state = used.state()
    fresh.load_state(json.loads(json.dumps(state)))
    again = Recorder()
    for iteration in range(7, 20):
        assert draw(used, iteration, 4, iteration, probe) == draw(fresh, iteration, 4, iteration, again)
    assert probe.asked[7:] == again.asked and used.state() == fresh.state()
    # what was handed out is a copy
    assert state != used.state()


def test_equal_measurements_give_equal_windows_on_every_rank():
    ranks = [(make_bandit(T=40), Recorder()) for _ in range(2)]
    for iteration in range(10):
        first, second = (draw(bandit, iteration, 4, iteration, probe) for bandit, probe in ranks)
        assert first == second
    assert ranks[0][1].asked == ranks[1][1].asked


@pytest.mark.parametrize("estimate", ["exact", "x0"])
def test_the_estimate_reaches_the_probe(estimate):
    probe = Recorder()
    draw(make_bandit(estimate=estimate), probe=probe)
    assert probe.estimates == [estimate]


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["abc", None, True, float("nan"), float("inf"), float("-inf")])
def test_a_beta_that_is_no_finite_number_is_refused_before_the_run(value):
    with pytest.raises(ValueError, match=rf"window\.kwargs\.beta is {value!r};"):
        make("dynamic", {"beta": value})


def test_a_search_without_two_candidates_is_refused():
    with pytest.raises(ValueError, match=r"window\.kwargs\.stride is 6\b.* 6 steps"):
        make("dynamic", {"stride": 6}, T=7)


def test_an_unknown_search_answers_with_the_nearest():
    with pytest.raises(ValueError, match=r"window\.kwargs\.search is 'bandits'.*'bandit'.*exact, x0, bandit"):
        make("dynamic", {"search": "bandits"})
    with pytest.raises(ValueError, match=r"window\.kwargs\.search is 3;.*exact, x0, bandit"):
        make("dynamic", {"search": 3})


@pytest.mark.parametrize("search", ["exact", "x0"])
@pytest.mark.parametrize(
    ("option", "value"), [("discount", 0.9), ("exploration", 1.0), ("pulls", 2), ("estimate", "x0")]
)
def test_options_of_the_bandit_are_refused_elsewhere(search, option, value):
    with pytest.raises(ValueError, match=rf"window\.kwargs\.{option} is {value!r}, .*search is {search}"):
        make("dynamic", {"search": search, option: value})


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("discount", 0, "a number above 0, at most 1"),
        ("discount", 1.01, "a number above 0, at most 1"),
        ("discount", float("nan"), "a number above 0, at most 1"),
        ("discount", "0.9", "a number above 0, at most 1"),
        ("exploration", -0.1, "a finite number of at least 0"),
        ("exploration", float("inf"), "a finite number of at least 0"),
        ("exploration", True, "a finite number of at least 0"),
        ("pulls", 0, "a whole number of at least 1"),
        ("pulls", 1.5, "a whole number of at least 1"),
        ("pulls", 4, "has 3 starts to choose from"),
        ("estimate", "exakt", "exact or x0"),
    ],
)
def test_bandit_options_out_of_range_are_refused_before_the_run(option, value, rule):
    with pytest.raises(ValueError, match=rf"window\.kwargs\.{option} is .*{rule}"):
        make_bandit(**{option: value})


def test_the_ends_of_the_ranges_are_allowed():
    assert isinstance(make_bandit(discount=1, exploration=0, pulls=3), Bandit)


def test_the_bonus_falls_with_the_root_of_an_arms_pulls():
    bandit, probe = make_bandit(discount=1.0, exploration=0.55), Recorder()
    bandit.load_state({"counts": [4.0, 1.0, 4.0], "changes": [0.0, 1.0, 8.0], "distances": [2.0, 0.5, 2.0]})
    # means Δ (0, 1, 2) → (0, 0.5, 1), distances equal; n = 9, so the bonus is 0.55·sqrt(ln 9 / N): 0.408, 0.815, 0.408;
    # indices 0.408, 1.315, 1.408. Were it by 1/N, arm 2 had 1.204
    draw(bandit, num_groups=1, probe=probe)
    assert probe.arms() == [2]
