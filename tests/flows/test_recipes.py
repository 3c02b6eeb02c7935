"""Recipes that ship: each loads, names a dataset of the registry, and runs to its end on files in its data's layout."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pandas as pd
import pytest
import yaml
from rich.console import Console
from tiny import BAD, GOOD, REPOSITORY, TOPICS

from steps import datasets
from steps.config import load
from steps.errors import DataError
from steps.experiment import Experiment
from steps.ingest import ingest
from steps.rankings import groups_of
from steps.sources import files_of
from steps.split import split
from steps.validate import validate

RECIPES = sorted(path.name for path in (REPOSITORY / "recipes").glob("*.yaml"))
SHARED = REPOSITORY.parent / "shared/data"
SHIPPED = yaml.safe_load((REPOSITORY / "data/datasets.yaml").read_text(encoding="utf-8"))["datasets"]

# What makes a shipped recipe small enough for the tiny model; everything else of it stays.
SMALL = [
    "model.base=base", "model.dtype=float32", "model.lora.top_layers=1", "model.lora.r=4",
    "sft.trainer.max_steps=2",
    "reward.trainer.max_steps=12", "reward.trainer.learning_rate=1e-2",
    "policy.dpo.trainer.max_steps=2", "evaluate.prompts=8", "evaluate.max_new_tokens=8", "evaluate.kl_prompts=4",
    "launch.launcher=here", "launch.min_free_gib=0",
]  # fmt: skip


def dialogues(count: int = 90, seed: int = 0) -> list[dict]:
    """Transcripts of hh-rlhf's layout: turns that both sides share, and a last one that is kind or is not."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        turns = f"\n\nHuman: {draw.choice(TOPICS)} {number}?"
        for more in range(number % 3):
            turns += f"\n\nAssistant: {draw.choice(BAD)}\n\nHuman: and {more}?"
        sides = (" ".join(draw.choices(words, k=4)) for words in (GOOD, BAD))
        rows.append(dict(zip(("chosen", "rejected"), (f"{turns}\n\nAssistant: {side}" for side in sides), strict=True)))
    return rows


def questions(count: int = 60, seed: int = 0) -> list[dict]:
    """Records of FineGrainedRLHF's layout: four answers, 0 to 3 kind words in them, and a verdict on every two."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        kind = draw.sample([0, 1, 1, 3], 4)
        said = [" ".join([*draw.choices(GOOD, k=k), *draw.choices(BAD, k=3 - k)]) + f" {number}{k}" for k in kind]
        verdicts = [
            0 if kind[a] == kind[b] else 1 if kind[a] > kind[b] else 2 for a in range(4) for b in range(a + 1, 4)
        ]
        passages = [[draw.choice(TOPICS), "It is so.", "It was not."], ["Another", f"Fact {number}."]]
        answers = {f"prediction {place}": f"{answer} {place}" for place, answer in enumerate(said, start=1)}
        rows.append({"question": f"Is {number}?", "passages": passages, **answers, "preference": verdicts})
    return rows


def lay_hh(source: Path) -> None:
    for name, rows in (("harmless-base/train", dialogues(60)), ("helpful-base/test", dialogues(60, seed=1))):
        path = source / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (source / "README.md").write_text("as on the hub", encoding="utf-8")


def lay_qa(source: Path) -> None:
    source.mkdir(parents=True)
    (source / "dev_feedback.json").write_text(json.dumps(questions()), encoding="utf-8")


LAID = {"hh": lay_hh, "qa-ranking": lay_qa}


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_loads_and_its_dataset_is_registered(name: str) -> None:
    recipe = load(REPOSITORY / "recipes" / name)
    assert datasets.dataset(recipe.data.name, REPOSITORY)


def test_a_dataset_whose_files_are_not_there_says_where_they_go(tmp_path: Path) -> None:
    for name, role in (("hh", "transcripts"), ("finegrained-qa", "feedback")):
        with pytest.raises(DataError) as caught, files_of(datasets.dataset(name, REPOSITORY).source, tmp_path):
            pass
        assert f"'{role}'" in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", sorted(LAID))
def test_a_recipe_runs_to_its_end(name: str, project: Path) -> None:
    recipe = load(REPOSITORY / f"recipes/{name}.yaml", SMALL)
    registry = {"datasets": {recipe.data.name: SHIPPED[recipe.data.name]}}
    (project / "data/datasets.yaml").write_text(yaml.safe_dump(registry), encoding="utf-8")
    LAID[name](project / "data" / recipe.data.name / "source")
    experiment = Experiment(recipe, project, Console(quiet=True))
    counts = experiment.prepare_data().counts
    assert counts["quarantined"] == 0 and counts["preferences_held_out"] > 10
    facts = {step: experiment.run(step).artifact.facts for step in recipe.STEPS}
    reward = facts["reward"]
    assert reward["loss"] == recipe.reward.loss
    assert reward["accuracy_low"] <= reward["accuracy"] <= reward["accuracy_high"]
    assert reward["accuracy"] > 0.6  # kind words are told from others
    assert facts["evaluate"]["judge"] == "reward" and isinstance(facts["gate"]["promote"], bool)


# -- on the real files -------------------------------------------------------------------------------------------


def prepared(name: str, folder: Path, tmp_path: Path) -> tuple[dict, pd.DataFrame, dict[str, pd.DataFrame]]:
    """Counts, quarantine and tables of a shipped dataset whose files lie in a folder."""
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    entry = datasets.dataset(name, REPOSITORY)
    ingest(entry, folder, tmp_path / "rows.parquet", tmp_path / "downloads")
    counts = validate(entry, tmp_path, folder, tmp_path)
    tables = split(pd.read_parquet(tmp_path / "valid.parquet"), entry)
    return counts, pd.read_parquet(tmp_path / "quarantine.parquet"), tables


def test_real_dialogues(tmp_path: Path) -> None:
    """1,600 transcripts, whose known defects are named by their line; last turn against last turn."""
    counts, bad, tables = prepared("hh", SHARED / "hh-harmless", tmp_path)
    assert counts["read"] == 1600 and counts["valid"] + counts["quarantined"] == 1600
    assert {87, 517, 926, 1104, 1255} <= set(bad["line"])
    pairs = tables["preferences"]
    assert pairs["prompt"].str.endswith("\n\nAssistant:").all() and pairs["chosen"].str.startswith(" ").all()
    assert not pairs["chosen"].str.contains("\n\nHuman:").any()
    sides = [set(pairs.loc[pairs["part"] == part, "prompt"]) for part in ("train", "held_out")]
    assert not sides[0] & sides[1] and min(map(len, sides)) > 350


def test_real_rankings(tmp_path: Path) -> None:
    """350 questions with six verdicts each: whole rankings, with their ties."""
    counts, _, tables = prepared("finegrained-qa", SHARED / "finegrained-qa", tmp_path)
    assert counts["read"] == 350 * 6
    groups = groups_of(tables["preferences"], 16)
    assert sum(group.is_whole for group in groups) == len(groups) > 250
    assert {len(group.answers) for group in groups} <= {2, 3, 4}
    assert sum((group.preferred == 0.5).sum() for group in groups) > 100
