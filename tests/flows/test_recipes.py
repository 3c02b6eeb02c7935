"""Recipes that ship: each loads, names a dataset of the registry, and runs to its end on files in its data's layout."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from tiny import BAD, GOOD, REPOSITORY, TOPICS

from steps import datasets
from steps.base import locate
from steps.config import load
from steps.errors import DataError, ModelError
from steps.experiment import Experiment
from steps.ingest import ingest
from steps.models import load_policy
from steps.rankings import groups_of
from steps.readers import hub_records
from steps.sources import files_of
from steps.split import split
from steps.validate import validate

RECIPES = sorted(path.name for path in (REPOSITORY / "recipes").glob("*.yaml"))
ROUGE = ("rouge1", "rouge2", "rougeL")
SHARED = REPOSITORY.parent / "shared/data"
SHIPPED = yaml.safe_load((REPOSITORY / "data/datasets.yaml").read_text(encoding="utf-8"))["datasets"]

# What makes a shipped recipe small enough for a tiny model; everything else of it stays.
SMALL = [
    "model.lora.r=4",
    "sft.trainer.max_steps=2",
    "reward.trainer.max_steps=12", "reward.trainer.learning_rate=1e-2",
    "policy.dpo.trainer.max_steps=2", "evaluate.prompts=8", "evaluate.max_new_tokens=8", "evaluate.kl_prompts=4",
    "launch.launcher=here", "launch.min_free_gib=0",
]  # fmt: skip
LOCAL = ["model.base=base", "model.dtype=float32", "model.lora.top_layers=1"]
# The same of recipes whose base keeps its id and revision, and is found where the hub's client keeps what it fetched.
FROM_HUB = {"gpt2-hh": ["model.dtype=float32", "model.lora.top_layers=1"], "ultrafeedback-qlora": []}


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


def lay_ultrafeedback(source: Path) -> None:
    """As HuggingFaceH4/ultrafeedback_binarized has it: turns on both sides, scores, and splits named in the card."""
    draw = random.Random(0)
    splits: dict[str, list[dict]] = {"train_prefs": [], "test_prefs": []}
    for number in range(100):
        asked = f"{draw.choice(TOPICS)} {number}?"
        good, bad = (" ".join(draw.choices(words, k=4)) for words in (GOOD, BAD))
        sides = ([{"content": asked, "role": "user"}, {"content": said, "role": "assistant"}] for said in (good, bad))
        row = dict(zip(("chosen", "rejected"), sides, strict=True))
        row |= {"prompt": asked, "prompt_id": f"{number:064x}", "messages": row["chosen"]}
        row |= {"score_chosen": draw.choice([8.0, 9.5]), "score_rejected": draw.choice([2.0, 4.5])}
        splits["test_prefs" if number % 10 == 9 else "train_prefs"].append(row)
    files = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in splits)
    lay_on_hub(source / "HuggingFaceH4/ultrafeedback_binarized", splits, files)


def lay_tldr(source: Path) -> None:
    """As trl-lib/tldr-preference has it: a post as text, two summaries that begin with a space."""
    draw = random.Random(0)
    splits: dict[str, list[dict]] = {"train": [], "validation": []}
    for number in range(90):
        topic = draw.choice(TOPICS)
        post = f"I like {topic} {number}.\nIt is {draw.choice(GOOD)}."
        prompt = f"SUBREDDIT: r/{topic}\n\nTITLE: {number}\n\nPOST: {post}\n\nTL;DR:"
        good, bad = (" " + " ".join(draw.choices(words, k=4)) for words in (GOOD, BAD))
        splits["validation" if number % 9 == 8 else "train"].append(
            {"prompt": prompt, "chosen": f"{good} {topic}", "rejected": f"{bad} {topic}"}
        )
    lay_on_hub(source / "trl-lib/tldr-preference", splits)


def lay_on_hub(folder: Path, splits: dict[str, list[dict]], files: str = "") -> None:
    """A dataset's folder as the hub has it: one Parquet file a split, and a card that may name them."""
    (folder / "data").mkdir(parents=True)
    for name, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"data/{name}-00000-of-00001.parquet")
    card = f"configs:\n- config_name: default\n  data_files:\n{files}" if files else "tags:\n- trl\n"
    (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")


LAID = {
    "hh": lay_hh,
    "qa-ranking": lay_qa,
    "gpt2-hh": lay_hh,
    "ultrafeedback-qlora": lay_ultrafeedback,
    "tldr": lay_tldr,
}


def make_gpt2(folder: Path, like: Path) -> Path:
    """A two-layer GPT-2 over bytes that, as the real one, has no padding token."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(like)
    tokenizer.pad_token = None
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=256, bos_token_id=1, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the hub's clients keep what they fetched, empty, in this process and in those it starts."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return tmp_path / "hub"


def lay_model(name: str, fetched: Path, local: Path) -> None:
    """A tiny model in the place of a recipe's base on the hub, at the revision the recipe names."""
    model = load(REPOSITORY / f"recipes/{name}.yaml").model
    assert model.revision and len(model.revision) == 40
    folder = fetched / f"models--{model.base.replace('/', '--')}/snapshots/{model.revision}"
    make_gpt2(folder, local) if name.startswith("gpt2") else shutil.copytree(local, folder)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_loads_and_its_dataset_is_registered(name: str) -> None:
    recipe = load(REPOSITORY / "recipes" / name)
    assert datasets.dataset(recipe.data.name, REPOSITORY)


def test_the_docs_name_every_recipe_with_its_dataset() -> None:
    docs = (REPOSITORY / "docs/recipes.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \|(.*)$", docs, flags=re.MULTILINE))
    for name in RECIPES:
        recipe = load(REPOSITORY / "recipes" / name)
        said = rows.get(recipe.name, "")
        assert f"recipes/{name}" in said and f"`{recipe.data.name}`" in said, f"{name} has no row"


def test_a_dataset_whose_files_are_not_there_says_where_they_go(tmp_path: Path) -> None:
    for name, role in (("hh", "transcripts"), ("finegrained-qa", "feedback")):
        with pytest.raises(DataError) as caught, files_of(datasets.dataset(name, REPOSITORY).source, tmp_path):
            pass
        assert f"'{role}'" in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(DataError, match="needs its revision") as caught:
        list(hub_records(datasets.dataset("tldr", REPOSITORY).source, tmp_path))
    assert str(tmp_path / "trl-lib/tldr-preference") in str(caught.value)


@pytest.mark.parametrize("name", sorted(FROM_HUB))
def test_a_base_that_cannot_be_fetched_is_named_with_its_revision(name: str, fetched: Path) -> None:
    model = load(REPOSITORY / f"recipes/{name}.yaml").model
    with pytest.raises(ModelError) as caught:
        locate(model.base, model.revision, REPOSITORY)
    assert f"{model.base} at {model.revision}" in str(caught.value)


@pytest.mark.parametrize("name", sorted(LAID))
def test_a_recipe_runs_to_its_end(name: str, project: Path, fetched: Path) -> None:
    recipe = load(REPOSITORY / f"recipes/{name}.yaml", [*SMALL, *FROM_HUB.get(name, LOCAL)])
    if name in FROM_HUB:
        lay_model(name, fetched, project / "base")
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
    assert facts["evaluate"]["win_rate_low"] <= facts["evaluate"]["win_rate"] <= facts["evaluate"]["win_rate_high"]
    if name == "tldr":  # summaries are also held against those people preferred
        overlaps = [facts["evaluate"][f"{who}_{kind}"] for who in ("start", "policy") for kind in ROUGE]
        assert all(0 <= overlap <= 1 for overlap in overlaps)
    if recipe.model.dtype == "nf4":
        model = load_policy(experiment.known["base"].path, "nf4", experiment.known["policy"].path / "adapter")
        frozen = [one for one in model.modules() if isinstance(one, bnb.nn.Linear4bit)]
        assert len(frozen) == 14  # seven in each of two layers
        assert {one.weight.quant_type for one in frozen} == {"nf4"}
        assert all(one.weight.quant_state.nested for one in frozen)  # the constants are quantised too


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
