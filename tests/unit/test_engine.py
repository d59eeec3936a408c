"""The plain engine's optimizer step, averaged weights, the loss scale and the learning rate, by hand."""

import math

import pytest
import torch
from torch import nn

from hrf_fast.config.options import OptimizerConfig
from hrf_fast.engines.base import Ema, LossScale, LossScaleOverflow
from hrf_fast.engines.optimizers import judge_state, learning_rate_at
from hrf_fast.engines.plain import PlainEngine

# --- engine -----------------------------------------------------------------------------------------------------------


def make_engine(max_grad_norm, weight_decay=0.5):
    """An engine on two weights (1, 2); eps 1 so that AdamW's first step still shows the gradient's size."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    engine = PlainEngine(
        model, OptimizerConfig(weight_decay=weight_decay, kwargs={"eps": 1.0}, max_grad_norm=max_grad_norm)
    )
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


def test_a_weight_that_no_rank_has_used_is_left_alone():
    # weight decay alone would take it to 0.95
    model = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1.0)
    engine = PlainEngine(model, OptimizerConfig(weight_decay=0.5))
    engine.set_learning_rate(0.1)
    with engine.accumulating():
        engine.backward(model[0].weight.sum())
    assert float(engine.step()) == 1
    first, second = (layer.weight.detach() for layer in model)
    assert float(first) < 1 and float(second) == 1 and model[1].weight.grad is None
    # a checkpoint has it, as its first step would find it
    tensors, _ = engine.optimizer_state()
    shapes = [tuple(shape) for shape in engine.shapes().values()]
    assert judge_state(tensors, shapes) == "" and float(tensors["1.step"]) == 0 and float(tensors["1.exp_avg"]) == 0


def test_an_8_bit_checkpoint_may_lack_the_state_of_a_weight_that_no_call_has_used():
    # bitsandbytes' names
    state = {"0.state1": torch.zeros(2), "0.state2": torch.zeros(2), "0.step": torch.zeros(())}
    assert judge_state(state, [(2,), (3,)]) == ""
    assert "1.state2" in judge_state({**state, "1.state1": torch.zeros(3), "1.step": torch.zeros(())}, [(2,), (3,)])


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
    engine = PlainEngine(model, OptimizerConfig(weight_decay=0.0))
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
    engine = PlainEngine(model, OptimizerConfig(weight_decay=0.5))
    one_step(model, engine)
    assert torch.equal(model.weight, before)


def test_frozen_parameters_are_left_alone():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    engine = PlainEngine(model, OptimizerConfig(weight_decay=0.5))
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
    with pytest.raises(FloatingPointError, match=r"gradient norm is (nan|inf).*optimizer\.learning_rate"):
        one_step(model, engine, (bad, 1.0))
    assert torch.equal(model.weight, before)
    assert torch.equal(engine.optimizer.state[model.weight]["exp_avg"], moment)
    # and the bad gradient is gone with the next step
    one_step(model, engine)
    assert model.weight.isfinite().all() and not torch.equal(model.weight, before)


def test_averaged_weights_follow_by_their_decay_and_stand_in_for_the_weights_while_gathered():
    model = nn.Linear(2, 1, bias=False)
    options = {"weight_decay": 0.0, "kwargs": {"eps": 1.0}, "max_grad_norm": 0.0, "ema_decay": 0.2}
    engine = PlainEngine(model, OptimizerConfig(**options))
    first = model.weight.detach().clone()
    engine.set_learning_rate(0.1)
    one_step(model, engine)
    second = model.weight.detach().clone()
    # step 1: min(0.2, 2/11) of the start; step 2: min(0.2, 3/12)
    expected = 2 / 11 * first + 9 / 11 * second
    assert torch.allclose(engine.ema_state()["weight"], expected)
    one_step(model, engine)
    second = model.weight.detach().clone()
    expected = 0.2 * expected + 0.8 * second
    assert torch.allclose(engine.ema_state()["weight"], expected)
    with engine.gathered(ema=True):
        assert torch.allclose(model.weight, expected)
    assert torch.equal(model.weight, second)
    with engine.gathered():
        assert torch.equal(model.weight, second)


def test_the_average_of_a_short_run_is_of_its_own_weights():
    # the start is 0 and every weight after it 1: the average is 1 less the start's share, 2/11 · 3/12 · 4/13 …
    ema, one = Ema([torch.zeros(1)], decay=0.9999), [torch.ones(1)]
    ema.update(one, 1.0)
    assert float(ema.parts[0]) == pytest.approx(1 - 2 / 11)
    for _ in range(9):
        ema.update(one, 1.0)
    assert float(ema.parts[0]) == pytest.approx(1 - 5.9538e-5, abs=1e-7)


def test_fp16_scales_the_loss_and_drops_a_step_that_overflows():
    model = nn.Linear(2, 1, bias=False)
    options = OptimizerConfig(weight_decay=0.0, kwargs={"eps": 1.0}, max_grad_norm=0.0)
    engine = PlainEngine(model, options, "fp16")
    engine.set_learning_rate(0.1)
    before = model.weight.detach().clone()
    with pytest.raises(LossScaleOverflow, match="32768"):
        one_step(model, engine, (math.inf, 1.0))
    assert torch.equal(model.weight, before)
    # the norm is that of the gradient, not of the scaled one
    assert float(one_step(model, engine)) == pytest.approx(5.0)
    # at a scale of 1 it is no overflow any more
    engine.loss_scale.value = 1.0
    with pytest.raises(FloatingPointError, match="gradient norm is nan") as error:
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


def test_a_plain_engine_waits_for_nobody_and_finishes_without_padding():
    model, engine = make_engine(max_grad_norm=0.0)
    with engine.accumulating():
        engine.backward((model.weight * torch.tensor([[3.0, 4.0]])).sum(), kept=True)
        engine.finish(padding=5)
    assert not engine.lockstep and model.weight.grad[0].tolist() == [3, 4]


def test_weights_and_their_shapes_are_those_that_are_trained():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    engine = PlainEngine(model, OptimizerConfig(weight_decay=0.0))
    assert engine.shapes() == {"weight": (1, 2)}
    assert list(engine.weights()) == ["weight"] and torch.equal(engine.weights()["weight"], model.weight)


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


def test_burn_in_has_rate_zero_and_the_warm_up_follows():
    rate = learning_rate_at("constant", peak=8.0, burn_in_iterations=2, warmup_iterations=4, iterations=10)
    assert [rate(i) for i in range(7)] == [0, 0, 2, 4, 6, 8, 8]


def test_burn_in_leaves_weights_alone_and_makes_the_first_step_small_where_gradients_disagree():
    # gradients 1, −1 at rate 0, then 1: m = .091 over 1 − .9³ = .271, v = 1 after its correction; the weight moves by
    # .3358 of the rate, and by all of it without burn-in
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    engine = PlainEngine(model, OptimizerConfig(weight_decay=0.5, kwargs={"eps": 1e-12}, max_grad_norm=0.0))
    rate = learning_rate_at("constant", peak=0.1, burn_in_iterations=2, warmup_iterations=0, iterations=3)
    for iteration, gradient in enumerate((1.0, -1.0, 1.0)):
        assert model.weight.item() == 0
        engine.set_learning_rate(rate(iteration))
        one_step(model, engine, (gradient,))
    assert model.weight.item() == pytest.approx(-0.1 * 0.091 / 0.271, rel=1e-5)


def test_burn_in_leaves_the_warm_up_of_an_average_for_the_steps_that_move_weights():
    # the first of these has decay 2/11, whatever came before it
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    engine = PlainEngine(model, OptimizerConfig(ema_decay=0.999))
    for rate in (0.0, 0.0, 0.0, 0.5):
        engine.set_learning_rate(rate)
        one_step(model, engine, (1.0,))
    assert engine.ema.steps == 1
    assert engine.ema.parts[0].item() == pytest.approx(2 / 11 + 9 / 11 * model.weight.item(), rel=1e-6)


def test_cosine_falls_over_what_burn_in_and_warm_up_leave():
    # (1 + cos(π·(i − 2)/4))/2: i = 2 → 1, 4 → 1/2, 6 → 0
    rate = learning_rate_at("cosine", peak=1.0, burn_in_iterations=1, warmup_iterations=1, iterations=6)
    assert [rate(i) for i in (0, 1, 2, 4, 6)] == pytest.approx([0, 1, 1, 0.5, 0])


def test_an_unknown_learning_rate_schedule_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate_schedule is 'linear'.*constant, cosine"):
        learning_rate_at("linear", peak=1.0, warmup_iterations=0, iterations=10)


def test_an_overflow_begins_the_count_of_good_steps_anew():
    scale = LossScale("fp16")
    for _ in range(scale.growth_interval - 1):
        scale.check(torch.tensor(1.0))
    with pytest.raises(LossScaleOverflow):
        scale.check(torch.tensor(math.inf))
    # halved, and one good step since: not doubled again at once
    scale.check(torch.tensor(1.0))
    assert (scale.value, scale.good_steps) == (2**15, 1)
