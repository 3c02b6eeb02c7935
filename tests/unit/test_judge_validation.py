"""A judge is held against people before it counts."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from steps.config import Gate
from steps.errors import DataError, PrefloopError
from steps.gate import judge_counts
from steps.judge_validation import labelled_pairs, validate
from steps.judges import Comparison, RewardJudge, Verdict

LLMBAR = Path(__file__).parents[2].parent / "shared/data/llmbar/natural.json"


class Says:
    """Prefers the answer the prompt names, wherever it stands; `first` is for whatever stands first."""

    name, identity = "says", "says/1"

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        return [Verdict(self._preference(c), reason="none" if c.prompt == "silent" else "") for c in comparisons]

    def _preference(self, comparison: Comparison) -> float:
        fixed = {"first": 1.0, "tie": 0.5, "silent": math.nan}
        return fixed.get(comparison.prompt, float(comparison.first == comparison.prompt))


def pairs(right: int = 0, wrong: int = 0, tie: int = 0, first: int = 0, silent: int = 0) -> pd.DataFrame:
    """Pairs of (chosen `good`, rejected `bad one`), with what `Says` makes of them."""
    prompts = ["good"] * right + ["bad one"] * wrong + ["tie"] * tie + ["first"] * first + ["silent"] * silent
    return pd.DataFrame({"prompt": prompts, "chosen": "good", "rejected": "bad one"})


def by_length() -> RewardJudge:
    return RewardJudge(lambda prompts, answers: np.array([len(a) for a in answers]), "length")


def test_accuracy_and_kappa_by_hand() -> None:
    """6 right, 2 ties, 2 wrong. Both orders together, people say either side in half of the cases and the judge in
    0.4 each, so chance agrees in 0.4; they agree in 0.6: κ = (0.6 − 0.4) / (1 − 0.4)."""
    report = validate(Says(), pairs(right=6, tie=2, wrong=2))
    assert (report.pairs, report.judged, report.ties) == (10, 10, 0.2)
    assert report.accuracy == pytest.approx(0.7)
    assert report.kappa == pytest.approx(1 / 3)
    assert report.right_in_both_orders == pytest.approx(0.6)
    z2, n, p = 1.959964**2, 10, 0.7
    half = math.sqrt(z2) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    assert report.low == pytest.approx((p + z2 / (2 * n) - half) / (1 + z2 / n), abs=1e-6)
    assert report.high == pytest.approx((p + z2 / (2 * n) + half) / (1 + z2 / n), abs=1e-6)


def test_a_liking_for_the_first_place_is_no_accuracy() -> None:
    report = validate(Says(), pairs(right=6, first=4))
    assert (report.accuracy, report.right_in_both_orders, report.swap_consistency) == (0.8, 0.6, 0.6)
    assert report.first == pytest.approx((6 + 8) / 20)  # half of twelve consistent verdicts, and all of eight


def test_a_judge_that_says_the_opposite_is_known_for_it() -> None:
    report = validate(Says(), pairs(wrong=10))
    assert (report.accuracy, report.kappa, report.right_in_both_orders) == (0.0, -1.0, 0.0)


def test_accuracy_of_a_scoring_judge_does_not_depend_on_which_side_is_chosen() -> None:
    table = pd.DataFrame({"prompt": "p", "chosen": ["aaa", "b", "c"], "rejected": ["a", "bb", "d"]})
    mirrored = table.rename(columns={"chosen": "rejected", "rejected": "chosen"})
    one, other = validate(by_length(), table), validate(by_length(), mirrored)
    assert one.accuracy == pytest.approx(1 - other.accuracy)
    assert one.kappa == pytest.approx(-other.kappa)
    assert one.swap_consistency == other.swap_consistency == 1


def test_length_bias_is_the_judges_and_the_peoples() -> None:
    """Of four pairs of different length, people chose the longer answer once; the judge by length always does."""
    table = pd.DataFrame(
        {"prompt": "p", "chosen": ["aa", "b", "c", "d", "same"], "rejected": ["a", "bb", "cc", "dd", "size"]}
    )
    report = validate(by_length(), table)
    assert (report.longer, report.human_longer) == (1.0, 0.25)


def test_what_gets_no_verdict_is_left_out_and_counted() -> None:
    report = validate(Says(), pairs(right=3, wrong=1, silent=1))
    assert (report.pairs, report.judged, report.accuracy) == (5, 4, 0.75)
    assert "On 1 of 5 pairs it came to no verdict" in report.sentence()


def test_a_judge_that_never_says_anything_is_an_error() -> None:
    with pytest.raises(PrefloopError, match="no verdict on any pair"):
        validate(Says(), pairs(silent=3))


@pytest.mark.parametrize(
    ("table", "floor", "counts"),
    [
        ({"right": 80, "wrong": 20}, 0.6, True),
        ({"right": 80, "wrong": 20}, 0.81, False),
        ({"right": 60, "wrong": 40}, 0.6, True),  # the share reaches the floor, the bound is 0.502
        ({"right": 59, "wrong": 41}, 0.6, False),
        ({"right": 4, "wrong": 1}, 0.6, False),  # five pairs vouch for nobody: the bound is 0.38
        ({"right": 50, "wrong": 50}, 0.0, True),  # a recipe may ask for nothing
        ({"right": 95, "silent": 5}, 0.6, True),
        ({"right": 94, "silent": 6}, 0.6, False),  # too much left out
        ({"first": 100}, 0.6, False),
    ],
)
def test_when_a_judges_word_counts(table: dict[str, int], floor: float, counts: bool) -> None:
    measured = validate(Says(), pairs(**table)).facts()
    assert judge_counts(measured, Gate(judge_accuracy_floor=floor)) is counts


def test_facts_are_flat_numbers_and_leave_out_what_is_not_known() -> None:
    table = pd.DataFrame({"prompt": "tie", "chosen": ["aa", "bb"], "rejected": ["cc", "dd"]})  # nothing about length
    facts = validate(Says(), table).facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert all(isinstance(value, float | int) and name.startswith("judge_") for name, value in facts.items())
    assert {"judge_accuracy", "judge_accuracy_low", "judge_accuracy_high", "judge_pairs"} <= facts.keys()
    assert not {"judge_longer", "judge_ceiling", "judge_fleiss"} & facts.keys()


def test_the_sentence_tells_the_figures() -> None:
    said = validate(Says(), pairs(right=7, wrong=2, first=1)).sentence()
    assert "orders 75.0% of 10 human pairs as people did" in said
    assert "70.0% of them in both orders" in said
    assert "90.0% of its verdicts stay" in said


# -- several raters ----------------------------------------------------------------------------------------------


def test_raters_give_a_ceiling() -> None:
    """Two say one thing, the third another: a third of the couples agree. Who is with one other and against one has ½
    of a majority behind him, who is alone none: (½ + ½ + 0) / 3."""
    table = pairs(right=4).assign(rater_1=1.0, rater_2=1.0, rater_3=0.0)
    report = validate(Says(), table)
    assert report.raters_agree == pytest.approx(1 / 3)
    assert report.ceiling == pytest.approx(1 / 3)
    # Fleiss, each pair in both orders: P = 1/3 observed, half of all ratings on either side: (1/3 − 1/2) / (1/2)
    assert report.fleiss == pytest.approx(-1 / 3)


def test_raters_who_agree_have_kappa_one() -> None:
    report = validate(Says(), pairs(right=3).assign(rater_a=1.0, rater_b=1.0))
    assert (report.fleiss, report.raters_agree, report.ceiling) == (1.0, 1.0, 1.0)


def test_the_share_of_people_gives_a_ceiling_too() -> None:
    """p² + (1 − p)² of 0.75 and 0.5 is 0.625 and 0.5; one person is with the label in p."""
    report = validate(Says(), pairs(right=2).assign(agreement=[0.75, 0.5]))
    assert report.raters_agree == pytest.approx(0.5625)
    assert report.ceiling == pytest.approx(0.625)
    assert report.fleiss is None
    assert "one person: 62.5%" in report.sentence()


def test_one_rater_alone_is_no_ceiling() -> None:
    report = validate(Says(), pairs(right=2).assign(rater_1=1.0))
    assert (report.ceiling, report.fleiss) == (None, None)


# -- input -------------------------------------------------------------------------------------------------------


def test_pairs_that_are_none() -> None:
    with pytest.raises(DataError, match="lack a column"):
        validate(Says(), pd.DataFrame({"prompt": ["p"], "chosen": ["a"]}))
    with pytest.raises(DataError, match="no human pairs"):
        validate(Says(), pairs())


LABELLED = [
    {"input": "p", "output_1": "a", "output_2": "b", "label": 1},
    {"input": "q", "output_1": "a", "output_2": "b", "label": "2"},
    {"prompt": "r", "chosen": "c", "rejected": "d", "rater_1": 1, "agreement": 0.9},
]


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.jsonl.gz"])
def test_labelled_pairs_are_read(tmp_path: Path, name: str) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in LABELLED)
    text = json.dumps(LABELLED, indent=1) if name.endswith("json") else lines
    raw = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    table = labelled_pairs(tmp_path / name)
    assert table[["prompt", "chosen", "rejected"]].values.tolist() == [
        ["p", "a", "b"],
        ["q", "b", "a"],
        ["r", "c", "d"],
    ]
    assert table["rater_1"].dropna().tolist() == [1]
    assert table["agreement"].dropna().tolist() == [0.9]


@pytest.mark.parametrize(
    "record",
    [
        '{"input": "p", "output_1": "a", "output_2": "b", "label": 0}',
        '{"input": "p", "output_1": "a", "output_2": "b"}',
        '{"input": "p", "output_1": "a", "label": 1}',
        '{"prompt": "p", "chosen": ["turns"], "rejected": "b"}',
        '{"text": "p"}',
        "[1]",
        "not json",
    ],
)
def test_a_record_that_is_no_pair_is_named_by_its_line(tmp_path: Path, record: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(LABELLED[0]) + "\n" + record + "\n")
    with pytest.raises(DataError) as raised:
        labelled_pairs(path)
    assert "line 2" in raised.value.where


def test_a_file_without_pairs(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no pairs"):
        labelled_pairs(tmp_path / "pairs.jsonl")


@pytest.mark.skipif(not LLMBAR.is_file(), reason="shared/data is not here: LLMBar is not part of the repository")
def test_picking_the_longer_answer_is_right_in_56_percent_of_llmbar() -> None:
    report = validate(by_length(), labelled_pairs(LLMBAR))
    assert (report.pairs, report.judged) == (100, 100)
    assert report.accuracy == pytest.approx(0.56, abs=0.005)
    assert report.longer == 1.0
    assert report.human_longer == pytest.approx(0.56, abs=0.01)
    assert not judge_counts(report.facts(), Gate(judge_accuracy_floor=0.6))
