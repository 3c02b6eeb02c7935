"""The drift check against worked-out values, and against what it must and must not notice."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from steps import drift

WORDS = [f"word{number}" for number in range(400)]


def pairs(count: int, seed: int, longer: float = 0.5, words: list[str] = WORDS, source: str = "a") -> pd.DataFrame:
    """Pairs of sentences; the longer side is chosen with a given chance."""
    draw = np.random.default_rng(seed)
    share = 1 / np.arange(1, len(words) + 1)
    share /= share.sum()

    def sentence(length: int) -> str:
        return " ".join(draw.choice(words, length, p=share))

    rows = []
    for number in range(count):
        short, long = sentence(int(draw.integers(5, 9))), sentence(int(draw.integers(10, 14)))
        chosen, rejected = (long, short) if draw.random() < longer else (short, long)
        prompt = sentence(int(draw.integers(3, 8)))
        row = {"row_id": f"{number}", "kind": "pair", "prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append({**row, "tie": False, "answer": None, "score": float(draw.normal()), "source": source})
    return pd.DataFrame(rows)


def drifted(before: pd.DataFrame, after: pd.DataFrame) -> set[str]:
    return {finding.what for finding in drift.compare(before, after) if finding.drifted}


# -- theory ------------------------------------------------------------------------------------------------------


def test_ks_distance_by_hand() -> None:
    finding = drift.lengths("x", np.arange(40), np.arange(40) + 10)
    assert finding is not None
    assert finding.effect == pytest.approx(10 / 40)


def test_two_proportions_by_hand() -> None:
    finding = drift.shares("x", 50, 100, 70, 100)
    assert finding is not None
    z = (0.5 - 0.7) / math.sqrt(0.6 * 0.4 * 2 / 100)
    assert finding.p_value == pytest.approx(math.erfc(abs(z) / math.sqrt(2)))
    assert finding.effect == pytest.approx(abs(math.asin(math.sqrt(0.5)) - math.asin(math.sqrt(0.7))) * 2)


def test_two_proportions_are_the_chi_square_of_a_two_by_two_table() -> None:
    shares = drift.shares("x", 30, 90, 55, 120)
    table = drift.mixture("x", Counter(yes=30, no=60), Counter(yes=55, no=65))
    assert shares is not None and table is not None
    assert shares.p_value == pytest.approx(table.p_value)


def test_cramers_v_is_one_where_nothing_is_shared() -> None:
    finding = drift.mixture("x", Counter(a=50), Counter(b=70))
    assert finding is not None and finding.effect == pytest.approx(1.0)


def test_cohens_d_of_a_shift_is_the_shift_in_standard_deviations() -> None:
    values = np.tile([-1.0, 1.0], 50)
    finding = drift.scores(values, values + 0.5)
    assert finding is not None
    assert finding.effect == pytest.approx(0.5 / values.std(ddof=1))


def test_word_distance_is_one_where_no_word_is_shared() -> None:
    finding = drift.vocabulary(Counter(a=50_000, b=50_000), Counter(c=50_000, d=50_000))
    assert finding is not None and finding.effect == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("first", "second"), [(2_000, 2_000), (20_000, 1_000), (500, 40_000)])
def test_word_distance_of_one_source_is_near_zero_whatever_the_sizes(first: int, second: int) -> None:
    share = 1 / np.arange(1, 3001)
    share /= share.sum()
    distances, p_values = [], []
    for seed in range(20):
        draw = np.random.default_rng(seed)
        counts = [Counter(map(str, draw.choice(3000, n, p=share))) for n in (first, second)]
        finding = drift.vocabulary(*counts)
        assert finding is not None
        distances.append(finding.effect)
        p_values.append(finding.p_value)
    assert np.mean(distances) < 0.05 and max(distances) < 0.12
    assert np.mean(np.array(p_values) < 0.1) <= 0.35  # near a tenth


# -- what it must and must not notice ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_two_samples_of_one_source_have_not_drifted(seed: int) -> None:
    assert drifted(pairs(400, seed), pairs(150, seed + 100)) == set()


def test_every_kind_of_drift_is_found_alone() -> None:
    before = pairs(400, 1)
    assert "longer side chosen" in drifted(before, pairs(200, 2, longer=0.9))
    assert drifted(before, pairs(200, 2, words=[f"other{number}" for number in range(400)])) >= {"words"}
    assert drifted(before, pairs(200, 2, source="b")) == {"sources"}
    assert drifted(before, pairs(200, 2).assign(score=lambda rows: rows["score"] + 1)) == {"score"}
    assert drifted(before, pairs(200, 2).assign(prompt=lambda rows: rows["prompt"] * 3)) == {"prompt length"}
    assert drifted(before, pairs(200, 2).assign(tie=lambda rows: rows.index % 4 == 0)) == {"ties"}


def test_a_difference_too_small_to_matter_is_none_however_many_rows_show_it() -> None:
    finding = drift.shares("x", 500_000, 1_000_000, 505_000, 1_000_000)
    assert finding is not None and finding.p_value < 1e-9 and not finding.drifted


def test_too_few_rows_say_nothing() -> None:
    assert drift.compare(pairs(400, 1), pairs(drift.FEWEST - 1, 2, longer=1.0)) == []
    assert drift.compare(pd.DataFrame(), pairs(100, 2)) == []


def test_the_order_of_the_rows_does_not_matter() -> None:
    before, after = pairs(100, 1), pairs(80, 2, longer=0.9)
    mixed = before.sample(frac=1, random_state=0), after.sample(frac=1, random_state=1)
    effects, expected = (
        {finding.what: finding.effect for finding in drift.compare(*sides)} for sides in (mixed, (before, after))
    )
    assert effects == pytest.approx(expected)


def test_rated_rows_have_no_sides_to_compare() -> None:
    rated = pd.DataFrame({"answer": ["some words here"] * 60, "chosen": None, "rejected": None, "score": 1.0})
    found = {finding.what: finding for finding in drift.compare(rated, rated)}
    assert set(found) == {"answer length", "score"} and not any(finding.drifted for finding in found.values())
    assert drift.compare(rated, rated.assign(score=2.0))[1].effect == math.inf
