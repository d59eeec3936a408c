"""Attention by name: it is what was asked for, or it is refused."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

from hrf_fast.config.load import load_config
from hrf_fast.policies import attention
from hrf_fast.policies.attention import set_attention
from tests.conftest import make_unet
from tests.loading import load_policy


class OnCuda:
    """A UNet that says it is on CUDA, as far as the choice of attention looks."""

    def __init__(self, unet, enable):
        self.unet, self.enable_xformers_memory_efficient_attention = unet, lambda: enable(unet)

    def parameters(self):
        yield SimpleNamespace(device=torch.device("cuda"))

    def modules(self):
        return self.unet.modules()


def to_xformers(unet):
    for module in unet.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(XFormersAttnProcessor())


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "find_spec", lambda name: name)


def processors(unet):
    return {type(module.processor) for module in unet.modules() if hasattr(module, "processor")}


def test_sdpa_is_what_diffusers_does_by_itself(tiny_model):
    assert processors(load_policy(str(tiny_model), attention="sdpa").unet) == {AttnProcessor2_0}


def test_xformers_takes_every_attention_of_the_unet(cuda):
    unet = make_unet()
    set_attention(OnCuda(unet, to_xformers), "xformers")
    assert processors(unet) == {XFormersAttnProcessor}


def test_without_cuda_it_is_refused_when_the_model_is_loaded(tiny_model):
    with pytest.raises(ValueError, match="compute.attention is 'xformers'.* cpu"):
        load_policy(str(tiny_model), attention="xformers")


def test_a_missing_xformers_says_how_to_install_it(cuda, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"compute.attention is 'xformers'.*hrf_fast\[gpu\]"):
        set_attention(OnCuda(make_unet(), to_xformers), "xformers")


def test_a_unet_without_attention_has_nothing_for_xformers(cuda):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
    with pytest.raises(ValueError, match="compute.attention is 'xformers'.*no attention"):
        set_attention(OnCuda(unet, to_xformers), "xformers")


def test_an_operator_that_does_not_run_is_refused(cuda):
    def fail(unet):
        raise NotImplementedError("no kernel image")

    with pytest.raises(ValueError, match="compute.attention is 'xformers'.*no kernel image"):
        set_attention(OnCuda(make_unet(), fail), "xformers")


def test_an_enabling_that_changes_nothing_is_not_believed(cuda):
    with pytest.raises(ValueError, match="compute.attention is 'xformers'.*AttnProcessor2_0"):
        set_attention(OnCuda(make_unet(), lambda unet: None), "xformers")


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="compute.attention is 'flash'.*sdpa, xformers"):
        set_attention(make_unet(), "flash")
    with pytest.raises(ValueError, match="compute.attention is 'xformer'.*'xformers'"):
        load_config(["compute.attention=xformer"])
