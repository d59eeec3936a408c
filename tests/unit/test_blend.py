"""Blends: weights on the line and beyond, the choice above a floor, stops and reruns, and what is refused."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from hrf_fast.cli import main
from hrf_fast.commands.blend import _claim_blend, blend
from hrf_fast.commands.runs import model_of_run
from hrf_fast.config.load import load_config
from hrf_fast.evaluation import blend as blends
from hrf_fast.evaluation.blend import WeightLine, blend_lines, check_pretrained, choose, read_front, steps_to, summary
from hrf_fast.policies.lora import add_adapters, merged
from tests.conftest import make_policy, make_unet, tiny_words
from tests.runs import train, weights
from tests.text_models import load_text_policy, text_model

pytestmark = pytest.mark.long

REWARD = "tests.unit.test_blend:brightness"
UNET = "model/unet/diffusion_pytorch_model.safetensors"


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def run_words(model, folder, *more):
    return [
        *tiny_words(model, folder),
        f"reward.name={REWARD}",
        "train.iterations=1",
        "evaluation.panel_size=4",
        "evaluation.network=fashion",
        "optimizer.learning_rate=1e-6",
        "window.schedule=random",
        *more,
    ]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    torch.set_num_threads(1)
    """A run whose tuned model differs from the pretrained one in a bias, so that it draws brighter images."""
    folder = tmp_path_factory.mktemp("blend") / "run"
    train(run_words(tiny_model, folder))
    tuned = weights(tiny_model)
    # of the predicted noise: less of it is more of the image
    tuned["conv_out.bias"] -= 0.05
    save_file(tuned, folder / UNET)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


# --- weights ----------------------------------------------------------------------------------------------------------


def test_the_line_goes_through_both_models_to_the_bit_and_on():
    tuned, pretrained = make_policy(seed=1).network, make_policy(seed=0).network
    line = WeightLine(tuned, pretrained)
    ends = [{name: w.detach().clone() for name, w in network.named_parameters()} for network in (pretrained, tuned)]
    for alpha, place in ((0.0, 0), (1.0, 1), (0.0, 0)):
        line.move(alpha)
        assert all(torch.equal(weight, ends[place][name]) for name, weight in tuned.named_parameters())
    line.move(1.5)
    for name, weight in tuned.named_parameters():
        torch.testing.assert_close(weight, ends[0][name] + 1.5 * (ends[1][name] - ends[0][name]))


def test_adapters_are_scaled():
    unet, base = make_unet().eval(), make_unet()
    add_adapters(unet, rank=2, targets=["to_q", "conv1"], init="kaiming")
    for weight in unet.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    whole = merged(unet).state_dict()
    line = WeightLine(unet, None)
    for alpha in (0.0, 0.5, 1.0, 2.0):
        line.move(alpha)
        now = merged(unet).state_dict()
        for name, weight in base.state_dict().items():
            torch.testing.assert_close(now[name], weight + alpha * (whole[name] - weight))


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match="model.name has another architecture"):
        WeightLine(make_policy().network, load_text_policy("sd1").network)


# --- the choice -------------------------------------------------------------------------------------------------------


def record(alpha, reward, vendi, seed=3):
    return {
        "alpha": alpha,
        "seed": seed,
        "reward": [reward] * 3,
        "vendi": [vendi] * 3,
        "rewards": [reward - 1, reward + 1],
    }


def test_the_highest_reward_above_the_floor_is_chosen_by_hand():
    # shares 1, .97, .95, .90
    front = [record(0, 1.0, 20), record(0.5, 2.0, 19.4), record(1, 3.0, 19), record(2, 4.0, 18)]
    assert [choose(front, keep)["alpha"] for keep in (0.9, 0.95, 0.96, 0.98)] == [2, 1, 0.5, 0]
    # Inception Scores 1, 1, .9, .8
    for line, inception in zip(front, (5.0, 5.0, 4.5, 4.0), strict=True):
        line["inception"] = [inception] * 3
    assert [choose(front, 0.9, quality)["alpha"] for quality in (0, 0.8, 0.9, 0.95, 1)] == [2, 2, 1, 0.5, 0.5]
    assert summary(front[2], front[0])["inception_share"] == 0.9
    figures = summary(front[2], front[0])
    assert figures["gain"] == [2, 2, 2] and figures["share"] == 0.95 and "rewards" not in figures


def test_a_choice_at_the_end_of_the_range_and_one_that_was_chance_are_said():
    def lines(alpha, gain):
        ends = [
            summary(record(0, 1.0, 20), record(0, 1.0, 20)),
            summary(record(alpha, 1.0 + gain, 20), record(0, 1.0, 20)),
        ]
        return " ".join(blend_lines({"alpha": alpha, "most": 2.0, "keep": 0.9, "quality": 0.0, "panels": ends}))

    assert "largest alpha that was tried" in lines(2.0, 0.5) and "chance" not in lines(2.0, 0.5)
    assert "gains nothing" in lines(1.5, -0.1) and "largest" not in lines(1.5, -0.1)
    assert "is saved" not in lines(1.5, 0.1)


def test_a_run_may_have_the_name_of_a_folder_in_runs(copy, tmp_path):
    for name in ("blend", "model"):
        run = shutil.copytree(copy, tmp_path / "of" / name)
        assert model_of_run(run) == model_of_run(run / "model") == (run, run / "model")
        shutil.copytree(run / "model", run / "blend" / "model")
        assert model_of_run(run / "blend") == model_of_run(run / "blend" / "model") == (run, run / "blend" / "model")


def test_alphas():
    assert steps_to(2, 0.5) == [0, 1, 0.5, 1.5, 2]
    # 1 is no multiple of 0.3
    assert steps_to(1.2, 0.3) == [0, 1, 0.3, 0.6, 0.9, 1.2]
    for most, step, option in ((2, 0, "--step is 0"), (0.5, 0.1, "--most is 0.5"), (2, float("nan"), "--step is nan")):
        with pytest.raises(ValueError, match=option):
            steps_to(most, step)


def test_a_changed_pretrained_model_shows_in_its_rewards():
    check_pretrained([1.0, 2.0, 3.0, 4.0], [1.0, 2.01, 3.0])
    check_pretrained([1.0, 1.0], [1.0, 1.0])
    # the spread of 1, 2, 3 is 1, and they differ by 2/3 on average
    with pytest.raises(ValueError, match=r"model.name is not the model .* 0\.667 on average, .* by 1;"):
        check_pretrained([1.0, 2.0, 3.0], [2.0, 1.0, 3.0])
    with pytest.raises(ValueError, match=r"my_rewards.py has changed since the run began, and with it the rewards"):
        check_pretrained([1.0, 2.0, 3.0], [2.0, 1.0, 3.0], ["my_rewards.py"])


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_chooses_reports_saves_and_goes_on_after_a_stop(copy, tiny_model, capsys):
    words = ["blend", str(copy), "--keep", "0.01", "--step", "1"]
    assert main(words) == 0
    said, front = capsys.readouterr().out, read_front(copy / "blend" / "front.jsonl")
    seed = load_config(["--config", str(copy / "config.yaml")]).evaluation.seed
    # the choice on one panel, the report on another
    assert [(line["alpha"], line["seed"]) for line in front[:3]] == [(0, seed), (1, seed), (2, seed)]
    assert {line["seed"] for line in front[3:]} == {seed + 1}
    assert [line["reward"][0] for line in front[:3]] == sorted(line["reward"][0] for line in front[:3])
    best = front[2]
    result = json.loads((copy / "blend" / "blend.json").read_text())
    assert result["alpha"] == best["alpha"] and f"alpha {best['alpha']:g}" in said
    # gains are over the pretrained model on the same panel
    second = {line["alpha"]: line["reward"][0] for line in front[3:]}
    gains = [panel["gain"][0] for panel in result["panels"]]
    assert gains == pytest.approx([second[panel["alpha"]] - second[0] for panel in result["panels"]], abs=1e-5)
    assert front[0]["reward"][0] != pytest.approx(second[0], abs=1e-4)
    first, last = json.loads((copy / "evaluations.jsonl").read_text().splitlines()[0]), front[0]
    assert last["rewards"] == first["rewards"] and last["vendi"] == first["vendi"]
    assert (copy / "blend" / "front.png").read_bytes().startswith(b"\x89PNG")
    begin, end = weights(tiny_model), weights(copy)
    saved = load_file(copy / "blend" / UNET)
    assert not torch.equal(begin["conv_out.bias"], end["conv_out.bias"])
    for name, weight in saved.items():
        torch.testing.assert_close(weight, begin[name] + 2 * (end[name] - begin[name]))
    card = (copy / "blend" / "model" / "README.md").read_text()
    assert f"pretrained + {best['alpha']:g} x (tuned - pretrained)" in card and f"seed {seed + 1}" in card
    # a stop in the middle of a line: what was whole is not made again, and the rest is equal
    path = copy / "blend" / "front.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    assert main(words) == 0
    again = path.read_bytes().splitlines(keepends=True)
    assert again == [*lines[:2], lines[2][:40] + b"\n", *lines[2:]]
    # the torn line is no hindrance to the next
    assert main(words) == 0 and read_front(path) == front
    # nothing above the floor but the pretrained model
    for line in front:
        if line["alpha"]:
            line["vendi"] = [0.0] * 3
    path.write_text("".join(json.dumps(line) + "\n" for line in front))
    assert main(["blend", str(copy), "--keep", "1", "--step", "1"]) == 0
    assert "none is saved" in capsys.readouterr().out
    # nor is the one of the choice before
    assert not (copy / "blend" / "model").exists()


def test_the_other_panel_of_the_largest_seed_is_that_of_seed_0(copy):
    blend(copy, ["evaluation.seed=4294967295"], keep=0.01, most=1, step=1)
    assert [line["seed"] for line in read_front(copy / "blend" / "front.jsonl")] == [2**32 - 1] * 2 + [0] * 2


def test_a_blend_of_adapters_of_a_text_model_loads_in_diffusers_and_is_drawn(tmp_path, monkeypatch, capsys):
    # whatever the reward says of random adapters
    monkeypatch.setattr(blends, "choose", lambda records, keep, quality: max(records, key=lambda line: line["alpha"]))
    words = run_words(
        text_model("sd1"), tmp_path / "run", "lora.rank=2", "prompts.source=animals", "evaluation.images_per_prompt=2"
    )
    train([*words, "sample.guidance_scale=2", "optimizer.learning_rate=1e-2"])
    blend(tmp_path / "run", [], keep=0.01, most=2, step=1)
    result = json.loads((tmp_path / "run" / "blend" / "blend.json").read_text())
    assert result["alpha"] == 2
    files = [tmp_path / "run" / part / "pytorch_lora_weights.safetensors" for part in ("model", "blend/model")]
    tuned, saved = map(load_file, files)
    for name, weight in saved.items():
        torch.testing.assert_close(weight, tuned[name] * (2 if ".lora_B." in name else 1))
    pipeline = StableDiffusionPipeline.from_pretrained(text_model("sd1"))
    pipeline.load_lora_weights(tmp_path / "run" / "blend" / "model")
    # under the run's sampler and prompts
    for name, model in (("a", "blend"), ("b", "blend/model"), ("c", "")):
        assert main(["sample", str(tmp_path / "run" / model), "--out", str(tmp_path / f"{name}.png"), "--count=2"]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    moved = shutil.copytree(tmp_path / "run" / "model", tmp_path / "moved")
    assert main(["sample", str(moved), "--out", str(tmp_path / "d.png"), "--prompt=a cat"]) == 1
    assert "holds adapters and no model" in capsys.readouterr().err


def test_a_run_of_a_script_s_reward_is_blended_and_evaluated_by_a_module_s(copy, capsys):
    config = (copy / "config.yaml").read_text()
    for spec in ("my_rewards:make.<locals>.bright", "functools:partial", "__main__:brightness"):
        (copy / "config.yaml").write_text(config.replace(REWARD, spec))
        assert main(["blend", str(copy)]) == 1
        assert f"reward.name is '{spec}', which went with the script that trained" in capsys.readouterr().err
    for command in ("blend", "evaluate"):
        assert main([command, str(copy)]) == 1
        error = capsys.readouterr().err
        assert "reward.name is '__main__:brightness', which went with the script that trained; put the func" in error
        assert "as reward.name=my_module:my_function" in error
        assert (
            main([command, str(copy), f"reward.name={REWARD}", *(["--step", "1"] if command == "blend" else [])]) == 0
        )


def test_blends_of_two_keys_are_not_mixed_and_none_is_written(copy):
    def claim(**kwargs):
        config = load_config(["--config", str(copy / "config.yaml")])
        config.reward.kwargs = kwargs
        _claim_blend(copy / "blend", copy, config, {})

    (copy / "blend").mkdir()
    claim(key="one")
    settings = copy / "blend" / "settings.json"
    assert "one" not in json.loads(settings.read_text())["reward"]["kwargs"].values()
    (copy / "blend" / "front.jsonl").write_text("{}\n")
    claim(key="one")
    with pytest.raises(ValueError, match="holds blends of another option"):
        claim(key="two")
    # of an older version: the credential is there, and no digest
    older = json.loads(settings.read_text())
    del older["option"]
    settings.write_text(json.dumps({**older, "reward": {**older["reward"], "kwargs": {"key": "one"}}}))
    claim(key="one")


def test_an_edited_reward_is_said_of_an_evaluation(copy, capsys):
    sources = json.loads((copy / "sources.json").read_text())
    words = ["evaluate", str(copy), "evaluation.panel_size=4"]
    assert main(words) == 0 and "has changed" not in capsys.readouterr().out
    sources[f"reward {REWARD}"]["sha256"] = "of another file"
    (copy / "sources.json").write_text(json.dumps(sources))
    # a report that can't be written costs no table
    (copy / "evaluation.json").unlink()
    (copy / "evaluation.json").mkdir()
    assert main(words) == 1
    output, error = capsys.readouterr()
    assert f"reward {REWARD} has changed since the run began (" in output and "metric " in output
    assert "evaluation.json can't be written" in error


def test_what_cannot_be_blended_is_refused(copy, tmp_path, tiny_model, capsys):
    def refused(*words):
        assert main(["blend", *map(str, words)]) == 1
        return capsys.readouterr().err

    assert "--keep is 0" in refused(copy, "--keep", "0")
    assert "--quality is 1.1" in refused(copy, "--quality", "1.1")
    assert "--quality is 0.9, but the panel has no Inception Score" in refused(copy, "--quality", "0.9")
    assert "--step is 2" in refused(copy, "--step", "2")
    assert "config.yaml" in refused(tmp_path)
    assert "evaluation.network is none" in refused(copy, "evaluation.network=none")
    # a pretrained model that has changed since: of the same shapes, then of others
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    changed = weights(tiny_model)
    changed["conv_out.bias"] -= 0.5
    save_file(changed, other / UNET.removeprefix("model/"))
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(str(tiny_model), str(other)))
    assert f"model.name is '{other}', whose weights are not those of '{tiny_model}'" in refused(copy, "--step", "1")
    # a run from before its base model was remembered
    (copy / "sources.json").unlink()
    assert "model.name is not the model that the run began with" in refused(copy, "--step", "1")
    # what was refused holds nobody to its settings: the reason stays the model, and a panel of another size is no other
    words = (copy, "--step", "1", "evaluation.panel_size=5")
    for each in (words, words[:3]):
        assert "model.name is not the model that the run began with" in refused(*each)
    # half of a panel's line, as a full disk leaves it
    (copy / "blend" / "front.jsonl").write_text("{\n")
    assert "another model" in refused(copy, f"model.name={tiny_model}")
    settings = copy / "blend" / "settings.json"
    whole = json.loads(settings.read_text())
    assert list(whole["code of the reward"]) == [f"reward {REWARD}"]
    settings.write_text(json.dumps({**whole, "code of the reward": {f"reward {REWARD}": "of another file"}}))
    assert "holds blends of another code of the reward" in refused(copy, "--step", "1")
    settings.write_text(settings.read_text()[:-9])
    assert f"{settings} is damaged (" in refused(copy, "--step", "1")
    shutil.rmtree(copy / "blend")
    # a panel of another size does not hide it
    assert "model.name is not the model that the run began with" in refused(
        copy, "--step", "1", "evaluation.panel_size=3"
    )
    (copy / "config.yaml").write_text(config)
    shutil.rmtree(copy / "blend")
    (copy / "blend").mkdir()
    (copy / "blend" / "front.jsonl").write_text('{"alpha": 0}\n')
    assert "line 1 is no panel of a blend" in refused(copy, "--step", "1")
    shutil.rmtree(copy / "model")
    assert "no model/ yet" in refused(copy)
