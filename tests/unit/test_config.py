"""Configuration: layers, typos, ranges, and every shipped YAML."""

from pathlib import Path

import pytest

from hrf_fast.assembly.algorithm import build_config_advantages
from hrf_fast.config.load import differences, load_config, to_yaml
from hrf_fast.config.options import Config
from hrf_fast.config.rules import check_job
from hrf_fast.config.stop_rules import spans_note
from hrf_fast.rewards import RewardTerm, list_rewards
from hrf_fast.study.reading import read_study
from hrf_fast.windows.schedules import build_schedule

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"

# all groups of an iteration in one optimizer step
ONE_STEP = ["train.groups_per_iteration=4", "train.groups_per_step=4"]


def test_later_layers_win_over_earlier_ones(tmp_path):
    (tmp_path / "a.yaml").write_text("train: {iterations: 5, group_size: 7}\n")
    (tmp_path / "b.yaml").write_text("train: {iterations: 6}\n")
    config = load_config(["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}", "run.seed=3"])
    assert (config.train.iterations, config.train.group_size, config.run.seed) == (6, 7, 3)


def test_a_base_is_read_relative_to_its_file_and_is_overridden(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {iterations: 5}\noptimizer: {learning_rate: 1e-5}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "child.yaml").write_text("base: ../base.yaml\ntrain: {iterations: 9}\n")
    config = load_config(["--config", str(tmp_path / "sub" / "child.yaml")])
    # 1e-5 is a number: plain YAML would read a string
    assert (config.train.iterations, config.optimizer.learning_rate) == (9, 1e-5)


def test_another_schedule_or_reward_starts_with_its_own_options(tmp_path):
    (tmp_path / "a.yaml").write_text("window: {schedule: clusters, kwargs: {clusters: [[0, 5]]}}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nwindow: {schedule: dynamic, kwargs: {beta: 1}}\n")
    assert load_config(["--config", str(tmp_path / "b.yaml")]).window.kwargs == {"beta": 1}
    assert load_config(["--config", str(tmp_path / "a.yaml"), "window.schedule=full"]).window.kwargs == {}
    # the same one keeps them, and an override adds to them
    kept = ["--config", str(tmp_path / "a.yaml"), "window.schedule=clusters", "window.kwargs.iterations_per_cluster=2"]
    assert load_config(kept).window.kwargs == {"clusters": [[0, 5]], "iterations_per_cluster": 2}


def test_options_of_a_file_that_names_no_schedule_are_those_of_the_default(tmp_path):
    (tmp_path / "a.yaml").write_text("window: {kwargs: {clusters: [[0, 5]]}}\nreward: {kwargs: {quality: 50}}\n")
    (tmp_path / "b.yaml").write_text(
        "base: a.yaml\nwindow: {schedule: clusters}\nreward: {name: jpeg_compressibility}\n"
    )
    config = load_config(["--config", str(tmp_path / "b.yaml")])
    assert config.window.kwargs == {"clusters": [[0, 5]]} and config.reward.kwargs == {"quality": 50}
    (tmp_path / "d.yaml").write_text("window: {anchor_steps: '${sample.num_inference_steps}'}\n")
    (tmp_path / "e.yaml").write_text("base: d.yaml\nwindow: {schedule: full}\n")
    assert load_config(["--config", str(tmp_path / "e.yaml")]).window.anchor_steps == 40
    (tmp_path / "c.yaml").write_text("base: a.yaml\nwindow: {schedule: random}\n")
    assert load_config(["--config", str(tmp_path / "c.yaml")]).window.kwargs == {}


@pytest.mark.parametrize(
    "text", ["a${b}", "${a.b}", "a\\${b}", "a\\\\${b}", "${", "$", "\\", "a: b", "'", "${oc.env:HOME}"]
)
def test_any_text_survives_the_file_of_a_run(tmp_path, text):
    config = load_config([])
    config.reward.kwargs = {"text": text, "texts": [text], text: {text: 1}}
    config.prompts.negative, config.sample.guidance_scale = text, 2.0
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    again = load_config(["--config", str(tmp_path / "run.yaml")], {"the test": {"prompts": {"source": "animals"}}})
    assert again.reward.kwargs == config.reward.kwargs and again.prompts.negative == text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.name=???", r"model\.name is \?\?\?, which stands for a value that is to be set"),
        ("train.iterations=.inf", r"train\.iterations is inf"),
        ("train.iterations=1e400", r"train\.iterations is inf"),
        ("optimizer.learning_rate=" + "9" * 400, r"optimizer\.learning_rate is 9+; use"),
        ("compute.threads=3000000000", r"compute\.threads is 3000000000"),
    ],
    ids=lambda value: value[:30],
)
def test_what_stands_for_no_number_is_refused_by_name(word, message):
    with pytest.raises(ValueError, match=message):
        load_config([word])


def test_options_of_a_reward_beside_terms_are_refused():
    words = ["reward.name=null", "reward.terms=[{name: jpeg_compressibility}]"]
    load_config(words)
    with pytest.raises(ValueError, match=r"reward\.kwargs has quality, but reward\.terms have kwargs"):
        load_config([*words, "reward.kwargs.quality=50"])


@pytest.mark.parametrize("order", [1, -1])
def test_options_of_a_new_schedule_or_reward_may_come_before_or_after_its_name(tmp_path, order):
    (tmp_path / "a.yaml").write_text("window: {schedule: clusters, kwargs: {clusters: [[0, 5]]}}\n")
    words = ["window.kwargs.beta=0.9", "window.schedule=dynamic"]
    config = load_config(["--config", str(tmp_path / "a.yaml"), *words[::order]])
    assert config.window.kwargs == {"beta": 0.9}
    words = ["reward.kwargs.quality=50", "reward.name=jpeg_incompressibility"]
    assert load_config(words[::order]).reward.kwargs == {"quality": 50}


def test_a_demo_and_its_ddpo_layer_differ_in_method_only():
    demo = ["--config", str(CONFIGS / "demo_portraits.yaml")]
    changed = differences(load_config(demo), load_config([*demo, "--config", str(CONFIGS / "demo_ddpo.yaml")]))
    assert set(changed) == {
        "window.schedule",
        "window.kwargs",
        "train.advantages",
        "train.groups_per_iteration",
        "train.groups_per_step",
        "optimizer.learning_rate",
        "evaluation.every",
        # moves no number
        "compute.activations",
    }


def test_a_circle_of_bases_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match=r"[ab]\.yaml is its own base"):
        load_config(["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compute.images_per_call=-1"], "compute.images_per_call is -1.* 0"),
        (["train.iteratons=3"], "train.iteratons.*'iterations'"),
        (["tarin.iterations=3"], "'tarin'.*'train'"),
        (["train.iterations=many"], "train.iterations.*many"),
        (["train.iterations=0"], "train.iterations is 0.* 1"),
        (["optimizer.learning_rate=-1"], "optimizer.learning_rate is -1.0.* 0"),
        (["optimizer.burn_in_iterations=3", "train.iterations=3"], "optimizer.burn_in_iterations is 3 of.* 3.*fewer"),
        (["optimizer.ema_decay=1"], "optimizer.ema_decay is 1.0.* 0 .* 1"),
        (["compute.precision=fp8"], "compute.precision is 'fp8'.*fp32, bf16, fp16"),
        (
            ["train.groups_per_iteration=4", "train.groups_per_step=3"],
            "train.groups_per_step is 3.*train.groups_per_iteration 4",
        ),
        (["optimizer.kwargs.betas=[0.9]"], r"optimizer.kwargs.betas is \[0.9\]"),
        (["optimizer.kwargs.betas=[0.9,1.0]"], r"optimizer.kwargs.betas is \[0.9, 1.0\]"),
        (["optimizer.kwargs.betas=[true,0.9]"], r"optimizer.kwargs.betas is \[True, 0.9\]"),
        (["optimizer.kwargs.betas=0.9"], "optimizer.kwargs.betas is 0.9"),
        (["optimizer.kwargs.betas=[.nan,0.9]"], r"optimizer.kwargs.betas is \[nan, 0.9\]"),
        (["optimizer.kwargs.eps=0"], "optimizer.kwargs.eps is 0"),
        (["optimizer.kwargs.eps=.inf"], "optimizer.kwargs.eps is inf"),
        (["optimizer.kwargs.eps=small"], "optimizer.kwargs.eps is 'small'"),
        (["optimizer.kwargs.epsilon=1e-8"], "optimizer.kwargs.epsilon .*'eps'"),
        (["sample.scheduler=dim"], "sample.scheduler is 'dim'.*'ddim'"),
        (["run.writers=[tensorbord]"], "run.writers has 'tensorbord'.*'tensorboard'"),
        (["reward.name=null"], "reward.name.*reward.terms"),
        (["reward.terms=[{name: jpeg_compressibility}]"], "reward.name.*reward.terms"),
        (["train"], "'train'.*section.field=value"),
        (["train=3"], "^train=3: train "),
        (["train=null"], "^train=null: .*train"),
        (["--iterations=3"], "^--iterations=3 "),
        (["--config"], "^--config "),
        (["--config", "nowhere/x.yaml"], "^--config nowhere/x.yaml "),
        (["run.seed=1", "reward.kwargs={a"], r"^reward.kwargs=\{a .*YAML"),
        (["run.seed=1", "reward.terms={name: x}"], r"^reward.terms=\{name: x\}: reward.terms is .* list: write .*=\["),
        (["reward.terms.0.weight=2"], r"^reward.terms.0.weight=2: one item of reward.terms can't .*=\[\{name: …\}"),
        (["reward.terms[0].weigth=2"], r"no option reward.terms\[0\].weigth \(did you mean 'weight'\?\)"),
        (["train.shared_noise=true"], r"no option train.shared_noise \(did you mean window.shared_noise\?\)"),
        (["reward.kwargs=[1]"], r"^reward.kwargs=\[1\]: reward.kwargs is \[1\]; it is a mapping"),
        (["reward.terms=[3]"], r"^reward.terms=\[3\]: reward.terms\[0\] is 3; write \{name: …, weight: …, kwargs: …\}"),
        (["reward.terms=[{nam: x}]"], r"^reward.terms=.*: no option reward.terms\[0\].nam \(did you mean 'name'\?\)"),
        (["reward.terms=[{name: x, weight: heavy}]"], r"reward.terms\[0\].weight is 'heavy'; use a number"),
        (["reward.terms=[{name: x, kwargs: 5}]"], r"reward.terms\[0\].kwargs is 5; it is a mapping"),
        (
            ["run.writers=tensorboard"],
            r"run.writers is 'tensorboard'; it is a list: write run.writers=\[tensorboard\]$",
        ),
        (["run.writers=(tensorboard, wandb)"], r"it is a list: write run.writers=\[tensorboard, wandb\]$"),
        (["run.writers=null"], r"run.writers is null; it is a list: write run.writers=\[…\]$"),
        (["run.writers=[[wandb]]"], r"run.writers\[0\] is \['wandb'\]; use text"),
        (["window.kwargs=5"], r"window.kwargs is 5; it is a mapping: write window.kwargs=\{name: value\}"),
        (["window.kwargs=null"], "window.kwargs is null; it is a mapping"),
        (["window.kwargs={beta:1}"], r"window.kwargs has the name 'beta:1' .* a space after a colon: \{beta: 1\}"),
        (["window.kwargs={clusters: [{steps:3}]}"], r"window.kwargs.clusters\[0\] has .*\{steps: 3\}"),
        (["reward.terms=[{name:x}]"], r"reward.terms\[0\] has the name 'name:x' .*\{name: x\}"),
        (["train={iterations:5}"], r"^train=\{iterations:5\}: train has the name .*\{iterations: 5\}"),
        (["window.kwargs={clusters:[{steps:[10]}]}"], "YAML wants a space after a colon, as in {name: value}$"),
        (["train.iterations=null"], "train.iterations is null; use a whole number, at least 1$"),
        (["train.iterations=2.5"], "train.iterations is 2.5; use a whole number"),
        (["train.iterations=true"], "train.iterations is true; use a whole number"),
        (["train.scale_clips_by_window=5"], "train.scale_clips_by_window is 5; use true or false$"),
        (["run.folder=[a]"], r"run.folder is \['a'\]; use text$"),
        (["optimizer.learning_rate=1e-3x"], "optimizer.learning_rate is '1e-3x'; use a number, above 0$"),
        (["run.seed=1", "--local_rank"], "^--local_rank "),
        (["optimizer.max_grad_norm=nan"], "optimizer.max_grad_norm is nan.* 0"),
        (["optimizer.weight_decay=inf"], "optimizer.weight_decay is inf"),
        (["run.seed=4294967296"], "run.seed is 4294967296.* 4294967295"),
        (["evaluation.seed=18446744073709551616"], "evaluation.seed is 18446744073709551616.* 4294967295"),
    ],
)
def test_a_wrong_option_names_itself_and_the_way_out(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(words)


def test_values_that_only_look_wrong_are_taken():
    words = ["run.folder=5", "train.iterations='7'", "optimizer.learning_rate=1", "train.scale_clips_by_window='off'"]
    config = load_config([*words, "model.revision=null", "run.device=${run.progress}", "reward.kwargs={a: {b: null}}"])
    assert (config.run.folder, config.train.iterations, config.optimizer.learning_rate) == ("5", 7, 1.0)
    assert (config.train.scale_clips_by_window, config.model.revision) == (False, None)
    # an interpolation, and a null that is a value
    assert config.run.device == "auto" and config.reward.kwargs == {"a": {"b": None}}


def test_a_missing_file_answers_with_the_nearest_one():
    with pytest.raises(ValueError, match="smoke_cpuu.yaml.*'.*smoke_cpu.yaml'"):
        load_config(["--config", str(CONFIGS / "smoke_cpuu.yaml")])


@pytest.mark.parametrize("text", ["train: [1, 2", "- a\n- b\n", "\tx: 1"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="broken.yaml"):
        load_config(["--config", str(path)])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "broken.yaml is empty; write sections"),
        (b" \n\n", "broken.yaml is empty; write sections"),
        (b"run: {folder: r\xe9}\n", "broken.yaml is not UTF-8 text .byte 15.; save it as UTF-8"),
        (b"run: {folder: a\0b}\n", "broken.yaml is not valid YAML: .*character"),
        (b"5\n", "broken.yaml is not valid YAML: .* int"),
        (b"- a\n", "broken.yaml must hold sections .* not a list"),
        (b"train:\nrun: {seed: 1}\n", "broken.yaml: train is a section, not null; .* or leave it out"),
        (
            b"run: {seed: 1}\nwindow: {kwargs: {clusters:[[0, 5]]}}\n",
            "broken.yaml is not valid YAML: .* a space after a",
        ),
        (b"run: {writers: tensorboard}\n", "broken.yaml: run.writers is 'tensorboard'; it is a list"),
    ],
)
def test_a_file_that_is_no_configuration_is_named_with_what_it_is(tmp_path, data, message):
    (tmp_path / "broken.yaml").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_config(["--config", str(tmp_path / "broken.yaml")])


def test_a_folder_is_no_configuration_and_a_mark_of_windows_editors_is_no_part_of_one(tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a YAML file, as in --config .*config.yaml"):
        load_config(["--config", str(tmp_path)])
    (tmp_path / "mark.yaml").write_text("run: {seed: 7}\n", encoding="utf-8-sig")
    assert load_config(["--config", str(tmp_path / "mark.yaml")]).run.seed == 7


@pytest.mark.parametrize("base", ["5", "null", "[3]", "{a: b}"])
def test_a_base_that_is_no_file_name_is_refused(tmp_path, base):
    path = tmp_path / "child.yaml"
    path.write_text(f"base: {base}\n")
    with pytest.raises(ValueError, match="child.yaml: base is "):
        load_config(["--config", str(path)])


@pytest.mark.parametrize("text", ["reward: {kwargs: [1]}", "reward: {terms: {name: x}}", "reward: {terms: [3]}"])
def test_a_list_or_mapping_in_the_wrong_place_names_its_file(tmp_path, text):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="wrong.yaml"):
        load_config(["--config", str(path), "run.seed=1"])


def test_a_list_over_a_mapping_of_its_base_names_the_file(tmp_path):
    (tmp_path / "base.yaml").write_text("reward: {kwargs: {quality: 5}}\n")
    (tmp_path / "child.yaml").write_text("base: base.yaml\nreward: {kwargs: [5]}\n")
    with pytest.raises(ValueError, match="child.yaml: reward.kwargs is .*mapping"):
        load_config(["--config", str(tmp_path / "child.yaml")])


def test_the_largest_seed_is_that_of_32_bits():
    assert load_config(["run.seed=4294967295"]).run.seed == 2**32 - 1


def test_the_launchers_local_rank_is_dropped():
    assert load_config(["--local_rank=0", "--local_rank", "0", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        ([], 2, "train.groups_per_step is 1, which 2 ranks.*train.groups_per_iteration 4"),
        (["train.groups_per_step=4"], 3, "train.groups_per_step is 4, which 3 ranks"),
        (["train.groups_per_step=2", "run.device=cuda:1"], 2, "run.device is 'cuda:1' but there are 2 ranks"),
    ],
)
def test_what_the_ranks_of_a_job_can_not_share_is_refused(words, ranks, message):
    config = load_config(words)
    check_job(config, 1)
    with pytest.raises(ValueError, match=message):
        check_job(config, ranks)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compute.activations=keep"], "compute.activations is keep.*train.order is collect"),
        (
            ["compute.activations=keep", "train.order=on_policy", "train.inner_epochs=2"],
            "compute.activations is keep.*train.inner_epochs is 2",
        ),
        (["train.advantages=batch", "train.order=on_policy"], "train.advantages is batch.*train.order is on_policy"),
        (["train.advantages=prompt"], "train.advantages is prompt but prompts.source is null"),
        (["train.group_size=1"], "train.group_size is 1 with train.advantages=group"),
        (
            ["train.group_size=1", "train.groups_per_iteration=1", "train.advantages=batch"],
            "train.group_size is 1 and train.groups_per_iteration is 1 with train.advantages=batch.*at least 2",
        ),
        # what would do nothing
        (["prompts.negative=ugly"], "prompts.negative is 'ugly' but prompts.source is null"),
        (["prompts.distinct=true"], "prompts.distinct is true but prompts.source is null"),
        (
            ["prompts.distinct=true", "prompts.source=animals", "train.groups_per_iteration=1"],
            "prompts.distinct is true but train.groups_per_iteration is 1",
        ),
        (["prompts.kwargs.noun=cat"], "prompts.kwargs is {'noun': 'cat'} but prompts.source is null"),
        (["evaluation.images_per_prompt=2"], "evaluation.images_per_prompt is 2 but prompts.source is null.* at 4"),
        (["train.guidance=false"], "train.guidance is false but sample.guidance_scale is 1"),
        (
            ["train.advantages=prompt", "prompts.source=animals", "train.prompt_buffer=4"],
            "train.prompt_min_count is 16.*train.prompt_buffer 4",
        ),
        (["stop.target_reward=3", "evaluation.every=0"], "stop.target_reward is 3 but evaluation.every is 0"),
        (["stop.patience=3", "evaluation.every=0"], "stop.patience is 3 panels but evaluation.every is 0"),
        # the ratio of a rollout's only step is 1
        (["stop.max_kl=0.1", "train.order=on_policy"], "stop.max_kl is 0.1, but every rollout serves one.*max_drift"),
        (["stop.max_ratio=2", *ONE_STEP], "stop.max_ratio is 2, but every rollout serves one.*inner_epochs above 1"),
        (["train.clip_steps=std", *ONE_STEP], "train.clip_steps is std, but every rollout serves one.*no clip acts"),
        (
            ["prompts.negative=ugly", "prompts.source=animals"],
            "prompts.negative is 'ugly' but sample.guidance_scale is 1",
        ),
        (["compute.memory_budget=8GB"], "compute.memory_budget is 8GB.*compute.activations is replay"),
        (["compute.memory_budget=8", "compute.activations=auto"], "compute.memory_budget is '8'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(words)


def test_a_limit_of_the_ratio_is_taken_where_a_rollout_serves_several_steps_or_it_is_the_default():
    for words in (["train.groups_per_step=1"], [*ONE_STEP, "train.inner_epochs=2"]):
        assert load_config(["stop.max_kl=0.1", "stop.max_ratio=2", *words]).stop.max_kl == 0.1
    assert load_config(["stop.max_ratio=0", "stop.max_clip_fraction=0", *ONE_STEP]).stop.max_ratio == 0


def test_a_schedule_that_another_budget_may_cut_off_is_said():
    words = ["optimizer.learning_rate_schedule=cosine", "remedies.kl_weight_end=0.1", "train.iterations=7"]
    note = spans_note(load_config([*words, "stop.max_evaluations=100"]))
    assert note.startswith("optimizer.learning_rate_schedule=cosine and remedies.kl_weight_end span train.iterations 7")
    assert spans_note(load_config(words)) == spans_note(load_config(["stop.max_evaluations=100"])) == ""


def test_weighted_terms_become_reward_terms():
    config = load_config(["reward.name=null", "reward.terms=[{name: jpeg_compressibility, weight: 2}]"])
    assert config.reward.terms == [RewardTerm("jpeg_compressibility", 2.0, {})]


def test_the_written_configuration_reads_back_equal(tmp_path):
    config = load_config(
        ["window.kwargs.clusters=[[0,5],{steps: [6,7]}]", "optimizer.learning_rate=3e-5", "run.seed=4"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert differences(load_config(["--config", str(path)]), config) == {}


def test_differences_names_option_old_and_new():
    assert differences(load_config([]), load_config(["run.seed=4"])) == {"run.seed": (0, 4)}


STUDIES = sorted((CONFIGS / "study").glob("*.yaml"))
SHIPPED = sorted(set(CONFIGS.glob("**/*.yaml")) - set(STUDIES))


# every arm of every case is read: seconds each
LONG = [pytest.param(path, marks=pytest.mark.slow) if path.stem.startswith("arms_") else path for path in STUDIES]


@pytest.mark.parametrize("path", LONG, ids=lambda path: path.stem)
def test_every_shipped_study_can_be_run(path):
    read_study(path).check()


@pytest.mark.parametrize(("recipe", "demo"), [("hrf", "demo_fashion"), ("hrf_flow", "fashion_flow_hrf")])
def test_a_recipe_is_what_its_demo_was_measured_with(recipe, demo):
    words = ["--config", str(CONFIGS / f"{demo}.yaml")]
    measured, config = (
        load_config(words),
        load_config([*words, "--config", str(CONFIGS / "recipes" / f"{recipe}.yaml")]),
    )
    assert set(differences(measured, config)) == {"window.kwargs"}
    steps = config.sample.num_inference_steps
    ((first, end),) = config.window.kwargs["clusters"]
    assert measured.window.kwargs["clusters"] == [[first * steps, end * steps]]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_yaml_loads_and_names_a_schedule_and_options_that_exist(path):
    config = load_config(["--config", str(path)])
    assert isinstance(config, Config)
    steps = config.sample.num_inference_steps
    build_schedule(config.window.schedule, config.window.kwargs, num_inference_steps=steps, stop=steps - 1)
    build_config_advantages(config)
    assert config.reward.name in {info.name for info in list_rewards()}


def test_the_authors_hyperparameters_are_in_the_celebahq_files():
    for method in ("ddpo", "hrf", "hrf_d"):
        for reward in ("compressibility", "incompressibility", "aesthetic"):
            config = load_config(["--config", str(CONFIGS / "celebahq" / f"{method}_{reward}.yaml")])
            train, optimizer = config.train, config.optimizer
            assert (optimizer.learning_rate, train.clip_range, train.advantage_clip) == (5e-6, 1e-4, 2.5)
            assert (optimizer.weight_decay, optimizer.max_grad_norm, train.group_size) == (1e-3, 1.0, 5)
            assert (config.sample.num_inference_steps, config.sample.eta) == (40, 1.0)
