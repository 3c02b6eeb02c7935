"""First data stage: every record of the source becomes canonical rows that know their file and line.

Nothing is judged here, and nothing is dropped but what people asked to be forgotten: a record that cannot become a row
becomes one without texts, with its raw text and the reason, and validation names it.

`python -m steps.ingest NAME` writes `data/NAME/rows.parquet`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from steps.datasets import Dataset, dataset, folder
from steps.errors import DataError, PrefloopError
from steps.formats import FORMATS, BadRecord, Row, at, kind_of, number
from steps.readers import Record, hub_records, lines_of, records
from steps.rows import CHUNK, SCHEMA, TOPIC, row_id, writing
from steps.sources import DOWNLOADS, File, files_of

LONG = ("prompt", "chosen", "rejected", "answer", "raw")
CHUNK_CHARACTERS = 64 << 20
TOPIC_CHARACTERS = 100  # a topic is a label, not a text
_FIELD = re.compile(r"\{([^{}]+)\}")


def ingest(entry: Dataset, local: Path, out: Path, downloads: Path = DOWNLOADS) -> tuple[int, int]:
    """Read a dataset's source into a table of canonical rows.

    Args:
        local: where the registry's relative file names are looked for.
        out: the Parquet file to write.

    Returns:
        how many records were read, and how many rows they became.
    """
    read = 0
    with writing(out, SCHEMA.append(TOPIC) if "topic" in entry.columns else SCHEMA) as writer:
        for chunk in _chunks(canonical_rows(entry, local, downloads)):
            read += sum(row["part"] == 0 for row in chunk)
            writer.write(chunk)
    return read, writer.rows


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists of at most `CHUNK`, and fewer where they are long, so that a chunk always fits in memory."""
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += sum(len(row.get(name) or "") for name in LONG)
        if len(chunk) >= CHUNK or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def canonical_rows(entry: Dataset, local: Path, downloads: Path = DOWNLOADS) -> Iterator[Row]:
    """The rows of a dataset, in the order of its files and lines, without those of records that are forgotten."""
    forgotten = frozenset(entry.forgotten)
    for rows in _rows_by_record(entry, local, downloads):
        if forgotten.isdisjoint(row["row_id"] for row in rows):
            yield from rows


def forgotten_records(entry: Dataset, local: Path, downloads: Path = DOWNLOADS) -> int:
    """How many records of a source are left out, for a row of theirs is to be forgotten."""
    forgotten = frozenset(entry.forgotten)
    if not forgotten:
        return 0
    return sum(
        not forgotten.isdisjoint(row["row_id"] for row in rows) for rows in _rows_by_record(entry, local, downloads)
    )


def _rows_by_record(entry: Dataset, local: Path, downloads: Path) -> Iterator[list[Row]]:
    if entry.format == "rated_sentences":
        with files_of(entry.source, local, downloads) as files:
            yield from ([row] for row in rated_sentences(files))
        return
    for source, file, record in records_of(entry, local, downloads):
        rows = _rows_of(record, entry)
        for part, row in enumerate(rows):
            row |= {"source": source, "file": file, "line": record.line, "part": part, "encoding": record.encoding}
            row["topic"] = _topic(record, entry)
            row["row_id"] = row_id(row)
        yield rows


def records_of(entry: Dataset, local: Path, downloads: Path = DOWNLOADS) -> Iterator[tuple[str, str, Record]]:
    """(source, file, record) of all that a dataset's source holds, in order."""
    if entry.source.hub:
        yield from (("hub", entry.source.hub, record) for record in hub_records(entry.source, local))
        return
    with files_of(entry.source, local, downloads) as files:
        for file in files:
            yield from ((file.role, file.name, record) for record in records(file))


def raw_texts(entry: Dataset, local: Path, downloads: Path = DOWNLOADS) -> Iterator[tuple[tuple[str, int], str]]:
    """((file, line), raw text) of every record, in the order of the rows."""
    if entry.source.hub:
        yield from (((name, record.line), record.raw) for _, name, record in records_of(entry, local, downloads))
        return
    with files_of(entry.source, local, downloads) as files:
        if entry.format == "rated_sentences":  # lines, whatever the file is called
            texts = next(file for file in files if file.role == "texts")
            with texts.open() as stream:
                yield from (((texts.name, record.line), record.raw) for record in lines_of(stream))
            return
        for file in files:
            yield from (((file.name, record.line), record.raw) for record in records(file, parsed=False))


def _rows_of(record: Record, entry: Dataset) -> list[Row]:
    """What a record stands for; one row that says what is wrong with it, where it stands for nothing."""
    if record.problem:
        return [_unread(record, "unreadable", record.problem)]
    value = {"text": record.value} if isinstance(record.value, str) else record.value
    try:
        if not isinstance(value, Mapping):
            raise BadRecord(f"the record is {kind_of(value)}, not an object")
        rows = list(FORMATS[entry.format](_fields(value, entry)))
    except BadRecord as error:
        return [_unread(record, error.check, str(error))]
    except RecursionError:
        return [_unread(record, "unreadable", "the record is nested too deeply")]
    return rows or [_unread(record, "unreadable", "the record holds nothing")]


def _topic(record: Record, entry: Dataset) -> str | None:
    """What the registry calls a record's topic, as text; lists and numbers are written out."""
    found = _flat(at(record.value, entry.columns["topic"])) if "topic" in entry.columns else ""
    return found.encode("utf-8", "replace").decode()[:TOPIC_CHARACTERS] or None


def _unread(record: Record, fault: str, problem: str) -> Row:
    return {"fault": fault, "problem": problem, "raw": record.raw}


def _fields(value: Mapping[str, Any], entry: Dataset) -> Mapping[str, Any]:
    """A record's fields under the format's names, with the prompt written as the registry's template has it."""
    if not entry.columns and not entry.prompt:
        return value
    fields = {**value, **{name: at(value, path) for name, path in entry.columns.items()}}
    if entry.prompt:
        parts = {name: _flat(at(value, name)) for name in _FIELD.findall(entry.prompt)}
        fields["prompt"] = (
            _FIELD.sub(lambda match: parts[match.group(1)], entry.prompt) if any(parts.values()) else None
        )
    return fields


def _flat(value: Any) -> str:
    """Text of a field for a template: lists line by line."""
    if isinstance(value, list):
        return "\n".join(map(_flat, value))
    return "" if value is None else str(value)


def rated_sentences(files: list[File]) -> Iterator[Row]:
    """Sentences with the raw ratings of several people, from two files separated by tabs.

    `texts`: id, mean rating, text. `ratings`: id, mean, standard deviation, [raw ratings].

    Raises:
        DataError: one of the two is not named.
    """
    by_role = {file.role: file for file in files}
    if missing := sorted({"texts", "ratings"} - set(by_role)):
        raise DataError(f"rated_sentences needs source.files.{missing[0]}", have=", ".join(by_role) or "no files")
    ratings: dict[str, list[float]] = {}
    with by_role["ratings"].open() as stream:
        for record in lines_of(stream):
            identity, *columns = record.raw.split("\t")
            values = columns[-1].strip().strip("[]").split(",") if columns else []
            ratings[identity] = [value for value in map(_number, values) if value is not None]
    texts = by_role["texts"]
    with texts.open() as stream:
        for record in lines_of(stream):
            cells = record.raw.split("\t", 2)
            identity = cells[0]
            score = cells[1] if len(cells) > 1 else None
            answer = cells[2].strip() if len(cells) > 2 else None
            row = {
                "kind": "rated",
                "answer": answer,
                "score": _number(score),
                "ratings": ratings.get(identity, []),
                "source": "texts",
                "file": texts.name,
                "line": record.line,
                "part": 0,
                "encoding": record.encoding,
            }
            if record.problem:
                row |= _unread(record, "unreadable", record.problem)
            row["row_id"] = row_id(row)
            yield row


def _number(cell: str | None) -> float | None:
    try:
        return number(cell, "rating")
    except BadRecord:
        return None


def main(name: str) -> None:
    read, rows = ingest(dataset(name), folder(name) / "source", folder(name) / "rows.parquet")
    print(f"ingest {name}: {read:,} records read, {rows:,} rows")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except PrefloopError as error:
        sys.exit(f"{error}")
