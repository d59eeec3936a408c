"""Advantages by hand: standardised within a group, with a floor for the spread."""

import pytest
import torch

from hrf_fast.training.standardising import group_advantages, weak_spreads


def advantages(rewards, group, floor=1e-6):
    return group_advantages(torch.tensor(rewards), torch.tensor(group), floor=floor)


def test_two_groups_are_standardised_apart():
    # (1, 2, 3): mean 2, unbiased std 1; (10, 30): mean 20, std sqrt(200) = 14.142, so ±10/14.142
    found = advantages([1.0, 2.0, 3.0, 10.0, 30.0], [0, 0, 0, 1, 1])
    torch.testing.assert_close(found, torch.tensor([-1, 0, 1, -0.70710678, 0.70710678]))


def test_one_group_is_the_whole_batch():
    # mean 9.2; squared deviations 67.24 + 51.84 + 38.44 + 0.64 + 432.64 = 590.8, over 4: std 12.15319
    found = advantages([1.0, 2.0, 3.0, 10.0, 30.0], [0, 0, 0, 0, 0])
    expected = torch.tensor([-8.2, -7.2, -6.2, 0.8, 20.8]) / 12.15319
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_interleaved_groups_with_any_numbers_keep_the_order_of_the_rewards():
    # group 7: (1, 3) → ∓0.7071; group −2: (4, 0) → ±0.7071
    found = advantages([1.0, 4.0, 3.0, 0.0], [7, -2, 7, -2])
    torch.testing.assert_close(found, torch.tensor([-1.0, 1, 1, -1]) * 0.70710678)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e8, 1e-30])
def test_a_group_of_equal_rewards_gets_zeros(value):
    found = advantages([value] * 5 + [0.0, 2.0], [0] * 5 + [1, 1])
    assert found[:5].tolist() == [0] * 5
    assert found[5:].tolist() == pytest.approx([-0.70710678, 0.70710678])


def test_the_floor_stands_in_for_a_smaller_spread_only():
    # (0, 0.01): std 0.00707 < 0.1, so ∓0.005/0.1; (0, 2): std 1.414 > 0.1 and is used
    found = advantages([0.0, 0.01, 0.0, 2.0], [0, 0, 1, 1], floor=0.1)
    torch.testing.assert_close(found, torch.tensor([-0.05, 0.05, -0.70710678, 0.70710678]))


def test_a_large_offset_does_not_drown_the_differences():
    # 16 777 216 = 2^24, where float32 counts in twos: the mean of 2^24 + (0, 2, 6) is no float32. Deviations
    # (−8, −2, 10)/3, squares (64 + 4 + 100)/9, over 2: std sqrt(28/3) = 3.0550505
    base = 2.0**24
    expected = torch.tensor([-8.0, -2.0, 10.0]) / 3 / 3.0550505
    torch.testing.assert_close(advantages([base, base + 2, base + 6], [0, 0, 0]), expected)


def test_advantages_are_float32_whatever_the_rewards_dtype():
    group = torch.zeros(2, dtype=torch.long)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = group_advantages(torch.tensor([1.0, 3.0], dtype=dtype), group, floor=1e-6)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.tensor([-0.70710678, 0.70710678]))


@pytest.mark.parametrize("group", [[0, 0, 1], [0, 1, 2]])
def test_a_group_of_one_is_refused(group):
    with pytest.raises(ValueError, match=r"train\.group_size is 1.* 2"):
        advantages([1.0, 2.0, 3.0], group)


@pytest.mark.parametrize("floor", [0.0, -1.0])
def test_a_floor_that_cannot_divide_is_refused(floor):
    with pytest.raises(ValueError, match=rf"train\.advantage_floor is {floor};"):
        advantages([1.0, 2.0], [0, 0], floor=floor)


@pytest.mark.parametrize("value", [0.1, 1e10 / 3])
def test_a_group_of_equal_rewards_in_fp64_gets_zeros_too(value):
    # seven times the number is no number of fp64
    rewards = torch.full((7,), value, dtype=torch.float64)
    assert group_advantages(rewards, torch.zeros(7, dtype=torch.long), floor=1e-6).tolist() == [0] * 7
    assert weak_spreads(rewards, torch.zeros(7, dtype=torch.long), floor=1e-6) == {}


# --- spreads that are too small ---------------------------------------------------------------------------------------


def weak(rewards, group, floor=1e-6, dtype=torch.float32):
    return weak_spreads(torch.tensor(rewards, dtype=dtype), torch.tensor(group), floor=floor)


def test_ordinary_rewards_are_not_remarked_on_nor_are_equal_ones():
    assert weak([1.0, 2.0, 3.0, 7.0, 7.0], [0, 0, 0, 1, 1]) == {}


def test_a_spread_under_the_floor_is_said_with_the_size_of_the_advantages():
    # (0, 2e-9): std √2·1e-9 = 1.4e-9, over 1e-6; (0, 4e-9) is larger
    sentences = weak([0.0, 2e-9, 0.0, 4e-9, 1.0, 2.0], [0, 0, 1, 1, 2, 2])
    assert list(sentences) == ["floor, some"]
    text = sentences["floor, some"]
    assert text.startswith("the rewards of 2 of 3 groups spread by 1.4e-09, which is under train.advantage_floor 1e-06")
    assert "down to 0.0014 of their size; lower the floor, or scale the reward" in text
    assert list(weak([0.0, 2e-9], [0, 0])) == ["floor, all"]


def test_a_spread_of_a_few_rounding_steps_is_said_with_their_size():
    # fp32 has 2^-23 of 2^20 = 0.125 between numbers there; ±0.125: std √2·0.125 = 0.177, two digits need 64·0.125 = 8
    base = 2.0**20
    sentences = weak([base - 0.125, base + 0.125, base, base + 16], [0, 0, 1, 1])
    assert list(sentences) == ["rounding"]
    assert sentences["rounding"].startswith(
        "the rewards of 1 of 2 groups spread by 0.18 around 1.049e+06, where numbers of float32 are 0.12 apart"
    )
    # fp64 counts in 2^-32 there
    assert weak([base - 0.125, base + 0.125], [0, 0], dtype=torch.float64) == {}
