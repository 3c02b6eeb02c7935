"""`prefloop run` as a person runs it, and what the commands after it reuse; every step in a process of its own."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from forks import Forks
from servers import PrefectServer

RUN = ("run", "recipes/tiny.yaml", "--set", "launch.launcher=process")


def digests(root: Path) -> dict[str, str]:
    """Digest of every finished step, by name and key."""
    found = [json.loads(path.read_text()) for path in (root / "var/store").glob("*/manifest.json")]
    return {f"{manifest['kind']}-{manifest['key']}": manifest["digest"] for manifest in found}


def steps_in(output: str) -> dict[str, str]:
    """What the run said of each step: done or reused."""
    return dict(re.findall(r"^(\w+)\s+(done|reused|checked)\s+[\d.]+ s ", output, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project after its first run, with the Prefect server a command takes along, and what the run printed."""
    root = tiny.make_project(tmp_path_factory.mktemp("flow") / "project")
    command = [sys.executable, "-m", "flows.cli", *RUN]
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "COLUMNS": "100"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return root, result.stdout


def test_the_first_run_does_every_step_and_registers_a_champion(first: tuple[Path, str]) -> None:
    _, output = first
    assert steps_in(output) == {
        "data": "checked",
        **dict.fromkeys(("base", "sft", "baseline", "reward", "policy", "evaluate", "gate"), "done"),
    }
    assert "promoted  models:/tiny/1" in output
    assert output.count("prompt  ") == output.count("before  ") == output.count("after   ") == 3
    assert "prefloop ui" in output
    assert "prefloop step policy recipes/tiny.yaml --set launch.launcher=process --force" in output


def test_the_output_fits_a_terminal_of_100_columns(first: tuple[Path, str]) -> None:
    _, output = first
    table = output[output.index("\nstep ") :].splitlines()
    assert [line for line in table if len(line) > 100 and not line.startswith("repeat one step")] == []


def test_a_process_of_its_own_leaves_the_same_bytes_as_this_one(first: tuple[Path, str], finished: Path) -> None:
    assert digests(first[0]) == digests(finished)


def test_the_parent_run_holds_the_headline_numbers_and_the_data(first: tuple[Path, str]) -> None:
    root, _ = first
    with sqlite3.connect(root / "var/mlflow.db") as database:
        parents = database.execute(
            "select run_uuid, name, status from runs where run_uuid not in "
            "(select run_uuid from tags where key = 'mlflow.parentRunId')"
        ).fetchall()
        assert [status for _, _, status in parents] == ["FINISHED"]
        parent = parents[0][0]
        numbers = dict(database.execute("select key, value from latest_metrics where run_uuid = ?", (parent,)))
        children = database.execute(
            "select runs.run_uuid, runs.name, runs.status from runs join tags using (run_uuid) "
            "where tags.key = 'mlflow.parentRunId' and tags.value = ?",
            (parent,),
        ).fetchall()
        inputs = {
            row[0]
            for row in database.execute(
                "select datasets.name from inputs join datasets on datasets.dataset_uuid = inputs.source_id "
                "where inputs.destination_id = ?",
                (parent,),
            )
        }
        curves = {
            name.split("-")[0]: {
                row[0] for row in database.execute("select key from metrics where run_uuid = ?", (run,))
            }
            for run, name, _ in children
        }
    assert {"win_rate", "win_rate_low", "win_rate_high", "eval_rewards/accuracies", "reward/accuracy"} <= set(numbers)
    assert {status for *_, status in children} == {"FINISHED"}
    assert set(curves) == {"base", "sft", "baseline", "reward", "policy", "evaluate", "gate"}
    assert inputs == {"tiny/demonstrations", "tiny/preferences", "tiny/prompts", "tiny/gold"}
    rewards = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    for step in ("reward", "policy"):
        assert rewards | {f"eval_{name}" for name in rewards} | {"loss", "eval_loss"} <= curves[step]
    assert "loss" in curves["sft"]


def test_prefect_holds_the_tasks_by_name_and_three_artifacts(first: tuple[Path, str]) -> None:
    with sqlite3.connect(first[0] / "var/prefect/prefect.db") as database:
        tasks = dict(database.execute("select name, state_name from task_run"))
        artifacts = dict(database.execute("select key, type from artifact where key is not null"))
    steps = ("data", "base", "sft", "baseline", "reward", "policy", "evaluate", "gate", "registry")
    assert tasks == dict.fromkeys(steps, "Completed")
    assert artifacts == {"report": "markdown", "metrics": "table", "mlflow": "markdown"}


def test_charts_and_report_lie_in_the_runs_folder(first: tuple[Path, str]) -> None:
    run = next((first[0] / "var/runs").iterdir())
    names = {path.name for path in run.iterdir()}
    assert {"report.md", "report.png", "recipe.yaml", "sft.png", "reward.png", "policy.png"} <= names
    assert "Promoted: models:/tiny/1" in (run / "report.md").read_text()


def test_nothing_changed_then_one_parameter_then_one_byte(
    first: tuple[Path, str], prefloop: Forks, prefect_server: PrefectServer
) -> None:
    root, _ = first
    prefect_server.start()
    same = prefloop(root, *RUN).ended_well()
    assert set(steps_in(same).values()) == {"checked", "reused"}, same

    changed = ("run", "recipes/tiny.yaml", "--set", "policy.dpo.trainer.beta=0.3")
    planned = prefloop(root, *changed, "--dry-run").ended_well()
    verdicts = dict(re.findall(r"^(\w+)\s+(reuse|run|wait)\b", planned, flags=re.MULTILINE))
    assert verdicts == {
        **dict.fromkeys(("base", "sft", "baseline", "reward"), "reuse"),
        "policy": "run",
        **dict.fromkeys(("evaluate", "gate"), "wait"),
    }

    source = root / "data/tiny/source/pairs.jsonl"
    source.write_bytes(source.read_bytes().replace(b"grim", b"grum"))
    here = prefloop(root, *changed).ended_well()
    told = steps_in(here)
    assert told["base"] == "reused", here
    assert {told[name] for name in ("sft", "baseline", "reward", "policy", "evaluate", "gate")} == {"done"}
    assert "win rate against the champion" in here


def test_methods_side_by_side_share_their_steps_and_a_failure_does_not_end_the_others(
    first: tuple[Path, str], prefloop: Forks, prefect_server: PrefectServer
) -> None:
    root, _ = first
    prefect_server.start()
    asked = ["compare", "recipes/tiny.yaml", "--methods", "dpo,ppo,best-of-n", "--betas", "0.5", "--seeds", "1"]
    asked += ["--set", "launch.launcher=process"]
    broken = ["--set", "policy.ppo.trainer.steps_per_generation=3", "--set", "policy.best_of_n.n=2"]
    broken += ["--set", "policy.ppo.trainer.gradient_accumulation_steps=4"]
    said = prefloop(root, *asked, *broken).ended_well()
    assert said.count("a rollout must end with an optimizer step") == 1
    assert len(re.findall(r"^sft +done", said, flags=re.MULTILINE)) <= 1
    assert [line for line in said.splitlines() if len(line) > 100 and "page" not in line and "next" not in line] == []
    (folder,) = (path for path in (root / "var/runs").iterdir() if path.name.endswith("tiny-compared"))
    rows = json.loads((folder / "rows.json").read_text())
    assert [(row["method"], row["setting"], row["error"] is None) for row in rows] == [
        ("dpo", "β=0.5", True),
        ("ppo", "β=0.5", False),
        ("best_of_n", "n=1", True),
        ("best_of_n", "n=2", True),
    ]
    page = (folder / "report.html").read_text()
    assert "a rollout must end with an optimizer step" in page
    assert "1 of 4 runs ended without a result" in page
    with sqlite3.connect(root / "var/mlflow.db") as database:
        (parent,) = database.execute("select run_uuid from runs where name = ?", (folder.name,)).fetchone()
        below = database.execute(
            "select name from runs join tags using (run_uuid) where key = 'mlflow.parentRunId' and value = ?", (parent,)
        ).fetchall()
    names = {"dpo β=0.5 seed 3", "ppo β=0.5 seed 3", "best_of_n seed 3"}
    assert {name for (name,) in below} == names
