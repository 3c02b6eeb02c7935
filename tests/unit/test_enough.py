"""Whether data suffice for a recipe, before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from steps.config import Recipe
from steps.enough import check
from steps.errors import DataError


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate({"name": "a", "model": {"base": "tiny"}, "evaluate": {"prompts": 3}, **sections})


def tables(folder: Path, margins: tuple[float | None, ...] = (None, None), held_out: int = 1) -> dict[str, Path]:
    """Pairs of these margins to train on, some held out, and three prompts."""
    rows = [{"part": "train", "chosen": "long one", "rejected": "b", "margin": margin} for margin in margins]
    rows += [{"part": "held_out", "chosen": "c", "rejected": "d", "margin": None}] * held_out
    found = {
        "preferences": pd.DataFrame(rows).astype({"margin": float}),
        "prompts": pd.DataFrame({"prompt": list("xyz")}),
    }
    for name, table in found.items():
        table.to_parquet(folder / f"{name}.parquet")
    return {name: folder / f"{name}.parquet" for name in found}


def test_what_suffices_passes(tmp_path: Path) -> None:
    check(recipe(reward={"min_margin": 2}), tables(tmp_path))  # a pair without a margin fits
    check(recipe(reward={"min_margin": 2}, policy={"dpo": {"min_margin": 2}}), tables(tmp_path, (1.0, 2.0)))


@pytest.mark.parametrize(
    ("sections", "margins", "told"),
    [
        ({"evaluate": {"prompts": 4}}, (None,), "--set evaluate.prompts=3"),
        ({"reward": {"min_margin": 2.5}}, (1.0, 2.0), "--set reward.min_margin=2"),
        ({"policy": {"dpo": {"min_margin": 2.5}}}, (2.0,), "--set policy.dpo.min_margin=2"),
        (
            {"policy": {"method": "kto", "dpo": {"min_margin": 2.5}}},
            (2.0,),
            "section policy.dpo asks for margins of 2.5",
        ),
        ({"policy": {"dpo": {"max_chars": 3}}}, (None,), "answers of at most 3 characters"),
        (
            {"policy": {"method": "chain_of_hindsight", "chain_of_hindsight": {"min_margin": 9}}},
            (2.0,),
            "policy.chain_of_hindsight",
        ),
    ],
)
def test_what_a_later_step_would_lack_is_told_with_what_helps(
    sections: dict, margins: tuple[float | None, ...], told: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as lacking:
        check(recipe(**sections), tables(tmp_path, margins))
    assert told in str(lacking.value)


def test_pairs_that_no_method_needs_are_not_asked_for(tmp_path: Path) -> None:
    given = recipe(policy={"method": "ppo", "dpo": {"min_margin": 9}})
    check(given, tables(tmp_path, (2.0,)))


def test_nothing_held_out_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no held-out pairs"):
        check(recipe(), tables(tmp_path, held_out=0))
