"""Rewards without pretrained networks: the registry, the checks around every call, JPEG sizes, functions of a user."""

import copy
import functools
import inspect
import io
import subprocess
import sys
import types
from dataclasses import asdict

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from hrf_fast.prompts import Prompt
from hrf_fast.rewards import (
    NotFiniteError,
    RewardError,
    RewardTerm,
    build_reward,
    check_rewards,
    list_rewards,
    register_reward,
    registry,
)


@pytest.fixture
def scratch_registry(monkeypatch):
    """Forget afterwards what a test registers."""
    list_rewards()
    monkeypatch.setattr(registry, "_rewards", copy.deepcopy(registry._rewards))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A function that writes a module into the current directory and returns its name."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)

    def write(body: str) -> str:
        name = f"user_rewards_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.py").write_text(body)
        return name

    return write


def images_of(*levels: float, size: int = 4) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, size, size).clone()


def pil_kilobytes(image: torch.Tensor, quality: int = 95) -> float:
    """The size by Pillow alone, from bytes made with numpy."""
    pixels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return len(buffer.getvalue()) / 1000


def built_from(result):
    """A built reward that returns `result` whatever the images are."""

    @register_reward("fixed")
    def factory():
        return lambda images, prompts=None: result

    return build_reward([RewardTerm("fixed")])


# --- import weight and listing


def test_rewards_are_listed_without_transformers():
    code = "import sys; from hrf_fast.rewards import list_rewards; "
    code += "print(len(list_rewards()), 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) >= 4 and out[1] == "False"


def test_the_list_tells_what_a_reward_is_takes_and_needs():
    infos = {info.name: info for info in list_rewards()}
    assert list(infos) == sorted(infos)
    assert {"jpeg_compressibility", "jpeg_incompressibility", "aesthetic", "classifier"} <= set(infos)
    jpeg = infos["jpeg_compressibility"]
    assert jpeg.description.startswith("Minus the size of the image as a JPEG, in kB")
    assert asdict(jpeg.arguments[0]) == {
        "name": "quality",
        "type": "int",
        "default": 95,
        "required": False,
        "doc": "JPEG quality, 1 to 100; the papers use 95.",
    }
    assert jpeg.needs == "Pillow"
    assert "transformers" in infos["aesthetic"].needs
    target = infos["classifier"].arguments[0]
    assert (target.name, target.required, target.default) == ("target", True, None)
    # the entry runs over two lines in the docstring
    assert target.doc.startswith("a class name or index") and target.doc.endswith("of which the image may be any.")


def test_every_argument_of_every_listed_reward_is_documented_and_none_is_of_the_run():
    for info in list_rewards():
        assert info.description and info.needs
        for argument in info.arguments:
            assert argument.doc and argument.type, f"{info.name}.{argument.name}"
            assert argument.name not in ("device", "option_prefix")


def test_a_reward_without_docstring_or_annotations_is_listed_too(scratch_registry):
    @register_reward("bare")
    def factory(strength=2):
        return lambda images, prompts=None: images.mean((1, 2, 3)) * strength

    info = next(info for info in list_rewards() if info.name == "bare")
    assert (info.description, info.needs) == ("", "nothing beyond torch")
    assert (info.arguments[0].name, info.arguments[0].type, info.arguments[0].doc) == ("strength", "", "")
    assert build_reward([RewardTerm("bare")])(images_of(0.25)).total.tolist() == [0.5]


def test_terms_survive_an_omegaconf_round_trip():
    config = OmegaConf.structured(RewardTerm)
    merged = OmegaConf.merge(config, {"name": "jpeg_compressibility", "weight": 2, "kwargs": {"quality": 50}})
    term = OmegaConf.to_object(merged)
    assert term == RewardTerm("jpeg_compressibility", 2.0, {"quality": 50})
    image = images_of(0.5)
    # the OmegaConf node itself builds as well as the object
    assert torch.equal(build_reward([merged])(image).total, build_reward([term])(image).total)


# --- registry and build-time errors


def test_a_name_is_registered_once(scratch_registry):
    register_reward("mine")(lambda: None)
    with pytest.raises(ValueError, match="'mine' is already registered; choose another name"):
        register_reward("mine")(lambda: None)


@pytest.mark.parametrize("name", ["", "module:function"])
def test_a_registered_name_is_not_empty_and_has_no_colon(name):
    with pytest.raises(ValueError, match="use a non-empty name without a colon"):
        register_reward(name)


def test_a_factory_that_takes_a_device_gets_the_device_of_the_run(scratch_registry):
    @register_reward("where")
    def factory(scale: float, *, device):
        assert device == "meta"
        return lambda images, prompts=None: torch.full((len(images),), scale)

    reward = build_reward("where", kwargs={"scale": 3.0}, device="meta")
    assert reward(images_of(0, 1)).total.tolist() == [3, 3]
    with pytest.raises(ValueError, match="reward.kwargs.device is unknown"):
        build_reward("where", kwargs={"scale": 1, "device": "cpu"})


def test_an_unknown_name_gets_the_nearest_one_and_the_list():
    with pytest.raises(ValueError) as caught:
        build_reward("jpeg_compresibility")
    assert "reward.name is 'jpeg_compresibility' (did you mean 'jpeg_compressibility'?)" in str(caught.value)
    assert "jpeg_compressibility, jpeg_incompressibility, pickscore" in str(caught.value)


def test_an_unknown_argument_names_the_accepted_ones():
    with pytest.raises(ValueError, match=r"reward.kwargs.qualty is unknown \(did you mean 'quality'\?\).*quality$"):
        build_reward("jpeg_compressibility", kwargs={"qualty": 90})


def test_no_reward_names_an_argument_by_an_option_that_does_not_exist():
    for info in list_rewards():
        with pytest.raises(ValueError, match=r"^reward\.kwargs\.nothing is unknown"):
            build_reward(info.name, kwargs={"nothing": 1})
    with pytest.raises(ValueError, match=r"^reward\.terms\[1\]\.kwargs\.quality is 0; use a whole number"):
        build_reward([RewardTerm("jpeg_compressibility"), RewardTerm("jpeg_incompressibility", kwargs={"quality": 0})])


def test_a_missing_argument_is_named_at_build_time():
    with pytest.raises(ValueError, match="reward.kwargs.target is missing"):
        build_reward("classifier")


def test_no_terms_bad_weights_and_all_zero_weights_are_refused():
    with pytest.raises(ValueError, match="reward.terms is empty; give at least one"):
        build_reward([])
    with pytest.raises(ValueError, match="weight of reward 'jpeg_compressibility' is nan; use a finite number"):
        build_reward([RewardTerm("jpeg_compressibility", weight=float("nan"))])
    with pytest.raises(ValueError, match="every weight in reward.terms is 0"):
        build_reward([RewardTerm("jpeg_compressibility", weight=0.0)])


def test_a_missing_package_gives_the_install_line(monkeypatch):
    # None in sys.modules is how Python marks a module that must not be imported
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError) as caught:
        build_reward("classifier", kwargs={"model": "someone/age", "target": 0})
    assert "reward.kwargs.model is 'someone/age', which needs transformers" in str(caught.value)
    assert 'pip install "transformers>=5.4"' in str(caught.value)


# --- sums and checks around a call


def test_one_term_of_weight_one_is_that_reward(scratch_registry):
    reward = built_from([0.1, -2.0])
    total, terms = reward(images_of(0, 1))
    assert total.dtype == torch.float32
    assert torch.equal(total, torch.tensor([0.1, -2.0]))
    assert torch.equal(terms["fixed"], total)


def test_terms_are_summed_with_their_weights_and_logged_without(scratch_registry):
    @register_reward("brightness")
    def factory(power: float = 1.0):
        return lambda images, prompts=None: images.mean((1, 2, 3)) ** power

    terms = [
        RewardTerm("brightness", 2.0),
        RewardTerm("brightness", -1.0, {"power": 2.0}),
        RewardTerm("brightness", 0.0, {"power": 0.0}),
    ]
    reward = build_reward(terms)
    rewards = reward(images_of(0.5, 1.0))
    # 2·0.5 − 0.5² = 0.75; 2·1 − 1² = 1
    assert rewards.total.tolist() == [0.75, 1.0]
    # before weights: the brightness, its square, and its power of 0
    assert {name: values.tolist() for name, values in rewards.terms.items()} == {
        "brightness": [0.5, 1.0],
        "brightness_2": [0.25, 1.0],
        "brightness_3": [1.0, 1.0],
    }
    assert reward.weights == {"brightness": 2.0, "brightness_2": -1.0}


def test_rewards_stay_what_they_were_where_a_reward_returns_the_same_memory_again():
    memory = torch.zeros(2)
    reward = build_reward(lambda images, prompts=None: memory.copy_(images.mean((1, 2, 3))))
    rewards = reward(images_of(0.5, 1.0))
    reward(images_of(0.0, 0.0))
    assert rewards.total.tolist() == [0.5, 1.0] and [v.tolist() for v in rewards.terms.values()] == [[0.5, 1.0]]


@pytest.mark.parametrize(
    "result",
    [
        [1, 2],
        np.array([1, 2]),
        np.array([1.0, 2.0], dtype=np.float64),
        np.array([2, 1], dtype=np.float32)[::-1],
        np.array([1, 2], dtype=">f4"),
        np.broadcast_to(np.array([2.0, 1.0]), (3, 2))[0, ::-1],
        torch.tensor([1, 2], dtype=torch.uint8),
        torch.tensor([1, 2], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor(2.0)],
        torch.tensor([1.0, 2.0], requires_grad=True),
    ],
)
def test_numbers_of_any_kind_lose_their_gradient_and_become_fp32_unless_they_are_fp64(result):
    values = check_rewards(images_of(0, 1), result, "r")
    double = getattr(result, "dtype", None) in (np.float64, torch.float64)
    assert values.dtype == (torch.float64 if double else torch.float32) and not values.requires_grad
    assert values.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([[1.0], [2.0]], r"reward 'fixed' returned shape \[2, 1\]; expected 2 real numbers, one per image: \[2\]"),
        ([1.0], r"returned shape \[1\]"),
        (1.0, r"returned shape \[\]"),
        (["a", "b"], "returned a list that is not an array of numbers"),
        (None, "returned a NoneType that is not an array of numbers"),
        (([1.0, 2.0], {}), r"returned a tuple that is not an array of numbers.*no info dict"),
        (torch.tensor([1j, 2.0]), "returned torch.complex64"),
        (torch.tensor([1.0, 2.0]).to_sparse(), "returned a Tensor that is not an array of numbers"),
        (torch.empty(2, device="meta"), "returned a Tensor that is not an array of numbers"),
        (
            [float("nan"), 1e39],
            r"returned 2 of 2 values that are NaN or infinite, first at index 0 \(nan\), 1 \(inf\)",
        ),
    ],
)
def test_what_is_not_one_finite_number_per_image_is_refused(scratch_registry, result, message):
    with pytest.raises(RewardError, match=message):
        built_from(result)(images_of(0, 1))


def test_only_the_first_bad_indexes_are_shown():
    bad = torch.zeros(9)
    bad[2:] = float("inf")
    with pytest.raises(
        RewardError, match=r"7 of 9 .* index 2 \(inf\), 3 \(inf\), 4 \(inf\), 5 \(inf\), 6 \(inf\); exp"
    ):
        check_rewards(images_of(*[0.0] * 9), bad, "r")


@pytest.mark.parametrize("order", [1, -1])
def test_a_reward_that_writes_into_its_images_changes_neither_other_terms_nor_the_caller(scratch_registry, order):
    @register_reward("spoiler")
    def spoiler():
        return lambda images, prompts=None: images.zero_().sum((1, 2, 3))

    @register_reward("level")
    def level():
        return lambda images, prompts=None: images.mean((1, 2, 3))

    images = images_of(0.25, 0.5)
    # the spoiler is worth 0, so the sum is the level
    assert build_reward([RewardTerm("spoiler"), RewardTerm("level")][::order])(images).total.tolist() == [0.25, 0.5]
    assert torch.equal(images, images_of(0.25, 0.5))


def test_an_exception_inside_names_the_reward_and_is_chained(scratch_registry):
    @register_reward("broken")
    def factory():
        def reward(images, prompts=None):
            raise KeyError("weights")

        return reward

    reward = build_reward([RewardTerm("jpeg_compressibility"), RewardTerm("broken")])
    with pytest.raises(RewardError, match="reward 'broken' failed with KeyError: 'weights'") as caught:
        reward(images_of(0.5))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_runs_in_full_precision_and_without_gradient_inside_a_bf16_training_step(scratch_registry):
    seen = []

    @register_reward("spy")
    def factory():
        def reward(images, prompts=None):
            flat = images.flatten(1)
            seen.append((flat @ flat.T).dtype)
            return images.sum((1, 2, 3))

        return reward

    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = build_reward([RewardTerm("spy")])(images_of(0.5).requires_grad_()).total
    assert seen == [torch.float32]
    assert not values.requires_grad


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 4, 4), r"got torch.float32 \[2, 1, 4, 4\]; repeat the channel"),
        (torch.zeros(3, 4, 4), r"got torch.float32 \[3, 4, 4\]"),
        (torch.zeros(0, 3, 4, 4), r"got torch.float32 \[0, 3, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "got torch.uint8 .* scale bytes by 1/255"),
        (images_of(-1, 1), r"got values in \[-1, 1\]; map \[-1, 1\] by images / 2 \+ 0.5"),
        (images_of(0, 255), r"got values in \[0, 255\]"),
        (images_of(0, float("nan")), r"got values in \[nan, nan\]"),
    ],
)
def test_images_that_no_reward_is_meant_for_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        build_reward("jpeg_compressibility")(images)


def test_prompts_are_handed_on_and_counted(user_module):
    name = user_module("def length(images, prompts):\n    return [len(prompt) for prompt in prompts]\n")
    reward = build_reward([RewardTerm(f"{name}:length")])
    assert reward(images_of(0, 1), ["cat", "horse"]).total.tolist() == [3, 5]
    with pytest.raises(ValueError, match="rewards got 1 prompts for 2 images"):
        reward(images_of(0, 1), ["cat"])


# --- JPEG


def test_jpeg_sizes_are_those_of_pillow_in_order():
    # rising noise gives rising sizes, so a wrong order shows
    noise = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = 0.5 + (noise - 0.5) * torch.linspace(0, 1, 12).view(-1, 1, 1, 1)
    expected = torch.tensor([pil_kilobytes(image) for image in images])
    assert (expected.diff() > 0).all()
    assert torch.equal(build_reward("jpeg_incompressibility")(images).total, expected)
    assert torch.equal(build_reward("jpeg_compressibility")(images).total, -expected)


def test_a_kilobyte_is_a_thousand_bytes_and_quality_is_an_argument():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    high = build_reward("jpeg_incompressibility")(image).total.item()
    low = build_reward("jpeg_incompressibility", kwargs={"quality": 10})(image).total.item()
    assert high == pytest.approx(pil_kilobytes(image[0], 95))
    assert low == pytest.approx(pil_kilobytes(image[0], 10))
    # 32·32 noisy pixels cannot be under 1 kB at quality 95 nor over their 3.1 kB of raw bytes and a header
    assert 1 < high < 4
    assert low < high


def test_dark_detail_counts_which_the_unscaled_tensor_of_the_authors_code_would_clip_to_black():
    # a checkerboard of 0 and 0.4: on [-1, 1] it is -1 and -0.2, and clamp(x·255, 0, 255) makes both black
    dark = torch.zeros(1, 3, 32, 32)
    dark[..., ::2, 1::2] = dark[..., 1::2, ::2] = 0.4
    slip = ((dark * 2 - 1) * 255).round().clamp(0, 255)
    assert slip.max() == 0
    size, black = build_reward("jpeg_incompressibility")(torch.cat([dark, torch.zeros_like(dark)])).total
    assert size.item() == pytest.approx(pil_kilobytes(dark[0]))
    assert size > 1.2 * black


def test_half_precision_images_are_rewarded_for_what_their_values_say():
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    size = build_reward("jpeg_incompressibility")(image).total
    assert size.item() == pytest.approx(pil_kilobytes(image[0].float()))


@pytest.mark.parametrize("quality", [0, 101, 9.5, "95", True])
def test_a_quality_that_jpeg_does_not_have_is_refused(quality):
    with pytest.raises(ValueError, match=r"^reward\.kwargs\.quality is .*; use a whole number"):
        build_reward("jpeg_compressibility", kwargs={"quality": quality})


# --- module:function


def test_a_function_in_the_current_directory_is_a_reward(user_module):
    name = user_module(
        "def redness(images, prompts, gain=1.0):\n"
        "    assert prompts is None\n"
        "    return (gain * images[:, 0].mean((1, 2))).tolist()\n"
    )
    reward = build_reward([RewardTerm(f"{name}:redness", kwargs={"gain": 4.0})])
    rewards = reward(images_of(0.25, 0.5))
    assert rewards.total.tolist() == [1, 2]
    assert list(rewards.terms) == [f"{name}:redness"]


def test_a_callable_object_is_a_reward(user_module):
    name = user_module(
        "class Mean:\n"
        "    def __call__(self, images, prompts):\n"
        "        return images.mean((1, 2, 3)).numpy()\n"
        "mean = Mean()\n"
    )
    assert build_reward([RewardTerm(f"{name}:mean")])(images_of(0.5)).total.tolist() == [0.5]


def test_a_function_whose_signature_cannot_be_read_fails_at_its_first_call_instead():
    with pytest.raises(ValueError, match="no signature found"):
        inspect.signature(max)
    reward = build_reward([RewardTerm("builtins:max")])
    with pytest.raises(RewardError, match="reward 'builtins:max' failed with TypeError"):
        reward(images_of(0.5))


@pytest.mark.parametrize("spec", ["module:", ":function", "a:b:c", "my module:function", "path/module.py:function"])
def test_a_malformed_spec_says_what_the_form_is(spec):
    with pytest.raises(ValueError, match='write "module:function" or "package.module:function"'):
        build_reward([RewardTerm(spec)])


def test_a_module_that_is_not_there_is_named(user_module):
    with pytest.raises(
        ValueError, match="'no_such_module_1:f' but importing 'no_such_module_1' failed: No module named"
    ):
        build_reward([RewardTerm("no_such_module_1:f")])


def test_a_module_that_raises_while_it_is_imported_says_what(user_module):
    name = user_module("1 / 0\n")
    with pytest.raises(ValueError, match=f"importing '{name}' raised ZeroDivisionError: division by zero") as caught:
        build_reward([RewardTerm(f"{name}:f")])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_attribute_that_is_missing_not_callable_or_a_class_is_refused(user_module):
    name = user_module("def brightness(images, prompts): ...\nlevel = 3\nclass Scorer: ...\n")
    with pytest.raises(ValueError, match=r"no callable 'brightnes' \(did you mean 'brightness'\?\)"):
        build_reward([RewardTerm(f"{name}:brightnes")])
    with pytest.raises(ValueError, match="no callable 'level'"):
        build_reward([RewardTerm(f"{name}:level")])
    with pytest.raises(ValueError, match="Scorer', which is a class; name a function"):
        build_reward([RewardTerm(f"{name}:Scorer")])


@pytest.mark.parametrize(
    ("definition", "kwargs", "cause"),
    [
        ("f(images, prompts)", {"gain": 2}, "unexpected keyword argument 'gain'"),
        ("f(images, prompts, gain)", {}, "missing a required argument: 'gain'"),
        ("f(images)", {}, "too many positional arguments"),
    ],
)
def test_a_signature_that_does_not_fit_the_kwargs_is_found_before_the_run(user_module, definition, kwargs, cause):
    name = user_module(f"def {definition}: ...\n")
    call = "f(images, prompts, gain=…)" if kwargs else "f(images, prompts)"
    with pytest.raises(ValueError) as caught:
        build_reward([RewardTerm(f"{name}:f", kwargs=kwargs)])
    assert f"called as {call} but defined as {definition}: " in str(caught.value)
    assert cause in str(caught.value)


# --- functions, and those written for TRL


def redness(images, prompts):
    return images[:, 0].mean((1, 2))


def test_a_function_is_a_reward_named_after_itself_with_the_checks_of_any_other():
    reward = build_reward(redness)
    total, terms = reward(images_of(0.25, 0.5), ["a", "b"])
    assert total.tolist() == [0.25, 0.5] and list(terms) == ["redness"]
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        reward(images_of(-1, 1))
    with pytest.raises(RewardError, match="'<lambda>' returned 1 of 2 values that are NaN"):
        build_reward(lambda images, prompts: [1.0, float("nan")])(images_of(0, 1))
    with pytest.raises(RewardError, match="'redness' failed with IndexError"):
        build_reward(functools.wraps(redness)(lambda images, prompts: images[9]))(images_of(0.5))


def test_an_object_that_is_called_is_named_after_its_class():
    class Brightness:
        def __call__(self, images, prompts=None):
            return images.mean((1, 2, 3))

    assert list(build_reward(Brightness())(images_of(0.5)).terms) == ["Brightness"]


def test_a_sum_that_overflows_is_refused_as_a_value_that_is_not_finite():
    term = RewardTerm("jpeg_compressibility", weight=1e38)
    with pytest.raises(NotFiniteError, match="the sum is not finite in torch.float32; use smaller weights"):
        build_reward([term, RewardTerm("jpeg_compressibility", weight=3.4e38)])(images_of(0, 1).repeat(1, 1, 64, 64))


def test_a_reward_that_changes_the_metadata_of_a_prompt_changes_its_own_only():
    prompt = Prompt("a", metadata={"attributes": {"hair": "red"}})

    def takes(images, prompts, metadata):
        return [len(data["attributes"].pop("hair")) for data in metadata]

    for _ in range(2):
        assert build_reward(takes)(images_of(0.5), [prompt]).total.tolist() == [3]


@pytest.mark.parametrize("name", ["metadata", "prompt_metadata"])
@pytest.mark.parametrize("where", ["module", "function"])
def test_a_reward_written_for_trl_gets_metadata_and_its_tuple_is_read(user_module, where, name):
    body = f"def trl(images, prompts, {name}):\n"
    body += f"    return images.mean((1, 2, 3)) + len({name}) + sum(map(len, {name})), {{'seen': 1}}\n"
    module = types.ModuleType("trl_rewards")
    exec(body, vars(module))
    reward = f"{user_module(body)}:trl" if where == "module" else module.trl
    # two images, so two empty dicts
    assert build_reward(reward)(images_of(0.25, 0.5), ["a", "b"]).total.tolist() == [2.25, 2.5]


def test_a_reward_written_for_trl_may_return_rewards_alone_and_is_checked_too():
    assert build_reward(lambda images, prompts, metadata: [1, 2])(images_of(0, 1)).total.tolist() == [1, 2]
    with pytest.raises(RewardError, match=r"shape \[1\]"):
        build_reward(lambda images, prompts, metadata: ([1.0], {}))(images_of(0, 1))
    with pytest.raises(RewardError, match="no tuple"):
        build_reward(lambda images, prompts: (images.mean((1, 2, 3)), {}))(images_of(0, 1))


def test_a_metadata_that_the_config_gives_is_the_user_s_own(user_module):
    name = user_module("def f(images, prompts, metadata):\n    return [metadata] * len(images)\n")
    assert build_reward([RewardTerm(f"{name}:f", kwargs={"metadata": 3})])(images_of(0.5)).total.tolist() == [3]


@pytest.mark.parametrize("function", [lambda images: images, lambda images, prompts, gain: images])
def test_a_function_that_does_not_take_images_and_prompts_is_refused_before_the_run(function):
    with pytest.raises(ValueError, match="'<lambda>', which is called as <lambda>.images, prompts. but defined as"):
        build_reward(function)
