"""Statistics against closed formulas, symmetries and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from steps.statistics import distinct, pair_accuracy, wilson, win_rate

SCORES = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=60)


@pytest.mark.parametrize(("k", "n", "confidence"), [(7, 10, 0.95), (0, 20, 0.95), (20, 20, 0.99), (2.5, 9, 0.9)])
def test_wilson_is_the_closed_formula(k: float, n: int, confidence: float) -> None:
    """Wilson 1927: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)."""
    z, p = norm.ppf((1 + confidence) / 2), k / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert wilson(k, n, confidence) == pytest.approx(expected, abs=1e-12)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_wilson_holds_the_rate_and_stays_inside_zero_and_one(case: tuple[int, int]) -> None:
    twice, n = case
    low, high = wilson(twice / 2, n)
    assert 0 <= low <= high <= 1
    assert low - 1e-12 <= twice / 2 / n <= high + 1e-12


def test_wilson_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)


def test_wilson_covers_as_often_as_it_says() -> None:
    """Exact coverage at n = 200, p = 0.7 is 0.947; 2000 draws have a standard error of 0.005."""
    successes = np.random.default_rng(0).binomial(200, 0.7, size=2000)
    bounds = {k: wilson(k, 200) for k in set(successes.tolist())}
    covered = np.mean([bounds[k][0] <= 0.7 <= bounds[k][1] for k in successes.tolist()])
    assert 0.93 <= covered <= 0.97


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_a_model_against_itself_ties_everywhere(scores: list[float]) -> None:
    found = win_rate(scores, scores)
    assert (found.wins, found.ties, found.losses, found.n) == (0, len(scores), 0, len(scores))
    assert found.rate == 0.5
    assert found.p_value == 1
    assert found.low + found.high == pytest.approx(1)


@given(SCORES)
def test_changing_places_turns_wins_into_losses(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    one, two = win_rate(first, second), win_rate(second, first)
    assert (one.wins, one.ties, one.losses) == (two.losses, two.ties, two.wins)
    assert one.rate == pytest.approx(1 - two.rate)
    assert (one.low, one.high) == pytest.approx((1 - two.high, 1 - two.low))
    assert one.p_value == pytest.approx(two.p_value)


@given(SCORES)
def test_wins_ties_and_losses_are_all_there_is(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = win_rate(first, second)
    assert found.n == len(pairs)
    assert found.rate == pytest.approx((found.wins + found.ties / 2) / found.n)
    assert found.rate == pytest.approx(pair_accuracy(first, second))


def test_the_sign_test_of_five_to_nothing() -> None:
    """Two-sided: 2 · (1/2)^5 = 1/16."""
    assert win_rate([1] * 5, [0] * 5).p_value == pytest.approx(1 / 16)


def test_the_sign_test_of_four_to_one() -> None:
    """Two-sided: 2 · (C(5,0) + C(5,1)) / 2^5 = 12/32."""
    assert win_rate([1, 1, 1, 1, 0], [0, 0, 0, 0, 1]).p_value == pytest.approx(12 / 32)


def test_ties_say_nothing_in_the_sign_test() -> None:
    assert win_rate([1] * 5 + [0] * 50, [0] * 55).p_value == pytest.approx(1 / 16)


def test_a_difference_within_the_tie_width_is_a_tie() -> None:
    found = win_rate([0.5, 0.51, 0.0], [0.0, 0.0, 0.51], tie_width=0.5)
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)


def test_more_confidence_is_a_wider_interval() -> None:
    narrow, wide = (win_rate([1, 1, 0], [0, 0, 1], confidence) for confidence in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("scores", "against"),
    [([], []), ([1, 2], [1, 2, 3]), ([1, 2, 3], [1]), ([[1], [2]], [[1], [2]]), ([math.nan], [1]), ([math.inf], [1])],
)
def test_scores_that_cannot_be_compared_are_refused(scores: list, against: list) -> None:
    with pytest.raises(ValueError):
        win_rate(scores, against)


def test_pair_accuracy_counts_a_tie_as_half() -> None:
    assert pair_accuracy([1, 0, 1, 5], [0, 1, 1, 5]) == 0.5
    assert pair_accuracy([2, 2], [1, 2]) == 0.75
    assert pair_accuracy([1], [0]) == 1
    assert pair_accuracy([0], [1]) == 0


def test_distinct_counts_different_ngrams_over_all() -> None:
    """`a b a b` has the bigrams ab, ba, ab: two of three differ; its words: two of four."""
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b a b"], 1) == pytest.approx(2 / 4)


def test_distinct_is_over_all_texts_and_never_across_two() -> None:
    assert distinct(["a b", "a b"], 2) == 0.5
    assert distinct(["a b", "b a"], 2) == 1
    assert distinct(["a", "b"], 2) == 0
    assert distinct([], 2) == 0
