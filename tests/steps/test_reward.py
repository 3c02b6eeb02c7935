"""The reward model under scrutiny: the pairs it was held against, in their order, and what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from steps.models import load_reward_model, load_tokenizer
from steps.reward import scrutiny
from steps.reward_model import reward_scores


@pytest.fixture(scope="module")
def step(finished: Path) -> Path:
    return next((finished / "var/store").glob("reward-*"))


def facts_of(step: Path) -> dict:
    return json.loads((step / "manifest.json").read_text())["facts"]


def test_the_differences_are_those_of_the_saved_model_pair_by_pair(finished: Path, step: Path) -> None:
    pairs = pd.read_parquet(step / "held_out.parquet")
    base = next((finished / "var/store").glob("base-*"))
    model, tokenizer = load_reward_model(base, "float32", step / "adapter"), load_tokenizer(base)
    sides = [
        reward_scores(model, tokenizer, list(pairs["prompt"]), list(pairs[side])) for side in ("chosen", "rejected")
    ]
    assert pairs["difference"].to_numpy() == pytest.approx(sides[0] - sides[1], abs=1e-5)
    assert len(pairs) == facts_of(step)["held_out"]
    assert pairs["margin"].notna().all()


def test_what_is_reported_is_what_the_pairs_say(step: Path) -> None:
    pairs, facts = pd.read_parquet(step / "held_out.parquet"), facts_of(step)
    right = (pairs["difference"] > 0) + 0.5 * (pairs["difference"] == 0)
    assert facts["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    assert facts["log_loss"] == pytest.approx(np.log1p(np.exp(-pairs["difference"])).mean(), rel=1e-6)
    for name in ("reliability", "accuracy_by_length", "accuracy_by_margin"):
        assert sum(part["n"] for part in facts[name]) == len(pairs)


def test_a_model_that_is_sure_and_wrong_half_the_time_is_off_by_half() -> None:
    pairs = pd.DataFrame({"chosen": ["a"] * 40, "rejected": ["bb"] * 40, "difference": [20.0, -20.0] * 20})
    facts = scrutiny(pairs)
    assert facts["calibration_error"] == pytest.approx(0.5, abs=1e-6)
    assert "accuracy_by_margin" not in facts
