"""What is written down of a run: the state of the code, packages, hardware, and the processor time of its steps."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import time
from pathlib import Path

import pytest

from steps import provenance, run, usage
from steps.artifact import Artifact, open_artifact, seal
from steps.provenance import CLEAN, code_state, gpus, hardware, packages
from steps.usage import Usage

GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps/a.py").write_text("a = 1\n")
    (tmp_path / "notes.txt").write_text("not code\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "code"]):
        subprocess.run([*GIT, *command], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def test_clean_code_is_called_clean(repository: Path) -> None:
    commit, state = code_state(repository)
    assert len(commit) == 40 and state == CLEAN
    (repository / "notes.txt").write_text("no code either\n")
    assert code_state(repository) == (commit, CLEAN)


def test_changed_code_is_counted_and_named_by_its_difference(repository: Path) -> None:
    (repository / "steps/a.py").write_text("a = 2\n")
    _, once = code_state(repository)
    assert once.startswith("1 file differs, sha256 of the difference ")
    (repository / "steps/b.py").write_text("b = 1\n")
    _, twice = code_state(repository)
    assert twice.startswith("2 files differ") and twice.split()[-1] != once.split()[-1]
    (repository / "steps/b.py").write_text("b = 2\n")
    assert code_state(repository)[1] != twice  # a file git does not know counts with its bytes
    (repository / "steps/b.py").unlink()
    assert code_state(repository)[1] == once


def test_without_git_nothing_is_claimed(tmp_path: Path) -> None:
    assert code_state(tmp_path) == ("", "no git")


def test_packages_are_those_that_are_installed() -> None:
    listed = packages()
    assert f"mlflow=={importlib.metadata.version('mlflow')}" in listed
    assert listed == sorted(listed, key=lambda line: line.split("==")[0])
    assert len({line.split("==")[0] for line in listed}) == len(listed)


def test_hardware_is_told_in_words() -> None:
    found = hardware()
    assert set(found) == {"processor", "cores", "memory", "gpus", "system"}
    assert all(found.values()) and found["memory"].endswith(" GiB")


def test_gpus_are_read_from_their_driver(tmp_path: Path) -> None:
    assert gpus(tmp_path) == []
    for slot in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / slot).mkdir()
        (tmp_path / slot / "information").write_text("Model: \t\t NVIDIA H100\nIRQ:   1\n")
    assert gpus(tmp_path) == ["NVIDIA H100", "NVIDIA H100"]


def test_a_manifest_without_usage_opens(tmp_path: Path) -> None:
    seal(tmp_path, "sft", "k", {}, {}, 1.0, Usage(2.345, 512.0))
    assert open_artifact(tmp_path).cpu_seconds == 2.35  # type: ignore[union-attr]
    assert open_artifact(tmp_path).peak_mib == 512.0  # type: ignore[union-attr]
    record = json.loads((tmp_path / "manifest.json").read_text())
    del record["cpu_seconds"], record["peak_mib"]
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    assert open_artifact(tmp_path).cpu_seconds is None  # type: ignore[union-attr]


def busy(partial: Path) -> None:
    """Works for a twentieth of a second, then fails the first time it is called."""
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    if not (partial / "once").exists():
        (partial / "once").touch()
        raise RuntimeError("stopped")
    (partial / "facts.json").write_text("{}")


def test_processor_time_is_carried_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_execute", busy)
    monkeypatch.setattr(run.code, "code_digest", lambda module: "c")
    spec, store = run.StepSpec("sft", "steps.sft:train_sft", {}, {}, 0), run.Store(tmp_path / "store")
    with pytest.raises(RuntimeError):
        run.run_step(spec, store)
    spent = usage.read(store.partial(spec))
    assert spent is not None and spent.cpu_seconds >= 0.05
    made: Artifact = run.run_step(spec, store).artifact
    assert made.cpu_seconds is not None and made.cpu_seconds >= 0.1
    assert made.peak_mib is not None and made.peak_mib > 10
    assert not (made.path / usage.USAGE).exists()


def test_a_step_that_sleeps_costs_no_processor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_execute", lambda partial: None)
    run.execute(tmp_path)
    spent = usage.read(tmp_path)
    assert spent is not None and 0 <= spent.cpu_seconds < 0.05


def test_the_code_of_this_package_stands_on_a_commit() -> None:
    commit, state = code_state()
    assert (state == "no git") == (commit == "") and provenance.HERE.is_dir()
