"""Compilation: few graphs whatever a run does, the same weights' names, and a refusal where it can't work."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hrf_fast import doctor
from hrf_fast.build import build_parts
from hrf_fast.config.load import load_config
from hrf_fast.config.rules import check_job
from hrf_fast.policies import compilation
from hrf_fast.policies.compilation import canonical, check_compile, obstacle
from hrf_fast.policies.load import load_policy
from hrf_fast.run.files import read_log
from hrf_fast.train import train
from hrf_fast.training.warm_up import batch_sizes, warm_up
from tests.conftest import make_scheduler

# a graph with gradient and one without, for each of conv-in to conv-out, or of down, mid and up
PARTS = {"unet": 1, "blocks": 3}


@pytest.fixture(scope="module")
def smallest_model(tmp_path_factory):
    """A UNet of one block down and one up, so that tracing it takes a second."""
    from diffusers import DDPMPipeline, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    folder = tmp_path_factory.mktemp("models") / "smallest"
    DDPMPipeline(unet, make_scheduler("DDPMScheduler")).save_pretrained(folder)
    return folder


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, by a backend that runs them as they are."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    monkeypatch.setattr(compilation, "obstacle", lambda device_type: None)
    return made


def words(model, folder, **options):
    values = {
        "model.name": model,
        "sample.num_inference_steps": 6,
        "compute.batch_size": 4,
        "window.schedule": "random",
        "train.iterations": 3,
        "train.groups_per_iteration": 2,
        "train.group_size": 3,
        "optimizer.learning_rate": 1e-3,
        "optimizer.kwargs.eps": 0.01,
        "evaluation.panel_size": 6,
        "run.progress": "json",
        "run.folder": folder,
        **options,
    }
    return [f"{name}={value}" for name, value in values.items()]


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("mode", PARTS)
def test_a_run_of_many_window_lengths_steps_and_batches_compiles_its_graphs_once(
    mode, smallest_model, tmp_path, graphs, capsys
):
    options = {"compute.compile": mode, "compute.channels_last": True, "compute.steps_per_forward": 2}
    train(load_config(words(smallest_model, tmp_path / "compiled", **options)))
    notes = capsys.readouterr().out
    assert notes.index("compiling, which can take minutes") < notes.index("graphs for any batch took")
    assert notes.index("graphs for any batch took") < notes.index("self-check")
    # with and without gradient; windows of several lengths, chunks of one and two steps, groups of 3, panels of 4 and 2
    assert len(graphs) == 2 * PARTS[mode]
    assert len({tuple(record["window_starts"]) for record in read_log(tmp_path / "compiled" / "metrics.jsonl")}) > 1
    eager = tmp_path / "eager"
    train(load_config(words(smallest_model, eager, **options | {"compute.compile": "none"})))
    assert len(graphs) == 2 * PARTS[mode]
    # the same names and, as this backend computes what eager does, the same weights and counts
    ours, theirs = weights(tmp_path / "compiled" / "model"), weights(eager / "model")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    evaluations = [[r["evaluations"] for r in read_log(f / "metrics.jsonl")] for f in (tmp_path / "compiled", eager)]
    assert evaluations[0] == evaluations[1]


def test_graphs_are_kept_over_several_forwards_and_batches_of_one_are_one_more_graph(smallest_model, graphs):
    policy, plain = load_policy(str(smallest_model)), load_policy(str(smallest_model))
    policy.compile("unet")
    for count in (2, 5, 1):
        latents = torch.randn(count, 1, 8, 8)
        gradients = []
        for each in (policy, plain):
            outputs = [each.model_output(latents, step) for step in (7, 500, torch.tensor(3))]
            outputs.append(each.model_output(latents, torch.arange(count)))
            for output in reversed(outputs):
                output.square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in each.unet.parameters()]))
        # 1e-6: gradients are summed in the same order, the convolutions of eager and traced code are the same
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
        assert len(graphs) == (2 if count == 1 else 1)


def test_a_copy_of_a_compiled_unet_is_its_own(smallest_model, graphs):
    import copy

    policy = load_policy(str(smallest_model))
    policy.compile("blocks")
    twin = copy.deepcopy(policy.unet)
    assert all(module._compiled_call_impl is None for module in twin.modules())


def test_activations_checkpoint_has_the_gradient_of_eager_in_the_real_tracer(smallest_model, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    gradients, saved = [], []
    for mode, checkpoint in (("none", False), ("blocks", False), ("blocks", True)):
        policy = load_policy(str(smallest_model))
        policy.compile(mode)
        if checkpoint:
            policy.checkpoint_activations()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):  # noqa: B023
            output = policy.model_output(torch.ones(3, 1, 8, 8), 10)
        output.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.unet.parameters()]))
        saved.append(sum(kept))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-5, atol=1e-6)
    assert saved[2] < saved[1]


def test_the_warm_up_leaves_no_gradient_and_no_count(smallest_model, graphs, tmp_path):
    config = load_config(words(smallest_model, tmp_path, **{"compute.compile": "unet"}))
    parts = build_parts(config)
    warm_up(parts.policy, config, lambda note: None)
    assert len(graphs) == 2
    assert all(parameter.grad is None for parameter in parts.policy.unet.parameters())
    assert parts.policy.calls.batches == 0


def test_a_model_that_does_not_compile_is_refused_by_the_warm_up(smallest_model, graphs, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compilation, "BACKEND", backend)
    with pytest.raises(ValueError, match="compute.compile is 'unet', but .* does not compile.*no such instruction"):
        train(load_config(words(smallest_model, tmp_path / "run", **{"compute.compile": "unet"})))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [5]),
        (["compute.micro_batch_size=2", "compute.steps_per_forward=3"], [6, 1]),
        (["compute.micro_batch_size=1"], [2, 1]),
        (["compute.batch_size=1"], [5, 1]),
        (["evaluation.panel_size=65"], [5, 1]),
        (["train.groups_per_iteration=1"], [5, 1]),
    ],
)
def test_batches_of_one_are_compiled_where_a_split_leaves_one(options, expected):
    assert batch_sizes(load_config(options)) == expected


def test_inputs_of_any_strides_and_timesteps_of_any_form_become_one():
    for count in (1, 4):
        latents = torch.zeros(count, 8, 8)[:, None].as_strided((count, 1, 8, 8), (64, 1, 8, 1))
        for timesteps in (9, torch.tensor(9), torch.tensor([9]), torch.full((count,), 9)):
            x, t = canonical(latents, timesteps)
            assert x.stride() == (64, 64, 8, 1)
            assert t.stride() == (1,) and t.dtype == torch.int64 and t.tolist() == [9] * count


def cuda(monkeypatch, *, major=9, tools=("gcc",), triton=True):
    monkeypatch.setattr(compilation, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name if name in tools else None)
    monkeypatch.delenv("CC", raising=False)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ({"triton": False}, r'it needs Triton: pip install "hrf_fast\[gpu\]"'),
        ({"major": 6}, "Triton needs a GPU of compute capability 7.0"),
        ({"tools": ()}, "it needs a C compiler, and there is no gcc or clang on PATH.*in CC"),
    ],
)
def test_what_a_gpu_needs(monkeypatch, missing, reason):
    cuda(monkeypatch, **missing)
    with pytest.raises(ValueError, match=f"compute.compile is 'blocks' on cuda, but {reason}.*compute.compile=none"):
        check_compile("blocks", torch.device("cuda"))
    check_compile("none", torch.device("cuda"))


@pytest.mark.parametrize(("code", "expected"), [(0, None), (1, "gcc can't compile C with Python.h")])
def test_the_compiler_is_tried(monkeypatch, code, expected):
    cuda(monkeypatch)
    commands = []

    def run(command, **options):
        commands.append((command, options["input"]))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    found = obstacle("cuda")
    assert found == expected or found.startswith(expected)
    assert commands[0][0][:3] == ["gcc", "-x", "c"] and "Python.h" in commands[0][1]


def test_a_cpu_without_a_compiler_is_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = load_config(["model.name=no-such-folder", "compute.compile=unet", "run.device=cpu"])
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, and there is no no-such-compiler on PATH.*in CXX"):
        build_parts(config)
    assert doctor._compile().startswith("no: on cpu it needs a C++ compiler")


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_cpu_with_a_compiler_can(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    assert obstacle("cpu") is None and doctor._compile() == "ok on cpu: none, unet, blocks"


def test_zero_3_and_unknown_modes_are_refused():
    zero = "engine.deepspeed=configs/deepspeed/zero{}.json"
    with pytest.raises(ValueError, match="compute.compile is 'unet', but .*zero3.json is ZeRO-3.*use ZeRO 0 to 2"):
        check_job(load_config(["compute.compile=unet", zero.format(3)]), 1)
    for stage in (0, 1, 2):
        check_job(load_config(["compute.compile=unet", zero.format(stage)]), 1)
    with pytest.raises(ValueError, match="compute.compile is 'block' .did you mean 'blocks'"):
        load_config(["compute.compile=block"])


def test_another_way_of_compiling_is_another_run(smallest_model, graphs, tmp_path):
    options = {"train.iterations": 1}
    train(load_config(words(smallest_model, tmp_path / "run", **options)))
    for option, value in (("compile", "blocks"), ("channels_last", "true")):
        more = {"train.iterations": 2, f"train.{option}": value}
        with pytest.raises(ValueError, match=f"run of another configuration .train.{option} was"):
            train(load_config(words(smallest_model, tmp_path / "run", **more)))


@pytest.mark.slow
@pytest.mark.skipif(obstacle("cpu") is not None, reason="inductor has no compiler here")
def test_a_compiled_run_resumes_to_the_weights_of_an_unbroken_one(smallest_model, tmp_path):
    for folder, stops in (("unbroken", [2]), ("resumed", [1, 2])):
        for iterations in stops:
            options = {"compute.compile": "unet", "train.iterations": iterations, "run.save_every": 1}
            train(load_config(words(smallest_model, tmp_path / folder, **options)))
    assert len(read_log(tmp_path / "resumed" / "metrics.jsonl")) == 2
    ours, theirs = weights(tmp_path / "resumed" / "model"), weights(tmp_path / "unbroken" / "model")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.skipif(obstacle("cpu") is not None, reason="inductor has no compiler here")
def test_inductor_makes_two_graphs_that_compute_what_eager_does(smallest_model, monkeypatch):
    from torch._inductor.compile_fx import compile_fx

    made = []
    monkeypatch.setattr(compilation, "BACKEND", lambda *args, **kw: made.append(1) or compile_fx(*args, **kw))
    policy = load_policy(str(smallest_model), channels_last=True)
    plain = load_policy(str(smallest_model))
    policy.compile("unet")
    # two graphs kept at once, other batch sizes and timesteps
    for count in (5, 2):
        latents = torch.randn(count, 1, 8, 8)
        gradients = []
        for each in (policy, plain):
            with torch.no_grad():
                each.model_output(latents, 3)
            first, second = each.model_output(latents, 7), each.model_output(latents, torch.tensor(500))
            (first.square().mean() + second.square().mean()).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in each.unet.parameters()]))
        # fp32, in another order of sums
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert len(made) == 2
