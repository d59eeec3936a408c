"""compute.auto_tune: the fastest choice, kept by a resume; and the seconds of `hrf plan`, by hand."""

import pytest
import torch

from hrf_fast.cli import main
from hrf_fast.config.load import load_config
from hrf_fast.memory.planner import plan
from hrf_fast.timing import calls, tuning
from hrf_fast.timing.rates import Rate, seconds_line, stated
from tests.flow_models import load_flow_policy
from tests.loading import load_policy
from tests.runs import assert_equal_training, train, with_folder

pytestmark = pytest.mark.long


def test_the_fastest_threads_and_format_are_chosen_and_all_is_put_back(tiny_model, monkeypatch):
    policy, seen = load_policy(str(tiny_model)), []

    def once(call):
        key = torch.get_num_threads(), policy.network.channels_last
        seen.append(key)
        call()
        return {(1, False): 4.0, (1, True): 3.0, (2, False): 1.0, (2, True): 2.0}[key]

    monkeypatch.setattr(calls, "_once", once)
    assert calls.fastest(policy, sampled=2, trained=2, threads=[1, 2])[:2] == (2, False)
    # in turns: a round has both calls under every choice
    assert seen[:8:2] == seen[1:8:2] == [(1, False), (1, True), (2, False), (2, True)]
    assert torch.get_num_threads() == 1 and not policy.network.channels_last
    assert policy.unet.conv_in.weight.is_contiguous()


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_channels_last_is_not_tried_for_a_transformer(kind):
    threads, last, line = calls.fastest(load_flow_policy(kind), sampled=2, trained=2, threads=[1])
    assert (threads, last) == (1, False) and "measured 1 threads" in line and "threads channels_last" not in line


def test_a_tuned_run_has_its_choice_in_its_config_and_a_resume_measures_nothing(tiny_run, tmp_path, monkeypatch):
    asked = []

    def fastest(policy, **sizes):
        asked.append(sizes)
        return 1, True, "chosen"

    monkeypatch.setattr(tuning, "fastest", fastest)
    words = [*tiny_run, "compute.auto_tune=true", "evaluation.every=0"]
    for iterations in (1, 2):
        train(with_folder(words, tmp_path / "tuned", f"train.iterations={iterations}"))
    # groups of 3, a group and a step to a call
    assert [(sizes["sampled"], sizes["trained"]) for sizes in asked] == [(3, 3)]
    compute = load_config(["--config", str(tmp_path / "tuned" / "config.yaml")]).compute
    assert (compute.threads, compute.channels_last, compute.auto_tune) == (1, True, False)
    by_hand = ["compute.threads=1", "compute.channels_last=true", "evaluation.every=0"]
    train(with_folder([*tiny_run, *by_hand], tmp_path / "by hand"))
    assert_equal_training(tmp_path / "tuned", tmp_path / "by hand")


@pytest.mark.parametrize("option", ["compute.threads=2", "compute.channels_last=true"])
def test_what_is_tuned_is_not_set_by_hand(tiny_run, option):
    with pytest.raises(ValueError, match=option.replace("=true", " is True").replace("=", " is ")):
        load_config([*tiny_run, "compute.auto_tune=true", option])


def test_several_ranks_are_not_tuned(tiny_run, monkeypatch):
    monkeypatch.setattr("hrf_fast.timing.tuning.comm.world_size", lambda: 2)
    with pytest.raises(ValueError, match="compute.auto_tune is true but there are 2 ranks"):
        tuning.tuned(load_config([*tiny_run, "compute.auto_tune=true"]), None)


# --- seconds of a plan ------------------------------------------------------------------------------------------------


def test_seconds_by_hand(tiny_run, not_measured):
    # two groups of 3 over 6 steps of a rollout and 5 that are replayed: 66 forwards and 30 backwards an iteration
    words = [*tiny_run, "window.schedule=full", "train.iterations=10"]
    made = plan(load_config(words), gpus=1, memory=10**9)
    line = seconds_line(made, Rate(0.5, 1.5, "by hand"), 630)
    # 66/2 + 30 * 1.5; ten of them; 630 evaluations are five iterations of 66 + 2 * 30
    assert (
        "(by hand; replay; 1 devices): 78 an iteration, 780 for 10 iterations (0.22 h), 390 for 630 evaluations" in line
    )
    # a budget of 252 evaluations is spent after two iterations
    short = plan(load_config([*words, "stop.max_evaluations=252"]), gpus=1, memory=10**9)
    assert "156 for 2 iterations" in seconds_line(short, Rate(0.5, 1.5, "by hand"))
    # 126 evaluations at 63 a second
    assert " 2 an iteration" in seconds_line(made, stated(63.0))
    # 30 forwards are made again in backwards: 15 s more, and no evaluation more, so 252 are two iterations still
    words += ["compute.activations=checkpoint", "stop.max_evaluations=252"]
    again = plan(load_config(words), gpus=1, memory=10**9)
    line = seconds_line(again, Rate(0.5, 1.5, "by hand"))
    assert "checkpoint; 1 devices): 93 an iteration, 186 for 2 iterations" in line
    assert " 2 an iteration" in seconds_line(again, stated(63.0))


def test_the_command_invents_no_rate(tiny_run, not_measured, capsys):
    words = ["plan", "--memory", "8GB", *tiny_run]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "seconds: no rate is known" in out and "an iteration" not in out
    assert main([*words, "--measure"]) == 0
    assert "measured here (CPU, 1 threads) on calls of 3 and 3 images" in capsys.readouterr().out
    assert main([*words, "--rate", "-1"]) == 1 and "--rate is -1.0" in capsys.readouterr().err


def test_seconds_are_measured_with_the_threads_of_the_run(tiny_run, not_measured, capsys, monkeypatch):
    threads = []
    monkeypatch.setattr(tuning.torch, "set_num_threads", threads.append)
    assert main(["plan", "--memory", "8GB", *tiny_run, "compute.threads=2", "--measure"]) == 0
    assert threads == [2] and "measured here" in capsys.readouterr().out
