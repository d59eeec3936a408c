"""The optimizer step, the learning rate, the statistics and the random keys, by hand."""

import math

import pytest
import torch
from torch import nn

from hrf_fast.engines.base import LossScale, LossScaleOverflow
from hrf_fast.engines.optimizers import learning_rate_at
from hrf_fast.engines.plain import PlainEngine
from hrf_fast.noise import PURPOSES, noise_generator, noise_key, seed_everything
from hrf_fast.training.metrics import Scores, StepStats, iteration_record, summarise
from hrf_fast.training.trajectory import Trajectory
from hrf_fast.windows.base import Window
from hrf_kernels import StepCoefficients, Surrogate

# --- engine -----------------------------------------------------------------------------------------------------------


def make_engine(max_grad_norm, weight_decay=0.5):
    """An engine on two weights (1, 2); eps 1 so that AdamW's first step still shows the gradient's size."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    engine = PlainEngine(model, weight_decay=weight_decay, betas=(0.9, 0.999), eps=1.0, max_grad_norm=max_grad_norm)
    engine.set_learning_rate(0.1)
    return model, engine


def one_step(model, engine, gradient=(3.0, 4.0)):
    with engine.accumulating():
        engine.backward((model.weight * torch.tensor([gradient])).sum())
    return engine.step()


def test_a_gradient_over_the_maximum_norm_is_scaled_to_it():
    # gradient (3, 4), norm 5, clipped to (0.6, 0.8); first AdamW step: w·(1 − 0.1·0.5) − 0.1·g/(|g| + 1)
    # = 0.95 − 0.1·0.6/1.6, 1.9 − 0.1·0.8/1.8
    model, engine = make_engine(max_grad_norm=1.0)
    norm = one_step(model, engine)
    assert float(norm) == pytest.approx(5.0)
    assert model.weight.grad[0].tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert model.weight[0].tolist() == pytest.approx([0.9125, 1.8555556], rel=1e-6)


@pytest.mark.parametrize("max_grad_norm", [0.0, 5.1])
def test_a_maximum_norm_of_zero_is_off_and_a_smaller_gradient_is_untouched(max_grad_norm):
    # 0.95 − 0.1·3/4, 1.9 − 0.1·4/5
    model, engine = make_engine(max_grad_norm=max_grad_norm)
    assert float(one_step(model, engine)) == pytest.approx(5.0)
    assert model.weight.grad[0].tolist() == [3, 4]
    assert model.weight[0].tolist() == pytest.approx([0.875, 1.82], rel=1e-6)


def test_the_norm_is_over_all_parameters_together():
    # gradients 3 and 4 in two tensors: norm 5, both divided by 5
    model = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    engine = PlainEngine(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    with engine.accumulating():
        engine.backward(3 * model[0].sum() + 4 * model[1].sum())
    assert float(engine.step()) == pytest.approx(5.0)
    assert [float(p.grad) for p in model] == pytest.approx([0.6, 0.8], rel=1e-5)


def test_backwards_of_one_step_add_up_and_the_next_step_starts_from_zero():
    # (3, 0) + (0, 4) = (3, 4): the same as one backward; then (1, 0) alone
    model, engine = make_engine(max_grad_norm=0.0)
    with engine.accumulating():
        engine.backward((model.weight * torch.tensor([[3.0, 0.0]])).sum())
        engine.backward((model.weight * torch.tensor([[0.0, 4.0]])).sum())
    assert float(engine.step()) == pytest.approx(5.0)
    assert model.weight[0].tolist() == pytest.approx([0.875, 1.82], rel=1e-6)
    assert float(one_step(model, engine, (1.0, 0.0))) == pytest.approx(1.0)


def test_the_learning_rate_is_zero_until_it_is_set():
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    engine = PlainEngine(model, weight_decay=0.5, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    one_step(model, engine)
    assert torch.equal(model.weight, before)


def test_frozen_parameters_are_left_alone():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    engine = PlainEngine(model, weight_decay=0.5, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    engine.set_learning_rate(0.1)
    before = model.bias.clone()
    one_step(model, engine)
    assert torch.equal(model.bias, before) and len(engine.parameters) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_refused_and_the_weights_are_as_they_were(bad, max_grad_norm):
    model, engine = make_engine(max_grad_norm)
    one_step(model, engine)
    before, moment = model.weight.detach().clone(), engine.optimizer.state[model.weight]["exp_avg"].clone()
    message = r"gradient norm is (nan|inf): this optimizer step was not made; lower train\.learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        one_step(model, engine, (bad, 1.0))
    assert torch.equal(model.weight, before)
    assert torch.equal(engine.optimizer.state[model.weight]["exp_avg"], moment)
    # and the bad gradient is gone with the next step
    one_step(model, engine)
    assert model.weight.isfinite().all() and not torch.equal(model.weight, before)


def test_averaged_weights_follow_by_their_decay_and_stand_in_for_the_weights_while_gathered():
    model = nn.Linear(2, 1, bias=False)
    engine = PlainEngine(model, weight_decay=0.0, betas=(0.9, 0.999), eps=1.0, max_grad_norm=0.0, ema_decay=0.75)
    first = model.weight.detach().clone()
    engine.set_learning_rate(0.1)
    one_step(model, engine)
    second = model.weight.detach().clone()
    expected = 0.75 * first + 0.25 * second
    assert torch.allclose(engine.ema_state()["weight"], expected)
    with engine.gathered(ema=True):
        assert torch.allclose(model.weight, expected)
    assert torch.equal(model.weight, second)
    with engine.gathered():
        assert torch.equal(model.weight, second)


def test_fp16_scales_the_loss_and_drops_a_step_that_overflows():
    model = nn.Linear(2, 1, bias=False)
    options = {"weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1.0, "max_grad_norm": 0.0}
    engine = PlainEngine(model, **options, precision="fp16")
    engine.set_learning_rate(0.1)
    before = model.weight.detach().clone()
    with pytest.raises(LossScaleOverflow, match="the loss scale is now 32768"):
        one_step(model, engine, (math.inf, 1.0))
    assert torch.equal(model.weight, before)
    # the norm is that of the gradient, not of the scaled one
    assert float(one_step(model, engine)) == pytest.approx(5.0)
    # at a scale of 1 it is no overflow any more
    engine.loss_scale.value = 1.0
    with pytest.raises(FloatingPointError, match="was not made") as error:
        one_step(model, engine, (math.nan, 1.0))
    assert not isinstance(error.value, LossScaleOverflow)


def test_the_loss_scale_doubles_after_good_steps_and_is_part_of_a_checkpoint():
    scale = LossScale("fp16")
    for _ in range(scale.growth_interval):
        scale.check(torch.tensor(1.0))
    assert scale.value == 2**17
    other = LossScale("fp16")
    other.load(scale.state())
    assert vars(other) == vars(scale)
    # without fp16 there is none, whatever a checkpoint says
    plain = LossScale("fp32")
    plain.load(scale.state())
    assert plain.value == 1.0


# --- learning rate ----------------------------------------------------------------------------------------------------


def test_warm_up_is_linear_and_then_the_rate_is_constant():
    rate = learning_rate_at("constant", peak=8.0, warmup_iterations=4, iterations=10)
    assert [rate(i) for i in range(7)] == [2, 4, 6, 8, 8, 8, 8]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_without_warm_up_the_first_iteration_has_the_peak_rate(schedule):
    assert learning_rate_at(schedule, peak=5e-6, warmup_iterations=0, iterations=3)(0) == 5e-6


def test_cosine_goes_from_the_peak_to_zero_after_the_warm_up():
    # warm-up over 0 and 1, then (1 + cos(π·(i − 2)/8))/2: i = 2 → 1, 4 → (1 + √½)/2, 6 → 1/2, 10 → 0
    rate = learning_rate_at("cosine", peak=1.0, warmup_iterations=2, iterations=10)
    expected = {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.8535534, 6: 0.5, 8: 0.1464466, 10: 0.0}
    assert {i: rate(i) for i in expected} == pytest.approx(expected, abs=1e-7)
    # the last iteration still learns, and a run that goes on past its length does not climb again
    assert 0 < rate(9) < rate(8) and rate(15) == pytest.approx(0, abs=1e-12)


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    rate = learning_rate_at("cosine", peak=1.0, warmup_iterations=4, iterations=2)
    assert [rate(0), rate(1)] == [0.25, 0.5]


def test_an_unknown_learning_rate_schedule_is_refused():
    with pytest.raises(ValueError, match=r"train\.learning_rate_schedule is 'linear'; use one of constant, cosine"):
        learning_rate_at("linear", peak=1.0, warmup_iterations=0, iterations=10)


# --- statistics -------------------------------------------------------------------------------------------------------


def surrogate(ratios, outside, clipped, kl):
    count = len(ratios)
    values = torch.tensor(ratios), torch.tensor(outside), torch.tensor(clipped), torch.tensor(kl)
    return Surrogate(torch.zeros(count), torch.zeros(count), *values, kl=torch.zeros(count))


def test_step_stats_are_averages_over_all_pairs():
    # four pairs in forwards of 1 and 3: kl (0.4 + 0.1 + 0.2 + 0.5)/4, outside 3/4, clipped 1/4,
    # ratio (1.5 + 0.9 + 1 + 1.2)/4
    first = surrogate([1.5], [True], [True], [0.4])
    second = surrogate([0.9, 1.0, 1.2], [True, False, True], [False] * 3, [0.1, 0.2, 0.5])
    stats = StepStats.zeros(torch.device("cpu"))
    stats = stats.add(torch.tensor(0.25), first).add(torch.tensor(-0.75), second)
    stats = stats.finish(4, torch.tensor(3.0))
    found = {name: float(value) for name, value in vars(stats).items()}
    assert found == pytest.approx(
        {
            "loss": -0.5,
            "approx_kl": 0.3,
            "clip_fraction": 0.75,
            "clipped_fraction": 0.25,
            "ratio_mean": 1.15,
            "ratio_max": 1.5,
            "grad_norm": 3.0,
        }
    )


def test_the_largest_ratio_may_come_first_or_last():
    zeros = StepStats.zeros(torch.device("cpu"))
    low, high = surrogate([0.5], [True], [False], [0.0]), surrogate([0.7], [True], [False], [0.0])
    for order in ((low, high), (high, low)):
        stats = zeros
        for part in order:
            stats = stats.add(torch.tensor(0.0), part)
        assert float(stats.ratio_max) == pytest.approx(0.7)


def make_stats(*values):
    return StepStats(*(torch.tensor(value) for value in values))


def test_an_iteration_is_the_mean_of_its_steps_and_the_largest_of_their_ratios():
    steps = [make_stats(1.0, 0.2, 0.5, 0.1, 1.0, 1.75, 4.0), make_stats(2.0, 0.4, 0.0, 0.3, 0.5, 1.25, 1.0)]
    assert summarise(steps) == pytest.approx(
        {
            "loss": 1.5,
            "approx_kl": 0.3,
            "clip_fraction": 0.25,
            "clipped_fraction": 0.2,
            "ratio_mean": 0.75,
            "ratio_max": 1.75,
            "grad_norm": 2.5,
        }
    )


def test_one_step_is_its_own_summary():
    values = (1.0, 0.2, 0.5, 0.1, 1.0, 1.75, 4.0)
    assert list(summarise([make_stats(*values)]).values()) == pytest.approx(list(values))


def make_trajectory(start, stop, batch):
    steps = stop - start
    return Trajectory(
        window=Window(start, stop),
        latents=torch.zeros(steps + 1, batch, 3, 2, 2),
        old_log_prob=torch.zeros(steps, batch),
        timesteps=torch.arange(steps),
        coefficients=StepCoefficients(*(torch.zeros(steps) for _ in range(6))),
        images=torch.zeros(batch, 3, 2, 2),
    )


def test_a_trajectory_knows_its_group_size():
    assert make_trajectory(2, 5, batch=4).group_size == 4


def test_the_record_of_an_iteration_by_hand():
    # rewards (1, 3 | 2, 8): mean 3.5, squared deviations 6.25 + 0.25 + 2.25 + 20.25 = 29 over 3;
    # std within groups sqrt(2) and sqrt(18), mean 2.828427; advantages (−1, 1, −2, 1): mean −0.25, 6.75 over 3
    record = iteration_record(
        [make_stats(1.0, 0.2, 0.5, 0.1, 1.0, 1.75, 4.0)],
        Scores(
            {0: torch.tensor([1.0, 3.0]), 1: torch.tensor([2.0, 8.0])},
            {0: torch.tensor([-1.0, 1.0]), 1: torch.tensor([-2.0, 1.0])},
            # the mean over groups: 0.25 and 2
            {0: {"jpeg": 0.5, "size": 1.0}, 1: {"jpeg": 0.0, "size": 3.0}},
        ),
        [Window(0, 5), Window(3, 5)],
        {"images": 4},
    )
    assert record.pop("window_starts") == [0, 3]
    assert record == pytest.approx(
        {
            "reward_mean": 3.5,
            "reward_std": math.sqrt(29 / 3),
            "reward_min": 1.0,
            "reward_max": 8.0,
            "reward/jpeg": 0.25,
            "reward/size": 2.0,
            "advantage_std": 1.5,
            "advantage_max": 2.0,
            "group_reward_std": 2.828427,
            "loss": 1.0,
            "approx_kl": 0.2,
            "clip_fraction": 0.5,
            "clipped_fraction": 0.1,
            "ratio_mean": 1.0,
            "ratio_max": 1.75,
            "grad_norm": 4.0,
            "window_steps": 7,
            "images": 4,
        }
    )


def test_a_single_reward_term_is_not_repeated_in_the_record():
    record = iteration_record(
        [make_stats(*[0.0] * 7)],
        Scores({0: torch.tensor([1.0, 3.0])}, {0: torch.tensor([-1.0, 1.0])}, {0: {"jpeg": 2.0}}),
        [Window(0, 1)],
        {},
    )
    assert not [name for name in record if name.startswith("reward/")]


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_a_key_differs_by_seed_iteration_and_purpose():
    combinations = [(seed, i, purpose) for seed in (0, 1, 2, 2**31) for i in range(50) for purpose in PURPOSES]
    keys = {noise_key(*combination) for combination in combinations}
    assert len(keys) == len(combinations)
    assert all(0 <= key < 2**64 for key in keys) and max(keys) > 2**63


def test_a_seed_of_more_than_32_bits_does_not_share_another_seeds_keys():
    # numpy's SeedSequence lays its numbers end to end in 32-bit words and pads with zeros, so that
    # (3·2^32 + 5, 1, 0) and (5, 3, 1) are both the words 5, 3, 1, 0; refusing such a seed is as good
    try:
        large = noise_key(3 * 2**32 + 5, 1, PURPOSES[0])
    except ValueError:
        return
    assert large != noise_key(5, 3, PURPOSES[1])


def test_a_key_is_the_same_on_every_machine_and_in_every_version():
    # recorded: a change here changes every result, and breaks the resumption of older runs
    assert noise_key(0, 0, "anchors") == 15793235383387715774
    assert noise_key(7, 3, "rollout") == 13330671360687115049


def test_an_unknown_purpose_is_refused():
    with pytest.raises(ValueError):
        noise_key(0, 0, "lunch")


def test_generators_repeat_and_differ_by_iteration():
    def draw(iteration):
        return torch.randint(10**9, (4,), generator=noise_generator(3, iteration, "windows")).tolist()

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_the_global_generators_are_seeded_by_seed_and_iteration():
    import random

    import numpy as np

    def draw(seed, iteration):
        seed_everything(seed, iteration)
        return random.random(), float(np.random.random()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        first = draw(0, 1)
        assert draw(0, 1) == first
        for other in (draw(0, 2), draw(1, 1)):
            assert not set(first) & set(other)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
