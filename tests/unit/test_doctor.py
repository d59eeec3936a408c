import json
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from hrf_fast import cpu, doctor
from hrf_fast.cli import main

OPS = {"cpu_adam": [False, True], "fused_adam": [True, True], "async_io": [False, False]}


@pytest.fixture(autouse=True)
def ops(monkeypatch, request):
    """What DeepSpeed's process answers; importing it takes seconds."""
    answer = SimpleNamespace(returncode=0, stdout=f"a log line\n{json.dumps(OPS)}\n", stderr="")
    if "real" not in request.node.name:
        monkeypatch.setattr(doctor, "subprocess", SimpleNamespace(run=lambda *_, **__: answer))
    return answer


def table():
    """{name: what was found} of the examination, after a look at its alignment."""
    lines = doctor.examine().splitlines()
    column = len(max(lines, key=lambda line: len(line.split("  ")[0])).split("  ")[0]) + 2
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)
    return {line[:column].strip(): line[column:] for line in lines}


def no_package(name):
    raise PackageNotFoundError(name)


def gpus(*devices, cuda="12.8", hip=None):
    """A torch that sees `devices`, (name, major compute capability)."""
    properties = [SimpleNamespace(name=name, major=major, total_memory=80 * 2**30) for name, major in devices]
    return SimpleNamespace(
        __version__="9.9",
        version=SimpleNamespace(cuda=cuda, hip=hip),
        cuda=SimpleNamespace(
            is_available=lambda: bool(devices),
            device_count=lambda: len(devices),
            get_device_properties=properties.__getitem__,
        ),
        backends=SimpleNamespace(cpu=SimpleNamespace(get_cpu_capability=lambda: "AVX2")),
        get_num_threads=lambda: 3,
    )


def test_the_command_prints_what_is_there(capsys):
    import torch

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"ok {torch.__version__}" in out and "GiB free" in out
    found = table()
    assert found["diffusers"].startswith("ok ") and found["training"].startswith("ok on ")
    assert set(doctor.INSTALL) | {"GPU", "launcher", "model fashion", "hub cache"} <= set(found)


def test_missing_packages_name_their_extra(monkeypatch):
    monkeypatch.setattr(doctor, "version", no_package)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = table()
    assert found["triton"] == found["xformers"] == 'missing: pip install "hrf_fast[gpu]"'
    assert found["transformers"] == 'missing: pip install "transformers>=5.4"'
    assert found["wandb"] == found["tensorboard"] == 'missing: pip install "hrf_fast[writers]"'
    assert found["launcher"] == 'missing: pip install "hrf_fast[gpu]" brings `deepspeed`'


def test_an_installed_package_that_can_t_be_found_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "1.2")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    found = table()
    assert found["wandb"] == "broken: 1.2 is installed but can't be imported; pip install --force-reinstall wandb"
    assert found["torch"] == found["GPU"] == found["training"] == 'missing: pip install "torch>=2.8"'


def test_triton_and_xformers_need_a_gpu_to_be_of_use(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "1.2")
    monkeypatch.setattr(doctor, "find_spec", lambda name: name)
    monkeypatch.setattr(doctor, "_import_torch", gpus)
    found = table()
    assert found["triton"].startswith("ok 1.2, but no GPU: its kernels run in the interpreter only")
    assert found["xformers"] == "ok 1.2, but no GPU: it has no CPU operators"
    assert found["GPU"].startswith("none: torch sees no GPU; check the driver")
    monkeypatch.setattr(doctor, "_import_torch", lambda: gpus(("H100", 9), ("T4", 7)))
    found = table()
    assert found["triton"] == found["xformers"] == found["deepspeed"] == "ok 1.2"
    assert found["GPU"] == "ok cuda:0 H100 80 GiB bf16, cuda:1 T4 80 GiB no bf16"
    assert found["torch"] == "ok 9.9 (CUDA 12.8 build; on CPU 3 threads, AVX2)"
    assert found["training"] == "ok on cuda, the device of run.device=auto"
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "diffusers" else name)
    assert table()["training"] == "no: diffusers is missing"


def test_a_rocm_build_and_a_cpu_build_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "_import_torch", lambda: gpus(("MI300X", 9), cuda=None, hip="6.2"))
    assert "ROCm 6.2 build" in table()["torch"] and table()["GPU"].endswith("MI300X 80 GiB bf16")
    monkeypatch.setattr(doctor, "_import_torch", lambda: gpus(cuda=None))
    assert "(CPU build" in table()["torch"] and "this torch is a CPU build" in table()["GPU"]


def test_the_launcher_on_and_off_the_path(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "1.2")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert table()["launcher"] == "missing: `deepspeed` is installed but not on PATH; activate its environment"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    assert table()["launcher"] == "ok: `deepspeed` is on PATH"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx512_bf16 amx_bf16", "ok avx512_bf16, amx_bf16"),
        ("fpu avx2", "no avx512_bf16 or amx_bf16: compute.precision=bf16 is emulated"),
    ],
)
def test_bf16_of_the_cpu_is_read_from_its_flags(monkeypatch, tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(cpu, "CPU_FLAGS", tmp_path / "cpuinfo")
    assert table()["CPU bf16"] == expected


@pytest.mark.parametrize(
    ("flags", "precision", "device", "said"),
    [
        ("fpu avx2", "bf16", "cpu", True),
        ("fpu avx512_bf16", "bf16", "cpu", False),
        ("fpu avx2", "fp32", "cpu", False),
        ("fpu avx2", "bf16", "cuda", False),
    ],
)
def test_a_run_says_that_its_cpu_emulates_bf16(monkeypatch, tmp_path, flags, precision, device, said):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(cpu, "CPU_FLAGS", tmp_path / "cpuinfo")
    assert ("compute.precision=fp32" in cpu.emulation_note(precision, device)) == said


def test_memory_in_gib(monkeypatch):
    memory = SimpleNamespace(total=16 * 2**30, available=2**29)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    assert table()["memory"] == "16.0 GiB, 0.5 GiB free"


def test_a_system_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "CPU_FLAGS", tmp_path / "none")
    assert table()["CPU bf16"].startswith("unknown")


def test_shipped_models(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ASSETS", tmp_path)
    (tmp_path / "fashion" / "model" / "unet").mkdir(parents=True)
    (tmp_path / "fashion" / "model" / "unet" / "weights.safetensors").touch()
    assert table()["model fashion"] == "missing: its classifier and reference images; reinstall hrf_fast"
    (tmp_path / "fashion" / "classifier").mkdir()
    (tmp_path / "fashion" / "classifier" / "model.safetensors").touch()
    (tmp_path / "fashion" / "reference.safetensors").touch()
    assert table()["model fashion"] == "ok model, classifier, reference images"


def test_the_hub_cache_is_found_and_no_variable_s_value_is_shown(monkeypatch, tmp_path):
    for name in doctor.HUB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    assert table()["hub cache"] == "empty: ~/.cache/huggingface/hub is made by the first download"
    (tmp_path / ".cache" / "huggingface" / "hub" / "models--a--b").mkdir(parents=True)
    assert table()["hub cache"] == "ok 1 models in ~/.cache/huggingface/hub"
    (tmp_path / "secret" / "hub").mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "secret"))
    assert table()["hub cache"] == "ok 0 models in the folder that HF_HOME sets"
    assert "secret" not in doctor.examine() and "sesame" not in doctor.examine()


def test_it_never_raises_and_does_not_quote_errors(monkeypatch):
    def fail(*_):
        raise RuntimeError("token hf_sesame")

    for name in ("version", "find_spec", "_import_torch"):
        monkeypatch.setattr(doctor, name, fail)
    for module, name in ((doctor.platform, "platform"), (doctor.shutil, "disk_usage"), (doctor.shutil, "which")):
        monkeypatch.setattr(module, name, fail)
    found = table()
    assert {found[name] for name in ("platform", "disk", "torch", "wandb", "launcher", "training")} == {
        "unknown: RuntimeError while looking"
    }
    assert "sesame" not in doctor.examine()


def test_deepspeeds_ops_are_told_apart(monkeypatch, ops):
    monkeypatch.setattr(doctor, "version", lambda name: "1.2")
    monkeypatch.setattr(doctor, "find_spec", lambda name: name)
    monkeypatch.setattr(doctor, "_import_torch", gpus)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    listed = "built: fused_adam; compiled on first use: cpu_adam; not on this machine: async_io"
    assert table()["deepspeed ops"] == f"ok; {listed}"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert table()["deepspeed ops"] == f"no compiler: g++ and ninja not on PATH; {listed}"
    ops.returncode, ops.stderr = 1, "Traceback\nImportError: token hf_sesame\n"
    assert table()["deepspeed ops"] == "broken: importing deepspeed fails with ImportError"


def test_what_optimizer_attention_and_kernels_can_be(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: name)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor, "version", lambda name: "1.2")
    monkeypatch.setattr(doctor, "_import_torch", lambda: gpus(("H100", 9)))
    found = table()
    assert found["optimizers"] == "ok adamw, fused_adamw, cpu_adam (with ZeRO offload), adamw_8bit, paged_adamw_8bit"
    assert found["attention"] == "ok sdpa, xformers" and found["kernels"] == "ok triton by itself: a GPU and Triton"
    monkeypatch.setattr(doctor, "_import_torch", gpus)
    found = table()
    assert found["optimizers"].endswith("adamw_8bit (slow on CPU); paged_adamw_8bit needs bitsandbytes, GPU")
    assert found["attention"] == "ok sdpa; xformers needs a GPU"
    assert found["kernels"] == "ok eager by itself: tensors are on cpu"
    monkeypatch.setattr(doctor, "version", no_package)
    found = table()
    assert found["optimizers"].startswith(
        "ok adamw, fused_adamw; cpu_adam needs deepspeed, g++, ninja; adamw_8bit needs"
    )
    assert found["attention"] == "ok sdpa; xformers needs its package and a GPU"
    assert found["deepspeed ops"] == found["deepspeed"] == 'missing: pip install "hrf_fast[gpu]"'


def test_the_real_deepspeed_answers_without_compiling():
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    assert "cpu_adam" in doctor._deepspeed_ops()
