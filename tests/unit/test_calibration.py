"""Calibration of reward models: models whose calibration is known, and counts by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit, logit

from steps.calibration import accuracy_by, agreement_with_raters, calibration
from steps.intervals import wilson

NAN = math.nan


def test_a_bradley_terry_model_is_calibrated_and_a_loud_one_is_not() -> None:
    """Differences d are right with probability σ(|d|). Doubled, they claim σ(2 |d|) with the same accuracy."""
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(0, 1.5, 20_000))
    differences = np.where(rng.random(20_000) < expit(size), size, -size)
    honest, loud = calibration(differences), calibration(2 * differences)
    assert honest.error < 0.02
    assert loud.error == pytest.approx((expit(2 * size) - expit(size)).mean(), abs=0.01)
    assert loud.accuracy == honest.accuracy
    assert loud.log_loss > honest.log_loss


def test_calibration_by_hand() -> None:
    """Confidences 0.6, 0.6 (one right) and 0.9 (right) in five bins: 2/3 · |0.5 − 0.6| + 1/3 · |1 − 0.9| = 0.1."""
    found = calibration([logit(0.6), -logit(0.6), logit(0.9)], bins=5)
    assert found.error == pytest.approx(0.1)
    assert found.accuracy == pytest.approx(2 / 3)
    assert (found.low, found.high) == wilson(2, 3)
    assert sum(group.n for group in found.bins) == 3
    assert [group.n for group in calibration([logit(0.57), -logit(0.57), logit(0.93)], bins=5).bins] == [2, 1]
    assert found.log_loss == pytest.approx(-(math.log(0.6) + math.log(0.4) + math.log(0.9)) / 3)


def test_a_model_that_knows_nothing_is_calibrated() -> None:
    found = calibration([0, 0, 0])
    assert (found.accuracy, found.error) == (0.5, 0)
    assert found.log_loss == pytest.approx(math.log(2))


def test_huge_differences_are_sure() -> None:
    found = calibration([1000, 1000, -1000, 1000])
    assert found.error == pytest.approx(0.25)
    assert found.log_loss == pytest.approx(250)


def test_bins_hold_every_pair_once_and_stay_inside_their_edges() -> None:
    found = calibration(np.random.default_rng(1).normal(0.5, 2, 500))
    assert sum(group.n for group in found.bins) == found.n == 500
    for group in found.bins:
        assert group.low - 1e-12 <= group.predicted <= group.high + 1e-12
        assert group.accuracy_low <= group.accuracy <= group.accuracy_high
    assert sum(group.n * group.accuracy for group in found.bins) / 500 == pytest.approx(found.accuracy)


def test_accuracy_rises_with_the_margin() -> None:
    rng = np.random.default_rng(2)
    margins = rng.uniform(0, 4, 4000)
    found = accuracy_by(margins + rng.normal(0, 2, 4000), margins)
    assert [group.n for group in found] == [1000] * 4
    accuracies = [group.accuracy for group in found]
    assert accuracies == sorted(accuracies)
    assert found[0].high <= found[1].low


def test_accuracy_by_length_finds_a_model_of_length() -> None:
    """A model that rewards length is right where the chosen answer is longer and nowhere else."""
    length = np.arange(-50, 50) + 0.5
    found = accuracy_by(length, length)
    assert [group.accuracy for group in found] == [0, 0, 1, 1]


def test_equal_values_stay_together_and_missing_ones_are_left_out() -> None:
    found = accuracy_by([1, -1, 1, 1, 1, -1], [0, 0, 0, 0, 5, NAN])
    assert sum(group.n for group in found) == 5
    assert [(group.low, group.high, group.n) for group in found] == [(0, 0, 4), (5, 5, 1)]
    assert [(group.n, group.accuracy) for group in accuracy_by([1, -1], [3, 3])] == [(2, 0.5)]
    assert accuracy_by([1.0], [NAN]) == ()


def test_agreement_with_raters_by_hand() -> None:
    """Two of three raters with the model; one, who ties, counts ½. Raters: pairs ++, +−, +−: 1 of 3; and a lone one."""
    found = agreement_with_raters([2, -1, 5], [[1, 1, -1], [0, NAN, NAN], [NAN, NAN, NAN]])
    assert (found.model, found.n) == (pytest.approx((2 / 3 + 0.5) / 2), 2)
    assert found.raters == pytest.approx(1 / 3)
    assert found.low <= found.model <= found.high


def test_a_perfect_model_is_above_the_ceiling_of_raters() -> None:
    """Raters right with 0.8: each agrees with the truth in 0.8, with another in 0.68."""
    rng = np.random.default_rng(3)
    truth = rng.choice([-1, 1], (3000, 1))
    ratings = np.where(rng.random((3000, 5)) < 0.8, truth, -truth)
    found = agreement_with_raters(truth[:, 0], ratings)
    assert found.model == pytest.approx(0.8, abs=0.02)
    assert found.raters == pytest.approx(0.68, abs=0.02)
    assert math.isnan(agreement_with_raters([1.0], [[1.0]]).raters)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: calibration([]), "non-empty"),
        (lambda: calibration([NAN]), "not a number"),
        (lambda: calibration([1], bins=0), "at least one bin"),
        (lambda: accuracy_by([1], [1, 2]), "to go by"),
        (lambda: accuracy_by([1], [1], bins=0), "at least one bin"),
        (lambda: agreement_with_raters([1], [1]), "one row for each of 1"),
        (lambda: agreement_with_raters([1], [[NAN, NAN]]), "no pair"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
