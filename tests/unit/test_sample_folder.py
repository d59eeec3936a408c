"""`hrf sample --folder` and `--prompts`: a PNG for each image, what each shows, and a process that is stopped."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from hrf_fast.cli import main
from hrf_fast.commands import image_folder
from hrf_fast.evaluation.grids import Grid
from hrf_fast.policies.pixel import PixelPolicy
from tests.text_models import text_model

LINES = (
    '{"prompt": "a cat", "negative": "wet", "tag": "animal"}\n'
    '{"prompt": "unseen", "weight": 0}\n'
    '{"prompt": "a\\u2028dog"}\n'
)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(LINES)
    return path


def draw(model, *words):
    steps = [] if any(str(word).startswith("--deterministic-steps") for word in words) else ["--steps=2"]
    assert main(["sample", str(model), *steps, "--device=cpu", *map(str, words)]) == 0


def refused(capsys, model, *words):
    assert main(["sample", str(model), "--steps=2", "--device=cpu", *map(str, words)]) == 1
    return capsys.readouterr().err


def lines(folder):
    return [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


@pytest.mark.parametrize("more", [[], ["--deterministic-steps=3"]], ids=["with noise", "without"])
def test_a_folder_has_the_images_of_the_grid_and_a_line_for_each(tiny_model, tmp_path, capsys, more):
    words = ["--count=5", "--images-per-call=2", "--seed=3", *more]
    draw(tiny_model, *words, "--out", tmp_path / "grid.png")
    (tmp_path / "images").mkdir()
    draw(tiny_model, *words, "--folder", tmp_path / "images")
    out, err = capsys.readouterr()
    taken = "3 deterministic steps" if more else "2 steps"
    assert f"{tmp_path / 'images'}: 5 images of {tiny_model} in {taken}" in out and "5/5" in err
    images = pictures(tmp_path / "images")
    assert list(images) == [f"00000{number}.png" for number in range(5)]
    assert lines(tmp_path / "images") == [{"file": name} for name in images]
    # the grid enlarges 16 pixels to 64
    cells = Grid(5).cut(Image.open(tmp_path / "grid.png"))
    for image, cell in zip(images.values(), cells, strict=True):
        assert image.shape == (16, 16, 3) and (np.asarray(cell)[::4, ::4] == image).all()
    assert not [path for path in (tmp_path / "images").iterdir() if path.suffix not in (".png", ".jsonl")]


def test_images_are_decoded_a_call_at_a_time(tiny_model, tmp_path, monkeypatch):
    decode, sizes = PixelPolicy.decode, []

    def counted(self, latents):
        sizes.append((len(latents), len(pictures(tmp_path / "images"))))
        return decode(self, latents)

    monkeypatch.setattr(PixelPolicy, "decode", counted)
    draw(tiny_model, "--count=5", "--images-per-call=2", "--folder", tmp_path / "images")
    # images of a call, and images that were written before
    assert sizes == [(2, 0), (2, 2), (1, 4)]


def test_a_process_that_is_stopped_leaves_no_half_image_and_no_line_without_one(tiny_model, tmp_path, monkeypatch):
    folder, write = tmp_path / "images", image_folder.write_atomically

    def stopped(path, data):
        if path.name == "000003.png":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(image_folder, "write_atomically", stopped)
    assert main(["sample", str(tiny_model), "--steps=2", "--count=5", "--folder", str(folder)]) == 130
    assert [line["file"] for line in lines(folder)] == list(pictures(folder)) == [f"00000{n}.png" for n in range(3)]
    # each file goes through a writer that a crash leaves whole
    assert len(list(folder.iterdir())) == 4


@pytest.mark.long
def test_prompts_of_a_file_share_the_images_and_are_written_with_metadata(prompts, tmp_path):
    model, words = text_model("sd1"), ["--prompts", prompts, "--guidance=3", "--negative=blurry"]
    draw(model, *words, "--count=5", "--folder", tmp_path / "images")
    cat = {"prompt": "a cat", "negative": "wet", "metadata": {"tag": "animal"}}
    dog = {"prompt": "a\u2028dog", "negative": "blurry"}
    # 5 // 2 images of each; weight 0 is never drawn
    assert lines(tmp_path / "images") == [
        {"file": f"00000{number}.png", **line} for number, line in enumerate([cat, cat, dog, dog])
    ]
    # the images that --prompt and --negative draw
    words = ["--prompt=a cat", "--negative=wet", "--prompt=a\u2028dog", "--negative=blurry", "--guidance=3"]
    draw(model, *words, "--count=4", "--out", tmp_path / "grid.png")
    cells = Grid(4, 2).cut(Image.open(tmp_path / "grid.png"))
    images = list(pictures(tmp_path / "images").values())
    assert all((np.asarray(cell)[::4, ::4] == image).all() for cell, image in zip(cells, images, strict=True))
    (tmp_path / "plain.txt").write_text("# mine\na cat\na dog\n")
    draw(model, "--prompts", tmp_path / "plain.txt", "--count=2", "--folder", tmp_path / "plain")
    assert [line["prompt"] for line in lines(tmp_path / "plain")] == ["a cat", "a dog"]


def test_what_can_not_be_drawn_into_a_folder_is_refused_before_a_model_is_loaded(
    prompts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("hrf_fast.commands.sample._policy", lambda *_: pytest.fail("loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one_by_one.py").write_text("def draw():\n    return 'a cat', {}\n")
    full = ["--folder", tmp_path]
    assert f"--folder is {tmp_path}, which is there and not empty; name a new" in refused(capsys, "any", *full)
    assert f"--folder is {prompts}, which is a file" in refused(capsys, "any", "--folder", prompts)
    both = ["--folder", tmp_path / "new", "--out", "grid.png"]
    assert re.search("--out is grid.png and --folder is .*new; give one of them", refused(capsys, "any", *both))
    for words, message in (
        ([prompts, "--prompt=a"], f"--prompts is {prompts} and --prompt 'a'; give one of them"),
        ([prompts, "--count=1"], f"--prompts {prompts} has 2 prompts but --count is 1; draw an image of each"),
        ([prompts, "--negative=a", "--negative=b"], f"--negative is given 2 times with --prompts {prompts}; give one"),
        (["missing.txt"], "--prompts is 'missing.txt': no such file"),
        (["one_by_one:draw"], "--prompts is one_by_one:draw, a function of one prompt at a time; let it return a list"),
    ):
        assert message in refused(capsys, "any", "--folder", tmp_path / "new", "--prompts", *words)
    assert not (tmp_path / "new").exists()


def test_a_model_without_prompts_refuses_a_file_of_them(tiny_model, prompts, tmp_path, capsys):
    error = refused(capsys, tiny_model, "--prompts", prompts, "--folder", tmp_path / "new")
    assert f"{tiny_model} takes no prompts; leave --prompt, --prompts and --negative out" in error
    assert not (tmp_path / "new").exists()
