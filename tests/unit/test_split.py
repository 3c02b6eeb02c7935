"""Who learns from what: parts that share neither prompt nor text, and that no order of rows can change."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from steps.datasets import Dataset, Split
from steps.errors import DataError
from steps.rows import SCHEMA
from steps.split import (
    COLUMNS,
    PHRASE,
    TOPIC_ROWS,
    USES,
    agreement,
    main,
    pairs_left_out,
    pairs_of,
    part_of,
    split,
    texts_of,
    topics,
    unit_hash,
)

SHARES = Split(seed=0, demonstrations=0.2, preferences=0.35, held_out=0.25)
NOUNS = ("ocean", "castle", "garden", "robot", "winter", "violin", "harbour", "desert", "mirror", "forest")
MOODS = ("splendid", "moving", "gripping"), ("dreadful", "tedious", "clumsy")


def preferences_entry(shares: Split = SHARES) -> Dataset:
    return Dataset(format="preferences", source={"files": {"pairs": "p.jsonl"}}, split=shares)


def canonical(rows: list[dict]) -> pd.DataFrame:
    """Rows as validation leaves them, with what they do not say left empty."""
    told = [
        {"row_id": f"id{number:04}", "file": "f", "line": number + 1, "part": 0, **row}
        for number, row in enumerate(rows)
    ]
    table = pa.Table.from_pylist(told, schema=pa.schema([SCHEMA.field(name) for name in COLUMNS]))
    return table.to_pandas()


def preference_rows(prompts: int = 120) -> pd.DataFrame:
    return canonical([{"kind": "pair", **row} for row in tiny.preference_rows(prompts)])


def scored_rows(prompts: int = 60) -> pd.DataFrame:
    """Four rated answers a prompt, two of them rated the same."""
    return canonical(
        [
            {"kind": "rated", "prompt": f"p{number}", "answer": f"{number} answer {place}", "score": min(place, 2)}
            for number in range(prompts)
            for place in range(4)
        ]
    )


def mixed_rows() -> pd.DataFrame:
    """Pairs, demonstrations and prompts, some of the same prompts."""
    pairs = [{"kind": "pair", **row} for row in tiny.preference_rows(120)]
    demonstrations = [
        {"kind": "demonstration", "prompt": pair["prompt"], "answer": f"shown {number}"}
        for number, pair in enumerate(pairs[::3])
    ]
    demonstrations += [{"kind": "demonstration", "prompt": f"new {n}", "answer": f"new {n}"} for n in range(40)]
    demonstrations += [
        {"kind": "demonstration", "prompt": f"said {n}", "answer": pairs[n]["chosen"]} for n in range(40)
    ]
    asked = [{"kind": "prompt", "prompt": pair["prompt"]} for pair in pairs[::20]]
    return canonical([*pairs, *demonstrations, *asked, *({"kind": "prompt", "prompt": f"only {n}"} for n in range(9))])


def rated_entry(shares: Split = SHARES) -> Dataset:
    files = {"texts": "t.txt", "ratings": "r.txt"}
    return Dataset(format="rated_sentences", source={"files": files}, prompt="About {topic}:\n", split=shares)


def rated_rows(count: int = 400) -> pd.DataFrame:
    """Sentences about one noun each; noun and mood are drawn apart, so that every noun is a topic."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(count):
        like = bool(draw.integers(2))
        ratings = [float(value) for value in draw.integers(1, 5, size=4) * (1 if like else -1)]
        words = f"{draw.choice(MOODS[not like])} {draw.choice(NOUNS)} {draw.choice(MOODS[not like])} number {number}"
        rows.append({"kind": "rated", "answer": words, "score": float(np.mean(ratings)), "ratings": ratings})
    return canonical(rows)


CASES = {
    "preferences": (preference_rows, preferences_entry),
    "scored": (scored_rows, preferences_entry),
    "mixed": (mixed_rows, preferences_entry),
    "rated_sentences": (rated_rows, lambda: rated_entry(Split(seed=1, **SHARES.model_dump(exclude={"seed"})))),
}


def said(part: pd.DataFrame) -> set[str]:
    """Every answer in a part."""
    return set(texts_of(part).to_numpy().ravel())


def parts_of(kind: str) -> dict[str, pd.DataFrame]:
    """The parts that may share nothing, and the prompts, which are held out."""
    rows, entry = CASES[kind][0](), CASES[kind][1]()
    tables = split(rows, entry)
    pairs = tables["preferences"]
    return {
        "demonstrations": tables["demonstrations"],
        "train": pairs[pairs["part"] == "train"],
        "held_out": pairs[pairs["part"] == "held_out"],
        "gold": tables["gold"],
        "prompts": tables["prompts"],
    }


# -- hashes and shares -------------------------------------------------------------------------------------------


@given(st.integers(), st.text())
def test_a_unit_hash_is_in_the_unit_interval(seed: int, text: str) -> None:
    assert 0 <= unit_hash(seed, text) < 1
    assert unit_hash(seed, text) == unit_hash(seed, text)


def test_a_unit_hash_depends_on_every_argument_and_their_borders() -> None:
    assert len({unit_hash(0, "ab"), unit_hash(1, "ab"), unit_hash(0, "a", "b"), unit_hash(0, "b", "a")}) == 4


def test_a_lone_surrogate_can_be_hashed() -> None:
    assert 0 <= unit_hash("\ud800") < 1


def test_the_shares_of_prompts_are_those_asked_for() -> None:
    """20,000 prompts: a share has a standard error of at most 0.0035."""
    counts = Counter(part_of(f"prompt {number}", SHARES) for number in range(20_000))
    expected = {"demonstrations": 0.2, "preferences": 0.35, "held_out": 0.25, "gold": 0.2}
    assert {part: count / 20_000 for part, count in counts.items()} == pytest.approx(expected, abs=0.015)


def test_another_seed_deals_anew() -> None:
    other = SHARES.model_copy(update={"seed": 1})
    moved = sum(part_of(f"p{number}", SHARES) != part_of(f"p{number}", other) for number in range(1000))
    assert 600 < moved < 850  # 1 − (0.2² + 0.35² + 0.25² + 0.2²) = 0.735 of them


# -- agreement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ([3], [1], 1),
        ([1], [1], 0.5),
        ([1], [3], 0),
        ([1, 2], [1, 2], 0.5),
        ([3, 1], [2, 1], (1 + 1 + 0 + 0.5) / 4),
        ([4, 4, 4], [1, 5], 3 / 6),
        ([4], None, float("nan")),
        ([], [4], float("nan")),
    ],
)
def test_agreement_by_hand(chosen: list[float], rejected: list[float], expected: float) -> None:
    assert agreement(chosen, rejected) == pytest.approx(expected, nan_ok=True)


RATINGS = st.lists(st.integers(-4, 4), min_size=1, max_size=12)


@given(RATINGS, RATINGS)
def test_agreement_of_the_other_way_round_is_the_rest(one: list[int], two: list[int]) -> None:
    assert agreement(one, two) + agreement(two, one) == pytest.approx(1)


# -- topics ------------------------------------------------------------------------------------------------------


def corpus(counts: dict[str, tuple[int, int]]) -> tuple[list[str], list[bool]]:
    """Answers that hold one word each, so many of them liked and so many not."""
    answers, liked = [], []
    for word, (good, bad) in counts.items():
        answers += [f"{word} it is"] * (good + bad)
        liked += [True] * good + [False] * bad
    return answers, liked


def test_a_word_both_moods_share_is_a_topic_and_a_word_of_one_mood_is_not() -> None:
    answers, liked = corpus({"castle": (10, 10), "splendid": (20, 0), "dreadful": (1, 19)})
    found = dict(zip(answers, topics(answers, liked), strict=True))
    assert found == {"castle it is": "castle", "splendid it is": None, "dreadful it is": None}


def test_a_rare_word_is_no_topic() -> None:
    half = TOPIC_ROWS // 2
    answers, liked = corpus({"castle": (half, half), "robot": (half, half - 1)})
    assert set(topics(answers, liked)) == {"castle", None}


@pytest.mark.parametrize(("good", "found"), [(6, False), (7, True), (13, True), (14, False)])
def test_a_topic_has_at_least_thirty_five_percent_of_either_mood(good: int, found: bool) -> None:
    answers, liked = corpus({"castle": (good, 20 - good)})
    assert ("castle" in topics(answers, liked)) is found


def test_the_rarest_topic_is_taken_and_the_first_in_the_alphabet_of_two() -> None:
    answers, liked = corpus({"castle": (10, 10), "garden": (10, 10), "robot": (8, 8)})
    answers += ["castle garden robot", "garden castle", "Castle, GARDEN!"]
    assert topics(answers, [*liked, True, True, False])[-3:] == ["robot", "castle", "castle"]


def test_short_and_common_words_are_no_topics() -> None:
    answers, liked = corpus({"the": (10, 10), "there": (10, 10), "sea": (10, 10)})
    assert set(topics(answers, liked)) == {None}


def test_a_word_counts_once_an_answer() -> None:
    half = TOPIC_ROWS // 2
    answers = ["castle castle castle"] * (half - 1) * 2
    assert set(topics(answers, [True, False] * (half - 1))) == {None}


# -- pairs -------------------------------------------------------------------------------------------------------


def rated(scores: dict[str, float], prompt: str = "p") -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"row_id": name, "prompt": prompt, "answer": f"answer {name}", "score": score, "ratings": [score]}
            for name, score in scores.items()
        ]
    )


def test_the_answer_rated_higher_is_the_chosen_one() -> None:
    pairs = pairs_of(rated({"a": 1.0, "b": 3.0}), 1, 0)
    assert pairs.to_dict("records") == [
        {
            "prompt": "p",
            "chosen": "answer b",
            "rejected": "answer a",
            "margin": 2.0,
            "agreement": 1.0,
            "chosen_id": "b",
            "rejected_id": "a",
        }
    ]


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_no_answer_is_used_too_often_and_no_pair_twice(uses: int) -> None:
    rows = pd.concat([rated({f"{p}{n}": float(n) for n in range(9)}, p) for p in "pq"])
    pairs = pairs_of(rows, uses, 0)
    used = Counter([*pairs["chosen_id"], *pairs["rejected_id"]])
    assert max(used.values()) <= uses
    assert len({frozenset(ids) for ids in zip(pairs["chosen_id"], pairs["rejected_id"], strict=True)}) == len(pairs)
    assert (pairs["margin"] > 0).all()
    assert (pairs["chosen_id"].str[0] == pairs["rejected_id"].str[0]).all()
    # Taken greedily from all possible pairs, at most `uses` answers of a prompt are left with uses to spare.
    spare = [name for name in rows["row_id"] if used[name] < uses]
    assert len(spare) <= 2 * uses


def test_answers_rated_the_same_make_no_pair() -> None:
    pairs = pairs_of(rated({"a": 1.0, "b": 1.0, "c": 1.0}), 2, 0)
    assert pairs.empty
    assert list(pairs.columns) == [
        "prompt",
        "chosen",
        "rejected",
        "margin",
        "agreement",
        "chosen_id",
        "rejected_id",
    ]


def test_pairs_do_not_depend_on_the_order_of_rows() -> None:
    rows = rated({f"r{number}": float(number % 4) for number in range(12)})
    expected = pairs_of(rows, 2, 0).reset_index(drop=True)
    pd.testing.assert_frame_equal(pairs_of(rows[::-1], 2, 0).reset_index(drop=True), expected)


# -- the whole split ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CASES)
def test_no_prompt_stands_in_two_parts(kind: str) -> None:
    parts = parts_of(kind)
    prompts = [set(parts[name]["prompt"]) for name in ("demonstrations", "train")]
    prompts.append(set(parts["held_out"]["prompt"]) | set(parts["prompts"]["prompt"]))
    assert all(prompts)
    assert sum(map(len, prompts)) == len(set.union(*prompts))


@pytest.mark.parametrize(
    "spell", [str.upper, lambda text: f"  {text}?!", lambda text: text.replace(" ", "\u2003\n")], ids=range(3)
)
def test_a_prompt_that_is_spelled_otherwise_stays_in_its_part(spell: Callable[[str], str]) -> None:
    """Of 60 prompts in two spellings, dealt alone, about 43 would come apart."""
    told = [{"kind": "pair", "prompt": f"café {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(60)]
    other = [{**row, "prompt": spell(row["prompt"]), "chosen": f"well {row['chosen']}"} for row in told]
    rows = canonical([*told, *other])
    tables = split(rows, preferences_entry())
    parts = {
        "demonstrations": tables["demonstrations"],
        **dict(iter(tables["preferences"].groupby("part"))),
    }
    where: dict[str, set[str]] = {}
    for name, part in parts.items():
        for prompt in part["prompt"]:
            where.setdefault(prompt, set()).add(name)
    assert len(where) > 40
    for row, also in zip(told, other, strict=True):
        assert where.get(row["prompt"]) == where.get(also["prompt"])


def test_a_demonstration_whose_prompt_is_compared_elsewhere_is_left_out_however_it_is_spelled() -> None:
    pairs = [{"kind": "pair", "prompt": f"p {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(60)]
    shown = [{"kind": "demonstration", "prompt": f"P  {n}!", "answer": f"shown {n}"} for n in range(60)]
    tables = split(canonical([*pairs, *shown]), preferences_entry())
    compared = {prompt.replace(" ", "") for prompt in tables["preferences"]["prompt"]}
    demonstrated = {prompt.lower().replace(" ", "").strip("!") for prompt in tables["demonstrations"]["prompt"]}
    assert compared and demonstrated
    assert not compared & demonstrated


def test_an_answer_that_is_spelled_otherwise_stands_in_one_part() -> None:
    told = [
        {"kind": "pair", "prompt": f"p{n}", "chosen": f"yes {n % 30}", "rejected": f"NO {n % 30}!"} for n in range(120)
    ]
    for row in told[60:]:
        row |= {"chosen": row["chosen"].upper(), "rejected": row["rejected"].lower()}
    tables = split(canonical(told), preferences_entry())
    parts = [tables["demonstrations"], tables["gold"], *(part for _, part in tables["preferences"].groupby("part"))]
    texts = [{text.lower().strip("!") for text in said(part)} for part in parts]
    assert sum(map(len, texts)) == len(set.union(*texts)) > 20


def test_a_prompt_with_thousands_of_answers_makes_pairs_of_most_of_them() -> None:
    rows = canonical(
        [{"kind": "rated", "prompt": "p", "answer": f"a{n}", "score": n % 2 * 2 - 1} for n in range(20_000)]
    )
    pairs = pairs_of(rows, 1, 0)  # every two of them would be 200 million
    assert 8_000 < len(pairs) <= 10_000
    assert set(pairs["margin"]) == {2}
    assert pd.concat([pairs["chosen_id"], pairs["rejected_id"]]).is_unique
    pd.testing.assert_frame_equal(pairs_of(rows[::-1], 1, 0), pairs)


@pytest.mark.parametrize("kind", CASES)
def test_no_text_stands_in_two_parts(kind: str) -> None:
    texts = [said(part) for name, part in parts_of(kind).items() if name != "prompts"]
    assert all(texts)
    assert sum(map(len, texts)) == len(set.union(*texts))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_rows_changes_nothing(kind: str, seed: int) -> None:
    rows, entry = CASES[kind][0](), CASES[kind][1]()
    expected = split(rows, entry)
    shuffled = split(rows.sample(frac=1, random_state=seed), entry)
    for table in expected:
        pd.testing.assert_frame_equal(shuffled[table], expected[table])


@pytest.mark.parametrize("kind", CASES)
def test_the_prompts_are_those_held_out(kind: str) -> None:
    rows, entry = CASES[kind][0](), CASES[kind][1]()
    tables = split(rows, entry)
    pairs = tables["preferences"]
    assert tables["prompts"]["prompt"].is_unique
    asked = set(rows.loc[rows["kind"] == "prompt", "prompt"])
    assert set(tables["prompts"]["prompt"]) == set(pairs[pairs["part"] == "held_out"]["prompt"]) | asked
    assert list(tables["prompts"]) == ["prompt", "source"]


def test_a_prompt_knows_its_source_and_topic_by_the_first_record_that_has_it() -> None:
    """Whatever the order of the rows: the first in files and lines says it."""
    rows = canonical(
        [
            {"kind": "prompt", "prompt": prompt, "source": source, "file": f"{source}.jsonl"}
            for source in ("b", "a")
            for prompt in ("in both", f"in {source}")
        ]
    ).assign(topic=["two", None, "one", None])
    for order in (rows, rows.iloc[::-1]):
        prompts = split(order, preferences_entry())["prompts"].set_index("prompt")
        assert prompts["source"].to_dict() == {"in both": "a", "in a": "a", "in b": "b"}
        assert prompts["topic"].dropna().to_dict() == {"in both": "one"}


def test_topics_pass_all_stages_where_the_registry_names_their_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [{"kind": "rhyme"}, {"kind": ["a", "b"]}, {"kind": 7}, {}]
    records = [{"prompt": f"question {number}", **kind} for number, kind in enumerate(kinds)]
    settings = {"format": "prompts", "source": {"files": {"mine": "p.jsonl"}}, "columns": {"topic": "kind"}}
    tiny.validated({"p.jsonl": records}, tmp_path / "data/mine", **settings)
    (tmp_path / "data/datasets.yaml").write_text(json.dumps({"datasets": {"mine": settings}}))
    monkeypatch.chdir(tmp_path)
    main("mine")
    prompts = pd.read_parquet(tmp_path / "data/mine/prompts.parquet").set_index("prompt")
    assert set(prompts["source"]) == {"mine"}
    told = prompts["topic"].dropna().to_dict()
    assert told == {"question 0": "rhyme", "question 1": "a\nb", "question 2": "7"}


def test_every_pair_of_a_preference_file_lands_in_one_part() -> None:
    rows = preference_rows()
    rows["chosen"] += rows["row_id"]
    rows["rejected"] += rows["row_id"]
    tables = split(rows, preferences_entry())
    landed = [*tables["demonstrations"]["row_id"], *tables["preferences"]["chosen_id"], *set(tables["gold"]["row_id"])]
    assert sorted(landed) == sorted(rows["row_id"])
    assert set(tables["gold"]["score"]) == {1.0, -1.0}


def test_a_rated_sentence_is_used_as_often_as_its_part_allows() -> None:
    for part, frame in parts_of("rated_sentences").items():
        if part in USES:
            used = Counter([*frame["chosen_id"], *frame["rejected_id"]])
            assert max(used.values()) <= USES[part]
            assert (frame["margin"] > 0).all()
            assert frame["agreement"].between(0, 1).all()


def test_the_ratings_of_gold_are_the_peoples_own() -> None:
    rows = rated_rows().set_index("row_id")
    gold = parts_of("rated_sentences")["gold"]
    assert list(gold["score"]) == list(rows.loc[gold["row_id"], "score"])
    assert list(gold["answer"]) == list(rows.loc[gold["row_id"], "answer"])


def test_a_sentence_without_a_topic_goes_to_gold() -> None:
    rows = rated_rows()
    odd = canonical([{"kind": "rated", "row_id": "odd", "answer": "zyzzyva", "score": 1.0, "ratings": [1.0]}])
    tables = split(pd.concat([rows, odd]), CASES["rated_sentences"][1]())
    assert "odd" in set(tables["gold"]["row_id"])


def test_no_row_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="the split leaves nothing") as caught:
        split(preference_rows().head(0), preferences_entry())
    assert "0 rows" in str(caught.value)
    assert "data/datasets.yaml" in str(caught.value)


def test_a_text_everybody_says_is_left_to_the_part_that_is_served_first() -> None:
    tables = split(preference_rows().assign(chosen="yes", rejected="no"), preferences_entry())
    assert [len(tables[name]) > 0 for name in ("gold", "preferences", "demonstrations")] == [True, False, False]


def test_a_phrase_like_a_refusal_costs_no_pair() -> None:
    """One rejected answer under all prompts says nothing of any of them; under a few it would be a leak."""
    rows = preference_rows()
    rows["chosen"] += rows["row_id"]
    rows["rejected"] = "I cannot help with that."
    tables = split(rows, preferences_entry())
    assert pairs_left_out(rows, tables) == 0
    assert {*tables["preferences"]["rejected"]} == {"I cannot help with that."}
    few = preference_rows()
    few.loc[: PHRASE - 2, "rejected"] = "I cannot help with that."
    tables = split(few, preferences_entry())
    parts = [set(texts_of(part).to_numpy().ravel()) for part in tables.values()]
    assert sum("I cannot help with that." in part for part in parts) == 1
    assert pairs_left_out(few, tables) > 0


# -- what each kind of row is for --------------------------------------------------------------------------------


def test_ties_are_never_compared() -> None:
    rows = preference_rows()
    rows["chosen"] += rows["row_id"]
    rows["rejected"] += rows["row_id"]
    rows["tie"] = [number % 2 == 0 for number in range(len(rows))]
    ties = set(rows.loc[rows["tie"], "row_id"])
    tables = split(rows, preferences_entry())
    used = {*tables["preferences"]["chosen_id"], *tables["gold"]["row_id"], *tables["demonstrations"]["row_id"]}
    assert used == set(rows["row_id"]) - ties


def test_rated_answers_of_a_prompt_make_pairs_without_raw_ratings() -> None:
    pairs = parts_of("scored")["train"]
    assert (pairs["margin"] > 0).all()
    assert pairs["agreement"].isna().all()
    for pair in pairs.itertuples():
        assert pair.chosen.split()[0] == pair.rejected.split()[0] == pair.prompt[1:]
        assert min(int(pair.chosen[-1]), 2) - min(int(pair.rejected[-1]), 2) == pair.margin


def test_prompts_without_answers_are_held_out_with_all_that_belongs_to_them() -> None:
    rows, parts = mixed_rows(), parts_of("mixed")
    asked = set(rows.loc[rows["kind"] == "prompt", "prompt"])
    assert len(asked) == 21
    assert asked <= set(parts["prompts"]["prompt"])
    assert not asked & (set(parts["train"]["prompt"]) | set(parts["demonstrations"]["prompt"]))
    compared = rows[(rows["kind"] == "pair") & rows["prompt"].isin(asked)]
    assert not said(compared) & said(parts["train"])


def test_demonstrations_alone_are_enough() -> None:
    rows = canonical([{"kind": "demonstration", "prompt": f"p{n}", "answer": f"a{n}"} for n in range(200)])
    tables = split(rows, preferences_entry())
    shown = tables["demonstrations"]
    assert 100 < len(shown) <= 200
    assert (shown["completion"] == "a" + shown["prompt"].str[1:]).all()
    assert tables["preferences"].empty
    assert tables["gold"].empty


def test_prompts_alone_are_enough() -> None:
    rows = canonical([{"kind": "prompt", "prompt": f"p{n}"} for n in range(20)])
    tables = split(rows, preferences_entry())
    assert set(tables["prompts"]["prompt"]) == set(rows["prompt"])
    assert all(tables[name].empty for name in ("demonstrations", "preferences", "gold"))


def test_an_answer_thumbed_down_is_no_demonstration() -> None:
    rows = canonical(
        [{"kind": "rated", "prompt": f"p{n}", "answer": f"a{n}", "score": 1.0 if n % 2 else -1.0} for n in range(200)]
    )
    shown = split(rows, preferences_entry())["demonstrations"]
    assert len(shown) > 5
    assert all(int(answer[1:]) % 2 for answer in shown["completion"])


def test_tables_keep_their_columns_whatever_is_in_them() -> None:
    for rows in (preference_rows(), scored_rows(), mixed_rows()):
        tables = split(rows, preferences_entry())
        assert list(tables["demonstrations"]) == ["prompt", "completion", "row_id"]
        assert list(tables["gold"]) == ["answer", "score", "row_id"]
        assert list(tables["preferences"]) == [
            "prompt",
            "chosen",
            "rejected",
            "margin",
            "agreement",
            "chosen_id",
            "rejected_id",
            "part",
        ]


def test_the_stages_follow_each_other_and_name_rows_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "datasets.yaml").write_text(tiny.REGISTRY, encoding="utf-8")
    valid, _, _ = tiny.validated({"pairs.jsonl": tiny.preference_rows()}, tmp_path / "data" / "tiny")
    main("tiny")
    tables = {
        name: pd.read_parquet(tmp_path / "data" / "tiny" / f"{name}.parquet")
        for name in ("demonstrations", "preferences", "prompts", "gold")
    }
    ids = {row["row_id"] for row in valid}
    assert {*tables["preferences"]["chosen_id"], *tables["demonstrations"]["row_id"], *tables["gold"]["row_id"]} <= ids
    counts = json.loads((tmp_path / "data" / "tiny" / "split.json").read_text())
    assert {name: counts[name] for name in tables} == {name: len(table) for name, table in tables.items()}
