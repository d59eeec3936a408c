"""Optimizers by name: what each is, what it refuses, and that its state comes back from a checkpoint bit for bit."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from hrf_fast.assembly.components import build_components
from hrf_fast.config.load import load_config
from hrf_fast.config.options import OptimizerConfig
from hrf_fast.engines import optimizers
from hrf_fast.engines.optimizers import build_optimizer
from hrf_fast.engines.plain import PlainEngine
from hrf_fast.engines.zero import DeepSpeedEngine
from hrf_fast.run.checkpoint import load_newest, save_checkpoint
from tests.conftest import make_policy

CPU = torch.device("cpu")


def build(name, parameters=None, device=CPU):
    parameters = [nn.Parameter(torch.ones(3))] if parameters is None else list(parameters)
    options = OptimizerConfig(name=name, kwargs={"betas": (0.9, 0.99)}, weight_decay=0.5)
    return build_optimizer(options, parameters, device=device)


class Fake8bit(torch.optim.Optimizer):
    """Keeps state as bitsandbytes does: uint8 moments, one quantisation map for all, an int step, nested for FSDP."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.qmap = torch.linspace(-1, 1, 256)

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state |= {"step": 0, "state1": torch.zeros_like(parameter, dtype=torch.uint8), "qmap1": self.qmap}
            state["step"] += 1
            state["state1"] += (parameter.grad.abs() * 10).to(torch.uint8)
            parameter -= self.param_groups[0]["lr"] * state["qmap1"][state["state1"].long()] * state["step"]

    def state_dict(self):
        whole = super().state_dict()
        nested = {i: {"step": e["step"], "wrapped": {**e}} for i, e in whole["state"].items()}
        return {**whole, "state": nested}


@pytest.fixture
def bitsandbytes(monkeypatch):
    module = ModuleType("bitsandbytes")
    module.__version__, module.optim = "9.9", SimpleNamespace(AdamW8bit=Fake8bit, PagedAdamW8bit=Fake8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name)
    return module


@pytest.mark.parametrize("name", ["adamw", "fused_adamw"])
def test_torchs_adamw_has_the_options_and_does_the_arithmetic(name):
    # first step of AdamW: w·(1 − lr·decay) − lr·g/(|g| + eps) = 1·(1 − 0.1·0.5) − 0.1 = 0.85
    weight = nn.Parameter(torch.ones(3))
    optimizer = build(name, [weight])
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.0, (0.9, 0.99), 0.5)
    assert bool(group["fused"]) == (name == "fused_adamw")
    group["lr"], weight.grad = 0.1, torch.full((3,), 4.0)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.85] * 3, rel=1e-6)


def test_adamw_is_fused_where_all_weights_are_on_cuda_and_stay_there(monkeypatch):
    made = []
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **settings: made.append(settings["fused"]))
    for places, fuses in (([True, True], True), ([True, False], True), ([True, True], False)):
        parameters = [SimpleNamespace(is_cuda=place) for place in places]
        build_optimizer(OptimizerConfig(), parameters, device=CPU, fuses=fuses)
    assert made == [True, None, None]


@pytest.mark.parametrize(
    ("zero", "fuses"),
    [
        ({"stage": 0}, True),
        ({"stage": 3, "offload_optimizer": {"device": "none"}}, True),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, False),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, False),
    ],
)
def test_zero_asks_for_the_fused_form_but_with_offload(monkeypatch, zero, fuses):
    class Built(Exception):
        pass

    def stop(*_, **settings):
        raise Built(settings["fuses"])

    monkeypatch.setattr("hrf_fast.engines.zero.import_deepspeed", lambda device: None)
    monkeypatch.setattr("hrf_fast.engines.zero.build_optimizer", stop)
    with pytest.raises(Built) as built:
        DeepSpeedEngine(nn.Linear(2, 2), {"zero_optimization": zero}, OptimizerConfig())
    assert built.value.args == (fuses,)


def test_the_engine_steps_with_the_optimizer_of_the_configuration(tiny_run):
    words = ["optimizer.name=fused_adamw", "optimizer.weight_decay=0.25", "optimizer.kwargs={betas: [0.5, 0.75]}"]
    _, components = build_components(load_config([*tiny_run, *words]))
    (group,) = components.engine.optimizer.param_groups
    assert group["fused"] is True and group["weight_decay"] == 0.25
    assert (group["betas"], group["eps"]) == ((0.5, 0.75), 1e-8)


def train_one_step(policy, optimizer, seed):
    torch.manual_seed(seed)
    for parameter in policy.unet.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step()


def assert_resumes_exactly(name, folder):
    policy, resumed = make_policy(), make_policy(seed=1)
    options = OptimizerConfig(name=name, weight_decay=0.5, kwargs={"betas": (0.9, 0.99)}, max_grad_norm=0.0)
    engine, again = PlainEngine(policy.network, options), PlainEngine(resumed.network, options)
    optimizer, other = engine.optimizer, again.optimizer
    train_one_step(policy, optimizer, 0)
    save_checkpoint(folder, engine, {"iteration": 1}, keep=1)
    load_newest(folder, again, warn=pytest.fail)
    for seed in (1, 2):
        train_one_step(policy, optimizer, seed)
        train_one_step(resumed, other, seed)
    for a, b in zip(policy.unet.parameters(), resumed.unet.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == other.state[b].keys()
        for key, value in optimizer.state[a].items():
            found = other.state[b][key]
            assert type(value) is type(found) and torch.equal(torch.as_tensor(value), torch.as_tensor(found)), key


@pytest.mark.parametrize("name", ["adamw", "fused_adamw"])
def test_the_state_resumes_exactly(name, tmp_path):
    assert_resumes_exactly(name, tmp_path)


def test_a_fused_optimizer_stays_fused_behind_a_checkpoint_of_one_that_was_not(tmp_path):
    policies = make_policy(), make_policy(seed=1)
    plain, fused = (
        PlainEngine(policy.network, OptimizerConfig(name=name, weight_decay=0.5, max_grad_norm=0.0))
        for policy, name in zip(policies, ("adamw", "fused_adamw"), strict=True)
    )
    train_one_step(policies[0], plain.optimizer, 0)
    save_checkpoint(tmp_path, plain, {"iteration": 1}, keep=1)
    load_newest(tmp_path, fused, warn=pytest.fail)
    assert fused.optimizer.param_groups[0]["fused"] is True
    train_one_step(policies[1], fused.optimizer, 1)


def test_8_bit_state_resumes_exactly(bitsandbytes, tmp_path):
    assert_resumes_exactly("adamw_8bit", tmp_path)


def test_the_real_8_bit_state_resumes_exactly(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert_resumes_exactly("adamw_8bit", tmp_path)


def test_an_unknown_optimizer_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="optimizer.name is 'adam_8bit'.*'adamw_8bit'"):
        build("adam_8bit")
    with pytest.raises(ValueError, match="optimizer.name is 'sgd'"):
        load_config(["optimizer.name=sgd"])


@pytest.mark.parametrize(
    ("name", "package"),
    [("adamw_8bit", "bitsandbytes"), ("paged_adamw_8bit", "bitsandbytes"), ("cpu_adam", "deepspeed")],
)
def test_a_missing_package_says_how_to_install_it(monkeypatch, name, package):
    monkeypatch.setattr(optimizers, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=rf"{name}.*hrf_fast\[gpu\].*{package}"):
        build(name, [], device=torch.device("cuda"))


def test_paging_is_refused_where_there_is_no_cuda(bitsandbytes):
    with pytest.raises(ValueError, match="paged_adamw_8bit.* cpu"):
        build("paged_adamw_8bit")


def test_a_bitsandbytes_that_can_t_step_here_is_refused_before_anything_runs(bitsandbytes, monkeypatch):
    def step(self):
        raise NotImplementedError("no CPU backend")

    monkeypatch.setattr(Fake8bit, "step", step)
    with pytest.raises(ValueError, match="adamw_8bit.*bitsandbytes 9.9.* cpu .*no CPU backend"):
        build("adamw_8bit")


def test_cpu_adam_is_for_weights_that_zero_offloads(tmp_path):
    with pytest.raises(ValueError, match="cpu_adam.*engine.deepspeed is null"):
        load_config(["optimizer.name=cpu_adam"])
    path = tmp_path / "zero.json"
    words = ["optimizer.name=cpu_adam", f"engine.deepspeed={path}"]
    with pytest.raises(ValueError, match="zero.json': no such file"):
        load_config(words)
    for offload in ({}, {"offload_optimizer": {"device": "none"}}):
        path.write_text(json.dumps({"zero_optimization": {"stage": 2, **offload}}))
        with pytest.raises(ValueError, match="cpu_adam.*zero.json.*offload_optimizer"):
            load_config(words)
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}))
    assert load_config(words).optimizer.name == "cpu_adam"


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_state_is_not_sharded(tmp_path, name):
    path = tmp_path / "zero.json"
    words = [f"optimizer.name={name}", f"engine.deepspeed={path}"]
    path.write_text('{"zero_optimization": {"stage": 1}}')
    with pytest.raises(ValueError, match=f"'{name}'.*zero.json"):
        load_config(words)
    path.write_text('{"zero_optimization": {"stage": 0}}')
    assert load_config(words).optimizer.name == name


def test_a_cpu_adam_that_does_not_compile_says_what_it_needs(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("failed to build/load") from RuntimeError("Ninja is required")

    adam = ModuleType("deepspeed.ops.adam")
    adam.DeepSpeedCPUAdam = fail
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name)
    for name, module in (("deepspeed", ModuleType("deepspeed")), ("deepspeed.ops", ModuleType("deepspeed.ops"))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", adam)
    with pytest.raises(ValueError, match="cpu_adam.*Ninja is required"):
        build("cpu_adam")


def test_frozen_weights_are_not_the_optimizers():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    engine = PlainEngine(model, OptimizerConfig(name="fused_adamw"))
    assert [len(group["params"]) for group in engine.optimizer.param_groups] == [1]
