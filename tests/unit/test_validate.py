"""Validation: every planted fault found on its line, nothing lost, no false alarm."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest
import tiny

from steps.datasets import Rules
from steps.errors import DataError
from steps.ingest import preferences, rated_sentences
from steps.validate import Check, failing_rows, normalised, validate

RULES = Rules(score_range=(-4, 4), min_raters=3)
Faults = dict[int, list[str]]


def rated(lines: list[tuple[str, str, str, str]]) -> pd.DataFrame:
    """Rows from (id, score, text, raw ratings)."""
    texts = "\n".join(f"{name}\t{score}\t{text}" for name, score, text, _ in lines)
    ratings = "\n".join(f"{name}\t{score}\t0\t{raw}" for name, score, _, raw in lines)
    files = {"texts": texts.encode(), "ratings": ratings.encode()}
    return rated_sentences(files, {"texts": "t.txt", "ratings": "r.txt"})


def preferred(*files: list[Any]) -> pd.DataFrame:
    data = {
        f"file{place}": b"\n".join(
            line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines
        )
        for place, lines in enumerate(files)
    }
    return preferences(data, {role: f"{role}.jsonl" for role in data})


def checked(rows: pd.DataFrame, kind: str, rules: Rules = RULES) -> tuple[Faults, dict[str, int]]:
    """Reasons by line, and the counts; what is true of every result is asserted on the way."""
    valid, quarantine, counts = validate(rows, kind, rules)
    assert len(valid) + len(quarantine) == len(rows)
    assert (counts["read"], counts["valid"], counts["quarantined"]) == (len(rows), len(valid), len(quarantine))
    places = [set(zip(part["file"], part["line"], strict=True)) for part in (valid, quarantine)]
    assert not places[0] & places[1]
    assert places[0] | places[1] == set(zip(rows["file"], rows["line"], strict=True))
    assert list(valid) == list(rows)
    reasons = sum(len(given) for given in quarantine["reasons"])
    assert sum(counts.values()) - 2 * len(rows) == reasons  # read, valid and quarantined are 2 · read together
    return dict(zip(quarantine["line"], quarantine["reasons"], strict=True)), counts


# -- what is the same text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["A fine film", "a  FINE\tfilm ", '"A fine film."', "A fine film!!", "Ａ ｆｉｎｅ ｆｉｌｍ"]
)
def test_case_width_spaces_and_outer_punctuation_do_not_count(text: str) -> None:
    assert normalised(text) == "a fine film"


@pytest.mark.parametrize("text", ["A fine, film", "A fine films", "Afine film"])
def test_other_differences_count(text: str) -> None:
    assert normalised(text) != "a fine film"


@pytest.mark.parametrize("text", [None, float("nan"), 3])
def test_what_is_no_text_has_no_normal_form(text: object) -> None:
    assert normalised(text) is None


# -- rated sentences ---------------------------------------------------------------------------------------------

CLEAN = [
    ("1", "2.0", "A fine film.", "[1, 2, 3]"),
    ("2", "-4", "Dreadful; I left.", "[-4, -4, -4]"),
    ("3", "4", "Naïve “quotes” — and\u00a0spaces…", "[4, 4, 4, 4]"),
    ("4", "0.333", "Neither here nor there 🙂", "[0, 0, 1]"),
    ("5", "2.0", "A fine film, that.", "[1, 2, 3]"),
]


def test_clean_sentences_raise_no_alarm() -> None:
    faults, counts = checked(rated(CLEAN), "rated_sentences")
    assert faults == {}
    assert counts["valid"] == len(CLEAN)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (("9", "2.0", "", "[1, 2, 3]"), "answer is empty"),
        (("9", "2.0", "   ", "[1, 2, 3]"), "answer is empty"),
        (("9", "2.0", "a \x07 bell", "[1, 2, 3]"), "answer holds control or replacement characters"),
        (("9", "2.0", "lost \ufffd letter", "[1, 2, 3]"), "answer holds control or replacement characters"),
        (("9", "much", "Another film", "[1, 2, 3]"), "score is missing"),
        (("9", "1.5", "Another film", "[1, 2]"), "fewer than 3 raters"),
        (("9", "2.5", "Another film", "[1, 2, 3]"), "score is not the mean of the raw ratings"),
        (("9", "5.0", "Another film", "[5, 5, 5]"), "score outside -4 to 4"),
        (("9", "-4.1", "Another film", "[-4.1, -4.1, -4.1]"), "score outside -4 to 4"),
        (("9", "2.0", "a FINE film", "[1, 2, 3]"), "repeats t.txt line 1"),
    ],
)
def test_each_fault_of_a_sentence_is_found_alone_and_on_its_line(line: tuple, reason: str) -> None:
    assert checked(rated([*CLEAN, line]), "rated_sentences")[0] == {len(CLEAN) + 1: [reason]}


def test_a_fault_in_the_middle_leaves_its_neighbours_alone() -> None:
    lines = [*CLEAN[:2], ("9", "9", "Another film", "[9, 9, 9]"), *CLEAN[2:]]
    assert checked(rated(lines), "rated_sentences")[0] == {3: ["score outside -4 to 4"]}


def test_a_sentence_without_a_text_is_found() -> None:
    rows = rated_sentences(
        {"texts": b"1\t2.0\tA fine film.\n2\t2.0", "ratings": b"1\t2\t0\t[1,2,3]\n2\t2\t0\t[1,2,3]"},
        {"texts": "t.txt", "ratings": "r.txt"},
    )
    faults, _ = checked(rows, "rated_sentences")
    assert set(faults) == {2}
    assert "answer is missing" in faults[2]


def test_all_faults_of_a_sentence_are_told() -> None:
    faults, counts = checked(rated([*CLEAN, ("9", "9", "", "[1]")]), "rated_sentences")
    assert set(faults[6]) == {
        "answer is empty",
        "fewer than 3 raters",
        "score is not the mean of the raw ratings",
        "score outside -4 to 4",
    }
    assert counts["fewer than 3 raters"] == counts["answer is empty"] == 1
    assert counts["score is missing"] == 0


def test_without_rules_any_score_and_number_of_raters_will_do() -> None:
    faults, _ = checked(rated([*CLEAN, ("9", "90", "Another film", "[90]")]), "rated_sentences", Rules())
    assert faults == {}


def test_every_repetition_names_the_first() -> None:
    lines = [CLEAN[0], CLEAN[1], CLEAN[0], CLEAN[1], CLEAN[0]]
    faults, counts = checked(rated(lines), "rated_sentences")
    assert faults == {3: ["repeats t.txt line 1"], 4: ["repeats t.txt line 2"], 5: ["repeats t.txt line 1"]}
    assert counts["repeats"] == 3


# -- preferences -------------------------------------------------------------------------------------------------

PAIRS = [
    {"prompt": "p one", "chosen": "good", "rejected": "bad"},
    {"prompt": "p one", "chosen": "better", "rejected": "bad", "margin": 0},
    {"prompt": "p two", "chosen": "good", "rejected": "bad", "margin": 2.5},
    {"prompt": "p two\nline", "chosen": "tab\tand\r\nlines", "rejected": "naïve 🙂"},
]
PAIR = {"prompt": "p three", "chosen": "good", "rejected": "bad"}


def test_clean_pairs_raise_no_alarm() -> None:
    assert checked(preferred(PAIRS), "preferences")[0] == {}


def test_a_hundred_clean_pairs_raise_no_alarm_but_for_repetitions() -> None:
    rows = tiny.preference_rows(60)
    texts = [json.dumps([row["prompt"], row["chosen"], row["rejected"]]) for row in rows]
    repeated = {place + 1 for place, text in enumerate(texts) if text in texts[:place]}
    assert set(checked(preferred(rows), "preferences")[0]) == repeated


@pytest.mark.parametrize(
    ("line", "reasons"),
    [
        ({**PAIR, "prompt": " "}, ["prompt is empty"]),
        ({**PAIR, "chosen": ""}, ["chosen is empty"]),
        ({**PAIR, "rejected": "\t\n"}, ["rejected is empty"]),
        ({"prompt": "p", "chosen": "c"}, ["rejected is missing"]),
        ({"chosen": "c", "rejected": "r"}, ["prompt is missing"]),
        ({**PAIR, "chosen": "a\x00b"}, ["chosen holds control or replacement characters"]),
        ({**PAIR, "prompt": "a\ufffdb"}, ["prompt holds control or replacement characters"]),
        ({**PAIR, "rejected": "Good!"}, ["chosen and rejected are the same"]),
        ({**PAIR, "margin": -0.5}, ["margin is negative"]),
        ({**PAIR, "margin": "2"}, ["could not be read: margin not a number"]),
        ({**PAIR, "margin": True}, ["could not be read: margin not a number"]),
        ({**PAIR, "prompt": "P ONE"}, ["repeats file0.jsonl line 1"]),
    ],
)
def test_each_fault_of_a_pair_is_found_alone_and_on_its_line(line: dict[str, Any], reasons: list[str]) -> None:
    assert checked(preferred([*PAIRS, line]), "preferences")[0] == {len(PAIRS) + 1: reasons}


def test_a_line_that_could_not_be_read_keeps_its_reason_whatever_stands_in_it() -> None:
    faults, counts = checked(preferred([*PAIRS, b'{"prompt": {broken} %s', b"[]"]), "preferences")
    assert set(faults) == {5, 6}
    assert faults[5][0].startswith("could not be read: not JSON")
    assert faults[6][0] == "could not be read: not a JSON object"
    assert counts["could not be read"] == 2


def test_a_repetition_in_another_file_is_found_even_on_the_same_line() -> None:
    valid, quarantine, _ = validate(preferred(PAIRS[:2], PAIRS[:1], [PAIRS[2], PAIRS[1]]), "preferences", RULES)
    assert len(valid) == 3
    assert list(quarantine["file"]) == ["file1.jsonl", "file2.jsonl"]
    assert list(quarantine["reasons"]) == [["repeats file0.jsonl line 1"], ["repeats file0.jsonl line 2"]]


def test_a_file_without_one_good_line_goes_to_quarantine_whole() -> None:
    faults, _ = checked(preferred([b"{", b"words", b"3"]), "preferences")
    assert set(faults) == {1, 2, 3}


@pytest.mark.parametrize("kind", ["preferences", "rated_sentences"])
def test_nothing_read_is_nothing_lost(kind: str) -> None:
    rows = preferred([]) if kind == "preferences" else rated([])
    faults, counts = checked(rows, kind)
    assert faults == {}
    assert counts["read"] == 0


# -- Great Expectations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check",
    [
        Check("x", "ExpectColumnValuesToNotBeNull", {"column": "nowhere"}),
        Check("x", "ExpectColumnValuesToMatchRegex", {"column": "text", "regex": "("}),
        Check("x", "ExpectColumnValuesToBeBetween", {"column": "text", "min_value": 3}),
    ],
    ids=["no column", "bad pattern", "bad type"],
)
def test_a_check_that_cannot_be_evaluated_is_an_error_and_no_pass(check: Check) -> None:
    frame = pd.DataFrame({"text": pd.Series(["a", "b"], dtype="object")})
    with pytest.raises(DataError) as caught:
        failing_rows(frame, [check])
    text = str(caught.value)
    assert "a check could not be evaluated" in text
    assert check.expectation in text
    assert "found" in text


def test_every_failing_row_is_listed_however_many_there_are() -> None:
    frame = pd.DataFrame({"number": range(1000)})
    check = Check("x", "ExpectColumnValuesToBeBetween", {"column": "number", "max_value": 99})
    assert sorted(failing_rows(frame, [check])) == list(range(100, 1000))
