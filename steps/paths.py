"""Where things are kept: one project root, and under it `var/` for everything git does not remember."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from steps.errors import EnvironmentProblem


def project_root(start: Path | None = None) -> Path:
    """The nearest folder upwards that holds `dvc.yaml` and `data/datasets.yaml` (or `$PREFLOOP_ROOT`).

    Raises:
        EnvironmentProblem: there is no such folder.
    """
    if named := os.environ.get("PREFLOOP_ROOT"):
        return Path(named).resolve()
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "data" / "datasets.yaml").is_file():
            return folder
    raise EnvironmentProblem(
        "this is not a prefloop project",
        where=str(here),
        have="no dvc.yaml beside data/datasets.yaml, here or above",
        then="cd to your clone of prefloop, or set PREFLOOP_ROOT",
    )


class Var:
    """The git-ignored state of one project.

    `mlflow.db`, `mlflow-artifacts/` (tracking), `store/` (step artifacts), `runs/` (reports), `champions/` (fetched
    adapters), `prefect/` (Prefect's home), `downloads/` (fetched sources), `logs/` and `ui.json` (the servers'),
    `verdicts/` (what judges that cost something said), `blind/` (which side is which in what people
    compare), `collections/` (rounds of online collection), and by default `dvc-remote/`.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or project_root()
        self.path = self.root / "var"

    def folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def need_space(folder: Path, gibibytes: float) -> None:
    """Refuse early when the disk under `folder` has less than `gibibytes` free.

    Raises:
        EnvironmentProblem: naming what is free and what is needed.
    """
    free = shutil.disk_usage(folder).free / 2**30
    if free < gibibytes:
        raise EnvironmentProblem(
            "not enough disk space",
            where=str(folder),
            have=f"{free:.1f} GiB free, {gibibytes:g} GiB needed",
            then="free some space, or lower launch.min_free_gib in the recipe",
        )
