"""Whether a dataset suffices for a recipe: told before anything is trained, not when a step comes to need it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from steps.config import Recipe
from steps.datasets import read_table
from steps.errors import DataError
from steps.policy_config import RELATIVES
from steps.sections import Pairs


def fit(pairs: pd.DataFrame, config: Pairs) -> pd.Series:
    """(n,) which pairs are as a section asks for them; one without a margin is.

    Args:
        pairs: chosen, rejected, margin.
    """
    fit = ~(pairs["margin"] < config.min_margin)
    if config.max_chars is not None:
        fit &= pairs[["chosen", "rejected"]].map(len).max(axis=1) <= config.max_chars
    return fit


def check(recipe: Recipe, tables: Mapping[str, Path]) -> None:
    """Look whether every step of a recipe will find what it needs.

    Args:
        tables: the dataset's, by name.

    Raises:
        DataError: too few prompts to evaluate with, or no pair that a step may learn from or be measured on.
    """
    if recipe.evaluate.topics is None:
        _check_prompts(tables["prompts"], recipe.evaluate.prompts)
    if learners := dict(_learners(recipe)):
        path = tables["preferences"]
        pairs = read_table(path, ["part", "chosen", "rejected", "margin"])
        for section, config in learners.items():
            _check_pairs(pairs, path, section, config)


def _learners(recipe: Recipe) -> Iterator[tuple[str, Pairs]]:
    """The sections that learn from pairs."""
    policy = recipe.policy
    if "reward" in recipe.steps:
        yield "reward", recipe.reward
    if policy.method == "dpo" or policy.method in RELATIVES:
        yield "policy.dpo", policy.dpo
    elif policy.method == "chain_of_hindsight":
        yield "policy.chain_of_hindsight", policy.chain_of_hindsight


def _check_prompts(path: Path, wanted: int) -> None:
    count = len(read_table(path, ["prompt"]))
    if count < wanted:
        lower = f"--set evaluate.prompts={count}, or " if count > 1 else ""
        raise DataError(
            "too few held-out prompts",
            where=str(path),
            have=f"{count}, the recipe asks for {wanted}",
            then=f"{lower}add data, or change the shares under `split:` in data/datasets.yaml",
        )


def _check_pairs(pairs: pd.DataFrame, path: Path, section: str, config: Pairs) -> None:
    held_out, train = pairs["part"] == "held_out", pairs[pairs["part"] == "train"]
    if not held_out.any():
        raise DataError("there are no held-out pairs", where=str(path), then="add data, or change the split")
    if fit(train, config).any():
        return
    margins = train["margin"].dropna()
    found = f"{len(train)} pairs" + (f", of margins up to {margins.max():g}" if len(margins) else "")
    asked = f"margins of {config.min_margin:g} or more"
    if config.max_chars is not None:
        asked += f" and answers of at most {config.max_chars} characters"
    raise DataError(
        "no training pair is left",
        where=str(path),
        have=f"{found}; the recipe's section {section} asks for {asked}",
        then=f"--set {section}.min_margin={margins.max():g}, or raise its max_chars" if len(margins) else "add data",
    )
