"""Files into records: JSON lines, JSON, CSV, Parquet, hub datasets. Every record knows its line; none is dropped.

A line that is no record becomes one with a `problem` and its raw text. Only a file that cannot be opened at all, such
as a truncated archive, is an error: it names the file, and the data of before stays as it is.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from steps.datasets import Source
from steps.errors import DataError
from steps.sources import File

BOM = b"\xef\xbb\xbf"
LONGEST_LINE = 64 << 20  # bytes; a longer line is not read as a record
TOO_LONG = f"the line is longer than {LONGEST_LINE >> 20} MiB"
BATCH = 1000  # rows of a table that are in memory at once
KEPT_OF_IT = 1 << 20  # characters of it that a quarantine row shows


class Record(NamedTuple):
    """One record of a file.

    Attributes:
        line: where it begins, from 1; in a JSON array, a Parquet file or a hub dataset, its number.
        value: what it says; None when it could not be read.
        raw: its text as it stands in the file, or as JSON where the file holds no text.
        problem: what kept it from being read.
    """

    line: int
    value: Any
    raw: str
    encoding: str = "utf-8"
    problem: str | None = None


def records(file: File, *, parsed: bool = True) -> Iterator[Record]:
    """The records of a file, in its order.

    Args:
        parsed: whether their values are asked for; their raw texts alone are sooner had.

    Raises:
        DataError: there is no reader for such a file, or it cannot be opened.
    """
    if file.suffix not in READERS:
        raise DataError(
            "a source file of a kind that is not known",
            where=file.name,
            have=f"'{file.suffix}', known are {', '.join(READERS)}, each also with .gz, .zst or .bz2",
            then="convert it, or rename it to say what it is",
        )
    with file.open() as stream:
        yield from (
            lines_of(stream) if READERS[file.suffix] is json_lines and not parsed else READERS[file.suffix](stream)
        )


# -- text --------------------------------------------------------------------------------------------------------


def decode(line: bytes) -> tuple[str, str]:
    """Bytes as text, and the encoding they were in: UTF-8 if it is, else Windows-1252, else Latin-1."""
    for encoding in ("utf-8", "cp1252"):
        try:
            return line.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return line.decode("latin-1"), "latin-1"


def lines_of(stream: IO[bytes]) -> Iterator[Record]:
    """Every line that is not blank, as text; a byte order mark is dropped. `value` is the text itself."""
    number = 0
    while line := stream.readline(LONGEST_LINE):
        number += 1
        whole = len(line) < LONGEST_LINE or line.endswith(b"\n")
        if number == 1:
            line = line.removeprefix(BOM)
        if not whole:
            _skip_line(stream)
        elif line.isspace() or not line:
            continue
        text, encoding = decode(line.rstrip(b"\r\n"))
        if whole:
            yield Record(number, text, text, encoding)
        else:
            yield Record(number, None, text[:KEPT_OF_IT], encoding, TOO_LONG)


def _skip_line(stream: IO[bytes]) -> None:
    while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
        pass


def json_lines(stream: IO[bytes]) -> Iterator[Record]:
    """One JSON value a line."""
    for record in lines_of(stream):
        yield record if record.problem else _parsed(record)


def _parsed(record: Record) -> Record:
    try:
        value = _STRICT.decode(record.raw)
    except (ValueError, RecursionError) as error:
        return Record(record.line, None, record.raw, record.encoding, f"not JSON ({error})")
    return Record(record.line, value, record.raw, record.encoding)


class Twice(ValueError):
    """An object names a field twice with different values: a reader would silently drop one of them."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs) and (lost := [name for name, value in pairs if found[name] != value]):
        raise Twice(f"the field {lost[0]!r} stands there twice")
    return found


_STRICT = json.JSONDecoder(object_pairs_hook=_once)
_LENIENT = json.JSONDecoder()
_GAP = re.compile(r"[\s,]*")


def json_array(stream: IO[bytes]) -> Iterator[Record]:
    """The elements of a JSON array, or of the one array in a JSON object; failing that, JSON lines.

    A file that begins like an array and does not end like one is a single record that could not be read.
    """
    data = stream.read().removeprefix(BOM)
    text, encoding = decode(data)
    try:
        value = _STRICT.decode(text)
    except Twice:
        yield from _elements(text, encoding) if text.lstrip()[:1] == "[" else json_lines(io.BytesIO(data))
        return
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] == "{":
            yield from json_lines(io.BytesIO(data))
        elif text.strip():
            yield Record(1, None, text[:KEPT_OF_IT], encoding, f"not JSON ({error})")
        return
    if isinstance(value, dict):
        arrays = [inner for inner in value.values() if isinstance(inner, list) and inner]
        value = arrays[0] if len(arrays) == 1 and _holds_records(value, arrays[0]) else [value]
    for number, item in enumerate(value if isinstance(value, list) else [value], start=1):
        yield Record(number, item, _as_json(item), encoding)


def _elements(text: str, encoding: str) -> Iterator[Record]:
    """The elements of an array one by one, for some of them name a field twice."""
    place = text.index("[") + 1
    for number in itertools.count(1):
        begin = _GAP.match(text, place).end()  # type: ignore[union-attr]
        if text[begin] == "]":
            return
        _, place = _LENIENT.raw_decode(text, begin)
        yield _parsed(Record(number, None, text[begin:place], encoding))


def _holds_records(wrapper: dict[str, Any], array: list[Any]) -> bool:
    """Whether an object is a wrapper around an array of records, and not a record with turns or answers itself."""
    turns = any(isinstance(item, dict) and {"role", "from"} & set(item) for item in array)
    return all(isinstance(item, dict) for item in array) and not turns and "prompt" not in wrapper


_OTHERS = (";", "\t", "|")


def separated(stream: IO[bytes], delimiter: str = ",") -> Iterator[Record]:
    """Rows of a CSV file with a header. An empty cell is a missing value; a quote nobody closes is a problem."""
    csv.field_size_limit(LONGEST_LINE)
    taken: list[tuple[str, str]] = []
    too_long: list[int] = []

    def lines() -> Iterator[str]:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b"")):
            text, encoding = decode(line.removeprefix(BOM) if number == 0 else line)
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                _skip_line(stream)
                too_long.append(number)
                text = text[:KEPT_OF_IT]
            taken.append((text, encoding))
            yield "" if too_long else text.replace("\0", "\N{REPLACEMENT CHARACTER}")

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    twice = ""
    while True:
        begins, problem, cells = reader.line_num + 1, None, []
        taken.clear()
        too_long.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"not CSV ({error})"
        raw = "".join(text for text, _ in taken).rstrip("\r\n")
        encoding = next((name for _, name in taken if name != "utf-8"), "utf-8")
        problem = TOO_LONG if too_long else problem
        if problem:
            yield Record(begins, None, raw, encoding, problem)
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            twice = next((name for name in header if name and header.count(name) > 1), "")
            continue
        if len(header) == 1 and (other := next((mark for mark in _OTHERS if mark in header[0]), "")):
            problem = f"{other!r} stands between cells, where {delimiter!r} should"
        elif len(cells) != len(header):
            problem = f"{len(cells)} cells where the header has {len(header)}"
        elif twice:
            problem = f"the header names '{twice}' twice"
        values = None if problem else {name: cell if cell else None for name, cell in zip(header, cells, strict=True)}
        yield Record(begins, values, raw, encoding, problem)


def tab_separated(stream: IO[bytes]) -> Iterator[Record]:
    """Rows of a tab-separated file with a header."""
    return separated(stream, "\t")


def parquet(stream: IO[bytes]) -> Iterator[Record]:
    """Rows of a Parquet file."""
    with pq.ParquetFile(stream if stream.seekable() else pa.BufferReader(stream.read())) as file:
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise pa.ArrowInvalid(f"the column '{twice[0]}' stands there twice")
        yield from _numbered(file.iter_batches(BATCH))


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[Record]:
    """Records of batches of rows, which have no text of their own."""
    for number, (value, encoding, problem) in enumerate(itertools.chain.from_iterable(map(_rows, batches)), start=1):
        yield Record(number, None if problem else value, _as_json(value), encoding, problem)


def _rows(batch: pa.RecordBatch) -> list[tuple[dict[str, Any], str, str | None]]:
    """(fields, encoding, problem) of every row; one by one where a cell among them has no value in Python."""
    try:
        return [(row, "utf-8", None) for row in batch.to_pylist()]
    except (ValueError, OverflowError, pa.ArrowException):
        return [_row(batch.slice(place, 1)) for place in range(batch.num_rows)]


def _row(row: pa.RecordBatch) -> tuple[dict[str, Any], str, str | None]:
    fields: dict[str, Any] = {}
    encoding, problem = "utf-8", None
    for name, column in zip(row.schema.names, row.columns, strict=True):
        cell = column[0]
        try:
            fields[name] = cell.as_py()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            if isinstance(cell, pa.StringScalar | pa.LargeStringScalar):
                fields[name], encoding = decode(cell.as_buffer().to_pybytes())
            else:
                fields[name], problem = None, f"{name} cannot be read ({error})"
    return fields, encoding, problem


def _as_json(value: Any) -> str:
    try:
        written = json.dumps(value, ensure_ascii=False, default=str)
        written.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair
        written = json.dumps(value, default=str)
    except RecursionError:
        written = "nested too deeply to be written"
    return written


READERS: dict[str, Callable[[IO[bytes]], Iterator[Record]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_array,
    ".csv": separated,
    ".tsv": tab_separated,
    ".parquet": parquet,
    ".txt": lines_of,
}


# -- the hub -----------------------------------------------------------------------------------------------------


def hub_records(source: Source, local: Path) -> Iterator[Record]:
    """The rows of a dataset on the hub at its pinned revision, or of a folder laid out as the hub does.

    Raises:
        DataError: it cannot be loaded, or it is on the hub and no revision is named.
    """
    from datasets import load_dataset

    assert source.hub is not None
    folder = local / source.hub
    if not folder.is_dir() and source.revision is None:
        raise DataError(
            "a hub dataset needs its revision, else a version could not be made again",
            where=source.hub,
            have=f"no `revision`, and no folder {folder}",
            then="add `revision:` with the 40 hex digits of a commit beside `hub:` in data/datasets.yaml",
        )
    where = str(folder) if folder.is_dir() else source.hub
    try:
        table = load_dataset(where, source.config, split=source.split, revision=source.revision)
        batches = table.with_format("arrow").iter(BATCH)
        yield from _numbered(batch for rows in batches for batch in rows.to_batches())
    except Exception as error:  # the library raises whatever its readers and the network do
        raise DataError(
            "a hub dataset cannot be loaded",
            where=f"{source.hub} (config {source.config}, split {source.split}, revision {source.revision})",
            have=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            then="check the name and the network; `source.hub` may also name a folder in data/NAME/source",
        ) from error
