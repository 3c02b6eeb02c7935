"""What adding a batch decides before a stage runs, and what export writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from steps import batches, datasets
from steps.errors import DataError


def project(root: Path, files: tiny.Files, entry: dict) -> Path:
    tiny.lay(files, root / "data/mine/source")
    registry = {"datasets": {"mine": {"format": "preferences", **entry}}}
    (root / "data/datasets.yaml").write_text(json.dumps(registry))
    return root


@pytest.mark.parametrize(
    ("where", "file", "covered"),
    [
        ("a.jsonl", "a.jsonl", True),
        ("a.jsonl", "b.jsonl", False),
        ("*.jsonl", "b.jsonl", True),
        ("*.csv", "b.jsonl", False),
        (".", "b.jsonl", True),
        ("part", "part/b.jsonl", True),
        ("part", "b.jsonl", False),
        ("http://example.org/*.jsonl", "b.jsonl", False),
    ],
)
def test_a_batch_is_registered_only_where_the_entry_does_not_take_it_in(
    tmp_path: Path, where: str, file: str, covered: bool
) -> None:
    files: tiny.Files = {"part/other.jsonl": [], file: []}
    root = project(tmp_path, files, {"source": {"files": {"one": where}}})
    source = root / "data/mine/source"
    assert batches._covers(datasets.dataset("mine", root), source / file, source) is covered


def test_roles_are_told_apart() -> None:
    assert batches._role("a b.jsonl.gz", set()) == "a-b"
    assert batches._role("a.jsonl", {"a", "a-2"}) == "a-3"
    assert batches._role("é.jsonl", set()) == "batch"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"source": {"hub": "someone/something"}}, "fetched from someone/something"),
        ({"format": "rated_sentences", "prompt": "{topic}", "source": {"files": {"a": "a"}}}, "joins two files"),
    ],
)
def test_a_source_that_is_not_files_takes_none(tmp_path: Path, entry: dict, said: str) -> None:
    root = project(tmp_path, {"a": b""}, entry)
    with pytest.raises(DataError, match=said):
        batches.add("mine", [root / "data/datasets.yaml"], root)
    assert [path.name for path in (root / "data/mine").iterdir()] == ["source"]


def test_names_are_checked_before_anything_is_touched(tmp_path: Path) -> None:
    root = project(tmp_path, {"a.jsonl": []}, {"source": {"files": {"one": "a.jsonl"}}})
    batch = tiny.write_rows([], root / "b.jsonl")
    with pytest.raises(DataError, match="cannot be a dataset's name"):
        batches.add("../mine", [batch], root, format="hh")
    with pytest.raises(DataError, match="has the format preferences, not hh"):
        batches.add("mine", [batch], root, format="hh")


def test_bad_cells_of_a_table_are_exported_under_their_header(tmp_path: Path) -> None:
    table = 'prompt,chosen,rejected\n"a, b",good one,bad one\nq,,"no, not ""this"""\nq2,x\n'
    files: tiny.Files = {"a.csv": table.encode(), "b.jsonl": b'{"prompt": "p"\n'}
    tiny.validated(files, tmp_path / "data/mine")
    entry = {"source": {"files": {"role0": "a.csv", "role1": "b.jsonl"}}}
    root = project(tmp_path, files, entry)
    out = tmp_path / "bad.jsonl"
    assert batches.export("mine", root, out) == 3
    lines = out.read_text().splitlines()
    assert json.loads(lines[0]) == {"prompt": "q", "chosen": None, "rejected": 'no, not "this"'}
    assert lines[1:] == ["q2,x", '{"prompt": "p"']
    with pytest.raises(DataError, match="there already"):
        batches.export("mine", root, out)


def test_a_broken_line_of_the_record_is_named(tmp_path: Path) -> None:
    root = project(tmp_path, {"a.jsonl": []}, {"source": {"files": {"one": "a.jsonl"}}})
    (root / "data/mine/batches.jsonl").write_text('{"file": "a.jsonl"}\nbroken\n')
    with pytest.raises(DataError, match=r"batches\.jsonl line 2"):
        batches.records("mine", root)
