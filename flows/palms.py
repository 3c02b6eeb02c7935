"""`prefloop palms`: which topics to write for next, and people's ratings of answers by topic. Nothing heavy is imported
before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Values by topic: what to write next, and sheets for people to rate.", rich_markup_mode=None)
app.info.no_args_is_help = True

Run = Annotated[str, typer.Argument(help="A run, or its evaluation's folder.", metavar="RUN")]
Keys = Annotated[Path | None, typer.Option("--keys", help="Folder of the keys; var/blind if not given.", metavar="DIR")]
SHOWN = 20


@app.command("next")
def next_(run: Run) -> None:
    """Show what the next round aims at: the weakest topics, and how many demonstrations of each to write."""
    from steps import palms
    from steps.artifact import NEXT_ROUND

    _print_aim(palms.read_next(_evaluation(run) / NEXT_ROUND))


@app.command()
def sheet(
    run: Run,
    out: Annotated[Path, typer.Argument(help="A new file, .csv.", metavar="OUT")],
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    keys: Keys = None,
) -> None:
    """Write all answers, before and after mixed, for people to rate from 1 to 5."""
    from steps import palms_sheet
    from steps.paths import Var, project_root

    folder = keys or Var(project_root()).folder("blind")
    done = palms_sheet.export(_evaluation(run), out, folder, seed=seed)
    typer.echo(f"{done.answers:,} answers in {done.file}")
    typer.echo(f"whose they are stands in {done.key}: keep that from the raters")
    typer.echo("each rater fills a copy, 1 (against the position) to 5 (takes it well) under `rating`, then:")
    typer.echo("prefloop palms count FILE …")


@app.command()
def count(
    files: Annotated[list[Path], typer.Argument(help="A file for each rater; its name is the rater's.")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the next round's aim here.", metavar="FILE")] = None,
    weakest: Annotated[int, typer.Option(min=1, help="Topics the next round aims at.")] = 2,
    demonstrations: Annotated[int, typer.Option(min=1, help="Demonstrations it asks for.")] = 10,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    keys: Keys = None,
) -> None:
    """Count people's ratings: each topic before and after, and what the next round aims at."""
    from steps import palms, palms_sheet
    from steps.paths import Var, project_root

    folder = keys or Var(project_root()).folder("blind")
    found = palms_sheet.read_back(files, folder, confidence)
    _print_scores(found)
    aim = palms.next_round(found.scores, found.topics, found.table, weakest, demonstrations)
    _print_aim(aim)
    if out is not None:
        palms.write_next(aim, out)
        typer.echo(f"written to {out}")


def _evaluation(run: str) -> Path:
    """The folder of a run's evaluation."""
    from steps.blind import find_completions
    from steps.paths import project_root

    return find_completions(run, project_root()).parent


def _print_scores(found: Any) -> None:
    from steps.data_report import console
    from steps.report import plain_table, printable

    out = console()
    table = plain_table("topic", "probes", "before", "after", "change", "interval of the change", right=("probes",))
    for score in found.scores:
        interval = f"{score.change_low:+.2f} to {score.change_high:+.2f}"
        cells = (f"{score.probes}", f"{score.before:.2f}", f"{score.after:.2f}", f"{score.change:+.2f}", interval)
        table.add_row(score.topic, *cells)
    out.print(table)
    for name, ratings in found.raters.items():
        out.print(f"{printable(name)}: {ratings:,} ratings", markup=False)
    if found.missing:
        out.print(
            f"{found.missing:,} answers nobody rated; the answers to the same probe beside them count", markup=False
        )
    if found.problems:
        out.print(f"{len(found.problems):,} rows do not count:", markup=False)
    for problem in found.problems[:SHOWN]:
        out.print(f"  {printable(problem.file)}, row {problem.row}: {printable(problem.what)}", markup=False)
    if len(found.problems) > SHOWN:
        out.print(f"  … and {len(found.problems) - SHOWN:,} more", markup=False)


def _print_aim(aim: dict[str, Any]) -> None:
    from steps.data_report import console
    from steps.report import printable

    out = console()
    for topic in aim["topics"]:
        out.print(
            f"\n{topic['name']}: write {topic['demonstrations']} (score {topic['before']:.2f} before, "
            f"{topic['after']:.2f} after)",
            markup=False,
        )
        out.print(f"  position    {printable(topic['position'])}", markup=False)
        for weakness in topic["weaknesses"]:
            out.print(f"  weakness    {printable(weakness)}", markup=False)
        for asked in topic["worst"]:
            out.print(f"  went worst  {printable(asked)} (asked again: do not write this one)", markup=False)
