"""Compilation: few graphs whatever a run does, the same weights' names, and a refusal where it can't work."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.debugging import aot_eager

from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.policies import compilation
from hrf_fast.policies.base import Condition
from hrf_fast.policies.compilation import canonical, obstacle
from hrf_fast.policies.network import Network
from hrf_fast.policies.normalisation import HalfGroupNorm
from hrf_fast.run.files import read_log
from hrf_fast.train import train
from hrf_fast.training.compile_graphs import compile_graphs
from tests.conftest import make_scheduler, make_smallest_unet
from tests.loading import load_policy

COMPILE_SIZES = "hrf_fast.training.compile_graphs.compile_sizes"

pytestmark = pytest.mark.long

# a graph with gradient and one without, for each of conv-in to conv-out, or of down, mid and up
PARTS = {"unet": 1, "blocks": 3}


@pytest.fixture(scope="module")
def smallest_model(tmp_path_factory):
    """A UNet of one block down and one up, so that tracing it takes a second."""
    from diffusers import DDPMPipeline

    folder = tmp_path_factory.mktemp("models") / "smallest"
    DDPMPipeline(make_smallest_unet(1, 8), make_scheduler("DDPMScheduler")).save_pretrained(folder)
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
        "compute.images_per_call": 6,
        "window.schedule": "random",
        "train.iterations": 2,
        "train.groups_per_iteration": 2,
        "train.group_size": 3,
        "optimizer.learning_rate": 1e-3,
        "optimizer.kwargs.eps": 0.01,
        "evaluation.panel_size": 8,
        "run.progress": "json",
        "run.folder": folder,
        **options,
    }
    return [f"{name}={value}" for name, value in values.items()]


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(("ranks", "single"), [(1, False), (8, True)])
def test_the_last_call_of_a_rank_s_share_of_a_panel_has_its_graph(smallest_model, tmp_path, monkeypatch, ranks, single):
    monkeypatch.setattr(compilation, "obstacle", lambda device_type: None)
    options = {"compute.images_per_call": 5, "train.group_size": 5, "evaluation.panel_size": 128}
    _, components = build_components(load_config(words(smallest_model, tmp_path / "run", **options)))
    components.policy.compiled = "unet"
    made = []
    monkeypatch.setattr(COMPILE_SIZES, lambda policy, sizes, *_, **__: made.extend(sizes))
    # 128 images leave three for the last call, a share of 16 leaves one
    groups = replace(components.groups, ranks=ranks, per_iteration=2 * ranks)
    compile_graphs(replace(components, groups=groups), print)
    assert (1 in made) == single


@pytest.mark.parametrize("mode", ["unet", pytest.param("blocks", marks=pytest.mark.slow)])
def test_a_run_of_many_window_lengths_steps_and_batches_compiles_its_graphs_once(
    mode, smallest_model, tmp_path, graphs, capsys
):
    options = {"compute.compile": mode, "compute.channels_last": True}
    train(load_config(words(smallest_model, tmp_path / "compiled", **options)))
    notes = capsys.readouterr().out
    assert notes.index("compiling, which can take minutes") < notes.index("graphs for any batch took")
    assert notes.index("graphs for any batch took") < notes.index("self-check")
    # with and without gradient; windows of several lengths, rollouts of 3 and 6, replays of one and two steps of
    # 3, a panel of 6 and 2
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


@pytest.fixture
def deterministic():
    """The mode of CUDA's `compute.deterministic`, which is one of the things that torch holds a graph to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("mode", "activations"),
    [("unet", "replay"), pytest.param("blocks", "checkpoint", marks=pytest.mark.slow)],
)
def test_an_update_in_deterministic_mode_compiles_nothing_again(
    mode, activations, smallest_model, tmp_path, graphs, deterministic, monkeypatch
):
    made = []
    monkeypatch.setattr(
        "hrf_fast.train.compile_graphs", lambda *args: (compile_graphs(*args), made.append(len(graphs)))
    )
    options = {"compute.compile": mode, "compute.activations": activations, "train.iterations": 1}
    train(load_config(words(smallest_model, tmp_path / "run", **options)))
    assert made == [len(graphs)] and made[0] >= 2


def test_graphs_are_kept_over_several_forwards_and_batches_of_one_are_one_more_graph(smallest_model, graphs):
    policy, plain = load_policy(str(smallest_model)), load_policy(str(smallest_model))
    policy.compile("unet")
    for count in (2, 5, 1):
        latents = torch.randn(count, 1, 8, 8)
        gradients = []
        for each in (policy, plain):
            steps = [7, 20, torch.tensor(3), torch.arange(count)]
            outputs = [each.predict(latents, step, Condition()).model_output for step in steps]
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


@pytest.mark.parametrize("lean", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_half_precision_compiles_to_one_graph_with_the_gradient_of_eager(smallest_model, monkeypatch, lean):
    made = []
    monkeypatch.setattr(compilation, "BACKEND", lambda *inputs: made.append(1) or aot_eager(*inputs))
    gradients = []
    for mode in ("none", "unet"):
        policy = load_policy(str(smallest_model), precision="bf16", channels_last=True)
        for module in policy.unet.modules():
            if isinstance(module, HalfGroupNorm):
                module.lean = lean
        if mode != "none":
            policy.compile(mode)
        for count in (2, 3):
            latents = torch.linspace(-1, 1, count * 64).reshape(count, 1, 8, 8)
            policy.predict(latents, 10, Condition()).model_output.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.unet.parameters()]))
    assert torch.equal(*gradients) and len(made) == 1


def test_norms_of_channels_last_compile_to_one_graph_with_the_gradient_of_eager(tiny_model, monkeypatch):
    made = []
    monkeypatch.setattr(compilation, "BACKEND", lambda *inputs: made.append(1) or aot_eager(*inputs))
    gradients = []
    for mode in ("none", "unet"):
        policy = load_policy(str(tiny_model))
        policy.network = Network(policy.unet, "bf16", channels_last=True, call=policy.network.call, device="cuda")
        policy._with_gradient = policy.network
        if mode != "none":
            policy.compile(mode)
        for count in (2, 3):
            latents = torch.linspace(-1, 1, count * 768).reshape(count, 3, 16, 16)
            policy.predict(latents, 10, Condition()).model_output.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.unet.parameters()]))
    assert len(made) == 1 and (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()


@pytest.mark.slow
def test_activations_checkpoint_has_the_gradient_of_eager_in_the_real_tracer(smallest_model, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    gradients, saved = [], []
    for mode, checkpoint in (("none", False), ("blocks", False), ("blocks", True)):
        policy = load_policy(str(smallest_model))
        policy.compile(mode)
        if checkpoint:
            policy.network.checkpoint_activations()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):  # noqa: B023
            output = policy.predict(torch.ones(3, 1, 8, 8), 10, Condition()).model_output
        output.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.unet.parameters()]))
        saved.append(sum(kept))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-5, atol=1e-6)
    assert saved[2] < saved[1]


def test_compiling_leaves_no_gradient_and_no_count(smallest_model, graphs, tmp_path):
    _, components = build_components(load_config(words(smallest_model, tmp_path, **{"compute.compile": "unet"})))
    compile_graphs(components, lambda note: None)
    assert len(graphs) == 2
    assert all(parameter.grad is None for parameter in components.policy.unet.parameters())
    assert components.policy.calls.batches == 0


def test_a_model_that_does_not_compile_is_refused_before_training(smallest_model, graphs, tmp_path, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compilation, "BACKEND", backend)
    with pytest.raises(ValueError, match="compute.compile is 'unet'.*no such instruction"):
        train(load_config(words(smallest_model, tmp_path / "run", **{"compute.compile": "unet"})))


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        # groups of 3, two of them, and a panel of 8
        ({}, [3]),
        ({"compute.images_per_call": 6}, [6]),
        # pieces of 2 and 1
        ({"compute.images_per_call": 2}, [2, 1]),
        # one anchor
        ({"train.groups_per_iteration": 1}, [3, 1]),
        # 65 images are sampled as 64 and 1
        ({"evaluation.panel_size": 65}, [3, 1]),
    ],
)
def test_batches_of_one_are_compiled_where_a_split_of_the_run_leaves_one(
    options, sizes, smallest_model, tmp_path, graphs, monkeypatch
):
    options = {"compute.images_per_call": 0, "compute.compile": "unet", **options}
    _, components = build_components(load_config(words(smallest_model, tmp_path, **options)))
    compiled = []
    monkeypatch.setattr(COMPILE_SIZES, lambda policy, sizes, *_, **__: compiled.extend(sizes))
    compile_graphs(components, lambda note: None)
    assert compiled == sizes


def test_inputs_of_any_strides_and_timesteps_of_any_form_become_one():
    for count in (1, 4):
        latents = torch.zeros(count, 8, 8)[:, None].as_strided((count, 1, 8, 8), (64, 1, 8, 1))
        for timesteps in (9, torch.tensor(9), torch.tensor([9]), torch.full((count,), 9)):
            x, t = canonical(latents, timesteps)
            assert x.stride() == (64, 64, 8, 1)
            assert t.stride() == (1,) and t.dtype == torch.int64 and t.tolist() == [9] * count


def test_another_way_of_compiling_is_another_run(smallest_model, graphs, tmp_path):
    options = {"train.iterations": 1}
    train(load_config(words(smallest_model, tmp_path / "run", **options)))
    for option, value in (("compile", "blocks"), ("channels_last", "true")):
        more = {"train.iterations": 2, f"compute.{option}": value}
        with pytest.raises(ValueError, match=f"compute.{option} was"):
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
                each.predict(latents, 3, Condition())
            first, second = (each.predict(latents, step, Condition()).model_output for step in (7, torch.tensor(20)))
            (first.square().mean() + second.square().mean()).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in each.unet.parameters()]))
        # fp32, in another order of sums
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert len(made) == 2
