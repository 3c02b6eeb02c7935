"""kill -9 while the data is being prepared: the last version stays whole, and the next try needs no cleaning."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import tiny
import tiny_data
from tiny_data import attempt, data, dvc, surroundings

from steps import versions

LAST_TABLE = {"ingest": "rows", "validate": "quarantine", "split": "preferences"}


@pytest.fixture
def project(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "project", symlinks=True))


def stopped_in(root: Path, stage: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """`prefloop data add`, waiting in a stage before a table takes its place; it, and all processes below it."""
    batch = tiny.write_rows(tiny_data.rows(10, "more "), root.parent / "more.jsonl")
    table = LAST_TABLE[stage]
    hook = f"if path.name == '{table}.parquet': path.with_suffix('.waiting').touch(); __import__('time').sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "data", "add", "tiny", str(batch)],
        cwd=root,
        env=surroundings(BEFORE_TABLE=hook),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    waiting = root / f"data/tiny/{table}.waiting"
    end = time.monotonic() + 240
    while not waiting.exists():
        assert process.poll() is None and time.monotonic() < end, process.stdout and process.stdout.read()
        time.sleep(0.02)
    waiting.unlink()
    return process, psutil.Process(process.pid).children(recursive=True)


def tables(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "data/tiny").glob("*.parquet")}


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.suspend()
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)


def ended(processes: list[psutil.Process], within: float = 10) -> bool:
    """Whether all processes end within seconds; one that only waits for its parent to take note has ended."""
    end = time.monotonic() + within
    while any(map(lives, processes)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("stage", ["ingest", "validate", "split"])
def test_all_processes_killed(project: Path, stage: str) -> None:
    before, version = tables(project), versions.current("tiny", project)
    lock = (project / "dvc.lock").read_bytes()
    running, below = stopped_in(project, stage)
    kill([psutil.Process(running.pid), *below])
    assert versions.current("tiny", project).tables == version.tables
    if stage == "ingest":
        assert (project / "dvc.lock").read_bytes() == lock
    shutil.copytree(project, project.parent / "other", symlinks=True)
    tiny_data.git(project, "checkout", "-q", "dvc.lock")
    dvc(project, "checkout", "-q", "--force")
    assert tables(project) == before
    assert not psutil.pid_exists(running.pid) or running.poll() is not None
    other = project.parent / "other"
    said = data(other, "add", "tiny", other.parent / "more.jsonl")
    assert "more.jsonl: 20 rows" in said
    assert versions.current("tiny", other).counts["read"] == 80
    assert not list((other / "data").rglob("*.partial"))


@pytest.mark.parametrize("victim", ["the stage", "DVC"])
def test_one_process_killed_takes_the_batch_back(project: Path, victim: str) -> None:
    before = tiny_data.contents(project)
    running, below = stopped_in(project, "validate")
    stages = [process for process in below if "steps.validate" in process.cmdline()]
    kill(stages if victim == "the stage" else [process for process in below if "dvc" in process.cmdline()])
    output, _ = running.communicate(timeout=30)
    assert ended(stages)
    assert running.returncode == 1 and "nothing was added to 'tiny'" in output, output
    assert tiny_data.contents(project) == before
    assert "more.jsonl: 20 rows" in data(project, "add", "tiny", project.parent / "more.jsonl")


def test_ctrl_c_takes_the_batch_back(project: Path) -> None:
    before = tiny_data.contents(project)
    running, below = stopped_in(project, "validate")
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=30)
    assert running.returncode == 130 and "stopped; nothing was added to 'tiny'" in output, output
    assert ended(below)
    assert tiny_data.contents(project) == before


def test_what_the_dead_leave_is_cleared(project: Path) -> None:
    scratch = project / ".dvc/tmp"
    held = {"pid": os.getpid(), "cmd": "dvc repro --of-another-program"}  # a number that was given out again
    (scratch / "rwlock").write_text(json.dumps({"write": {str(project / "data/tiny/rows.parquet"): held}}))
    source = project / "data/tiny/source/pairs.jsonl"
    source.write_text(source.read_text() + json.dumps(tiny_data.rows(1, "later ")[0]) + "\n")
    assert attempt(project, sys.executable, "-m", "dvc", "repro", "split@tiny").returncode != 0
    assert versions.prepare("tiny", project).counts["read"] == 61
    whole = (project / "dvc.lock").read_bytes()
    (scratch / "rwlock").write_text("")
    (scratch / "dvc.lock.before").write_bytes(whole)
    (project / "dvc.lock").write_bytes(whole[: len(whole) // 2].rpartition(b":")[0] + b": [")
    assert versions.prepare("tiny", project).counts["read"] == 61
    assert (project / "dvc.lock").read_bytes() == whole
    assert not (scratch / "dvc.lock.before").exists()


def test_a_stage_that_outlives_everything_is_ended_before_the_next(project: Path) -> None:
    running, below = stopped_in(project, "validate")
    stages = [process for process in below if "steps.validate" in process.cmdline()]
    assert len(stages) == 1
    kill([psutil.Process(running.pid), *(process for process in below if process not in stages)])
    assert lives(stages[0])
    data(project, "add", "tiny", project.parent / "more.jsonl")
    assert ended(stages)
    assert versions.current("tiny", project).counts["read"] == 80
