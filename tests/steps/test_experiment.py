"""A whole experiment on the tiny model, step by step, without an orchestrator."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd


def manifests(root: Path) -> dict[str, dict]:
    found = (json.loads(path.read_text()) for path in (root / "var/store").glob("*/manifest.json"))
    return {manifest["kind"]: manifest for manifest in found}


def test_every_step_leaves_one_whole_artifact(finished: Path) -> None:
    assert set(manifests(finished)) == {"base", "sft", "reward", "policy", "evaluate", "gate"}
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
