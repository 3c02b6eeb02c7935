"""Statistics of comparisons. Pure functions; every one names its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint


@dataclass(frozen=True)
class WinRate:
    """How often one model's answer was preferred to another's.

    Attributes:
        wins, ties, losses: of the first model.
        rate: (wins + ½ ties) / n.
        low, high: Wilson interval of the rate.
        p_value: exact two-sided sign test of wins against losses; ties say nothing.
    """

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float
    p_value: float

    @property
    def n(self) -> int:
        return self.wins + self.ties + self.losses


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209).

    Args:
        successes: may be fractional, with ties counted ½.
        n: number of trials, at least 1.

    Returns:
        lower and upper bound, inside [0, 1].
    """
    if n < 1:
        raise ValueError("an interval needs at least one trial")
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    return float(low), float(high)


def win_rate(
    scores: Sequence[float] | np.ndarray,
    against: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    tie_width: float = 1e-9,
) -> WinRate:
    """Win rate from a judge's scores of two answers to each prompt.

    Args:
        scores, against: (n,), higher is better, prompt by prompt.
        tie_width: a difference no larger than this is a tie.
    """
    first, second = np.asarray(scores, float), np.asarray(against, float)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ValueError("win_rate compares two non-empty lists of the same length")
    difference = first - second
    if not np.isfinite(difference).all():
        raise ValueError("a score is not a number")
    wins = int((difference > tie_width).sum())
    losses = int((difference < -tie_width).sum())
    ties = len(difference) - wins - losses
    successes = wins + ties / 2
    low, high = wilson(successes, len(difference), confidence)
    decided = wins + losses
    p_value = float(stats.binomtest(wins, decided).pvalue) if decided else 1.0
    return WinRate(wins, ties, losses, successes / len(difference), low, high, p_value)


def pair_accuracy(chosen: Sequence[float] | np.ndarray, rejected: Sequence[float] | np.ndarray) -> float:
    """Share of pairs whose chosen side scores higher, a tie counted ½.

    Args:
        chosen, rejected: (n,).
    """
    difference = np.asarray(chosen, float) - np.asarray(rejected, float)
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n (Li et al. 2016, arXiv:1510.03055, §5.2): different n-grams over all n-grams, words by spaces.

    Near 0 when a model says the same thing to everybody.
    """
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
