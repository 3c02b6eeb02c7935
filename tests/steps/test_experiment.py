"""A whole experiment on the tiny model, step by step, without an orchestrator."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd
import tiny
from rich.console import Console

from steps.config import load
from steps.experiment import Experiment


def manifests(root: Path) -> dict[str, dict]:
    found = (json.loads(path.read_text()) for path in (root / "var/store").glob("*/manifest.json"))
    return {manifest["kind"]: manifest for manifest in found}


def test_every_step_leaves_one_whole_artifact(finished: Path) -> None:
    assert set(manifests(finished)) == {"base", "sft", "baseline", "reward", "policy", "evaluate", "gate"}
    assert not list((finished / "var/store").glob("*.partial"))


def test_the_reward_model_learns_an_easy_preference(finished: Path) -> None:
    facts = manifests(finished)["reward"]["facts"]
    assert facts["accuracy"] > 0.5
    assert facts["accuracy_low"] <= facts["accuracy"] <= facts["accuracy_high"]
    difference = facts["eval_rewards/chosen"] - facts["eval_rewards/rejected"]
    assert abs(facts["eval_rewards/margins"] - difference) < 1e-4


def test_no_artifact_holds_a_path_of_this_machine(finished: Path) -> None:
    for manifest in (finished / "var/store").glob("*/manifest.json"):
        for name in json.loads(manifest.read_text())["files"]:
            assert str(finished).encode() not in (manifest.parent / name).read_bytes(), name


def test_both_models_answer_the_same_prompts(finished: Path) -> None:
    evaluation = next((finished / "var/store").glob("evaluate-*"))
    table = pd.read_parquet(evaluation / "completions.parquet")
    assert len(table) == 16
    assert table["prompt"].is_unique
    assert {"start", "policy", "start_gold", "policy_gold"} <= set(table)


def test_a_training_shorter_than_its_first_report_still_says_its_loss(project: Path) -> None:
    sets = ["sft.trainer.max_steps=2", "sft.trainer.logging_steps=5"]
    experiment = Experiment(load(project / "recipes/tiny.yaml", sets), project, Console(quiet=True))
    experiment.prepare_data()
    for name in ("base", "sft"):
        experiment.run(name)
    assert 0 < manifests(project)["sft"]["facts"]["loss"] < 20


def test_data_that_drifted_is_told_before_anything_is_trained(project: Path) -> None:
    recipe, told = load(project / "recipes/tiny.yaml"), io.StringIO()
    Experiment(recipe, project, Console(quiet=True)).prepare_data()
    source = project / "data/tiny/source/pairs.jsonl"
    longer = [{**row, "chosen": row["chosen"] + " and more" * 9} for row in tiny.preference_rows(150, seed=5)]
    tiny.write_rows([*tiny.preference_rows(), *longer], source)
    experiment = Experiment(recipe, project, Console(file=told, width=100))
    experiment.prepare_data()
    assert "the data do not look like those of the version before" in told.getvalue()
    assert "answer length" in told.getvalue()
    tags = [json.loads(line) for line in (experiment.folder / "journal.jsonl").read_text().splitlines()]
    assert any("answer length" in entry.get("values", {}).get("data_drift", "") for entry in tags)
