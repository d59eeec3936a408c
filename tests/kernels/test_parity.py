"""The trainer on the Triton kernels: the golden numbers of the authors' code, the update's invariants, a whole run.

The tests of other files run again here, with "auto" meaning "triton".
"""

import json

import pytest
import torch

import hrf_fast.policies.denoiser
import hrf_kernels
from hrf_fast.train import main
from hrf_kernels import fused
from tests.parity.test_golden import (  # noqa: F401
    test_loss_and_every_gradient,
    test_mean_sigma_and_log_prob_of_every_window_step,
    test_the_tolerance_rejects_a_gradient_that_is_one_percent_off,
)
from tests.runs import metrics, weights
from tests.unit.test_optimizer_step import (  # noqa: F401
    test_a_clipped_sample_has_no_gradient,
    test_a_moved_policy_has_another_ratio,
    test_a_step_moves_the_log_prob_of_good_samples_up,
    test_groups_of_one_optimizer_step_are_averaged,
    test_on_policy_stats_are_those_of_ratio_one,
    test_on_policy_the_gradient_is_minus_advantage_times_that_of_the_log_prob,
    test_replaying_a_fresh_trajectory_gives_ratio_one_to_the_bit,
    test_the_advantage_clip_scales_with_the_window,
    test_the_clip_range_scales_with_the_window,
    test_the_gradient_does_not_depend_on_how_forwards_are_split,
)

# of two iterations, relative: latents differ by some 1e-6 between the backends, the losses of a group cancel, and Adam
# takes the sign of small gradients (measured: 7e-5 of a metric, 5e-4 of the weights' change)
METRIC_TOLERANCE, WEIGHT_TOLERANCE = 1e-3, 5e-3


@pytest.fixture(autouse=True)
def triton_ran(monkeypatch):
    """ "auto" means "triton", and the test launches its kernels."""
    choose, launch, launches = hrf_kernels.choose_backend, fused.launch, []

    def choose_triton(backend, device):
        return choose("triton" if backend == "auto" else backend, device)

    def count(kernel, *args, **kwargs):
        launches.append(kernel)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(hrf_kernels, "choose_backend", choose_triton)
    monkeypatch.setattr(hrf_fast.policies.denoiser, "choose_backend", choose_triton)
    monkeypatch.setattr(fused, "launch", count)
    yield
    assert launches


def flat(run):
    tensors = weights(run)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)]).double()


@pytest.mark.slow
def test_a_run_on_triton_is_the_run_on_eager(tiny_run, tiny_model, tmp_path, capsys, monkeypatch):
    logs, changes = {}, {}
    for kernels in ("eager", "triton"):
        folder = tmp_path / kernels
        monkeypatch.setenv("HRF_KERNELS", kernels)
        assert main([*tiny_run, f"run.folder={folder}", "evaluation.every=0"]) == 0
        notes = [json.loads(line).get("note", "") for line in capsys.readouterr().out.splitlines()]
        assert any(f"{kernels} kernels: " in note and "|ratio - 1| 0," in note for note in notes)
        logs[kernels] = metrics(folder)
        changes[kernels] = flat(folder) - flat(tiny_model)
    assert len(logs["eager"]) == len(logs["triton"]) == 2
    for ours, theirs in zip(logs["triton"], logs["eager"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=METRIC_TOLERANCE), name
    change = changes["eager"].norm()
    assert change > 0 and (changes["triton"] - changes["eager"]).norm() <= WEIGHT_TOLERANCE * change
