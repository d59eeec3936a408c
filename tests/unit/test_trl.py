"""From TRL: fields of DDPOConfig in a script, a JSON file or on a command line become our options."""

import json

import pytest

from hrf_fast.cli import main
from hrf_fast.config.load import load_config
from hrf_fast.from_trl.convert import convert, translate
from hrf_fast.from_trl.fields import DEFAULTS, LEFT_OUT
from hrf_fast.from_trl.source import TrlRun, read_source, read_words
from tests.runs import metrics, train, weights

SCRIPT = """\
from dataclasses import dataclass, field
import torch
raise SystemExit("this script must not run")

@dataclass
class ScriptArguments:
    pretrained_model: str = field(default="someone/model", metadata={"help": "a model"})
    use_lora: bool = field(default=True)

def prompt_fn():
    return "cat", {}

def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)), {}

config = DDPOConfig(num_epochs=3, sample_batch_size=2 * 3, train_batch_size=3, sample_num_steps=20)
pipeline = DefaultDDPOStableDiffusionPipeline(arguments.pretrained_model, use_lora=False)
trainer = DDPOTrainer(config, brightness, prompt_fn, pipeline)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "ddpo.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_is_read_and_not_run(script):
    run = read_source(script)
    assert run.fields == {
        "num_epochs": 3,
        "train_batch_size": 3,
        "sample_num_steps": 20,
        "pretrained_model": "someone/model",
        "use_lora": False,
    }
    assert run.computed == {"sample_batch_size": "2 * 3"}
    assert (run.reward, run.prompts) == ("ddpo:brightness", "ddpo:prompt_fn")


def test_the_numbers_of_trl_become_those_that_give_its_updates():
    # 2 processes of 4 batches of 6 images, and optimizer steps of 3 x 2 images on each
    fields = {
        "sample_batch_size": 6,
        "sample_num_batches_per_epoch": 4,
        "train_batch_size": 3,
        "train_gradient_accumulation_steps": 2,
        "sample_num_steps": 20,
        "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_buffer_size": 32,
    }
    fields["pretrained_model"] = "someone/model"
    options, notes = translate(TrlRun(fields, "module:reward", "module:prompts"), processes=2)
    assert options["train.groups_per_iteration"] == 48 and options["train.group_size"] == 1
    assert options["train.groups_per_step"] == 12
    # TRL averages over the 20 steps, where we add them up
    assert options["optimizer.max_grad_norm"] == 20.0 and options["optimizer.kwargs"]["eps"] == 20 * 1e-8
    assert (options["train.advantages"], options["train.prompt_buffer"]) == ("prompt", 32)
    assert (options["lora.rank"], options["lora.base_precision"], options["compute.precision"]) == (4, "fp16", "fp16")
    # all that is added without being asked for
    assert [note.partition(":")[0] for note in notes] == ["evaluation.network"]


def test_a_converted_configuration_loads(script, tmp_path, capsys):
    out = tmp_path / "config.yaml"
    assert main(["from-trl", "--out", str(out), str(script), "--sample_batch_size", "6", "--mixed_precision=no"]) == 0
    assert "sample_batch_size" not in capsys.readouterr().err
    config = load_config(["--config", str(out)])
    assert (config.run.folder, config.evaluation.network) == ("runs/ddpo", "openai/clip-vit-base-patch32")
    assert config.model.name == "someone/model" and config.lora.rank == 0
    assert config.train.iterations == 3 and config.train.groups_per_iteration == 12
    assert config.sample.guidance_scale == 5 and config.optimizer.learning_rate == 3e-4
    assert config.reward.name == "ddpo:brightness" and config.prompts.source == "ddpo:prompt_fn"
    # options of ours may follow the source, before and after the script's own words
    words = [str(script), "--processes", "1", "--sample_batch_size", "6", "--out", str(out), "--mixed_precision=no"]
    out.unlink()
    assert main(["from-trl", *words]) == 0 and load_config(["--config", str(out)]) == config
    capsys.readouterr()
    assert main(["from-trl", str(script), "--sample_batch_size=6"]) == 0
    assert "iterations: 3" in capsys.readouterr().out


def test_every_field_has_an_effect():
    """A field that is known and does nothing would be an option that does nothing."""
    changed = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2, str: lambda v: v + "x"}
    special = {
        "per_prompt_stat_tracking": False,
        "mixed_precision": "bf16",
        "log_with": "wandb",
        "train_use_8bit_adam": True,
    }
    tracked = {"per_prompt_stat_tracking": True}
    plain = translate(TrlRun(dict(tracked)))
    for name, default in DEFAULTS.items():
        value = special[name] if name in special else changed[type(default)](default)
        assert translate(TrlRun(tracked | {name: value})) != plain, name


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_of_the_steps_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=f"train_timestep_fraction is {share}; use a share above 0"):
        translate(TrlRun({"train_timestep_fraction": share}))


def test_what_has_no_equal_is_said():
    fields = {"train_timestep_fraction": 0.5, "train_cfg": False, "resume_from": "checkpoint_3", "push_to_hub": True}
    _, notes = translate(TrlRun(fields, "m:r", "m:p", {"train_learning_rate": "rate()"}))
    for word in ("train_timestep_fraction 0.5", "train_cfg false", "resume_from", "push_to_hub", "rate()"):
        assert any(word in note for note in notes), word


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_a_scale_that_does_not_guide_becomes_no_guidance(scale, tmp_path):
    fields = {"train_cfg": False, "sample_guidance_scale": scale, "negative_prompts": "blurry", "use_lora": False}
    file = tmp_path / "fields.json"
    file.write_text(json.dumps(fields))
    text, notes = convert(file)
    assert any("negative_prompts: left out" in note for note in notes)
    (tmp_path / "config.yaml").write_text(text)
    words = ["reward.name=jpeg_compressibility", "train.groups_per_iteration=2", "train.groups_per_step=1"]
    config = load_config(["--config", str(tmp_path / "config.yaml"), *words])
    assert (config.sample.guidance_scale, config.train.guidance, config.prompts.negative) == (1, True, "")


def notes_of(fields, **options):
    """The notes on a run of these fields whose reward and prompts are named."""
    return translate(TrlRun(fields, "m:r", "m:p"), **options)[1]


def test_every_field_that_becomes_no_option_is_named():
    for names in LEFT_OUT:
        for name in names:
            assert [note for note in notes_of({name: "x"}) if f"{name} 'x'" in note and "left out; " in note], name
    # a project of the tracker vanished without a word once
    (note,) = (note for note in notes_of({"tracker_project_name": "mine"}) if "tracker_project_name" in note)
    assert note == (
        "tracker_project_name 'mine': left out; run.writers chooses the writers; WANDB_PROJECT names W&B's project, "
        "where the run has its folder's name"
    )
    buffer = "per_prompt_stat_tracking_buffer_size"
    assert any(note.startswith(f"{buffer} 32: left out; it acts with") for note in notes_of({buffer: 32}))
    assert not any(buffer in note for note in notes_of({buffer: 32, "per_prompt_stat_tracking": True}))


def test_defaults_that_decide_the_batches_are_said_with_the_option_to_set():
    notes = notes_of({"sample_num_batches_per_epoch": 4}, processes=2)
    assert notes[:4] == [
        "sample_batch_size is not in the source: taken as 1, TRL's default; if that is wrong, set "
        "train.groups_per_iteration (now 8)",
        "train_batch_size is not in the source: taken as 1, TRL's default; if that is wrong, set "
        "train.groups_per_step (now 2) and compute.images_per_call (now 1)",
        "train_gradient_accumulation_steps is not in the source: taken as 1, TRL's default; if that is wrong, set "
        "train.groups_per_step (now 2)",
        "pretrained_model is not in the source: taken as 'runwayml/stable-diffusion-v1-5', TRL's default; if that is "
        'wrong, set model.name (now "stable-diffusion-v1-5/stable-diffusion-v1-5")',
    ]
    assert not any("processes" in note for note in notes)
    (note,) = (note for note in notes_of({}) if "processes" in note)
    assert "taken as 1; give --processes, or if that is wrong, set train.groups_per_iteration (now 2)" in note


def test_the_id_that_stable_diffusion_left_becomes_its_mirrors_with_a_note():
    old, mirror = "runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"
    for fields in ({}, {"pretrained_model": old}):
        options, notes = translate(TrlRun(fields, "m:r", "m:p"))
        assert options["model.name"] == mirror
        assert f"model.name: {mirror} takes the place of {old}, which is deprecated" in notes
    options, notes = translate(TrlRun({"pretrained_model": "someone/model"}, "m:r", "m:p"))
    assert options["model.name"] == "someone/model" and not any(mirror in note for note in notes)


def test_a_field_that_the_script_computes_names_its_default_and_its_option(script):
    _, notes = convert(script)
    assert (
        "sample_batch_size is 2 * 3 in the script, which was not run: taken as 1, TRL's default; if that is wrong, set "
        "train.groups_per_iteration (now 2)"
    ) in notes
    _, notes = convert(script, ["--sample_batch_size=6"])
    assert not any("sample_batch_size" in note for note in notes)


OWN = """\
@dataclass
class Arguments:
    prompts_file: str = field(default="prompts.txt")
    hf_hub_aesthetic_model_id: str = "someone/heads"
    threads: int = cpu_count()

class Scorer:
    strength: int = 3

arguments, training_args = HfArgumentParser((Arguments, DDPOConfig)).parse_args_into_dataclasses()
training_args.num_epochs = 7
training_args.project_kwargs = {"total_limit": 5}
trainer = DDPOTrainer(training_args, REWARD, prompt_fn, pipeline, image_samples_hook=show)
config = DDPOConfig(**options)
"""


def own_script(tmp_path, reward):
    (tmp_path / "mine.py").write_text(OWN.replace("REWARD", reward))
    return tmp_path / "mine.py"


def test_other_parts_of_a_script_are_read_or_named(tmp_path):
    script = own_script(tmp_path, "scorer()")
    assert read_source(script).fields["num_epochs"] == 7
    _, notes = convert(script, ["--threads=4"])
    for word in (
        "project_kwargs {'total_limit': 5}: left out; run.folder",
        "hf_hub_aesthetic_model_id 'someone/heads': left out; the head of the reward aesthetic is reward.kwargs.head",
        "prompts_file 'prompts.txt': left out; it is an argument of the script's own",
        "threads 4: left out; it is an argument of the script's own",
        "image_samples_hook show: left out; ",
        "DDPOConfig(**options): left out, ",
    ):
        assert any(note.startswith(word) for note in notes), word
    assert not any("strength" in note for note in notes)
    with pytest.raises(ValueError, match=r"thread is no field of DDPOConfig"):
        convert(script, ["--thread=4"])


def test_the_head_of_trls_aesthetic_reward_is_that_of_ours(tmp_path):
    text, notes = convert(own_script(tmp_path, "aesthetic_scorer(arguments.hf_hub_aesthetic_model_id, 'v2.pth')"))
    assert 'name: "aesthetic"' in text and 'kwargs: {"head": "someone/heads:v2.pth"}' in text
    assert not any("hf_hub_aesthetic" in note for note in notes)


@pytest.mark.parametrize("reward", ["scorer()", "lambda images, prompts, metadata: images", "rewards.bright"])
def test_a_reward_that_could_not_be_named_is_said_and_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, reward
):
    monkeypatch.chdir(tmp_path)

    def load(*_, **__):
        raise AssertionError("asked for a model")

    monkeypatch.setattr("hrf_fast.assembly.components.build_policy", load)
    assert main(["from-trl", "--out", "config.yaml", str(own_script(tmp_path, reward))]) == 0
    text, shown = (tmp_path / "config.yaml").read_text(), capsys.readouterr().err
    assert 'name: "my_module:my_reward"' in text and "aesthetic" not in text.partition("\nreward:")[2]
    # every comment is on the terminal too
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# - ")]
    assert shown.splitlines() == comments
    (note,) = (line for line in comments if line.startswith("- reward.name: "))
    assert reward in note and "name the function as module:function" in note
    assert main(["train", "--config", "config.yaml"]) == 1
    assert "reward.name is 'my_module:my_reward', but there is no module 'my_module'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_json_file_names_no_reward(tmp_path):
    (tmp_path / "fields.json").write_text(json.dumps({"num_epochs": 3}))
    text, notes = convert(tmp_path / "fields.json")
    assert 'name: "my_module:my_reward"' in text and 'folder: "runs/fields"' in text
    assert any(note.startswith("reward.name: the source names no reward: it") for note in notes)
    with pytest.raises(ValueError, match="--processes is 0; use a whole number of at least 1"):
        convert(tmp_path / "fields.json", processes=0)


def test_words_of_a_command_line():
    words = ["--num_epochs=200", "--train_batch_size", "3", "--use_lora", "--log_with=wandb", "--train_cfg", "False"]
    assert read_words(words) == {
        "num_epochs": 200,
        "train_batch_size": 3,
        "use_lora": True,
        "log_with": "wandb",
        "train_cfg": False,
    }
    # as the script's own parser reads them
    switches = {"yes": True, "0": False, "T": True, "False": False, "perhaps": "perhaps"}
    assert [read_words([f"--use_lora={word}"])["use_lora"] for word in switches] == list(switches.values())
    assert read_words(["--pretrained_revision", "2024", "--negative_prompts=123"]) == {
        "pretrained_revision": "2024",
        "negative_prompts": "123",
    }
    with pytest.raises(ValueError, match="'200' belongs to no field"):
        read_words(["200"])


def test_switches_of_the_scripts_parser_turn_off_what_is_on_by_default(tmp_path, capsys):
    assert read_words(["--no_use_lora", "--no-train-cfg", "--num_epochs", "3"]) == {
        "use_lora": False,
        "train_cfg": False,
        "num_epochs": 3,
    }
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT.replace("    use_lora", "    verbose: bool = True\n    quick: bool = False\n    use_lora"))
    assert main(["from-trl", str(path), "--no_allow_tf32", "--no-verbose"]) == 0
    shown = capsys.readouterr().out
    assert "deterministic: true" in shown and "verbose False: left out" in shown
    # the parser has no such switch for what is off by default, and none takes a value
    for word in ("--no_quick", "--no_push_to_hub", "--no_use_lora=1"):
        with pytest.raises(ValueError, match=f"{word[2:].partition('=')[0]} is no field of DDPOConfig"):
            convert(path, [word])
    with pytest.raises(ValueError, match="'1' belongs to no field"):
        convert(path, ["--no_use_lora", "1"])


@pytest.mark.parametrize("config", ["trl.DDPOConfig", "DDPOConfig"])
def test_a_configuration_is_read_by_its_name_in_the_module_too(config, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"import trl\nconfig = {config}(num_epochs=3, negative_prompts=None)")
    text, _ = convert(path)
    assert "iterations: 3" in text and 'negative: ""' in text


def test_no_negative_prompts_in_json_are_an_empty_one(tmp_path):
    (tmp_path / "fields.json").write_text(json.dumps({"negative_prompts": None}))
    assert 'negative: ""' in convert(tmp_path / "fields.json")[0]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.json", json.dumps({"num_epoch": 3}), "num_epoch is no field of DDPOConfig (did you mean 'num_epochs'?)"),
        ("a.json", "[1]", "holds a JSON list"),
        ("a.json", "{", "neither a .py script nor JSON"),
        ("a.json", json.dumps({"mixed_precision": "fp8"}), "mixed_precision is 'fp8'"),
        ("a.json", json.dumps({"mixed_precision": []}), "mixed_precision is [], but DDPOConfig has a text"),
        ("a.json", json.dumps({"sample_batch_size": "4"}), "sample_batch_size is '4', but DDPOConfig has a whole num"),
        ("a.json", json.dumps({"sample_batch_size": None}), "sample_batch_size is None"),
        ("a.json", json.dumps({"train_batch_size": 0}), "train_batch_size is 0, but DDPOConfig has a whole number of "),
        ("a.json", json.dumps({"sample_num_steps": True}), "sample_num_steps is True"),
        ("a.json", json.dumps({"train_adam_epsilon": "1e-8"}), "has a finite number, such as 1e-08; correct it"),
        ("a.json", '{"train_max_grad_norm": Infinity}', "train_max_grad_norm is inf"),
        ("a.json", json.dumps({"allow_tf32": 1}), "allow_tf32 is 1, but DDPOConfig has true or false"),
        ("a.json", json.dumps({"log_with": 3}), "log_with is 3"),
        ("a.py", "x = 1", "has no DDPOConfig"),
        ("a.py", "x = (", "line 1, is no Python"),
    ],
)
def test_bad_sources(tmp_path, name, text, named):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        convert(path)
    assert named in str(caught.value)


def test_a_value_that_no_literal_can_have_is_left_to_the_script(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("DDPOConfig(num_epochs={[1]: 2})")
    assert any("num_epochs" in note for note in convert(path)[1])


def test_nothing_is_written_over(script, capsys):
    before = script.read_text()
    assert main(["from-trl", str(script), "--out", str(script)]) == 1
    assert f"--out is {script}, which is there already; name a new file" in capsys.readouterr().err
    assert script.read_text() == before


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.json"):
        convert(tmp_path / "nothing.json")


# --- what TRL's batches need ------------------------------------------------------------------------------------------


def test_groups_of_one_learn_from_the_batch(tiny_run, tiny_model):
    words = ["window.schedule=full", "train.group_size=1", "train.groups_per_iteration=3", "train.groups_per_step=3"]
    result = train([*tiny_run, *words, "train.advantages=batch", "train.iterations=1"])
    (record,) = metrics(result.folder)
    assert record["images"] == 3 and record["advantage_std"] > 0 and record["group_reward_std"] is None
    before, after = weights(tiny_model), weights(result.folder)
    assert any(not before[name].equal(after[name]) for name in before)


def test_a_group_of_one_is_no_peer_of_itself(tiny_run):
    with pytest.raises(ValueError, match=r"train\.group_size is 1 with train\.advantages=group"):
        load_config([*tiny_run, "train.group_size=1"])
