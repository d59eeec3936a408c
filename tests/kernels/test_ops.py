"""The custom ops: opcheck, graph capture by torch.compile, and what autograd is told."""

import pytest
import torch

from hrf_kernels import clipped_surrogate, gaussian_log_prob, gaussian_step, ops
from tests.kernels.cases import BF16, OPTIONS, Case, both_backends, differentiate, draw, sweep

both_plans = pytest.mark.parametrize("shape", [(3, 3, 5, 7), (2, 1, 91, 91)], ids=["one program", "two stages"])
# a plan changes neither how an op is registered nor how a graph captures it
mostly_one_plan = pytest.mark.parametrize(
    "shape", [(3, 3, 5, 7), pytest.param((2, 1, 91, 91), marks=pytest.mark.slow)], ids=["one program", "two stages"]
)
OPTION_NAMES = sweep(["plain", "all"], ["all"])


def samples_of(inputs, *, reference=False):
    """Sample-shaped arguments of an op in its order, the outputs with a gradient."""
    outputs = [inputs.outputs.get(name) for name in ("model_output", "unconditional_output")]
    outputs = [None if tensor is None else tensor.clone().requires_grad_() for tensor in outputs]
    middle = [inputs.rest.get("reference_output")] if reference else []
    return [*outputs, *middle, inputs.rest["latents"], inputs.rest["next_latents"]]


def step_of(inputs):
    coef = inputs.rest["coef"]
    return [list(coef.tensors().values()), coef.x0_clip, inputs.rest.get("guidance_scale", 1.0)]


@both_backends
@mostly_one_plan
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_opcheck_of_gaussian_step(backend, shape, option):
    inputs = draw(Case(shape, **OPTIONS[option]))
    output, unconditional, latents, _ = samples_of(inputs)
    ids = torch.arange(shape[0])
    with torch.no_grad():
        torch.library.opcheck(
            ops.gaussian_step, (output, unconditional, latents, *step_of(inputs), 2**32 - 1, 7, ids, 3, backend)
        )


@both_backends
@mostly_one_plan
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_opcheck_of_gaussian_log_prob(backend, shape, option):
    inputs = draw(Case(shape, **OPTIONS[option]))
    torch.library.opcheck(ops.gaussian_log_prob, (*samples_of(inputs), *step_of(inputs), backend))


@both_backends
@mostly_one_plan
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_opcheck_of_clipped_surrogate(backend, shape, option):
    inputs = draw(Case(shape, **OPTIONS[option]))
    rest = inputs.rest
    clips = [torch.full((shape[0],), 0.1), torch.full((shape[0],), 1.0)] if option == "all" else []
    # consume is False: the caller that opcheck plays keeps the gradients that come back
    torch.library.opcheck(
        ops.clipped_surrogate,
        (*samples_of(inputs, reference=True), *step_of(inputs), rest["old_log_prob"], rest["advantages"], 0.1, 2.0,
         clips, rest["loss_weight"], 0.3, rest.get("kl_weight"), True, False, backend),
    )  # fmt: skip


@both_backends
@mostly_one_plan
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_opcheck_of_output_gradients(backend, shape, option):
    inputs = draw(Case(shape, **OPTIONS[option]))
    upstream, slope = torch.linspace(-1, 1, shape[0]), torch.linspace(2, 1, shape[0])
    samples = [None if tensor is None else tensor.detach() for tensor in samples_of(inputs, reference=True)]
    weights = inputs.rest.get("kl_weight")
    for slope_or_none in (slope, None):
        torch.library.opcheck(
            ops.output_gradients, (upstream, slope_or_none, 0.25, weights, *samples, *step_of(inputs), backend)
        )


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiled_equals_eager(inputs, backend, compiler, upstream=None):
    def loss(model_output, unconditional_output, rest):
        # an op before and one after it, so that there is a graph to capture
        extra = {} if unconditional_output is None else {"unconditional_output": unconditional_output}
        result = clipped_surrogate(torch.tanh(model_output), **extra, **rest, backend=backend)
        total = result.loss.sum() if upstream is None else (result.loss * upstream).sum()
        return total, result.log_prob, result.clipped

    def run(function):
        outputs = [inputs.outputs.get(name) for name in ("model_output", "unconditional_output")]
        outputs = [None if tensor is None else tensor.clone().requires_grad_() for tensor in outputs]
        total, log_prob, clipped = function(*outputs, inputs.rest)
        total.backward()
        return [total.detach(), log_prob, clipped, *(tensor.grad for tensor in outputs if tensor is not None)]

    torch._dynamo.reset()
    expected, found = run(loss), run(torch.compile(loss, fullgraph=True, backend=compiler))
    assert expected[3].any()
    # tanh may be another implementation's
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5 if ours.dtype != BF16 else 2e-2, atol=1e-7)


@both_backends
@mostly_one_plan
@pytest.mark.parametrize("option", OPTION_NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_and_its_backward_are_captured_whole(backend, shape, option, weighted):
    upstream = torch.linspace(0.5, 2, shape[0]) if weighted else None
    compiled_equals_eager(draw(Case(shape, **OPTIONS[option])), backend, "aot_eager", upstream)


@pytest.mark.slow
@both_backends
@both_plans
@pytest.mark.parametrize("option", OPTION_NAMES)
def test_inductor_compiles_the_loss_and_its_backward(backend, shape, option):
    compiled_equals_eager(draw(Case(shape, output=BF16, **OPTIONS[option])), backend, "inductor")


@both_backends
@mostly_one_plan
def test_sampling_and_scoring_are_captured_whole(backend, shape):
    outputs, rest = draw(Case(shape, clamp=0.75))
    ids = torch.arange(shape[0])

    def step_and_score(model_output, latents, sample_id):
        following, old = gaussian_step(
            model_output, latents, rest["coef"], seed=2**63 + 1, sample_id=sample_id, step=3, backend=backend
        )
        return following, old, gaussian_log_prob(model_output, latents, following, rest["coef"], backend=backend)

    torch._dynamo.reset()
    with torch.no_grad():
        arguments = (outputs["model_output"], rest["latents"], ids)
        found = torch.compile(step_and_score, fullgraph=True, backend="aot_eager")(*arguments)
        expected = step_and_score(*arguments)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert torch.equal(found[1], found[2])


# --- autograd ---------------------------------------------------------------------------------------------------------


@both_backends
@both_plans
def test_only_the_loss_has_a_gradient_and_gradients_have_none(backend, shape):
    outputs, rest = draw(Case(shape))
    output = outputs["model_output"].requires_grad_()
    result = clipped_surrogate(output, **rest, backend=backend)
    assert [name for name, value in result._asdict().items() if value.requires_grad] == ["loss"]
    assert all(value.shape == (shape[0],) for value in result)
    assert result.outside.dtype == result.clipped.dtype == torch.bool
    assert int(torch.stack([result.outside, result.clipped]).view(torch.uint8).max()) <= 1
    (gradient,) = torch.autograd.grad(result.loss.sum(), output)
    assert gradient.dtype == output.dtype and gradient.is_contiguous() and not gradient.requires_grad


@both_backends
@both_plans
def test_the_gradients_of_two_losses_add_up(backend, shape):
    # micro-batches: each loss has its own gradient, and .grad collects them
    inputs = draw(Case(shape))
    _, (once,) = differentiate(clipped_surrogate, inputs, backend=backend)
    output = inputs.outputs["model_output"].clone().requires_grad_()
    for _ in range(2):
        clipped_surrogate(output, **inputs.rest, backend=backend).loss.sum().backward()
    assert torch.equal(output.grad, 2 * once) and once.any()


@both_backends
@both_plans
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_second_backward_pass_is_right_or_refused(backend, shape, factor):
    # the gradient of the first pass may be scaled in place: then the second must not scale it again in silence
    inputs = draw(Case(shape))
    _, (once,) = differentiate(clipped_surrogate, inputs, backend=backend)
    output = inputs.outputs["model_output"].clone().requires_grad_()
    total = factor * clipped_surrogate(output, **inputs.rest, backend=backend).loss.sum()
    total.backward(retain_graph=True)
    torch.testing.assert_close(output.grad, factor * once)
    try:
        total.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        torch.testing.assert_close(output.grad, 2 * factor * once)


@both_backends
@both_plans
def test_without_grad_mode_there_is_no_graph(backend, shape):
    outputs, rest = draw(Case(shape))
    output = outputs["model_output"].requires_grad_()
    with torch.no_grad():
        assert not clipped_surrogate(output, **rest, backend=backend).loss.requires_grad
    following, log_prob = gaussian_step(
        output, rest["latents"], rest["coef"], seed=0, sample_id=torch.arange(shape[0]), step=0, backend=backend
    )
    assert not following.requires_grad and not log_prob.requires_grad


@both_backends
@both_plans
def test_guidance_trains_one_output_where_the_other_is_fixed(backend, shape):
    inputs = draw(Case(shape, guidance=3.0))
    _, both = differentiate(clipped_surrogate, inputs, backend=backend)
    for i, name in enumerate(("model_output", "unconditional_output")):
        outputs = {key: tensor.clone().requires_grad_(key == name) for key, tensor in inputs.outputs.items()}
        loss = clipped_surrogate(**outputs, **inputs.rest, backend=backend).loss.sum()
        assert torch.equal(torch.autograd.grad(loss, outputs[name])[0], both[i])


@both_backends
@both_plans
def test_numbers_may_be_whole(backend, shape):
    inputs = draw(Case(shape, clamp=1, guidance=3, kl_weight=1))
    whole = {"loss_weight": 1, "clip_range": 1, "advantage_clip": 2, "window_scale": 1, "guidance_scale": 3}
    inputs.rest.update(whole)
    result, gradients = differentiate(clipped_surrogate, inputs, backend=backend)
    inputs.rest.update({name: float(value) for name, value in whole.items()})
    same, same_gradients = differentiate(clipped_surrogate, inputs, backend=backend)
    assert torch.equal(result.loss, same.loss) and torch.equal(gradients[0], same_gradients[0])
