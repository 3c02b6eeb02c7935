"""`prefloop promote`, `rollback` and `history`: which model is in use, by whose word, and why."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A registered model's name, such as reviews.", metavar="MODEL")]
Because = Annotated[str, typer.Option("--because", help="Why; it stays in the registry.", metavar="REASON")]


def promote(
    model: Model,
    version: Annotated[str, typer.Argument(help="The version to put into use.", metavar="VERSION")],
    because: Because,
) -> None:
    """Make a version the champion by hand."""
    from steps import registry

    registry.promote(_client(), model, version, _said(because), _who())
    typer.echo(f"models:/{model}/{version} is the champion")


def rollback(model: Model, because: Because) -> None:
    """Make the champion before this one champion again; the gate will not undo it."""
    from steps import registry

    version = registry.rollback(_client(), model, _said(because), _who())
    typer.echo(f"models:/{model}/{version} is the champion again")


def history(model: Model) -> None:
    """Every change of champion: when, by whom, and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from steps import registry

    changes = registry.history(_client(), model)
    if not changes:
        typer.echo(f"{model} has had no champion yet")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("time", "", "from", "to", "by", "because"):
        table.add_column(title, overflow="fold", min_width=30 if title == "because" else None)
    for change in changes:
        row = (change["time"], change["how"], change["from"] or "none", change["to"], change["who"], change["because"])
        table.add_row(*(escape(str(cell)) for cell in row))
    Console(highlight=False).print(table)


def _said(because: str) -> str:
    from steps.errors import PrefloopError

    if not because.strip():
        raise PrefloopError("a change of champion needs a reason", then='--because "…"')
    return because.strip()


def _who() -> str:
    from steps.paths import project_root
    from steps.versions import git_user

    return git_user(project_root())


def _client():
    from steps.paths import Var
    from steps.tracking import forwarder

    return forwarder(Var()).client


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (promote, rollback, history):
        app.command()(command)
