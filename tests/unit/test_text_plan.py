"""Plans of text-to-image models: guided images count two, and what is frozen takes its place."""

import pytest
import torch

from hrf_fast.config.load import load_config
from hrf_fast.memory.footprint import measure_running
from hrf_fast.memory.planner import count_calls, plan
from hrf_fast.policies.files import read_model
from hrf_fast.policies.untrained import frozen_bytes, untrained_condition, untrained_network
from tests.text_models import KINDS, load_text_policy, text_model


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_sees_the_shapes_of_the_model_itself(kind):
    files, policy = read_model(str(text_model(kind)), weights=False), load_text_policy(kind)
    network, shape = untrained_network(files)
    assert shape == policy.latent_shape
    ours, theirs = ({n: w.shape for n, w in each.named_parameters()} for each in (network, policy.network))
    assert ours == theirs
    for guided in (True, False):
        ours, theirs = untrained_condition(files, 3, guided), policy.condition([None] * 3, guided=guided)
        assert {n: rows.shape for n, rows in ours.inputs.items()} == {
            n: rows.shape for n, rows in theirs.inputs.items()
        }
    frozen = [module for module in policy._parts.values() if isinstance(module, torch.nn.Module)]
    assert frozen_bytes(files) == sum(weight.nbytes for module in frozen for weight in module.parameters())


@pytest.mark.slow
def test_a_guided_call_has_the_activations_of_two_images():
    policy = load_text_policy("sd1")
    guided, plain = (measure_running(policy, checkpointing=False, guided=guided) for guided in (True, False))
    assert guided.kept.per_image == pytest.approx(2 * plain.kept.per_image, rel=0.05)
    # panels are guided in either case
    assert guided.sampling == plain.sampling
    assert all(parameter.grad is None for parameter in policy.network.parameters())


@pytest.mark.parametrize(
    ("words", "factor"),
    [([], 1), (["sample.guidance_scale=5"], 2), (["sample.guidance_scale=5", "train.guidance=false"], 1)],
)
def test_guided_images_count_two(words, factor):
    config = load_config(["window.schedule=full", "sample.num_inference_steps=6", "train.group_size=3", *words])
    counts = count_calls(config, 6)
    # 4 groups of 3 over 6 steps
    assert counts.rollout == counts.update == factor * 4 * 3 * 6 and counts.longest_window == 6


@pytest.mark.parametrize("word", ["sample.guidance_scale=2", "model.decoder=owner/taesd", "compute.offload=true"])
def test_options_of_other_models_are_refused(word, tiny_model):
    with pytest.raises(ValueError, match=f"{word.partition('=')[0]} is .*unconditional"):
        plan(load_config([f"model.name={tiny_model}", word]), gpus=1, memory=int(8e9))
