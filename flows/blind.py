"""`prefloop compare-blind`: pairs out for people to compare, verdicts back. Nothing heavy is imported before it is
needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Let people compare answers without knowing whose they are.", rich_markup_mode=None)
app.info.no_args_is_help = True

Keys = Annotated[Path | None, typer.Option("--keys", help="Folder of the keys; var/blind if not given.", metavar="DIR")]
SHOWN = 20


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run, a step's folder, or completions.parquet.", metavar="RUN")],
    out: Annotated[Path, typer.Argument(help="A new file, .csv or .jsonl.", metavar="OUT")],
    against: Annotated[str, typer.Option(help="start, champion or human.", metavar="NAME")] = "start",
    pairs: Annotated[int | None, typer.Option(min=1, help="How many, drawn at random; all if not given.")] = None,
    repeat: Annotated[float, typer.Option(min=0, max=1, help="Share of pairs shown again, sides swapped.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of sides and order.")] = 0,
    keys: Keys = None,
) -> None:
    """Write the answers of a finished evaluation as pairs for people to compare."""
    from steps import blind
    from steps.paths import Var, project_root

    root = project_root()
    completions = blind.find_completions(run, root)
    folder = keys or Var(root).folder("blind")
    done = blind.export(completions, out, folder, rival=against, pairs=pairs, repeat=repeat, seed=seed)
    typer.echo(f"{done.pairs:,} pairs in {done.file}, {done.repeats:,} of them once more with the sides swapped")
    typer.echo(f"which side is whose stands in {done.key}: keep that from the raters")
    if done.too_long:
        typer.echo(f"{done.too_long:,} texts are longer than a spreadsheet's cell: use .jsonl for them")
    typer.echo("each rater fills a copy, A, B or tie under `better`, then: prefloop compare-blind import FILE …")


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="A file for each rater; its name is the rater's.")],
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the interval.")] = 0.95,
    keys: Keys = None,
) -> None:
    """Count the verdicts of one or several raters, and keep them."""
    from steps import blind
    from steps.paths import Var, project_root
    from steps.verdicts import STORE, VerdictStore

    var = Var(project_root())
    store = VerdictStore(var.folder("verdicts") / STORE)
    _print(blind.read_back(files, keys or var.folder("blind"), store, confidence), confidence)
    typer.echo(f"kept in {store.path}")


def _print(result, confidence: float) -> None:
    from rich.table import Table

    from steps.data_report import console
    from steps.report import printable

    out = console()
    out.print(
        f"people prefer the policy to the {result.rival} in {result.rate:.1%} of {result.prompts:,} prompts "
        f"({confidence:.0%} interval {result.low:.1%} to {result.high:.1%}; {result.wins} wins, {result.ties} ties, "
        f"{result.losses} losses, p = {result.p_value:.2g})",
        markup=False,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("rater", "verdicts", "not in the file", "same when swapped", "for side A"):
        table.add_column(title, justify="left" if title == "rater" else "right", overflow="fold")
    for rater in result.raters:
        shares = (rater.repeats.same, rater.repeats.first) if rater.repeats else ()
        cells = [f"{share.share:.0%} of {share.n}" if share.n else "" for share in shares] or ["", ""]
        name = printable(rater.name).replace("[", "\\[")
        table.add_row(name, f"{rater.verdicts:,}", f"{rater.missing:,}", *cells)
    out.print(table)
    for (one, other), kappa in result.kappa.items():
        out.print(f"Cohen's κ of {printable(one)} and {printable(other)}: {kappa:.2f}", markup=False)
    if result.fleiss is not None:
        out.print(f"Fleiss' κ of all raters: {result.fleiss:.2f}", markup=False)
    if result.problems:
        out.print(f"{len(result.problems):,} rows do not count:", markup=False)
    for problem in result.problems[:SHOWN]:
        row = f", row {problem.row}" if problem.row else ""
        out.print(f"  {printable(problem.file)}{row}: {printable(problem.what)}", markup=False)
    if len(result.problems) > SHOWN:
        out.print(f"  … and {len(result.problems) - SHOWN:,} more", markup=False)
