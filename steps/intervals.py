"""Intervals of a proportion or a mean preference. Pure functions; every one names its source.

A preference is a verdict on one prompt as seen by the model under test: 1 won, 0 lost, ½ a tie, and anything between
where a judge gives a probability.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from scipy import optimize, special, stats
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.proportion import proportion_confint

Numbers = Sequence[float] | np.ndarray
CHUNK = 1 << 22  # draws held at once by the bootstrap: 32 MB


def checked_preferences(preferences: Numbers) -> np.ndarray:
    """(n,) preferences as floats.

    Raises:
        ValueError: none, not a list, a missing one, or one outside [0, 1].
    """
    verdicts = np.asarray(preferences, float)
    if verdicts.ndim != 1 or not len(verdicts):
        raise ValueError("preferences are a non-empty list")
    if not np.isfinite(verdicts).all():
        raise ValueError("a preference is not a number")
    if verdicts.min() < 0 or verdicts.max() > 1:
        raise ValueError(f"preferences lie in [0, 1], found {verdicts.min():g} to {verdicts.max():g}")
    return verdicts


def standard_error(preferences: Numbers) -> float:
    """Standard error of the mean preference, s / √n with s² = Σ(x − x̄)² / (n − 1); NaN for a single one.

    A hundred times this is the `standard_error` of AlpacaEval's leaderboards.
    """
    return float(stats.sem(preferences)) if len(checked_preferences(preferences)) > 1 else math.nan


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209).

    Args:
        successes: may be fractional, with ties counted ½. The interval is then too wide, since a tie varies less than
            a win or a loss does: see `score_interval`.
        n: number of trials, at least 1.

    Returns:
        lower and upper bound, inside [0, 1].
    """
    if n < 1:
        raise ValueError("an interval needs at least one trial")
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    return float(low), float(high)


def score_interval(wins: int, ties: int, losses: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a win rate whose ties count ½, knowing that a tie varies less than a win or a loss does.

    The rate is (1 + θ) / 2 with θ = P(win) − P(loss), the difference of two paired proportions, whose score interval is
    Tango's (1998, Stat. Med. 17, p. 891, eq. 10 and 17): the θ that the score test does not reject, P(loss) being its
    likeliest under that θ. Without ties that is Wilson's.

    Returns:
        lower and upper bound, inside [0, 1].
    """
    n = wins + ties + losses
    if not ties:
        return wilson(wins, n, confidence)
    critical = float(stats.norm.ppf((1 + confidence) / 2))
    low = _least_difference(wins, losses, n, critical)
    high = -_least_difference(losses, wins, n, critical)
    return (1 + low) / 2, (1 + high) / 2


def _least_difference(wins: int, losses: int, n: int, critical: float) -> float:
    """The least θ = P(win) − P(loss) that lies no more than `critical` standard errors below what was seen."""

    def excess(theta: float) -> float:
        slope = -(wins + losses) + (2 * n - wins + losses) * theta
        lost = (math.sqrt(max(0.0, slope**2 + 8 * n * losses * theta * (1 - theta))) - slope) / (4 * n)
        return wins - losses - n * theta - critical * math.sqrt(max(0.0, n * (2 * lost + theta * (1 - theta))))

    if not (wins or losses):  # the root is known, and what was seen would be taken for one
        return -(critical**2) / (n + critical**2)
    seen = (wins - losses) / n
    return float(optimize.brentq(excess, -1.0, seen, xtol=1e-14))


def normal_interval(preferences: Numbers, confidence: float = 0.95) -> tuple[float, float]:
    """Mean ± z · `standard_error` (Wald), as leaderboards have it. May leave [0, 1], and is empty where all agree."""
    half = float(stats.norm.ppf((1 + confidence) / 2)) * standard_error(preferences)
    mean = float(np.mean(preferences))
    return mean - half, mean + half


def cluster_interval(
    preferences: Numbers, clusters: Sequence[Hashable], confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean when verdicts on the same prompt hang together.

    Cluster-robust variance of a mean (Liang & Zeger 1986, Biometrika 73, p. 13) times G / (G − 1), with Student's t of
    G − 1 degrees of freedom (Cameron & Miller 2015, J. Hum. Resour. 50, §VI). With one verdict a prompt that is the
    t interval. May leave [0, 1].

    Args:
        preferences: (n,).
        clusters: (n,) which prompt each verdict is on; G different ones, at least 2.
    """
    verdicts, codes, count = in_clusters(preferences, clusters)
    if count < 2:
        raise ValueError("a cluster-robust interval needs at least two clusters")
    fit = OLS(verdicts, np.ones(len(verdicts))).fit(cov_type="cluster", cov_kwds={"groups": codes}, use_t=True)
    low, high = fit.conf_int(1 - confidence)[0]
    return float(low), float(high)


def bootstrap_interval(
    preferences: Numbers,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    *,
    resamples: int = 10_000,
    method: Literal["bca", "percentile"] = "bca",
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of the mean by drawing whole prompts with replacement.

    The pair of answers stays together, and so do all verdicts on a prompt. BCa corrects the percentiles for bias and
    acceleration, the latter from the jackknife over prompts (Efron 1987, J. Am. Stat. Assoc. 82, eq. 2.3).

    Args:
        preferences: (n,).
        clusters: (n,) which prompt each verdict is on; None where each has its own.

    Returns:
        lower and upper bound, inside [0, 1]; both the mean where all prompts have the same one.
    """
    verdicts, codes, count = in_clusters(preferences, clusters)
    sums, sizes = np.bincount(codes, verdicts, count), np.bincount(codes, minlength=count)
    mean = sums.sum() / sizes.sum()
    if np.ptp(sums / sizes) == 0:
        return float(mean), float(mean)
    rng, means = np.random.default_rng(seed), np.empty(resamples)
    rows = max(1, CHUNK // count)
    for first in range(0, resamples, rows):
        drawn = rng.integers(count, size=(min(rows, resamples - first), count))
        means[first : first + rows] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return bounds_of_draws(means, sums, sizes, confidence, method)


def bounds_of_draws(
    drawn: np.ndarray, sums: np.ndarray, sizes: np.ndarray, confidence: float, method: Literal["bca", "percentile"]
) -> tuple[float, float]:
    """Interval of a mean over clusters from the means of resamples of them.

    Args:
        drawn: (resamples,).
        sums, sizes: (G,) of each cluster.
    """
    levels = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if method == "bca":
        left_out = (sums.sum() - sums) / (sizes.sum() - sizes)
        levels = bca_levels(levels, drawn, sums.sum() / sizes.sum(), left_out)
    low, high = np.quantile(drawn, levels)
    return float(low), float(high)


def bca_levels(levels: np.ndarray, drawn: np.ndarray, value: float, left_out: np.ndarray) -> np.ndarray:
    """Which quantiles of the bootstrap's draws to take instead of `levels` (Efron 1987, eq. 2.3).

    Args:
        drawn: the statistic in each resample; one that equals `value` counts half below it.
        value: the statistic itself.
        left_out: the statistic without each unit in turn.
    """
    below = ((drawn < value).mean() + (drawn <= value).mean()) / 2
    bias = special.ndtri(np.clip(below, 0.5 / len(drawn), 1 - 0.5 / len(drawn)))
    influence = left_out.mean() - left_out
    spread = (influence**2).sum() ** 1.5
    acceleration = (influence**3).sum() / (6 * spread) if spread > 0 else 0.0
    shifted = bias + special.ndtri(levels)
    return special.ndtr(bias + shifted / (1 - acceleration * shifted))


def in_clusters(preferences: Numbers, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray, int]:
    """(n,) preferences, (n,) numbers of their clusters, and how many clusters there are."""
    verdicts = checked_preferences(preferences)
    if clusters is None:
        return verdicts, np.arange(len(verdicts)), len(verdicts)
    if len(clusters) != len(verdicts):
        raise ValueError(f"{len(clusters)} clusters for {len(verdicts)} preferences")
    codes, labels = numbered(clusters)
    return verdicts, codes, len(labels)


def numbered(labels: Sequence[Hashable]) -> tuple[np.ndarray, list[Hashable]]:
    """(n,) numbers for labels of any kind, and the different labels in the order in which they first came."""
    number = {label: position for position, label in enumerate(dict.fromkeys(labels))}
    return np.fromiter((number[label] for label in labels), int, len(labels)), list(number)
