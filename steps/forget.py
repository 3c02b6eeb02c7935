"""Forgetting rows: a version of a dataset without them, and who learned from them before.

Only ids are kept: in `data/NAME/forgotten.jsonl` with when, by whose word and why, and under `forgotten` in the
registry's entry, which every stage of `dvc.yaml` depends on, so that `dvc repro` leaves the rows out too. All rows that
were made of the same record go with a row. The source is not rewritten: batches are immutable, and what is fetched is
somebody else's. Where the text is still to be found is said, and how to remove it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from steps import batches, datasets, entries, registry, tracking, versions
from steps.batches import FORGOTTEN, State
from steps.changes import IDS
from steps.errors import DataError, EnvironmentProblem
from steps.paths import Var
from steps.rows import ANSWERS, chunks, hashes
from steps.step_tags import step_names, step_tag

TABLES = ("rows", "valid", "quarantine", "demonstrations", "preferences", "prompts", "gold")
_ID = re.compile(r"[0-9a-f]{16}")

Place = tuple[str, int]  # file and line of a record


@dataclass(frozen=True)
class Forgotten:
    """What forgetting came to.

    Attributes:
        asked: the ids that were given and are forgotten now.
        already: ids that were given and had been forgotten before.
        rows: every id that is listed now: those asked for and all that were made of the same records.
        places: where the records stand, in files that are left as they are.
        learners: the models and runs that were given the rows.
        unknown: what could not be found out about them.
        alike: ids of rows that stay and hold an answer of a forgotten row, in the same or another spelling.
        paths: what git should be told about.
    """

    name: str
    asked: list[str]
    already: list[str]
    rows: list[str]
    places: list[Place]
    before: State
    after: State
    learners: list[Learner]
    unknown: list[str]
    alike: list[str]
    paths: list[str]


def forget(name: str, row_ids: Sequence[str], root: Path, because: str) -> Forgotten:
    """Make the version of a dataset that does not hold some rows, nor any other row of their records.

    Raises:
        DataError: the dataset has no such row, or the stages failed. Then nothing is forgotten: registry, tables and
            `dvc.lock` are as they were.
        EnvironmentProblem: another process is working on the data.
    """
    if not because.strip():
        raise DataError("forgetting a row needs a reason", then='--because "…"; it is kept beside the id, so no texts')
    here = datasets.folder(name, root)
    with versions.one_writer(root), batches.taken_back_on_failure(name, root, nothing="was forgotten in"):
        known = datasets.dataset(name, root).forgotten
        asked = [row for row in dict.fromkeys(row_ids) if row not in known]
        already = [row for row in dict.fromkeys(row_ids) if row in known]
        before = batches.state(name, root)
        if not asked:
            return Forgotten(name, [], already, [], [], before, before, [], [], [], [])
        places, rows = _records_of(here, asked, name)
        alike = _alike(here, set(rows))
        learners, unknown = _learners(rows, root)  # before the version they learned from may be in no dvc.lock
        _note(name, root, [row for row in rows if row not in known], because.strip())
        versions.prepare(name, root)
        _check_gone(here, set(rows))
        after, paths = batches.state(name, root), batches.tracked(name, root)
    return Forgotten(name, asked, already, rows, places, before, after, learners, unknown, alike, paths)


def _records_of(here: Path, asked: Sequence[str], name: str) -> tuple[list[Place], list[str]]:
    """Where the records of some rows stand, and the ids of all rows made of those records.

    Raises:
        DataError: the dataset has no row of such an id, or its rows are not here.
    """
    path = here / "rows.parquet"
    if not path.is_file():
        raise DataError(
            f"the rows of '{name}' are not here", where=str(path), then=f"dvc pull, or dvc repro split@{name}"
        )
    wanted = pa.array(asked, pa.string())
    columns = ["row_id", "file", "line"]
    held = pa.concat_tables(_where(table, pc.is_in(table["row_id"], wanted)) for table in chunks(path, columns))
    if missing := [row for row in asked if row not in held["row_id"].to_pylist()]:
        raise DataError(
            f"'{name}' has no row {missing[0]}"
            + (f", nor {len(missing) - 1} more that were asked for" if missing[1:] else ""),
            where=str(path),
            have=f"{pq.read_metadata(path).num_rows:,} rows"
            if _ID.fullmatch(missing[0])
            else "an id has 16 hex digits",
            then="ids stand in the column row_id of its tables; an earlier version may have had it",
        )
    places = list(dict.fromkeys(_places(held)))
    files = pa.array(sorted({file for file, _ in places}), pa.string())
    rows: dict[str, None] = dict.fromkeys(asked)
    for table in chunks(path, columns):
        near = _where(table, pc.is_in(table["file"], files))
        rows |= {
            row: None for row, place in zip(near["row_id"].to_pylist(), _places(near), strict=True) if place in places
        }
    return places, list(rows)


def _where(table: pa.Table, mask: Any) -> pa.Table:
    return table.filter(pc.fill_null(mask, False))


def _places(table: pa.Table) -> Iterator[Place]:
    return zip(table["file"].to_pylist(), table["line"].to_pylist(), strict=True)


def _alike(here: Path, gone: set[str]) -> list[str]:
    """Ids of the rows that stay and hold an answer of those that go; spelling aside, as `rows.normalised` has it."""
    path, columns = here / "rows.parquet", ["row_id", *ANSWERS]
    going = pa.array(sorted(gone), pa.string())
    words: set[int] = set()
    for table in chunks(path, columns):
        leaving = _where(table, pc.is_in(table["row_id"], going))
        words |= {word for column in ANSWERS for word in hashes(leaving[column]).tolist()}
    words.discard(0)
    found: dict[str, None] = {}
    for table in chunks(path, columns):
        ids = table["row_id"].to_pylist()
        for column in ANSWERS if words else ():
            found |= {row: None for row, word in zip(ids, hashes(table[column]).tolist(), strict=True) if word in words}
    return [row for row in found if row not in gone]


def _note(name: str, root: Path, rows: Sequence[str], because: str) -> None:
    """Write down which rows are to be forgotten: for the stages in the registry, for people beside the data."""
    registry, record = root / datasets.REGISTRY, datasets.folder(name, root) / FORGOTTEN
    edited = entries.with_forgotten(registry.read_text(encoding="utf-8"), name, rows)
    when, by = datetime.now(UTC).isoformat(timespec="seconds"), versions.git_user(root)
    lines = [{"row_id": row, "when": when, "by": by, "because": because} for row in rows]
    said = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    versions.put((record.read_bytes() if record.is_file() else b"") + said.encode(), record)
    versions.put(edited.encode(), registry)


def _check_gone(here: Path, rows: set[str]) -> None:
    """Look whether the new tables really do without some rows."""
    for table in TABLES:
        if left := holds(here / f"{table}.parquet", rows):
            raise DataError(
                "a table still names a row that is to be forgotten", where=f"{table}.parquet", have=min(left)
            )


def holds(table: Path, rows: Iterable[str]) -> set[str]:
    """Those of some row ids that a table names."""
    wanted = pa.array(sorted(rows), pa.string())
    found: set[str] = set()
    for column in [name for name in pq.read_schema(table).names if name in IDS]:
        for chunk in chunks(table, [column]):
            found |= set(_where(chunk, pc.is_in(chunk[column], wanted))[column].to_pylist())
    return found


# -- what is left of it ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remains:
    """Where the text of forgotten rows is still to be found.

    Attributes:
        files: local files of the source that hold it, by place.
        fetched: where it is fetched from, if it is.
        in_git: those of `files` that git keeps in its history.
        remotes: names of DVC's remotes.
    """

    files: dict[str, list[int]]
    fetched: str
    in_git: list[str]
    remotes: list[str]


def remains(name: str, places: Iterable[Place], root: Path) -> Remains:
    """Where records still stand after they have been forgotten; nothing is removed."""
    source = datasets.dataset(name, root).source
    files: dict[str, list[int]] = {}
    fetched = source.pypi or source.hub or ""
    for file, line in places:
        if not fetched and "://" not in file:
            files.setdefault(f"data/{name}/source/{file}", []).append(line)
        elif not fetched:
            fetched = file
    return Remains(files, fetched, versions.in_git(list(files), root), versions.remote_names(root))


def purge_commands(left: Remains) -> list[tuple[str, str]]:
    """(command, what it removes) for what is left of forgotten rows, to be run by people, not by us."""
    gone = "every other version of every dataset, other branches' too, from this machine's cache"
    commands = [
        (f"dvc gc --workspace --cloud --remote {remote} --force", f"{gone} and from the remote '{remote}'")
        for remote in left.remotes
    ] or [("dvc gc --workspace --force", gone)]
    history = "the file from all of git's history; then put it back without the line"
    return commands + [(f"git filter-repo --invert-paths --path {shlex.quote(file)}", history) for file in left.in_git]


# -- who learned from it -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learner:
    """A run that was given forgotten rows, and the model it left.

    Attributes:
        run: its name.
        model: the version's address; empty where nothing was registered.
        aliases: of the version.
        learnt: whether its weights may hold something of the rows: `yes`, `maybe`, or `no` where they were only
            measured with; empty where no model was registered.
        because: what its steps did with the rows.
        command: what trains it again on the data as it is now.
    """

    run: str
    model: str
    aliases: list[str]
    learnt: str
    because: list[str]
    command: str


def _learners(rows: Sequence[str], root: Path) -> tuple[list[Learner], list[str]]:
    """Models and runs that were given some rows, champions first and runs without a model last; what is not known."""
    from steps import row_lineage

    var = Var(root)
    if tracking.tracking_uri(var).startswith("sqlite:///") and not (var.path / "mlflow.db").is_file():
        return [], []
    forwarder = tracking.forwarder(var)
    found = row_lineage.trace(root, forwarder, rows=rows)
    saw = {(step.step, step.key): f"{step.table}: {', '.join(sorted(step.uses))}" for step in found.steps}
    runs = {}
    with suppress(EnvironmentProblem):  # which is among what is not known
        runs = {run.run_id: run for run in tracking.find_runs(forwarder.client) if "data" in run.tags}
    known = []
    for model in found.models:
        run = runs.pop(model.run_id, None) or tracking.Record(model.run_id)
        known.append(Learner(run.name, model.model, model.aliases, model.learnt, model.because, _command(run)))
    known.sort(key=lambda one: (registry.CHAMPION not in one.aliases, -row_lineage.GRADES.index(one.learnt)))
    for run in runs.values():
        steps = {name: said.key for name in step_names(run.tags) if (said := step_tag(run.tags, name))}
        if because := [f"{step} {key[:12]}, {saw[step, key]}" for step, key in steps.items() if (step, key) in saw]:
            known.append(Learner(run.name, "", [], "", because, _command(run)))
    return known, list(dict.fromkeys(found.unknown))


def _command(run: tracking.Record) -> str:
    return f"prefloop run {run.tags.get('prefloop.command') or f'var/runs/{run.name}/recipe.yaml'}"
