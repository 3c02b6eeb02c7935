"""The canonical row on disk: a stable name, the same bytes, and never half a table."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps.errors import DataError
from steps.rows import CONTENT, SCHEMA, chunks, row_id, writing

ROW: dict[str, Any] = {"kind": "pair", "prompt": "p", "chosen": "c é", "rejected": "r 🙂", "margin": 1.0, "line": 3}


def test_a_row_is_named_by_sixteen_hex_digits() -> None:
    assert len(row_id(ROW)) == 16
    assert int(row_id(ROW), 16)


@pytest.mark.parametrize("name", ["line", "file", "source", "part", "encoding", "annotator", "time", "row_id"])
def test_where_a_row_stands_does_not_change_its_name(name: str) -> None:
    assert row_id({**ROW, name: "other"}) == row_id(ROW)


@pytest.mark.parametrize("name", CONTENT)
def test_whatever_a_row_says_changes_its_name(name: str) -> None:
    assert row_id({**ROW, name: "other"}) != row_id(ROW)


def test_texts_do_not_run_into_each_other() -> None:
    assert row_id({"prompt": "ab", "chosen": "c"}) != row_id({"prompt": "a", "chosen": "bc"})
    assert row_id({"prompt": None}) != row_id({"prompt": "null"})


def test_a_record_that_could_not_be_read_is_named_after_its_text() -> None:
    unread = {"problem": "not JSON", "raw": "{"}
    assert row_id(unread) == row_id({**unread, "problem": "something else"})
    assert row_id(unread) != row_id({**unread, "raw": "["})


def test_the_name_is_a_digest_of_what_the_row_says() -> None:
    said = '["pair", "p", "c é", "r 🙂", null, 1.0, null, null, null]'
    assert row_id(ROW) == hashlib.sha256(said.encode()).hexdigest()[:16]


@given(st.text(st.characters(), max_size=5))
def test_any_text_can_be_named(text: str) -> None:
    assert len(row_id({"prompt": text})) == 16


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with writing(tmp_path / name) as writer:
            writer.write([ROW, ROW])
            writer.write([])
        assert writer.rows == 2
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert pq.read_schema(tmp_path / "one") == SCHEMA


def test_a_table_that_breaks_off_leaves_the_one_of_before(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"before")
    with pytest.raises(KeyError), writing(path) as writer:
        writer.write([ROW])
        raise KeyError
    assert path.read_bytes() == b"before"
    assert [found.name for found in tmp_path.iterdir()] == ["rows.parquet"]


def test_rows_come_back_in_chunks_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steps.rows.CHUNK", 3)
    with writing(tmp_path / "rows.parquet") as writer:
        writer.write([{**ROW, "line": line} for line in range(8)])
    tables = list(chunks(tmp_path / "rows.parquet", ["line"]))
    assert [table["line"].to_pylist() for table in tables] == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize("data", [None, b"", b"no table"])
def test_a_table_that_cannot_be_read_is_named(data: bytes | None, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "rows.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"rows\.parquet"):
        list(chunks(tmp_path / "rows.parquet"))
