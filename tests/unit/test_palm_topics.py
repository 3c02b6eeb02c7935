"""Topics, probes and the shipped set; scores by topic; what the next round aims at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from tiny import REPOSITORY, write_rows

from steps import palms
from steps.config import parse
from steps.errors import DataError, RecipeError
from steps.formats import demonstrations
from steps.intervals import wilson
from steps.palms import Probe, Topic, TopicScore

SHIPPED = REPOSITORY / "data/palms"
TWO = [Topic(name=name, position="Be kind.", weaknesses=("is rude",)) for name in ("health", "work")]


def topics_file(folder: Path, text: str) -> Path:
    path = folder / "topics.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def probe(topic: str = "health", prompt: str = "Well?", **fields: object) -> dict:
    return {"topic": topic, "prompt": prompt, "chosen": "Yes, kindly.", "rejected": "Go away.", **fields}


def table(*rows: tuple[str, str, float, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["topic", "prompt", "start_score", "policy_score"])


def score(topic: str, after: float) -> TopicScore:
    return TopicScore(topic, 3, 0.5, 0.1, 0.9, after, 0.0, 1.0, after - 0.5, -1.0, 1.0)


# -- what ships --------------------------------------------------------------------------------------------------


def shipped() -> tuple[list[Topic], list[Probe], list[dict], list[str]]:
    topics = palms.read_topics(SHIPPED / "topics.yaml")
    lines = (SHIPPED / "source/demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    rows = [row for record in records for row in demonstrations(record)]
    return topics, palms.read_probes(SHIPPED / "probes.jsonl", topics), rows, [record["topic"] for record in records]


def test_every_shipped_topic_has_five_demonstrations_and_three_probes() -> None:
    topics, probes, _, labels = shipped()
    names = [topic.name for topic in topics]
    assert len(names) == 8
    assert [labels.count(name) for name in names] == [5] * 8
    assert [sum(probe.topic == name for probe in probes) for name in names] == [3] * 8
    assert set(labels) == set(names)


def test_shipped_answers_are_short_and_no_probe_stands_among_them() -> None:
    _, probes, rows, _ = shipped()
    assert all(40 <= len(row["answer"].split()) <= 80 for row in rows)
    palms.check_apart(probes, [text for row in rows for text in (row["prompt"], row["answer"])])
    questions = [row["prompt"] for row in rows] + [probe.prompt for probe in probes]
    assert len(set(map(palms.spelled, questions))) == len(questions)


def test_neither_side_of_a_shipped_probe_is_told_by_its_length() -> None:
    _, probes, _, _ = shipped()
    ratios = [len(probe.chosen) / len(probe.rejected) for probe in probes]
    assert all(0.8 < ratio < 1.25 for ratio in ratios)
    assert np.mean([ratio > 1 for ratio in ratios]) < 0.8


def test_the_registry_keeps_the_probes_out_of_training() -> None:
    entry = yaml.safe_load((REPOSITORY / "data/datasets.yaml").read_text(encoding="utf-8"))["datasets"]["palms"]
    assert entry["rules"]["evaluation_sets"] == ["data/palms/probes.jsonl"]


# -- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("topics: [", "cannot be read"),
        ("positions: []", "no list `topics`"),
        ("topics: []", "no list `topics`"),
        ("topics: [{name: health, weaknesses: [x]}]", "topic 1 (health): position: missing"),
        ("topics: [{position: x, weaknesses: [x]}]", "topic 1 (without a name): name: missing"),
        ("topics: [{name: Health!, position: x, weaknesses: [x]}]", "topic 1 (Health!): name"),
        ("topics: [{name: health, position: x, weaknesses: []}]", "topic 1 (health): weaknesses"),
        ("topics: [{name: health, position: ' ', weaknesses: [x]}]", "topic 1 (health): position: is blank"),
        ("topics: [{name: a, positon: x, weaknesses: [x]}]", "did you mean 'position'?"),
        ("topics: [{name: a, position: x, weaknesses: [x]}, {name: a, position: x, weaknesses: [x]}]", "'a' stands tw"),
        ("topics: [text]", "topic 1 (without a name)"),
    ],
)
def test_topics_that_are_not_whole_are_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        palms.read_topics(topics_file(tmp_path, text))
    assert said in str(caught.value) and "topics.yaml" in str(caught.value)


def test_every_problem_of_the_topics_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        palms.read_topics(topics_file(tmp_path, "topics: [{name: a}, {name: b, position: x}]"))
    assert str(caught.value).count("missing") == 3


def test_topics_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        palms.read_topics(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([probe(), probe("wrok")], "line 2: no topic 'wrok', did you mean 'work'?"),
        ([probe()], "the topic 'work' has no probe"),
        ([probe(), probe("work", "well")], "line 2: asks what line 1 asks"),
        ([probe(), probe("work", "So?", chosen=" ")], "line 2: chosen is blank"),
        ([probe(), probe("work", "So?", rejected="Yes, kindly. ")], "line 2: chosen and rejected are the same"),
        ([probe(), probe("work", "So?", chosen=7)], "line 2:"),
        ([probe(), {"prompt": "So?", "chosen": "a", "rejected": "b"}], "line 2: no topic ''"),
    ],
)
def test_probes_that_do_not_fit_are_named_by_their_line(rows: list[dict], said: str, tmp_path: Path) -> None:
    path = write_rows(rows, tmp_path / "probes.jsonl")
    with pytest.raises(DataError) as caught:
        palms.read_probes(path, TWO)
    assert said in str(caught.value)


def test_probes_that_are_no_json_or_not_there_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "probes.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="line 1: not JSON"):
        palms.read_probes(tmp_path / "probes.jsonl", TWO)
    with pytest.raises(DataError, match="no such file"):
        palms.read_probes(tmp_path / "none.jsonl", TWO)


def test_a_question_in_turns_is_asked_as_dialogues_are_learnt(tmp_path: Path) -> None:
    sides = {name: [{"role": "assistant", "content": f"{name} it is."}] for name in ("chosen", "rejected")}
    asked = {"topic": "work", "prompt": [{"role": "user", "content": "So?"}], **sides}
    _, one = palms.read_probes(write_rows([probe(), asked], tmp_path / "probes.jsonl"), TWO)
    assert one == Probe("work", "\n\nHuman: So?\n\nAssistant:", " chosen it is.", " rejected it is.")


@pytest.mark.parametrize("learnt", ["Well", " well?! ", "Yes, kindly.", "go away"])
def test_a_probe_that_was_learnt_from_is_refused(learnt: str) -> None:
    with pytest.raises(DataError, match="were learnt from"):
        palms.check_apart([Probe("health", "Well?", "Yes, kindly.", "Go away.")], ["So?", learnt])


def test_a_judge_is_tried_against_a_bad_answer_and_against_a_good_one_on_another_topic() -> None:
    one, two, three = (
        Probe(topic, f"{name}?", f"good {name}", f"bad {name}")
        for topic, name in (("health", "a"), ("health", "b"), ("work", "c"))
    )
    assert palms.trials([one, two, three]).to_numpy().tolist() == [
        ["a?", "good a", "bad a"], ["b?", "good b", "bad b"], ["c?", "good c", "bad c"],
        ["a?", "good a", "good c"], ["b?", "good b", "good c"], ["c?", "good c", "good a"],
    ]  # fmt: skip
    assert len(palms.trials([one])) == 1


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("\n\nHuman: So?\nWell?\n\nAssistant:", "So?\nWell?"),
        ("\n\nHuman: So?\n\nAssistant: Yes.\n\nHuman: Why?\n\nAssistant:", None),
        (" Why? ", "Why?"),
    ],
)
def test_a_question_is_shown_without_the_marks_of_a_dialogue(prompt: str, asked: str | None) -> None:
    assert palms.question(prompt) == (asked or prompt.strip())


def test_a_judge_is_told_every_position() -> None:
    topics = palms.read_topics(SHIPPED / "topics.yaml")
    told = palms.instructions(topics)
    assert all(f"- {topic.name}: {topic.position.strip()}" in told for topic in topics)


# -- scores ------------------------------------------------------------------------------------------------------


def test_an_answer_is_placed_by_the_two_of_its_probe() -> None:
    over_rejected = np.array([0, 1, 1, 0.5, 1, np.nan])
    over_chosen = np.array([0, 0, 1, 0, 0.5, 1])
    found = palms.touchstone_score(over_rejected, over_chosen)
    assert found[:5].tolist() == [0, 0.5, 1, 0.25, 0.75] and np.isnan(found[5])


def test_scores_are_means_over_probes_and_not_over_answers() -> None:
    """Probe a, asked three times, 0 → 1 and 0 → 0 and 0 → 0; probe b, asked once, ½ → 1: after is (⅓ + 1) / 2."""
    once, never = ("health", "a", 0, 1), ("health", "a", 0, 0)
    rows = table(once, never, never, ("health", "b", 0.5, 1), ("work", "c", 1, 1))
    health, work = palms.by_topic(rows, TWO)
    assert (health.topic, health.probes, health.before) == ("health", 2, 0.25)
    assert health.after == pytest.approx(2 / 3) and health.change == pytest.approx(2 / 3 - 0.25)
    assert (health.after_low, health.after_high) == pytest.approx(wilson(4 / 3, 2))
    assert (work.before, work.after, work.change) == (1, 1, 0)
    whole = palms.overall(rows)
    assert whole.probes == 3 and whole.before == pytest.approx(0.5) and whole.after == pytest.approx((4 / 3 + 1) / 3)


def test_an_answer_without_a_verdict_leaves_its_pair_out() -> None:
    rows = table(("health", "a", 0, 1), ("health", "a", 1, np.nan), ("health", "b", 0.5, 0.5), ("work", "c", 1, 1))
    health, _ = palms.by_topic(rows, TWO)
    assert (health.before, health.after, health.missing) == (0.25, 0.75, 1)
    with pytest.raises(DataError, match="'work' has no score"):
        palms.by_topic(rows.assign(start_score=np.where(rows["topic"] == "work", np.nan, 0)), TWO)


def test_the_interval_of_a_change_is_students_over_probes() -> None:
    """d = (0, ½, 1): mean ½, s = ½, so t(0.975; 2) · s / √3 = 4.30265 · 0.288675 = 1.24207, cut off at 1."""
    low, high = palms.change_interval(np.array([0, 0.5, 1]))
    assert low == pytest.approx(0.5 - 4.302653 * 0.5 / 3**0.5, abs=1e-6) and high == 1
    differences = np.array([0.1, 0.2, 0.15, 0.1, 0.2])
    low, high = palms.change_interval(differences)
    half = 2.776445 * np.std(differences, ddof=1) / 5**0.5
    assert (low, high) == pytest.approx((0.15 - half, 0.15 + half), abs=1e-6)


@pytest.mark.parametrize("differences", [[0.5], [0.5, 0.5, 0.5], [0, 0], [1, 1, 1], [-1]])
def test_no_change_is_certain_because_all_probes_moved_alike(differences: list[float]) -> None:
    low, high = palms.change_interval(np.array(differences))
    assert -1 <= low <= differences[0] <= high <= 1 and high - low > 0.5


def test_metrics_are_named_by_topic() -> None:
    named = palms.metrics(palms.by_topic(table(("health", "a", 0, 1), ("work", "c", 1, 0.5)), TWO))
    assert named == {
        "palms/health/before": 0, "palms/health/after": 1, "palms/health/change": 1,
        "palms/work/before": 1, "palms/work/after": 0.5, "palms/work/change": -0.5,
    }  # fmt: skip


# -- the next round ----------------------------------------------------------------------------------------------


def test_the_weakest_topics_are_those_with_the_lowest_score_after_and_ties_go_by_name() -> None:
    scores = [score("work", 0.4), score("health", 0.4), score("art", 0.9), score("love", 0.1)]
    assert [one.topic for one in palms.weakest(scores, 3)] == ["love", "health", "work"]
    assert [one.topic for one in palms.weakest(scores, 9)] == ["love", "health", "work", "art"]


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ({"a": 0.9, "b": 0.6}, 10, {"a": 6, "b": 4}),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 10, {"a": 4, "b": 3, "c": 3}),  # 3⅓ each: the one left over to the first
        ({"a": 0.0, "b": 0.0}, 3, {"a": 2, "b": 1}),
        ({"a": 0.5, "b": 0.3, "c": 0.2}, 3, {"a": 1, "b": 1, "c": 1}),  # 1.5, 0.9, 0.6: the remainders .9 and .6
        ({"a": 1.0, "b": 0.0}, 1, {"a": 1, "b": 0}),
        ({}, 3, {}),
    ],
)
def test_demonstrations_are_parted_by_shortfall_and_none_is_lost(
    weights: dict[str, float], total: int, expected: dict[str, int]
) -> None:
    found = palms.apportioned(weights, total)
    assert found == expected
    assert not found or sum(found.values()) == total


def test_the_next_round_says_what_to_write(tmp_path: Path) -> None:
    rows = table(("health", "a", 0, 0.5), ("health", "b", 0, 0), ("work", "c", 1, 1))
    scores = palms.by_topic(rows, TWO)
    aim = palms.next_round(scores, TWO, rows, count=1, demonstrations=6)
    palms.write_next(aim, tmp_path / "next_round.yaml")
    assert palms.read_next(tmp_path / "next_round.yaml") == aim
    (only,) = aim["topics"]
    assert (only["name"], only["demonstrations"], only["after"]) == ("health", 6, 0.25)
    assert only["worst"] == ["b", "a"] and only["weaknesses"] == ["is rude"]


def test_a_next_round_that_is_not_there_or_damaged_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names no next round"):
        palms.read_next(tmp_path / "next_round.yaml")
    (tmp_path / "next_round.yaml").write_text("- x", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        palms.read_next(tmp_path / "next_round.yaml")


# -- the recipe --------------------------------------------------------------------------------------------------


def recipe(policy: dict | None = None, **evaluate: object) -> dict:
    settings = {"topics": {}, **evaluate}
    return {"name": "x", "model": {"base": "base"}, "policy": policy or {"method": "sft"}, "evaluate": settings}


def test_topics_need_neither_pairs_nor_a_reward_model() -> None:
    assert parse(recipe(), "x").steps == ("base", "sft", "policy", "evaluate", "gate")
    assert "reward" in parse(recipe(topics=None), "x").steps
    assert parse(recipe(), "x").used()["policy"] == {"method": "sft", "start": "sft"}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (recipe({"method": "dpo"}), "set policy.method=sft"),
        (recipe({"method": "sft", "start": "champion"}), "trains nothing that could start at the champion"),
        (recipe(judge="reward"), "name evaluate.reward_model"),
        (recipe(stop_early=True), "leave out stop_early"),
        (recipe(temperatures=[0.5]), "leave out stop_early"),
        (recipe(topics={"answers": 0}), "evaluate.topics.answers"),
    ],
)
def test_a_recipe_whose_topics_cannot_be_told_is_refused(tree: dict, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(tree, "x")
    assert said in str(caught.value)
