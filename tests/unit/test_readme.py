"""README and docs/: their Python runs, their commands and options exist, their links and paths lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import hrf_fast
from benchmarks.gpu_bench.page import MARKERS
from hrf_fast.assembly.algorithm import build_config_advantages
from hrf_fast.assembly.inputs import build_config_reward
from hrf_fast.cli import parse
from hrf_fast.config.load import load_config
from hrf_fast.config.options import FACTS, SECTIONS
from hrf_fast.rewards import list_rewards, registry
from hrf_fast.run.files import read_log

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
LAUNCHERS = ("deepspeed", "torchrun", "accelerate")
# of other projects, or what a user types once
OTHERS = ("hf", "python", "make")


def blocks(page, language=""):
    """The fenced blocks of a page that are marked as `language`."""
    # the text before a block, its mark and what is in it, in turn
    parts = re.split(r"^```(.*)\n((?:(?!```).*\n)*)```$", page.read_text(), flags=re.MULTILINE)
    return [block for mark, block in zip(parts[1::3], parts[2::3], strict=True) if mark == language]


def commands(page):
    """The words of every command in a page's unmarked blocks; a block that starts with `$ ` shows output below."""
    found = []
    for block in blocks(page):
        lines = block.replace("\\\n", " ").splitlines()
        if lines[0].startswith("$ "):
            lines = [lines[0].removeprefix("$ ")]
        lines = [line for line in lines if line.split()[:1] and line.split()[0] in ("hrf", *LAUNCHERS, *OTHERS)]
        found += [shlex.split(line, comments=True) for line in lines]
    return found


COMMANDS = [(page, words) for page in (README, *DOCS) for words in commands(page)]


def test_pages_have_commands():
    # a page written in another way would pass everything below
    assert len(COMMANDS) > 40
    assert {page.name for page, _ in COMMANDS} >= {"README.md", "speed.md", "windows.md", "multi_gpu.md", "peeps.md"}


@pytest.mark.parametrize("page, words", COMMANDS, ids=[f"{page.name}: {' '.join(w)[:60]}" for page, w in COMMANDS])
def test_commands_exist_with_their_options(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *rest = words
    if program in LAUNCHERS:
        assert "hrf_fast/train.py" in rest
        build_config_advantages(load_config(rest[rest.index("hrf_fast/train.py") + 1 :]))
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python":
        path = f"{rest[1].replace('.', '/')}.py" if rest[0] == "-m" else rest[0]
        assert (ROOT / path).is_file()
    elif rest[:1] == ["train"]:
        if rest[1:] != ["--help"]:
            # which refuses options of another kind of advantages
            build_config_advantages(load_config(rest[1:]))
    elif program == "hrf":
        arguments = parse(rest)
        files = [word for file in getattr(arguments, "config", []) for word in ("--config", file)]
        load_config([*files, *getattr(arguments, "overrides", [])])
        if rest[0] == "bench":
            bench = importlib.import_module(f"benchmarks.bench_{arguments.what}")
            bench.parse(arguments.words)


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
HEADS = [
    shlex.split(" ".join(found.split()))
    for path in CONFIGS
    for found in re.findall(r"^# +hrf train ((?:.*\\\n#)*.*)", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("words", HEADS, ids=" ".join)
def test_commands_at_the_head_of_a_configuration_are_ones(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    mine = [word if word != "mine.yaml" else "configs/demo.yaml" for word in words]
    build_config_advantages(load_config(mine))


def test_the_index_of_configurations_names_every_one():
    named = set(re.findall(r"`([\w./]+)`", (ROOT / "configs" / "README.md").read_text()))
    for path in CONFIGS:
        name = path.relative_to(ROOT / "configs").as_posix()
        assert name in named or f"{name.split('/')[0]}/" in named, name
    assert [name for name in named if not (ROOT / "configs" / name).exists()] == []


def test_heads_have_commands():
    assert len(HEADS) > 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page):
    # a note about an earlier version is a quotation and has that version's names
    text = "\n".join(line for line in page.read_text().splitlines() if not line.startswith(">"))
    named = re.findall(rf"`(?:--)?((?:{'|'.join(SECTIONS)})\.[a-z_]+)\b", text)
    files = (".py", ".safetensors")
    assert {name for name in named if name not in FACTS and not name.endswith(files)} == set()


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", *ROOT.glob("*/README.md")], ids=str)
def test_links_lead_to_files(page):
    targets = re.findall(r"(?<!!)\[[^]]*\]\(([^)#]+)\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_lead_to_headings(page):
    targets = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text())
    pages = [(page.parent / target if target else page, anchor) for target, anchor in targets]
    assert [f"{path.name}#{anchor}" for path, anchor in pages if anchor not in anchors(path)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_of_a_page_exist(page):
    names = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    assert [name for name in names if not (page.parent / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_a_page_names_exist(page):
    paths = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|yaml|json|md|j2))`", page.read_text())
    homes = (ROOT, ROOT / "hrf_fast", page.parent)
    assert [path for path in paths if not any((home / path).is_file() for home in homes)] == []


def test_every_page_is_linked_from_the_readme_or_from_the_page_of_its_folder():
    for page in DOCS:
        # docs/results.md lists docs/results/
        index = README if page.parent == ROOT / "docs" else page.parent.with_suffix(".md")
        assert f"({page.relative_to(index.parent).as_posix()})" in index.read_text(), page


def test_the_readme_is_a_screen_and_a_half():
    # a table that `hrf bench gpu --write README.md` puts there comes on top
    first, last = (re.escape(marker) for marker in MARKERS)
    text, tables = re.subn(f"{first}.*?{last}", "", README.read_text(), flags=re.DOTALL)
    assert tables == 1
    assert len(text.splitlines()) <= 132 and len(text.split()) <= 1030


def run_block(code, monkeypatch, words):
    """Run a block of a page in the repository's folder, with `words` added to the configuration that it loads."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(hrf_fast, "load_config", lambda argv: load_config([*argv, *words]))
    names = {"__name__": "page"}
    exec(code, names)
    return names


def test_the_reward_of_the_readme_has_the_name_of_its_command():
    ((code, name, _),) = own_reward(README)
    names = {}
    exec(code, names)
    assert name == "my_rewards:brightness"
    assert names["brightness"](torch.ones(2, 3, 4, 4), None).tolist() == [1, 1]


def test_the_python_of_the_docs_trains(tiny_run, tmp_path, monkeypatch, capsys):
    (code, _) = blocks(ROOT / "docs" / "run_folder.md", "python")
    # the fashion network reads any picture, so that the block's Vendi Score is there
    words = [*tiny_run, "train.groups_per_step=2", "stop.max_evaluations=0", "evaluation.network=fashion"]
    # a panel of six images has no share of the pretrained model's
    words += [
        "window.kwargs.clusters=[[0, 6]]",
        "stop.on_collapse=warn",
        "stop.diversity_floor=0",
        "stop.quality_floor=0",
    ]
    names = run_block(code, monkeypatch, words)
    result = names["result"]
    assert isinstance(result, hrf_fast.RunResult) and (tmp_path / "run" / "model").is_dir()
    assert load_config(["--config", str(tmp_path / "run" / "config.yaml")]).reward.name == "page:brightness"
    assert capsys.readouterr().out.splitlines()[-1].startswith("train.iterations is 2 [")
    page = (ROOT / "docs" / "run_folder.md").read_text()
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        (record, *_) = read_log(tmp_path / "run" / log)
        assert [key for key in record if f"`{key}`" not in page] == []


def own_reward(page):
    """(file, module:function, words) of every `hrf train` of a page whose reward is in a block of that page."""
    files = {code.splitlines()[0].removeprefix("# "): code for code in blocks(page, "python")}
    for words in (words for words in commands(page) if words[:2] == ["hrf", "train"]):
        names = [word.removeprefix("reward.name=") for word in words if word.startswith("reward.name=") and ":" in word]
        for name in names:
            yield files[f"{name.partition(':')[0]}.py"], name, words[2:]


REWARDS = list(own_reward(ROOT / "docs" / "rewards.md"))


@pytest.mark.parametrize("code, name, words", REWARDS, ids=[name for _, name, _ in REWARDS])
def test_rewards_of_the_docs_are_rewards(code, name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name.partition(':')[0]}.py").write_text(code)
    reward = build_config_reward(load_config(words), torch.device("cpu"))
    for count in (5, 3):
        images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
        assert reward(images).total.shape == (count,)


def test_the_registered_reward_of_the_docs_is_built_by_its_name(tmp_path, monkeypatch):
    (code,) = (code for code in blocks(ROOT / "docs" / "rewards.md", "python") if "register_reward" in code)
    # the families register once, when they are first asked for
    built_in = {info.name for info in list_rewards()}
    entries = registry._rewards._entries
    monkeypatch.setattr(registry._rewards, "_entries", dict(entries))
    exec(code, {"__name__": "page"})
    reward = build_config_reward(load_config(["reward.name=contrast", "reward.kwargs.power=2"]), torch.device("cpu"))
    # half of the pixels 0 and half 1, 6 in all: variance 6/5·1/4
    images = torch.tensor([0.0, 1.0]).repeat(3).reshape(1, 3, 1, 2)
    assert reward(images).total.item() == pytest.approx(0.3)
    assert {info.name for info in list_rewards()} - built_in == {"contrast"}


def test_the_weighted_sum_of_the_docs_is_built(tmp_path, monkeypatch):
    (layer,) = blocks(ROOT / "docs" / "rewards.md", "yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sum.yaml").write_text(layer)
    (code, *_) = blocks(ROOT / "docs" / "rewards.md", "python")
    (tmp_path / "my_rewards.py").write_text(code)
    reward = build_config_reward(load_config(["--config", "sum.yaml"]), torch.device("cpu"))
    terms = reward(torch.rand(2, 3, 32, 32)).terms
    assert list(terms) == ["classifier", "jpeg_compressibility", "my_rewards:brightness"]


def test_the_schedule_of_the_docs_trains(tiny_run, monkeypatch):
    (code,) = blocks(ROOT / "docs" / "windows.md", "python")
    schedule = run_block(code, monkeypatch, [])["Late"]
    records = []

    class Windows(hrf_fast.Listener):
        def iteration(self, record):
            records.append(record["window_starts"])

    hrf_fast.train(load_config(tiny_run), schedule=schedule, listeners=[Windows()])
    # T 6, of which step 5 is deterministic: there is one start in the last third
    assert records == [[4, 4], [4, 4]]


def test_the_listener_of_the_docs_ends_the_run_when_the_images_are_dark(monkeypatch):
    (_, code) = blocks(ROOT / "docs" / "run_folder.md", "python")
    calls = []
    monkeypatch.setattr(hrf_fast, "train", lambda config, **options: calls.append((config, options)))
    run_block(code, monkeypatch, [])
    ((config, options),) = calls
    assert config.run.folder == "runs/not_dark"
    (listener,) = options["listeners"]
    reasons = [listener.panel({}, torch.full((2, 3, 4, 4), level)) for level in (0.5, 0.1)]
    assert reasons == [None, "the images are dark"]
