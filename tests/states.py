"""What lies in a project and in its tracking database, so that two projects can be compared."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

RECIPE = "recipes/tiny.yaml"
PROCESS = ("--set", "launch.launcher=process")
RUN = ("run", RECIPE, *PROCESS)
MEASURED = ("seconds", "cpu_seconds", "peak_mib", "wall_seconds", "energy")  # no two runs have these alike


def copy_without(finished: Path, to: Path, *steps: str) -> Path:
    """A copy of the finished project in which some steps have yet to be done."""
    shutil.copytree(finished, to, symlinks=True)
    for step in steps:
        for folder in (to / "var/store").glob(f"{step}-*"):
            shutil.rmtree(folder)
    return to


def without_var(finished: Path, to: Path) -> Path:
    """A copy of the finished project that was never run; its data are prepared."""
    return Path(shutil.copytree(finished, to, symlinks=True, ignore=shutil.ignore_patterns("var")))


def training_step(root: Path, step: str) -> int:
    """How far the step in the partial directory is; −1 before it trains."""
    for path in (root / "var/store").glob(f"{step}-*.partial/progress.json"):
        try:
            state = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        return state["done"] if state["phase"] == "training" else -1
    return -1


def folder(root: Path, step: str) -> Path:
    """The finished artifact of a step."""
    return next((root / "var/store").glob(f"{step}-*/manifest.json")).parent


def partial(root: Path, step: str) -> Path:
    """Where a step is at work."""
    return next((root / "var/store").glob(f"{step}-*.partial"))


def digest(root: Path, step: str) -> str:
    return json.loads((folder(root, step) / "manifest.json").read_text())["digest"]


def artifacts(root: Path) -> dict[str, str]:
    """Digest of every finished artifact, by step and key."""
    found = (root / "var/store").glob("*/manifest.json")
    return {path.parent.name: json.loads(path.read_text())["digest"] for path in found}


def curves(root: Path, database: Path | None = None) -> dict[str, list[tuple]]:
    """What MLflow holds of each step, by its run's name, and of the runs that finished: metric, step, value."""
    points = ask(
        database or root / "var/mlflow.db",
        "select coalesce((select value from tags where tags.run_uuid = runs.run_uuid and tags.key = 'prefloop.step'), "
        "'the run'), metrics.key, step, metrics.value from metrics join runs using (run_uuid) "
        "where status = 'FINISHED' order by metrics.key, step",
    )
    found: dict[str, set[tuple]] = {}
    for run, *point in points:
        if not any(word in point[0] for word in MEASURED):
            found.setdefault(run, set()).add(tuple(point))
    return {run: sorted(points) for run, points in found.items()}


def steps_in_mlflow(root: Path) -> list[tuple[str, str]]:
    """Name and status of every run in MLflow that belongs to a step."""
    query = "select runs.name, status from runs join tags using (run_uuid) where tags.key = 'prefloop.step'"
    return sorted(ask(root / "var/mlflow.db", query))


def registered(root: Path) -> list[tuple]:
    """Versions in the registry with the digest of their policy, and the alias of each."""
    database = root / "var/mlflow.db"
    versions = "select version, value from model_version_tags where key = 'policy_digest' order by version"
    return [*ask(database, versions), *ask(database, "select alias, version from registered_model_aliases")]


def ask(database: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as connection:
        return connection.execute(query).fetchall()


def equal(root: Path, other: Path) -> None:
    """What two projects hold of the same recipe is the same, whatever happened on the way."""
    assert artifacts(root) == artifacts(other)
    assert curves(root) == curves(other)
    assert steps_in_mlflow(root) == steps_in_mlflow(other)
    assert registered(root) == registered(other)
    assert not list((root / "var/store").glob("*.partial"))


def fill(disk: str, free: int) -> None:
    """Leave so many bytes of a disk, by a file named `ballast`."""
    with (Path(disk) / "ballast").open("wb") as stream:
        if (size := shutil.disk_usage(disk).free - free) > 0:
            os.posix_fallocate(stream.fileno(), 0, size)
