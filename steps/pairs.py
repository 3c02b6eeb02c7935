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
    """Training pairs of at least the configured margin, held-out pairs whatever theirs, and the batch for the latter.

    Held-out pairs are cut to full batches and sorted by length, which changes no mean and saves padding.

    Raises:
        DataError: nothing is left to train on.
    """
    table = pd.read_parquet(preferences)
    train = table[(table["part"] == "train") & (table["margin"] >= config.min_margin)].head(config.pairs)
    held_out = table[table["part"] == "held_out"]
    count, batch = even_batches(min(config.held_out, len(held_out)))
    if train.empty:
        raise DataError(
            "no training pair is left",
            where=str(preferences),
            have=f"no pair with a margin of {config.min_margin} or more",
            then="lower min_margin in the recipe",
        )
    held_out = held_out.head(count)
    length = held_out["chosen"].str.len() + held_out["rejected"].str.len()
    return _dataset(train), _dataset(held_out.loc[length.sort_values(kind="stable").index]), batch


def _dataset(pairs: pd.DataFrame) -> Dataset:
    return Dataset.from_pandas(pairs[COLUMNS], preserve_index=False)
