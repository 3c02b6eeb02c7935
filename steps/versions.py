"""Dataset versions: DVC makes them, `dvc.lock` names them. The only module that calls DVC."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from steps import datasets
from steps.errors import DataError, EnvironmentProblem
from steps.pipeline import TABLES
from steps.run import Input


@dataclass(frozen=True)
class DataVersion:
    """One version of one dataset.

    Attributes:
        tables: each table's file and md5, as `dvc.lock` has them.
        revision: the git commit the project stands on, with `+` when `dvc.lock` or the registry differ from it; empty
            without git.
        counts: rows per table, and rows read and quarantined.
    """

    name: str
    tables: Mapping[str, Input]
    revision: str
    counts: Mapping[str, int]

    @property
    def digest(self) -> str:
        """One md5 for the version: over its tables' names and md5s."""
        import hashlib

        lines = "".join(f"{name} {table.digest}\n" for name, table in sorted(self.tables.items()))
        return hashlib.md5(lines.encode(), usedforsecurity=False).hexdigest()


def prepare(name: str, root: Path) -> DataVersion:
    """Bring a dataset up to date with its source, the registry and the stages' code: `dvc repro`.

    Raises:
        DataError: no such dataset, or a stage failed; its own message is in `have`.
        EnvironmentProblem: another process is running DVC here.
    """
    datasets.dataset(name, root)
    (datasets.folder(name, root) / "source").mkdir(parents=True, exist_ok=True)
    result = _dvc(["repro", f"split@{name}"], root)
    if result.returncode == 0:
        return current(name, root)
    output = (result.stdout + result.stderr).strip()
    if "Unable to acquire lock" in output or "is busy, it is being blocked by" in output:
        raise EnvironmentProblem(
            "another process is working on the data",
            where=str(root),
            have="DVC's lock is taken",
            then="wait for it to end, then run again",
        )
    raise DataError(
        f"preparing the dataset '{name}' failed",
        where=f"dvc repro split@{name}",
        have=_tail(output),
        then="mend what it says, then run again",
    )


def current(name: str, root: Path) -> DataVersion:
    """The version `dvc.lock` names; nothing is run.

    Raises:
        DataError: the dataset has not been prepared.
    """
    try:
        stages = yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        outs = {out["path"]: out["md5"] for out in stages[f"split@{name}"]["outs"]}
        folder = datasets.folder(name, root)
        tables = {table: Input(folder / f"{table}.parquet", outs[f"data/{name}/{table}.parquet"]) for table in TABLES}
        counts: dict[str, int] = {}
        for file in ("split.json", "validation.json"):
            counts |= json.loads((folder / file).read_text(encoding="utf-8"))
    except (OSError, KeyError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"the dataset '{name}' has not been prepared",
            where=str(root / "dvc.lock"),
            have=str(error),
            then=f"dvc repro split@{name}, or `prefloop run`",
        ) from error
    return DataVersion(name, tables, git_revision(root), counts)


def git_revision(root: Path) -> str:
    """The commit of the project, with `+` when what decides the data differs from it; empty without git."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode:
        return ""
    status = subprocess.run(
        ["git", "status", "--porcelain", "--", "dvc.lock", "dvc.yaml", "data/datasets.yaml", "steps"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def remotes(root: Path) -> list[str]:
    """Names and addresses of the DVC remotes, in turn."""
    return _dvc(["remote", "list"], root).stdout.split()


def _dvc(arguments: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=root, env=environment, capture_output=True, text=True
    )


def _tail(output: str, count: int = 12) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return "\n        ".join(lines[-count:])
