"""Online collection without models: labels, budgets, pairs from what a judge said, rows, and when it ends."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from steps import collection
from steps.collection import OFF, ON, Collecting, Judged, Pair, Round
from steps.datasets import Dataset
from steps.errors import DataError, PrefloopError
from steps.formats import FORMATS


def how(**given: Any) -> Collecting:
    return Collecting.model_validate(given)


def judged(scores: list[float], own: list[bool], width: float = 1e-9) -> Judged:
    """One prompt whose answers are a, b, c, …"""
    table = pd.DataFrame({"prompt": "p", "answer": list("abcdefgh")[: len(scores)], "own": own, "score": scores})
    (found,) = collection.by_scores(table, width)
    return found


def a_round(number: int = 1, **given: Any) -> Round:
    plain = {"sampled": "models:/m/1", "policy_digest": "", "prompts": 8, "samples": 32, "candidates": 32, "labels": 40}
    return Round(number=number, **{**plain, "on_policy": 8, "off_policy": 0, "ties": 0, **given})


# -- labels and their budget -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "pairs", "per_prompt", "labels"),
    [
        ("gold", "on-policy", 4, 4),  # an answer each
        ("reward", "both", 4, 5),  # and the data's
        ("reward", "off-policy", 4, 5),
        ("llm", "on-policy", 4, 6),  # 4 · 3 / 2 comparisons
        ("llm", "both", 4, 10),  # 5 · 4 / 2
        ("file", "on-policy", 2, 1),
        ("file", "both", 2, 3),
    ],
)
def test_what_a_prompt_costs(judge: str, pairs: str, per_prompt: int, labels: int) -> None:
    asked = how(judge=judge, pairs=pairs, per_prompt=per_prompt)
    assert collection.labels_a_prompt(asked) == labels
    assert collection.labels_of(asked, 10) == 10 * labels


@pytest.mark.parametrize("judge", ["gold", "llm"])
@pytest.mark.parametrize("pairs", ["both", "on-policy", "off-policy"])
def test_different_answers_cost_what_was_said_and_equal_ones_less(judge: str, pairs: str) -> None:
    asked = pd.DataFrame({"prompt": ["p", "q"], "response": ["theirs", "theirs"]})
    settings = how(judge=judge, pairs=pairs, per_prompt=3)
    said = pd.DataFrame({"prompt": list("pppqqq"), "answer": ["one", "two", "three"] * 2})
    found = collection.candidates(asked, said, settings)
    assert collection.labels_in(found, judge) == collection.labels_of(settings, 2)
    said["answer"] = ["one", "two", "three", "one", "One!", "two"]
    fewer = collection.candidates(asked, said, settings)
    assert collection.labels_in(fewer, judge) < collection.labels_in(found, judge)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"judge": "glod"}, "there is no judge 'glod'"),
        ({"pairs": "on policy"}, "there are no pairs 'on policy'"),
        ({"per_prompt": 1}, "a pair needs two answers"),
        ({"prompts": 0}, "--prompts begins at 1"),
        ({"rounds": 0}, "--rounds begins at 1"),
        ({"patience": 0}, "--patience begins at 1"),
        ({"prompts": 10, "per_prompt": 4, "labels": 49}, "the budget is smaller than one round"),
    ],
)
def test_settings_no_round_can_be_made_of_are_refused(given: dict[str, Any], what: str) -> None:
    with pytest.raises(PrefloopError, match=what):
        collection.check(how(**given))


def test_a_budget_of_exactly_one_round_will_do_and_its_refusal_names_the_price() -> None:
    collection.check(how(prompts=10, per_prompt=4, labels=50))
    with pytest.raises(PrefloopError, match="49 labels, and a round may take 50: 5 for each of 10 prompts"):
        collection.check(how(prompts=10, per_prompt=4, labels=49))
    with pytest.raises(PrefloopError, match="did you mean 'gold'"):
        collection.check(how(judge="glod"))


# -- what is asked -----------------------------------------------------------------------------------------------


def preferences(train: int, held_out: int) -> pd.DataFrame:
    rows = [(f"train {n}", f"yes {n}", "no", "train") for n in range(train)]
    rows += [(f"train {n}", "another", "no", "train") for n in range(train)]
    rows += [(f"held out {n}", "yes", "no", "held_out") for n in range(held_out)]
    return pd.DataFrame(rows, columns=["prompt", "chosen", "rejected", "part"])


def test_only_prompts_of_training_pairs_are_asked_once_each_with_the_datas_better_answer() -> None:
    left = collection.prompts_left(preferences(5, 4), [], seed=0)
    assert sorted(left["prompt"]) == [f"train {n}" for n in range(5)]
    assert all(row.response == f"yes {row.prompt.split()[1]}" for row in left.itertuples())


def test_rounds_share_no_prompt_and_what_is_left_keeps_its_order() -> None:
    everything = collection.prompts_left(preferences(9, 2), [], seed=3)
    first = list(everything["prompt"].head(4))
    rest = list(collection.prompts_left(preferences(9, 2), first, seed=3)["prompt"])
    assert first + rest == list(everything["prompt"])
    shuffled = preferences(9, 2).sort_values("chosen", ascending=False)
    assert list(collection.prompts_left(shuffled, first, seed=3)["prompt"]) == rest
    assert list(collection.prompts_left(preferences(9, 2), [], seed=4)["prompt"]) != first + rest


def test_a_dataset_without_training_pairs_is_refused_and_a_sampled_out_one_is_not() -> None:
    with pytest.raises(DataError, match="no training pairs"):
        collection.prompts_left(preferences(0, 3), [], seed=0)
    assert collection.prompts_left(preferences(2, 1), ["train 0", "train 1"], seed=0).empty


def test_each_round_has_a_seed_of_its_own_that_stays() -> None:
    seeds = [collection.round_seed(7, number) for number in range(1, 50)]
    assert len(set(seeds)) == 49
    assert seeds == [collection.round_seed(7, number) for number in range(1, 50)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert collection.round_seed(8, 1) != seeds[0]


def test_answers_no_row_could_hold_are_not_judged() -> None:
    asked = pd.DataFrame({"prompt": ["p"], "response": ["theirs"]})
    said = pd.DataFrame({"prompt": ["p"] * 4, "answer": ["fine", "", "bad\x07", "good"]})
    found = collection.candidates(asked, said, how(), lambda text: bool(text) and "\x07" not in text)
    assert list(found["answer"]) == ["fine", "good", "theirs"]
    assert list(found["own"]) == [True, True, False]


def test_what_the_data_say_too_is_the_policys_answer_and_a_lone_answer_is_not_judged() -> None:
    asked = pd.DataFrame({"prompt": ["p", "q"], "response": ["Fine.", "theirs"]})
    said = pd.DataFrame({"prompt": ["p", "p", "q", "q"], "answer": ["fine", "good", "one", "one"]})
    found = collection.candidates(asked, said, how(per_prompt=2))
    assert list(found["answer"]) == ["fine", "good", "one", "theirs"]
    assert list(found["own"]) == [True, True, True, False]
    alone = collection.candidates(asked, said, how(per_prompt=2, pairs="on-policy"))
    assert list(alone["prompt"]) == ["p", "p"]


def test_punctuation_alone_is_told_apart_by_its_text() -> None:
    asked = pd.DataFrame({"prompt": ["p"], "response": ["x"]})
    said = pd.DataFrame({"prompt": ["p"] * 3, "answer": ["!", "?", "!"]})
    assert list(collection.candidates(asked, said, how(pairs="on-policy"))["answer"]) == ["!", "?"]


def test_in_a_dialogue_an_answer_has_its_space_and_does_not_speak_for_others() -> None:
    prompt = "\n\nHuman: hi\n\nAssistant:"
    asked = pd.DataFrame({"prompt": [prompt], "response": [" hello"]})
    said = pd.DataFrame({"prompt": [prompt] * 3, "answer": ["good day", "yes\n\nHuman: more?", "hm"]})
    found = collection.candidates(asked, said, how())
    assert list(found["answer"]) == [" good day", " hm", " hello"]


# -- pairs from scores -------------------------------------------------------------------------------------------


def test_best_against_worst_and_best_against_the_datas() -> None:
    pairs, ties = collection.pairs_of([judged([1, 4, 2, 3], [True, True, True, False])], "both")
    assert [(pair.kind, pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [
        (ON, "b", "a", 3.0),
        (OFF, "b", "d", 1.0),
    ]
    assert pairs[0].scores == (4.0, 1.0)
    assert ties == 0


def test_where_the_datas_answer_is_better_it_is_the_chosen_side() -> None:
    pairs, _ = collection.pairs_of([judged([1, 2, 9], [True, True, False])], "off-policy")
    assert [(pair.kind, pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [(OFF, "c", "b", 7.0)]


@pytest.mark.parametrize(("kinds", "count"), [("both", 2), ("on-policy", 1), ("off-policy", 1)])
def test_ties_make_no_pair_and_are_counted(kinds: str, count: int) -> None:
    pairs, ties = collection.pairs_of([judged([2, 2, 2], [True, True, False])], kinds)
    assert (pairs, ties) == ([], count)


def test_two_scores_within_the_width_of_a_tie_are_alike() -> None:
    assert collection.pairs_of([judged([1.0, 1.4], [True, True], width=0.5)], "both") == ([], 1)
    pairs, ties = collection.pairs_of([judged([1.0, 1.4], [True, True], width=0.3)], "both")
    assert (len(pairs), ties) == (1, 0)


def test_one_answer_of_the_policys_makes_an_off_policy_pair_alone() -> None:
    pairs, ties = collection.pairs_of([judged([1, 2], [True, False])], "both")
    assert ([pair.kind for pair in pairs], ties) == ([OFF], 0)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(PrefloopError, match="not a number"):
        judged([1.0, float("nan")], [True, True])


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=6), st.booleans())
def test_every_pair_has_a_positive_margin_and_pairs_and_ties_are_all_there_is(scores: list[int], theirs: bool) -> None:
    own = [True] * len(scores)
    own[-1] = not theirs
    pairs, ties = collection.pairs_of([judged(list(map(float, scores)), own)], "both")
    possible = (sum(own) > 1) + theirs
    assert len(pairs) + ties == possible
    assert all(pair.margin > 0 for pair in pairs)
    mine = [score for score, one in zip(scores, own, strict=True) if one]
    assert sum(pair.kind == ON for pair in pairs) == (max(mine) > min(mine))


# -- pairs from comparisons --------------------------------------------------------------------------------------


def verdicts(said: dict[str, float], own: str = "abc") -> tuple[list[Judged], int]:
    """Verdicts such as {"ab": 1} (a is better) on every two of a, b, c."""
    letters = sorted({letter for two in said for letter in two})
    table = pd.DataFrame({"prompt": "p", "answer": letters, "own": [letter in own for letter in letters]})
    asked = collection.duels(table)
    asked["preference"] = [said[first + second] for first, second in zip(asked["first"], asked["second"], strict=True)]
    return collection.by_verdicts(table, asked)


def test_every_two_answers_of_a_prompt_meet_once() -> None:
    table = pd.DataFrame({"prompt": ["p", "p", "p", "q", "q"], "answer": list("abcde"), "own": True})
    found = collection.duels(table)
    assert list(found["first"] + found["second"]) == ["ab", "ac", "bc", "de"]
    assert list(found["prompt"]) == ["p", "p", "p", "q"]


def test_the_score_of_a_judge_that_compares_is_the_win_rate() -> None:
    (one,), silent = verdicts({"ab": 1, "ac": 1, "bc": 0.5})
    assert silent == 0
    np.testing.assert_allclose(one.scores, [1.0, 0.25, 0.25])
    pairs, ties = collection.pairs_of([one], "both")
    assert [(pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [("a", "b", 0.75)]
    assert ties == 0


def test_a_circle_says_nothing() -> None:
    (one,), _ = verdicts({"ab": 1, "bc": 1, "ac": 0})
    np.testing.assert_allclose(one.scores, 0.5)
    assert collection.pairs_of([one], "on-policy") == ([], 1)


def test_a_pair_holds_only_what_the_judge_said_of_these_two() -> None:
    """a wins most often and b least, and the two were called alike: no row may say that a is better."""
    said = {"ab": 0.5, "ac": 1, "ad": 1, "bc": 0, "bd": 0.5, "cd": 0.5}
    (one,), _ = verdicts(said, own="abcd")
    assert one.scores.argmax() == 0 and one.scores.argmin() == 1
    assert collection.pairs_of([one], "on-policy") == ([], 1)


def test_a_prompt_with_a_missing_verdict_is_left_out_and_counted() -> None:
    assert verdicts({"ab": 1, "ac": float("nan"), "bc": 1}) == ([], 1)


def test_the_datas_answer_is_compared_directly() -> None:
    (one,), _ = verdicts({"ab": 1, "ac": 0, "bc": 0}, own="ab")
    pairs, _ = collection.pairs_of([one], "both")
    assert [(pair.kind, pair.chosen, pair.rejected) for pair in pairs] == [(ON, "a", "b"), (OFF, "c", "a")]


# -- rows --------------------------------------------------------------------------------------------------------


PAIR = Pair("ask: ", "good", "bad", ON, (2.5, 1.0))
DIALOGUE = Pair("\n\nHuman: hi\n\nAssistant:", " good", " bad", OFF, (1.0, 0.0))


def entry(format: str, **given: Any) -> Dataset:
    return Dataset.model_validate({"format": format, "source": {"files": {"rows": "rows.jsonl"}}, **given})


@pytest.mark.parametrize("format", sorted(collection.RECORDS))
def test_a_record_reads_back_as_the_pair_it_was(format: str) -> None:
    pair = DIALOGUE if format == "hh" else PAIR
    (line,) = collection.batch([pair], entry(format), "gold", {}).splitlines()
    (row,) = FORMATS[format](json.loads(line))
    assert (row["prompt"], row["chosen"], row["rejected"]) == (pair.prompt, pair.chosen, pair.rejected)
    assert row["kind"] == "pair" and not row.get("tie")
    assert row["annotator"] == "judge gold"


def test_a_rows_margin_is_peoples_and_the_judges_stands_beside() -> None:
    origin = {"model": "models:/m/4", "round": 2}
    record = json.loads(collection.batch([PAIR], entry("preferences"), "reward", origin))
    (row,) = FORMATS["preferences"](record)
    assert row["margin"] is None
    assert record["collected"] == {**origin, "kind": ON, "scores": [2.5, 1.0], "margin": 1.5}


def test_records_have_the_names_the_registry_gives_the_fields(tmp_path: Any) -> None:
    columns = {"prompt": "question", "chosen": "output.0", "rejected": "output.1"}
    text = collection.batch([PAIR], entry("preferences", columns=columns), "gold", {})
    files = {"rows.jsonl": text.encode()}
    (row,) = tiny.ingested(files, tmp_path, columns=columns)
    assert (row["prompt"], row["chosen"], row["rejected"]) == (PAIR.prompt, PAIR.chosen, PAIR.rejected)


@pytest.mark.parametrize("format", ["scored", "labels", "demonstrations", "prompts", "sharegpt"])
def test_a_format_without_a_record_for_a_pair_is_refused(format: str) -> None:
    with pytest.raises(DataError, match=f"its format is {format}"):
        collection.check_takes_pairs("mine", entry(format))


def test_prompts_that_are_made_from_a_template_are_refused() -> None:
    collection.check_takes_pairs("mine", entry("comparisons"))
    with pytest.raises(DataError, match="template"):
        collection.check_takes_pairs("mine", entry("comparisons", prompt="{passages}\n{question}"))


# -- when it ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("promoted", "quiet"), [([], 0), ([True], 0), ([False], 1), ([True, False, False], 2), ([False, False, True], 0)]
)
def test_quiet_rounds_are_those_since_the_last_champion(promoted: list[bool], quiet: int) -> None:
    assert collection.quiet([a_round(promoted=one) for one in promoted]) == quiet


@pytest.mark.parametrize(
    ("given", "done", "left", "why"),
    [
        ({}, 0, 99, None),
        ({}, 3, 99, "rounds"),
        ({"patience": 2}, 1, 99, None),
        ({"patience": 2}, 2, 99, "patience"),
        ({}, 1, 0, "prompts"),
        ({"labels": 119}, 2, 99, "labels"),  # 80 used, and a round is 40
        ({"labels": 120}, 2, 99, None),
        ({"labels": 119}, 2, 7, None),  # the last prompts make a smaller round, of 35 labels
        ({"labels": 114}, 2, 7, "labels"),
    ],
)
def test_it_ends_for_one_reason(given: dict[str, Any], done: int, left: int, why: str | None) -> None:
    settings = how(**{"prompts": 8, "per_prompt": 4, "rounds": 3, "patience": 9, **given})
    assert collection.stopped(settings, [a_round(number) for number in range(done)], left) == why


@pytest.mark.parametrize("why", ["rounds", "labels", "prompts", "patience"])
def test_the_reason_is_told_with_what_was_used(why: Any) -> None:
    said = collection.in_words(why, how(labels=100, rounds=2), [a_round(1), a_round(2)])
    assert "80 labels used" in said
    assert {"rounds": "all 2 rounds", "labels": "of 100", "prompts": "every prompt", "patience": "2 rounds in a row"}[
        why
    ] in said


def test_a_rounds_numbers_are_metrics_and_what_is_not_known_is_none() -> None:
    metrics = a_round(margin=0.5, promoted=True, off_policy=3, rows=10, ties=2).metrics()
    assert metrics["pairs"] == 11.0 and metrics["promoted"] == 1.0 and metrics["reward_margin"] == 0.5
    assert "win_rate" not in metrics and "champion_win_rate" not in metrics
