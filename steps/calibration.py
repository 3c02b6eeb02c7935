"""Is a reward model right, how sure is it, and is it as often right as it is sure? Pure functions with their sources.

A difference is the reward of the chosen answer less that of the rejected one; under Bradley–Terry its logistic
function is the probability that the chosen answer is preferred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_expit

from steps.intervals import Numbers, bootstrap_interval, wilson


@dataclass(frozen=True)
class Bin:
    """Pairs that are alike in something.

    Attributes:
        low, high: of that something: the confidence, the margin, the difference in length.
        n: pairs.
        predicted: mean confidence of the model; what the accuracy would be, were it calibrated.
        accuracy: share in the right order, a tie of rewards counted ½.
        accuracy_low, accuracy_high: Wilson interval of the accuracy.
    """

    low: float
    high: float
    n: int
    predicted: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True)
class Calibration:
    """A reward model on held-out pairs.

    Attributes:
        accuracy, low, high: share in the right order with its Wilson interval, a tie counted ½.
        error: expected calibration error, in points of 1.
        log_loss: mean of −log σ(difference), in nats; log 2 for a model that knows nothing.
        n: pairs.
        bins: for a reliability diagram; empty ones are left out.
    """

    accuracy: float
    low: float
    high: float
    error: float
    log_loss: float
    n: int
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class RaterAgreement:
    """A model against single raters, beside what raters reach among themselves.

    Attributes:
        model: chance that the model orders a pair as a rater of it does; a tie on either side counts ½.
        low, high: bootstrap over pairs.
        raters: chance that two raters of a pair order it alike, the same way of counting; NaN where no pair has two.
        n: pairs with at least one rating.
    """

    model: float
    low: float
    high: float
    raters: float
    n: int


def calibration(differences: Numbers, bins: int = 10, confidence: float = 0.95) -> Calibration:
    """Accuracy and calibration of a reward model.

    Of two answers the model predicts the one with the higher reward, with confidence σ(|difference|) in [½, 1]. That
    range is cut into bins of equal width; ECE = Σ_m |B_m| / n · |acc(B_m) − conf(B_m)| (Guo et al. 2017,
    arXiv:1706.04599, eq. 3).

    Args:
        differences: (n,) reward of chosen − rejected.
        bins: from ½ to 1.
    """
    margins = _differences(differences)
    if bins < 1:
        raise ValueError("calibration needs at least one bin")
    sure = expit(np.abs(margins))
    # The upper edge belongs to the bin, as in the paper; ½ itself to the first.
    number = np.clip(np.ceil((sure - 0.5) * 2 * bins).astype(int) - 1, 0, bins - 1)
    edges = np.linspace(0.5, 1, bins + 1)
    found = [_bin(margins[number == m], edges[m], edges[m + 1], confidence) for m in range(bins) if (number == m).any()]
    right = _right(margins)
    low, high = wilson(float(right.sum()), len(right), confidence)
    return Calibration(
        accuracy=float(right.mean()),
        low=low,
        high=high,
        error=sum(group.n * abs(group.accuracy - group.predicted) for group in found) / len(margins),
        log_loss=float(-log_expit(margins).mean()),
        n=len(margins),
        bins=tuple(found),
    )


def accuracy_by(differences: Numbers, by: Numbers, bins: int = 4, confidence: float = 0.95) -> tuple[Bin, ...]:
    """Accuracy over quantiles of something known about each pair, in rising order.

    Args:
        differences: (n,) reward of chosen − rejected.
        by: (n,) such as the margin that people gave, or the length of chosen − rejected. Equal values stay together,
            so there may be fewer bins than asked for, and of different sizes; rows with NaN are left out.
    """
    margins, values = _differences(differences), np.asarray(by, float)
    if values.shape != margins.shape:
        raise ValueError(f"{len(margins)} differences, and values of shape {values.shape} to go by")
    if bins < 1:
        raise ValueError("accuracy_by needs at least one bin")
    margins, values = margins[~np.isnan(values)], values[~np.isnan(values)]
    if not len(values):
        return ()
    edges = np.unique(np.quantile(values, np.arange(1, bins) / bins))
    number = np.searchsorted(edges, values)
    groups = [(margins[number == m], values[number == m]) for m in np.unique(number)]
    return tuple(_bin(inside, known.min(), known.max(), confidence) for inside, known in groups)


def agreement_with_raters(
    differences: Numbers, ratings: Numbers, confidence: float = 0.95, seed: int = 0
) -> RaterAgreement:
    """How often a model orders a pair as a single person does, and how often two people do.

    Args:
        differences: (n,) the model's reward of answer A − answer B.
        ratings: (n, raters) each person's A − B, or anything with that sign; 0 a tie, NaN where there is none.
    """
    margins, table = _differences(differences), np.asarray(ratings, float)
    if table.ndim != 2 or len(table) != len(margins):
        raise ValueError(f"ratings are a table with one row for each of {len(margins)} pairs, not {table.shape}")
    side = np.sign(table)
    rated = (~np.isnan(side)).sum(1)
    if not rated.any():
        raise ValueError("no pair has a rating")
    alike = (1 + np.sign(margins)[:, None] * side) / 2
    model = np.nansum(alike, 1)[rated > 0] / rated[rated > 0]
    # Over all ordered pairs of different raters: (Σ s)² − Σ s² of their signs.
    several = rated > 1
    total, squares = np.nansum(side, 1)[several], np.nansum(side**2, 1)[several]
    products = (total**2 - squares) / (rated[several] * (rated[several] - 1))
    low, high = bootstrap_interval(model, confidence=confidence, seed=seed)
    raters = float((1 + products).mean() / 2) if several.any() else math.nan
    return RaterAgreement(float(model.mean()), low, high, raters, int((rated > 0).sum()))


def _bin(margins: np.ndarray, low: float, high: float, confidence: float) -> Bin:
    right = _right(margins)
    bounds = wilson(float(right.sum()), len(right), confidence)
    sure = float(expit(np.abs(margins)).mean())
    return Bin(float(low), float(high), len(right), sure, float(right.mean()), *bounds)


def _right(margins: np.ndarray) -> np.ndarray:
    return (1 + np.sign(margins)) / 2


def _differences(differences: Numbers) -> np.ndarray:
    margins = np.asarray(differences, float)
    if margins.ndim != 1 or not len(margins):
        raise ValueError("differences are a non-empty list")
    if not np.isfinite(margins).all():
        raise ValueError("a difference is not a number")
    return margins
