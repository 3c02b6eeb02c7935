"""The sequential test: its error under optional stopping, and that it finds what is there."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from steps.sequential import SequentialTest


def stops(drawn: np.ndarray, confidence: float) -> Counter:
    """How rows of verdicts end when looked at after every one."""
    ends: Counter = Counter()
    for row in drawn.tolist():
        test = SequentialTest(confidence, steps=2)
        for verdict in row:
            if test.see(verdict) != "undecided":
                break
        ends[test.decision] += 1
    return ends


def test_looking_after_every_verdict_of_equals_keeps_the_error() -> None:
    """At most 20 % of 200 runs may end; a test at 20 % after every verdict would end most of them."""
    ends = stops(np.random.default_rng(0).choice([0, 0.5, 1], (200, 100), p=[0.4, 0.2, 0.4]), 0.8)
    assert 200 - ends["undecided"] <= 40
    assert ends["better"] > 0 < ends["worse"], "a test that never ends keeps every error"


def test_a_clear_difference_ends_early_and_on_the_right_side() -> None:
    drawn = (np.random.default_rng(1).random((25, 150)) < 0.75).astype(float)
    assert stops(drawn, 0.95)["better"] >= 24
    assert stops(1 - drawn, 0.95)["worse"] >= 24


def test_ties_make_it_quicker_than_coins_with_the_same_mean() -> None:
    """Bets follow the variance seen: 30 % wins and 70 % ties show sooner than 65 % wins."""
    ended = {}
    for name, shares in {"ties": [0, 0.7, 0.3], "coins": [0.35, 0, 0.65]}.items():
        test, ended[name] = SequentialTest(steps=2), 0
        for verdict in np.random.default_rng(2).choice([0, 0.5, 1], 2000, p=shares):
            if test.see(verdict) != "undecided":
                break
        ended[name] = test.n
    assert ended["ties"] < ended["coins"]


def test_the_capital_after_one_verdict_by_hand() -> None:
    """At α = 0.05 the first bet √(2 log 40 / (¼ log 2)) is cut to ½ / m at m = ½, so one win makes 1 into 1.5. Six wins
    would need 1.5^n ≥ 40, n ≥ 9.1, were the bet always cut; as it shrinks with time, nine cannot be enough."""
    test = SequentialTest(0.95)
    for _ in range(9):
        assert test.see(1) == "undecided"


def test_only_wins_end_as_soon_as_capital_allows() -> None:
    test = SequentialTest(0.95)
    while test.see(1) == "undecided":
        assert test.n < 15
    assert test.n >= 10


def test_the_interval_narrows_and_holds_the_mean() -> None:
    test, before = SequentialTest(), (0.0, 1.0)
    for verdict in np.random.default_rng(3).choice([0, 0.5, 1], 300, p=[0.2, 0.2, 0.6]).tolist():
        test.see(verdict)
        low, high = test.interval
        assert before[0] <= low < high <= before[1]
        before = low, high
    assert low < test.rate < high
    assert low < 0.7 < high
    assert high - low < 0.25


def test_swapping_the_sides_mirrors_everything() -> None:
    one, two = SequentialTest(), SequentialTest()
    mirrored = {"better": "worse", "worse": "better", "undecided": "undecided"}
    for verdict in np.random.default_rng(4).choice([0, 0.5, 1], 150, p=[0.15, 0.15, 0.7]).tolist():
        assert two.see(1 - verdict) == mirrored[one.see(verdict)]
        assert two.interval == pytest.approx((1 - one.interval[1], 1 - one.interval[0]))
    assert one.decision == "better"


def test_a_decision_is_what_the_interval_says_and_stays() -> None:
    test = SequentialTest(value=0.6)
    for verdict in [1] * 40 + [0] * 200:
        was = test.decision
        test.see(verdict)
        assert was == "undecided" or test.decision == was
        assert (test.decision == "better") == (test.interval[0] >= 0.6)
    assert test.decision == "better"


def test_the_grid_does_not_change_the_decision() -> None:
    drawn = (np.random.default_rng(5).random(200) < 0.7).tolist()
    coarse, fine = SequentialTest(steps=2), SequentialTest(steps=1000)
    assert [coarse.see(verdict) for verdict in drawn] == [fine.see(verdict) for verdict in drawn]


def test_before_the_first_verdict_nothing_is_known() -> None:
    test = SequentialTest()
    assert (test.decision, test.interval, test.n) == ("undecided", (0, 1), 0)
    assert math.isnan(test.rate)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_what_is_no_preference_is_refused_and_forgotten(wrong: float) -> None:
    test = SequentialTest()
    with pytest.raises(ValueError):
        test.see(wrong)
    assert test.n == 0


@pytest.mark.parametrize("wrong", [{"confidence": 1}, {"confidence": 0}, {"value": 0}, {"value": 1}])
def test_settings_that_cannot_be_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError):
        SequentialTest(**wrong)
