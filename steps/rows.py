"""The canonical row: what every format becomes, and how it lies on disk. `data/README.md` says it in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from steps.errors import DataError

if TYPE_CHECKING:
    import numpy as np

TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("kind", pa.string()),  # pair, rated, demonstration, prompt; null when the record could not be read
        ("prompt", pa.string()),
        ("turns", pa.list_(TURN)),  # the conversation `prompt` was written from
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("tie", pa.bool_()),
        ("margin", pa.float64()),
        ("answer", pa.string()),
        ("score", pa.float64()),
        ("ratings", pa.list_(pa.float64())),
        ("annotator", pa.string()),
        ("time", pa.string()),
        ("source", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("part", pa.int64()),
        ("encoding", pa.string()),
        ("fault", pa.string()),  # the check a record failed that could not become a row …
        ("problem", pa.string()),  # … and why
        ("raw", pa.string()),
    ]
)
TOPIC = pa.field("topic", pa.string())  # of datasets whose registry entry names a field for it
CONTENT = ("kind", "prompt", "chosen", "rejected", "tie", "margin", "answer", "score", "ratings")
TEXTS = ("prompt", "chosen", "rejected", "answer")
PLACE = ("source", "file", "line", "part")
_ENCODE = json.JSONEncoder(ensure_ascii=False).encode
_QUOTED = json.encoder.encode_basestring
CHUNK = 50_000  # rows that are in memory at once
ANSWERS = ("chosen", "rejected", "answer")  # columns that hold what was said


def row_id(row: Mapping[str, Any]) -> str:
    """A stable name for a row: 16 hex digits of a sha256 over its content, wherever it stands.

    A record that could not be read is named after its raw text.
    """
    content = [row.get(name) for name in CONTENT] if row.get("problem") is None else ["unread", row.get("raw")]
    # What `_ENCODE(content)` is, in a third of the time: it sets up a new encoder at every call.
    said = ["null" if value is None else _QUOTED(value) if type(value) is str else _ENCODE(value) for value in content]
    return hashlib.sha256(f"[{', '.join(said)}]".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def normalised(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts as two people would call them the same: width, case, spaces and outer punctuation ignored."""
    folded = pc.utf8_lower(pc.utf8_normalize(texts, "NFKC"))
    loose = pc.fill_null(
        pc.match_substring_regex(folded, r"\s\s|[^\S ]"), False
    )  # replacing is slow, so only where due
    tight = pc.replace_substring_regex(folded.filter(loose), r"\s+", " ")
    spaced = pc.replace_with_mask(folded, loose.combine_chunks(), tight.combine_chunks()) if len(tight) else folded
    return pc.utf8_trim(spaced, characters=" .!?\"'")


def hashes(texts: pa.ChunkedArray) -> np.ndarray:
    """(n,) uint64: a hash of each normalised text, 0 where there is none."""
    import numpy as np
    import pandas as pd

    if texts.null_count == len(texts):
        return np.zeros(len(texts), dtype=np.uint64)
    plain = normalised(texts)
    found = pd.util.hash_array(pc.fill_null(plain, "").to_numpy(zero_copy_only=False).astype(object), categorize=False)
    found[pc.fill_null(pc.equal(plain, ""), True).to_numpy(zero_copy_only=False)] = 0
    return found


class Writer:
    """Writes canonical rows to a Parquet file, a chunk at a time; the same rows give the same bytes."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema, self.rows = schema, 0
        self._file = pq.ParquetWriter(path, schema, compression="zstd")

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows given as mappings."""
        self.write_table(pa.Table.from_pylist(list(rows), schema=self.schema))

    def write_table(self, table: pa.Table) -> None:
        """Add a table whose columns are the schema's."""
        if table.num_rows:
            self._file.write_table(table, row_group_size=CHUNK)
            self.rows += table.num_rows


@contextmanager
def writing(path: Path, schema: pa.Schema = SCHEMA) -> Iterator[Writer]:
    """A writer whose file takes its place only when all of it is written: a reader never meets half of it."""
    draft = path.with_name(path.name + ".partial")
    writer = Writer(draft, schema)
    try:
        yield writer
    except BaseException:
        writer._file.close()
        draft.unlink(missing_ok=True)
        raise
    writer._file.close()
    draft.replace(path)


def chunks(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a table in their order, as many at a time as were written at once: at most `CHUNK`.

    Raises:
        DataError: the table cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns).combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            "a table of the data cannot be read", where=str(path), have=str(error), then="dvc repro, or `dvc checkout`"
        ) from error
