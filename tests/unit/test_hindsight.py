"""Chains of answers and feedback: spans, labels and masks worked out by hand on a toy, and what is never hidden."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps.comparison import variants
from steps.config import load
from steps.errors import ModelError, RecipeError
from steps.hindsight import BAD, GOOD, IGNORED, NEITHER, Chain, Template, draws_of, openings, visible
from steps.policy_config import ChainOfHindsight
from steps.policy_prompt import PROMPT, asked_after, write

END = 0
PROMPT_AND_PRAISE, BLAME = [1, 2, 3], [4, 5]  # tokens of a toy
ANSWERS = {GOOD: [10, 11, END], BAD: [20, END]}
PRAISED_FIRST = Chain.of((GOOD, BAD), [PROMPT_AND_PRAISE, BLAME], ANSWERS)
BLAMED_FIRST = Chain.of((BAD, GOOD), [PROMPT_AND_PRAISE, BLAME], ANSWERS)


# -- words -------------------------------------------------------------------------------------------------------


def test_a_template_is_words_in_front_of_answers() -> None:
    assert Template.parse(" Good: {good}\nBad: {bad}") == Template((" Good: ", "\nBad: "), (GOOD, BAD))
    assert Template.parse("Bad: {bad} Good: {good}") == Template(("Bad: ", " Good: "), (BAD, GOOD))
    assert Template.parse("{good}") == Template(("",), (GOOD,))
    assert Template.parse("{{x}} {good}") == Template(("{x} ",), (GOOD,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Good:", "neither"),
        ("", "neither"),
        ("{good} and {bad}.", "what follows the last answer, found '.'"),
        ("{good} {good}", "an answer twice"),
        ("{best}", r"found \{best\}"),
        ("{good!r}", r"knows \{good\} and \{bad\}"),
        ("{good:>9}", r"knows \{good\} and \{bad\}"),
        ("{good", "expected '}'"),
    ],
)
def test_what_is_no_template_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Template.parse(text)


def test_the_policy_is_asked_with_the_first_words_of_praise() -> None:
    texts = ("a {bad} b {good}", "c {good} d {bad}", "e {good}", "f {bad}")
    assert openings([Template.parse(text) for text in texts]) == {BAD: "a ", GOOD: "c "}
    assert openings([Template.parse("{good}")]) == {GOOD: ""}


def test_the_default_templates_come_in_both_orders_and_speak_of_both_sides() -> None:
    parsed = [Template.parse(text) for text in ChainOfHindsight().templates]  # type: ignore[call-arg]
    assert openings(parsed) == {GOOD: "\nGood:\n", BAD: "\nBad:\n"}
    for one in parsed:
        assert Template(tuple(reversed(one.feedback)), tuple(reversed(one.sides))) in parsed


# -- spans -------------------------------------------------------------------------------------------------------


def test_a_chain_by_hand() -> None:
    assert PRAISED_FIRST.ids == (1, 2, 3, 10, 11, END, 4, 5, 20, END)
    assert PRAISED_FIRST.sides == (0, 0, 0, GOOD, GOOD, GOOD, 0, 0, BAD, BAD)
    assert PRAISED_FIRST.labels == [*[IGNORED] * 3, 10, 11, END, *[IGNORED] * 2, 20, END]
    assert PRAISED_FIRST.blind_from == 6
    assert BLAMED_FIRST.ids == (1, 2, 3, 20, END, 4, 5, 10, 11, END)
    assert BLAMED_FIRST.labels == [*[IGNORED] * 3, 20, END, *[IGNORED] * 2, 10, 11, END]
    assert BLAMED_FIRST.blind_from == 5


def test_one_answer_without_feedback_is_a_row_of_plain_fine_tuning() -> None:
    alone = Chain.of((GOOD,), [[1, 2]], ANSWERS)
    assert (alone.ids, alone.labels) == ((1, 2, 10, 11, END), [IGNORED, IGNORED, 10, 11, END])
    assert alone.blind_from == 5
    assert alone.hiding(1.0, 1.0, draws_of(0, 0, 0)) == alone


TOKENS = st.lists(st.integers(1, 99), max_size=12)
SIDES = st.sampled_from([(GOOD, BAD), (BAD, GOOD), (GOOD,), (BAD,)])


@given(SIDES, TOKENS, TOKENS, TOKENS, TOKENS, st.integers(0, 50), st.integers(1, 40))
def test_every_token_is_accounted_for(
    sides: tuple[int, ...], opening: list, later: list, good: list, bad: list, seed: int, length: int
) -> None:
    """Of one kind each, in order, whatever is hidden; what is cut off is the end."""
    answers = {GOOD: [*good, END], BAD: [*bad, END]}
    openers = [opening, later][: len(sides)]
    made = Chain.of(sides, openers, answers).hiding(0.0, 1.0, draws_of(seed, 0, 0))
    assert list(made.ids) == [
        token for side, words in zip(sides, openers, strict=True) for token in words + answers[side]
    ]
    for side in sides:
        assert [token for token, of in zip(made.ids, made.sides, strict=True) if of == side] == answers[side]
    assert made.sides.count(NEITHER) == sum(map(len, openers))
    assert [label for label in made.labels if label != IGNORED] == [token for side in sides for token in answers[side]]
    short = made.cut(length)
    assert (short.ids, short.sides) == (made.ids[:length], made.sides[:length])
    assert all(place < len(short.ids) for place in short.hidden)
    assert visible([short]).shape == (1, len(short.ids), len(short.ids))


# -- masks -------------------------------------------------------------------------------------------------------


def test_who_sees_whom_by_hand() -> None:
    """Prompt and answer see all before them; what comes after the good answer does not see its hidden token."""
    answers = {GOOD: [10, 11, END], BAD: [20, END]}
    hidden = Chain.of((GOOD, BAD), [[1], [4]], answers)
    hidden = Chain(hidden.ids, hidden.sides, hidden.blind_from, hidden=(2,))  # the token 11
    assert (hidden.ids, hidden.blind_from) == ((1, 10, 11, END, 4, 20, END), 4)
    short = Chain.of((GOOD,), [[1]], {GOOD: [10, END]})
    seen = visible([hidden, short]).astype(int)
    assert seen[0].tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],  # the good answer's end still sees 11
        [1, 1, 0, 1, 1, 0, 0],
        [1, 1, 0, 1, 1, 1, 0],
        [1, 1, 0, 1, 1, 1, 1],
    ]
    assert seen[1].tolist() == [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], *[[1, 1, 1, 0, 0, 0, 0]] * 5]


@given(TOKENS.filter(bool), TOKENS.filter(bool), st.floats(0, 1), st.floats(0, 1), st.integers(0, 999))
def test_no_mask_outside_the_good_answer(good: list, bad: list, one: float, other: float, row: int) -> None:
    """And as many of its tokens as the shares allow, rounded to whole ones."""
    least, most = sorted((one, other))
    answers = {GOOD: [*good, END], BAD: [*bad, END]}
    made = Chain.of((GOOD, BAD), [[1, 2], [3]], answers).hiding(least, most, draws_of(7, row, 0))
    assert set(made.hidden) <= set(range(2, 2 + len(good)))  # not its end
    assert len(set(made.hidden)) == len(made.hidden)
    assert int(least * len(good)) <= len(made.hidden) <= np.ceil(most * len(good) + 1e-9)
    reversed_order = Chain.of((BAD, GOOD), [[1, 2], [3]], answers)
    assert reversed_order.hiding(least, most, draws_of(7, row, 0)).hidden == ()


def test_each_token_is_hidden_as_often_as_the_share_says_however_short_the_answer() -> None:
    """Half of 5 % to 10 %: 7.5 % of a good answer of four tokens, which is less than one of them."""
    answers = {GOOD: [10, 11, 12, 13, END], BAD: [20, END]}
    whole = Chain.of((GOOD, BAD), [[1], [2]], answers)
    counts = np.zeros(len(whole.ids))
    rows = 3_000
    for row in range(rows):
        counts[list(whole.hiding(0.05, 0.10, draws_of(0, row, 0)).hidden)] += 1
    error = (0.075 * 0.925 / rows) ** 0.5
    assert counts[1:5] / rows == pytest.approx(0.075, abs=4.5 * error)
    assert counts[:1].sum() == counts[5:].sum() == 0


def test_nothing_is_hidden_when_the_shares_are_nought() -> None:
    assert all(PRAISED_FIRST.hiding(0.0, 0.0, draws_of(0, row, 0)).hidden == () for row in range(50))


def test_draws_belong_to_seed_row_and_epoch() -> None:
    drawn = {key: draws_of(*key).random(4).tolist() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    np.random.default_rng(5).random(3)
    assert draws_of(0, 0, 0).random(4).tolist() == drawn[0, 0, 0]
    assert len({tuple(numbers) for numbers in drawn.values()}) == 4


# -- in a recipe and beside weights ------------------------------------------------------------------------------


def recipe(tmp_path: Path, *sets: str):
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nmodel: {base: there}\npolicy: {method: chain_of_hindsight}\n", encoding="utf-8")
    return load(path, sets)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ('templates=["{bad} {good}"]', "none begins with {good}"),
        ('templates=["{good}", "{nice}", "{good}!"]', "number 1: knows .*; number 2: nothing is learnt"),
        ("templates=[]", "at least 1 item"),
        ("hidden_least=0.2", "hidden_least must not be above hidden_most"),
        ("trainer.packing=true", "trainer: packing: decided by prefloop .a row is a chain"),
        ("trainer.eval_strategy=steps", "measured at the end"),
        ("trainer.learnin_rate=1", "did you mean 'learning_rate'"),
    ],
)
def test_what_cannot_be_learnt_from_is_said_of_the_recipe(tmp_path: Path, assignment: str, said: str) -> None:
    with pytest.raises(RecipeError, match=f"policy.chain_of_hindsight.*{said}"):
        recipe(tmp_path, f"policy.chain_of_hindsight.{assignment}")


def test_a_comparison_takes_it_as_a_method_without_a_strength(tmp_path: Path) -> None:
    planned = variants(recipe(tmp_path), ["chain-of-hindsight"], [0.1, 1.0], 2)
    assert [(variant.name, variant.recipe.policy.method) for variant in planned] == [
        ("chain_of_hindsight seed 0", "chain_of_hindsight"),
        ("chain_of_hindsight seed 1", "chain_of_hindsight"),
    ]


def test_how_a_policy_is_asked_lies_beside_its_weights(tmp_path: Path) -> None:
    assert asked_after(tmp_path) == ""
    write(tmp_path, "\nGood – “so”:\n")
    assert asked_after(tmp_path) == "\nGood – “so”:\n"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"after": 3}'])
def test_a_note_that_cannot_be_read_is_not_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / PROMPT).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match="how this policy is asked"):
        asked_after(tmp_path)
