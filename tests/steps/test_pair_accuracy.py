"""Accuracy on held-out pairs: answers alone are scored, neither prompts nor padding, and a tie counts half."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from steps.config import load
from steps.models import ADAPTER, load_policy, load_tokenizer
from steps.pairs import COLUMNS, training_and_held_out
from steps.pipeline import POLICIES
from steps.statistics import pair_accuracy
from steps.tracking import NullTracker

# One method that TRL measures, one whose loss is ours on TRL's trainer, and one that is measured by ours alone.
METHODS = ("dpo", "simpo", "kto")
BETA = 0.1


@pytest.fixture(scope="module")
def given(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the policy step reads; its answers are of many lengths, so that batches are padded."""
    store, data = finished / "var/store", finished / "data/tiny"
    pairs = pd.read_parquet(data / "preferences.parquet")
    words = [text.split() for text in pairs["rejected"]]
    pairs["rejected"] = [" ".join(text[: 1 + place % 5]) for place, text in enumerate(words)]
    table = tmp_path_factory.mktemp("pairs") / "preferences.parquet"
    pairs.to_parquet(table)
    steps = {name: next(store.glob(f"{name}-*")) for name in ("base", "sft", "reward")}
    return {
        "recipe": finished / "recipes/tiny.yaml",
        **steps,
        "data/preferences": table,
        "data/demonstrations": data / "demonstrations.parquet",
    }


def tuned(given: dict[str, Path], out: Path, method: str, *sets: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """The facts of the policy step, and the pairs it was measured on."""
    assignments = [f"policy.method={method}", f"policy.dpo.trainer.beta={BETA}", *sets]
    policy = load(given["recipe"], [*assignments, "policy.dpo.trainer.max_steps=3"]).policy
    step = POLICIES[method]
    module, _, name = step.function.partition(":")
    inputs = {argument: given[source] for argument, source in step.inputs.items() if source != "start"}
    settings = (policy.dpo,) if method == "dpo" else (policy.relative, method)
    function = getattr(importlib.import_module(module), name)
    facts = function(*settings, "float32", **inputs, seed=3, out=out, tracker=NullTracker())
    return facts, training_and_held_out(given["data/preferences"], policy.dpo)[1].to_pandas()[COLUMNS]


@torch.no_grad()
def log_likelihoods(
    given: dict[str, Path], weights: Path, pairs: pd.DataFrame, side: str, *, whole: bool
) -> np.ndarray:
    """(n,) log π of each answer and its end, row by row, without padding.

    Args:
        whole: count the prompt's tokens too, as a faulty measurement would.
    """
    model, tokenizer = load_policy(given["base"], "float32", weights).eval(), load_tokenizer(given["base"])
    found = []
    for prompt, answer in zip(pairs["prompt"], pairs[side], strict=True):
        asked, said = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        ids = torch.tensor([[*asked, *said, tokenizer.eos_token_id]])
        each = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(each[0 if whole else len(asked) - 1 :].sum().item())
    return np.array(found)


@pytest.mark.parametrize("method", METHODS)
def test_neither_prompt_nor_padding_is_scored(given: dict[str, Path], tmp_path: Path, method: str) -> None:
    facts, pairs = tuned(given, tmp_path, method)
    assert len(set(pairs["rejected"].map(len))) > 4

    def rewards(side: str, whole: bool = False) -> np.ndarray:
        policy, start = (
            log_likelihoods(given, weights / ADAPTER, pairs, side, whole=whole) for weights in (tmp_path, given["sft"])
        )
        return BETA * (policy - start)

    chosen, rejected = rewards("chosen"), rewards("rejected")
    assert facts["eval_rewards/chosen"] == pytest.approx(chosen.mean(), abs=1e-5)
    assert facts["eval_rewards/rejected"] == pytest.approx(rejected.mean(), abs=1e-5)
    assert facts["accuracy"] == pytest.approx(pair_accuracy(chosen, rejected), abs=1e-6)
    # Had prompts been scored as well, these numbers would be others.
    assert abs(rewards("rejected", whole=True).mean() - rejected.mean()) > 1e-4


# TRL's measurement of DPO is ours in the accuracy alone, wherever the reference is asked.
AT_ONCE = "policy.dpo.trainer.precompute_ref_log_probs=false"


@pytest.mark.parametrize(("method", "sets"), [*((method, []) for method in METHODS), ("dpo", [AT_ONCE])])
def test_a_tie_counts_as_half(given: dict[str, Path], tmp_path: Path, method: str, sets: list[str]) -> None:
    """Nothing is learnt, so that all rewards are 0: accuracy ½, where counting ties as wrong gives 0."""
    facts, _ = tuned(given, tmp_path, method, "policy.dpo.trainer.learning_rate=0", *sets)
    assert facts["eval_rewards/margins"] == 0
    assert facts["accuracy"] == 0.5
