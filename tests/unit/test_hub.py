"""One rule for every option that names a model or a file: shipped, local, or on the hub."""

import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from hrf_fast.hub import find_file, find_folder
from tests.hub import COMMIT, ID, Hub

FILES = ("config.json", "unet/config.json", "*.index.json")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one repository, of two parts and a text encoder that nobody needs."""
    for name in (
        "config.json",
        "model.bin",
        "unet/config.json",
        "unet/a.safetensors",
        "text/config.json",
        "text/b.bin",
    ):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_text("{}")
    served = Hub(monkeypatch, tmp_path / "source", tmp_path / "cache")

    def download(name, filename):
        if not (served.source / filename).exists():
            raise EntryNotFoundError("404\nand more lines")
        served.downloaded.append(filename)
        return str(served.source / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return served


@pytest.fixture
def unreachable(monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("cannot reach the hub\nand more lines")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)


def find(**options):
    return find_folder("model.name", ID, **{"files": FILES, **options})


def test_a_shipped_name_and_a_folder_are_found_without_the_hub_also_from_home(tmp_path, monkeypatch):
    shipped = {"fashion": tmp_path / "shipped"}
    for name in ("shipped", "mine"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_folder("model.name", "fashion", shipped=shipped, files=()) == tmp_path / "shipped"
    for value in (str(tmp_path / "mine"), "~/mine"):
        assert find_folder("model.name", value, shipped=shipped, files=()) == tmp_path / "mine"
    (tmp_path / "head.pth").write_text("")
    for value in (str(tmp_path / "head.pth"), "~/head.pth"):
        assert find_file("aesthetic.head", value) == tmp_path / "head.pth"


def test_only_the_named_files_are_downloaded_and_then_those_chosen_of_all_names(hub):
    told = []

    def choose(folder, names):
        told.append((folder, sorted(names), sorted(hub.downloaded)))
        return ["unet/a.safetensors", "config.json"]

    assert find(choose=choose) == hub.snapshot and (hub.snapshot / "unet" / "a.safetensors").is_file()
    names = ["config.json", "model.bin", "text/b.bin", "text/config.json", "unet/a.safetensors", "unet/config.json"]
    # asked again when the first choice is there
    first = ["config.json", "unet/config.json"]
    assert told == [(hub.snapshot, names, first), (hub.snapshot, names, sorted([*first, "unet/a.safetensors"]))]
    assert hub.downloaded == ["config.json", "unet/config.json", "unet/a.safetensors"]


def test_a_choice_that_refuses_the_model_downloads_nothing_more(hub):
    def refuse(folder, names):
        raise ValueError("model.name is another kind of model")

    with pytest.raises(ValueError, match="^model.name is another kind of model$"):
        find(choose=refuse)
    assert hub.downloaded == ["config.json", "unet/config.json"]


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_out_of_reach_the_cache_that_another_program_has_filled_in_part_is_enough(hub, revision):
    # no config.json at the top: whether it is needed is for the caller to say
    hub.put_into_cache("unet/*")
    hub.online = False
    told = []
    choose = lambda folder, names: told.append(names) or ["unet/a.safetensors"]  # noqa: E731
    assert find(revision=revision, choose=choose) == hub.snapshot
    assert told == [["unet/a.safetensors", "unet/config.json"]]


def test_what_the_cache_lacks_is_an_error_that_says_the_hub_was_not_asked(hub):
    hub.put_into_cache("unet/config.json")
    hub.online = False

    def refuse(folder, names):
        raise ValueError("model.name is 'owner/model', which has no weights")

    with pytest.raises(ValueError, match="which has no weights .*only .* was searched.*OfflineModeIsEnabled"):
        find(choose=refuse)
    with pytest.raises(ValueError, match="model.name is 'owner/model'.*hf download owner/model"):
        find(revision="v2")


def test_a_revision_of_a_folder_or_of_a_shipped_model_is_refused(tmp_path):
    for name, folder in ((str(tmp_path), tmp_path), ("fashion", tmp_path)):
        with pytest.raises(ValueError, match=rf"model.revision is 'v2' but model.name is '{name}'.* it is .*{folder}"):
            find_folder("model.name", name, shipped={"fashion": tmp_path}, revision="v2", files=FILES)


def test_the_real_client_offline_finds_what_a_real_cache_holds(hub, monkeypatch):
    hub.put_into_cache("unet/*")
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find(choose=lambda folder, names: names) == hub.snapshot
    with pytest.raises(ValueError, match="model.name is 'owner/model'.*OfflineModeIsEnabled.*hf download owner/model"):
        find(choose=lambda folder, names: ["model.bin"])


def test_a_file_on_the_hub_is_downloaded_alone(hub):
    assert find_file("aesthetic.head", "owner/model:text/b.bin") == hub.source / "text" / "b.bin"
    assert hub.downloaded == ["text/b.bin"]
    with pytest.raises(ValueError, match="aesthetic.head is 'owner/model:absent.pth'.*404") as caught:
        find_file("aesthetic.head", "owner/model:absent.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["fashon", "./owner/model", "/no/such", "~/no/such", "gpt2", "owner/model/unet", ""])
def test_what_is_neither_local_nor_of_the_hub_s_form_is_refused_before_the_hub_is_asked(hub, value):
    with pytest.raises(ValueError) as caught:
        find_folder("model.name", value, shipped={"fashion": hub.source}, files=FILES)
    message = str(caught.value)
    assert message.startswith(f"model.name is {value!r}") and "owner/name" in message and "fashion" in message
    assert ("did you mean 'fashion'" in message) == (value == "fashon")
    with pytest.raises(ValueError, match="aesthetic.head is .*owner/repository:filename"):
        find_file("aesthetic.head", value)
    assert hub.downloaded == []


@pytest.mark.parametrize("value", ["owner/heads", "owner/heads:", ":head.pth", "a/b/c:head.pth"])
def test_a_file_on_the_hub_needs_a_repository_and_a_name(hub, value):
    with pytest.raises(ValueError, match="aesthetic.head is .*owner/repository:filename"):
        find_file("aesthetic.head", value)
    assert hub.downloaded == []


@pytest.mark.parametrize("value", [5, None, ["owner/model"]])
def test_a_value_that_is_no_text_is_refused_by_name(value):
    for find_it in (
        lambda: find_folder("aesthetic.clip", value, files=FILES),
        lambda: find_file("aesthetic.clip", value),
    ):
        with pytest.raises(ValueError) as caught:
            find_it()
        assert str(caught.value).startswith(f"aesthetic.clip is {value!r};")


def test_out_of_reach_the_error_has_the_command_that_brings_the_model(unreachable):
    with pytest.raises(ValueError) as caught:
        find_folder("aesthetic.clip", "owner/clip", files=FILES)
    message = str(caught.value)
    assert "aesthetic.clip is 'owner/clip'" in message and "cannot reach the hub" in message and "\n" not in message
    assert "hf download owner/clip --local-dir some/folder" in message and "aesthetic.clip=some/folder" in message
    with pytest.raises(ValueError) as caught:
        find_file("aesthetic.head", "owner/heads:v1.pth")
    message = str(caught.value)
    assert "hf download owner/heads v1.pth --local-dir some/folder" in message
    assert "aesthetic.head=some/folder/v1.pth" in message


@pytest.mark.parametrize(
    ("kind", "status", "way_out"),
    [
        (GatedRepoError, 401, "; accept the licence on https://huggingface.co/owner/model, then run `hf auth login`"),
        (GatedRepoError, 403, "; accept the licence on https://huggingface.co/owner/model, then run `hf auth login`"),
        (RepositoryNotFoundError, 401, "; check the name; .*private or gated.*accept the licence.*`hf auth login`"),
        (HfHubHTTPError, 403, "; check the name; .*private or gated.*accept the licence.*`hf auth login`"),
    ],
)
def test_a_repository_that_asks_for_a_licence_says_how_to_give_it(hub, monkeypatch, kind, status, way_out):
    error = kind(
        f"{status} Client Error\nand more lines", response=SimpleNamespace(status_code=status, headers={}, request=None)
    )

    def fail(*_, **__):
        raise error

    # the hub tells anybody about a gated repository, and asks at its files
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    for find_it in (find, lambda: find_file("model.name", f"{ID}:a.pth")):
        with pytest.raises(
            ValueError, match=f"^model.name is '{ID}.*{status} Client Error.*{way_out}.*HF_TOKEN"
        ) as caught:
            find_it()
        assert "\n" not in str(caught.value) and "connected machine" not in str(caught.value)


def test_a_local_model_is_found_without_importing_the_hub_s_client(tmp_path):
    code = f"import sys; from hrf_fast.hub import find_folder; find_folder('model.name', {str(tmp_path)!r}, files=()); "
    code += "print(sorted({'huggingface_hub', 'torch', 'transformers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
