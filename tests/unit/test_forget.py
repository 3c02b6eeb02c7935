"""Forgotten rows: gone from every table whatever made them, ids the only trace, and nothing half done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_data
import yaml

from steps import batches, datasets, entries, forget, versions
from steps.errors import DataError
from steps.split import COLUMNS, split

REGISTRY = """\
# Ours.
datasets:
  first:
    format: hh   # as published
    source:
      files:
        one: one.jsonl  # the first
    # about the split
    split: {seed: 1}
  second: {format: labels, source: {files: {a: a.csv}}}
"""
NUMBERLIKE = ["0000000000000012", "1234567890123456", "12345e7890123456", "00000000000001e5"]


# -- the registry ------------------------------------------------------------------------------------------------


def test_ids_go_to_the_end_of_an_entry_and_are_read_back_as_text() -> None:
    once = entries.with_forgotten(REGISTRY, "first", NUMBERLIKE[:1])
    block = '    forgotten:\n      - "0000000000000012"\n'
    assert once == REGISTRY.replace("    split: {seed: 1}\n", "    split: {seed: 1}\n" + block)
    twice = entries.with_forgotten(once, "first", NUMBERLIKE[1:])
    assert yaml.safe_load(twice)["datasets"]["first"]["forgotten"] == NUMBERLIKE
    assert twice.startswith(once.partition("  second")[0])
    flow = entries.with_forgotten(REGISTRY, "second", NUMBERLIKE[:1])
    flow = entries.with_forgotten(flow, "second", NUMBERLIKE[1:])
    assert yaml.safe_load(flow)["datasets"]["second"]["forgotten"] == NUMBERLIKE
    assert flow.partition("  second")[0] == REGISTRY.partition("  second")[0]


# -- the stages --------------------------------------------------------------------------------------------------

RANKED = [
    {"prompt": "which?", "answers": ["a first one", "a second one", "a third one"], "ranks": [1, 2, 3]},
    {"prompt": "what?", "answers": ["some other", "yet another"], "ranks": [1, 2]},
]


def test_all_rows_of_a_ranking_go_with_one_of_them(tmp_path: Path) -> None:
    files: tiny.Files = {"ranks.jsonl": RANKED}
    rows = tiny.ingested(files, tmp_path / "before", format="rankings")
    assert [row["part"] for row in rows] == [0, 1, 2, 0]
    kept = tiny.ingested(files, tmp_path / "after", format="rankings", forgotten=[rows[1]["row_id"]])
    assert kept == rows[3:]  # with the line they always had


def test_a_sentence_with_ratings_and_a_record_that_cannot_be_read_are_forgotten_too(tmp_path: Path) -> None:
    texts = "1\t0.5\tnever say this\n2\t1.0\tsay that\n"
    files: tiny.Files = {"texts": texts.encode(), "ratings": b"1\t0.5\t0\t[0, 1]\n2\t1.0\t0\t[1, 1]\n"}
    rated = {"format": "rated_sentences", "prompt": "{topic}"}
    rated["source"] = {"files": {"texts": "texts", "ratings": "ratings"}}
    rows = tiny.ingested(files, tmp_path / "before", **rated)
    kept = tiny.ingested(files, tmp_path / "after", **rated, forgotten=[rows[0]["row_id"]])
    assert [row["answer"] for row in kept] == ["say that"]
    broken: tiny.Files = {"a.jsonl": b'{"prompt": secret\n'}
    (row,) = tiny.ingested(broken, tmp_path / "broken")
    assert row["problem"] and tiny.ingested(broken, tmp_path / "mended", forgotten=[row["row_id"]]) == []


def test_no_table_says_a_word_of_it(tmp_path: Path) -> None:
    secrets = [
        {"prompt": "who was it? ", "chosen": "secret Alice of the mill", "rejected": "secret Bob of the inn"},
        {"prompt": "", "chosen": "secret without a prompt", "rejected": "secret, and set aside"},
    ]
    files: tiny.Files = {"pairs.jsonl": [*tiny_data.rows(30), *secrets]}
    valid, bad, _ = tiny.validated(files, tmp_path / "before")
    ids = [row["row_id"] for row in [*valid, *bad] if "secret" in (row["chosen"] or "")]
    assert len(ids) == 2 and len(bad) == 1
    here = tmp_path / "after"
    tiny.validated(files, here, forgotten=ids)
    parts = split(pd.read_parquet(here / "valid.parquet", columns=COLUMNS), tiny.entry(files))
    for name, part in parts.items():
        datasets.write_table(part, here / f"{name}.parquet")
    tables = [here / f"{name}.parquet" for name in forget.TABLES]
    said = " ".join(str(pq.read_table(path).to_pylist()) for path in tables)
    assert "likes" in said and "secret" not in said
    assert "secret" not in (here / "validation.json").read_text() + (here / "validation.html").read_text()
    assert not any(forget.holds(path, ids) for path in tables)
    assert forget.holds(tmp_path / "before/valid.parquet", ids) == {valid[-1]["row_id"]}


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared and committed project, also pushed; copy it before you write."""
    root = tiny_data.make_project(tmp_path_factory.mktemp("prepared") / "project")
    tiny_data.dvc(root, "push", "-q")
    return root


@pytest.fixture
def project(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "project", symlinks=True))


def rows_of(root: Path) -> list[dict]:
    return pq.read_table(root / "data/tiny/rows.parquet").to_pylist()


def test_forgetting_makes_a_version_and_says_what_is_left_and_how_to_purge_it(project: Path) -> None:
    row = rows_of(project)[3]
    gone = [row["row_id"]]
    said = tiny_data.data(project, "forget", "tiny", *gone, "--because", "she asked us to")
    assert [line.split() for line in said.splitlines() if line.startswith("rows read")] == [
        ["rows", "read", "60", "59", "-1"]
    ]
    assert "pairs.jsonl, line 4: a batch is not changed, also in git's history" in said
    assert "no model and no run that is known of was given them" in said
    assert max(map(len, said.partition("not removed")[0].splitlines())) <= 100
    assert "data/tiny/forgotten.jsonl" in said.partition("git add ")[2]

    # The stages had only the registry to go by, and nothing that git keeps has a word of the row.
    assert datasets.dataset("tiny", project).forgotten == gone
    record = project / "data/tiny/forgotten.jsonl"
    (line,) = map(json.loads, record.read_text().splitlines())
    assert (line["row_id"], line["by"], line["because"]) == (*gone, "Ada <ada@example.org>", "she asked us to")
    kept = [path.read_text() for path in (project / "data/datasets.yaml", record, project / "dvc.lock")]
    assert not any(row[side] in text for text in kept for side in ("prompt", "chosen", "rejected"))

    # The commands it prints, and they alone, remove the earlier versions: from here and from the remote.
    held = [project / ".dvc/cache", project / "var/dvc-remote"]
    assert all(with_rows(folder, gone) for folder in held)
    tiny_data.git(project, "add", "-A")
    tiny_data.git(project, "commit", "-qm", "forgotten")
    commands = [line.split() for line in said.splitlines() if line.strip().startswith("dvc gc")]
    assert len(commands) == 1
    tiny_data.dvc(project, *commands[0][1:])
    assert not any(with_rows(folder, gone) for folder in held)
    assert versions.cached(list(versions.outputs("tiny", project).values()), project)

    # Asked again, nothing is done; in a batch of its own, the record is known.
    said = tiny_data.data(project, "forget", "tiny", *gone, "--because", "she asked again")
    assert said.splitlines() == [f"{gone[0]} was forgotten before", "nothing has changed"]
    again = [{name: row[name] for name in ("prompt", "chosen", "rejected")}, *tiny_data.rows(2, "new ")]
    tiny.write_rows(again, project / "data/tiny/source/again.jsonl")
    assert batches._forgotten("tiny", project, ["again.jsonl"]) == 1


def with_rows(folder: Path, ids: list[str]) -> list[Path]:
    """Files below a folder that are tables and name one of the rows."""
    tables = [path for path in folder.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"PAR1"]
    return [path for path in tables if forget.holds(path, ids)]


def test_what_cannot_be_forgotten_changes_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny_data.contents(project)
    known = rows_of(project)[0]["row_id"]
    said = tiny_data.refused(project, "forget", "tiny", known, "0123456789abcdef", "--because", "she asked")
    assert said.startswith("nothing was forgotten in 'tiny': 'tiny' has no row 0123456789abcdef")
    assert "16 hex digits" in tiny_data.refused(project, "forget", "tiny", "line 4", "--because", "she asked")
    assert "needs a reason" in tiny_data.refused(project, "forget", "tiny", known, "--because", " ")
    assert "no dataset 'tini'" in tiny_data.refused(project, "forget", "tini", known, "--because", "she asked")
    monkeypatch.setattr(versions, "prepare", fails)
    with pytest.raises(DataError, match="nothing was forgotten in 'tiny': a stage failed"):
        forget.forget("tiny", [known], project, "she asked")
    assert tiny_data.contents(project) == before


def fails(name: str, root: Path) -> None:
    assert datasets.dataset(name, root).forgotten  # it was there when the stages began
    (root / "dvc.lock").write_text("cut short")
    raise DataError("a stage failed")


def test_rows_that_hold_the_same_answer_are_named(tmp_path: Path) -> None:
    pairs = [
        {"prompt": "a", "chosen": "the same words", "rejected": "one thing"},
        {"prompt": "b", "chosen": "another thing", "rejected": "The  same WORDS."},
        {"prompt": "c", "chosen": "nothing of it", "rejected": "nor of this"},
    ]
    rows = tiny.ingested({"pairs.jsonl": pairs}, tmp_path)
    assert forget._alike(tmp_path, {rows[0]["row_id"]}) == [rows[1]["row_id"]]
    assert forget._alike(tmp_path, {rows[2]["row_id"]}) == []


# -- who learned from it -----------------------------------------------------------------------------------------


def test_a_model_that_was_given_the_row_is_named_with_what_trains_it_again(finished: Path) -> None:
    trained = pq.read_table(finished / "data/tiny/demonstrations.parquet")["row_id"].to_pylist()[0]
    judged = pq.read_table(finished / "data/tiny/gold.parquet")["row_id"].to_pylist()
    (model,), unknown = forget._learners([trained], finished)
    assert (model.model, model.aliases, model.learnt, unknown) == ("models:/tiny/1", ["champion"], "yes", [])
    assert len(model.because) == 1 and model.because[0].endswith("tiny/demonstrations: trained on")
    assert model.command == f"prefloop run var/runs/{model.run}/recipe.yaml"
    for row in judged[:1]:
        assert [one.learnt for one in forget._learners([row], finished)[0]] == ["no"]
