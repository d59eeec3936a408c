"""The smallest SD3 and FLUX pipelines, with tokenizers of CLIP and T5; random weights.

`flow_model("sd3")` and so on is a folder that is written once per session.
"""

import functools
from pathlib import Path

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from hrf_fast.policies.parts import quiet
from tests.conftest import tiny_words
from tests.loading import load_policy
from tests.text_models import make_text_config, make_tokenizer, make_vae, saved

# sd35: dual attention and normalised queries; sd3_no_t5: without T5; schnell: without embedded guidance, unshifted
KINDS = ("sd3", "sd35", "sd3_no_t5", "flux", "schnell")
WIDTH, WIDTH_2, JOINT = 8, 12, 24
SD35 = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
# latents are [4, SIDE, SIDE], FLUX's [SIDE² / 4, 16]; images [3, 2 * SIDE, 2 * SIDE]
SIDE = 8
SIZE = 2 * SIDE


@functools.cache
def make_t5_tokenizer() -> T5TokenizerFast:
    """Letters, a space and the words cat and dog."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = ["▁", "▁cat", "▁dog", "▁red", *"abcdefghijklmnopqrstuvwxyz,"]
    return T5TokenizerFast(
        vocab=special + [(piece, -float(number + 1)) for number, piece in enumerate(pieces)],
        extra_ids=0,
        model_max_length=512,
    )


def make_t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(make_t5_tokenizer()),
            d_model=JOINT,
            d_kv=6,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def make_sd3(**options) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        **{
            "sample_size": SIDE,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "joint_attention_dim": JOINT,
            "caption_projection_dim": 8,
            "pooled_projection_dim": WIDTH + WIDTH_2,
            "pos_embed_max_size": SIDE,
            **options,
        }
    )


def make_flux(**options) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        **{
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 12,
            "num_attention_heads": 1,
            "joint_attention_dim": JOINT,
            "pooled_projection_dim": WIDTH,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 4),
            **options,
        }
    )


def make_flow_pipeline(kind: str, seed: int = 0):
    """A pipeline of random weights, of one of `KINDS`."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        clip = make_tokenizer()
        parts = {"tokenizer": clip, "vae": make_vae(scaling_factor=0.36, shift_factor=0.12)}
        if kind.startswith("sd3"):
            second = make_tokenizer(pad="!")
            t5 = kind != "sd3_no_t5"
            return StableDiffusion3Pipeline(
                **parts,
                text_encoder=CLIPTextModelWithProjection(make_text_config(WIDTH, clip)),
                text_encoder_2=CLIPTextModelWithProjection(make_text_config(WIDTH_2, second)),
                tokenizer_2=second,
                text_encoder_3=make_t5() if t5 else None,
                tokenizer_3=make_t5_tokenizer() if t5 else None,
                transformer=make_sd3(
                    **({"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if kind == "sd35" else {})
                ),
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            )
        dev = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
        return FluxPipeline(
            **parts,
            text_encoder=CLIPTextModel(make_text_config(WIDTH, clip)),
            text_encoder_2=make_t5(),
            tokenizer_2=make_t5_tokenizer(),
            transformer=make_flux(guidance_embeds=kind == "flux"),
            scheduler=FlowMatchEulerDiscreteScheduler(**(dev if kind == "flux" else {"shift": 1.0})),
        )
    finally:
        torch.set_rng_state(state)


@functools.cache
def flow_model(kind: str) -> Path:
    """The folder of `make_flow_pipeline(kind)`, gone when the session ends; copy it to change it."""
    return saved(make_flow_pipeline(kind), kind)


def size_of(kind: str) -> int | None:
    """model.image_size, where the model's own would be large."""
    return None if kind.startswith("sd3") else SIZE


def load_pipeline(folder: Path, kind: str):
    """The pipeline in a folder by diffusers, which wants to hear of a part that is not there."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3_no_t5" else {}
    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_flow_policy(kind: str, **options):
    """The policy of `flow_model(kind)` at images of `SIZE`, over 4 steps, guided where the model can be."""
    values = {"scheduler": "flow_sde", "num_inference_steps": 4, "guidance_scale": 1.0 if kind == "schnell" else 3.5}
    return load_policy(str(flow_model(kind)), **{**values, "image_size": size_of(kind), **options})


def flow_words(kind, folder, *more):
    """Two iterations of 2 groups of 3 over 4 steps, guided, with averaged weights."""
    words = [*tiny_words(flow_model(kind), folder), "prompts.source=animals", "evaluation.images_per_prompt=2"]
    own = ("sample.num_inference_steps", "sample.eta", "evaluation.every", "window.")
    words = [word for word in words if not word.startswith(own)]
    size = [] if size_of(kind) is None else [f"model.image_size={SIZE}"]
    return [
        *words,
        *size,
        "sample.scheduler=flow_sde",
        "sample.num_inference_steps=4",
        "sample.guidance_scale=3.5",
        "optimizer.learning_rate=0.01",
        "optimizer.ema_decay=0.5",
        "train.clip_range=1",
        "evaluation.every=0",
        *more,
    ]
