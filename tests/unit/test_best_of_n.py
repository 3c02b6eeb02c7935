"""Best of n: what many candidates say about fewer, and how far it can be from its start."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from steps.best_of_n import answers_drawn, curve, tune_policy
from steps.policy_config import BestOfN
from steps.reward_model import Reading
from steps.tracking import NullTracker


def test_the_curve_is_the_mean_over_all_subsets() -> None:
    draw = np.random.default_rng(0)
    rewards, gold = draw.normal(size=(3, 8)), draw.normal(size=(3, 8))
    points = curve(rewards, {"gold": gold})
    assert [point["n"] for point in points] == [1, 2, 4, 8]
    for point in points:
        chosen = [
            gold[row, max(subset, key=lambda i: rewards[row, i])]
            for row in range(3)
            for subset in itertools.combinations(range(8), int(point["n"]))
        ]
        assert point["gold"] == pytest.approx(np.mean(chosen), rel=1e-12)


def test_one_is_the_mean_and_all_is_the_best() -> None:
    rewards = np.array([[1.0, 3.0, 2.0, 0.0]])
    first, *_, last = curve(rewards, {"gold": np.array([[10.0, 20.0, 30.0, 40.0]])})
    assert (first["gold"], first["kl"]) == (25.0, 0.0)
    assert last["gold"] == 20.0
    assert last["kl"] == pytest.approx(math.log(4) - 3 / 4)


def test_the_reward_never_falls_with_more_candidates() -> None:
    rewards = np.random.default_rng(1).normal(size=(50, 16))
    values = [point["reward"] for point in curve(rewards, {"reward": rewards})]
    assert values == sorted(values)


def test_a_number_of_candidates_that_is_no_power_of_two_keeps_the_smaller_ones() -> None:
    assert [point["n"] for point in curve(np.zeros((1, 6)), {})] == [1, 2, 4]


def test_the_policy_is_the_start_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "sft/adapter").mkdir(parents=True)
    (tmp_path / "sft/adapter/adapter_config.json").write_text("{}")
    (tmp_path / "reward/adapter").mkdir(parents=True)
    (tmp_path / "reward/adapter/reward.json").write_text('{"mean": 3.0}')
    out = tmp_path / "out"
    out.mkdir()
    facts = tune_policy(
        BestOfN(n=4), sft=tmp_path / "sft", reward=tmp_path / "reward", seed=0, out=out, tracker=NullTracker()
    )
    assert facts == {"method": "best_of_n", "n": 4, "kl_bound": pytest.approx(math.log(4) - 3 / 4)}
    assert answers_drawn(out / "adapter") == 4
    assert answers_drawn(tmp_path / "sft/adapter") == 1
    assert json.loads((out / "adapter/decoding.json").read_text()) == {"best_of": 4}
    assert Reading.of(out / "adapter/reward").mean == 3.0
