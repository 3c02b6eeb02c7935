"""Reading a dataset: every record accounted for, whatever it holds."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from steps import ingest as module
from steps.checks import CHECKS
from steps.errors import DataError, PrefloopError
from steps.ingest import ingest, rated_sentences, raw_texts
from steps.readers import decode, records
from steps.rows import chunks
from steps.sources import File

BOM = b"\xef\xbb\xbf"
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
LINE = json.dumps(PAIR).encode()


# -- records and their places ------------------------------------------------------------------------------------


def test_a_row_knows_its_source_file_line_and_encoding(tmp_path: Path) -> None:
    files = {"b.jsonl": b"\n" + LINE, "a.jsonl": LINE + b"\n" + LINE.replace(b'"c"', b'"caf\xe9"')}
    rows = tiny.ingested(files, tmp_path, source={"files": {"one": "b.jsonl", "two": "a.jsonl"}})
    assert [(row["source"], row["file"], row["line"], row["part"], row["encoding"]) for row in rows] == [
        ("one", "b.jsonl", 2, 0, "utf-8"),
        ("two", "a.jsonl", 1, 0, "utf-8"),
        ("two", "a.jsonl", 2, 0, "cp1252"),
    ]
    assert rows[2]["chosen"] == "café"


def test_the_rows_of_one_record_share_its_line(tmp_path: Path) -> None:
    records = [{"prompt": "p", "answers": ["a", "b", "c"], "ranks": [1, 2, 3]}] * 2
    rows = tiny.ingested({"r.jsonl": records}, tmp_path, format="rankings")
    assert [(row["line"], row["part"]) for row in rows] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]


def test_records_and_rows_are_counted_apart(tmp_path: Path) -> None:
    records = [{"prompt": "p", "answers": ["a", "b", "c"], "ranks": [1, 2, 3]}, {}]
    entry = tiny.entry({"r.jsonl": records}, format="rankings")
    source = tiny.lay({"r.jsonl": records}, tmp_path / "source")
    assert ingest(entry, source, tmp_path / "rows.parquet") == (2, 4)


def test_rows_beyond_a_chunk_are_all_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 7)
    rows = tiny.ingested({"p.jsonl": tiny.preference_rows(10)}, tmp_path)
    assert [row["line"] for row in rows] == list(range(1, 21))


def test_long_rows_are_written_in_smaller_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"prompt": "p", "chosen": "x" * 400, "rejected": str(n)} for n in range(20)] + [{}] * 9
    whole = tiny.ingested({"p.jsonl": records}, tmp_path / "whole")
    monkeypatch.setattr(module, "CHUNK_CHARACTERS", 1000)
    assert tiny.ingested({"p.jsonl": records}, tmp_path / "parts") == whole
    groups = pq.ParquetFile(tmp_path / "parts" / "rows.parquet").metadata
    assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [3] * 6 + [11]
    assert len(list(chunks(tmp_path / "parts" / "rows.parquet"))) == 7


def test_a_template_of_which_nothing_is_there_makes_no_prompt(tmp_path: Path) -> None:
    records = [{"q": "x"}, {"other": "y"}, {"q": None, "z": [""]}, {"z": ["a", "b"]}]
    rows = tiny.ingested({"p.jsonl": records}, tmp_path, prompt="Q: {q}{z}", format="prompts")
    assert [row["prompt"] for row in rows] == ["Q: x", None, None, "Q: a\nb"]


@pytest.mark.parametrize(
    ("line", "fault", "said"),
    [
        (b"{", "unreadable", "not JSON"),
        (b"[1]", "unreadable", "the record is a list, not an object"),
        (b"3", "unreadable", "the record is a number, not an object"),
        (b"true", "unreadable", "the record is a boolean, not an object"),
        (b"null", "unreadable", "the record is missing, not an object"),
        (b'{"prompt": 3}', "not_text", "prompt is a number, not text"),
        (b'{"prompt": "\\ud800"}', "encoding", "prompt holds half a surrogate pair"),
        (b'{"prompt": "p", "chosen": [{"role": "x"}]}', "turns", "turn 1 of chosen has the role 'x'"),
    ],
)
def test_a_record_that_is_no_row_keeps_its_text_and_says_why(
    line: bytes, fault: str, said: str, tmp_path: Path
) -> None:
    first, bad, last = tiny.ingested({"p.jsonl": LINE + b"\n" + line + b"\n" + LINE}, tmp_path)
    assert first["problem"] is None is last["problem"]
    assert first["raw"] is None
    assert (bad["fault"], bad["raw"], bad["line"], bad["kind"]) == (fault, line.decode(), 2, None)
    assert said in bad["problem"]


def test_a_ranking_of_one_answer_stands_for_nothing(tmp_path: Path) -> None:
    (row,) = tiny.ingested({"r.jsonl": [{"prompt": "p", "answers": ["a"], "ranks": [1]}]}, tmp_path, format="rankings")
    assert (row["fault"], row["problem"]) == ("unreadable", "the record holds nothing")


@pytest.mark.parametrize("depth", [200, 500, 900])
def test_a_record_nested_deeply_is_read_or_named(depth: int, tmp_path: Path) -> None:
    deep = b'{"chosen": "c", "rejected": "r", "time": %s, "q": %s}' % ((b"[" * depth + b"]" * depth,) * 2)
    rows = tiny.ingested({"p.jsonl": deep + b"\n" + LINE}, tmp_path, prompt="{q}")
    assert [row["line"] for row in rows] == [1, 2]
    assert rows[0]["problem"] is None or "deep" in rows[0]["problem"] or "recursion" in rows[0]["problem"]


def test_text_files_hold_a_prompt_a_line(tmp_path: Path) -> None:
    rows = tiny.ingested({"p.txt": b"one\n\ntwo \xe9\n"}, tmp_path, format="prompts", columns={"prompt": "text"})
    assert [(row["line"], row["prompt"]) for row in rows] == [(1, "one"), (3, "two é")]


@pytest.mark.parametrize("data", [b"", b"\n \n"])
def test_an_empty_source_is_an_empty_table(data: bytes, tmp_path: Path) -> None:
    assert tiny.ingested({"p.jsonl": data}, tmp_path) == []


def test_half_an_archive_leaves_the_table_of_before(tmp_path: Path) -> None:
    rows = tiny.ingested({"p.jsonl.gz": gzip.compress(LINE)}, tmp_path)
    before = (tmp_path / "rows.parquet").read_bytes()
    with pytest.raises(DataError, match=r"p\.jsonl\.gz"):
        tiny.ingested({"p.jsonl.gz": gzip.compress(LINE * 1000)[:-9]}, tmp_path)
    assert (tmp_path / "rows.parquet").read_bytes() == before
    assert len(rows) == 1
    assert not list(tmp_path.glob("*.partial"))


def test_the_same_source_gives_the_same_bytes_and_names(tmp_path: Path) -> None:
    files = {"p.jsonl": tiny.preference_rows(10)}
    one, two = (tiny.ingested(files, tmp_path / name) for name in ("one", "two"))
    assert (tmp_path / "one/rows.parquet").read_bytes() == (tmp_path / "two/rows.parquet").read_bytes()
    other = tiny.ingested({"q.jsonl": tiny.preference_rows(10)[::-1]}, tmp_path / "three")
    assert {row["row_id"] for row in other} == {row["row_id"] for row in one} == {row["row_id"] for row in two}


@pytest.mark.parametrize(
    ("files", "settings"),
    [
        ({"p.jsonl": LINE + b"\r\n\n{\n" + LINE}, {}),
        ({"p.csv": b'prompt,chosen,rejected\np,"c\nd",r\np,"x"y,r\n'}, {}),
        ({"p.json": b'[{"prompt": "p"}, 3]'}, {}),
        (
            {"t.tsv": b"7\t1\tA text\n8\t2\tMore", "r.tsv": b"7\t1\t0\t[1]\n\n\n9\t1\t1\t[3]"},
            {"format": "rated_sentences"},
        ),
    ],
)
def test_the_raw_text_of_every_row_is_found_again(files: tiny.Files, settings: dict[str, Any], tmp_path: Path) -> None:
    if settings:
        settings |= {"source": {"files": {"texts": "t.tsv", "ratings": "r.tsv"}}, "prompt": "{topic}"}
    rows = tiny.ingested(files, tmp_path, **settings)
    found = dict(raw_texts(tiny.entry(files, **settings), tmp_path / "source"))
    assert list(found) == [(row["file"], row["line"]) for row in rows]
    assert all(found[row["file"], row["line"]] == row["raw"] for row in rows if row["raw"] is not None)


# -- no bytes lose a record --------------------------------------------------------------------------------------

PIECES = st.sampled_from([b"{", b"}", b'"', b",", b"\n", b"\r\n", b"\r", b"[", b"]", b":", b"\x00", b"\xe9", BOM, LINE])
PIECES |= st.sampled_from(
    [b"prompt,chosen,rejected\n", b"p,c,r\n", b'"p","c\nc",r\n', b"\xff", b" ", b"\\ud800", b"\x1a"]
)
SOUP = st.binary(max_size=60) | st.lists(PIECES | st.binary(max_size=4), max_size=25).map(b"".join)
SOUP |= st.lists(st.just(LINE) | st.binary(max_size=8), max_size=8).map(b"\n".join)
# Great Expectations takes some 20 ms a check: here those that find records that are no row, and one more.
FEW = {name: "off" for name, check in CHECKS.items() if not check.unreadable and name != "empty"}


def lines_of(data: bytes) -> list[int]:
    """Numbers of the lines that are not blank."""
    return [number for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), start=1) if line.strip()]


@settings(max_examples=100)
@given(SOUP)
def test_every_line_that_is_not_blank_is_one_row(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = tiny.ingested({"p.jsonl": data}, Path(folder))
    assert [row["line"] for row in rows] == lines_of(data)
    assert len({row["row_id"] for row in rows}) <= len(rows)


@settings(max_examples=60)
@given(SOUP)
def test_every_row_is_valid_or_in_quarantine_once(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            valid, bad, _ = tiny.validated({"p.jsonl": data}, folder, rules={"checks": FEW})
        except DataError as error:
            assert "no row" in str(error)
            valid, bad = [], pq.read_table(folder / "quarantine.parquet").to_pylist()
    assert sorted(row["line"] for row in valid + bad) == lines_of(data)
    text = data.removeprefix(BOM).split(b"\n")
    for row in bad:
        assert row["raw"].encode(row["encoding"]) == text[row["line"] - 1].rstrip(b"\r")


@settings(max_examples=60)
@given(SOUP, st.sampled_from(["p.json", "p.csv", "p.tsv", "p.txt", "p.parquet", "p.jsonl.gz", "p.csv.zst"]))
def test_no_bytes_in_any_file_raise_anything_but_a_named_error(data: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = tiny.ingested({name: data}, Path(folder))
        except PrefloopError as error:
            assert name in str(error)
            return
    places = [row["line"] for row in rows]
    assert places == sorted(set(places))
    assert all(row["raw"] is not None for row in rows if row["problem"])


@settings(max_examples=100)
@given(SOUP)
def test_every_line_of_a_csv_file_stands_in_one_record(soup: bytes) -> None:
    data = b"prompt,chosen\n" + soup
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "p.csv").write_bytes(data)
        found = list(records(File("p", "p.csv", Path(folder) / "p.csv")))
    lines = [decode(line)[0] for line in data.split(b"\n")]
    left = dict(enumerate(lines, start=1))
    for record in found:
        its = [left.pop(record.line + place) for place in range(record.raw.count("\n") + 1)]
        assert "\n".join(its).rstrip("\r\n") == record.raw
    assert [number for number, line in left.items() if line.strip()] == [1]


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=8).map(lambda cell: cell.replace(b"\n", b"").replace(b"\r", b"")), max_size=8))
def test_every_quoted_cell_of_a_csv_file_comes_back(cells: list[bytes]) -> None:
    data = b"prompt,n\n" + b"".join(b'"%s",x\n' % cell.replace(b'"', b'""') for cell in cells)
    with tempfile.TemporaryDirectory() as folder:
        rows = tiny.ingested({"p.csv": data}, Path(folder), format="prompts")
    assert len(rows) == len(cells)
    for row, cell in zip(rows, cells, strict=True):
        said = (row["prompt"] or "").encode(row["encoding"], "replace")
        assert said == cell or b"\0" in cell


# -- rated sentences ---------------------------------------------------------------------------------------------


@pytest.fixture
def rated(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def rated(texts: bytes, ratings: bytes = b"") -> list[dict[str, Any]]:
        tiny.lay({"t.txt": texts, "r.txt": ratings}, tmp_path)
        return list(rated_sentences([File(role, f"{role[0]}.txt", tmp_path / f"{role[0]}.txt") for role in ROLES]))

    return rated


ROLES = ("ratings", "texts")


def test_a_sentence_gets_its_score_and_the_ratings_of_its_id(rated: Callable) -> None:
    rows = rated(b"7\t1.5\tGood one. \n8\t-2\tBad\ttab", b"8\t-2\t0.1\t[-2, -2]\n7\t1.5\t0.5\t[1, 2]\n")
    assert [(row["line"], row["answer"], row["score"], row["ratings"]) for row in rows] == [
        (1, "Good one.", 1.5, [1.0, 2.0]),
        (2, "Bad\ttab", -2.0, [-2.0, -2.0]),
    ]
    assert {(row["kind"], row["file"], row["source"]) for row in rows} == {("rated", "t.txt", "texts")}


@pytest.mark.parametrize("score", [b"", b"much", b"1,5", b"nan", b"inf"])
def test_a_score_that_is_no_number_is_absent(score: bytes, rated: Callable) -> None:
    (row,) = rated(b"7\t" + score + b"\tA text")
    assert (row["score"], row["answer"]) == (None, "A text")


@pytest.mark.parametrize("line", [b"7", b"7\t1.5"])
def test_a_line_cut_short_has_no_answer(line: bytes, rated: Callable) -> None:
    assert rated(line)[0]["answer"] is None


@pytest.mark.parametrize(
    ("line", "ratings"),
    [
        (b"8\t1\t0\t[1]", []),
        (b"7\t1\t0\t[1, x, , nan, inf, 3]", [1.0, 3.0]),
        (b"7", []),
        (b"nothing but words", []),
        (b"7 1 0 [1]", []),
    ],
)
def test_ratings_that_cannot_be_read_are_left_out(line: bytes, ratings: list[float], rated: Callable) -> None:
    rows = rated(b"7\t1\tA text\n9\t2\tAnother", line + b"\n9\t2\t0\t[2]")
    assert [row["ratings"] for row in rows] == [ratings, [2.0]]


TEXTISH = st.lists(st.text('0123456789.,-[]\t \r{}:"aé', max_size=25).map(str.encode), max_size=12).map(b"\n".join)


@given(TEXTISH, TEXTISH)
def test_no_ratings_file_however_broken_loses_a_text(texts: bytes, ratings: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny.lay({"t.txt": texts, "r.txt": ratings}, Path(folder))
        files = [File(role, f"{role[0]}.txt", Path(folder) / f"{role[0]}.txt") for role in ROLES]
        assert [row["line"] for row in rated_sentences(files)] == lines_of(texts)


def test_both_files_must_be_named(tmp_path: Path) -> None:
    files = {"t.txt": b"7\t1\tA"}
    settings = {"format": "rated_sentences", "prompt": "{topic}", "source": {"files": {"texts": "t.txt"}}}
    with pytest.raises(DataError, match=r"needs source\.files\.ratings"):
        tiny.ingested(files, tmp_path, **settings)
