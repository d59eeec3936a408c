"""The toys' arithmetic by hand, an MLP behind the trainer's protocol, and the smallest comparison."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import hrf_fast
from benchmarks import toy_modes
from benchmarks.toy_modes import chosen_rates, compare, read_lines
from benchmarks.toys.arms import LEARNING_RATES, STEPS
from benchmarks.toys.experiment import arm_config, run
from benchmarks.toys.mixtures import TOYS, effective_modes, images_of, modes_kept, points_of
from benchmarks.toys.policy import Mlp, PointFeatures, policy_of
from benchmarks.toys.results import path_of, write_report
from hrf_fast.assembly.components import build_components
from hrf_fast.cli import main
from hrf_fast.config.load import load_config
from hrf_fast.distributed import comm
from hrf_fast.train import train_components


def test_reward_and_shares_by_hand():
    toy = TOYS["equal"]
    # on a peak, a peak's width away from it, and a mode that is 0.25 of its peak's 1.25 from there
    points = torch.stack([1.25 * toy.centres[0], 1.5 * toy.centres[0], toy.centres[0], torch.zeros(2)])
    expected = [1.0, torch.tensor(-0.5).exp(), torch.tensor(-0.5).exp(), torch.tensor(-12.5).exp()]
    torch.testing.assert_close(toy.reward(images_of(points)), torch.tensor(expected))
    # the origin is 1 from every mode
    assert toy.shares(points).tolist() == [0.75, 0, 0, 0, 0]


def test_good_modes_of_the_unequal_toy_are_every_second_and_the_rare_centre():
    toy = TOYS["unequal"]
    assert toy.good.tolist() == [0, 2, 4, 6, 8]
    assert float(toy.weights[8] / toy.weights[0]) == pytest.approx(0.1)


def test_points_become_images_and_points_again():
    points = torch.tensor([[0.5, -1.5], [3.0, 0.0]])
    assert images_of(points).shape == (2, 3, 1, 1)
    assert points_of(images_of(points)).tolist() == [[0.5, -1.5], [2.0, 0.0]]


def test_modes_are_counted_against_what_they_were():
    before = torch.tensor([0.4, 0.4, 0.1])
    assert modes_kept(before, torch.tensor([0.8, 0.1, 0.024])) == 2
    assert effective_modes(torch.tensor([0.2, 0.2, 0.0])) == pytest.approx(2)
    assert effective_modes(torch.zeros(3)) == 0


def test_expected_noise_is_the_mean_of_drawn_noise():
    toy, alpha = TOYS["equal"], torch.tensor(0.3)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400_000, 2, generator=generator)
    noised = alpha.sqrt() * toy.draw(len(noise), generator) + (1 - alpha).sqrt() * noise
    at = torch.tensor([0.6, 0.1])
    near = (noised - at).norm(dim=1) < 0.1
    expected = toy.expected_noise(at[None], alpha[None, None])[0]
    # some 4000 draws, whose mean is known to 0.01
    torch.testing.assert_close(noise[near].mean(0), expected, atol=0.05, rtol=0)


def test_features_of_points_know_how_far_these_are():
    features = PointFeatures(width=0.3, count=2000).features(images_of(torch.tensor([[0.0, 0.0], [0.3, 0.0]])))
    cosine = torch.nn.functional.cosine_similarity(features[0], features[1], dim=0)
    # a Gaussian kernel at one width: exp(−1/2) = 0.607
    assert float(cosine) == pytest.approx(0.607, abs=0.03)


@pytest.mark.parametrize("arm", ["DDPO + penalty", "DDPO + novelty", "HRF-D"])
def test_an_arm_runs_through_the_trainers_loop(arm):
    config = arm_config(arm)
    config = replace(config, stop=replace(config.stop, max_evaluations=15_000))
    panels = run(TOYS["equal"], Mlp(), config, seed=0, learning_rate=1e-3)
    assert panels[0]["evaluations"] == 0 and panels[-1]["evaluations"] >= 15_000
    assert panels[0]["reward"] != panels[-1]["reward"] and len(panels[0]["shares"]) == 5


def test_a_policy_of_ones_own_is_trained_and_its_reference_stays():
    mlp = Mlp()
    policy = policy_of(mlp, num_inference_steps=STEPS)
    config, components = build_components(
        arm_config("DDPO + penalty"), reward=TOYS["equal"].reward, policy=policy, network=PointFeatures()
    )
    assert components.policy is policy and config.model.name == "toy"
    assert components.panel.network.name == "points"
    with torch.no_grad():
        next(policy.network.parameters()).add_(1)
    latents = torch.ones(4, 2)
    expected = mlp(latents, int(policy.sampler.timesteps[3]))[0]
    torch.testing.assert_close(policy.reference(latents, 3, policy.condition([None] * 4)), expected)


def test_a_command_refuses_a_run_of_a_policy_of_ones_own(tmp_path, capsys):
    run, mlp = tmp_path / "run", Mlp()
    words = [f"sample.num_inference_steps={STEPS}", "model.name=fashion", "run.device=cpu", f"run.folder={run}"]
    words += ["train.group_size=2", "train.iterations=1", "evaluation.panel_size=2", "window.schedule=full"]

    def train(iterations):
        config = load_config([*words, f"train.iterations={iterations}"])
        with comm.job(config.run.lost_after):
            policy, network = policy_of(mlp, num_inference_steps=STEPS), PointFeatures()
            toy = TOYS["equal"]
            return train_components(*build_components(config, reward=toy.reward, policy=policy, network=network))

    train(1)
    # the one that model.name labels it by would be compared instead
    for command in (["evaluate", str(run)], ["sample", str(run)], ["blend", str(run)]):
        assert main(command) == 1
        assert "a policy of your own, benchmarks.toys.policy:" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is a run of a policy of your own"):
        hrf_fast.train(load_config([*words, "train.iterations=2"]), reward=TOYS["equal"].reward)
    # with its policy it goes on
    assert train(2).reason == "train.iterations is 2"


@pytest.mark.parametrize(
    "word",
    [
        *("sample.num_inference_steps=9", "sample.guidance_scale=2", "compute.precision=bf16", "lora.rank=4"),
        *("sample.eta=0.3", "compute.channels_last=True", "model.image_size=512", "compute.offload=True"),
        "compute.auto_tune=true",
    ],
)
def test_options_that_contradict_the_policy_that_was_given_are_refused(word, tmp_path):
    option, value = word.split("=")
    words = [f"sample.num_inference_steps={STEPS}", f"run.folder={tmp_path}", "run.device=cpu", word]
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        build_components(load_config(words), policy=policy_of(Mlp(), num_inference_steps=STEPS))


def test_a_network_that_can_not_checkpoint_activations_is_refused_by_name(tmp_path):
    words = [f"sample.num_inference_steps={STEPS}", f"run.folder={tmp_path}", "run.device=cpu"]
    config = load_config([*words, "compute.activations=checkpoint"])
    with pytest.raises(ValueError, match="Mlp has no enable_gradient_checkpointing.*use keep or replay"):
        build_components(config, reward=TOYS["equal"].reward, policy=policy_of(Mlp(), num_inference_steps=STEPS))


def test_components_train_one_run(tmp_path):
    words = [f"sample.num_inference_steps={STEPS}", f"run.folder={tmp_path / 'run'}", "run.device=cpu"]
    words += ["train.group_size=2", "train.iterations=1", "evaluation.panel_size=2", "window.schedule=full"]
    config = load_config(words)
    with comm.job(config.run.lost_after):
        policy, network = policy_of(Mlp(), num_inference_steps=STEPS), PointFeatures()
        parts = build_components(config, reward=TOYS["equal"].reward, policy=policy, network=network)
        train_components(*parts)
        # its thread for rewards has ended, and would be waited for
        with pytest.raises(ValueError, match="a run has ended with these components.*build_components"):
            train_components(*parts)


def test_a_policy_that_lacks_a_part_of_the_protocol_is_refused_by_name(tmp_path):
    policy = policy_of(Mlp(), num_inference_steps=STEPS)
    parts = {name: getattr(policy, name) for name in dir(policy) if not name.startswith("_")}
    del parts["has_unconditional_branch"], parts["decode"]
    words = [f"sample.num_inference_steps={STEPS}", f"run.folder={tmp_path}", "run.device=cpu"]
    with pytest.raises(ValueError, match="lacks decode, has_unconditional_branch; policies/base.py"):
        build_components(load_config(words), policy=SimpleNamespace(**parts))


def line(arm="DDPO", rate=1e-3, end=0.5, share=0.2, **keys):
    panels = [
        {"evaluations": 0, "reward": 0.2, "shares": [0.2, 0.2]},
        {"evaluations": 9, "reward": end, "shares": [0.2, share]},
    ]
    common = {"toy": "equal", "arm": arm, "seed": 0, "learning_rate": rate, "tuning": False, "good": [0, 1]}
    return {**common, "panels": panels, **keys}


def test_a_rate_counts_with_the_panels_that_keep_the_modes():
    # the second gains more and loses a mode; its way crosses the floor before it has gained 0.3
    lines = [line(rate=1e-3, end=0.5, tuning=True), line(rate=2e-3, end=0.7, share=0.0, tuning=True)]
    assert chosen_rates(lines) == {"DDPO": 1e-3}
    assert path_of(lines[1])[-1].kept == pytest.approx(0.5)


def test_runs_of_other_options_or_another_rate_are_neither_chosen_by_nor_reported(tmp_path):
    options = toy_modes._options("DDPO")
    tuning = [line(rate=rate, end=end, tuning=True) for rate, end in ((1e-3, 0.5), (2e-3, 0.4))]
    compared = [line(seed=seed, end=0.4 + 0.1 * seed, options=options) for seed in (0, 1)]
    # of options of before, then of a rate that was chosen before; both come last
    others = [line(rate=2e-3, end=0.9, tuning=True, options="before"), line(seed=1, end=0.9, options="before")]
    others += [line(seed=seed, rate=2e-3, end=0.9) for seed in (0, 1, 2)]
    others += [line(seed=seed, rate=2e-3, end=0.9, toy="unequal") for seed in (0, 1)]
    pages = []
    for lines in ([*tuning, *compared], [*tuning, *compared, *others]):
        (tmp_path / "toy_modes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        read = read_lines(tmp_path / "toy_modes.jsonl")
        assert chosen_rates(read) == {"DDPO": 1e-3}
        pages.append((write_report(read, tmp_path), (tmp_path / "toy_modes.png").read_bytes()))
    assert "| DDPO | 0.001 | 0.45 " in pages[0][0] and pages[0] == pages[1]


def test_a_comparison_goes_on_where_it_stopped_and_is_reported(tmp_path, monkeypatch):
    calls = []

    def fake_run(toy, mlp, config, *, seed, learning_rate):
        calls.append((seed, learning_rate))
        return line(end=0.4 + 0.01 * seed + learning_rate)["panels"]

    monkeypatch.setattr(toy_modes, "run", fake_run)
    monkeypatch.setattr(toy_modes, "pretrain", lambda toy: None)
    monkeypatch.setitem(TOYS, "equal", replace(TOYS["equal"], heights=torch.ones(2)))
    compare(tmp_path, seeds=2, arms=["DDPO", "random"], toys=["equal"])
    made = len(calls)
    assert made == 2 * len(LEARNING_RATES) + 2 * 2
    compare(tmp_path, seeds=2, arms=["DDPO", "random"], toys=["equal"])
    assert len(calls) == made
    lines = read_lines(tmp_path / "toy_modes.jsonl")
    assert {one["learning_rate"] for one in lines if not one["tuning"]} == {max(LEARNING_RATES)}
    with (tmp_path / "toy_modes.jsonl").open("a") as file:
        file.write(json.dumps(lines[0])[:40])
    page = write_report(read_lines(tmp_path / "toy_modes.jsonl"), tmp_path)
    assert "| random | 0.0024 |" in page and (tmp_path / "toy_modes.png").read_bytes()[:4] == b"\x89PNG"
    # what is half-written takes no run with it
    compare(tmp_path, seeds=3, arms=["DDPO", "random"], toys=["equal"])
    assert len(read_lines(tmp_path / "toy_modes.jsonl")) == len(calls) == made + 2
