"""A reward model whose scale is the start policy's: mean 0 and variance 1 on its answers."""

from __future__ import annotations

from pathlib import Path

from steps.artifact import Facts
from steps.baseline import ANSWERS
from steps.config import Lora, Reward
from steps.datasets import read_table
from steps.reward import Side, train_reward
from steps.tracking import Tracker


def train_normalised_reward(
    reward: Reward,
    lora: Lora | None,
    dtype: str,
    *,
    base: Path,
    preferences: Path,
    baseline: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
) -> Facts:
    """As `train_reward`, with the constants of Ziegler et al. 2019 (arXiv:1909.08593, §2.2) beside the weights.

    Args:
        baseline: the start policy's answers to held-out prompts. What people said of those prompts is not looked at.
    """
    start = start_answers(baseline)
    return train_reward(
        reward, lora, dtype, base=base, preferences=preferences, seed=seed, out=out, tracker=tracker, start=start
    )


def start_answers(baseline: Path) -> list[Side]:
    """Prompts and the start's answers to them, at the first of its temperatures."""
    table = read_table(baseline / ANSWERS, columns=["temperature", "prompt", "answer"])
    table = table[table["temperature"] == table["temperature"].iloc[0]]
    return list(zip(table["prompt"], table["answer"], strict=True))
