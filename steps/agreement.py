"""How far judges and raters agree, with each other and with themselves. Pure functions; every one names its source.

A verdict on a pair of answers is a preference for the first answer: 1 it is better, 0 the other is, ½ neither. NaN
stands for a verdict that is missing; what each function does without it is said there.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from scipy import stats
from statsmodels.stats.inter_rater import aggregate_raters, cohens_kappa
from statsmodels.stats.inter_rater import fleiss_kappa as _fleiss_kappa

from steps.intervals import Numbers, bootstrap_interval, normal_interval, numbered, wilson

Ratings = Sequence[Sequence[float]] | np.ndarray


@dataclass(frozen=True)
class Share:
    """A share of n cases with its Wilson interval; all NaN where there was no case."""

    share: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Kappa:
    """Agreement of two beyond chance.

    Attributes:
        kappa: 1 full agreement, 0 what chance would give; NaN where both only ever say one and the same thing.
        low, high: normal interval with the large-sample variance.
        observed: share of cases in which they say the same.
        n: cases that both spoke about.
    """

    kappa: float
    low: float
    high: float
    observed: float
    n: int


@dataclass(frozen=True)
class SwapConsistency:
    """What a judge does when the two answers change places.

    Attributes:
        same: verdicts that stayed with the same answer (or tied both times).
        first: among verdicts that were no tie, those for the answer shown first; ½ for a judge without a liking.
    """

    same: Share
    first: Share


@dataclass(frozen=True)
class LengthBias:
    """How much a judge likes the longer answer.

    Attributes:
        longer: decided verdicts for the longer answer, over pairs of different length.
        human_longer: the same of people, on the pairs that both decided; None without people.
        excess, low, high: the judge's share less the people's on those same pairs, with a normal interval for paired
            verdicts; NaN without people.
    """

    longer: Share
    human_longer: Share | None
    excess: float
    low: float
    high: float


@dataclass(frozen=True)
class Ceiling:
    """How far raters agree among themselves, which is as far as a judge can be held to them.

    Attributes:
        rater_against_rater: chance that two raters of the same item say the same, mean over items.
        low, high: bootstrap over items.
        rater_against_rest: chance that a rater says what most of the others say; where several lead, 1 over how many.
        items: those with at least two raters.
    """

    rater_against_rater: float
    low: float
    high: float
    rater_against_rest: float
    items: int


def share_of(cases: Numbers | Sequence[bool], confidence: float = 0.95) -> Share:
    """The share of cases that are true, a tie given as ½; a missing case (NaN) is left out."""
    given = np.asarray(cases, float)
    given = given[~np.isnan(given)]
    if not len(given):
        return Share(math.nan, math.nan, math.nan, 0)
    return Share(float(given.mean()), *wilson(float(given.sum()), len(given), confidence), len(given))


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable], confidence: float = 0.95) -> Kappa:
    """Agreement of two raters beyond chance (Cohen 1960, Educ. Psychol. Meas. 20, p. 37).

    Args:
        first, second: (n,) labels of any kind, case by case; a case that either left out (NaN, None) does not count.
    """
    _same_length(first=first, second=second)
    both = [pair for pair in zip(first, second, strict=True) if not any(map(_missing, pair))]
    if not both:
        raise ValueError("no case has a label from both")
    n = len(both)
    codes, labels = numbered([one for one, _ in both] + [two for _, two in both])
    observed = float((codes[:n] == codes[n:]).mean())
    if len(labels) == 1:
        return Kappa(math.nan, math.nan, math.nan, observed, n)
    table = np.zeros((len(labels), len(labels)))
    np.add.at(table, (codes[:n], codes[n:]), 1)
    found = cohens_kappa(table)
    half = float(stats.norm.ppf((1 + confidence) / 2) * found.std_kappa)
    return Kappa(float(found.kappa), float(found.kappa) - half, float(found.kappa) + half, observed, n)


def fleiss_kappa(ratings: Ratings) -> float:
    """Agreement of several raters beyond chance (Fleiss 1971, Psychol. Bull. 76, p. 378).

    Args:
        ratings: (items, raters) category numbers. It needs as many ratings on every item: items with a missing one
            are left out (`krippendorff_alpha` uses them).

    Returns:
        1 for full agreement, 0 for chance; NaN where only one category is ever used.
    """
    table = _ratings(ratings)
    full = table[~np.isnan(table).any(1)]
    if not len(full):
        raise ValueError("no item has a rating from every rater")
    counts, categories = aggregate_raters(full)
    return float(_fleiss_kappa(counts, method="fleiss")) if len(categories) > 1 else math.nan


def krippendorff_alpha(ratings: Ratings, level: Literal["nominal", "interval"] = "nominal") -> float:
    """1 − observed / expected disagreement, with any number of raters an item (Krippendorff 2011, "Computing
    Krippendorff's alpha-reliability", §C to §E).

    Args:
        ratings: (items, raters), NaN where there is none; items with fewer than two are left out.
        level: `nominal` counts different as 1; `interval` takes the squared difference.

    Returns:
        1 for full agreement, 0 for chance; NaN where all ratings are the same.
    """
    values, counts = _counted(ratings)
    sizes = counts.sum(1, keepdims=True)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(values))
    together = (pairs / (sizes[:, :, None] - 1)).sum(0)
    totals = together.sum(0)
    apart = values[:, None] - values
    cost = apart**2 if level == "interval" else (apart != 0).astype(float)
    expected = float((np.outer(totals, totals) * cost).sum() / (totals.sum() - 1))
    return 1 - float((together * cost).sum()) / expected if expected else math.nan


def swap_consistency(first_order: Numbers, second_order: Numbers, confidence: float = 0.95) -> SwapConsistency:
    """Does a judge say the same when the answers change places? (Zheng et al. 2023, arXiv:2306.05685, table 2)

    Args:
        first_order: (n,) preferences for answer A, which was shown first.
        second_order: (n,) preferences for the same answer A, shown second. A case with either missing is left out.
    """
    one, two = _verdicts(first_order=first_order, second_order=second_order)
    both = ~(np.isnan(one) | np.isnan(two))
    side, swapped = np.sign(one[both] - 0.5), np.sign(two[both] - 0.5)
    for_first = np.concatenate([side, -swapped])
    return SwapConsistency(share_of(side == swapped, confidence), share_of(for_first[for_first != 0] > 0, confidence))


def right_in_both_orders(
    first_order: Numbers, second_order: Numbers, truth: Numbers, confidence: float = 0.95
) -> Share:
    """Share of pairs judged as people judge them whichever answer is shown first; a tie is not right.

    Guessing gives ¼, and always naming the first answer gives 0.

    Args:
        first_order, second_order: as in `swap_consistency`.
        truth: (n,) preferences of people; pairs on which they tie, or with anything missing, are left out.
    """
    one, two, people = _verdicts(first_order=first_order, second_order=second_order, truth=truth)
    wanted = np.sign(people - 0.5)
    use = (wanted != 0) & ~np.isnan(one + two + people)
    right = (np.sign(one - 0.5) == wanted) & (np.sign(two - 0.5) == wanted)
    return share_of(right[use], confidence)


def length_bias(
    preferences: Numbers,
    lengths: Numbers,
    against_lengths: Numbers,
    human: Numbers | None = None,
    confidence: float = 0.95,
) -> LengthBias:
    """How often a judge is for the longer answer, and how much oftener than people on the same pairs.

    Long answers may be better: only the excess over people is bias (Saito et al. 2023, arXiv:2310.10076, §2).

    Args:
        preferences: (n,) the judge's for answer A.
        lengths, against_lengths: (n,) of answer A and the other one. Pairs of equal length tell nothing.
        human: (n,) preferences of people.
    """
    (judge,) = _verdicts(preferences=preferences)
    one, two = _columns(lengths=lengths, against_lengths=against_lengths)
    _same_length(preferences=judge, lengths=one)
    longer = _for_longer(judge, one - two)
    if human is None:
        return LengthBias(share_of(longer, confidence), None, math.nan, math.nan, math.nan)
    (people,) = _verdicts(human=human)
    _same_length(preferences=judge, human=people)
    told = _for_longer(people, one - two)
    both = ~np.isnan(longer + told)
    excess = longer[both] - told[both]
    low, high = normal_interval((excess + 1) / 2, confidence) if len(excess) else (math.nan, math.nan)
    return LengthBias(
        longer=share_of(longer, confidence),
        human_longer=share_of(told[both], confidence),
        excess=float(excess.mean()) if len(excess) else math.nan,
        low=2 * low - 1,
        high=2 * high - 1,
    )


def rater_ceiling(ratings: Ratings, confidence: float = 0.95, seed: int = 0) -> Ceiling:
    """How far raters agree among themselves: the ceiling for whoever is measured against them.

    Args:
        ratings: (items, raters) category numbers or preferences, NaN where there is none. Columns need not be the same
            person throughout.
    """
    values, counts = _counted(ratings)
    raters = counts.sum(1)
    same = (counts * (counts - 1)).sum(1) / (raters * (raters - 1))
    low, high = bootstrap_interval(same, confidence=confidence, seed=seed)
    against_rest = np.zeros(len(counts))
    for own in range(len(values)):
        rest = counts - np.eye(len(values), dtype=int)[own]
        most = rest.max(1)
        agrees = (rest[:, own] == most) / (rest == most[:, None]).sum(1)
        against_rest += counts[:, own] * agrees
    return Ceiling(float(same.mean()), low, high, float((against_rest / raters).mean()), len(counts))


def rater_pairs(ratings: Ratings) -> dict[tuple[int, int], Kappa]:
    """Cohen's κ of each two raters (columns) that have items in common."""
    table = _ratings(ratings)
    found = {}
    for one, two in combinations(range(table.shape[1]), 2):
        both = ~np.isnan(table[:, one] + table[:, two])
        if both.any():
            found[one, two] = cohen_kappa(table[both, one].tolist(), table[both, two].tolist())
    return found


def _for_longer(preferences: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """(n,) 1 where the longer answer is preferred, 0 where the shorter one is, NaN where nothing can be said."""
    told = np.sign(preferences - 0.5) * np.sign(difference)
    return np.where(np.isnan(told) | (told == 0), np.nan, (told > 0).astype(float))


def _missing(label: Hashable) -> bool:
    return label is None or label != label


def _counted(ratings: Ratings) -> tuple[np.ndarray, np.ndarray]:
    """(values,) that were given, and (items, values) how often, over items with two ratings or more.

    Raises:
        ValueError: there is no such item.
    """
    table = _ratings(ratings)
    table = table[(~np.isnan(table)).sum(1) > 1]
    if not len(table):
        raise ValueError("no item has two ratings")
    values = np.unique(table[~np.isnan(table)])
    return values, (table[:, :, None] == values).sum(1)


def _ratings(ratings: Ratings) -> np.ndarray:
    table = np.asarray(ratings, float)
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError("ratings are a table of items and at least two raters")
    return table


def _same_length(**lists: Sequence | np.ndarray) -> None:
    counts = {name: len(given) for name, given in lists.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        said = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"these belong together case by case: {said}")


def _columns(**lists: Numbers) -> list[np.ndarray]:
    """The lists as floats of one length, NaN allowed."""
    _same_length(**lists)
    return [np.asarray(given, float) for given in lists.values()]


def _verdicts(**lists: Numbers) -> list[np.ndarray]:
    columns = _columns(**lists)
    for name, column in zip(lists, columns, strict=True):
        if ((column < 0) | (column > 1)).any():
            raise ValueError(f"{name} holds a preference outside [0, 1]")
    return columns
