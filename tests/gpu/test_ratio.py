"""An update that replays its rollout: ratio 1 to the bit, and equal weights however activations are held."""

import pytest
import torch

from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.training.optimizer_step import replay_ratios
from tests.gpu.conftest import model_words, train
from tests.runs import equal, weights, with_folder
from tests.waits import loop_parts


@pytest.mark.parametrize("guided", [False, True], ids=["unconditional", "guided"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_on_policy_ratio_is_one_to_the_bit(device, words, tmp_path, precision, channels_last, guided):
    if precision == "fp16" and device.type != "cuda":
        pytest.skip("fp16 is for CUDA")
    given = [*model_words(guided, words, device, tmp_path), f"compute.precision={precision}"]
    given.append(f"compute.channels_last={str(channels_last).lower()}")
    components = build_components(load_config([*given, "window.schedule=full"]))[1]
    roll_out, _ = loop_parts(components)
    rollout = roll_out()
    windows = {number: trajectory.window for number, trajectory in rollout.trajectories.items()}
    calls = components.call_plan.replay(windows)
    ratios = replay_ratios(components.policy, rollout.trajectories, calls, as_in_update=True)
    assert len(ratios) == 6 * len(range(*next((w.start, w.stop) for w in windows.values())))
    assert torch.equal(ratios, torch.ones_like(ratios))


@pytest.mark.parametrize("guided", [False, True], ids=["unconditional", "guided"])
@pytest.mark.parametrize("activations", ["replay", "checkpoint"])
def test_kept_activations_train_as_those_that_are_made_again(device, words, tmp_path, activations, guided):
    given = [*model_words(guided, words, device, tmp_path), "train.order=on_policy", "train.iterations=1"]
    for name in ("keep", activations):
        train(with_folder(given, tmp_path / name, f"compute.activations={name}"))
    # the counters differ: what is kept is not made again
    assert equal(weights(tmp_path / "keep"), weights(tmp_path / activations))
