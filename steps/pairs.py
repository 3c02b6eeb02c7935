"""Which human comparisons a step trains on and which it is measured on."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from datasets import Dataset

from steps.datasets import read_table
from steps.enough import fit
from steps.errors import DataError
from steps.sections import Pairs
from steps.training import even_batches

COLUMNS = ["prompt", "chosen", "rejected"]


def fitting_pairs(preferences: Path, config: Pairs) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All training pairs that are as the recipe asks for them, and all held-out pairs, whatever they are.

    Returns:
        either with all columns of the table and `length`, the characters of the longer answer.

    Raises:
        DataError: nothing is left to train on, or nothing is held out.
    """
    table = read_table(preferences)
    table["length"] = table[["chosen", "rejected"]].map(len).max(axis=1)
    train, held_out = table[table["part"] == "train"], _held_out(table, preferences)
    train = train[fit(train, config)]
    if train.empty:
        bound = f" and answers of at most {config.max_chars} characters" if config.max_chars else ""
        raise DataError(
            "no training pair is left",
            where=str(preferences),
            have=f"none with a margin of {config.min_margin} or more{bound}",
            then="lower min_margin or raise max_chars in the recipe",
        )
    return train, held_out


def first_pairs(train: pd.DataFrame, held_out: pd.DataFrame, config: Pairs) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """As many pairs as the recipe asks for, those held out cut to full batches, and the batch for the latter.

    Both are sorted by length, which saves padding and changes no mean; the order of training is the sampler's.
    """
    count, batch = even_batches(min(config.held_out, len(held_out)))
    return _by_length(train.head(config.pairs)), _by_length(held_out.head(count)), batch


def training_and_held_out(preferences: Path, config: Pairs) -> tuple[Dataset, Dataset, int]:
    """Training pairs as the recipe asks for them, held-out pairs whatever they are, and the batch for the latter.

    Raises:
        DataError: nothing is left to train on.
    """
    train, held_out, batch = first_pairs(*fitting_pairs(preferences, config), config)
    return _dataset(train), _dataset(held_out), batch


def held_out_pairs(preferences: Path, count: int) -> pd.DataFrame:
    """The first held-out pairs, whatever they are.

    Raises:
        DataError: there is none.
    """
    return _held_out(read_table(preferences), preferences)[COLUMNS].head(count)


def _held_out(table: pd.DataFrame, where: Path) -> pd.DataFrame:
    pairs = table[table["part"] == "held_out"]
    if pairs.empty:
        raise DataError("there are no held-out pairs", where=str(where), then="add data, or change the split")
    return pairs


def _by_length(pairs: pd.DataFrame) -> pd.DataFrame:
    return pairs.sort_values("length", kind="stable")


def _dataset(pairs: pd.DataFrame) -> Dataset:
    return Dataset.from_pandas(pairs[COLUMNS], preserve_index=False)
