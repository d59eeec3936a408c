"""The smallest text-to-image pipelines of each kind, with a real CLIPTokenizer; random weights.

`text_model("sd1")` and so on is a folder that is written once per session. To see prompts in images, train on them.
"""

import functools
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hrf_fast.policies.parts import quiet
from tests.loading import load_policy

KINDS = ("sd1", "sd2", "sdxl")
# latents are [4, SIDE, SIDE], images [3, 2 * SIDE, 2 * SIDE]
SIDE, WIDTH, WIDTH_2, LENGTH = 8, 8, 12, 16
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = (("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>"))


@functools.cache
def make_tokenizer(length: int = LENGTH, pad: str = END) -> CLIPTokenizer:
    """Letters, digits and the words cat, dog and red, cut to `length` tokens."""
    symbols = "!,.abcdefghijklmnopqrstuvwxyz0123456789"
    names = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in MERGES), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    vocab = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=list(MERGES), model_max_length=length, **special)


def make_text_config(width: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_unet(width: int, **options) -> UNet2DConditionModel:
    """Two levels with one cross-attention block each way."""
    return UNet2DConditionModel(
        **{
            "sample_size": SIDE,
            "layers_per_block": 1,
            "block_out_channels": (4, 8),
            "norm_num_groups": 2,
            "attention_head_dim": 2,
            "cross_attention_dim": width,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            **options,
        }
    )


def make_vae(**options) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=2 * SIDE,
        **options,
    )


def make_text_scheduler(**options) -> DDIMScheduler:
    """Stable Diffusion's own betas."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**{**betas, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **options})


def make_pipeline(kind: str, seed: int = 0):
    """A pipeline of random weights: sd1, sd2 (v-prediction) or sdxl."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        tokenizer = make_tokenizer()
        encoder = CLIPTextModel(make_text_config(WIDTH, tokenizer))
        if kind != "sdxl":
            return StableDiffusionPipeline(
                vae=make_vae(scaling_factor=0.18215),
                text_encoder=encoder,
                tokenizer=tokenizer,
                unet=make_text_unet(WIDTH),
                scheduler=make_text_scheduler(prediction_type="v_prediction" if kind == "sd2" else "epsilon"),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        second = make_tokenizer(pad="!")
        unet = make_text_unet(
            WIDTH + WIDTH_2,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + WIDTH_2,
            transformer_layers_per_block=(1, 1),
        )
        return StableDiffusionXLPipeline(
            vae=make_vae(scaling_factor=0.13025),
            text_encoder=encoder,
            text_encoder_2=CLIPTextModelWithProjection(make_text_config(WIDTH_2, second)),
            tokenizer=tokenizer,
            tokenizer_2=second,
            unet=unet,
            scheduler=make_text_scheduler(),
        )
    finally:
        torch.set_rng_state(state)


@functools.cache
def text_model(kind: str) -> Path:
    """The folder of `make_pipeline(kind)`, gone when the session ends; copy it to change it."""
    return saved(make_pipeline(kind), kind)


def saved(pipeline, kind: str) -> Path:
    """The folder of a pipeline, gone when the session ends."""
    folder = Path(_root().name) / kind
    with quiet():
        pipeline.save_pretrained(folder)
    return folder


@functools.cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="text_models_")


def load_text_policy(kind: str, **options):
    """The policy of `text_model(kind)` under guidance 5 over 6 steps."""
    return load_policy(str(text_model(kind)), **{"num_inference_steps": 6, "guidance_scale": 5.0, **options})
