"""Bad input: refused with what was given and what is accepted."""

import math
import re

import pytest
import torch

from hrf_kernels import clipped_surrogate, gaussian_log_prob, gaussian_step
from tests.kernels.cases import BF16, Case, Inputs, both_backends, coef_with, differentiate, draw

SHAPE = (3, 2, 4, 4)
FUNCTIONS = {"gaussian_step": gaussian_step, "gaussian_log_prob": gaussian_log_prob, "surrogate": clipped_surrogate}
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def arguments(function, shape=SHAPE):
    """Good arguments of one of FUNCTIONS, with every tensor that it takes."""
    outputs, rest = draw(Case(shape, guidance=3.0, kl_weight=0.3))
    shared = {**outputs, **{name: rest[name] for name in ("latents", "coef", "guidance_scale")}}
    return {
        "gaussian_step": shared | {"seed": 0, "sample_id": torch.arange(shape[0]), "step": 0},
        "gaussian_log_prob": shared | {"next_latents": rest["next_latents"]},
        "surrogate": {**outputs, **rest},
    }[function]


def refuse(function, given, error, message, backend):
    with pytest.raises(error, match=message) as caught:
        FUNCTIONS[function](**given, backend=backend)
    return str(caught.value)


SAMPLES = ("model_output", "unconditional_output", "next_latents", "reference_output")
PER_SAMPLE = ("sample_id", "old_log_prob", "advantages")


def table(function, names):
    good = arguments(function)
    return [name for name in names if name in good]


@both_backends
@every_function
def test_good_arguments_are_taken(function, backend):
    FUNCTIONS[function](**arguments(function), backend=backend)


# --- shape, dtype, device, layout -------------------------------------------------------------------------------------


@both_backends
@every_function
def test_shapes(function, backend):
    for name in table(function, SAMPLES):
        for shape in ((3, 2, 4, 1), (1, 2, 4, 4), (3, 4, 4, 4), (3, 32)):
            given = arguments(function) | {name: torch.zeros(shape)}
            refuse(function, given, ValueError, re.escape(f"{name} is {shape} but latents are (3, 2, 4, 4)"), backend)


@both_backends
@every_function
def test_latents_without_samples_or_elements(function, backend):
    for shape in ((0, 2, 4, 4), (3, 0, 4, 4), (3,)):
        given = arguments(function)
        for name in (*table(function, SAMPLES), "latents"):
            given[name] = torch.zeros(shape)
        for name in table(function, PER_SAMPLE):
            given[name] = given[name][: shape[0]]
        refuse(function, given, ValueError, re.escape(f"latents are {shape}; pass [B, C, H, W] with at least"), backend)


@both_backends
@pytest.mark.parametrize("name", [*PER_SAMPLE, "clip_range", "advantage_clip", "window_scale"])
def test_what_is_not_one_number_per_sample(name, backend):
    function = "gaussian_step" if name == "sample_id" else "surrogate"
    for shape in ((3, 1), (1,), (4,), ()):
        given = arguments(function) | {name: torch.ones(shape, dtype=torch.int64 if name == "sample_id" else None)}
        refuse(
            function, given, ValueError, re.escape(f"{name} is {shape} but the batch is 3") + r".*pass \[3\]", backend
        )


@both_backends
@every_function
def test_coefficients_of_another_length(function, backend):
    good = arguments(function)
    for name, value in (("mean_x0", torch.ones(3)), ("std", torch.ones(3)), ("std", torch.ones(3, 1))):
        given = good | {"coef": coef_with(good["coef"], **{name: value})}
        refuse(function, given, ValueError, r"coefficient \w+ is \(.*\).*pass six scalars, or six of \[3\]", backend)
    steps = {name: value.expand(4).contiguous() for name, value in good["coef"].tensors().items()}
    given = good | {"coef": coef_with(good["coef"], **steps)}
    refuse(function, given, ValueError, r"is \(4,\).* for a batch of 3; pass six scalars, or six of \[3\]", backend)


@both_backends
@every_function
def test_dtypes_of_samples(function, backend):
    for name in (*table(function, SAMPLES), "latents"):
        for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64):
            good = arguments(function)
            given = good | {name: torch.zeros(SHAPE, dtype=dtype)}
            refuse(function, given, TypeError, f"{name} is {dtype}.*float32, bfloat16 or float16", backend)


@both_backends
@every_function
def test_dtypes_of_coefficients(function, backend):
    # lower precision would shift every log-prob, float64 is not what the kernels compute in
    for dtype in (torch.float64, BF16):
        good = arguments(function)
        given = good | {"coef": coef_with(good["coef"], mean_x0=good["coef"].mean_x0.to(dtype))}
        refuse(function, given, TypeError, f"mean_x0 is {dtype}.*float32", backend)


@both_backends
def test_dtype_of_sample_id(backend):
    for dtype in (torch.int32, torch.float32):
        given = arguments("gaussian_step") | {"sample_id": torch.arange(3, dtype=dtype)}
        refuse("gaussian_step", given, TypeError, f"sample_id is {dtype}; pass int64", backend)


@both_backends
@every_function
def test_devices(function, backend):
    names = table(function, (*SAMPLES, *PER_SAMPLE, "clip_range", "advantage_clip", "window_scale"))
    for name in names:
        value = torch.zeros(SHAPE if name in SAMPLES else 3, device="meta")
        if name == "sample_id":
            value = value.long()
        given = arguments(function) | {name: value}
        refuse(function, given, ValueError, f"{name} is on meta but latents are on cpu; move one of them", backend)
    good = arguments(function)
    given = good | {"coef": coef_with(good["coef"], mean_x0=good["coef"].mean_x0.to("meta"))}
    refuse(function, given, ValueError, r"mean_x0 is on meta but latents are on cpu; use \.to\(\)", backend)


@both_backends
@every_function
def test_layouts(function, backend):
    layouts = {
        "channels last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
        "transposed": lambda tensor: tensor.transpose(2, 3),
        "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
        "every second": lambda tensor: torch.cat([tensor, tensor], dim=1)[:, ::2],
    }
    for name in (*table(function, SAMPLES), "latents"):
        for change in layouts.values():
            given = arguments(function)
            given[name] = change(given[name])
            text = refuse(function, given, ValueError, f"{name} is not contiguous", backend)
            assert str(given[name].stride()) in text and f"pass {name}.contiguous()" in text


@both_backends
@pytest.mark.parametrize("layout", ["every second", "expanded"])
def test_numbers_per_sample_may_have_any_stride(backend, layout):
    # a column of a table, or one number for all: the kernels read one number after the other
    shape = (6, 1, 5, 7)
    inputs = draw(Case(shape, per_sample=True, clips_per_sample=("clip_range",)))
    rest = dict(inputs.rest)
    names = ("old_log_prob", "advantages", "clip_range")

    def lay_out(tensor):
        if layout == "expanded":
            return tensor[:1].expand(len(tensor))
        return torch.stack([tensor, torch.full_like(tensor, 99.0)], dim=1)[:, 0]

    def change(function):
        coef = coef_with(rest["coef"], **{name: function(value) for name, value in rest["coef"].tensors().items()})
        return Inputs(inputs.outputs, rest | {name: function(rest[name]) for name in names} | {"coef": coef})

    found = differentiate(clipped_surrogate, change(lay_out), backend=backend)
    expected = differentiate(clipped_surrogate, change(lambda tensor: lay_out(tensor).contiguous()), backend=backend)
    assert torch.equal(found[0].log_prob, expected[0].log_prob) and torch.equal(found[0].loss, expected[0].loss)
    assert torch.equal(found[1][0], expected[1][0])
    key = {"seed": 0, "step": 0, "backend": backend}
    ids = lay_out(torch.arange(6))
    steps = [
        gaussian_step(**inputs.outputs, latents=rest["latents"], coef=change(f).rest["coef"], sample_id=i, **key)
        for f, i in ((lay_out, ids), (lambda tensor: lay_out(tensor).contiguous(), ids.contiguous()))
    ]
    assert torch.equal(steps[0][0], steps[1][0]) and torch.equal(steps[0][1], steps[1][1])


# --- gradients nobody computes ----------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("name", ["latents", "next_latents", "reference_output", "old_log_prob", "advantages"])
def test_a_gradient_for_anything_but_outputs(name, backend):
    given = arguments("surrogate")
    given[name] = given[name].clone().requires_grad_()
    message = rf"{name} requires a gradient, but only model outputs get one; pass {name}\.detach\(\)"
    refuse("surrogate", given, ValueError, message, backend)
    with torch.no_grad():
        clipped_surrogate(**given, backend=backend)
    if name in arguments("gaussian_log_prob"):
        given = arguments("gaussian_log_prob") | {name: given[name]}
        refuse("gaussian_log_prob", given, ValueError, message, backend)


@both_backends
@pytest.mark.parametrize("shape", [SHAPE, (2, 1, 91, 91)], ids=["one program", "two stages"])
def test_a_second_derivative_is_refused(shape, backend):
    outputs, rest = draw(Case(shape))
    output = outputs["model_output"].requires_grad_()
    loss = clipped_surrogate(output, **rest, backend=backend).loss.sum()
    (gradient,) = torch.autograd.grad(loss, output, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), output)


# --- options and keys -------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("function", ["gaussian_log_prob", "surrogate"])
def test_a_std_of_zero(function, backend):
    for std in (torch.tensor(0.0), torch.tensor(-0.1), torch.tensor(math.nan), torch.tensor([0.1, 0.0, 0.1])):
        good = arguments(function)
        coef = good["coef"]
        if std.dim():
            coef = coef_with(coef, **{name: value.expand(3).contiguous() for name, value in coef.tensors().items()})
        given = good | {"coef": coef_with(coef, std=std)}
        text = refuse(function, given, ValueError, "coefficient std is .* only where std > 0", backend)
        assert "leave the deterministic last step out of the window" in text


@both_backends
@every_function
@pytest.mark.parametrize("clip", [0.0, -1.0, math.inf, math.nan])
def test_an_x0_clip_that_is_no_bound(function, clip, backend):
    good = arguments(function)
    given = good | {"coef": coef_with(good["coef"], x0_clip=clip)}
    refuse(function, given, ValueError, f"x0_clip is {clip}; use a finite bound above 0, or None", backend)


@both_backends
@pytest.mark.parametrize("name, limit", [("seed", 2**64), ("step", 2**32)])
def test_keys_of_the_noise_out_of_range(name, limit, backend):
    for value in (-1, limit):
        given = arguments("gaussian_step") | {name: value}
        refuse("gaussian_step", given, ValueError, rf"{name} is {value}; use a whole number in \[0, {limit}\)", backend)
