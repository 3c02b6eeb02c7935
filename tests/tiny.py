"""A language model of some 7,000 parameters, a byte tokenizer and a project to run them in, all made in code."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet as pq

from steps.datasets import Dataset
from steps.ingest import ingest
from steps.validate import validate

REPOSITORY = Path(__file__).parents[1]
GOOD = ("good", "warm", "fine", "bright", "kind")
BAD = ("bad", "cold", "dull", "grim", "rude")
TOPICS = ("rain", "bread", "trains", "music", "paint", "chess", "rivers", "lamps", "boats", "gardens")


def make_base(folder: Path, width: int = 16, spread: float = 0.02) -> Path:
    """A two-layer llama over bytes, with its tokenizer, saved as safetensors.

    Args:
        width: of its hidden states. With sixteen numbers to a byte, no adapter makes some bytes much likelier.
        spread: of its random weights.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, **{letter: i + 2 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        initializer_range=spread,
        hidden_size=width,
        intermediate_size=width * 3 // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    return folder


def preference_rows(prompts: int = 120, seed: int = 0) -> list[dict]:
    """Pairs whose chosen side uses kind words and whose rejected side does not."""
    draw = random.Random(seed)
    rows = []
    for number in range(prompts):
        prompt = f"{draw.choice(TOPICS)} {number}: "
        for _ in range(2):
            pair = [" ".join(draw.choices(words, k=5)) for words in (GOOD, BAD)]
            rows.append({"prompt": prompt, "chosen": pair[0], "rejected": pair[1], "margin": draw.choice([1, 2, 3])})
    return rows


def write_rows(rows: list[dict], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


Files = dict[str, bytes | list[dict]]


def lay(files: Files, folder: Path) -> Path:
    """Source files as they are given, lists of records as JSON lines."""
    for name, content in files.items():
        if isinstance(content, list):
            write_rows(content, folder / name)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


def entry(files: Files, **settings: object) -> Dataset:
    """A dataset of preferences, one role a file, unless the settings say otherwise."""
    named = {f"role{number}": name for number, name in enumerate(files)}
    return Dataset.model_validate({"format": "preferences", "source": {"files": named}, **settings})


def ingested(files: Files, folder: Path, **settings: object) -> list[dict]:
    """Canonical rows of source files, by way of the table on disk."""
    source = lay(files, folder / "source")
    source.mkdir(parents=True, exist_ok=True)
    ingest(entry(files, **settings), source, folder / "rows.parquet", folder / "downloads")
    return pq.read_table(folder / "rows.parquet").to_pylist()


def validated(files: Files, folder: Path, **settings: object) -> tuple[list[dict], list[dict], dict]:
    """Valid rows, rows in quarantine and the counts; what is true of every result is asserted on the way."""
    rows = ingested(files, folder, **settings)
    counts = validate(entry(files, **settings), folder, folder / "source", folder)
    valid, bad = (pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("valid", "quarantine"))
    assert (counts["read"], counts["valid"], counts["quarantined"]) == (len(rows), len(valid), len(bad))
    places = [[(row["file"], row["line"], row["part"]) for row in table] for table in (rows, valid, bad)]
    assert sorted(places[1] + places[2]) == sorted(places[0])
    assert len(set(places[0])) == len(places[0])
    assert all(row["reasons"] and row["raw"] is not None for row in bad)
    return valid, bad, counts


REGISTRY = """\
datasets:
  tiny:
    format: preferences
    source:
      files:
        pairs: pairs.jsonl
    split: {seed: 0, demonstrations: 0.2, preferences: 0.35, held_out: 0.25}
"""

RECIPE = """\
name: tiny
seed: 3
data: {name: tiny}
model:
  base: base
  dtype: float32
  lora: {r: 4, alpha: 8, target_modules: [q_proj, v_proj], top_layers: 1}
sft:
  trainer: {learning_rate: 1e-2, per_device_train_batch_size: 8, max_steps: 8, logging_steps: 2, save_steps: 3}
reward:
  held_out: 32
  trainer: {learning_rate: 1e-2, per_device_train_batch_size: 8, max_steps: 8, logging_steps: 2, save_steps: 3}
policy:
  dpo:
    held_out: 32
    trainer: {learning_rate: 1e-2, per_device_train_batch_size: 8, max_steps: 8, logging_steps: 2, save_steps: 3}
  ppo:
    rollouts: 4
    held_out: 32
    measure_every: 2
    samples_every: 2
    normalise_reward: 32
    trainer: {learning_rate: 1e-2, per_device_train_batch_size: 8, steps_per_generation: 2, num_iterations: 2,
      max_completion_length: 8}
  rloo:
    rollouts: 3
    held_out: 32
    measure_every: 2
    trainer: {learning_rate: 1e-2, per_device_train_batch_size: 8, num_generations: 4, max_completion_length: 8}
evaluate: {prompts: 16, max_new_tokens: 8}
gate: {win_rate_floor: 0.0, judge_accuracy_floor: 0.0, guards: {}}
launch: {launcher: here, min_free_gib: 0}
"""


def make_project(root: Path) -> Path:
    """A git and DVC project with a dataset `tiny`, a base model and `recipes/tiny.yaml`."""
    for name in ("dvc.yaml", ".dvc/config", ".gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, root / name)
    shutil.copytree(REPOSITORY / "steps", root / "steps", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "data").mkdir()
    (root / "data" / "datasets.yaml").write_text(REGISTRY, encoding="utf-8")
    write_rows(preference_rows(), root / "data" / "tiny" / "source" / "pairs.jsonl")
    (root / "recipes").mkdir()
    (root / "recipes" / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    make_base(root / "base")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "a project"]):
        subprocess.run([*git, *command], cwd=root, check=True, capture_output=True)
    return root
