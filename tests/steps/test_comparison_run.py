"""A comparison without an orchestrator: interrupted, and started again."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from steps.comparison import variants
from steps.comparison_run import ComparisonRun
from steps.config import load
from steps.errors import Interrupted
from steps.experiment import Experiment


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))


def test_an_interrupted_comparison_goes_on_where_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(root / "recipes/tiny.yaml", ["policy.best_of_n.n=2"])
    planned = variants(recipe, ["dpo", "best-of-n"], [0.5], 1)
    honest = Experiment.run

    def stopped(self: Experiment, name: str) -> Any:
        if self.recipe.policy.method == "best_of_n":
            raise Interrupted("stopped")
        return honest(self, name)

    monkeypatch.setattr(Experiment, "run", stopped)
    first = ComparisonRun(recipe, planned, root, Console(quiet=True), {})
    first.run(planned[0])
    with pytest.raises(Interrupted):
        first.run(planned[1])
    assert [json.loads(line) for line in (first.folder / "journal.jsonl").read_text().splitlines()][-1]["op"] == "end"

    monkeypatch.setattr(Experiment, "run", honest)
    told = io.StringIO()
    again = ComparisonRun(recipe, planned, root, Console(file=told, width=100), {})
    for variant in planned:
        again.run(variant)
    before_best_of_n = told.getvalue().partition("best_of_n")[0]
    assert "done" not in before_best_of_n
    assert before_best_of_n.count("reused") == 6
    page = again.finish().read_text()
    assert [row["setting"] for row in again.rows] == ["β=0.5", "n=1", "n=2"]
    assert all(sentence.split(",")[0] in page for sentence in again.said)
    tuned, *of_n = again.rows
    assert tuned["peak_mib"] > 100 and tuned["tuning"] > 0 and 0 <= tuned["accuracy"] <= 1
    assert tuned["chosen"] is not None and "chosen" not in of_n[0]
    table = told.getvalue().partition("\nmethod ")[2].splitlines()
    assert table[1].startswith("best_of_n n=1 ") and table[3].startswith("dpo β=0.5 ")
    assert max(map(len, table[:4])) <= 100


def test_data_is_prepared_and_the_start_asked_once_for_all(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steps import batches

    prepared, told, honest = [], io.StringIO(), batches.refresh
    monkeypatch.setattr(batches, "refresh", lambda *given: prepared.append(given) or honest(*given))
    recipe = load(root / "recipes/tiny.yaml", ["policy.best_of_n.n=2", "evaluate.max_new_tokens=6"])
    planned = variants(recipe, ["dpo", "best-of-n"], [0.6], 1)
    run = ComparisonRun(recipe, planned, root, Console(file=told, width=100), {})
    for variant in planned:
        run.run(variant)
    assert [row["error"] for row in run.rows] == [None, None, None]
    assert len(prepared) == 1
    assert re.findall(r"^(data|baseline) +(\w+)", told.getvalue(), flags=re.MULTILINE) == [
        ("data", "checked"),
        ("data", "note"),  # the test project has no commit
        ("baseline", "done"),
        ("data", "reused"),
        ("baseline", "reused"),
    ]


def test_a_run_of_a_comparison_does_not_meet_the_champion_nor_register(root: Path) -> None:
    recipe = load(root / "recipes/tiny.yaml")
    (variant,) = variants(recipe, ["dpo"], [0.7], 1)
    run = ComparisonRun(recipe, [variant], root, Console(quiet=True), {})
    versions = len(run.forwarder.client.search_model_versions("name='tiny'"))
    run.run(variant)
    assert run.rows[0]["error"] is None
    assert len(run.forwarder.client.search_model_versions("name='tiny'")) == versions >= 1
