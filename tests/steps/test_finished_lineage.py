"""The lineage of a pipeline that really ran: complete, and in numbers what its steps say themselves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from steps import lineage, row_lineage, tracking
from steps.lineage import Lineage
from steps.paths import Var
from steps.row_lineage import MEASURED, TRAINED
from steps.tracking import Record


@pytest.fixture(scope="module")
def found(finished: Path) -> Lineage:
    return lineage.trace("tiny@champion", finished, tracking.forwarder(Var(finished)))


def run_folder(finished: Path) -> Path:
    (folder,) = (finished / "var/runs").iterdir()
    return folder


def test_nothing_is_missing_and_nothing_contradicts(found: Lineage) -> None:
    assert found.unknown == [] and found.contradictions == []
    assert found.node("file.pairs.jsonl").facts["now"] == "here"


def test_a_run_leaves_its_lineage_and_packages(finished: Path, found: Lineage) -> None:
    folder = run_folder(finished)
    left = json.loads((folder / "lineage.json").read_text())
    assert left["edges"] == found.to_json()["edges"] and left["unknown"] == []
    assert (folder / "lineage.svg").read_text().startswith("<svg")
    forwarder = tracking.forwarder(Var(finished))
    run_id = str(forwarder.run_id(folder))
    for file in ("lineage.json", "lineage.svg", "packages.txt", "recipe.yaml"):
        assert tracking.read_artifact(forwarder.client, run_id, file) == (folder / file).read_text()


def test_every_step_has_its_processor_time(found: Lineage) -> None:
    assert all(cost.cpu is not None and cost.cpu >= 0 for cost in found.costs)
    assert sum(cost.cpu or 0 for cost in found.costs) > 0.1


@pytest.mark.parametrize(
    ("step", "table", "fact", "use"),
    [
        ("sft", "demonstrations", "rows", TRAINED),
        ("reward", "preferences", "pairs", TRAINED),
        ("reward", "preferences", "held_out", MEASURED),
        ("policy", "preferences", "pairs", TRAINED),
        ("policy", "preferences", "held_out", MEASURED),
        ("evaluate", "prompts", "prompts", MEASURED),
        ("baseline", "prompts", "prompts", MEASURED),
    ],
)
def test_a_step_used_as_many_rows_as_it_says(
    finished: Path, found: Lineage, step: str, table: str, fact: str, use: str
) -> None:
    facts = found.node(f"step.{step}").facts
    record: Record = tracking.record_of(finished / "var/store" / f"{step}-{facts['key']}")  # type: ignore[assignment]
    frame = pd.read_parquet(finished / "data/tiny" / f"{table}.parquet")
    assert Counter(row_lineage.used(step, table, frame, record.params))[use] == facts["facts"][fact]


def test_a_real_row_is_followed_into_the_model(finished: Path) -> None:
    row = pd.read_parquet(finished / "data/tiny/demonstrations.parquet")["row_id"][0]
    seen = row_lineage.trace(finished, tracking.forwarder(Var(finished)), rows=[row])
    assert [(model.model, model.learnt) for model in seen.models] == [("models:/tiny/1", "yes")]
    assert {step.step for step in seen.steps} == {"sft"}
