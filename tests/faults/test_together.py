"""Two runs of one recipe started at once in a project that was never run: both end well, and nothing is done twice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import states
import tiny
from forks import PATIENCE, Forks
from states import RUN, ask


def check(root: Path, finished: Path, said: list[str]) -> None:
    """Every step was done by one of the two and reused by the other."""
    told = Counter(
        pair for text in said for pair in re.findall(r"^(\w+) +(done|reused) +[\d.]+ s ", text, re.MULTILINE)
    )
    steps = {path.split("-")[0] for path in states.artifacts(root)}
    assert told == Counter({(step, how): 1 for step in steps for how in ("done", "reused")}), "\n".join(said)
    assert states.artifacts(root) == states.artifacts(finished)
    assert states.curves(root) == states.curves(finished)
    assert states.steps_in_mlflow(root) == states.steps_in_mlflow(finished)
    assert states.registered(root) == states.registered(finished)
    statuses = ask(root / "var/mlflow.db", "select status from runs")
    assert set(statuses) == {("FINISHED",)}


def test_two_runs_at_once_share_the_work(prefloop: Forks, prefect_server, finished: Path, tmp_path: Path) -> None:
    prefect_server.start()
    root = tiny.make_project(tmp_path / "project")
    both = [prefloop(root, *RUN) for _ in range(2)]
    check(root, finished, [one.ended_well() for one in both])


@pytest.mark.every_fault
def test_two_commands_at_once_start_their_servers_too(finished: Path, tmp_path: Path) -> None:
    """As people start them, each with the Prefect server it takes along, both over one empty `var/`."""
    root = tiny.make_project(tmp_path / "project")
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY)}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *RUN],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [one.communicate(timeout=PATIENCE)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], "\n".join(said)
    check(root, finished, said)
