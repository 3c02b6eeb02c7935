"""`prefloop data`: batches in, versions out. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from steps.batches import Addition

app = typer.Typer(
    help="Add, list, compare and fetch versions of the data.", no_args_is_help=True, rich_markup_mode=None
)

Name = Annotated[str, typer.Argument(help="A dataset of data/datasets.yaml.", metavar="NAME")]
Version = Annotated[str, typer.Argument(help="A dataset, at a git revision when one is given.", metavar="NAME[@REV]")]


@app.command()
def add(
    name: Name,
    files: Annotated[list[Path], typer.Argument(help="Files to copy into the dataset; they are kept as they are.")],
    format: Annotated[
        str | None, typer.Option("--format", help="Make the dataset, with records of this format.", metavar="FORMAT")
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--columns", help="What your files call a field; repeatable.", metavar="FIELD=YOURS"),
    ] = None,
) -> None:
    """Add files as immutable batches, run the stages, and say what changed."""
    from steps import batches
    from steps.data_report import console, print_addition
    from steps.paths import project_root

    root, out = project_root(), console()
    with out.status(f"{name}      ingest → validate → split"):
        added = batches.add(name, files, root, format=format, columns=batches.columns_of(columns or ()))
    print_addition(out, added)
    _announce(added, root)


@app.command("list")
def list_() -> None:
    """List the datasets, and whether they are prepared."""
    from steps.data_report import console, print_list
    from steps.paths import project_root

    print_list(console(), project_root())


@app.command()
def show(version: Version) -> None:
    """Show what a version is made of: digest, tables, counts, sources, batches."""
    from steps import versions
    from steps.data_report import console, print_version
    from steps.paths import project_root

    root = project_root()
    name, revision = _parted(version, root)
    print_version(console(), versions.at(name, root, revision), root, revision)


@app.command()
def report(
    name: Name,
    everything: Annotated[bool, typer.Option("--all", help="Show every row in quarantine.")] = False,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write the quarantined records there instead, to be edited.")
    ] = None,
) -> None:
    """Report what validation found, with the rows in quarantine and the dataset's statistics."""
    from steps import batches
    from steps.data_report import console, print_report
    from steps.paths import project_root

    root = project_root()
    if export is None:
        print_report(console(), name, root, everything=everything)
        return
    count = batches.export(name, root, export)
    typer.echo(f"{count:,} quarantined records in {export}")
    typer.echo(f"edit them, take out what cannot be mended, then: prefloop data restore {name} {export}")


@app.command()
def diff(
    name: Name,
    before: Annotated[str, typer.Argument(help="A git revision.", metavar="REV1")],
    after: Annotated[str, typer.Argument(help="Another; the work tree when not given.", metavar="[REV2]")] = "",
) -> None:
    """Say which rows came, went and changed between two versions, and whether the data drifted."""
    import tempfile

    from steps import changes, drift, versions
    from steps.data_report import console, print_changes, print_drift
    from steps.paths import project_root

    root, out = project_root(), console()
    _parted(name, root)
    with tempfile.TemporaryDirectory() as scratch:
        tables = ["valid.parquet", "quarantine.parquet"]
        folders = {"before": Path(scratch) / "before", "after": Path(scratch) / "after"}
        with out.status("fetching the tables"):
            for side, revision in (("before", before), ("after", after)):
                versions.fetch(name, root, revision, folders[side], tables)
        found = changes.compare(*(changes.identities(folder) for folder in folders.values()))
        print_changes(out, found, lambda side, row_ids: changes.previews(folders[side], row_ids))
        valid = [changes.read(folder / "valid.parquet", drift.COLUMNS) for folder in folders.values()]
        print_drift(out, drift.compare(*valid), "the valid rows", "those before")


@app.command()
def restore(
    name: Name,
    file: Annotated[Path, typer.Argument(help="Repaired records, such as --export of `report` wrote.")],
) -> None:
    """Add repaired records as a new batch, if all of them pass validation."""
    from steps import batches
    from steps.data_report import console, print_addition
    from steps.paths import project_root

    root, out = project_root(), console()
    with out.status(f"{name}      ingest → validate → split"):
        added = batches.restore(name, file, root)
    print_addition(out, added)
    _announce(added, root)


@app.command()
def forget(
    name: Name,
    rows: Annotated[list[str], typer.Argument(help="Ids of rows, from the column row_id.", metavar="ROW_ID...")],
    because: Annotated[str, typer.Option("--because", help="Why; kept beside the ids.", metavar="REASON")],
) -> None:
    """Make a version without some rows, and say which models and runs learned from them."""
    from steps import forget
    from steps.data_report import console, print_forgotten
    from steps.paths import project_root

    root, out = project_root(), console()
    with out.status(f"{name}      ingest → validate → split"):
        done = forget.forget(name, rows, root, because)
    print_forgotten(out, done, forget.remains(name, done.places, root))
    _tell(name, root, {"forgotten": rows})


@app.command()
def fetch(
    version: Version,
    to: Annotated[Path, typer.Option("--to", help="A folder for the tables.", metavar="DIR")],
) -> None:
    """Write the tables of a version as files, from DVC's cache or remote."""
    from steps import versions
    from steps.paths import project_root

    root = project_root()
    name, revision = _parted(version, root)
    known = versions.outputs(name, root, revision)
    for file, path in versions.fetch(name, root, revision, to).items():
        typer.echo(f"{known[file]}  {path}")


def _announce(added: Addition, root: Path) -> None:
    """Let deployments know what was added, if anything was."""
    if added.records:
        batches = [record["file"] for record in added.records]
        _tell(added.name, root, {"batches": batches, "rows": added.after.counts.get("valid", 0)})


def _tell(name: str, root: Path, payload: dict[str, Any]) -> None:
    """Let deployments know that a version landed, where a Prefect server runs."""
    from flows.announce import landed

    if server := landed(name, root, payload):
        typer.echo(f"told {server}; what waits for '{name}' starts once no more data come")


def _parted(version: str, root: Path) -> tuple[str, str]:
    """(dataset, revision) of `NAME@REV`.

    Raises:
        DataError: nothing stands behind the `@`, or no revision is given and there is no such dataset.
    """
    from steps import datasets
    from steps.errors import DataError

    name, at, revision = version.partition("@")
    if at and not revision:
        raise DataError("a revision is missing", where=version, then=f"{name}@HEAD, for example")
    if not revision:
        datasets.dataset(name, root)
    return name, revision
