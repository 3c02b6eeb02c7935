"""Where rows stand: in which tables of which versions of the data, by their ids or by what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from steps import versions
from steps.artifact import digest_file
from steps.batches import FORGOTTEN
from steps.changes import IDS, PLACE, read
from steps.data_lineage import WORK_TREE, revisions
from steps.datasets import read_table
from steps.errors import PrefloopError
from steps.pipeline import TABLES
from steps.tracking import Record

ALL_ROWS = "rows"  # the table of every row that was read, with its place
NO_COMMIT = "no commit"  # of a table that a run read and no commit names
CONTENT = ("prompt", "chosen", "rejected", "answer")

History = dict[str, dict[str, dict[str, str]]]  # dataset → revision → table → md5


@dataclass(frozen=True)
class Sighting:
    """Rows in a table of a version.

    Attributes:
        revisions: commits whose `dvc.lock` names the table, the newest first, or `work tree`.
        rows: row id → line numbers in the table, from 0.
        by: `row_id`, or `content` where the table holds no ids of the row.
    """

    dataset: str
    table: str
    md5: str
    revisions: list[str]
    rows: dict[str, list[int]]
    by: str = "row_id"


def history_of(root: Path) -> History:
    """Every table of every dataset, of the work tree and of every commit that changed `dvc.lock`."""
    found: History = {}
    for revision in ["", *revisions(root)]:
        try:
            stages = versions.stages(root, revision)
        except (FileNotFoundError, PrefloopError, yaml.YAMLError, KeyError, TypeError):
            continue
        for name in {stage.partition("@")[2] for stage in stages if stage.startswith("split@")}:
            with suppress(PrefloopError):
                outs = versions.outputs(name, root, revision)
                tables = {file.removesuffix(".parquet"): md5 for file, md5 in outs.items() if file.endswith(".parquet")}
                found.setdefault(name, {})[revision or WORK_TREE] = tables
    return found


class Tables:
    """Tables of all versions by md5, from the work tree, DVC's cache or its remote; each is had once."""

    def __init__(self, history: History, root: Path, scratch: Path) -> None:
        self.root, self.scratch = root, scratch
        self.of: dict[tuple[str, str, str], list[str]] = {}  # (dataset, table, md5) → revisions
        for name, by_revision in history.items():
            for revision, tables in by_revision.items():
                for table, md5 in tables.items():
                    self.of.setdefault((name, table, md5), []).append(revision)
        self._paths: dict[str, Path | None] = {}
        self._cached: dict[str, Path] | None = None

    def add_what_runs_read(self, runs: Sequence[Record]) -> None:
        """Tables of versions that were replaced before git was told about them: DVC's cache may have them still."""
        known = {md5 for _, _, md5 in self.of}
        for given in (given for record in runs for given in record.datasets if given["md5"] not in known):
            dataset, _, table = str(given["name"]).partition("/")
            self.of[dataset, table, str(given["md5"])] = [NO_COMMIT]

    def named(self, *names: str) -> Iterator[tuple[str, str, str]]:
        yield from (known for known in self.of if known[1] in names)

    def path(self, dataset: str, table: str, md5: str) -> Path | None:
        """Where a table can be read, or None where it cannot be had."""
        if md5 not in self._paths:
            self._paths[md5] = self._find(dataset, table, md5)
        return self._paths[md5]

    def _find(self, dataset: str, table: str, md5: str) -> Path | None:
        here = self.root / "data" / dataset / f"{table}.parquet"
        if here.is_file() and digest_file(here, "md5") == md5:
            return here
        if self._cached is None:
            self._cached = versions.cached({known for _, _, known in self.of}, self.root)
        if (kept := self._cached.get(md5)) and digest_file(kept, "md5") == md5:
            return kept
        at = self.of[dataset, table, md5][0]
        if at == NO_COMMIT:
            return None
        with suppress(PrefloopError):
            revision = "" if at == WORK_TREE else at
            return versions.fetch(dataset, self.root, revision, self.scratch / md5, [here.name])[here.name]
        return None

    def missing(self) -> list[str]:
        """What could not be had, a sentence for each version."""
        lost: dict[tuple[str, str], list[str]] = {}
        for (dataset, table, md5), at in self.of.items():
            if at[0] != NO_COMMIT and md5 in self._paths and self._paths[md5] is None:
                lost.setdefault((dataset, at[0]), []).append(table)
        return [
            f"{dataset} of {revision[:12]}: {', '.join(tables)} can be had neither from DVC's cache nor from its remote"
            for (dataset, revision), tables in lost.items()
        ]


def places_of(tables: Tables, rows: Sequence[str], file: str | None) -> dict[str, list[dict[str, Any]]]:
    """row id → where it was read from, for rows that some version holds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for dataset, table, md5 in tables.named(ALL_ROWS):
        if (path := tables.path(dataset, table, md5)) is None:
            continue
        frame = read(path, ["row_id", *PLACE])
        mine = frame[frame["file"].isin(_names(file))] if file else frame[frame["row_id"].isin(rows)]
        for row in mine.to_dict("records"):
            part = row.get("part")
            place = {"dataset": dataset, "file": row["file"], "line": int(row["line"])}
            place["part"] = 0 if part is None or pd.isna(part) else int(part)
            known = found.setdefault(str(row["row_id"]), [])
            if place not in known:
                known.append(place)
    return found


def where_forgotten(root: Path, rows: Sequence[str]) -> str:
    """Where it is written that one of the rows was forgotten; empty where none was."""
    for record in sorted((root / "data").glob(f"*/{FORGOTTEN}")):
        if any(row in record.read_text(encoding="utf-8") for row in rows):
            return f"it was forgotten: {record.relative_to(root)} says when and why"
    return ""


def _names(file: str) -> list[str]:
    """What a batch file may be called in the tables: as it is, or below `source/`."""
    return [file, file.rpartition("/source/")[2] or file]


def find_rows(tables: Tables, wanted: set[str]) -> Iterator[Sighting]:
    """Rows in every table that a step reads, and in what validation made of all."""
    texts = _Texts(tables, wanted)
    for dataset, table, md5 in tables.named("valid", "quarantine", *TABLES):
        if (path := tables.path(dataset, table, md5)) is None:
            continue
        frame = read(path, [*IDS])
        ids = list(frame.columns)
        frame = frame if ids else read_table(path)
        rows = _by_id(frame, ids, wanted) if ids else texts.find(frame, dataset, table)
        if rows:
            yield Sighting(dataset, table, md5, tables.of[dataset, table, md5], rows, "row_id" if ids else "content")


def _by_id(frame: pd.DataFrame, columns: Sequence[str], wanted: set[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for column in columns:
        for line, row in enumerate(frame[column].tolist()):
            if row in wanted and line not in found.setdefault(row, []):
                found[row].append(line)
    return {row: sorted(lines) for row, lines in found.items()}


class _Texts:
    """Finds rows in tables without ids, such as `prompts` and those of older versions, by what they say."""

    def __init__(self, tables: Tables, wanted: set[str]) -> None:
        self.texts: dict[str, dict[str, list[tuple[str, str]]]] = {}
        for dataset, table, md5 in tables.named(ALL_ROWS, "preferences"):
            path = tables.path(dataset, table, md5)
            if path is None:
                continue
            frame = read(path, [*IDS, *CONTENT])
            for column in [name for name in IDS if name in frame]:
                for row in frame[frame[column].isin(wanted)].to_dict("records"):
                    self._learn(dataset, str(row[column]), row, sides=column == "row_id")

    def _learn(self, dataset: str, row_id: str, row: Mapping[str, Any], sides: bool) -> None:
        known = self.texts.setdefault(dataset, {})
        for name in CONTENT if sides else ("prompt",):  # a made pair shows the prompt its rows were given
            if isinstance(text := row.get(name), str):
                entry = (row_id, text)
                held = known.setdefault("prompt" if name == "prompt" else "answer", [])
                if entry not in held:
                    held.append(entry)

    def find(self, frame: pd.DataFrame, dataset: str, table: str) -> dict[str, list[int]]:
        """Lines that say what a row says: its prompt in `prompts`, one of its answers elsewhere."""
        kind = "prompt" if table == "prompts" else "answer"
        wanted = ("prompt",) if kind == "prompt" else ("completion", "chosen", "rejected", "answer")
        columns = [name for name in wanted if name in frame]
        lines: dict[str, list[int]] = {}
        for column in columns:
            for line, text in enumerate(frame[column].tolist()):
                lines.setdefault(text, []).append(line)
        found: dict[str, list[int]] = {}
        for row, text in self.texts.get(dataset, {}).get(kind, []):
            if text in lines:
                found[row] = sorted({*found.get(row, []), *lines[text]})
        return found


def versions_with(history: History, held: set[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for name, by_revision in history.items():
        for revision, tables in by_revision.items():
            if any((name, md5) in held for md5 in tables.values()):
                digest = versions.digest_of({table: md5 for table, md5 in tables.items() if table in TABLES})
                found.setdefault(name, []).append((digest, revision))
    return found
