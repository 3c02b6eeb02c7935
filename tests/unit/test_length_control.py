"""Win rate at equal length: symmetries, judges whose liking is known, and the package statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy.stats import norm

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
    found = length_controlled_win_rate(verdicts(2 * length_term(one, two)), one, two)
    assert found.raw > 0.6
    assert found.rate == pytest.approx(0.5, abs=0.03)
    assert found.low <= 0.5 <= found.high
    assert found.length_effect == pytest.approx(2, abs=0.2)


def test_even_if_it_always_takes_the_longer() -> None:
    """The logistic model then has no finite fit of its own; the ridge gives it one."""
    one, two = lengths(2000, 1.8)
    found = length_controlled_win_rate((one > two).astype(float), one, two)
    assert found.raw > 0.65
    assert found.rate == pytest.approx(0.5, abs=0.06)
    assert found.low <= 0.5 <= found.high


def test_a_known_rate_comes_back_whichever_side_is_longer() -> None:
    """Log-odds 0.8 at equal length is a rate of 0.690."""
    for longer in (0.5, 1.0, 2.0):
        one, two = lengths(6000, longer)
        found = length_controlled_win_rate(verdicts(0.8 + 1.5 * length_term(one, two)), one, two)
        assert found.rate == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.025)
        assert found.low < found.rate < found.high


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
        there = length_controlled_win_rate(judged, one, two, difficulty=difficulty)
        back = length_controlled_win_rate(1 - judged, two, one, difficulty=difficulty)
        assert there.rate == pytest.approx(1 - back.rate, abs=1e-6)
        assert (there.low, there.high) == pytest.approx((1 - back.high, 1 - back.low), abs=1e-6)


def test_the_unit_of_length_does_not_matter() -> None:
    one, two = lengths(200, 1.3)
    judged = verdicts(length_term(one, two))
    characters = length_controlled_win_rate(judged, one, two)
    tokens = length_controlled_win_rate(judged, one / 4, two / 4)
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
    found = length_controlled_win_rate(judged, one, two, difficulty=hard)
    assert found.rate == pytest.approx(theirs.predict(even).mean(), abs=1e-3)
    assert found.length_effect == pytest.approx(theirs.params[1], abs=1e-2)


def test_leaving_difficulty_out_moves_the_rate_little() -> None:
    """With weights as published for AlpacaEval 2 (about −1.5, 0.9 and −0.6) and difficulties of deviation 1.5."""
    one, two = lengths(805, 0.8)
    hard = 1.5 * np.random.default_rng(7).standard_normal(805)
    judged = verdicts(-0.6 + 1.5 * length_term(one, two) + 0.9 * hard)
    without = length_controlled_win_rate(judged, one, two)
    within = length_controlled_win_rate(judged, one, two, difficulty=hard)
    assert without.rate == pytest.approx(within.rate, abs=0.015)


def test_the_interval_is_the_robust_one_of_statsmodels() -> None:
    """Papke & Wooldridge's fractional logit with variances by prompt; statsmodels corrects by n as well, for G groups
    G / (G − 1) · (n − 1) / (n − k). No ridge there, so the agreement is to a few per mille of the width."""
    one, two = lengths(3000, 1.4)
    prompts = np.arange(3000) // 3
    judged = np.round(
        verdicts(0.3 + 1.2 * length_term(one, two)) * 0.8 + 0.1 * np.random.default_rng(2).random(3000), 1
    )
    terms = np.stack([np.ones(3000), length_term(one, two)], 1)
    theirs = sm.GLM(judged, terms, family=sm.families.Binomial()).fit(cov_type="cluster", cov_kwds={"groups": prompts})
    half = norm.ppf(0.975) * theirs.bse[0] / math.sqrt(2999 / 2998)
    found = length_controlled_win_rate(judged, one, two, clusters=prompts)
    bounds = [math.log(bound / (1 - bound)) for bound in (found.low, found.high)]
    assert bounds == pytest.approx([theirs.params[0] - half, theirs.params[0] + half], abs=0.005 * half)


def test_a_difficulty_that_explains_nothing_leaves_the_interval() -> None:
    one, two = lengths(2000, 1.2)
    judged = verdicts(0.4 + length_term(one, two))
    alone = length_controlled_win_rate(judged, one, two)
    beside = length_controlled_win_rate(judged, one, two, difficulty=np.random.default_rng(9).standard_normal(2000))
    assert beside.high - beside.low == pytest.approx(alone.high - alone.low, rel=0.02)


def test_saying_everything_thrice_adds_nothing() -> None:
    """Every verdict three times over on its own prompt: no new prompts, no narrower interval but for the ridge."""
    one, two = lengths(150, 1.3)
    judged = verdicts(length_term(one, two))
    tripled = [np.tile(column, 3) for column in (judged, one, two)]
    once = length_controlled_win_rate(judged, one, two)
    whole = length_controlled_win_rate(*tripled, clusters=list(range(150)) * 3)
    apart = length_controlled_win_rate(*tripled)
    assert whole.high - whole.low == pytest.approx(once.high - once.low, rel=0.01)
    assert apart.high - apart.low == pytest.approx((once.high - once.low) / math.sqrt(3), rel=0.03)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """400 experiments of 50 prompts: a standard error of 0.011 about 0.95."""
    held = 0
    for seed in range(400):
        one, two = lengths(50, 1.3, seed)
        found = length_controlled_win_rate(verdicts(0.8 + 1.5 * length_term(one, two), seed + 1000), one, two)
        held += found.low <= 1 / (1 + math.exp(-0.8)) <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_one_verdict_has_a_rate_and_no_interval() -> None:
    found = length_controlled_win_rate([1], [4], [4])
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_a_model_that_always_wins_keeps_its_rate() -> None:
    one, two = lengths(50, 1.2)
    found = length_controlled_win_rate([1] * 50, one, two)
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
