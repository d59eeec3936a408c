"""The drift of the ratio after an iteration's last step: what it is, and that a wrecked model ends its run."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from hrf_fast.training.calls import CallPlan
from hrf_fast.training.drift import check_drift, policy_drift
from hrf_fast.training.groups import Groups
from hrf_fast.training.optimizer_step import replay_ratios
from hrf_fast.training.rollout import rollout
from hrf_fast.windows.base import Window
from tests.conftest import make_group, make_policy
from tests.runs import metrics, panels, train

pytestmark = pytest.mark.long


def test_a_gentle_step_drifts_a_little_and_no_step_not_at_all(tiny_run, tmp_path):
    train([*tiny_run, "evaluation.every=0"])
    drifts = [record["drift"] for record in metrics(tmp_path / "run")]
    assert all(1e-7 < drift < 1e-2 for drift in drifts)
    # equal rewards have advantages of 0: the weights, without decay, stay as they are
    words = ["optimizer.weight_decay=0", "train.iterations=1", f"run.folder={tmp_path / 'still'}"]
    train([*tiny_run, *words], reward=lambda images, prompts=None: [1.0] * len(images))
    assert metrics(tmp_path / "still")[0]["drift"] == 0


def test_the_drift_is_not_counted_as_training(tiny_run, tmp_path):
    # T 6, the last step is deterministic: 2 groups of 3 roll out 6 steps and train 5
    train([*tiny_run, "window.schedule=full", "train.iterations=1"])
    record = metrics(tmp_path / "run")[0]
    assert (record["forwards"], record["backwards"]) == (2 * 3 * (6 + 5), 2 * 3 * 5)


def test_a_step_that_wrecks_the_model_ends_the_run_before_the_next_panel(tiny_run, tmp_path):
    # a random model has nothing to wreck
    words = ["model.name=fashion", "evaluation.network=none", "evaluation.panel_size=2"]
    words = [*tiny_run, *words, "optimizer.learning_rate=0.1", "train.iterations=3", "evaluation.every=0"]
    with pytest.raises(FloatingPointError, match=r"iteration [01]: .*stop\.max_drift is 4.*learning_rate"):
        train(words)
    # nothing of that iteration is kept, and no panel had to show it
    assert len(panels(tmp_path / "run")) == 1 and not (tmp_path / "run" / "model").exists()
    assert all(record["drift"] <= 4 for record in metrics(tmp_path / "run"))
    # whoever wants to see it may
    train([*words, "stop.max_drift=0", "stop.on_nan=skip", "train.iterations=2"])
    assert max(record["drift"] for record in metrics(tmp_path / "run")) > 4


def test_the_drift_is_that_of_one_step_whatever_shares_its_call(tiny_run, tmp_path):
    drifts = []
    for images in (0, 2, 100):
        words = [f"compute.images_per_call={images}", "train.order=collect", f"run.folder={tmp_path / str(images)}"]
        train([*tiny_run, *words, "window.schedule=full", "train.iterations=1", "evaluation.every=0"])
        drifts.append(metrics(tmp_path / str(images))[0]["drift"])
    assert drifts == pytest.approx([drifts[0]] * 3, rel=1e-2)


def test_the_drift_is_the_largest_of_the_samples_of_the_step_in_the_middle():
    policy = make_policy()
    group = make_group(policy, Window(1, 5), size=3)
    plan = CallPlan(3)
    rolled_out = rollout(policy, [group], plan)
    with torch.no_grad():
        for weight in policy.network.parameters():
            weight.add_(0.01)
    parts = SimpleNamespace(
        groups=Groups(1, 3, 1), policy=policy, engine=SimpleNamespace(gathered=nullcontext), call_plan=plan
    )
    drift = policy_drift(parts, rolled_out, [group.window], 0)
    # steps 1 to 4: the third
    by_step = [
        replay_ratios(policy, rolled_out.trajectories, plan.replay({0: Window(step, step + 1)})).log().abs()
        for step in range(1, 5)
    ]
    assert drift == pytest.approx(float(by_step[2].max()), rel=1e-5)
    others = [float(by_step[step].max()) for step in (0, 1, 3)] + [float(by_step[2].mean())]
    assert all(drift != pytest.approx(other, rel=1e-3) for other in others)


@pytest.mark.parametrize(("drift", "limit", "raises"), [(0.2, 0.1, True), (0.1, 0.1, False), (9.0, 0.0, False)])
def test_the_limit_by_hand(drift, limit, raises):
    if raises:
        with pytest.raises(FloatingPointError):
            check_drift(drift, limit, 0)
    else:
        check_drift(drift, limit, 0)
    with pytest.raises(FloatingPointError, match="inf"):
        check_drift(float("inf"), 0.1, 0)
