"""Memory format, precision flags and the self-check's verdict: what changes speed must not change what is learnt."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hrf_fast import devices
from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.devices import choose_device, deterministic_backward, set_precision_flags
from hrf_fast.policies.base import Condition
from hrf_fast.train import train
from hrf_fast.training import self_check as module
from hrf_fast.training.self_check import self_check
from tests.loading import load_policy
from tests.waits import loop_parts

pytestmark = pytest.mark.long

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def build(tiny_run, *words):
    return build_components(load_config([*tiny_run, *words]))[1]


def is_channels_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def test_channels_last_reaches_weights_and_activations_and_returns_contiguous_outputs(tiny_model):
    latents = torch.randn(2, 3, 16, 16)
    plain, policy = load_policy(str(tiny_model)), load_policy(str(tiny_model), channels_last=True)
    seen = []
    policy.unet.mid_block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    output = policy.predict(latents, 10, Condition()).model_output
    assert is_channels_last(policy.unet.conv_in.weight) and is_channels_last(seen[0])
    assert output.is_contiguous()
    # fp32 convolutions sum in another order
    expected = plain.predict(latents, 10, Condition()).model_output
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_saving_leaves_the_weights_where_and_as_they_are(tiny_model, tmp_path):
    policy = load_policy(str(tiny_model), channels_last=True)
    before = [(p.data_ptr(), p.stride()) for p in policy.unet.parameters()]
    policy.save(tmp_path / "model")
    assert [(p.data_ptr(), p.stride()) for p in policy.unet.parameters()] == before
    name = "unet/diffusion_pytorch_model.safetensors"
    saved, given = load_file(tmp_path / "model" / name), load_file(tiny_model / name)
    assert saved.keys() == given.keys() and all(torch.equal(saved[key], given[key]) for key in given)


def test_a_stopped_and_resumed_channels_last_run_is_the_uninterrupted_one_bit_for_bit(tiny_run, tmp_path):
    words = [
        *tiny_run,
        "compute.channels_last=true",
        "optimizer.ema_decay=0.5",
        "evaluation.every=0",
    ]
    train(load_config(words))
    for iterations in (1, 2):
        train(load_config([*words, f"train.iterations={iterations}", f"run.folder={tmp_path / 'halves'}"]))
    newest = "checkpoints/iteration-000002"
    for name in (
        "model/unet/diffusion_pytorch_model.safetensors",
        f"{newest}/weights.safetensors",
        f"{newest}/optimizer.safetensors",
        f"{newest}/ema.safetensors",
    ):
        ours, theirs = load_file(tmp_path / "run" / name), load_file(tmp_path / "halves" / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_optimizer_s_state_takes_the_order_of_its_weights_when_it_is_restored(tiny_run):
    from hrf_fast.engines.optimizers import flatten_optimizer, restore_optimizer

    def stepped():
        engine = build(tiny_run, "compute.channels_last=true").engine
        for parameter in engine.parameters:
            parameter.grad = torch.ones_like(parameter)
        engine.optimizer.step()
        return engine.optimizer

    optimizer = stepped()
    restore_optimizer(stepped(), *flatten_optimizer(optimizer))
    restored = stepped()
    restore_optimizer(restored, *flatten_optimizer(optimizer))
    for parameter, entry in restored.state.items():
        assert entry["exp_avg"].stride() == entry["exp_avg_sq"].stride() == parameter.stride()


@pytest.fixture
def flags(monkeypatch):
    """torch's flags, put back afterwards."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    deterministic = torch.are_deterministic_algorithms_enabled
    yield lambda: (cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, deterministic())
    cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = kept
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(False)


def modes():
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_backward_takes_what_is_deterministic_or_stops(flags):
    with deterministic_backward():
        assert modes() == (False, False)
    set_precision_flags(CUDA, deterministic=True)
    with deterministic_backward():
        assert modes() == (True, False)
    # put_ has no deterministic form on a CPU either
    refusal = pytest.raises(ValueError, match="compute.deterministic is true, but put_ .*deterministic=false")
    with refusal, deterministic_backward():
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
    late = pytest.raises(ValueError, match="matrix product was made on CUDA before.*CUBLAS_WORKSPACE_CONFIG=:4096:8")
    with late, deterministic_backward():
        raise RuntimeError("uses CuBLAS and you have CUDA >= 10.2. ... set CUBLAS_WORKSPACE_CONFIG=:4096:8")
    # other errors stay as they are
    with pytest.raises(RuntimeError, match="of a kind of its own"), deterministic_backward():
        raise RuntimeError("of a kind of its own")
    assert modes() == (True, True)


def test_the_backward_of_an_optimizer_step_is_in_that_mode(flags, tiny_run):
    components = build(tiny_run, "run.device=cpu")
    seen = []
    next(components.policy.network.parameters()).register_hook(lambda gradient: seen.append(modes()))
    set_precision_flags(CUDA, deterministic=True)
    for part in loop_parts(components):
        part()
    assert set(seen) == {(True, False)}
    assert modes() == (True, True)


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_sets_every_flag_on_cuda(flags, deterministic):
    set_precision_flags(CUDA, deterministic=deterministic)
    assert flags() == (not deterministic, not deterministic, not deterministic, deterministic, deterministic)
    # whose backward asks no flag, where flash attention's does
    assert torch.backends.cuda.cudnn_sdp_enabled() == (not deterministic)
    assert torch.backends.cuda.flash_sdp_enabled()
    # what the user has set stays, and an operation that has no other way is no error
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_what_matrix_products_read_once_is_set_by_the_import():
    code = "import os, sys, hrf_fast; assert 'torch' not in sys.modules; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout == ":4096:8\n"


def test_a_gpu_after_a_cpu_leaves_the_accelerator_to_deepspeed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "_ours", set())
    # put back afterwards
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.delenv("DS_ACCELERATOR")
    choose_device("cpu")
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    choose_device("cuda")
    assert "DS_ACCELERATOR" not in os.environ
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    choose_device("cpu")
    choose_device("cuda")
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_on_a_cpu_no_flag_is_touched_and_the_fast_ones_are_refused(flags, tiny_run):
    before = flags()
    set_precision_flags(CPU, deterministic=True)
    with pytest.raises(ValueError, match="compute.deterministic is false.* cpu"):
        build(tiny_run, "run.device=cpu", "compute.deterministic=false")
    assert flags() == before


def test_the_device_is_checked():
    assert choose_device("cpu").type == "cpu"
    for name in ("gpu", "meta"):
        with pytest.raises(ValueError, match=f"run.device is '{name}'"):
            choose_device(name)


# --- the self-check ---------------------------------------------------------------------------------------------------


def check(tiny_run, monkeypatch, error, *words):
    monkeypatch.setattr(module, "replay_ratios", lambda *args, **kwargs: torch.tensor([1.0, 1.0 + error]))
    return self_check(build(tiny_run, *words))


@pytest.mark.parametrize("error", [1e-4, float("nan")])
def test_the_self_check_warns_of_a_clip_on_rounding_noise_and_names_the_ways_out(tiny_run, monkeypatch, error):
    # groups of 3: 6 images are two steps of a replay
    line = check(tiny_run, monkeypatch, error, "compute.precision=bf16", "compute.images_per_call=6")
    # 2 of 6 steps are the least window: 1e-4 * 2/6
    assert line.startswith("self-check failed, training goes on: replayed log-probs differ too much from the rollout's")
    # ranks agree on the largest error, and not a number is above all others
    finite = error == 1e-4
    shown = "0.0001" if finite else "inf"
    effect = "the clip will act on rounding noise" if finite else "no gradient will be finite"
    facts = "smallest clip range 3.3e-05; eager kernels: tensors are on cpu; bf16"
    assert f"(|ratio - 1| {shown}, {facts}); {effect}: use " in line
    assert "compute.images_per_call=0 or compute.precision=fp32" in line
    # ten times the error, over 2/6: 3e-3
    assert ("clip_range of at least 0.003" in line) == finite
    assert line.endswith("or weights that `hrf sample` draws finite images of") == (not finite)


@pytest.mark.parametrize(
    ("words", "rolled_out", "replayed"),
    [
        (["train.order=collect"], {3}, {3}),
        # two groups a rollout, two steps a replay
        (["train.order=collect", "compute.images_per_call=6"], {6}, {6}),
        (["train.order=collect", "compute.images_per_call=2"], {1, 2}, {1, 2}),
        (["train.order=on_policy", "compute.images_per_call=6", "train.groups_per_step=2"], {6}, {6}),
        # a step of one group has none to share calls with
        (["train.order=on_policy", "compute.images_per_call=6"], {3}, {3}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_self_check_makes_the_calls_of_training(tiny_run, words, rolled_out, replayed):
    components = build(tiny_run, "train.groups_per_iteration=2", "train.group_size=3", *words)
    sizes = {False: set(), True: set()}
    unet = components.policy.unet
    unet.register_forward_pre_hook(lambda unet, inputs: sizes[torch.is_grad_enabled()].add(len(inputs[0])))
    self_check(components)
    assert sizes == {False: rolled_out, True: replayed}
    assert components.policy.calls.batches == 0


def test_the_self_check_replays_where_only_some_steps_are_kept(tiny_run):
    components = build(tiny_run, "train.order=on_policy", "train.group_size=3")
    gradients = []
    components.policy.unet.register_forward_pre_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    # two late steps and the last: kept from the rollout, or rolled out and replayed
    for kept_pairs, expected in ((math.inf, [True, True, False]), (1000, [False] * 3 + [True] * 2)):
        gradients.clear()
        calls = replace(components.call_plan, kept_pairs=kept_pairs)
        assert "exact" in self_check(replace(components, call_plan=calls))
        assert gradients == expected


def test_the_self_check_says_in_words_that_a_replay_is_exact_or_near(tiny_run, monkeypatch):
    facts = "smallest clip range 3.3e-05; eager kernels: tensors are on cpu; fp32)"
    assert check(tiny_run, monkeypatch, 0.0) == (
        f"self-check passed: replayed log-probs equal the rollout's exactly (|ratio - 1| 0, {facts}"
    )
    # 1 + 1e-6 is 1 + 8 · 2^-23 in fp32
    assert check(tiny_run, monkeypatch, 1e-6) == (
        "self-check passed: replayed log-probs differ from the rollout's by rounding, well inside the clip range "
        f"(|ratio - 1| 9.5e-07, {facts}"
    )


def test_the_self_check_says_how_much_float32_rounds_steps_of_little_noise(tiny_run, monkeypatch):
    # std grows with eta; 6e-8 of it is the rounding of latents of size 1
    least = float(build(tiny_run).policy.sampler.coefficients.std[:5].min())
    line = check(tiny_run, monkeypatch, 0.0, "sample.eta=0.001")
    numbers = f"step 4 has noise of std {0.001 * least:.2g} only, where fp32 rounds gradients by {6e-3 / least:.2f}%"
    assert numbers in line and line.endswith("a larger sample.eta or noise_level has more")


def test_the_self_check_fails_from_a_tenth_of_the_smallest_clip_range_on(tiny_run, monkeypatch):
    # of 3.3e-5: 1e-5 is over a tenth and 2e-6 under it
    assert check(tiny_run, monkeypatch, 1e-5).startswith("self-check failed")
    assert check(tiny_run, monkeypatch, 2e-6).startswith("self-check passed")
