"""Judges order what people would, the same way every time, whichever answer comes first."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny

from steps.config import Evaluate
from steps.errors import ModelError, PrefloopError, RecipeError
from steps.judges import BothOrders, Comparison, GoldJudge, RewardJudge, Verdict, make_judge, usage_facts


def said(mood: tuple[str, ...], count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        f"a {draw.choice(mood)} and {draw.choice(mood)} film about {draw.choice(tiny.TOPICS)}" for _ in range(count)
    ]


def ratings() -> tuple[list[str], list[float]]:
    return [*said(tiny.GOOD, 60, 0), *said(tiny.BAD, 60, 1)], [2.0] * 60 + [-2.0] * 60


def judge() -> GoldJudge:
    return GoldJudge(*ratings())


def by_length(tie_width: float = 0.0) -> RewardJudge:
    return RewardJudge(lambda prompts, answers: np.array([len(a) for a in answers]), "length", tie_width)


# -- the gold judge ----------------------------------------------------------------------------------------------


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


def test_the_gold_judge_takes_prompts_and_does_not_look_at_them() -> None:
    texts = said(tiny.BAD, 4, 6)
    np.testing.assert_array_equal(judge().score(["good"] * 4, texts), judge().score(texts))


def test_identity_is_that_of_the_ratings_and_settings() -> None:
    answers, scores = ratings()
    assert GoldJudge(answers, scores).identity == judge().identity
    changed = [
        GoldJudge(answers, [*scores[:-1], -1.5]),
        GoldJudge([*answers[:-1], "other"], scores),
        GoldJudge(answers, scores, tie_width=0.1),
        by_length(),
    ]
    assert len({judge().identity, *(other.identity for other in changed)}) == 5


def test_another_regression_is_another_identity() -> None:
    one, other = judge(), judge()
    other._model.set_params(ridge__alpha=2.0)
    assert one.identity != other.identity


# -- comparing ---------------------------------------------------------------------------------------------------


def test_scores_become_preferences() -> None:
    verdicts = by_length().compare(
        [Comparison("p", "long", "s"), Comparison("p", "s", "long"), Comparison("p", "a", "b")]
    )
    assert [verdict.preference for verdict in verdicts] == [1.0, 0.0, 0.5]
    assert [(verdict.first_score, verdict.second_score) for verdict in verdicts] == [(4, 1), (1, 4), (1, 1)]


@pytest.mark.parametrize(("width", "preference"), [(2.0, 1.0), (3.0, 0.5)])
def test_a_difference_within_the_width_is_a_tie(width: float, preference: float) -> None:
    assert by_length(width).compare([Comparison("p", "long", "s")])[0].preference == preference


def test_swapping_the_answers_swaps_the_verdict() -> None:
    comparisons = [Comparison("p", a, b) for a in said(tiny.GOOD, 3, 7) for b in said(tiny.BAD, 3, 8)]
    there = judge().compare(comparisons)
    back = judge().compare([comparison.swapped() for comparison in comparisons])
    assert [verdict.preference for verdict in there] == [1 - verdict.preference for verdict in back]
    assert [verdict.swapped().orders for verdict in back] == [verdict.orders for verdict in there]


def test_the_same_answer_twice_is_a_tie_whatever_rounding_does() -> None:
    noise = iter(np.linspace(0, 1, 100))
    rough = RewardJudge(lambda prompts, answers: np.array([next(noise) for _ in answers]), "rough")
    assert rough.compare([Comparison("p", "a", "a"), Comparison("p", "a", "b")])[0].preference == 0.5


def test_nothing_to_compare_is_nothing() -> None:
    assert by_length().compare([]) == []


def test_a_score_that_is_no_number_is_an_error() -> None:
    broken = RewardJudge(lambda prompts, answers: np.array([1.0, math.nan]), "broken")
    with pytest.raises(PrefloopError, match="not a number"):
        broken.compare([Comparison("p", "a", "b")])


def test_a_reward_model_is_asked_with_the_prompt() -> None:
    seen = []

    def scores(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        seen.extend(zip(prompts, answers, strict=True))
        return np.zeros(len(answers))

    RewardJudge(scores, "x").compare([Comparison("p", "a", "b"), Comparison("q", "c", "d")])
    assert sorted(seen) == [("p", "a"), ("p", "b"), ("q", "c"), ("q", "d")]
    with pytest.raises(TypeError, match="prompts, answers"):
        RewardJudge(scores, "x").score(["an answer alone"])


# -- both orders -------------------------------------------------------------------------------------------------


class Says:
    """A judge whose verdict is looked up by (first, second)."""

    name, identity = "says", "says"

    def __init__(self, table: dict[tuple[str, str], float]) -> None:
        self.table = table

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [Verdict(self.table[c.first, c.second], reason=f"{c.first}{c.second}", cost=1.0) for c in comparisons]


@pytest.mark.parametrize(
    ("there", "back", "preference", "orders"),
    [
        (1.0, 0.0, 1.0, (1.0, 1.0)),  # the first answer, wherever it stands
        (0.0, 1.0, 0.0, (0.0, 0.0)),
        (1.0, 1.0, 0.5, (1.0, 0.0)),  # whatever stands first
        (0.0, 0.0, 0.5, (0.0, 1.0)),
        (0.5, 0.5, 0.5, (0.5, 0.5)),
        (0.5, 0.0, 0.5, (0.5, 1.0)),  # a tie in one order only
    ],
)
def test_two_orders_make_one_verdict(there: float, back: float, preference: float, orders: tuple) -> None:
    (verdict,) = BothOrders(Says({("a", "b"): there, ("b", "a"): back})).compare([Comparison("p", "a", "b")])
    assert (verdict.preference, verdict.orders, verdict.cost) == (preference, orders, 2.0)


@pytest.mark.parametrize("table", [{("a", "b"): math.nan, ("b", "a"): 1.0}, {("a", "b"): 1.0, ("b", "a"): math.nan}])
def test_without_a_verdict_in_one_order_there_is_none(table: dict) -> None:
    (verdict,) = BothOrders(Says(table)).compare([Comparison("p", "a", "b")])
    missing = next(key for key, value in table.items() if math.isnan(value))
    assert not verdict.given
    assert verdict.reason == "".join(missing)


def test_asked_in_both_orders_is_another_judge() -> None:
    inner = Says({})
    assert BothOrders(inner).identity != inner.identity


# -- the judge of a recipe ---------------------------------------------------------------------------------------


def gold_table(folder: Path) -> Path:
    answers, scores = ratings()
    pd.DataFrame({"answer": answers, "score": scores}).to_parquet(folder / "gold.parquet")
    return folder / "gold.parquet"


def test_a_recipe_names_the_gold_judge(tmp_path: Path) -> None:
    made = make_judge(
        Evaluate(judge="gold"),
        gold=GoldJudge.from_table(gold_table(tmp_path)),
        reward_scores=None,
        reward_identity="",
        verdicts=tmp_path,
    )
    comparison = Comparison("p", "a good film", "a dull film")
    assert (made.name, made.identity) == ("gold", judge().identity)
    assert made.compare([comparison]) == judge().compare([comparison])
    assert usage_facts(made) == {}
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 1


def test_a_verdict_is_not_asked_for_again(tmp_path: Path) -> None:
    asked = []

    def scores(prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        asked.extend(answers)
        return np.array([len(answer) for answer in answers])

    def made(identity: str):
        store = tmp_path / "store.jsonl"
        return make_judge(
            Evaluate(judge="reward"), gold=None, reward_scores=scores, reward_identity=identity, verdicts=store
        )

    first = made("one").compare([Comparison("p", "long", "s")])
    assert made("one").compare([Comparison("p", "long", "s")]) == first
    assert len(asked) == 2
    made("another model").compare([Comparison("p", "long", "s")])
    assert len(asked) == 4


@pytest.mark.parametrize("name", ["gold", "reward"])
def test_a_judge_that_lacks_something_says_what(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"the judge '{name}' needs"):
        make_judge(Evaluate(judge=name), gold=None, reward_scores=None, reward_identity="", verdicts=tmp_path)


def test_an_empty_table_of_ratings_is_no_judge(tmp_path: Path) -> None:
    pd.DataFrame({"answer": [], "score": []}).to_parquet(tmp_path / "gold.parquet")
    with pytest.raises(RecipeError, match="the judge 'gold' needs human ratings"):
        GoldJudge.from_table(tmp_path / "gold.parquet")


# -- a reward model of somebody else -----------------------------------------------------------------------------


def test_a_classifier_from_a_directory_scores_answers(base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from steps.classifier import load_classifier
    from steps.models import load_reward_model

    load_reward_model(base, "float32").save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    loaded, again = load_classifier(tmp_path), load_classifier(tmp_path)
    prompts, answers = ["p: ", "q: ", "p: "], ["good", "a much longer answer", "bad"]
    scores = loaded.scores(prompts, answers)
    alone = [loaded.scores([p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(scores, alone, rtol=1e-4)
    assert len(set(scores)) == 3
    assert loaded.identity == again.identity
    assert RewardJudge(loaded.scores, loaded.identity).compare([Comparison("p: ", "good", "good")])[0].preference == 0.5


def test_a_language_model_without_a_head_is_no_reward_model(base: Path) -> None:
    from steps.classifier import load_classifier

    with pytest.raises(ModelError, match="weights are missing"):
        load_classifier(base)


def test_a_classifier_with_several_outputs_is_refused(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from steps.classifier import load_classifier

    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="one output"):
        load_classifier(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    from steps.classifier import load_classifier

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(ModelError, match="no weights prefloop reads"):
        load_classifier(tmp_path)
