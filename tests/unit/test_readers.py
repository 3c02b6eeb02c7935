"""Files into records: every one of them, with its line, its text and what kept it from being read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps import readers
from steps.datasets import Source
from steps.errors import DataError
from steps.readers import Record, decode, hub_records, records
from steps.sources import File

BOM = b"\xef\xbb\xbf"
VALUES = [{"prompt": "p é", "chosen": "1"}, {"prompt": "q 🙂", "chosen": "2"}]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(values: list[dict]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(values), stream)
    return stream.getvalue()


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Record]]:
    def read(name: str, data: bytes) -> list[Record]:
        (tmp_path / name).write_bytes(data)
        return list(records(File("pairs", name, tmp_path / name)))

    return read


def lines(found: list[Record]) -> list[tuple[int, object]]:
    return [(record.line, record.value) for record in found]


# -- every container, packed or not ------------------------------------------------------------------------------

CONTAINERS = {
    "p.jsonl": "\n".join(map(json.dumps, VALUES)).encode(),
    "p.ndjson": "\n".join(map(json.dumps, VALUES)).encode(),
    "p.json": json.dumps(VALUES).encode(),
    "p.csv": "prompt,chosen\np é,1\nq 🙂,2\n".encode(),
    "p.tsv": "prompt\tchosen\np é\t1\nq 🙂\t2\n".encode(),
    "p.parquet": parquet(VALUES),
}
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".GZ": gzip.compress}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_is_read_the_same_packed_or_not(name: str, packing: str, read: Callable) -> None:
    found = read(name + packing, PACKED[packing](CONTAINERS[name]))
    assert [record.value for record in found] == VALUES
    assert [record.problem for record in found] == [None, None]


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.json"])
def test_an_empty_file_holds_no_records(name: str, read: Callable) -> None:
    assert read(name, b"") == read(name, b" \n\n") == []


@pytest.mark.parametrize("name", ["p.xlsx", "p", "p.gz", "p.jsonl.zip"])
def test_a_file_of_an_unknown_kind_is_named_with_those_known(name: str, read: Callable) -> None:
    with pytest.raises(DataError, match="a kind that is not known") as caught:
        read(name, b"{}")
    assert name in str(caught.value)
    assert ".jsonl" in str(caught.value)


@pytest.mark.parametrize("name", CONTAINERS)
def test_half_an_archive_is_an_error_that_names_it(name: str, read: Callable) -> None:
    whole = gzip.compress(CONTAINERS[name] + b"\n" * 100_000)
    with pytest.raises(DataError, match="cannot be read") as caught:
        read(f"{name}.gz", whole[:-30])
    assert f"{name}.gz" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"PAR1", CONTAINERS["p.parquet"][:-20], b"words"])
def test_half_a_parquet_file_is_an_error_that_names_it(data: bytes, read: Callable) -> None:
    with pytest.raises(DataError, match=r"p\.parquet"):
        read("p.parquet", data)


# -- lines -------------------------------------------------------------------------------------------------------


def test_lines_are_numbered_as_an_editor_numbers_them(read: Callable) -> None:
    assert lines(read("p.jsonl", b"1\n\n2\n   \n\t\r\n3")) == [(1, 1), (3, 2), (6, 3)]


def test_a_byte_order_mark_and_carriage_returns_are_dropped(read: Callable) -> None:
    found = read("p.jsonl", BOM + b"1\r\n2\r\n\r\n")
    assert [(record.line, record.raw) for record in found] == [(1, "1"), (2, "2")]


def test_a_last_newline_makes_no_record(read: Callable) -> None:
    assert lines(read("p.jsonl", b"1\n")) == lines(read("p.jsonl", b"1")) == [(1, 1)]


def test_each_line_has_an_encoding_of_its_own(read: Callable) -> None:
    found = read("p.jsonl", "“é”".encode() + b'\n"caf\xe9 \x93so\x94"\n' + b'"\x81\xe9"')
    assert [(record.raw, record.encoding) for record in found] == [
        ("“é”", "utf-8"),
        ('"café “so”"', "cp1252"),
        ('"\x81é"', "latin-1"),
    ]


@given(st.binary())
def test_any_bytes_decode_and_go_back(line: bytes) -> None:
    text, encoding = decode(line)
    assert text.encode(encoding) == line


@pytest.mark.parametrize(
    "line", [b"{", b'{"a": 1,}', b"words", b"[" * 100_000, b"{'a': 1}", b'"\x00', b"1" * 5000, b'{"a": 1} {"a": 2}']
)
def test_a_line_that_is_not_json_keeps_its_text_and_says_why(line: bytes, read: Callable) -> None:
    good, bad, last = read("p.jsonl", b"1\n" + line + b"\n3")
    assert (good.value, last.value) == (1, 3)
    assert (bad.line, bad.value, bad.raw) == (2, None, line.decode())
    assert bad.problem.startswith("not JSON (")


@pytest.mark.parametrize("start", [b"", BOM])
@pytest.mark.parametrize("blank", [False, True])
def test_a_line_that_is_too_long_is_one_record_and_leaves_the_next_alone(
    start: bytes, blank: bool, read: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 64)
    monkeypatch.setattr(readers, "KEPT_OF_IT", 10)
    long = b" " * 300 if blank else b'"' + b"x" * 300 + b'"'
    found = read("p.jsonl", start + long + b"\n2\n" + long)
    assert [record.line for record in found] == [1, 2, 3]
    assert found[1].value == 2
    for record in (found[0], found[2]):
        assert record.value is None
        assert record.raw == long[:10].decode()
        assert "the line is longer than" in record.problem


@pytest.mark.parametrize("length", [63, 64])
def test_a_line_as_long_as_may_be_is_read(length: int, read: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 64)
    line = b'"' + b"x" * (length - 3) + b'"\n'
    assert len(line) == length
    assert [record.problem for record in read("p.jsonl", line + line)] == [None, None]


# -- JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('{"version": 1, "data": [{"a": 1}, {"a": 2}]}', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}', [{"a": 1}]),
        ('{"a": 1, "tags": []}', [{"a": 1, "tags": []}]),
        ('{"a": 1, "tags": ["x", "y"]}', [{"a": 1, "tags": ["x", "y"]}]),
        ('{"a": [{"b": 1}], "c": [{"d": 1}]}', [{"a": [{"b": 1}], "c": [{"d": 1}]}]),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("[]", []),
        ("3", [3]),
        ('[1, null, "x"]', [1, None, "x"]),
    ],
)
def test_a_json_file_is_an_array_an_object_around_one_or_json_lines(
    text: str, values: list[object], read: Callable
) -> None:
    assert [record.value for record in read("p.json", text.encode())] == values
    assert [record.value for record in read("p.json", BOM + text.encode())] == values


def test_json_lines_in_a_json_file_keep_their_lines(read: Callable) -> None:
    found = read("p.json", b'{"a": 1}\n\n{"a": \n{"a": 3}')
    assert [(record.line, record.value) for record in found] == [(1, {"a": 1}), (3, None), (4, {"a": 3})]
    assert found[1].raw == '{"a": '


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a"', "words", "[1 2]", '[{"a": 1}]]'])
def test_a_broken_array_is_one_record_that_could_not_be_read(text: str, read: Callable) -> None:
    (only,) = read("p.json", text.encode())
    assert (only.line, only.value, only.raw) == (1, None, text)
    assert only.problem.startswith("not JSON (")


def test_elements_are_numbered_and_kept_as_json(read: Callable) -> None:
    found = read("p.json", '[{"a": "é"}, {"a": "\\ud800"}]'.encode())
    assert [(record.line, record.raw) for record in found] == [(1, '{"a": "é"}'), (2, '{"a": "\\ud800"}')]


# -- CSV ---------------------------------------------------------------------------------------------------------


def test_a_cell_may_hold_lines_commas_and_quotes(read: Callable) -> None:
    found = read("p.csv", b'a,b\r\n"one\nline, and ""more""",2\r\n\r\n3,4')
    assert lines(found) == [(2, {"a": 'one\nline, and "more"', "b": "2"}), (5, {"a": "3", "b": "4"})]
    assert found[0].raw == '"one\nline, and ""more""",2'


def test_an_empty_cell_is_a_missing_value(read: Callable) -> None:
    assert read("p.csv", b"a,b,c\n1,,\n")[0].value == {"a": "1", "b": None, "c": None}


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_cells_with_another_mark_between_them_are_a_problem_that_says_so(mark: str, read: Callable) -> None:
    rows = read("p.csv", f"prompt{mark}chosen{mark}rejected\na{mark}b, c{mark}d\n".encode())
    assert [row.problem for row in rows] == [f"{mark!r} stands between cells, where ',' should"]


def test_a_byte_order_mark_is_no_part_of_the_header(read: Callable) -> None:
    assert read("p.csv", BOM + b" a ,b\n1,2")[0].value == {"a": "1", "b": "2"}


def test_a_row_in_windows_1252_is_read_as_that(read: Callable) -> None:
    found = read("p.csv", b"a\n\x93caf\xe9\x94\n" + "é\n".encode() + b"x\n")
    assert [(record.value["a"], record.encoding) for record in found] == [
        ("“café”", "cp1252"),
        ("é", "utf-8"),
        ("x", "utf-8"),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b"1,2,3", "3 cells where the header has 2"),
        (b"1", "1 cells where the header has 2"),
        (b'1,"x"y', "not CSV"),
        (b"1,x\ry", "not CSV"),
        ('1,"é"y'.encode("cp1252"), "not CSV"),
    ],
)
def test_a_row_that_cannot_be_read_keeps_its_text_and_its_neighbours(row: bytes, said: str, read: Callable) -> None:
    found = read("p.csv", b"a,b\n1,2\n" + row + b"\n3,4\n")
    assert [record.line for record in found] == [2, 3, 4]
    assert said in found[1].problem
    assert found[1].raw == decode(row)[0]
    assert found[1].encoding == decode(row)[1]
    assert found[2].value == {"a": "3", "b": "4"}
    assert found[2].encoding == "utf-8"


@pytest.mark.parametrize("row", [b'1,"open', b'"open,1', b'1,"'])
def test_a_quote_nobody_closes_is_a_problem_and_swallows_nothing_unseen(row: bytes, read: Callable) -> None:
    found = read("p.csv", b"a,b\n1,2\n" + row + b"\n3,4\n5,6\n")
    assert [record.line for record in found] == [2, 3]
    assert "not CSV" in found[1].problem
    assert found[1].raw == row.decode() + "\n3,4\n5,6"


def test_a_nul_is_shown_and_kept(read: Callable) -> None:
    (only,) = read("p.csv", b"a,b\nx\x00y,2\n")
    assert only.value == {"a": "x\ufffdy", "b": "2"}
    assert only.raw == "x\x00y,2"


def test_a_tab_is_a_cell_of_its_own_only_where_tabs_separate(read: Callable) -> None:
    assert read("p.tsv", b"a\tb\n1,2\t3\n")[0].value == {"a": "1,2", "b": "3"}
    assert read("p.csv", b"a,b\n1\t2,3\n")[0].value == {"a": "1\t2", "b": "3"}


# -- Parquet and the hub -----------------------------------------------------------------------------------------


def test_rows_of_a_parquet_file_are_numbered_and_kept_as_json(read: Callable) -> None:
    found = read("p.parquet", parquet([{"a": "é", "b": [1, None]}, {"a": None, "b": []}]))
    assert [(record.line, record.raw) for record in found] == [
        (1, '{"a": "é", "b": [1, null]}'),
        (2, '{"a": null, "b": []}'),
    ]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set" / "data").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("data/train-00000-of-00001.parquet", parquet(VALUES)),
        ("train.jsonl", CONTAINERS["p.jsonl"]),
    ],
)
def test_a_folder_laid_out_as_on_the_hub_is_read(name: str, data: bytes, hub: Path) -> None:
    (hub / "set" / name).write_bytes(data)
    found = list(hub_records(Source(hub="set"), hub))
    assert lines(found) == [(1, VALUES[0]), (2, VALUES[1])]
    assert json.loads(found[1].raw) == VALUES[1]


def test_the_split_is_the_one_that_is_asked_for(hub: Path) -> None:
    for part, value in (("train", VALUES[0]), ("test", VALUES[1])):
        (hub / "set" / "data" / f"{part}-00000-of-00001.parquet").write_bytes(parquet([value]))
    assert [record.value for record in hub_records(Source(hub="set", split="test"), hub)] == [VALUES[1]]


@pytest.mark.parametrize(
    "source",
    [{"hub": "set"}, {"hub": "nobody/nothing", "revision": "0" * 40}, {"hub": "set", "split": "nowhere"}],
)
def test_a_hub_dataset_that_cannot_be_loaded_is_named(source: dict[str, str], hub: Path) -> None:
    if "split" in source:
        (hub / "set" / "train.jsonl").write_bytes(CONTAINERS["p.jsonl"])
    with pytest.raises(DataError, match="a hub dataset cannot be loaded") as caught:
        list(hub_records(Source(**source), hub))
    assert source["hub"] in str(caught.value)


def test_a_hub_dataset_without_a_revision_is_refused(hub: Path) -> None:
    with pytest.raises(DataError, match="needs its revision") as caught:
        list(hub_records(Source(hub="nobody/nothing"), hub))
    assert "nobody/nothing" in str(caught.value)


def test_a_pinned_revision_of_a_local_folder_is_read(hub: Path) -> None:
    (hub / "set" / "train.jsonl").write_bytes(CONTAINERS["p.jsonl"])
    assert [record.value for record in hub_records(Source(hub="set", revision="a" * 40), hub)] == VALUES


def broken_text(data: bytes, offsets: list[int]) -> pa.Array:
    """Texts of which not all are UTF-8, as careless writers leave them."""
    buffers = pa.py_buffer(np.array(offsets, dtype=np.int32)), pa.py_buffer(data)
    return pa.StringArray.from_buffers(len(offsets) - 1, *buffers)


def written(**columns: pa.Array) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def test_a_text_of_a_table_that_is_not_utf8_is_decoded_like_any_other(read: Callable) -> None:
    data = written(a=broken_text("é".encode() + b"caf\xe9x", [0, 2, 6, 7]))
    found = read("p.parquet", data)
    assert [(record.value, record.encoding) for record in found] == [
        ({"a": "é"}, "utf-8"),
        ({"a": "café"}, "cp1252"),
        ({"a": "x"}, "utf-8"),
    ]


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([2**53, 1], pa.timestamp("ms")),
        pa.array([2**31 - 1, 1], pa.int32()).cast(pa.date32()),
        pa.ListArray.from_arrays([0, 1, 2], broken_text(b"\xffx", [0, 1, 2])),
    ],
    ids=["timestamp", "date", "nested"],
)
def test_a_cell_of_a_table_without_a_value_is_a_problem_of_its_row_alone(cells: pa.Array, read: Callable) -> None:
    bad, good = read("p.parquet", written(a=pa.array(["x", "y"]), b=cells))
    assert (bad.line, bad.value, bad.raw) == (1, None, '{"a": "x", "b": null}')
    assert "b cannot be read" in bad.problem
    assert (good.line, good.value["a"], good.problem) == (2, "y", None)


def test_a_column_that_stands_twice_is_an_error_or_a_problem_and_not_dropped(read: Callable) -> None:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), stream)
    with pytest.raises(DataError, match=r"p\.parquet") as caught:
        read("p.parquet", stream.getvalue())
    assert "'a' stands there twice" in str(caught.value)
    found = read("p.csv", b"a,b,a,,\n1,2,3,,\n")
    assert [(record.line, record.value, record.raw) for record in found] == [(2, None, "1,2,3,,")]
    assert found[0].problem == "the header names 'a' twice"


def test_a_long_table_is_numbered_through(read: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH", 3)
    values = [{"a": str(n)} for n in range(10)]
    assert lines(read("p.parquet", parquet(values))) == list(enumerate(values, start=1))


@pytest.mark.parametrize("quote", [b"", b'"'])
def test_a_line_of_a_csv_file_that_is_too_long_leaves_the_next_alone(
    quote: bytes, read: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 64)
    monkeypatch.setattr(readers, "KEPT_OF_IT", 10)
    long = quote + b"x" * 300 + quote + b",2"
    found = read("p.csv", b"a,b\n1,2\n" + long + b"\n3,4\n" + long)
    assert [(record.line, record.value) for record in found] == [
        (2, {"a": "1", "b": "2"}),
        (3, None),
        (4, {"a": "3", "b": "4"}),
        (5, None),
    ]
    assert found[1].raw == long[:10].decode()
    assert "the line is longer than" in found[1].problem


@pytest.mark.parametrize(
    "record",
    [{"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a", "answers": [{"text": "b"}, {"text": "c"}]}],
)
def test_a_single_record_with_turns_or_answers_is_no_wrapper(tmp_path: Path, record: dict) -> None:
    (tmp_path / "one.json").write_text(json.dumps(record))
    assert [found.value for found in records(File("one", "one.json", tmp_path / "one.json"))] == [record]


@pytest.mark.parametrize("second", ["y", None, [1], "é 🙂"])
@pytest.mark.parametrize("nest", [lambda inner: inner, lambda inner: {"a": [inner]}])
def test_a_field_that_stands_twice_is_a_problem_and_not_dropped(nest: Callable, second: object, read: Callable) -> None:
    twice = json.dumps(nest({"chosen": "x"}), ensure_ascii=False).replace('"x"', f'"x", "chosen": {json.dumps(second)}')
    good = json.dumps({"chosen": "z"})
    for name, text in (("p.jsonl", f"{good}\n{twice}\n{good}"), ("p.json", f" [{good},\n {twice} , {good} ]\n")):
        found = read(name, text.encode())
        assert [record.line for record in found] == [1, 2, 3]
        assert [record.value for record in (found[0], found[2])] == [{"chosen": "z"}] * 2
        assert (found[1].value, found[1].raw) == (None, twice)
        assert "the field 'chosen' stands there twice" in (found[1].problem or "")


def test_a_field_that_says_the_same_twice_loses_nothing(read: Callable) -> None:
    assert [record.value for record in read("p.jsonl", b'{"a": 1, "a": 1}')] == [{"a": 1}]


def test_json_lines_in_a_json_file_of_which_one_names_a_field_twice(read: Callable) -> None:
    found = read("p.json", b'{"a": 1, "a": 2}\n{"a": 3}\n')
    assert [(record.line, record.value) for record in found] == [(1, None), (2, {"a": 3})]
