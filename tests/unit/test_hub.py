"""One rule for every option that names a model or a file: shipped, local, or on the hub."""

import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from hrf_fast.hub import find_file, find_folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one repository, `owner/model`; the list holds what was asked for."""
    repository = tmp_path / "snapshot"
    (repository / "unet").mkdir(parents=True)
    for name in ("config.json", "model.bin", "unet/weights.bin"):
        (repository / name).write_text("{}")
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(repository)

    def download(name, filename):
        asked.append((name, filename))
        if not (repository / filename).exists():
            raise EntryNotFoundError("404\nand more lines")
        return str(repository / filename)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return repository, asked


@pytest.fixture
def offline(monkeypatch):
    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("cannot reach the hub\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)


def test_a_shipped_name_and_a_folder_are_found_without_the_hub_also_from_home(tmp_path, monkeypatch):
    shipped = {"fashion": tmp_path / "shipped"}
    for name in ("shipped", "mine"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_folder("model.name", "fashion", shipped=shipped) == tmp_path / "shipped"
    for value in (str(tmp_path / "mine"), "~/mine"):
        assert find_folder("model.name", value, shipped=shipped) == tmp_path / "mine"
    (tmp_path / "head.pth").write_text("")
    for value in (str(tmp_path / "head.pth"), "~/head.pth"):
        assert find_file("aesthetic.head", value) == tmp_path / "head.pth"


def test_only_the_named_files_are_downloaded_and_the_second_kind_of_weights_only_without_the_first(hub):
    repository, asked = hub
    assert find_folder("model.name", "owner/model", revision="v2", files=("*.json",)) == repository
    assert asked == [
        ("owner/model", "v2", ["*.json", "*.safetensors"]),
        ("owner/model", "v2", ["*.json", "*.bin"]),
    ]
    asked.clear()
    (repository / "unet" / "weights.safetensors").write_text("")
    find_folder("model.name", "owner/model")
    find_folder("model.name", "owner/model", files=("config.json",), weights=())
    assert asked == [("owner/model", None, ["*.json", "*.safetensors"]), ("owner/model", None, ["config.json"])]


def test_a_repository_without_weights_is_refused(hub):
    with pytest.raises(ValueError, match="aesthetic.clip is 'owner/model'.*pytorch_model.*.bin"):
        find_folder("aesthetic.clip", "owner/model", weights=("model*.safetensors", "pytorch_model*.bin"))


def test_a_file_on_the_hub_is_downloaded_alone(hub):
    repository, asked = hub
    assert find_file("aesthetic.head", "owner/model:unet/weights.bin") == repository / "unet" / "weights.bin"
    assert asked == [("owner/model", "unet/weights.bin")]
    with pytest.raises(ValueError, match="aesthetic.head is 'owner/model:absent.pth'.*404") as caught:
        find_file("aesthetic.head", "owner/model:absent.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["fashon", "./owner/model", "/no/such", "~/no/such", "gpt2", "owner/model/unet", ""])
def test_what_is_neither_local_nor_of_the_hub_s_form_is_refused_before_the_hub_is_asked(hub, value):
    _, asked = hub
    with pytest.raises(ValueError) as caught:
        find_folder("model.name", value, shipped={"fashion": hub[0]})
    message = str(caught.value)
    assert message.startswith(f"model.name is {value!r}") and "owner/name" in message and "fashion" in message
    assert ("did you mean 'fashion'" in message) == (value == "fashon")
    with pytest.raises(ValueError, match="aesthetic.head is .*owner/repository:filename"):
        find_file("aesthetic.head", value)
    assert asked == []


@pytest.mark.parametrize("value", ["owner/heads", "owner/heads:", ":head.pth", "a/b/c:head.pth"])
def test_a_file_on_the_hub_needs_a_repository_and_a_name(hub, value):
    with pytest.raises(ValueError, match="aesthetic.head is .*owner/repository:filename"):
        find_file("aesthetic.head", value)
    assert hub[1] == []


@pytest.mark.parametrize("value", [5, None, ["owner/model"]])
def test_a_value_that_is_no_text_is_refused_by_name(value):
    for find in (find_folder, find_file):
        with pytest.raises(ValueError) as caught:
            find("aesthetic.clip", value)
        assert str(caught.value).startswith(f"aesthetic.clip is {value!r};")


def test_out_of_reach_the_error_has_the_command_that_brings_the_model(offline):
    with pytest.raises(ValueError) as caught:
        find_folder("aesthetic.clip", "owner/clip")
    message = str(caught.value)
    assert "aesthetic.clip is 'owner/clip'" in message and "cannot reach the hub" in message and "\n" not in message
    assert "hf download owner/clip --local-dir some/folder" in message and "aesthetic.clip=some/folder" in message
    with pytest.raises(ValueError) as caught:
        find_file("aesthetic.head", "owner/heads:v1.pth")
    message = str(caught.value)
    assert "hf download owner/heads v1.pth --local-dir some/folder" in message
    assert "aesthetic.head=some/folder/v1.pth" in message


def test_a_local_model_is_found_without_importing_the_hub_s_client(tmp_path):
    code = f"import sys; from hrf_fast.hub import find_folder; find_folder('model.name', {str(tmp_path)!r}); "
    code += "print(sorted({'huggingface_hub', 'torch', 'transformers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
