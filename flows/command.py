"""What commands share: a recipe on the command line, and settings that come before any import."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from steps.paths import Var

RecipePath = Annotated[Path, typer.Argument(help="A recipe, such as recipes/reviews.yaml.", metavar="RECIPE")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a value of the recipe; repeatable.")
]


def as_given(recipe: Path, assignments: list[str] | None) -> str:
    """A recipe and its changes, as they are written on a command line."""
    return shlex.join([str(recipe), *(part for a in assignments or () for part in ("--set", a))])


def environment(var: Var) -> None:
    """Settings that libraries read on import, before anything imports them, and where the Prefect server is."""
    from steps.launch import thread_environment
    from steps.tracking import quiet_environment
    from steps.ui import prefect_environment, running

    os.environ.update(prefect_environment(var))
    os.environ.update(thread_environment(None))
    quiet_environment()
    if "PREFECT_API_URL" not in os.environ and (address := running(var).get("prefect")):
        os.environ["PREFECT_API_URL"] = f"{address}/api"
