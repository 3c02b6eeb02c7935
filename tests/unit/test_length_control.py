"""Win rate at equal length: symmetries, judges whose liking is known, and the package statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm

from steps.length_control import length_controlled_win_rate


def lengths(n: int, longer: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Answer lengths, the first side's longer by a factor."""
    rng = np.random.default_rng(seed)
    return rng.lognormal(6, 0.7, n) * longer, rng.lognormal(6, 0.7, n)


def length_term(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return np.tanh((one - two) / (one - two).std(ddof=1))


def verdicts(log_odds: np.ndarray, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).random(len(log_odds)) < 1 / (1 + np.exp(-log_odds))).astype(float)


def test_a_judge_that_looks_at_length_alone_prefers_neither_model() -> None:
    one, two = lengths(4000, 1.8)
    found = length_controlled_win_rate(verdicts(2 * length_term(one, two)), one, two, resamples=200)
    assert found.raw > 0.6
    assert found.rate == pytest.approx(0.5, abs=0.03)
    assert found.low <= 0.5 <= found.high
    assert found.length_effect == pytest.approx(2, abs=0.2)


def test_even_if_it_always_takes_the_longer() -> None:
    """The logistic model then has no finite fit of its own; the ridge gives it one."""
    one, two = lengths(2000, 1.8)
    found = length_controlled_win_rate((one > two).astype(float), one, two, resamples=100)
    assert found.raw > 0.65
    assert found.rate == pytest.approx(0.5, abs=0.06)
    assert found.low <= 0.5 <= found.high


def test_a_known_rate_comes_back_whichever_side_is_longer() -> None:
    """Log-odds 0.8 at equal length is a rate of 0.690."""
    for longer in (0.5, 1.0, 2.0):
        one, two = lengths(6000, longer)
        found = length_controlled_win_rate(verdicts(0.8 + 1.5 * length_term(one, two)), one, two, resamples=0)
        assert found.rate == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.025)
        assert math.isnan(found.low)


def test_equal_lengths_leave_the_raw_rate() -> None:
    preferences = [1, 1, 0, 0.5, 1, 0.25]
    found = length_controlled_win_rate(preferences, [7] * 6, [7] * 6)
    assert found.rate == pytest.approx(np.mean(preferences), abs=1e-6)
    assert found.length_effect == 0
    assert found.low < found.rate < found.high


def test_swapping_the_sides_turns_the_rate_round() -> None:
    one, two = lengths(300, 1.5)
    hard = np.random.default_rng(5).standard_normal(300)
    judged = verdicts(0.5 + length_term(one, two) + hard)
    for difficulty in (None, hard):
        there = length_controlled_win_rate(judged, one, two, difficulty=difficulty, resamples=100)
        back = length_controlled_win_rate(1 - judged, two, one, difficulty=difficulty, resamples=100)
        assert there.rate == pytest.approx(1 - back.rate, abs=1e-6)
        assert (there.low, there.high) == pytest.approx((1 - back.high, 1 - back.low), abs=1e-6)


def test_the_unit_of_length_does_not_matter() -> None:
    one, two = lengths(200, 1.3)
    judged = verdicts(length_term(one, two))
    characters = length_controlled_win_rate(judged, one, two, resamples=50)
    tokens = length_controlled_win_rate(judged, one / 4, two / 4, resamples=50)
    assert characters.rate == pytest.approx(tokens.rate)


def test_it_is_the_fit_that_statsmodels_makes() -> None:
    """But for the small ridge: with 5000 verdicts the two rates agree to a thousandth."""
    one, two = lengths(5000, 1.4)
    hard = np.random.default_rng(6).standard_normal(5000)
    judged = verdicts(-0.4 + 1.2 * length_term(one, two) + 0.9 * hard)
    terms = np.stack([np.ones(5000), length_term(one, two), hard], 1)
    theirs = sm.GLM(judged, terms, family=sm.families.Binomial()).fit()
    even = terms.copy()
    even[:, 1] = 0
    found = length_controlled_win_rate(judged, one, two, difficulty=hard, resamples=0)
    assert found.rate == pytest.approx(theirs.predict(even).mean(), abs=1e-3)
    assert found.length_effect == pytest.approx(theirs.params[1], abs=1e-2)


def test_leaving_difficulty_out_moves_the_rate_little() -> None:
    """With weights as published for AlpacaEval 2 (about −1.5, 0.9 and −0.6) and difficulties of deviation 1.5."""
    one, two = lengths(805, 0.8)
    hard = 1.5 * np.random.default_rng(7).standard_normal(805)
    judged = verdicts(-0.6 + 1.5 * length_term(one, two) + 0.9 * hard)
    without = length_controlled_win_rate(judged, one, two, resamples=0)
    within = length_controlled_win_rate(judged, one, two, difficulty=hard, resamples=0)
    assert without.rate == pytest.approx(within.rate, abs=0.015)


def test_prompts_are_drawn_whole() -> None:
    """Every verdict three times over on its own prompt: no new prompts, no narrower interval."""
    one, two = lengths(150, 1.3)
    judged = verdicts(length_term(one, two))
    ids = list(range(150)) * 3
    tripled = [np.tile(column, 3) for column in (judged, one, two)]
    once = length_controlled_win_rate(judged, one, two, resamples=400)
    width = once.high - once.low
    whole = length_controlled_win_rate(*tripled, clusters=ids, resamples=400)
    apart = length_controlled_win_rate(*tripled, resamples=400)
    assert whole.high - whole.low == pytest.approx(width, rel=0.1)
    assert apart.high - apart.low < 0.75 * width


def test_a_model_that_always_wins_keeps_its_rate() -> None:
    one, two = lengths(50, 1.2)
    found = length_controlled_win_rate([1] * 50, one, two, resamples=20)
    assert found.rate == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("preferences", "one", "two", "said"),
    [
        ([1, 0, 1], [9, 9, 9], [4, 4, 4], "cannot be told"),
        ([1], [9], [4], "cannot be told"),
        ([1, 0], [9, math.nan], [4, 4], "missing"),
        ([1, 0], [9], [4, 4], "shape"),
        ([1, 2], [9, 8], [4, 4], "lie in"),
        ([], [], [], "non-empty"),
    ],
)
def test_what_cannot_be_fitted_is_refused(preferences: list, one: list, two: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        length_controlled_win_rate(preferences, one, two)
