"""Win rate at equal length: what is left of a preference when its judge's liking for long answers is taken out.

Dubois et al. 2024, arXiv:2404.04475, eq. 1-3: a logistic model of the verdict with a term for the model, one for the
difference in length, and one for how hard the prompt is; the controlled rate is its prediction without the second.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from steps.intervals import CHUNK, Numbers, in_clusters

NEWTON = 100
RIDGE = 0.1  # of the terms beside the model's: keeps them finite for a judge that looks at nothing else


@dataclass(frozen=True)
class ControlledRate:
    """A win rate at equal length.

    Attributes:
        rate: mean predicted preference, were both answers to every prompt equally long.
        low, high: percentile bootstrap over prompts.
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
    resamples: int = 1000,
    seed: int = 0,
) -> ControlledRate:
    """Win rate at equal length (Dubois et al. 2024, arXiv:2404.04475, eq. 1-3), with a bootstrap interval.

    log-odds = θ + φ tanh(Δ / s) + ψ · difficulty, Δ the difference in length and s its standard deviation. Δ is not
    centred, so that 0 stays equal length. Fitted to verdicts in [0, 1] by quasi-likelihood (Papke & Wooldridge 1996,
    J. Appl. Econom. 11, p. 619). θ is free; φ and ψ are held by a ridge of 0.1. AlpacaEval chooses an L1 penalty by
    cross-validation instead, and adds its baseline's own long and short answers as data.

    Swapping the sides turns the rate into 1 − rate. Where one side is longer throughout, θ and φ explain the same
    thing and the interval is wide.

    Args:
        preferences: (n,) in [0, 1].
        lengths, against_lengths: (n,) of the model's answers and the other's, in characters or tokens.
        difficulty: (n,) how hard each prompt is, centred; None leaves that term out.
        clusters: (n,) which prompt each verdict is on; None where each has its own.
        resamples: 0 for no interval; its bounds are then NaN.

    Raises:
        ValueError: lengths that are missing or of another number, or the same difference, not 0, on every prompt.
    """
    verdicts, codes, count = in_clusters(preferences, clusters)
    features = [np.ones(len(verdicts)), _length_term(lengths, against_lengths, len(verdicts))]
    if difficulty is not None:
        features.append(_column("difficulty", difficulty, len(verdicts)))
    terms = np.stack(features, 1)
    once = np.ones((1, len(verdicts)))
    fitted = _fit(terms, verdicts, once, np.zeros((1, terms.shape[1])), NEWTON)
    rate = _rates(terms, fitted, once)[0]
    low = high = float("nan")
    if resamples:
        rng, found = np.random.default_rng(seed), []
        rows = max(1, CHUNK // (8 * len(verdicts)))
        for first in range(0, resamples, rows):
            drawn = rng.multinomial(count, np.full(count, 1 / count), size=min(rows, resamples - first))
            weights = drawn[:, codes].astype(float)
            start = np.repeat(fitted, len(weights), 0)
            found.append(_rates(terms, _fit(terms, verdicts, weights, start, NEWTON), weights))
        tail = (1 - confidence) / 2
        low, high = (float(bound) for bound in np.quantile(np.concatenate(found), [tail, 1 - tail]))
    return ControlledRate(float(rate), low, high, float(verdicts.mean()), float(fitted[0, 1]), len(verdicts))


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


def _fit(terms: np.ndarray, verdicts: np.ndarray, weights: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """(R, k) coefficients of R weighted logistic fits at once, by Newton's method.

    Args:
        terms: (n, k); the first is the model's and carries no penalty.
        weights: (R, n) how often each row counts in each fit.
        start: (R, k).
    """
    penalty = np.full(terms.shape[1], RIDGE)
    penalty[0] = 0
    products = (terms[:, :, None] * terms[:, None, :]).reshape(len(terms), -1)
    found = start.copy()
    for _ in range(steps):
        predicted = _logistic(found @ terms.T)
        gradient = (weights * (verdicts - predicted)) @ terms - penalty * found
        curvature = ((weights * predicted * (1 - predicted)) @ products).reshape(len(found), *2 * penalty.shape)
        curvature = curvature + np.diag(penalty + 1e-6)
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        step = np.clip(step, -1, 1)  # from far off, a full step would overshoot
        found += step
        if np.abs(step).max() < 1e-8:
            break
    return found


def _rates(terms: np.ndarray, fitted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) mean prediction at equal length."""
    if terms.shape[1] == 2:
        return _logistic(fitted[:, 0])
    even = terms.copy()
    even[:, 1] = 0
    return (weights * _logistic(fitted @ even.T)).sum(1) / weights.sum(1)


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
