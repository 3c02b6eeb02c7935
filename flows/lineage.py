"""`prefloop lineage` and `prefloop diff`: what a model was made from, who saw a row, and how two runs differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

SUBJECT = "models:/NAME@ALIAS, NAME/VERSION, a folder of var/runs, or an MLflow run id."
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead, as docs/lineage.md describes it.")]


def lineage(
    subject: Annotated[str | None, typer.Argument(help=SUBJECT, metavar="[MODEL_OR_RUN]")] = None,
    row: Annotated[
        list[str] | None, typer.Option("--row", help="Say what saw a row of the data instead.", metavar="ROW_ID")
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", help="Say what saw the rows of a batch file instead.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
    drawing: Annotated[Path | None, typer.Option("--svg", help="Write the graph there as SVG.", metavar="FILE")] = None,
    watts: Annotated[
        float | None,
        typer.Option(min=0.0, envvar="PREFLOOP_WATTS_PER_CORE", help="Assumed draw of a busy core.", metavar="WATTS"),
    ] = None,
) -> None:
    """Say what a model or run was made from, or which versions, runs and models saw a row."""
    from steps.errors import PrefloopError

    if sum(bool(given) for given in (subject, row, file)) != 1:
        raise PrefloopError(
            "one of three things can be asked",
            have=f"MODEL_OR_RUN {subject or '-'}, --row {' '.join(row or ()) or '-'}, --file {file or '-'}",
            then="`prefloop lineage reviews@champion`, or --row ROW_ID, or --file FILE",
        )
    if subject is None:
        _rows(row or [], file, as_json)
        return
    from steps import lineage as graph
    from steps import lineage_page
    from steps.data_report import console
    from steps.paths import Var, project_root
    from steps.tracking import forwarder

    root = project_root()
    found = graph.trace(subject, root, forwarder(Var(root)), graph.WATTS_PER_CORE if watts is None else watts)
    if drawing is not None:
        drawing.write_text(lineage_page.svg(found), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        lineage_page.print_lineage(console(), found)
    if found.contradictions:
        raise typer.Exit(1)


def diff(
    before: Annotated[str, typer.Argument(help=SUBJECT, metavar="RUN_A")],
    after: Annotated[str, typer.Argument(help="Another.", metavar="RUN_B")],
    as_json: AsJson = False,
) -> None:
    """Say how two runs differ in data, recipe, code and packages, and what came of it."""
    from steps import run_diff
    from steps.data_report import console
    from steps.paths import Var, project_root
    from steps.tracking import forwarder

    root = project_root()
    found = run_diff.compare(before, after, root, forwarder(Var(root)))
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        run_diff.print_difference(console(), found)


def _rows(rows: list[str], file: str | None, as_json: bool) -> None:
    from steps import row_lineage
    from steps.data_report import console
    from steps.paths import Var, project_root
    from steps.tracking import forwarder

    root, out = project_root(), console()
    with out.status("looking through every version of the data"):
        found = row_lineage.trace(root, forwarder(Var(root)), rows=rows, file=file)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        row_lineage.print_rows(out, found)


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (lineage, diff):
        app.command()(command)
