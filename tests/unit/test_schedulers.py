"""Schedulers: those whose alphas mean the same become the DDIM of their config; the others are refused by name."""

import diffusers
import pytest
import torch

from hrf_fast.policies.families.table import FAMILIES
from hrf_fast.policies.sampler import build_sampler
from hrf_fast.policies.schedulers import COMPATIBLE, check_scheduler, make_scheduler

# SDXL's and SD's own
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OFTEN = {**BETAS, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "timestep_spacing": "leading"}


def made(config, pipeline="StableDiffusionXLPipeline"):
    family = FAMILIES[pipeline]
    flow = [name for name, each in FAMILIES.items() if each.flow]
    check_scheduler("some", config, pipeline, ddpm=family.ddpm, flow_pipelines=flow)
    return make_scheduler("model.name is 'some'", config, family.scheduler)


@pytest.mark.parametrize("kind", [name for name in COMPATIBLE if name not in ("DDIMScheduler", "DDPMScheduler")])
def test_a_scheduler_of_the_same_alphas_becomes_ddim(kind):
    scheduler = made({"_class_name": kind, **OFTEN})
    assert type(scheduler) is diffusers.DDIMScheduler
    expected = diffusers.DDIMScheduler(**OFTEN)
    ours, theirs = (build_sampler(each, kind="ddim", num_inference_steps=10, eta=1.0) for each in (scheduler, expected))
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for name in ("mean_x0", "mean_latents", "mean_output", "std"):
        assert torch.equal(getattr(ours.coefficients, name), getattr(theirs.coefficients, name))
    # as TRL does it
    trl = diffusers.DDIMScheduler.from_config(getattr(diffusers, kind).from_config(OFTEN).config)
    assert all(scheduler.config[name] == value for name, value in trl.config.items() if not name.startswith("_"))


@pytest.mark.parametrize("kind", ["KDPM2DiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_class_keeps_its_own_default_betas(kind):
    # diffusers' from_config would put DDIM's in their place
    scheduler = made({"_class_name": kind})
    assert torch.allclose(scheduler.alphas_cumprod, getattr(diffusers, kind)().alphas_cumprod)
    # nor does a model that was never clamped clip
    assert not scheduler.config.clip_sample
    if kind == "PNDMScheduler":
        assert not scheduler.config.set_alpha_to_one


def test_ddim_and_ddpm_stay_as_they_are():
    for kind in ("DDIMScheduler", "DDPMScheduler"):
        config = {"_class_name": kind, "clip_sample": True, "beta_end": 0.01}
        scheduler = made(config)
        assert type(scheduler).__name__ == kind and scheduler.config.clip_sample and scheduler.config.beta_end == 0.01


def test_karras_sigmas_space_the_others_steps_and_zero_terminal_snr_is_kept():
    spaced = made({"_class_name": "DPMSolverMultistepScheduler", **OFTEN, "use_karras_sigmas": True})
    assert torch.equal(spaced.alphas_cumprod, diffusers.DDIMScheduler(**OFTEN).alphas_cumprod)
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    zero = made({"_class_name": "EulerDiscreteScheduler", **OFTEN, **options})
    assert zero.alphas_cumprod[-1] == 0 and zero.config.prediction_type == "v_prediction"


def test_stable_diffusions_pipeline_offsets_steps_and_never_clips():
    config = {"_class_name": "DDIMScheduler", **BETAS}
    for kind in ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler"):
        scheduler = made(config | {"_class_name": kind}, "StableDiffusionPipeline")
        assert scheduler.config.steps_offset == 1 and not scheduler.config.clip_sample
    assert made(config).config.clip_sample and made(config).config.steps_offset == 0


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "is EDMEulerScheduler"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "is EDMDPMSolverMultistepScheduler"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "is ScoreSdeVeScheduler"),
        ({"_class_name": "LCMScheduler"}, "is LCMScheduler.*write DDIMScheduler .*scheduler_config.json"),
        ({"_class_name": "TCDScheduler"}, "is TCDScheduler.*write DDIMScheduler .*scheduler_config.json"),
        ({"_class_name": "NoScheduler"}, "is NoScheduler"),
        ({}, "is None"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas: True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type: 'continuous'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_others_are_refused_by_name(config, match):
    with pytest.raises(ValueError, match=f"model.name is 'some'.*{match}"):
        made(config)


def test_a_scheduler_whose_betas_ddim_does_not_know_is_refused():
    with pytest.raises(ValueError, match="model.name is 'some'.*exp"):
        made({"_class_name": "HeunDiscreteScheduler", "beta_schedule": "exp"})


def test_trls_last_step_goes_to_the_first_trained_step():
    scheduler = diffusers.DDIMScheduler(**{**OFTEN, "set_alpha_to_one": True})
    ours, trl = (build_sampler(scheduler, kind=kind, num_inference_steps=5, eta=1.0) for kind in ("ddim", "ddim_trl"))
    assert (ours.stochastic_steps, trl.stochastic_steps) == (4, 5)
    assert torch.equal(ours.coefficients.std[:4], trl.coefficients.std[:4])
    # t = 1 to 0: σ² = (1 − ā_0)/(1 − ā_1)·(1 − ā_1/ā_0), 0.0206 with these betas
    first, second = scheduler.alphas_cumprod[:2].double()
    variance = (1 - first) / (1 - second) * (1 - second / first)
    assert (
        float(trl.coefficients.std[4])
        == pytest.approx(float(variance.sqrt()), rel=1e-6)
        == pytest.approx(0.0206, abs=1e-4)
    )
