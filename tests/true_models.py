"""Configs of Stable Diffusion 1.5, XL and 3.5 and of FLUX as they are published: what `hrf plan` reads of them."""

import json
from pathlib import Path

SD15 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SDXL = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": [*range(13)],
    "qk_norm": "rms_norm",
}
SD35_LARGE = {
    **SD35_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
FLUX_DEV = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
DENOISERS = {"sd15": SD15, "sdxl": SDXL, "sd35_medium": SD35_MEDIUM, "sd35_large": SD35_LARGE, "flux_dev": FLUX_DEV}
_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
_SHIFTED = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
_FLOW_SCHEDULERS = {
    **dict.fromkeys(("sd35_medium", "sd35_large"), _SHIFTED),
    "flux_dev": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
}
_FLOW_VAE = {
    **_VAE,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
_T5 = {
    "architectures": ["T5EncoderModel"],
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_T5_TOKENIZER = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512}
_TOKENIZER = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}


def _text_encoder(kind: str, width: int, layers: int) -> dict:
    return {
        "architectures": [kind],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": layers,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "projection_dim": width,
    }


def write_true_model(folder: Path, kind: str) -> Path:
    """A diffusers folder with configs alone, of one of `DENOISERS`."""
    clip, clip_2 = _text_encoder("CLIPTextModel", 768, 12), _text_encoder("CLIPTextModelWithProjection", 1280, 32)
    encoders = {
        "StableDiffusionPipeline": [(clip, _TOKENIZER)],
        "StableDiffusionXLPipeline": [(clip, _TOKENIZER), (clip_2, _TOKENIZER)],
        "StableDiffusion3Pipeline": [
            (_text_encoder("CLIPTextModelWithProjection", 768, 12), _TOKENIZER),
            (clip_2, _TOKENIZER),
            (_T5, _T5_TOKENIZER),
        ],
        "FluxPipeline": [(clip, _TOKENIZER), (_T5, _T5_TOKENIZER)],
    }
    pipeline = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "flux_dev": "FluxPipeline"}
    pipeline = pipeline.get(kind, "StableDiffusion3Pipeline")
    flow = kind not in ("sd15", "sdxl")
    files = {
        "model_index.json": {"_class_name": pipeline},
        f"{'transformer' if flow else 'unet'}/config.json": DENOISERS[kind],
        "scheduler/scheduler_config.json": _FLOW_SCHEDULERS.get(kind, _SCHEDULER),
        "vae/config.json": _FLOW_VAE if flow else _VAE,
    }
    for number, (encoder, tokenizer) in enumerate(encoders[pipeline], 1):
        suffix = f"_{number}" if number > 1 else ""
        files[f"text_encoder{suffix}/config.json"] = encoder
        files[f"tokenizer{suffix}/tokenizer_config.json"] = tokenizer
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    return folder
