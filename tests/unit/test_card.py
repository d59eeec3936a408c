"""The card of a tuned model: its lines of diffusers, run as they stand, draw the panel of the run."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, LDMPipeline, UNet2DModel
from PIL import Image

from hrf_fast.cli import main
from hrf_fast.config.load import load_config
from hrf_fast.evaluation.panel import Panel
from hrf_fast.policies.sample import sample
from hrf_fast.version import __version__
from hrf_kernels import philox_normal
from tests.conftest import make_scheduler, make_smallest_unet, make_unet, tiny_words
from tests.loading import load_policy
from tests.runs import panels, train
from tests.unit.test_latent import CHANNELS, SIDE, make_vqvae

pytestmark = pytest.mark.long

# every module of diffusers that draws noise for a pipeline here
DRAWING = (
    "diffusers.pipelines.ddim.pipeline_ddim",
    "diffusers.pipelines.ddpm.pipeline_ddpm",
    "diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond",
    "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_ddpm",
)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def save(kind, folder):
    """A random model of a pipeline class or with a scheduler of its own."""
    if kind == "latent":
        unet = UNet2DModel(**{**make_unet(CHANNELS, SIDE).config, "add_attention": False})
        LDMPipeline(make_vqvae(), unet, make_scheduler(clip_sample=False)).save_pretrained(folder)
        return
    scheduler = make_scheduler({"grey": "DDIMScheduler"}.get(kind, kind), timestep_spacing="trailing")
    DDPMPipeline(make_smallest_unet(1 if kind == "grey" else 3, 16), scheduler).save_pretrained(folder)
    # PNDM, which no pipeline takes, is in folders of the hub
    scheduler.save_pretrained(folder / "scheduler")


def lines_of(folder) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    return block


def drawn(code, noise, shape, folder, monkeypatch):
    """The images of lines of Python, run in a folder, whose noise is that of hrf's panel instead of PyTorch's."""
    # the starting noise, then that of each step in turn
    steps = iter(range(-1, 1000))

    def randn_tensor(asked, **_):
        step = next(steps)
        assert tuple(asked) == (len(noise), *shape)
        return philox_normal(shape, seed=noise.key, sample_id=noise.sample_id, step=0xFFFFFFFF if step < 0 else step)

    with monkeypatch.context() as patch:
        for module in DRAWING:
            patch.setattr(f"{module}.randn_tensor", randn_tensor)
        patch.chdir(folder)
        names = {}
        exec(code, names)
    return names["images"]


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("DDPMScheduler", "ddim"),
        pytest.param("DDPMScheduler", "ddpm", marks=pytest.mark.slow),
        ("PNDMScheduler", "ddpm"),
        ("grey", "ddim"),
        ("latent", "ddim"),
        ("latent", "ddpm"),
    ],
)
def test_the_lines_of_the_card_draw_the_last_panel(kind, scheduler, tmp_path, monkeypatch):
    save(kind, tmp_path / "given")
    options = {"sample.scheduler": scheduler, "sample.num_inference_steps": 4, "evaluation.panel_size": 16}
    options |= {"sample.eta": 0.7 if scheduler == "ddim" else 1, "train.iterations": 1, "train.groups_per_iteration": 1}
    words = [*tiny_words(tmp_path / "given", tmp_path / "run"), *(f"{name}={value}" for name, value in options.items())]
    result = train(words, reward=brightness)
    config, folder = load_config(words), result.folder / "model"
    policy = load_policy(str(folder), scheduler=scheduler, num_inference_steps=4, eta=config.sample.eta)
    noise = Panel(16, config.evaluation.seed, 16).noise(policy)

    def by_diffusers(code):
        return drawn(code, noise, policy.latent_shape, folder, monkeypatch)

    images = by_diffusers(lines_of(folder))
    expected = policy.decode(sample(policy, noise, images_per_call=16))
    assert images.shape == expected.shape
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    # the reward of the run's own last panel; other steps, or the eta of the pipeline, give another
    reward = result.last_panel["reward"][0]
    assert float(brightness(images, None).mean()) == pytest.approx(reward, abs=1e-4)
    others = ["num_inference_steps=4", "num_inference_steps=3"], [", eta=0.7", ""]
    for old, new in others[: 2 if scheduler == "ddim" else 1]:
        code = lines_of(folder).replace(old, new)
        assert code != lines_of(folder) and (by_diffusers(code) - expected).abs().max() > 1e-2


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run of two iterations whose panels and model use averaged weights."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    words = [*tiny_words(tiny_model, run), "optimizer.ema_decay=0.5", "reward.name=jpeg_incompressibility"]
    assert main(["train", *words]) == 0
    return run


def test_the_card_says_what_was_done_and_what_it_came_to(finished, tiny_model):
    card = (finished / "model" / "README.md").read_text()
    first, last = (panel["reward"] for panel in (panels(finished)[0], panels(finished)[-1]))
    numbers = ["{:#.4g} [{:#.4g}, {:#.4g}]".format(*interval) for interval in (first, last)]
    for text in (
        f"| base model | {tiny_model.name} (a local folder) |",
        "HRF (`window.schedule=clusters`), 2 iterations",
        "jpeg_incompressibility",
        f"hrf_fast {__version__}",
        f"| reward | {numbers[0]} | {numbers[1]} |",
        "6 images from noise of seed 1234, ddim, 6 steps, eta 1, fp32",
    ):
        assert text in card, text
    # a folder is no model of the hub, and where it lies is not told
    assert (
        "base_model" not in card
        and str(tiny_model.parent) not in card
        and card.startswith("---\nlibrary_name: diffusers\n")
    )


def test_an_exported_checkpoint_has_the_card_of_its_own_iteration(finished, tmp_path):
    for iteration in (1, 2):
        checkpoint = finished / "checkpoints" / f"iteration-00000{iteration}"
        assert main(["export", str(checkpoint), "--out", str(tmp_path / str(iteration))]) == 0
        card = (tmp_path / str(iteration) / "README.md").read_text()
        reward = panels(finished)[iteration]["reward"][0]
        assert f"{iteration} iterations" in card and f"{reward:#.4g}" in card
    assert card == (finished / "model" / "README.md").read_text()


def test_averaged_weights_are_exported_and_drawn_where_panels_use_them(finished, tmp_path):
    checkpoint = finished / "checkpoints" / "iteration-000002"
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    exported, tuned = (load_policy(str(folder)).unet.state_dict() for folder in (tmp_path / "out", finished / "model"))
    assert all(torch.equal(exported[name], value) for name, value in tuned.items())
    grids = []
    for model in (finished, checkpoint):
        assert main(["sample", str(model), "--out", str(tmp_path / "g.png"), "--count", "4"]) == 0
        grids.append(Image.open(tmp_path / "g.png").tobytes())
    assert grids[0] == grids[1]


@pytest.mark.parametrize("inside", [".", "checkpoints", "checkpoints/iteration-000002"])
def test_a_checkpoint_is_drawn_from_inside_the_run_too(finished, tmp_path, monkeypatch, inside):
    monkeypatch.chdir(finished / inside)
    path = Path("checkpoints/iteration-000002").relative_to(inside)
    assert main(["sample", str(path), "--out", str(tmp_path / "g.png"), "--count", "2"]) == 0


def test_a_checkpoint_out_of_its_place_and_the_folder_of_all_say_what_to_do(finished, tmp_path, capsys):
    checkpoints = finished / "checkpoints"
    out = ["--out", str(tmp_path / "out.png")]
    for command in ("sample", "export"):
        assert main([command, str(checkpoints), *out]) == 1
        assert f"{checkpoints} holds the checkpoints of a run; name one of them" in capsys.readouterr().err
    stray = tmp_path / "a" / "b"
    stray.parent.mkdir()
    (checkpoints / "iteration-000001").rename(stray)
    try:
        assert main(["sample", str(stray), *out]) == 1
        assert f"{stray} is a checkpoint, but {tmp_path} has no config.yaml" in capsys.readouterr().err
    finally:
        stray.rename(checkpoints / "iteration-000001")
    assert main(["sample", str(finished), *out, "--variant", "fp16"]) == 1
    assert "--variant is 'fp16'" in capsys.readouterr().err


def test_a_broken_checkpoint_is_neither_drawn_nor_exported(finished, tmp_path, capsys):
    checkpoint = finished / "checkpoints" / "iteration-000001"
    data = (checkpoint / "ema.safetensors").read_bytes()
    (checkpoint / "ema.safetensors").write_bytes(data[:-1] + b"x")
    try:
        for command in ("sample", "export"):
            assert main([command, str(checkpoint), "--out", str(tmp_path / "out.png")]) == 1
            assert f"{checkpoint} is broken: ema.safetensors is not what was written" in capsys.readouterr().err
    finally:
        (checkpoint / "ema.safetensors").write_bytes(data)
