"""Reading sources: every line accounted for, whatever it holds."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps import ingest
from steps.datasets import Source, write_table
from steps.errors import DataError
from steps.ingest import FORMATS, decode, fetch, lines_of, preferences, rated_sentences, read_source, row_id

BOM = b"\xef\xbb\xbf"


def rated(texts: bytes, ratings: bytes = b"") -> pd.DataFrame:
    return rated_sentences({"texts": texts, "ratings": ratings}, {"texts": "t.txt", "ratings": "r.txt"})


def preferred(*lines: object) -> pd.DataFrame:
    data = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return preferences({"pairs": data}, {"pairs": "p.jsonl"})


def absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# -- lines -------------------------------------------------------------------------------------------------------


def test_lines_are_numbered_as_an_editor_numbers_them() -> None:
    assert lines_of(b"a\n\nb\n   \nc") == [(1, "a", "utf-8"), (3, "b", "utf-8"), (5, "c", "utf-8")]


def test_a_byte_order_mark_and_carriage_returns_are_dropped() -> None:
    assert lines_of(BOM + b"a\r\nb\r\n\r\n") == [(1, "a", "utf-8"), (2, "b", "utf-8")]


def test_a_last_newline_makes_no_row() -> None:
    assert len(lines_of(b"a\n")) == len(lines_of(b"a")) == 1
    assert lines_of(b"") == []


def test_each_line_has_an_encoding_of_its_own() -> None:
    lines = lines_of("caf\u00e9\n".encode() + b"caf\xe9 \x93so\x94\n" + b"\x81\xe9")
    assert [(text, encoding) for _, text, encoding in lines] == [
        ("café", "utf-8"),
        ("café “so”", "cp1252"),
        ("\x81é", "latin-1"),
    ]


@given(st.binary())
def test_any_bytes_decode(line: bytes) -> None:
    text, encoding = decode(line)
    assert text.encode(encoding) == line


LINES = st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=20)


def rows_expected(lines: list[bytes]) -> int:
    first, *rest = lines or [b""]
    return sum(bool(line.strip()) for line in (first.removeprefix(BOM), *rest))


@given(LINES)
def test_every_line_that_is_not_blank_becomes_a_rated_row(lines: list[bytes]) -> None:
    assert len(rated(b"\n".join(lines))) == rows_expected(lines)


@given(LINES)
def test_every_line_that_is_not_blank_becomes_a_preference_row(lines: list[bytes]) -> None:
    assert len(preferred(*lines)) == rows_expected(lines)


TEXTISH = st.lists(st.text('0123456789.,-[]\t \r{}:"aé', max_size=25).map(str.encode), max_size=12)


@given(TEXTISH, TEXTISH)
def test_no_ratings_file_however_broken_loses_a_text(texts: list[bytes], ratings: list[bytes]) -> None:
    assert len(rated(b"\n".join(texts), b"\n".join(ratings))) == rows_expected(texts)


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_an_empty_source_is_an_empty_table(kind: str) -> None:
    named = {"texts": "t", "ratings": "r"} if kind == "rated_sentences" else {"pairs": "p"}
    rows = FORMATS[kind](dict.fromkeys(named, b""), named)
    assert len(rows) == 0
    assert "line" in rows


def test_a_row_is_named_after_its_content() -> None:
    assert row_id("a", 1) == row_id("a", 1)
    assert len({row_id("a", 1), row_id("a", 2), row_id("a1"), row_id("a", "1")}) == 4
    assert len(row_id("\ud800")) == 16


# -- rated sentences ---------------------------------------------------------------------------------------------


def test_a_sentence_gets_its_score_and_the_ratings_of_its_id() -> None:
    rows = rated(b"7\t1.5\tGood one. \n8\t-2\tBad\ttab", b"8\t-2\t0.1\t[-2, -2]\n7\t1.5\t0.5\t[1, 2]\n")
    assert rows.drop(columns="row_id").to_dict("records") == [
        {
            "file": "t.txt",
            "line": 1,
            "encoding": "utf-8",
            "answer": "Good one.",
            "score": 1.5,
            "ratings": [1.0, 2.0],
        },
        {"file": "t.txt", "line": 2, "encoding": "utf-8", "answer": "Bad\ttab", "score": -2.0, "ratings": [-2.0] * 2},
    ]


@pytest.mark.parametrize("line", [b"7\t\tA text", b"7\tmuch\tA text", b"7\t1,5\tA text"])
def test_a_score_that_is_no_number_is_absent(line: bytes) -> None:
    row = rated(line).iloc[0]
    assert math.isnan(row["score"])
    assert row["answer"] == "A text"


@pytest.mark.parametrize("line", [b"7", b"7\t1.5"])
def test_a_line_cut_short_has_no_answer(line: bytes) -> None:
    assert absent(rated(line).iloc[0]["answer"])


def test_a_sentence_nobody_rated_has_no_ratings() -> None:
    assert rated(b"7\t1\tA text", b"8\t1\t0\t[1]").iloc[0]["ratings"] == []


def test_a_rating_that_is_no_number_is_left_out() -> None:
    assert rated(b"7\t1\tA text", b"7\t1\t0\t[1, x, , nan, inf, 3]").iloc[0]["ratings"] == [1.0, 3.0]


@pytest.mark.parametrize("line", [b"7", b"nothing but words", b"7 1 0 [1]"])
def test_a_broken_line_of_ratings_leaves_its_sentence_without_ratings(line: bytes) -> None:
    rows = rated(b"7\t1\tA text\n8\t2\tAnother", line + b"\n8\t2\t0\t[2]")
    assert list(rows["ratings"]) == [[], [2.0]]


# -- preferences -------------------------------------------------------------------------------------------------

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def test_a_pair_is_read_with_its_margin_or_without_one() -> None:
    rows = preferred(PAIR, {**PAIR, "margin": 2}, {**PAIR, "margin": None})
    assert list(rows["margin"].isna()) == [True, False, True]
    assert rows["margin"][1] == 2.0
    assert list(rows["line"]) == [1, 2, 3]
    assert rows["problem"].isna().all()
    first = rows.iloc[0]
    assert (first["prompt"], first["chosen"], first["rejected"], first["file"]) == ("p", "c", "r", "p.jsonl")
    assert absent(first["problem"])
    assert absent(first["raw"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON"),
        (b'{"prompt": "p",}', "not JSON"),
        (b"words", "not JSON"),
        (b'["p", "c", "r"]', "not a JSON object"),
        (b"3", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": 3, "chosen": "c", "rejected": "r"}', "prompt not text"),
        (b'{"prompt": ["p"], "chosen": "c", "rejected": {}}', "prompt and rejected not text"),
    ],
)
def test_a_line_that_cannot_be_read_says_why_and_is_kept(line: bytes, said: str) -> None:
    rows = preferred(PAIR, line)
    assert len(rows) == 2
    assert said in rows.iloc[1]["problem"]
    assert rows.iloc[1]["raw"] == line.decode()


def test_a_missing_side_is_absent_and_no_reading_problem() -> None:
    row = preferred({"prompt": "p", "chosen": "c"}).iloc[0]
    assert absent(row["rejected"])
    assert absent(row["problem"])


@pytest.mark.parametrize("margin", [b"true", b'"2"', b"[1]", b"NaN", b"Infinity", b"1e999", b"1" + b"0" * 400])
def test_a_margin_that_is_no_number_is_a_problem_of_its_line(margin: bytes) -> None:
    row = preferred(b'{"prompt": "p", "chosen": "c", "rejected": "r", "margin": ' + margin + b"}").iloc[0]
    assert math.isnan(row["margin"])
    assert row["problem"] == "margin not a number"


def test_several_files_keep_their_names_and_line_numbers() -> None:
    line = json.dumps(PAIR).encode()
    rows = preferences({"b": line, "a": b"\n" + line}, {"a": "one.jsonl", "b": "two.jsonl"})
    assert list(zip(rows["file"], rows["line"], strict=True)) == [("one.jsonl", 2), ("two.jsonl", 1)]


@pytest.mark.parametrize("line", [PAIR, b"{", {**PAIR, "prompt": "\ud800 half a letter"}, {**PAIR, "chosen": None}])
def test_whatever_was_read_can_be_written_down(line: object, tmp_path: Path) -> None:
    write_table(preferred(line), tmp_path / "rows.parquet")
    assert len(pd.read_parquet(tmp_path / "rows.parquet")) == 1


# -- where the bytes come from -----------------------------------------------------------------------------------


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def archive(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_local_files_are_read_by_role(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"{}\r\n")
    assert read_source(Source(files={"pairs": "p.jsonl"}), tmp_path, tmp_path) == {"pairs": b"{}\r\n"}


def test_a_missing_file_is_named_with_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_source(Source(files={"pairs": "p.jsonl"}), tmp_path, tmp_path)
    text = str(caught.value)
    assert "the source file for 'pairs' cannot be read" in text
    assert str(tmp_path / "p.jsonl") in text
    assert "No such file" in text
    assert "source.files.pairs" in text


def test_another_file_than_the_registry_names_is_refused_with_both_digests(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"{}")
    with pytest.raises(DataError) as caught:
        read_source(Source(files={"pairs": "p.jsonl"}, sha256=sha256(b"{ }")), tmp_path, tmp_path)
    text = str(caught.value)
    assert "the source is not the file the registry names" in text
    assert sha256(b"{}") in text
    assert sha256(b"{ }") in text


def fetched(data: bytes, downloads: Path, **settings: object) -> dict[str, bytes]:
    """Read an archive that lies among the downloads already: nothing is asked of the network."""
    (downloads / sha256(data)).write_bytes(data)
    source = Source(pypi="a==1", sha256=sha256(data), **{"files": {"texts": "a/t.txt"}, **settings})
    return read_source(source, downloads, downloads)


def test_a_file_is_taken_out_of_the_fetched_archive(tmp_path: Path) -> None:
    assert fetched(archive({"a/t.txt": b"text"}), tmp_path) == {"texts": b"text"}


def test_a_file_is_taken_out_of_an_archive_inside_the_archive(tmp_path: Path) -> None:
    inner = archive({"a/t.txt": b"text"})
    assert fetched(archive({"a/inner.tar.gz": inner}), tmp_path, archive="a/inner.tar.gz") == {"texts": b"text"}


@pytest.mark.parametrize("data", [archive({"a/other.txt": b"x"}), b"no archive", b""])
def test_an_archive_without_the_file_is_a_data_error(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not hold the named file") as caught:
        fetched(data, tmp_path)
    assert "a==1" in str(caught.value)


def test_an_archive_that_was_altered_since_is_refused(tmp_path: Path) -> None:
    (tmp_path / sha256(b"right")).write_bytes(b"wrong")
    with pytest.raises(DataError, match=sha256(b"wrong")):
        fetch("a==1", sha256(b"right"), tmp_path)


def test_a_fetched_archive_is_checked_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(requirement: str, into: Path) -> Path:
        (into / "a-1.tar.gz").write_bytes(b"what came")
        return into / "a-1.tar.gz"

    monkeypatch.setattr(ingest, "_pip_download", download)
    with pytest.raises(DataError, match=sha256(b"what came")):
        fetch("a==1", sha256(b"what was meant"), tmp_path / "downloads")
    assert not (tmp_path / "downloads").exists()
    assert fetch("a==1", sha256(b"what came"), tmp_path / "downloads") == b"what came"
    monkeypatch.delattr(ingest, "_pip_download")
    assert fetch("a==1", sha256(b"what came"), tmp_path / "downloads") == b"what came"
