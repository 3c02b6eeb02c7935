"""Which pairs a step trains on and which it is measured on."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from steps.errors import DataError
from steps.pairs import COLUMNS, training_and_held_out
from steps.sections import Pairs


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """40 training pairs of margins 0.1 to 4.0, then 50 held-out ones; answers of different length."""
    rows = [
        {
            "prompt": f"p{number}",
            "chosen": "c" * (1 + number * 7 % 11) + str(number),
            "rejected": "r" * (1 + number * 5 % 13) + str(number),
            "margin": (number % 40 + 1) / 10,
            "part": "train" if number < 40 else "held_out",
        }
        for number in range(90)
    ]
    path = tmp_path / "preferences.parquet"
    pd.DataFrame(rows).to_parquet(path)
    return path


def prompts(rows) -> set[str]:
    return set(rows["prompt"])


def test_everything_is_taken_when_nothing_is_asked_for(table: Path) -> None:
    train, held_out, batch = training_and_held_out(table, Pairs(held_out=50))
    assert prompts(train) == {f"p{number}" for number in range(40)}
    assert prompts(held_out) == {f"p{number}" for number in range(40, 72)}
    assert batch == 32
    assert train.column_names == held_out.column_names == COLUMNS


def test_the_margin_is_a_least_one_and_bounds_training_alone(table: Path) -> None:
    train, held_out, _ = training_and_held_out(table, Pairs(min_margin=3.0, held_out=32))
    assert prompts(train) == {f"p{number}" for number in range(29, 40)}
    assert len(held_out) == 32


def test_a_pair_without_a_margin_is_fit_for_training(table: Path) -> None:
    frame = pd.read_parquet(table)
    frame.loc[3, "margin"] = None
    frame.to_parquet(table)
    train, _, _ = training_and_held_out(table, Pairs(min_margin=4.0))
    assert prompts(train) == {"p3", "p39"}


def test_long_answers_are_left_out_of_training_alone(table: Path) -> None:
    train, held_out, _ = training_and_held_out(table, Pairs(max_chars=6, held_out=32))
    frame = pd.read_parquet(table)
    longer = frame[["chosen", "rejected"]].map(len).max(axis=1)
    assert prompts(train) == set(frame[(frame["part"] == "train") & (longer <= 6)]["prompt"])
    assert 0 < len(train) < 40
    assert len(held_out) == 32


def test_the_number_of_pairs_is_counted_behind_the_margin(table: Path) -> None:
    train, _, _ = training_and_held_out(table, Pairs(min_margin=3.0, pairs=4))
    assert prompts(train) == {"p29", "p30", "p31", "p32"}


@pytest.mark.parametrize(("asked", "count", "batch"), [(400, 32, 32), (40, 32, 32), (20, 20, 20), (1, 1, 1)])
def test_held_out_pairs_fill_their_batches(table: Path, asked: int, count: int, batch: int) -> None:
    _, held_out, size = training_and_held_out(table, Pairs(held_out=asked))
    assert (len(held_out), size) == (count, batch)
    assert prompts(held_out) == {f"p{number}" for number in range(40, 40 + count)}


def test_no_pair_left_says_what_was_asked_for(table: Path) -> None:
    with pytest.raises(DataError) as caught:
        training_and_held_out(table, Pairs(min_margin=9))
    text = str(caught.value)
    assert "no training pair is left" in text
    assert str(table) in text
    assert "9.0 or more" in text
    assert "lower min_margin" in text


def test_no_held_out_pair_is_a_data_error(table: Path) -> None:
    frame = pd.read_parquet(table)
    frame[frame["part"] == "train"].to_parquet(table)
    with pytest.raises(DataError):
        training_and_held_out(table, Pairs())
