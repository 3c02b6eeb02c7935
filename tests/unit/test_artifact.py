"""An artifact: sealed once, found again whole, and never whole when a byte has changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from steps.artifact import MANIFEST, RECORDS, Artifact, digest_file, digest_json, open_artifact, payload, seal, verify
from steps.errors import PrefloopError
from steps.tracking import Forwarder


def filled(folder: Path) -> Path:
    (folder / "adapter").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"\x00\x01\x02")
    (folder / "adapter" / "config.json").write_text("{}")
    return folder


def sealed(folder: Path) -> Artifact:
    return seal(filled(folder), "reward", "k" * 16, {"base": "d" * 64}, {"accuracy": 0.75}, 1.239)


def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert digest_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_file(tmp_path / "abc", "md5") == "900150983cd24fb0d6963f7d28e17f72"


def test_the_digest_of_a_value_is_that_of_its_canonical_json() -> None:
    assert digest_json({"b": [1, "ä"], "a": None}) == hashlib.sha256('{"a":null,"b":[1,"ä"]}'.encode()).hexdigest()


def test_an_artifact_is_found_again_as_it_was_sealed(tmp_path: Path) -> None:
    artifact = sealed(tmp_path / "a")
    again = open_artifact(tmp_path / "a")
    assert again == artifact
    assert again.facts == {"accuracy": 0.75}
    assert again.inputs == {"base": "d" * 64}
    assert again.seconds == 1.24
    assert set(again.files) == {"weights.bin", "adapter/config.json"}
    verify(again)


def test_the_digest_covers_names_and_bytes(tmp_path: Path) -> None:
    files = {
        "adapter/config.json": hashlib.sha256(b"{}").hexdigest(),
        "weights.bin": hashlib.sha256(b"\x00\x01\x02").hexdigest(),
    }
    assert sealed(tmp_path / "a").digest == digest_json(files)


def test_the_digest_does_not_depend_on_the_location(tmp_path: Path) -> None:
    artifact = sealed(tmp_path / "a")
    assert sealed(tmp_path / "b" / "c").digest == artifact.digest
    assert open_artifact(shutil.copytree(artifact.path, tmp_path / "d")).digest == artifact.digest


def test_the_digest_changes_with_a_byte_a_name_and_a_new_file(tmp_path: Path) -> None:
    digests = {sealed(tmp_path / "a").digest}
    changes = (
        lambda folder: (folder / "weights.bin").write_bytes(b"\x00\x01\x03"),
        lambda folder: (folder / "weights.bin").rename(folder / "weight.bin"),
        lambda folder: (folder / "more").write_bytes(b""),
    )
    for number, change in enumerate(changes):
        folder = filled(tmp_path / str(number))
        change(folder)
        digests.add(seal(folder, "reward", "k", {}, {}, 0).digest)
    assert len(digests) == 4


@pytest.mark.parametrize("record", sorted(RECORDS - {MANIFEST}))
def test_records_do_not_count(record: str, tmp_path: Path) -> None:
    expected = sealed(tmp_path / "a").digest
    filled(tmp_path / "b")
    (tmp_path / "b" / record).write_text("written at noon")
    assert seal(tmp_path / "b", "reward", "k", {}, {}, 0).digest == expected


def test_a_file_below_that_is_named_like_a_record_counts(tmp_path: Path) -> None:
    filled(tmp_path / "a")
    (tmp_path / "a" / "adapter" / MANIFEST).write_text("{}")
    assert "adapter/manifest.json" in payload(tmp_path / "a")


def test_checkpoints_do_not_count(tmp_path: Path) -> None:
    expected = sealed(tmp_path / "a").digest
    filled(tmp_path / "b")
    (tmp_path / "b" / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "checkpoint-3" / "optimizer.pt").write_bytes(b"x")
    assert seal(tmp_path / "b", "reward", "k", {}, {}, 0).digest == expected


def test_the_digest_does_not_depend_on_whether_the_journal_was_looked_at_meanwhile(tmp_path: Path) -> None:
    expected = sealed(tmp_path / "a").digest
    folder = filled(tmp_path / "b")
    assert Forwarder("http://127.0.0.1:9", tmp_path / "artifacts").forward(folder)
    assert seal(folder, "reward", "k", {}, {}, 0).digest == expected


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    assert open_artifact(tmp_path) is None
    assert open_artifact(tmp_path / "nowhere") is None
    assert open_artifact(filled(tmp_path / "a")) is None


def test_sealing_again_after_a_kill_while_sealing_gives_a_whole_artifact(tmp_path: Path) -> None:
    folder = filled(tmp_path / "a")
    (folder / f"{MANIFEST}.tmp").write_text('{"kind": "rew')
    seal(folder, "reward", "k", {}, {}, 0)
    assert set(open_artifact(folder).files) == {"weights.bin", "adapter/config.json"}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    artifact = sealed(tmp_path / "a")
    (artifact.path / "adapter" / "config.json").unlink()
    with pytest.raises(PrefloopError) as caught:
        open_artifact(artifact.path)
    text = str(caught.value)
    assert "a stored artifact is broken" in text
    assert str(artifact.path) in text
    assert "1 of 2 files are gone, adapter/config.json among them" in text
    assert "remove that folder" in text


def test_an_altered_byte_is_found_and_its_file_named(tmp_path: Path) -> None:
    artifact = sealed(tmp_path / "a")
    (artifact.path / "weights.bin").write_bytes(b"\x00\x01\x03")
    with pytest.raises(PrefloopError, match=r"weights\.bin is not the file that was written"):
        verify(open_artifact(artifact.path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"kind": "reward", "surprise": 1}'])
def test_an_unreadable_manifest_is_named(text: str, tmp_path: Path) -> None:
    artifact = sealed(tmp_path / "a")
    (artifact.path / MANIFEST).write_text(text)
    with pytest.raises(PrefloopError) as caught:
        open_artifact(artifact.path)
    assert str(artifact.path) in str(caught.value)
    assert "manifest cannot be read" in str(caught.value)


def test_the_manifest_is_plain_json_without_the_path(tmp_path: Path) -> None:
    artifact = sealed(tmp_path / "somewhere")
    text = (artifact.path / MANIFEST).read_text()
    assert "somewhere" not in text
    assert json.loads(text)["digest"] == artifact.digest
