"""Agreement of judges and raters against published examples, counts by hand, and labels people gave."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from steps.agreement import (
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    length_bias,
    rater_ceiling,
    rater_pairs,
    right_in_both_orders,
    share_of,
    swap_consistency,
)
from steps.intervals import wilson

NAN = math.nan
LLMBAR = Path(__file__).parents[2].parent / "shared/data/llmbar/natural.json"

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", §C: four observers, twelve units.
KRIPPENDORFF = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
).T


def test_cohen_by_hand() -> None:
    """20 both yes, 15 both no, 5 and 10 apart: P_o = 0.7, P_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5, κ = 0.4."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = cohen_kappa(first, second)
    assert (found.kappa, found.observed, found.n) == (pytest.approx(0.4), pytest.approx(0.7), 50)
    assert found.low < 0.4 < found.high


def test_cohen_leaves_out_what_one_did_not_label() -> None:
    found = cohen_kappa([1, 0, NAN, 1, None], [1, 0, 1, NAN, 0])
    assert (found.kappa, found.observed, found.n) == (1, 1, 2)


def test_cohen_of_one_and_the_same_label_is_unknown() -> None:
    found = cohen_kappa([1, 1], [1, 1])
    assert math.isnan(found.kappa)
    assert found.observed == 1


def test_raters_who_guess_agree_as_chance_has_it() -> None:
    first, second = np.random.default_rng(0).integers(0, 2, (2, 4000)).tolist()
    assert abs(cohen_kappa(first, second).kappa) < 0.05


def test_fleiss_published_example() -> None:
    """Ten subjects, fourteen raters, five categories: κ = 0.210 (worked example after Fleiss 1971)."""
    counts = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    ratings = [np.repeat(np.arange(5), row) for row in counts]
    assert fleiss_kappa(ratings) == pytest.approx(0.210, abs=5e-4)


def test_fleiss_uses_items_that_all_rated() -> None:
    full = [[0, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]]
    assert fleiss_kappa([*full, [0, NAN, 1]]) == pytest.approx(fleiss_kappa(full))
    assert math.isnan(fleiss_kappa([[1, 1], [1, 1]]))
    with pytest.raises(ValueError, match="every rater"):
        fleiss_kappa([[0, NAN]])


def test_krippendorff_published_example() -> None:
    """0.743 for nominal and 0.849 for interval data (Krippendorff 2011, §C and §E)."""
    assert krippendorff_alpha(KRIPPENDORFF) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(KRIPPENDORFF, "interval") == pytest.approx(0.849, abs=5e-4)


def test_krippendorff_does_not_care_who_rated() -> None:
    shuffled = np.random.default_rng(1).permuted(KRIPPENDORFF, axis=1)
    assert krippendorff_alpha(shuffled) == pytest.approx(krippendorff_alpha(KRIPPENDORFF))
    assert math.isnan(krippendorff_alpha([[1, 1], [1, NAN], [1, 1]]))


def test_a_judge_that_names_the_first_answer_is_found_out() -> None:
    found = swap_consistency([1] * 8, [0] * 8)
    assert (found.same.share, found.first.share) == (0, 1)
    assert right_in_both_orders([1] * 8, [0] * 8, [1, 0] * 4).share == 0


def test_swaps_by_hand() -> None:
    """Same, same, other, tie both times, and one unread. For the first: 1, 0, 1, 0, 1, 1 of six decided."""
    found = swap_consistency([1, 0, 1, 0.5, 1], [1, 0, 0, 0.5, NAN])
    assert (found.same.share, found.same.n) == (0.75, 4)
    assert (found.first.share, found.first.n) == (pytest.approx(4 / 6), 6)


def test_right_in_both_orders_by_hand() -> None:
    """Right twice; right once; wrong twice; a tie of the judge; people tie; one missing."""
    found = right_in_both_orders([1, 0, 1, 0.5, 1, NAN], [0.9, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0.5, 1])
    assert (found.share, found.n) == (0.25, 4)
    assert (found.low, found.high) == wilson(1, 4)


def test_guessing_is_right_in_both_orders_a_quarter_of_the_time() -> None:
    one, two, truth = np.random.default_rng(2).integers(0, 2, (3, 8000))
    assert right_in_both_orders(one, two, truth).share == pytest.approx(0.25, abs=0.02)


def test_a_judge_of_length_and_people_who_are_not() -> None:
    """The judge takes the longer in 4 of 4, people in 2 of 4; equal lengths and ties tell nothing."""
    found = length_bias([1, 1, 0, 0, 1, 0.5], [9, 9, 2, 2, 5, 9], [2, 2, 9, 9, 5, 2], [1, 0, 0, 1, 1, 1])
    assert (found.longer.share, found.longer.n) == (1, 4)
    assert (found.human_longer.share, found.human_longer.n) == (0.5, 4)
    assert found.excess == pytest.approx(0.5)
    assert found.low < 0.5 < found.high


def test_agreeing_with_people_is_no_bias() -> None:
    rng = np.random.default_rng(3)
    judged, one, two = rng.integers(0, 2, 50), rng.integers(1, 9, 50), rng.integers(1, 9, 50)
    found = length_bias(judged, one, two, judged)
    assert (found.excess, found.low, found.high) == (0, 0, 0)
    assert found.longer == found.human_longer


def test_length_bias_without_people_and_without_cases() -> None:
    found = length_bias([1, NAN], [5, 5], [5, 2])
    assert found.human_longer is None
    assert math.isnan(found.excess)
    assert found.longer.n == 0
    assert math.isnan(found.longer.share)


def test_swapping_the_answers_changes_no_bias() -> None:
    rng = np.random.default_rng(4)
    judged, told = rng.choice([0, 0.5, 1], (2, 80))
    one, two = rng.integers(1, 30, (2, 80))
    assert length_bias(judged, one, two, told) == length_bias(1 - judged, two, one, 1 - told)


def test_the_longer_answer_of_pairs_that_experts_labelled() -> None:
    """The longer answer is the better one in 56 % of LLMBar's natural pairs."""
    if not LLMBAR.exists():
        pytest.skip("shared/data/llmbar is not here")
    pairs = json.loads(LLMBAR.read_text(encoding="utf-8"))
    one, two = ([len(pair[side]) for pair in pairs] for side in ("output_1", "output_2"))
    experts = [2 - pair["label"] for pair in pairs]
    assert length_bias(experts, one, two).longer.share == pytest.approx(0.56, abs=0.01)
    judged = [float(a > b) for a, b in zip(one, two, strict=True)]
    assert length_bias(judged, one, two, experts).excess == pytest.approx(0.44, abs=0.01)


def test_ceiling_by_hand() -> None:
    """aab: 1 of 3 pairs; against the rest, a sees {a, b}, ½, twice, and b sees {a, a}, 0. aa: 1 and 1."""
    found = rater_ceiling([[0, 0, 1], [0, 0, NAN], [1, NAN, NAN]])
    assert found.rater_against_rater == pytest.approx((1 / 3 + 1) / 2)
    assert found.rater_against_rest == pytest.approx((1 / 3 + 1) / 2)
    assert found.items == 2
    assert found.low <= found.rater_against_rater <= found.high


def test_a_crowd_says_what_its_members_say_more_often_than_they_do_each_other() -> None:
    """Raters right with 0.8: two agree in 0.8² + 0.2² = 0.68; the majority of ten is right in 0.967, so a rater agrees
    with it in about 0.78."""
    truth = np.random.default_rng(5).integers(0, 2, (2000, 1))
    ratings = np.where(np.random.default_rng(6).random((2000, 11)) < 0.8, truth, 1 - truth)
    found = rater_ceiling(ratings)
    assert found.rater_against_rater == pytest.approx(0.68, abs=0.02)
    assert found.rater_against_rest == pytest.approx(0.78, abs=0.02)


def test_pairs_of_raters_with_items_in_common() -> None:
    found = rater_pairs([[0, 0, NAN], [1, 1, NAN], [0, 1, NAN], [NAN, NAN, 1]])
    assert list(found) == [(0, 1)]
    assert found[0, 1].n == 3


def test_a_share_leaves_out_what_is_missing() -> None:
    assert (share_of([1, 0, NAN, 1]).share, share_of([1, 0, NAN, 1]).n) == (pytest.approx(2 / 3), 3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cohen_kappa([1], [1, 0]), "case by case: 1 first, 2 second"),
        (lambda: cohen_kappa([NAN], [1]), "no case"),
        (lambda: cohen_kappa([], []), "case by case"),
        (lambda: fleiss_kappa([[1], [2]]), "two raters"),
        (lambda: krippendorff_alpha([[1, NAN]]), "two ratings"),
        (lambda: rater_ceiling([[1, NAN]]), "two ratings"),
        (lambda: swap_consistency([1], [2]), "second_order holds"),
        (lambda: swap_consistency([1], [1, 0]), "case by case"),
        (lambda: right_in_both_orders([1], [1], [3]), "truth holds"),
        (lambda: length_bias([2], [1], [1]), "preferences holds"),
        (lambda: length_bias([1], [1, 2], [1, 2]), "case by case"),
    ],
)
def test_what_does_not_belong_together_is_refused(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
