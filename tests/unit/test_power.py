"""How many prompts a comparison needs: the textbook's formula, and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from steps.intervals import normal_interval, wilson
from steps.power import detectable_effect, prompts_needed


def test_three_points_from_even() -> None:
    """((1.959964 · 0.5 + 0.841621 · √(0.53 · 0.47)) / 0.03)² = 2177.5."""
    assert prompts_needed(0.03) == 2178


def test_the_effect_is_the_inverse() -> None:
    for ties in (0.0, 0.3):
        for effect in (0.02, 0.1, 0.3):
            n = prompts_needed(effect, tie_share=ties)
            assert detectable_effect(n, tie_share=ties) <= effect
            assert detectable_effect(n - 1, tie_share=ties) > effect


def test_a_fall_is_as_hard_to_see_as_a_rise() -> None:
    assert prompts_needed(-0.04) == prompts_needed(0.04)


def test_more_power_and_more_confidence_cost_prompts_and_ties_spare_some() -> None:
    plain = prompts_needed(0.05)
    assert prompts_needed(0.05, power=0.9) > plain
    assert prompts_needed(0.05, confidence=0.99) > plain
    assert prompts_needed(0.05, tie_share=0.5, interval="normal") < prompts_needed(0.05, tie_share=0.5) < plain


@pytest.mark.parametrize(
    ("effect", "ties", "interval"), [(0.05, 0.0, "wilson"), (0.08, 0.4, "wilson"), (0.08, 0.4, "normal")]
)
def test_that_many_prompts_show_the_effect_as_often_as_said(effect: float, ties: float, interval: str) -> None:
    """Four in five of 1500 experiments, with a standard error of 0.010."""
    n = prompts_needed(effect, tie_share=ties, interval=interval)
    wins = 0.5 + effect - ties / 2
    drawn = np.random.default_rng(0).multinomial(n, [wins, ties, 1 - wins - ties], size=1500)
    shown = 0
    for won, tied, lost in drawn.tolist():
        if interval == "wilson":
            low, _ = wilson(won + tied / 2, n)
        else:
            low, _ = normal_interval(np.repeat([1, 0.5, 0], [won, tied, lost]), 0.95)
        shown += low > 0.5
    assert 0.77 <= shown / 1500 <= 0.83


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"effect": 0}, "effect of 0"),
        ({"effect": 0.6}, "cannot be"),
        ({"effect": 0.3, "tie_share": 0.6}, "cannot be"),
        ({"effect": 0.1, "power": 1.5}, "power lies in"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prompts_needed(**wrong)


def test_too_few_prompts_show_nothing() -> None:
    for n in (0, 2):
        with pytest.raises(ValueError):
            detectable_effect(n)
