"""Win rate at equal length: what is left of a preference when its judge's liking for long answers is taken out.

Dubois et al. 2024, arXiv:2404.04475, eq. 1-3: a logistic model of the verdict with a term for the model, one for the
difference in length, and one for how hard the prompt is; the controlled rate is its prediction without the second.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from steps.intervals import Numbers, in_clusters

NEWTON = 100
RIDGE = 0.1  # of the terms beside the model's: keeps them finite for a judge that looks at nothing else


@dataclass(frozen=True)
class ControlledRate:
    """A win rate at equal length.

    Attributes:
        rate: mean predicted preference, were both answers to every prompt equally long.
        low, high: robust interval by prompt; NaN for a single one.
        raw: the mean preference as it is.
        length_effect: log-odds that tanh(1) ≈ 0.76 of a standardised length difference is worth, per unit of tanh;
            above 0 where the judge likes long answers, 0 where lengths are equal throughout.
        n: verdicts.
    """

    rate: float
    low: float
    high: float
    raw: float
    length_effect: float
    n: int


def length_controlled_win_rate(
    preferences: Numbers,
    lengths: Numbers,
    against_lengths: Numbers,
    *,
    difficulty: Numbers | None = None,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> ControlledRate:
    """Win rate at equal length (Dubois et al. 2024, arXiv:2404.04475, eq. 1-3), with a robust interval.

    log-odds = θ + φ tanh(Δ / s) + ψ · difficulty, Δ the difference in length and s its standard deviation. Δ is not
    centred, so that 0 stays equal length. Fitted to verdicts in [0, 1] by quasi-likelihood (Papke & Wooldridge 1996,
    J. Appl. Econom. 11, p. 619). θ is free; φ and ψ are held by a ridge of 0.1. AlpacaEval chooses an L1 penalty by
    cross-validation instead, and adds its baseline's own long and short answers as data.

    The interval is symmetric in the rate's log-odds: the sandwich variance of Papke & Wooldridge (eq. 9), its scores
    summed by prompt (Liang & Zeger 1986, Biometrika 73, p. 13) and times G / (G − 1), with normal quantiles, as Stata's
    `fracreg` has it. Where nearly all verdicts agree it is too narrow.

    Swapping the sides turns the rate into 1 − rate. Where one side is longer throughout, θ and φ explain the same
    thing and the interval is wide.

    Args:
        preferences: (n,) in [0, 1].
        lengths, against_lengths: (n,) of the model's answers and the other's, in characters or tokens.
        difficulty: (n,) how hard each prompt is, centred; None leaves that term out.
        clusters: (n,) which prompt each verdict is on, G different ones; None where each has its own.

    Raises:
        ValueError: lengths that are missing or of another number, or the same difference, not 0, on every prompt.
    """
    verdicts, codes, count = in_clusters(preferences, clusters)
    features = [np.ones(len(verdicts)), _length_term(lengths, against_lengths, len(verdicts))]
    if difficulty is not None:
        features.append(_column("difficulty", difficulty, len(verdicts)))
    terms = np.stack(features, 1)
    fitted, curvature = _fit(terms, verdicts)
    even = terms.copy()
    even[:, 1] = 0
    likely = _logistic(even @ fitted)
    rate = likely.mean()
    scores = np.zeros((count, terms.shape[1]))
    np.add.at(scores, codes, terms * (verdicts - _logistic(terms @ fitted))[:, None])
    # How the rate's log-odds move with the coefficients, and these with the scores.
    gradient = (likely * (1 - likely)) @ even / len(even) / (rate * (1 - rate))
    influence = scores @ np.linalg.solve(curvature, gradient)
    low, high = _around(rate, float((influence**2).sum()), count, confidence)
    return ControlledRate(float(rate), low, high, float(verdicts.mean()), float(fitted[1]), len(verdicts))


def _around(rate: float, variance: float, count: int, confidence: float) -> tuple[float, float]:
    """Bounds of a rate from the variance of its log-odds over `count` prompts; NaN below two."""
    if count < 2:
        return math.nan, math.nan
    half = stats.norm.ppf((1 + confidence) / 2) * math.sqrt(variance * count / (count - 1))
    low, high = _logistic(np.log(rate / (1 - rate)) + np.array([-half, half])).tolist()
    return low, high


def _length_term(lengths: Numbers, against: Numbers, n: int) -> np.ndarray:
    """(n,) tanh of the length difference over its standard deviation."""
    difference = _column("lengths", lengths, n) - _column("against_lengths", against, n)
    if not difference.any():
        return difference
    scale = difference.std(ddof=1) if n > 1 else 0.0
    if scale < 1e-9 * np.abs(difference).max():
        raise ValueError("every length difference is the same: length cannot be told from the model")
    return np.tanh(difference / scale)


def _column(name: str, values: Numbers, n: int) -> np.ndarray:
    column = np.asarray(values, float)
    if column.shape != (n,):
        raise ValueError(f"{name} has shape {column.shape} for {n} preferences")
    if not np.isfinite(column).all():
        raise ValueError(f"{name} holds a missing number")
    return column


def _fit(terms: np.ndarray, verdicts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(k,) coefficients of a logistic fit by Newton's method, and its (k, k) curvature there.

    Args:
        terms: (n, k); the first is the model's and carries no penalty.
    """
    penalty = np.full(terms.shape[1], RIDGE)
    penalty[0] = 0
    found = np.zeros(terms.shape[1])
    for _ in range(NEWTON):
        predicted = _logistic(terms @ found)
        gradient = terms.T @ (verdicts - predicted) - penalty * found
        curvature = (terms.T * (predicted * (1 - predicted))) @ terms + np.diag(penalty + 1e-6)
        step = np.clip(np.linalg.solve(curvature, gradient), -1, 1)  # from far off, a full step would overshoot
        found = found + step
        if np.abs(step).max() < 1e-8:
            break
    return found, curvature


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
