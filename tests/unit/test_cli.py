"""The commands that do not train, through main()."""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file

from hrf_fast import cli
from hrf_fast.arguments import make_parsers
from hrf_fast.cli import main
from hrf_fast.command import run_command
from hrf_fast.config.load import load_config, to_yaml
from hrf_fast.errors import Interrupted
from hrf_fast.windows.base import SCHEDULES
from tests.conftest import tiny_words
from tests.runs import panels, weights


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """The folder of a run that has finished."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *tiny_words(tiny_model, run)]) == 0
    return run


def test_train_help_lists_every_option(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "train.clip_range=0.0001" in out and "--config FILE" in out


def test_every_option_of_a_command_says_what_it_is_and_its_default():
    for name, command in make_parsers(cli.COMMANDS)[1].items():
        # the options of training are those of the configuration
        for action in command._actions if name != "train" else ():
            assert action.help, (name, action.dest)
            if action.default and action.default != argparse.SUPPRESS:
                assert f"(default: {action.default})" in " ".join(command.format_help().split())


@pytest.mark.parametrize(
    "words",
    [
        ["train.group_size=4", "--gpus", "8", "train.iterations=3", "--memory", "80GB", "run.seed=2"],
        ["--memory", "80GB", "train.group_size=4", "train.iterations=3", "--gpus=8", "run.seed=2"],
        ["--gpus", "8", "--memory", "80GB", "train.group_size=4", "train.iterations=3", "run.seed=2"],
    ],
)
def test_options_of_a_plan_stand_anywhere_among_its_words(words, monkeypatch, capsys):
    def plan(config, *, gpus, memory):
        return f"{config.train.group_size} {config.train.iterations} {config.run.seed} {gpus} {memory}"

    monkeypatch.setattr("hrf_fast.memory.planner.plan", plan)
    monkeypatch.setattr("hrf_fast.memory.table.plan_page", lambda text: text)
    assert main(["plan", *words]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"4 3 2 8 {80 * 10**9}"


def test_options_of_other_commands_stand_anywhere_too(monkeypatch, capsys):
    monkeypatch.setattr("hrf_fast.report.page.summary_lines", lambda runs, names: [str(run) for run in runs])
    monkeypatch.setattr("hrf_fast.report.page.write_report", lambda runs, out, names: out)
    assert main(["report", "one", "--out", "page.html", "two"]) == 0
    assert capsys.readouterr().out.split() == ["one", "two", "page.html"]
    with pytest.raises(SystemExit):
        main(["report", "--out", "page.html"])
    assert "required: runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("hrf ev", ["evaluate "]),
        ("hrf train compute.prec", ["compute.precision="]),
        ("hrf train compute.precision=", ["fp32", "bf16", "fp16"]),
        ("hrf train --config a.yaml compute.deterministic=f", ["false "]),
        ("hrf plan --memory 8GB train.iter", ["train.iterations="]),
        ("hrf sample fashion --sch", ["--scheduler "]),
    ],
)
def test_a_shell_is_told_what_may_follow(line, words, tmp_path):
    pytest.importorskip("argcomplete")
    # as the function of register-python-argcomplete asks; it cuts words at the equals sign, as bash does
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": ","}
    asked |= {"_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:", "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out")}
    code = "import sys; from hrf_fast.cli import main; main()"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, check=True)
    assert (tmp_path / "out").read_text().split(",") == words


def test_schedules_are_listed_with_their_options(capsys):
    assert main(["schedules"]) == 0
    out = capsys.readouterr().out
    assert "    iterations_per_cluster (int, default 35): how long one is used.\n" in out
    assert all(f"\n{name}\n" in f"\n{out}" for name in [*SCHEDULES, "module:function"])
    assert "stop (" not in out and "num_inference_steps (" not in out
    # every option has its words
    assert [line for line in out.splitlines() if line.startswith("    ") and line.endswith(": ")] == []


def test_rewards_are_listed_with_arguments_and_needs(capsys):
    assert main(["rewards"]) == 0
    out = capsys.readouterr().out
    for name in ("jpeg_compressibility", "jpeg_incompressibility", "aesthetic", "classifier", "module:function"):
        assert name in out
    assert "quality" in out and "transformers" in out


def test_sample_writes_a_grid_of_a_folder(tiny_model, tmp_path, capsys):
    out = tmp_path / "grids" / "g.png"
    assert main(["sample", str(tiny_model), "--out", str(out), "--count", "4", "--steps", "3"]) == 0
    # four images of 16 pixels, two by two, enlarged four times
    assert Image.open(out).size == (128, 128)
    assert "4 images" in capsys.readouterr().out


def test_sample_names_a_file_that_is_no_picture_and_one_that_can_not_be_written(
    tiny_model, tmp_path, capsys, monkeypatch
):
    words = ["sample", str(tiny_model), "--count", "1", "--steps", "2", "--out"]
    assert main([*words, str(tmp_path / "grid.xyz")]) == 1
    assert f"{tmp_path / 'grid.xyz'} is no name of a picture" in capsys.readouterr().err
    # before anything is drawn
    monkeypatch.setattr("hrf_fast.commands.sample.Panel.images", lambda *_, **__: pytest.fail("drawn"))
    assert main(["sample", str(tiny_model), "--out", str(tmp_path / "grid")]) == 1
    assert "is no name of a picture" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    assert main([*words, str(tmp_path / "file" / "grid.png")]) == 1
    assert f"{tmp_path / 'file' / 'grid.png'} can't be written: " in capsys.readouterr().err


def test_sample_refuses_a_count_of_zero(tiny_model, capsys):
    assert main(["sample", str(tiny_model), "--count", "0"]) == 1
    assert "--count is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fashion", "--noise-level=0.7"], "--noise-level is 0.7, but the sampler is ddim, whose noise scale is --eta"),
        (["RUN", "--noise-level=0.7"], "--noise-level is 0.7, but the sampler is ddim"),
        (["RUN/checkpoints/iteration-000002", "--noise-level=0.7"], "--noise-level is 0.7, but the sampler is ddim"),
        (["fashion-flow", "--scheduler=cps", "--eta=1"], "--eta is 1, but the sampler is cps"),
        (["fashion", "--guidance=0.5"], "sample.guidance_scale is 0.5; it must be at least 1"),
    ],
)
def test_sample_refuses_a_noise_scale_that_would_do_nothing_and_guidance_below_1(
    finished, tmp_path, capsys, words, message
):
    model, *options = (word.replace("RUN", str(finished)) for word in words)
    out = tmp_path / "x.png"
    assert main(["sample", model, *options, "--count=1", "--steps=2", "--out", str(out)]) == 1
    assert message in capsys.readouterr().err and not out.exists()


def test_a_run_is_evaluated_and_reported(finished, capsys):
    assert main(["evaluate", str(finished), "evaluation.panel_size=8"]) == 0
    header, reward, below, written = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["metric", "pretrained", "tuned"] and reward.startswith("reward  ")
    assert "more metrics: --all" in below and written == f"written to {finished / 'evaluation.json'}"
    assert main(["report", str(finished)]) == 0
    result = json.loads((finished / "evaluation.json").read_text())
    assert len(result["tuned"]["rewards"]) == 8
    value, low, high = result["pretrained"]["reward"]
    assert low <= value <= high
    assert value == pytest.approx(sum(result["pretrained"]["rewards"]) / 8, abs=1e-6)
    # the training's panel is the first part of a larger one: the same images, the same rewards
    first = panels(finished)[0]
    assert result["pretrained"]["rewards"][:6] == pytest.approx(first["rewards"], abs=1e-3)


def test_eight_images_are_too_few_for_neighbours_and_enough_for_shares(finished, capsys):
    assert main(["evaluate", str(finished), "evaluation.panel_size=8", "evaluation.network=fashion"]) == 0
    assert "metrics of neighbours, which need 12 images, are left out" in capsys.readouterr().out
    result = json.loads((finished / "evaluation.json").read_text())
    assert "detail" not in result["tuned"] and len(result["tuned"]["kept"]["vendi"]) == 3
    (kept, _, _), scores = (
        result["tuned"]["kept"]["vendi"],
        [result[one]["vendi"][0] for one in ("tuned", "pretrained")],
    )
    assert kept == pytest.approx(scores[0] / scores[1]) != 1


def test_a_run_its_model_and_its_last_checkpoint_draw_the_same_grid(finished, tmp_path, capsys):
    checkpoint = finished / "checkpoints" / "iteration-000002"
    # the folder of the model has a run's sampler only in the run
    for model, name in ((finished, "run.png"), (checkpoint, "checkpoint.png"), (finished / "model", "model.png")):
        assert main(["sample", str(model), "--out", str(tmp_path / name), "--count", "2"]) == 0
    run, *others = ((tmp_path / f"{name}.png").read_bytes() for name in ("run", "checkpoint", "model"))
    assert others == [run, run]
    steps = load_config(["--config", str(finished / "config.yaml")]).sample.num_inference_steps
    assert f"model in {steps} steps" in capsys.readouterr().out


def test_a_checkpoint_is_exported_as_a_folder_that_diffusers_loads(finished, tmp_path):
    for iteration in (1, 2):
        checkpoint = finished / "checkpoints" / f"iteration-00000{iteration}"
        assert main(["export", str(checkpoint), "--out", str(tmp_path / str(iteration))]) == 0
        exported, saved = weights(tmp_path / str(iteration)), load_file(checkpoint / "weights.safetensors")
        assert all(torch.equal(saved[f"unet.{name}"], value) for name, value in exported.items())
        pipeline = DDPMPipeline.from_pretrained(tmp_path / str(iteration))
        assert torch.equal(pipeline.unet.conv_in.weight, saved["unet.conv_in.weight"])
    first, last, tuned = weights(tmp_path / "1"), weights(tmp_path / "2"), weights(finished)
    assert all(torch.equal(last[name], tuned[name]) for name in tuned)
    assert any(not torch.equal(first[name], tuned[name]) for name in tuned)


def test_a_run_that_was_trained_by_what_only_cuda_has_is_drawn_and_exported_on_a_cpu(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    config = load_config(["--config", str(run / "config.yaml")])
    config.compute.deterministic, config.compute.attention, config.compute.precision = False, "xformers", "fp16"
    (run / "config.yaml").write_text(to_yaml(config))
    assert main(["sample", str(run), "--out", str(tmp_path / "s.png"), "--count", "2", "--device", "cpu"]) == 0
    assert main(["export", str(run / "checkpoints" / "iteration-000002"), "--out", str(tmp_path / "out")]) == 0
    assert all(torch.equal(value, weights(finished)[name]) for name, value in weights(tmp_path / "out").items())


def test_a_run_is_exported_as_its_tuned_model(finished, tmp_path):
    for model, out in ((finished, tmp_path / "of_run"), (finished / "model", tmp_path / "of_model")):
        assert main(["export", str(model), "--out", str(out)]) == 0
        names = ("unet/diffusion_pytorch_model.safetensors", "README.md")
        assert all((out / name).read_bytes() == (finished / "model" / name).read_bytes() for name in names)


def test_what_is_no_checkpoint_is_not_exported_and_nothing_is_written_over(finished, tmp_path, capsys):
    out = str(tmp_path / "out")
    for folder in (finished / "checkpoints" / "iteration-000009", tmp_path / "nowhere"):
        assert main(["export", str(folder), "--out", out]) == 1
        assert f"{folder} is no checkpoint" in capsys.readouterr().err
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(finished / "config.yaml", unfinished)
    assert main(["export", str(unfinished), "--out", out]) == 1
    assert f"{unfinished} has no model/ yet" in capsys.readouterr().err
    (shutil.copytree(finished, tmp_path / "run") / "blend" / "model").mkdir(parents=True)
    assert main(["export", str(tmp_path / "run" / "blend"), "--out", out]) == 1
    assert "is a blend" in capsys.readouterr().err
    checkpoint = str(finished / "checkpoints" / "iteration-000002")
    (tmp_path / "out").mkdir()
    assert main(["export", checkpoint, "--out", out]) == 1
    assert f"--out is {out}" in capsys.readouterr().err


def test_weights_of_another_architecture_are_not_put_into_the_model(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    config = load_config(["--config", str(run / "config.yaml")])
    config.model.name = "fashion"
    (run / "config.yaml").write_text(to_yaml(config))
    # a run from before its base model was remembered
    (run / "sources.json").unlink()
    checkpoint = run / "checkpoints" / "iteration-000002"
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "weights.safetensors" in err and "model.name" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "missing"), [("evaluate", "model"), ("blend", "run"), ("serve-reward", "reward")])
def test_only_what_is_needed_is_said_to_be_missing(command, missing, capsys):
    with pytest.raises(SystemExit):
        main([command])
    assert f"arguments are required: {missing}\n" in capsys.readouterr().err


def test_evaluate_wants_a_finished_run(finished, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 1
    assert f"{tmp_path} is not a run folder" in capsys.readouterr().err
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "model")
    assert main(["evaluate", str(run)]) == 1
    assert f"{run} has no model/" in capsys.readouterr().err
    # one that has gone on since
    run = shutil.copytree(finished, tmp_path / "extended")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    done = len(lines)
    more = json.dumps({**json.loads(lines[-1]), "iteration": done})
    (run / "metrics.jsonl").write_text("\n".join([*lines, more]) + "\n")
    assert main(["evaluate", str(run)]) == 1
    assert f"has gone on to iteration {done + 1} since its model/ was saved after {done};" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("evaluate", "model.name=fashion"),
        ("evaluate", "model.variant=fp16"),
        ("evaluate", "lora.rank=2"),
        ("blend", "lora.rank=2"),
    ],
)
def test_another_model_than_the_runs_is_refused_before_anything_is_loaded(finished, capsys, monkeypatch, command, word):
    monkeypatch.setattr("hrf_fast.commands.runs.build_policy", lambda *_: pytest.fail("loaded"))
    assert main([command, str(finished), word]) == 1
    option, _, value = word.partition("=")
    error = capsys.readouterr().err
    assert option in error and value in error and f"the tuned model of {finished} is of " in error
    assert f"leave {option} out" in error


@pytest.mark.parametrize("command", ["evaluate", "blend"])
@pytest.mark.parametrize(
    "word",
    ["train.iterations=7", "evaluation.every=3", "run.folder=elsewhere", "stop.patience=2", "compute.compile=unet"],
)
def test_an_option_of_training_alone_is_refused_where_nothing_trains(finished, capsys, monkeypatch, command, word):
    monkeypatch.setattr("hrf_fast.commands.runs.build_policy", lambda *_: pytest.fail("loaded"))
    assert main([command, str(finished), word]) == 1
    option = word.partition("=")[0]
    assert f"{option} would change nothing here, since nothing is trained" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "blend"])
def test_an_option_of_training_that_another_asks_for_is_taken(finished, tmp_path, monkeypatch, command):
    run = shutil.copytree(finished, tmp_path / "run")
    config = load_config(["--config", str(run / "config.yaml")])
    config.remedies.reference_penalty, config.remedies.reference_steps = 0.1, 6
    (run / "config.yaml").write_text(to_yaml(config))

    def loaded(*_):
        raise ValueError("loaded")

    monkeypatch.setattr(f"hrf_fast.commands.{command}.build_config_reward", loaded)
    monkeypatch.setattr(f"hrf_fast.commands.{command}.build_panel", loaded)
    words = ["sample.num_inference_steps=5", "remedies.reference_steps=5"]
    function = importlib.import_module(f"hrf_fast.commands.{command}")
    arguments = {"keep": 0.9, "most": 1, "step": 1} if command == "blend" else {}
    with pytest.raises(ValueError, match="loaded"):
        getattr(function, command)(run, words, **arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "100", "--target-evaluations", "-5"], "--target-evaluations is -5; use a finite number above 0"),
        (["--rate", "100", "--target-evaluations", "nan"], "--target-evaluations is nan"),
        (["--target-evaluations", "900"], "--target-evaluations 900 asks for seconds, which need a rate"),
        (["--memory", "9" * 400 + "GB"], "--memory is a number of 402 digits"),
    ],
)
def test_a_plan_refuses_what_it_could_not_count(words, message, capsys):
    assert main(["plan", "--memory", "80GB", *words]) == 1
    assert message in capsys.readouterr().err


def test_an_error_is_one_line_and_the_traceback_is_there_on_request(capsys, monkeypatch):
    def fail():
        raise ValueError("x is 3; use 4")

    assert cli.run_command(fail) == 1
    assert capsys.readouterr().err == "error: x is 3; use 4\n"
    monkeypatch.setenv("HRF_TRACEBACK", "1")
    assert cli.run_command(fail) == 1
    assert "Traceback" in capsys.readouterr().err


def test_memory_that_does_not_suffice_is_one_line_with_what_takes_less(capsys):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    assert cli.run_command(fail) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. Less is taken by smaller calls")
    assert "compute.images_per_call" in error and "hrf plan" in error and "HRF_TRACEBACK=1" in hint
    # a fault of the program's own is not dressed up
    with pytest.raises(RuntimeError, match="shapes"):
        cli.run_command(lambda: (_ for _ in ()).throw(RuntimeError("shapes do not match")))


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--version"]) == 0 and main(["rewards"]) == 0


def test_the_broken_pipe_of_a_command_to_another_process_is_an_error(capfd):
    def command():
        raise BrokenPipeError(32, "Broken pipe")

    assert run_command(command) == 1
    print("still read")
    output, errors = capfd.readouterr()
    assert output == "still read\n" and "Broken pipe" in errors


@pytest.mark.parametrize("words", [["train", "--help"], ["doctor", "--help"], ["--version"], [], ["rewards"]])
def test_an_output_that_nobody_reads_ends_a_command_without_a_word(words):
    code = "import sys; from hrf_fast.cli import main; sys.stdin.read(); sys.exit(main(sys.argv[1:]))"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # buffered, the error comes when the interpreter ends
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", code, *words], **pipes, text=True, env=env) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_programming_error_keeps_its_traceback():
    def fail():
        raise AttributeError("a bug")

    with pytest.raises(AttributeError):
        cli.run_command(fail)


@pytest.mark.parametrize(
    ("stop", "code"),
    [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGINT), 130), (Interrupted(signal.SIGTERM), 143)],
)
def test_a_signal_exits_with_128_and_its_number(stop, code, capsys):
    def interrupt():
        raise stop

    assert cli.run_command(interrupt, cli.RESUMES) == code
    assert cli.RESUMES in capsys.readouterr().err
