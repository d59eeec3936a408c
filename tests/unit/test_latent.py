"""LatentPolicy: diffusers' LDMPipeline as a policy, whose VQModel makes images of its own size."""

import json
import shutil

import pytest
import torch
from diffusers import LDMPipeline, VQModel

from hrf_fast.cli import main
from hrf_fast.memory.footprint import decoding_bytes, measure_decoding
from hrf_fast.noise import NoiseKey
from hrf_fast.policies.files import read_model
from hrf_fast.policies.latent import LatentPolicy
from hrf_fast.policies.sample import sample, starting_noise
from hrf_kernels import philox_normal
from tests.conftest import make_scheduler, make_smallest_unet, tiny_words
from tests.loading import load_policy
from tests.runs import metrics, train

pytestmark = pytest.mark.long

# of the UNet's latents; the VQModel has one level more
CHANNELS, SIDE, IMAGE_SIDE = 4, 8, 16


def make_vqvae():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VQModel(
        block_out_channels=(4, 8),
        latent_channels=CHANNELS,
        vq_embed_dim=CHANNELS,
        num_vq_embeddings=16,
        norm_num_groups=4,
        sample_size=IMAGE_SIDE,
        scaling_factor=0.5,
        **blocks,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny random LDM, as `LDMPipeline.save_pretrained` writes it."""
    unet = make_smallest_unet(CHANNELS, SIDE)
    folder = tmp_path_factory.mktemp("models") / "latent"
    LDMPipeline(make_vqvae(), unet, make_scheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(folder, **options):
    return load_policy(str(folder), **{"num_inference_steps": 4, **options})


def decoded_by_pipeline(folder, seed=0):
    """(clean latents, images [B, 3, H, W]) of two steps of the pipeline itself."""
    pipeline = LDMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    decode, latents = pipeline.vqvae.decode, []
    pipeline.vqvae.decode = lambda scaled: (
        latents.append(scaled * pipeline.vqvae.config.scaling_factor) or decode(scaled)
    )
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(batch_size=3, generator=generator, num_inference_steps=2, output_type="np").images
    return latents[0], torch.from_numpy(images).permute(0, 3, 1, 2)


def test_the_pipelines_class_decides_the_policy_and_shapes_are_the_unets_and_the_decoders(model):
    policy = load(model)
    assert isinstance(policy, LatentPolicy) and policy.latent_shape == (CHANNELS, SIDE, SIDE)
    assert policy.decode(torch.zeros(2, *policy.latent_shape)).shape == (2, 3, IMAGE_SIDE, IMAGE_SIDE)
    # the decoder is no part of what is trained, saved in checkpoints or sharded
    assert not any(parameter.requires_grad for parameter in policy.decoder.parameters())
    assert all(name.startswith("unet.") for name, _ in policy.network.named_parameters())


def test_decoding_is_the_pipelines_own(model):
    latents, images = decoded_by_pipeline(model)
    decoded = load(model).decode(latents)
    torch.testing.assert_close(decoded, images, atol=1e-5, rtol=0)
    # the images differ, so that there is something to compare
    assert float((images[0] - images[1]).abs().max()) > 1e-3


def test_a_plan_counts_what_the_decoder_of_a_running_model_takes(model):
    counted = decoding_bytes(read_model(str(model), weights=False), None, None, offload=False)
    _, running = measure_decoding(load(model))
    # the policy maps images to [0, 1] too
    assert counted == pytest.approx(running, rel=0.25)


def test_more_images_than_are_decoded_at_once_are_all_decoded(model):
    policy = load(model)
    latents = torch.randn(19, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    images = policy.decode(latents)
    assert images.shape == (19, 3, IMAGE_SIDE, IMAGE_SIDE)
    torch.testing.assert_close(images[17:], policy.decode(latents[17:]), atol=1e-5, rtol=0)


def test_latents_that_are_not_finite_are_not_decoded(model):
    policy = load(model)
    latents = torch.zeros(1, *policy.latent_shape)
    latents[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"optimizer\.learning_rate"):
        policy.decode(latents)


@pytest.mark.parametrize("eta", [1.0, 0.3])
@torch.no_grad()
def test_sampling_is_that_of_diffusers_driven_with_the_same_noise(model, eta):
    policy = load(model, eta=eta)
    key = NoiseKey(3, torch.arange(2))
    scheduler = LDMPipeline.from_pretrained(model).scheduler
    scheduler.set_timesteps(4)
    latents = starting_noise(policy, key)
    for step, timestep in enumerate(scheduler.timesteps):
        noise = philox_normal(policy.latent_shape, seed=key.key, sample_id=key.sample_id, step=step)
        output = policy.unet(latents, timestep).sample
        latents = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise).prev_sample
    # of latents of size 1: float32 tables against float32 arithmetic in another order
    torch.testing.assert_close(sample(policy, key, images_per_call=2), latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["clusters", "full"])
def test_a_run_trains_and_its_model_is_an_ldm_that_decodes_equally(model, tmp_path, schedule):
    words = [*tiny_words(model, tmp_path / "run"), f"window.schedule={schedule}", "train.iterations=1"]
    sizes = set()

    def brightness(images, prompts):
        sizes.add(tuple(images.shape[1:]))
        return images.mean((1, 2, 3))

    result = train(words, reward=brightness)
    assert sizes == {(3, IMAGE_SIDE, IMAGE_SIDE)}
    (record,) = metrics(result.folder)
    assert record["ratio_max"] == pytest.approx(1.0, abs=1e-2) and record["grad_norm"] > 0
    latents, images = decoded_by_pipeline(result.folder / "model")
    before, after = load(model), load(result.folder / "model")
    torch.testing.assert_close(after.decode(latents), images, atol=1e-5, rtol=0)
    # the UNet has changed and the decoder has not
    assert torch.equal(before.decode(latents), after.decode(latents))
    assert not torch.equal(before.unet.conv_in.weight, after.unet.conv_in.weight)


def test_a_plan_needs_the_configs_only(model, tmp_path, capsys):
    for part in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "vqvae/config.json"):
        (tmp_path / "m" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(model / part, tmp_path / "m" / part)
    assert main(["plan", "--memory", "8GB", *tiny_words(tmp_path / "m", tmp_path / "run")]) == 0
    assert "it fits" in capsys.readouterr().out


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PixArtAlphaPipeline", "LDMSuperResolutionPipeline"])
def test_a_pipeline_that_no_policy_drives_is_refused_by_name(copy, kind):
    edit(copy / "model_index.json", _class_name=kind)
    with pytest.raises(ValueError, match=f"model.name is '{copy}'.* {kind};"):
        load(copy)


def test_an_ldm_without_its_decoder_is_refused(copy):
    shutil.rmtree(copy / "vqvae")
    with pytest.raises(ValueError, match=f"model.name is '{copy}'.*vqvae/config.json"):
        load(copy)


def test_a_decoder_of_another_kind_is_refused_by_name(copy):
    edit(copy / "vqvae" / "config.json", _class_name="AutoencoderKL")
    with pytest.raises(ValueError, match=f"model.name is '{copy}'.* AutoencoderKL where"):
        load(copy)


def test_the_unet_of_an_ldm_alone_is_no_pixel_model(copy):
    # without its index a folder is taken for a pixel model, which has 1 or 3 channels
    (copy / "model_index.json").unlink()
    with pytest.raises(ValueError, match=f"model.name is '{copy}'.* {CHANNELS} channels"):
        read_model(str(copy), weights=False)


def test_weights_of_a_decoder_that_do_not_fit_are_refused(copy):
    edit(copy / "vqvae" / "config.json", block_out_channels=[4, 16])
    with pytest.raises(ValueError, match=r"model.name.*vqvae can't be used: .*shape \(decoder.conv_in.bias is"):
        load(copy)
