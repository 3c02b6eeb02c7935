"""Which human comparisons a step trains on and which it is measured on."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from datasets import Dataset

from steps.config import Pairs
from steps.errors import DataError
from steps.training import even_batches

COLUMNS = ["prompt", "chosen", "rejected"]


def training_and_held_out(preferences: Path, config: Pairs) -> tuple[Dataset, Dataset, int]:
    """Training pairs as the recipe asks for them, held-out pairs whatever they are, and the batch for the latter.

    Held-out pairs are cut to full batches. Both are sorted by length, which saves padding and changes no mean; the
    order of training is the sampler's.

    Raises:
        DataError: nothing is left to train on.
    """
    table = pd.read_parquet(preferences)
    table["length"] = table[["chosen", "rejected"]].map(len).max(axis=1)
    fit = (table["part"] == "train") & ~(table["margin"] < config.min_margin)  # a pair without a margin fits
    if config.max_chars is not None:
        fit &= table["length"] <= config.max_chars
    train = table[fit].head(config.pairs)
    held_out = _held_out(table, preferences)
    count, batch = even_batches(min(config.held_out, len(held_out)))
    if train.empty:
        bound = f" and answers of at most {config.max_chars} characters" if config.max_chars else ""
        raise DataError(
            "no training pair is left",
            where=str(preferences),
            have=f"none with a margin of {config.min_margin} or more{bound}",
            then="lower min_margin or raise max_chars in the recipe",
        )
    return _dataset(train), _dataset(held_out.head(count)), batch


def held_out_pairs(preferences: Path, count: int) -> pd.DataFrame:
    """The first held-out pairs, whatever they are.

    Raises:
        DataError: there is none.
    """
    return _held_out(pd.read_parquet(preferences), preferences)[COLUMNS].head(count)


def _held_out(table: pd.DataFrame, where: Path) -> pd.DataFrame:
    pairs = table[table["part"] == "held_out"]
    if pairs.empty:
        raise DataError("there are no held-out pairs", where=str(where), then="add data, or change the split")
    return pairs


def _dataset(pairs: pd.DataFrame) -> Dataset:
    return Dataset.from_pandas(pairs.sort_values("length", kind="stable")[COLUMNS], preserve_index=False)
