"""Group norms under half precision: torch's own in fp32, to the bit, with half of its memory."""

import copy

import pytest
import torch
from torch import nn

from hrf_fast.policies.base import Condition
from hrf_fast.policies.network import Network
from hrf_fast.policies.normalisation import ChannelsLastGroupNorm, HalfGroupNorm, keep_channels_last, keep_halves
from tests.loading import load_policy

INPUTS = {
    "contiguous": torch.randn(3, 8, 5, 4),
    "channels_last": torch.randn(3, 8, 5, 4).contiguous(memory_format=torch.channels_last),
    "a transposed sequence": torch.randn(3, 7, 8).transpose(1, 2),
    "a sample of one pixel": torch.randn(1, 8, 1, 1),
    # an image of tokens: the first stride is that of no batch
    "a batch of one": torch.empty_strided((1, 8, 5, 4), (8, 1, 32, 8)).normal_(),
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
    # the input, weight and bias, and a mean and a deviation for each group
    kept = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    assert kept == size * inputs.numel() + 2 * 4 * 8 + 2 * 4 * 3 * 4


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


# --- channels last on a GPU -------------------------------------------------------------------------------------------


def of_channels_last(dtype, *, silu):
    plain, _ = norms()
    last = copy.deepcopy(plain)
    keep_channels_last(last, dtype, "eager")
    last.silu = silu
    return plain, last


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("silu", [False, True], ids=["norm", "norm and silu"])
def test_a_norm_and_the_activation_behind_it_are_those_of_torch(kind, dtype, silu):
    plain, last = of_channels_last(dtype, silu=silu)
    inputs, saved = INPUTS[kind].to(dtype or torch.float32), []

    def reference(values):
        output = plain(values.float())
        return (nn.functional.silu(output) if silu else output).to(values.dtype)

    expected = run(reference, inputs, plain.parameters(), [])
    for theirs, ours in zip(expected, run(last, inputs, last.parameters(), saved), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    # of a norm and its activation the input alone
    assert sum(tensor.numel() == inputs.numel() for tensor in saved if tensor.numel() > 32) <= 1


def test_a_unet_in_that_order_computes_what_it_did_and_keeps_less(tiny_model):
    outputs, gradients, kept = [], [], []
    for device in ("cpu", "cuda"):
        policy = load_policy(str(tiny_model))
        network = Network(policy.unet, "fp32", channels_last=True, call=policy.network.call, device=device)
        names, saved = list(network.state_dict()), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):  # noqa: B023
            output = network(torch.linspace(-1, 1, 3 * 3 * 256).reshape(3, 3, 16, 16), 10.0)
        output.square().mean().backward()
        outputs.append(output), kept.append(sum({x.data_ptr(): x.numel() for x in saved}.values()))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
        last = [module for module in network.modules() if isinstance(module, ChannelsLastGroupNorm)]
    # all but those of attention have an activation
    assert 0 < sum(not module.silu for module in last) < len(last) and names == list(network.state_dict())
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert kept[1] < 0.8 * kept[0]


def test_a_block_that_scales_by_time_keeps_its_activation():
    from diffusers.models.resnet import ResnetBlock2D

    blocks = [
        ResnetBlock2D(in_channels=8, temb_channels=4, groups=2, time_embedding_norm=kind)
        for kind in ("default", "scale_shift")
    ]
    for block in blocks:
        keep_channels_last(block, None, "eager")
    assert [(block.norm1.silu, block.norm2.silu) for block in blocks] == [(True, True), (False, False)]
    assert type(blocks[1].nonlinearity) is nn.SiLU


def test_tokens_of_a_linear_projection_leave_the_order_to_the_norms_behind_them(monkeypatch):
    from diffusers import UNet2DConditionModel

    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 8}
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = UNet2DConditionModel(sample_size=16, use_linear_projection=True, **sizes, **blocks)
    keep_channels_last(unet, None, "eager")
    unet.to(memory_format=torch.channels_last)
    orders = []
    for module in unet.modules():
        if isinstance(module, ChannelsLastGroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: orders.append(inputs[0].movedim(1, -1).is_contiguous()))
    latents = torch.randn(2, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    for more in ({}, {"return_dict": False}):
        unet(latents, 3, torch.randn(2, 5, 8), **more)
    assert len(orders) > 20 and all(orders)
