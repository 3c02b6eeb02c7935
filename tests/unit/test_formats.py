"""What a record of each format means: the rows it stands for, or why it stands for none."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from steps.datasets import Format
from steps.formats import FORMATS, BadRecord, at, is_conversation, spoken, written

TEXT_KEYS = ("kind", "prompt", "chosen", "rejected", "tie", "margin", "answer", "score", "ratings")


def rows(name: str, **fields: Any) -> list[dict[str, Any]]:
    """Rows of one record, without what is not said and without the turns."""
    found = FORMATS[name](fields)
    return [{key: row[key] for key in row if key in TEXT_KEYS and row[key] is not None} for row in found]


def only(name: str, **fields: Any) -> dict[str, Any]:
    (row,) = rows(name, **fields)
    return row


def refusal(name: str, **fields: Any) -> tuple[str, str]:
    with pytest.raises(BadRecord) as caught:
        list(FORMATS[name](fields))
    return caught.value.check, str(caught.value)


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"kind": "pair", "prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = "\n\nHuman: Why?\n\nAssistant:"


def test_every_format_of_the_registry_has_a_reading() -> None:
    assert {*FORMATS, "rated_sentences"} == set(get_args(Format))


# -- preferences -------------------------------------------------------------------------------------------------


def test_text_with_its_prompt_apart() -> None:
    assert only("preferences", prompt="p é", chosen="c", rejected="r 🙂") == pair("p é", "c", "r 🙂")


def test_text_with_its_prompt_at_the_head_of_both_sides() -> None:
    found = only("preferences", chosen="The sky is blue today.", rejected="The sky is blank.")
    assert found == pair("The sky is ", "blue today.", "blank.")


def test_text_with_nothing_in_common_has_no_prompt() -> None:
    assert only("preferences", chosen="yes", rejected="no") == {"kind": "pair", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ([user("Why?")], [bot("So.")], [bot("No.")]),
        (None, [user("Why?"), bot("So.")], [user("Why?"), bot("No.")]),
        ("Why?", [bot("So.")], [bot("No.")]),
        ("Why?", [user("Why?"), bot("So.")], [user("Why?"), bot("No.")]),
        ([user("Why?")], [user("Why?"), bot("So.")], [user("Why?"), bot("No.")]),
        ([user("Why?")], "So.", " No. "),
        (user("Why?"), bot("So."), bot("No.")),
        ([user(" Why?\n")], [bot("So. ")], [bot("\nNo.")]),
    ],
)
def test_turns_with_their_prompt_apart_or_at_the_head(prompt: Any, chosen: Any, rejected: Any) -> None:
    assert only("preferences", prompt=prompt, chosen=chosen, rejected=rejected) == pair(ASKED, " So.", " No.")


def test_a_longer_conversation_keeps_its_turns() -> None:
    head = [SYSTEM, user("Hi"), bot("Hello"), user("Why?")]
    (row,) = FORMATS["preferences"]({"prompt": head, "chosen": [bot("So.")], "rejected": [bot("No.")]})
    assert row["prompt"] == "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Hello" + ASKED
    assert row["turns"] == head


def test_the_columns_of_ultrafeedback_binarized() -> None:
    record = {
        "prompt": "Why?",
        "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
        "chosen": [user("Why?"), bot("So.")],
        "rejected": [user("Why?"), bot("No.")],
        "messages": [user("Why?"), bot("So.")],
        "score_chosen": 8.5,
        "score_rejected": 6.0,
    }
    assert only("preferences", **record) == pair(ASKED, " So.", " No.", margin=2.5)


@pytest.mark.parametrize(
    ("said", "margin"),
    [
        ({"margin": 2}, 2.0),
        ({"margin": "0.5"}, 0.5),
        ({"margin": None}, None),
        ({"score_chosen": 3}, None),
        ({"score_chosen": 1, "score_rejected": 3}, -2.0),
        ({"margin": 1, "score_chosen": 9, "score_rejected": 0}, 1.0),
    ],
)
def test_a_margin_is_given_or_the_difference_of_scores(said: dict[str, Any], margin: float | None) -> None:
    assert only("preferences", prompt="p", chosen="c", rejected="r", **said).get("margin") == margin


@pytest.mark.parametrize("margin", [True, "much", [1], {"a": 1}, float("nan"), float("inf"), "inf", 10**400])
def test_a_margin_that_is_no_number_is_refused(margin: Any) -> None:
    check, why = refusal("preferences", prompt="p", chosen="c", rejected="r", margin=margin)
    assert check == "unreadable"
    assert why.startswith("margin is ")


@pytest.mark.parametrize("missing", ["prompt", "chosen", "rejected"])
def test_a_missing_text_is_left_for_validation(missing: str) -> None:
    record = {"prompt": "p", "chosen": "c", "rejected": "r", missing: None}
    assert missing not in only("preferences", **record)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    ("turns", "check", "said"),
    [
        ([user("Other?"), bot("x")], "prompts_differ", "differ: at turn 1"),
        ([user("Why?"), bot("x"), user("y"), bot("z")], "prompts_differ", "turns before its answer"),
        ([user("Why?"), user("x")], "turns", "the last turn of {side} is the user's"),
        ([user("Why?"), {"role": "wizard", "content": "x"}], "turns", "turn 2 of {side} has the role 'wizard'"),
        ([user("Why?"), "x"], "turns", "turn 2 of {side} is text"),
        ([], "turns", "{side} has no turns"),
        ([user("Why?"), {"role": "assistant"}], "not_text", "turn 2 of {side} is missing, not text"),
        ([user("Why?"), bot(3)], "not_text", "turn 2 of {side} is a number, not text"),  # type: ignore[arg-type]
        ([user("Why?"), bot("\ud800")], "encoding", "turn 2 of {side} holds half a surrogate pair"),
        ("text", "unreadable", "{side} is text, not a list"),
        (None, "unreadable", "{side} is missing, not a list"),
    ],
)
def test_a_side_that_does_not_fit_the_other_is_refused_by_name(side: str, turns: Any, check: str, said: str) -> None:
    sides = {"chosen": [user("Why?"), bot("So.")], "rejected": [user("Why?"), bot("No.")], side: turns}
    found, why = refusal("preferences", **sides)
    assert found == check
    assert said.format(side=side) in why


def test_two_turns_of_one_role_are_refused_even_where_both_sides_share_them() -> None:
    head = [user("a"), user("b")]
    check, why = refusal("preferences", prompt=head, chosen=[bot("x")], rejected=[bot("y")])
    assert check == "turns"
    assert "turns 1 and 2 of chosen are both the user's" in why


def test_the_system_may_only_begin() -> None:
    check, why = refusal("preferences", prompt=[user("a"), SYSTEM], chosen=[bot("x")], rejected=[bot("y")])
    assert (check, "turn 2 of chosen is the system's" in why) == ("turns", True)


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, "a boolean"), (3, "a number"), (2.5, "a number"), ({"a": 1}, "an object"), (b"x", "bytes")],
)
def test_what_is_no_text_is_refused_by_name_and_kind(name: str, value: Any, kind: str) -> None:
    record = {"prompt": "p", "chosen": "c", "rejected": "r", name: value}
    check, why = refusal("preferences", **record)
    assert check == "not_text"
    assert why.startswith(f"{name} is ")
    assert kind in why


def test_a_list_where_a_prompt_belongs_is_refused() -> None:
    assert refusal("preferences", prompt=["p"], chosen="c", rejected="r")[0] == "turns"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "fine \ud83d", "x" * 10_000 + "\udc00"])
def test_half_a_surrogate_pair_is_an_encoding_fault(text: str) -> None:
    for name in ("prompt", "chosen", "rejected"):
        check, why = refusal("preferences", **{"prompt": "p", "chosen": "c", "rejected": "r", name: text})
        assert check == "encoding"
        assert why.startswith(name)


def test_who_said_it_and_when_are_kept_as_text() -> None:
    (row,) = FORMATS["preferences"]({"prompt": "p", "chosen": "c", "rejected": "r", "annotator": 7, "time": "\ud800"})
    assert row["annotator"] == "7"
    assert row["time"].encode() == rb"\ud800"


# -- HH ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 9))
def test_a_transcript_of_any_number_of_turns_is_split_at_the_last(count: int) -> None:
    head = "".join(f"\n\nHuman: q{n} – é\n\nAssistant: a{n}\n\nwith a paragraph" for n in range(count - 1))
    head += "\n\nHuman: last\n\nAssistant:"
    assert only("hh", chosen=head + " yes\n\n1. one", rejected=head + " no") == pair(head, " yes\n\n1. one", " no")


def test_a_transcript_may_begin_with_the_assistant_or_end_with_nothing() -> None:
    head = "\n\nAssistant: Hi\n\nHuman: Bye\n\nAssistant:"
    assert only("hh", chosen=head + " x", rejected=head) == pair(head, " x", "")


@pytest.mark.parametrize(
    ("chosen", "rejected", "check", "said"),
    [
        (ASKED + " x", "\n\nHuman: What?\n\nAssistant: y", "prompts_differ", "at turn 1"),
        (ASKED + " x", ASKED + " y\n\nHuman: z\n\nAssistant: w", "prompts_differ", "has 1 turns"),
        (ASKED + " x", "\n\nHuman: Why?", "turns", "the last turn of rejected is the user's"),
        (ASKED + " x", "no marks at all", "turns", "rejected does not begin with"),
        ("words first" + ASKED + " x", ASKED + " y", "turns", "chosen does not begin with"),
        ("", ASKED + " y", "turns", "chosen does not begin with"),
        (None, ASKED + " y", "not_text", "chosen is missing"),
        (ASKED + " x", 4, "not_text", "rejected is a number"),
        (ASKED + " x", [user("Why?")], "not_text", "rejected is a list"),
        (ASKED + " \ud800", ASKED + " y", "encoding", "chosen holds half"),
    ],
)
def test_a_transcript_that_does_not_fit_is_refused(chosen: Any, rejected: Any, check: str, said: str) -> None:
    found, why = refusal("hh", chosen=chosen, rejected=rejected)
    assert found == check
    assert said in why


TURNS = st.text(st.characters(codec="utf-8"), max_size=30).map(str.strip).filter(lambda text: "\n\n" not in text)


@given(st.lists(st.tuples(TURNS, TURNS), max_size=4), TURNS, TURNS, TURNS)
def test_any_conversation_written_as_a_transcript_is_read_back(
    before: list[tuple[str, str]], last: str, chosen: str, rejected: str
) -> None:
    conversation = [turn for asked, said in before for turn in (user(asked), bot(said))] + [user(last)]
    prompt = written(conversation)
    (row,) = FORMATS["hh"]({"chosen": prompt + spoken(chosen), "rejected": prompt + spoken(rejected)})
    assert (row["turns"], row["chosen"], row["rejected"]) == (conversation, spoken(chosen), spoken(rejected))


# -- ShareGPT and demonstrations ---------------------------------------------------------------------------------


def test_sharegpt_with_two_sides_is_a_pair() -> None:
    found = only(
        "sharegpt",
        conversations=[{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}],
        chosen={"from": "gpt", "value": "So."},
        rejected={"from": "gpt", "value": "No."},
    )
    assert found == pair("\n\nSystem: Be brief." + ASKED, " So.", " No.")


@pytest.mark.parametrize("role", ["gpt", "chatgpt", "assistant", "bot", "model", "GPT"])
def test_sharegpt_without_sides_is_a_demonstration(role: str) -> None:
    conversation = [{"from": "human", "value": "Why?"}, {"from": role, "value": "So."}]
    assert only("sharegpt", conversations=conversation) == {"kind": "demonstration", "prompt": ASKED, "answer": " So."}


@pytest.mark.parametrize("conversation", [[user("Why?"), bot("So.")], [SYSTEM, user("Why?"), bot("So.")]])
def test_sharegpt_with_a_system_field_begins_with_it(conversation: list[dict[str, str]]) -> None:
    found = only("sharegpt", conversations=conversation, system="Be brief.")
    assert found["prompt"] == f"\n\nSystem: Be brief.{ASKED}"


def test_sharegpt_with_two_systems_or_none_that_is_text_is_refused() -> None:
    conversation = [SYSTEM, user("Why?"), bot("So.")]
    assert refusal("sharegpt", conversations=conversation, system="Be long.")[0] == "turns"
    assert refusal("sharegpt", conversations=conversation, system=["x"])[0] == "not_text"


def test_sharegpt_with_one_side_only_is_refused() -> None:
    conversation = [{"from": "human", "value": "Why?"}]
    assert refusal("sharegpt", conversations=conversation, chosen=[bot("x")])[0] == "unreadable"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [user("Why?"), bot("So.")]},
        {"prompt": [user("Why?")], "completion": [bot("So.")]},
    ],
)
def test_turns_are_a_demonstration_of_the_last(record: dict[str, Any]) -> None:
    assert only("demonstrations", **record) == {"kind": "demonstration", "prompt": ASKED, "answer": " So."}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "Why?", "completion": "So."}, "Why?"),
        ({"prompt": "Why?", "completion": [bot("So.")]}, "Why?"),
        ({"instruction": "Why?", "output": "So."}, "Why?"),
        ({"instruction": "Why?", "input": "This.", "output": "So."}, "Why?\nThis."),
        ({"instruction": "Why?", "input": "", "output": "So."}, "Why?"),
    ],
)
def test_prompt_and_completion_or_instruction_and_output(record: dict[str, Any], prompt: str) -> None:
    assert only("demonstrations", **record) == {"kind": "demonstration", "prompt": prompt, "answer": "So."}


@pytest.mark.parametrize(
    ("record", "check"),
    [
        ({"messages": [user("Why?")]}, "turns"),
        ({"messages": []}, "turns"),
        ({"messages": [bot("a"), bot("b")]}, "turns"),
        ({"messages": "text"}, "unreadable"),
        ({"prompt": "p", "completion": []}, "turns"),
        ({"prompt": "p", "completion": [user("x")]}, "turns"),
        ({"prompt": "p", "completion": 3}, "not_text"),
        ({"prompt": 3, "completion": "c"}, "not_text"),
        ({"instruction": "p", "input": 3, "output": "c"}, "not_text"),
    ],
)
def test_a_demonstration_that_is_none_is_refused(record: dict[str, Any], check: str) -> None:
    assert refusal("demonstrations", **record)[0] == check


def test_a_demonstration_without_texts_is_left_for_validation() -> None:
    assert only("demonstrations", other="x") == {"kind": "demonstration"}


# -- several answers ---------------------------------------------------------------------------------------------


def duels(found: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    assert {row["kind"] for row in found} == {"pair"}
    return [(row["chosen"], row["rejected"], row["tie"]) for row in found]


def test_comparisons_of_four_answers_with_ties() -> None:
    record = {f"prediction {n}": "abcd"[n - 1] for n in range(1, 5)}
    found = rows("comparisons", prompt="p", preference=[0, 1, 2, 1, 2, 0], **record)
    assert duels(found) == [
        ("a", "b", True),
        ("a", "c", False),
        ("d", "a", False),
        ("b", "c", False),
        ("d", "b", False),
        ("c", "d", True),
    ]


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [(1, ("a", "b", False)), ("2", ("b", "a", False)), (0.0, ("a", "b", True)), ([2], ("b", "a", False))],
)
def test_the_verdict_on_two_answers_needs_no_list(verdict: Any, expected: tuple[str, str, bool]) -> None:
    assert duels(rows("comparisons", prompt="p", output_1="a", output_2="b", preference=verdict)) == [expected]


@pytest.mark.parametrize("verdict", [None, 3, -1, "first", True, [], {}, [1, 1]])
def test_another_verdict_on_two_answers_is_refused(verdict: Any) -> None:
    assert refusal("comparisons", prompt="p", answers=["a", "b"], preference=verdict)[0] == "unreadable"


def test_one_verdict_on_three_answers_is_refused() -> None:
    said = refusal("comparisons", prompt="p", answers=["a", "b", "c"], preference=1)[1]
    assert said == "preference is a number, not a list"


@pytest.mark.parametrize("names", ["answer {}", "answer_{}", "answer{}", "response {}"])
def test_answers_may_stand_in_numbered_fields_or_in_a_list(names: str) -> None:
    fields = {names.format(n): f"text {n}" for n in (10, 2, 1)}
    ranked = rows("rankings", prompt="p", ranks=[1, 2, 3], **fields)
    assert ranked == rows("rankings", prompt="p", ranks=[1, 2, 3], answers=["text 1", "text 2", "text 10"])
    assert duels(ranked)[0] == ("text 1", "text 2", False)


def test_ranks_make_a_pair_of_every_two_answers_with_ties() -> None:
    found = rows("rankings", prompt="p", answers=["a", "b", "c"], ranks=[2, 1, "2"])
    assert duels(found) == [("b", "a", False), ("a", "c", True), ("b", "c", False)]


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("comparisons", {"answers": ["a", "b"], "preference": [1, 2]}, "2 verdicts, and 2 answers make 1 pairs"),
        ("comparisons", {"answers": ["a", "b"], "preference": [3]}, "the verdict 3 is none of 0, 1, 2"),
        ("comparisons", {"answers": ["a", "b"], "preference": [True]}, "the verdict True"),
        ("comparisons", {"answers": ["a", "b"], "preference": [None]}, "the verdict None"),
        ("comparisons", {"answers": ["a", "b"]}, "preference is missing, not a list"),
        ("comparisons", {"answers": "ab", "preference": [1]}, "answers is text, not a list"),
        ("comparisons", {"preference": [1]}, "answers are missing"),
        ("comparisons", {"preference": [1], "a " + "9" * 5000: "x", "b": "y"}, "answers are missing"),
        ("rankings", {"answers": ["a", "b"], "ranks": [1]}, "1 ranks for 2 answers"),
        ("rankings", {"answers": ["a", "b"], "ranks": [1, None]}, "1 ranks for 2 answers"),
        ("rankings", {"answers": ["a", "b"], "ranks": [1, "x"]}, "rank is not a number"),
        ("rankings", {"answers": ["a", "b"], "ranks": "12"}, "ranks is text, not a list"),
        ("scored", {"answers": ["a", "b"], "scores": [1]}, "1 scores for 2 answers"),
        ("scored", {"answers": ["a"], "scores": ["x"]}, "the score of answer 1 is not a number"),
        ("labels", {"completion": "c", "label": "maybe"}, "label is 'maybe', neither true nor false"),
        ("labels", {"completion": "c"}, "label is None, neither true nor false"),
        ("labels", {"completion": "c", "label": 2}, "label is 2, neither true nor false"),
    ],
)
def test_answers_and_verdicts_that_do_not_fit_are_refused(name: str, fields: dict[str, Any], said: str) -> None:
    check, why = refusal(name, prompt="p", **fields)
    assert check == "unreadable"
    assert said in why


@pytest.mark.parametrize("name", ["comparisons", "rankings", "scored"])
def test_an_answer_that_is_no_text_is_named_by_its_place(name: str) -> None:
    verdicts = {"preference": [1], "ranks": [1, 2], "scores": [1, 2]}
    assert refusal(name, prompt="p", answers=["a", 3], **verdicts) == ("not_text", "answer 2 is a number, not text")


def test_scored_answers_in_two_lists_or_as_objects() -> None:
    expected = [
        {"kind": "rated", "prompt": "p", "answer": "a", "score": 1.0},
        {"kind": "rated", "prompt": "p", "answer": "b", "score": -2.5},
    ]
    assert rows("scored", prompt="p", answers=["a", "b"], scores=[1, "-2.5"]) == expected
    for text, score in (("text", "score"), ("response", "rating"), ("content", "overall_score")):
        answers = [{text: "a", score: 1}, {text: "b", score: -2.5}]
        assert rows("scored", prompt="p", answers=answers) == expected


def test_several_scores_of_an_answer_are_raw_ratings() -> None:
    found = rows("scored", prompt="p", answers=["a", "b"], scores=[[1, 2, None], []])
    assert found[0] == {"kind": "rated", "prompt": "p", "answer": "a", "score": 1.5, "ratings": [1.0, 2.0]}
    assert found[1] == {"kind": "rated", "prompt": "p", "answer": "b", "ratings": []}


@pytest.mark.parametrize(
    ("label", "score"),
    [
        *((label, 1.0) for label in (True, 1, 1.0, "1.0", "up", "True")),
        *((label, -1.0) for label in (False, 0, 0.0, -1, "down", " no ")),
    ],
)
def test_thumbs_up_score_one_and_down_minus_one(label: Any, score: float) -> None:
    expected = {"kind": "rated", "prompt": "p", "answer": "c", "score": score}
    assert only("labels", prompt="p", completion="c", label=label) == expected


@pytest.mark.parametrize("completion", ["So.", [bot("So.")]])
def test_thumbs_for_a_conversation(completion: Any) -> None:
    found = only("labels", prompt=[user("Why?")], completion=completion, label=True)
    assert found == {"kind": "rated", "prompt": ASKED, "answer": " So.", "score": 1.0}


def test_a_labelled_completion_without_turns_is_refused() -> None:
    assert refusal("labels", prompt="p", completion=[], label=True)[0] == "turns"


# -- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"prompt": [user("Why?")]}, {"messages": [user("Why?")]}])
def test_prompts_of_turns(fields: dict[str, Any]) -> None:
    assert only("prompts", **fields) == {"kind": "prompt", "prompt": ASKED}


def test_prompts_of_text() -> None:
    assert only("prompts", prompt="Why?") == {"kind": "prompt", "prompt": "Why?"}
    assert refusal("prompts", prompt=3)[0] == "not_text"
    assert refusal("prompts", prompt=[user("a"), bot("b")])[0] == "turns"


# -- fields ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a", 1),
        ("b.c", 2),
        ("b.d.1", "y"),
        ("b.d.9", None),
        ("b.x.y", None),
        ("e.f", 3),
        ("a.b", None),
        ("b.d.²", None),
    ],
)
def test_a_field_is_found_by_name_or_by_dots(path: str, found: Any) -> None:
    assert at({"a": 1, "b": {"c": 2, "d": ["x", "y"]}, "e.f": 3, "e": {"f": 4}}, path) == found


def test_columns_and_a_template_bring_other_names_into_the_format(tmp_path: Path) -> None:
    record = {
        "q": {"text": "Why?"},
        "passages": [["Title", "One."], ["Two."]],
        "sides": [{"t": "So."}, {"t": "No."}],
        "prompt": "not this",
    }
    (row,) = tiny.ingested(
        {"p.jsonl": [record]},
        tmp_path,
        columns={"chosen": "sides.0.t", "rejected": "sides.1.t"},
        prompt="{passages}\n\n{q.text} {nothing}{prompt}",
    )
    assert row["prompt"] == "Title\nOne.\nTwo.\n\nWhy? not this"
    assert (row["chosen"], row["rejected"], row["problem"]) == ("So.", "No.", None)


def test_a_column_that_is_not_there_is_a_missing_text(tmp_path: Path) -> None:
    (row,) = tiny.ingested({"p.jsonl": [{"p": "p", "c": "c"}]}, tmp_path, columns={"chosen": "c", "rejected": "d.e"})
    assert (row["prompt"], row["chosen"], row["rejected"]) == (None, "c", None)


# -- whatever a record holds -------------------------------------------------------------------------------------

NAMES = ("prompt", "chosen", "rejected", "messages", "conversations", "completion", "answers", "answer 1", "answer 2")
NAMES += ("preference", "ranks", "scores", "label", "margin", "score_chosen", "instruction", "input", "output", "time")
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5) | st.just("\n\nHuman: a")
TURN = st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "x", 3]), "content": LEAVES})
ANYTHING = st.recursive(LEAVES | TURN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(LEAVES, inner))
RECORDS = st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=6)


@given(st.sampled_from(sorted(FORMATS)), RECORDS)
def test_any_record_becomes_rows_or_is_refused_in_words(name: str, record: dict[str, Any]) -> None:
    try:
        found = list(FORMATS[name](record))
    except BadRecord as error:
        assert str(error)
        assert error.check in ("unreadable", "not_text", "turns", "prompts_differ", "encoding")
    else:
        assert all(row["kind"] in ("pair", "rated", "demonstration", "prompt") for row in found)


def test_an_object_counts_as_a_conversation_only_with_something_said() -> None:
    assert is_conversation([])
    assert is_conversation({"content": "x"})
    assert not is_conversation({"role": "user"})
    assert not is_conversation("x")
