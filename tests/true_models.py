"""Configs of Stable Diffusion 1.5 and SDXL as they are published, without weights: what `hrf plan` reads of them."""

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
UNETS = {"sd15": SD15, "sdxl": SDXL}
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
    """A diffusers folder of sd15 or sdxl with configs alone."""
    pipeline = {"sd15": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[kind]
    files = {
        "model_index.json": {"_class_name": pipeline},
        "unet/config.json": UNETS[kind],
        "scheduler/scheduler_config.json": _SCHEDULER,
        "vae/config.json": _VAE,
        "text_encoder/config.json": _text_encoder("CLIPTextModel", 768, 12),
        "tokenizer/tokenizer_config.json": _TOKENIZER,
    }
    if kind == "sdxl":
        files["text_encoder_2/config.json"] = _text_encoder("CLIPTextModelWithProjection", 1280, 32)
        files["tokenizer_2/tokenizer_config.json"] = _TOKENIZER
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    return folder
