"""How two runs differ, part by part, and that what is the same is not called different."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import toy_runs
from rich.console import Console
from toy_runs import Project

from steps import run_diff
from steps.errors import PrefloopError
from steps.run_diff import Difference

BASE, TUNED, LATER = "20260101-000000-toy", "20260102-000000-toy", "20260103-000000-toy"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three runs: the second with another beta, library and processor, the third on data without one row."""
    made = toy_runs.make(tmp_path_factory.mktemp("diff") / "project")
    shutil.copytree(toy_runs.REPOSITORY / ".dvc", made.root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    toy_runs.run(made, BASE, tags={"code.sft": "1" * 16, "code.policy": "1" * 16})
    toy_runs.run(
        made,
        TUNED,
        changed={"policy": "another beta"},
        facts={"evaluate": {"win_rate": 0.7, "win_rate_low": 0.66, "win_rate_high": 0.74}},
        recipe={"policy": {"dpo": {"beta": 0.3}}},
        packages="mlflow==3.0\ntorch==1.1\n",
        tags={"prefloop.processor": "another processor", "code.sft": "1" * 16, "code.policy": "2" * 16},
    )
    gone = toy_runs.canonical()[0]["row_id"]
    toy_runs.version(made, without=frozenset([gone]))
    toy_runs.run(made, LATER)
    return made


def compared(project: Project, before: str, after: str) -> Difference:
    return run_diff.compare(before, after, project.root, project.forwarder)


def test_a_run_differs_from_itself_in_nothing(project: Project) -> None:
    found = compared(project, BASE, BASE)
    assert (found.data, found.recipe, found.code, found.packages, found.hardware, found.steps) == (
        {},
        {},
        {},
        {},
        {},
        {},
    )
    assert {one["difference"] for one in found.metrics.values()} == {0.0}


def test_each_part_names_what_differs(project: Project) -> None:
    found = compared(project, "models:/toy/1", TUNED)
    assert found.runs == ["models:/toy/1", "models:/toy/2"]
    assert found.recipe == {"policy.dpo.beta": [0.1, 0.3]}
    assert found.packages == {"torch": ["1.0", "1.1"]}
    assert found.hardware == {"processor": ["a processor", "another processor"]}
    assert found.code == {"steps": {"policy": ["1" * 16, "2" * 16]}}
    assert found.data == {}


def test_steps_that_were_made_anew_name_the_inputs_that_differ(project: Project) -> None:
    steps = compared(project, BASE, TUNED).steps
    assert {name: step["inputs"] for name, step in steps.items()} == {
        "policy": [],  # its settings
        "evaluate": ["policy"],
        "gate": ["evaluate", "policy"],
    }


def test_metrics_stand_beside_their_intervals(project: Project) -> None:
    metrics = compared(project, BASE, TUNED).metrics
    assert metrics["win_rate"] == {
        "before": 0.6,
        "after": 0.7,
        "difference": pytest.approx(0.1),
        "intervals": [[0.55, 0.65], [0.66, 0.74]],
    }
    assert "win_rate_low" not in metrics


def test_differences_are_odd(project: Project) -> None:
    there, back = compared(project, BASE, TUNED), compared(project, TUNED, BASE)
    assert {name: one["difference"] for name, one in there.metrics.items()} == {
        name: -one["difference"] for name, one in back.metrics.items()
    }
    assert {name: two[::-1] for name, two in there.recipe.items()} == back.recipe


def test_data_that_cannot_be_had_is_told_by_its_digests(project: Project) -> None:
    data = compared(project, BASE, LATER).data
    assert data["version"][0] != data["version"][1]
    assert set(data["tables"]) == {"toy/demonstrations"}
    assert "can be had neither" in data["rows_unknown"] and "rows" not in data


def test_rows_that_went_are_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, root: Path, revision: str, to: Path, files: list[str]) -> None:
        gone = {toy_runs.canonical()[0]["row_id"]} if revision == project.git("rev-parse", "HEAD") else set()
        rows = [row for row in toy_runs.canonical() if row["row_id"] not in gone]
        to.mkdir(parents=True)
        toy_runs.write_table(toy_runs.pd.DataFrame(rows), to / "valid.parquet")
        toy_runs.write_table(toy_runs.pd.DataFrame(rows).head(0), to / "quarantine.parquet")

    monkeypatch.setattr(run_diff.versions, "fetch", fetch)
    rows = compared(project, BASE, LATER).data["rows"]
    assert (rows["came"], rows["went"], rows["changed"], rows["same"]) == (0, 1, 0, 10)
    assert rows["first"]["went"] == [toy_runs.canonical()[0]["row_id"]]


def test_commits_git_does_not_know_are_said_so(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (run_diff._side(name, run_diff.Evidence(project.root, project.forwarder)) for name in (BASE, TUNED))
    b.graph.run["code_commit"] = "d" * 40  # type: ignore[index]
    found = run_diff._code(a, b)
    assert found["commits"] == ["c" * 40, "d" * 40]
    assert found["files_unknown"] == "git does not know both commits"


def test_a_run_nobody_knows(project: Project) -> None:
    with pytest.raises(PrefloopError, match="no model version and no run"):
        compared(project, BASE, "20260101-000009-toy-x")


def test_the_answer_in_words_fits_a_hundred_columns(project: Project) -> None:
    out = Console(width=100, file=io.StringIO())
    run_diff.print_difference(out, compared(project, BASE, TUNED))
    text = out.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    for expected in ("policy.dpo.beta", "data the same", "win_rate", "0.6 [0.55, 0.65]", "+0.1", "torch"):
        assert expected in text
