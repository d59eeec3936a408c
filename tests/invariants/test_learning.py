"""A run learns: the panel's reward rises beyond its paired interval."""

import pytest
import torch

import hrf_fast
from benchmarks.toys.mixtures import Toy
from benchmarks.toys.policy import policy_of, pretrain
from hrf_fast.assembly.components import build_components
from hrf_fast.distributed import comm
from hrf_fast.evaluation.diversity import paired_difference_interval
from hrf_fast.train import train_components
from tests.runs import panels

WORDS = [
    *("sample.num_inference_steps=6", "window.schedule=full", "train.advantages=batch", "train.clip_range=0.1"),
    *("train.groups_per_iteration=2", "train.groups_per_step=2", "train.group_size=32", "train.iterations=4"),
    *("train.step_weights=std", "optimizer.weight_decay=0", "run.save_every=0"),
    *("evaluation.every=0", "evaluation.panel_size=64", "evaluation.network=none", "run.progress=quiet"),
]


def brightness(images, prompts=None):
    return images.mean((1, 2, 3))


def rise(folder):
    """The paired interval of what a run's panel gained."""
    before, after = (torch.tensor(panel["rewards"], dtype=torch.float64) for panel in panels(folder))
    return paired_difference_interval(before, after, seed=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_points_move_to_where_their_reward_is(sign, tmp_path):
    words = [*WORDS, "train.group_size=64", "optimizer.learning_rate=1e-3"]
    words += ["run.seed=5", f"run.folder={tmp_path / 'run'}", "run.device=cpu"]
    config = hrf_fast.load_config(words)
    mlp = pretrain(Toy("one", torch.zeros(1, 2), torch.ones(1), torch.ones(1), width=0.5), steps=100)
    with comm.job(config.run.lost_after):
        policy = policy_of(mlp, num_inference_steps=6)
        parts = build_components(config, reward=lambda images, _: sign * images[:, 0, 0, 0], policy=policy)
        train_components(*parts)
    # seeds 0 to 3, for which the rate was chosen, moved by 0.09 to 0.11, known to 0.006
    assert rise(tmp_path / "run").low > 0.03


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_ddpo_makes_images_of_noise_that_it_was_not_trained_on_brighter_or_darker(tiny_model, tmp_path, sign):
    # an epsilon so large makes of AdamW a gradient step, whose first ones are no random signs
    words = [*WORDS, "optimizer.learning_rate=0.5", "optimizer.kwargs.eps=1"]
    words += [f"model.name={tiny_model}", "run.seed=5", f"run.folder={tmp_path / 'run'}"]
    result = hrf_fast.train(hrf_fast.load_config(words), reward=lambda images, prompts: sign * brightness(images))
    # seeds 0 to 3, for which the options were chosen, became brighter by 0.015 to 0.046, known to 0.001
    assert rise(result.folder).low > 0
