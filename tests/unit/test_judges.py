"""The gold judge: orders what people would, the same way every time."""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import pytest
import tiny

from steps.judges import GoldJudge


def said(mood: tuple[str, ...], count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        f"a {draw.choice(mood)} and {draw.choice(mood)} film about {draw.choice(tiny.TOPICS)}" for _ in range(count)
    ]


def judge() -> GoldJudge:
    return GoldJudge([*said(tiny.GOOD, 60, 0), *said(tiny.BAD, 60, 1)], [2.0] * 60 + [-2.0] * 60)


def test_good_texts_score_above_bad_ones_it_has_not_seen() -> None:
    good, bad = (judge().score([f"such a {word} story" for word in words]) for words in (tiny.GOOD, tiny.BAD))
    assert good.min() > bad.max()


def test_scores_are_on_the_scale_of_the_ratings() -> None:
    scores = judge().score([*said(tiny.GOOD, 20, 2), *said(tiny.BAD, 20, 3)])
    assert scores[:20].mean() == pytest.approx(2, abs=0.4)
    assert scores[20:].mean() == pytest.approx(-2, abs=0.4)


def test_two_judges_of_the_same_ratings_give_the_same_numbers() -> None:
    texts = [*said(tiny.GOOD, 5, 4), "", "nothing it knows: qqq"]
    np.testing.assert_array_equal(judge().score(texts), judge().score(texts))


def test_a_score_does_not_depend_on_the_company() -> None:
    texts = said(tiny.GOOD, 6, 5)
    model = judge()
    np.testing.assert_allclose(model.score(texts), [model.score([text])[0] for text in texts])


def test_accuracy_is_the_share_of_pairs_it_orders_as_people_did() -> None:
    """Three pairs the right way round, one the wrong way, and one of the same text twice: 3.5 of 5."""
    pairs = pd.DataFrame({"chosen": [*tiny.GOOD[:3], "bad", "fine"], "rejected": [*tiny.BAD[:3], "good", "fine"]})
    assert judge().accuracy(pairs) == pytest.approx(3.5 / 5)
