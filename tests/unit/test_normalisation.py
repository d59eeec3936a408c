"""Group norms under half precision: torch's own in fp32, to the bit, with half of its memory."""

import copy

import pytest
import torch
from torch import nn

from hrf_fast.policies.base import Condition
from hrf_fast.policies.load import load_policy
from hrf_fast.policies.normalisation import HalfGroupNorm, keep_halves

INPUTS = {
    "contiguous": torch.randn(3, 8, 5, 4),
    "channels_last": torch.randn(3, 8, 5, 4).contiguous(memory_format=torch.channels_last),
    "a transposed sequence": torch.randn(3, 7, 8).transpose(1, 2),
    "a sample of one pixel": torch.randn(1, 8, 1, 1),
}


def norms(stored=torch.float32, *, lean=True):
    """torch's group norm and one of half precision, of equal weights."""
    plain = nn.GroupNorm(4, 8, eps=1e-6)
    nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    plain.to(stored)
    halved = copy.deepcopy(plain)
    keep_halves(halved, torch.bfloat16, lean=lean)
    return plain, halved


def run(norm, inputs, weights, saved):
    """The output, and the gradients of the inputs and the weights; what is saved for them is added to `saved`."""
    inputs = inputs.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        output = norm(inputs)
    gradient = torch.linspace(-1, 1, output.numel()).reshape(output.shape).bfloat16()
    return output, *torch.autograd.grad(output, [inputs, *weights], gradient)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lean", [False, True])
def test_output_and_gradients_are_those_of_torch_in_fp32_to_the_bit(kind, stored, lean):
    plain, halved = norms(stored, lean=lean)
    inputs = INPUTS[kind].bfloat16()

    def reference(values):
        weights = (plain.weight.float(), plain.bias.float())
        return nn.functional.group_norm(values.float(), 4, *weights, 1e-6).bfloat16()

    expected = run(reference, inputs, plain.parameters(), [])
    for theirs, ours in zip(expected, run(halved, inputs, halved.parameters(), []), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize(("lean", "size"), [(True, 2), (False, 4)])
def test_the_input_is_kept_as_it_came_or_in_fp32(lean, size):
    saved = []
    _, halved = norms(lean=lean)
    inputs = INPUTS["contiguous"].bfloat16()
    run(halved, inputs, halved.parameters(), saved)
    # the input and the weights, and a mean and a deviation for each group
    kept = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    assert kept == size * inputs.numel() + 4 * 8 + 2 * 4 * 3 * 4


def test_frozen_weights_have_no_gradient():
    _, halved = norms()
    halved.requires_grad_(False)
    inputs = INPUTS["contiguous"].clone().requires_grad_()
    halved(inputs).sum().backward()
    assert inputs.grad is not None and halved.weight.grad is None
    # and weights alone may be trained
    halved.requires_grad_(True)
    halved(INPUTS["contiguous"]).sum().backward()
    assert torch.equal(halved.bias.grad, torch.full((8,), 60.0))


@pytest.mark.parametrize(("precision", "kinds"), [("fp32", {nn.GroupNorm}), ("bf16", {HalfGroupNorm})])
def test_a_network_in_half_precision_has_them_under_its_names(tiny_model, precision, kinds):
    policy, plain = load_policy(str(tiny_model), precision=precision), load_policy(str(tiny_model))
    classes = {type(module) for module in policy.unet.modules() if isinstance(module, nn.GroupNorm)}
    assert classes == kinds and policy.unet.state_dict().keys() == plain.unet.state_dict().keys()
    copied = copy.deepcopy(policy)
    latents = torch.randn(2, 3, 16, 16)
    outputs = [each.predict(latents, 10, Condition()).model_output for each in (policy, copied)]
    assert torch.equal(*outputs)
