"""Faults planted among clean rows: each found on its line by its check, and nothing found where nothing is."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny

from steps.checks import CHECKS, luhn, redacted
from steps.errors import DataError
from steps.overview import look_over

SNIPPETS = (
    "Élodie naïvely ordered crème brûlée",
    "Great news 🎉👩‍🚀 and 👍🏽",
    "def add(a: int, b: int) -> int:\n    return a + b  # 3 + 4\n",
    "On 2020-01-15 at 10:30, version 3.11.7 cost $1,299.00",
    "“Curly quotes”, ‘single ones’ and «guillemets» — with dashes…",
    "Wait... what?! (no, really)",
    "x = [i**2 for i in range(10)]; print(x[-1])",
    "Zażółć gęślą jaźń, Ærøskøbing, Việt Nam, Ünïcödé",
    "Use `pip install` | column | other |\n| --- | --- |\n1. one\n2. two\t(tab)\r\n",
    "Pages 12-14, ISBN 978-3-16, 50 % of 1000000, 1914-1918, π ≈ 3.14159, 5 µm",
    'She said: "it\'s 20/20", then left; €5 or £3.50',
    "https://example.org/a/b?c=1&d=2#top and user/name@v2",
)
NOUNS = (
    "amber basin cedar delta ember fjord grove haven inlet jetty knoll ledge marsh north oasis prairie quarry ridge "
    "shore thicket upland valley willow yonder zenith anchor bridge canal dune estuary field glacier harbour island"
)


def clean(count: int = 50) -> list[dict[str, Any]]:
    """Pairs with nothing wrong, the longer side chosen as often as not."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        said = [" ".join(draw.sample(NOUNS.split(), 9)) for _ in range(3)]
        snippet = SNIPPETS[number % len(SNIPPETS)]
        longer, shorter = f"{snippet} {said[0]}, that is {said[2]}.", f"{SNIPPETS[(number * 5 + 1) % 12]} {said[1]}!"
        sides = (longer, shorter) if len(rows) % 2 else (shorter, longer)
        rows.append({"prompt": f"{snippet} #{number}?", "chosen": sides[0], "rejected": sides[1], "margin": number % 3})
    return rows


CLEAN = clean()
RATED = [{"prompt": row["prompt"], "answers": [row["chosen"]], "scores": [[3, 4, 5.0]]} for row in CLEAN]
NUMBERS = itertools.count()  # no two planted rows are alike unless they are meant to be


def findings(
    records: list[Any], folder: Path, evaluation_sets: tuple[str, ...] = (), **settings: Any
) -> dict[int, list[str]]:
    """Names of the checks that found something, by line."""
    lines = [
        record if isinstance(record, bytes) else json.dumps(record, ensure_ascii="\\ud" in repr(record)).encode()
        for record in records
    ]
    valid, bad, counts = tiny.validated({"p.jsonl": b"\n".join(lines)}, folder, **settings)
    found: dict[int, list[str]] = {}
    for row, said in [*((row, row["warnings"]) for row in valid), *((row, row["reasons"]) for row in bad)]:
        if said:
            found.setdefault(row["line"], []).extend(reason.partition(": ")[0] for reason in said)
    assert all(bound["kept"] for bound in counts["bounds"].values())
    assert {name: check["rows"] for name, check in counts["checks"].items() if check["rows"]} == {
        name: sum(names.count(name) for names in found.values()) for name in {n for ns in found.values() for n in ns}
    }
    return found


def planted(faults: list[Any], among: list[dict[str, Any]]) -> tuple[list[Any], list[int]]:
    """Clean rows with a fault on every fifth line, and the lines of the faults."""
    lines = [5 * place for place in range(1, len(faults) + 1)]
    records: list[Any] = list(among)
    for line, fault in zip(lines, faults, strict=True):
        records.insert(line - 1, fault)
    return records, lines


def pair(**said: Any) -> dict[str, Any]:
    return {"prompt": f"Planted {next(NUMBERS)}?", "chosen": "A planted answer.", "rejected": "Another one.", **said}


def rated(scores: Any, text: str = "A planted answer.") -> dict[str, Any]:
    return {"prompt": f"Planted {next(NUMBERS)}?", "answers": [text], "scores": [scores]}


def talk(*said: str, roles: str = "uauauaua") -> list[dict[str, str]]:
    names = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": names[role], "content": text} for role, text in zip(roles, said, strict=False)]


def long(text: str) -> str:
    """A text in the middle of 20,000 characters."""
    filler = " ".join(f"word{number}" for number in range(1200))
    return f"{filler} {text} {filler}"


def test_clean_rows_raise_no_alarm(tmp_path: Path) -> None:
    assert findings(CLEAN, tmp_path) == {}


def test_clean_ratings_raise_no_alarm(tmp_path: Path) -> None:
    rules = {"score_range": [1, 5], "min_raters": 3, "max_chars": 2000}
    assert findings(RATED, tmp_path, format="scored", rules=rules) == {}


def test_clean_conversations_raise_no_alarm(tmp_path: Path) -> None:
    records = [
        {"chosen": talk(row["prompt"], row["chosen"]), "rejected": talk(row["prompt"], row["rejected"])}
        for row in CLEAN
    ]
    assert findings(records, tmp_path) == {}


SIDES = {"chosen": talk("x", roles="a"), "rejected": talk("y", roles="a")}
SIDES_SWAPPED = {"chosen": SIDES["rejected"], "rejected": SIDES["chosen"]}
LONG_TALK = ("x", "y") * 100
# One fault alone: (check, the row), in every variant.
ALONE: list[tuple[str, Any]] = [
    ("unreadable", b"{broken"),
    ("unreadable", "\u201cno JSON\u201d é 🙂".encode()),
    ("unreadable", b'["p", "c", "r"]'),
    ("unreadable", b"17"),
    ("unreadable", b"[" * 50_000),
    ("unreadable", b'{"prompt": "' + b"x" * 500_000),
    ("unreadable", pair(margin="much")),
    ("unreadable", pair(margin=[[1]])),
    ("not_text", pair(prompt=3)),
    ("not_text", pair(chosen=True)),
    ("not_text", pair(rejected={"é": {"ü": ["x"]}})),
    ("not_text", pair(chosen=1e300)),
    ("not_text", pair(prompt=talk("a"), chosen=[{"role": "assistant", "content": ["x"]}], rejected=SIDES["rejected"])),
    ("turns", pair(prompt=None, chosen=talk("Planted?", "a", "b"), rejected=talk("Planted?", "c", "d"))),
    ("turns", pair(prompt=talk("a", "b", roles="uu"), **SIDES)),
    ("turns", pair(prompt=talk("a"), chosen=[{"role": "usér 🙂", "content": "x"}], rejected=SIDES["rejected"])),
    ("turns", pair(prompt=None, **{side: talk(*LONG_TALK, side, roles="a" * 201) for side in SIDES})),
    ("turns", pair(prompt=talk("a"), chosen=[[talk("x")]], rejected=SIDES["rejected"])),
    ("prompts_differ", pair(prompt=None, chosen=talk("one", "x"), rejected=talk("two", "y"))),
    ("prompts_differ", pair(prompt=None, chosen=talk("é", "x"), rejected=talk("e", "y"))),
    ("prompts_differ", pair(prompt=None, chosen=talk(long("a"), "x"), rejected=talk(long("b"), "y"))),
    ("prompts_differ", pair(prompt=None, chosen=talk("a", "b", "c", "x"), rejected=talk("a", "y"))),
    ("empty", pair(prompt="")),
    ("empty", pair(chosen=" \t\r\n")),
    ("empty", pair(rejected=None)),
    ("empty", pair(rejected="\u2003\u00a0\u3000\u200b\ufeff\u00ad\u2028")),
    ("empty", pair(chosen=" " * 20_000)),
    ("empty", {"prompt": "Planted?", "chosen": "A planted answer."}),
    ("empty", {"Prompt": "other", "CHOSEN": "names"}),
    ("empty", pair(prompt=None, chosen=talk("Planted?", "x"), rejected=talk("Planted?", " "))),
    ("encoding", pair(prompt="a \x07 bell")),
    ("encoding", pair(chosen="nul \x00 within")),
    ("encoding", pair(rejected="é lost \ufffd letter 🙂")),
    ("encoding", pair(chosen=long("\x1b[31m red"))),
    ("encoding", pair(chosen="half \ud83d a pair")),
    ("encoding", pair(rejected=long("\udc00"))),
    ("encoding", pair(prompt=talk("a \x02"), **SIDES)),
    ("mojibake", pair(prompt="I donâ€™t know")),
    ("mojibake", pair(chosen="A cafÃ© in MÃ¼nchen")),
    ("mojibake", pair(rejected=long("He said â€œnoâ€\u009d to me").replace("\u009d", "œ"))),
    ("mojibake", pair(prompt=talk("ItÂ´s â‚¬5"), **SIDES)),
    ("script", pair(prompt="Что такое ржавчина?")),
    ("script", pair(chosen="これは完全に日本語の答えです。")),
    ("script", pair(rejected="هذا جواب بالعربية " * 30)),
    ("script", pair(prompt=talk("Γιατί είναι ο ουρανός γαλανός σήμερα το πρωί;"), **SIDES)),
    ("same_sides", pair(rejected="A planted answer.")),
    ("same_sides", pair(rejected=" a  PLANTED\nanswer!? ")),
    ("same_sides", pair(chosen="Ｃａｆé", rejected="cafe\u0301")),
    ("same_sides", pair(chosen=long("x"), rejected=long("X"))),
    ("same_sides", pair(prompt=None, chosen=talk("Planted?", "same"), rejected=talk("Planted?", "Same."))),
    ("repeated", CLEAN[0]),
    ("repeated", {**CLEAN[1], "margin": 9, "prompt": CLEAN[1]["prompt"].upper()}),
    ("repeated", {name: f' "{CLEAN[2][name]}" ' for name in ("prompt", "chosen", "rejected")}),
    ("label_against_score", pair(margin=-1)),
    ("label_against_score", pair(margin="-0.001")),
    ("label_against_score", pair(score_chosen=1, score_rejected="8.5")),
    ("label_against_score", pair(margin=-1e300, chosen=long("é"))),
    ("too_long", pair(prompt="x" * 50_000)),
    ("too_long", pair(chosen="🙂" * 50_000)),
    ("too_long", pair(prompt=talk("a", "b" * 45_000, "c"), **SIDES)),
    ("personal", pair(prompt="Write to jane.doe+x@mail.example.org today")),
    ("personal", pair(chosen="Call (555) 123-4567 or not")),
    ("personal", pair(chosen="Call +442071838750.")),
    ("personal", pair(chosen="Élise: +49 (30) 901820-11 🙂")),
    ("personal", pair(rejected="Card 4111 1111 1111 1111, please")),
    ("personal", pair(chosen=long("4012888888881881"))),
    ("personal", pair(prompt=talk("me@example.com"), **SIDES)),
]  # fmt: skip


@pytest.mark.parametrize("check", dict(ALONE))
def test_planted_faults_are_found_alone_and_on_their_lines(check: str, tmp_path: Path) -> None:
    records, lines = planted([fault for name, fault in ALONE if name == check], CLEAN)
    assert findings(records, tmp_path, rules={"max_chars": 40_000}) == {line: [check] for line in lines}


RULES = {"score_range": [1, 5], "min_raters": 3}


RATINGS: list[tuple[str, Any]] = [
    ("score_range", rated([5.5, 5.5, 5.5])),
    ("score_range", rated([-1e9, -1e9, -1e9], "é 🙂")),
    ("score_range", rated([0.99] * 500, long("x"))),
    ("raters", rated([3, 4])),
    ("raters", rated([3], "é 🙂")),
    ("raters", rated([None, "", 4, 4], long("x"))),
    ("raters", rated(3)),
    ("empty", rated([3, 3, 3], "\u200b")),
    ("not_text", {"prompt": "Planted?", "answers": [{"text": ["x"], "score": [3, 3, 3]}]}),
]


@pytest.mark.parametrize("check", dict(RATINGS))
def test_faults_of_ratings_are_found_alone_and_on_their_lines(check: str, tmp_path: Path) -> None:
    records, lines = planted([fault for name, fault in RATINGS if name == check], RATED)
    assert findings(records, tmp_path, format="scored", rules=RULES) == {line: [check] for line in lines}


def test_a_missing_score_is_found(tmp_path: Path) -> None:
    records, lines = planted([rated(scores) for scores in (None, [], [None, None])], RATED)
    assert findings(records, tmp_path, format="scored") == {line: ["score_range"] for line in lines}


@pytest.mark.parametrize("line", ["9\t2.5\tA planted line", "9\t-3\té 🙂 …", "9\t2.02\t" + "word " * 5000])
def test_a_score_that_is_not_the_mean_of_its_ratings_is_found(line: str, tmp_path: Path) -> None:
    texts = [f"{n}\t2.0\t{row['chosen']}".replace("\n", " ").replace("\r", "") for n, row in enumerate(CLEAN, start=10)]
    ratings = [f"{n}\t2\t1\t[1, 2, 3]" for n in range(9, 60)]
    texts.insert(25, line)
    files = {"r.txt": "\n".join(ratings).encode(), "t.txt": "\n".join(texts).encode()}
    settings = {"source": {"files": {"ratings": "r.txt", "texts": "t.txt"}}, "prompt": "{topic}"}
    _, bad, counts = tiny.validated(files, tmp_path, format="rated_sentences", rules={"min_raters": 3}, **settings)
    assert [(row["line"], row["raw"], len(row["reasons"])) for row in bad] == [(26, line, 1)]
    assert bad[0]["reasons"][0].startswith("score_against_ratings: ")
    assert sum(check["rows"] for check in counts["checks"].values()) == 1


def same(**said: Any) -> dict[str, Any]:
    return pair(**{"prompt": "The same?", **said})


SWAPPED = {"chosen": "Another one.", "rejected": "A planted answer."}
# Faults that only several rows together show: (check, the rows, which of them are found).
TOGETHER: list[tuple[str, list[Any], list[int]]] = [
    ("both_labels", [same(), same(**SWAPPED)], [0, 1]),
    ("both_labels", [same(chosen="Café 🙂!"), same(chosen="Another one.", rejected="CAFÉ 🙂")], [0, 1]),
    ("both_labels", [same(chosen="é" * 20_000), same(chosen="Another one.", rejected="é" * 20_000)], [0, 1]),
    ("both_labels", [same(prompt=talk("a"), **SIDES), same(prompt=talk("a"), **SIDES_SWAPPED)], [0, 1]),
    ("cycle", [same(chosen=a, rejected=b) for a, b in ("ab", "bc", "ca")], [0, 1, 2]),
    ("cycle", [same(chosen=f"{a} é 🙂", rejected=f"{b.upper()} é 🙂!") for a, b in ("ab", "bc", "ca")], [0, 1, 2]),
    ("cycle", [same(chosen=a, rejected=b) for a, b in ("ab", "bc", "cd", "de", "ea", "ax", "ya")], [0, 1, 2, 3, 4]),
    ("near_repeat", [pair(chosen=long("one")), pair(chosen=long("two"))], [1]),
    ("near_repeat", [pair(chosen=f"{CLEAN[2]['chosen']} yes"), pair(chosen=f"{CLEAN[2]['chosen']} yes ok")], [1]),
    ("near_repeat", [pair(chosen=long("é 🙂")), pair(chosen=long("ü 🙂").upper())], [1]),
    ("repeated", [same(), same(prompt="the same"), same(chosen="A PLANTED answer")], [1, 2]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "faults", "found"), TOGETHER, ids=[f"{n}-{c}" for n, (c, _, _) in enumerate(TOGETHER)]
)
def test_what_only_rows_together_show_is_found_on_their_lines(
    check: str, faults: list[Any], found: list[int], tmp_path: Path
) -> None:
    records, lines = planted(faults, CLEAN)
    assert findings(records, tmp_path) == {lines[place]: [check] for place in found}


def test_thousands_of_answers_of_one_template_are_each_held_against_few(tmp_path: Path) -> None:
    """Every two of them would be 200 million comparisons."""
    words = " ".join(NOUNS.split()[:24])
    records = [{"prompt": f"p{n}", "chosen": f"{words} {n}", "rejected": "No."} for n in range(20_000)]
    tiny.ingested({"p.jsonl": records}, tmp_path)
    near = look_over(tmp_path / "rows.parquet").near_repeats
    assert len(near) > 19_000
    assert len(set(near.values())) < 200
    assert all(other < row for row, other in near.items())


@pytest.mark.parametrize(
    "faults",
    [
        [pair(), pair(**SWAPPED)],
        [same(chosen=a, rejected=b) for a, b in ("ab", "bc", "ac")],
        [pair(chosen=a, rejected=b) for a, b in ("ab", "bc", "ca")],
        [pair(chosen=long("one")), pair(chosen=" ".join(f"other{n}" for n in range(2400)))],
    ],
)
def test_what_only_looks_like_a_fault_is_left_alone(faults: list[Any], tmp_path: Path) -> None:
    assert findings(planted(faults, CLEAN)[0], tmp_path) == {}


def test_ties_are_no_circle_and_no_contradiction(tmp_path: Path) -> None:
    records = [
        {"prompt": "Planted?", "answers": ["c", "a", "b"], "preference": [0, 2, 1]},  # c ties with a, and a > b > c
        {"prompt": "Planted?", "answers": ["a", "c"], "preference": [1]},
    ]
    assert findings(records, tmp_path, format="comparisons", rules={"checks": {"length_bias": "off"}}) == {}


@pytest.mark.parametrize("text", ["So.", "é 🙂 " * 3, long("x")])
def test_an_answer_with_both_thumbs_is_found_both_times(text: str, tmp_path: Path) -> None:
    faults = [{"prompt": "Planted?", "completion": text, "label": label} for label in ("up", "down")]
    faults[1]["completion"] = faults[1]["completion"].upper()
    others = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in CLEAN]
    records, (up, down) = planted(faults, others)
    assert findings(records, tmp_path, format="labels") == {up: ["both_labels"], down: ["repeated", "both_labels"]}


def test_the_agreement_of_annotators_and_what_it_allows(tmp_path: Path) -> None:
    """Three judge pair a, 2 of them alike: 1 of 3 twos agrees. Two judge b alike. Of c one says it twice."""
    verdicts = [("a", 1, "x"), ("a", 2, "y"), ("a", 1, "z"), ("b", 2, "x"), ("b", 2, "é"), ("c", 1, "x"), ("c", 1, "x")]
    verdicts += [("b", 1, None)]
    records = [
        {"prompt": name, "answers": ["one", "two"], "preference": verdict, "annotator": annotator}
        for name, verdict, annotator in verdicts
    ]
    tiny.ingested({"p.jsonl": records}, tmp_path, format="comparisons")
    statistics = look_over(tmp_path / "rows.parquet").statistics
    assert statistics["pairs_judged_again"] == 2
    assert statistics["annotators_agree"] == pytest.approx((1 + 1) / (3 + 1))
    assert statistics["annotators_ceiling"] == pytest.approx(0.5)


def test_the_ceiling_of_annotators_who_agree_in_four_of_five_pairs(tmp_path: Path) -> None:
    """a = 0.8 = p² + (1 − p)² has the solution p = (1 + √0.6) / 2."""
    records = [
        {"prompt": f"p{n}", "answers": ["one", "two"], "preference": 1 if n else who, "annotator": who}
        for n in range(5)
        for who in (1, 2)
    ]
    tiny.ingested({"p.jsonl": records}, tmp_path, format="comparisons")
    statistics = look_over(tmp_path / "rows.parquet").statistics
    assert statistics["annotators_ceiling"] == pytest.approx((1 + 0.6**0.5) / 2)


# -- evaluation sets ---------------------------------------------------------------------------------------------

LEAKED = "What is the capital of Québec? 🙂"


@pytest.mark.parametrize("name", ["e.txt", "e.jsonl", "e.json", "e.parquet", "e.csv", "e.jsonl.gz"])
def test_a_text_of_an_evaluation_set_is_found_whatever_file_it_stands_in(name: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [1, 2], "question": ["other", LEAKED]})
    writers = {
        ".txt": lambda path: path.write_text(f"other\n{LEAKED}\n", encoding="utf-8"),
        ".json": lambda path: path.write_text(json.dumps([{"a": [{"b": LEAKED}]}]), encoding="utf-8"),
        ".parquet": frame.to_parquet,
        ".csv": frame.to_csv,
    }
    write = writers.get(Path(name).suffix, lambda path: frame.to_json(path, orient="records", lines=True))
    write(tmp_path / name)
    records, _ = planted([pair(prompt=LEAKED.upper())], CLEAN)
    assert findings(records, tmp_path, rules={"evaluation_sets": [name]}) == {5: ["evaluation_leak"]}


HELD = "Why is the sky blue, élève?"


@pytest.mark.parametrize(
    "kept",
    [
        HELD,
        {"q": f"  {HELD.upper()}"},
        [{"messages": [{"role": "user", "content": HELD}]}],
        {"chosen": f"\n\nHuman: {HELD}\n\nAssistant: So.\n\nHuman: And?\n\nAssistant: x"},
    ],
)
def test_a_leak_is_found_behind_the_marks_of_a_conversation(kept: Any, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps(kept), encoding="utf-8")
    faults = [
        pair(prompt=talk(HELD), **SIDES),
        pair(prompt=talk("Be kind.", HELD, "So.", "And?", roles="suau"), **SIDES),
        pair(prompt=talk("And?", "So.", HELD), **SIDES),  # a later question is another conversation
    ]
    records, lines = planted(faults, CLEAN)
    found = findings(records, tmp_path, rules={"evaluation_sets": ["e.json"]})
    assert found == {line: ["evaluation_leak"] for line in lines[:2]}


def test_a_leak_is_found_on_either_side(tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_text(f"{long('é')}\n", encoding="utf-8")
    records, lines = planted([pair(**{side: long("é")}) for side in ("prompt", "chosen")], CLEAN)
    rules = {"evaluation_sets": ["e.txt"]}
    assert findings(records, tmp_path, rules=rules) == {line: ["evaluation_leak"] for line in lines}


def test_an_evaluation_set_that_is_not_there_or_not_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "e.exe").write_bytes(b"x")
    with pytest.raises(DataError, match="an evaluation set is not there"):
        findings(CLEAN, tmp_path, rules={"evaluation_sets": ["nowhere.txt"]})
    with pytest.raises(DataError, match="a kind that is not known"):
        findings(CLEAN, tmp_path, rules={"evaluation_sets": ["e.exe"]})


# -- the table and its parts -------------------------------------------------------------------------------------


def test_every_check_has_three_planted_faults_or_more() -> None:
    elsewhere = {"score_range", "raters", "score_against_ratings", "evaluation_leak"}
    names = [check for check, _ in ALONE] + [check for check, _, _ in TOGETHER]
    assert {name for name in CHECKS if names.count(name) < 3} == elsewhere


@pytest.mark.parametrize("number", ["4111111111111111", "378282246310005", "6011111111111117", "5555555555554444"])
def test_the_check_digit_of_test_cards_is_right_and_of_no_neighbour(number: str) -> None:
    digits = [int(letter) for letter in number]
    assert luhn(digits)
    assert not any(luhn([*digits[:-1], (digits[-1] + step) % 10]) for step in range(1, 10))
    assert not luhn(digits[:12])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ask jane@example.org, now", "Ask [EMAIL], now"),
        ("é (555) 123-4567 🙂", "é [PHONE] 🙂"),
        ("+442071838750", "[PHONE]"),
        ("Card 4111-1111-1111-1111.", "Card [CARD]."),
        ("Number 4111111111111112.", "Number 4111111111111112."),
        ("2020-01-15, 3.11.7, 1914-1918", "2020-01-15, 3.11.7, 1914-1918"),
    ],
)
def test_personal_data_is_written_over_and_nothing_else(text: str, expected: str) -> None:
    assert redacted(text) == expected
