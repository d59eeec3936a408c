"""The families by the classes of diffusers' pipelines, as model_index.json names them."""

from __future__ import annotations

from hrf_fast.policies.families.base import Family
from hrf_fast.policies.families.flux import FLUX
from hrf_fast.policies.families.sd3 import STABLE_DIFFUSION_3
from hrf_fast.policies.families.stable_diffusion import STABLE_DIFFUSION, STABLE_DIFFUSION_XL
from hrf_fast.policies.families.unconditional import DDPM, LATENT, PIXEL

FAMILIES: dict[str, Family] = {
    "DDPMPipeline": DDPM,
    "DDIMPipeline": PIXEL,
    "PNDMPipeline": PIXEL,
    "LDMPipeline": LATENT,
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusion3Pipeline": STABLE_DIFFUSION_3,
    "FluxPipeline": FLUX,
}
