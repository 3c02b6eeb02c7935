"""`prefloop collect` on a model of words: rounds add what they say they add, and a collection goes on where it was."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
from forks import Forks
from rich.console import Console
from servers import PrefectServer

from steps import lineage, row_lineage, versions
from steps.collection import Collecting
from steps.collection_run import CollectionRun
from steps.config import load
from steps.errors import DataError, Interrupted, PrefloopError, RecipeError
from steps.experiment import Experiment
from steps.paths import Var
from steps.tracking import forwarder

ROUNDS, PROMPTS, EACH = 2, 8, 3
COMMAND = ["collect", "recipes/tiny.yaml", "--rounds", f"{ROUNDS}", "--prompts", f"{PROMPTS}"]
COMMAND += ["--per-prompt", f"{EACH}", "--labels", "100", "--patience", "2"]


def speak_in_words(base: Path) -> None:
    """Give the tiny model's tokens other spellings: every byte that no row may hold becomes a word, or two."""
    path = base / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    known = (*tiny.GOOD, *tiny.BAD, *tiny.TOPICS)
    words = [f"Ġ{word}" for word in known] + [f"Ġ{a}Ġ{b}" for a, b in itertools.product(known, known)]
    odd = [token for token in vocabulary if len(token) == 1 and not (token.isascii() and token.isalpha())]
    needed = {"Ġ", ":", *"0123456789"}  # of the prompts
    for token, word in zip((token for token in odd if token not in needed), words, strict=False):
        vocabulary[word] = vocabulary.pop(token)
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


@dataclass
class Collected:
    """A project after a collection of two rounds.

    Attributes:
        said: what the command printed; `again`: what it printed when it was given once more.
        before: rows and tables as they were when the collection began.
    """

    root: Path
    said: str
    again: str
    before: pd.DataFrame

    def rounds(self) -> list[dict[str, Any]]:
        return [json.loads((place / "round.json").read_text()) for place in self.places()]

    def places(self) -> list[Path]:
        (place,) = (self.root / "var/collections").iterdir()
        return sorted(place.iterdir())

    def batches(self) -> list[list[dict[str, Any]]]:
        files = sorted((self.root / "data/tiny/source").glob("collected-*"), key=lambda path: path.stem[-1])
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.root / f"data/tiny/{name}.parquet")


@pytest.fixture(scope="module")
def collected(prefloop: Forks, prefect_server: PrefectServer, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    root = tiny.make_project(tmp_path_factory.mktemp("collect") / "project")
    speak_in_words(root / "base")
    versions.prepare("tiny", root)
    before = pd.read_parquet(root / "data/tiny/preferences.parquet")
    prefect_server.start()
    said, again = (prefloop(root, *COMMAND).ended_well() for _ in range(2))
    return Collected(root, said, again, before)


def test_versions_grow_by_exactly_the_pairs_that_were_made(collected: Collected) -> None:
    rounds, batches = collected.rounds(), collected.batches()
    assert [one["on_policy"] + one["off_policy"] for one in rounds] == [len(rows) for rows in batches]
    assert [one["rows"] for one in rounds] == [len(rows) for rows in batches]
    assert [one["quarantined"] for one in rounds] == [0, 0]
    assert len(collected.table("preferences")) == len(collected.before) + sum(map(len, batches))
    assert min(map(len, batches)) > PROMPTS  # more than one pair a prompt
    for one in rounds:
        assert one["labels"] == one["candidates"] <= PROMPTS * (EACH + 1)
        assert one["on_policy"] + one["off_policy"] + one["ties"] <= 2 * PROMPTS
    assert sum(one["labels"] for one in rounds) <= 100


def test_no_prompt_is_sampled_twice_and_none_that_is_held_out(collected: Collected) -> None:
    asked = [set(pd.read_parquet(place / "asked.parquet")["prompt"]) for place in collected.places()]
    assert [len(prompts) for prompts in asked] == [PROMPTS] * ROUNDS
    assert not asked[0] & asked[1]
    part = collected.before.groupby("prompt")["part"].first()
    assert {part[prompt] for prompt in asked[0] | asked[1]} == {"train"}
    held_out = collected.before[collected.before["part"] == "held_out"]
    now = collected.table("preferences")
    assert now[now["part"] == "held_out"].reset_index(drop=True).equals(held_out.reset_index(drop=True))
    rated = set(collected.table("gold")["answer"])
    assert not rated & {row["chosen"] for rows in collected.batches() for row in rows}


def test_every_row_says_where_it_came_from(collected: Collected) -> None:
    for number, (rows, one) in enumerate(zip(collected.batches(), collected.rounds(), strict=True), start=1):
        for row in rows:
            assert row["annotator"] == "judge gold"
            origin = row["collected"]
            assert (origin["round"], origin["model"], origin["judge"]) == (number, one["sampled"], "gold")
            assert origin["policy_digest"] == one["policy_digest"]
            assert origin["margin"] == pytest.approx(origin["scores"][0] - origin["scores"][1]) and origin["margin"] > 0
    kinds = {row["collected"]["kind"] for rows in collected.batches() for row in rows}
    assert kinds == {"on-policy", "off-policy"}
    seeds = [rows[0]["collected"]["seed"] for rows in collected.batches()]
    assert seeds[0] != seeds[1]


def test_pairs_are_as_the_judge_says_and_the_policys_answers_are_its_own(collected: Collected) -> None:
    from steps.judges import GoldJudge

    judge = GoldJudge.from_table(collected.root / "data/tiny/gold.parquet")
    for rows, place in zip(collected.batches(), collected.places(), strict=True):
        pairs = pd.DataFrame(rows)
        assert judge.accuracy(pairs) == 1.0
        candidates = pd.read_parquet(place / "candidates.parquet")
        own = set(candidates.loc[candidates["own"], "answer"])
        for row in rows:
            mine = [row[side] in own for side in ("chosen", "rejected")]
            assert all(mine) if row["collected"]["kind"] == "on-policy" else any(mine)


def test_the_lineage_of_the_next_model_names_the_models_that_were_sampled(collected: Collected) -> None:
    first, second = collected.rounds()
    assert first["sampled"] == "models:/tiny/1"
    assert (first["trained"], second["trained"]) == ("models:/tiny/2", "models:/tiny/3")
    sent = forwarder(Var(collected.root))
    found = lineage.trace("tiny/3", collected.root, sent)
    assert not found.contradictions
    files = sorted(node.title for node in found.nodes if node.kind == "file")
    assert [file.partition("-gold-")[0] for file in files] == [
        "collected-tiny-v1",
        f"collected-tiny-v{second['sampled'].rpartition('/')[2]}",
        "pairs.jsonl",
    ]
    batch = next((collected.root / "data/tiny/source").glob("collected-*-round1.jsonl"))
    told = row_lineage.trace(collected.root, sent, file=batch.name)
    # The round's version was never committed; what it made is known by the run that read it.
    assert [(model.model, model.learnt) for model in told.models] == [
        ("models:/tiny/2", "yes"),
        ("models:/tiny/3", "yes"),
    ]
    assert len(told.rows) == first["rows"]


def test_the_parent_run_holds_every_round(collected: Collected) -> None:
    with sqlite3.connect(collected.root / "var/mlflow.db") as database:
        runs = database.execute("select run_uuid, status from runs where name like '%-tiny-collected%'").fetchall()
        assert [status for _, status in runs] == ["FINISHED"]  # the second call left none
        found = database.execute("select key, step, value from metrics where run_uuid = ?", (runs[0][0],)).fetchall()
        tags = dict(database.execute("select key, value from tags where run_uuid = ?", (runs[0][0],)))
    metrics = {(key, step): value for key, step, value in found}
    for one in collected.rounds():
        for name in ("labels", "ties", "rows", "champion_win_rate"):
            assert metrics[name, one["number"]] == pytest.approx(one[name])
        assert metrics["pairs", one["number"]] == one["on_policy"] + one["off_policy"]
        assert metrics["promoted", one["number"]] == float(one["promoted"])
        assert metrics["reward_margin", one["number"]] == pytest.approx(one["margin"])
    assert tags["round.1.sampled"] == "models:/tiny/1" and tags["round.2.trained"] == "models:/tiny/3"
    assert "rounds are done" in tags["prefloop.stopped"]


def test_the_same_command_again_does_nothing(collected: Collected) -> None:
    assert "all 2 rounds are done" in collected.again
    assert not {"begins", "goes on", "done"} & {line[10:18].strip() for line in collected.again.splitlines()}
    assert len(list((collected.root / "data/tiny/source").iterdir())) == 1 + ROUNDS


def test_the_table_fits_a_terminal_of_100_columns(collected: Collected) -> None:
    table = collected.said[collected.said.rindex("\nround") :].splitlines()
    assert max(map(len, table)) <= 100
    versions = [f"v{one['sampled'].rpartition('/')[2]}" for one in collected.rounds()]
    assert [line.split()[:2] for line in table[2:4]] == [["1", versions[0]], ["2", versions[1]]]
    assert "tiny/1" in collected.said and "all 2 rounds are done" in table[-1]


# -- without an orchestrator -------------------------------------------------------------------------------------


@pytest.fixture
def root(collected: Collected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = Path(shutil.copytree(collected.root, tmp_path / "project", symlinks=True))
    monkeypatch.chdir(copy)
    return copy


def run_of(root: Path, assignments: Sequence[str] = (), **given: Any) -> CollectionRun:
    usual = {"rounds": 3, "prompts": PROMPTS, "per_prompt": EACH}
    how = Collecting.model_validate({**usual, **given})
    return CollectionRun(load(root / "recipes/tiny.yaml", list(assignments)), how, root, Console(quiet=True))


def to_the_batch(run: CollectionRun) -> bytes:
    """The round's batch; not yet added."""
    assert run.look_up() is None
    begun = run.begin()
    run.sample(begun)
    assert run.judge(begun) == ""
    return run._batch(begun).read_bytes()


def test_a_round_that_was_stopped_before_it_was_judged_goes_on_with_the_same_answers(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = Path(shutil.copytree(root, tmp_path / "other", symlinks=True))
    expected = to_the_batch(run_of(untouched, patience=9))

    honest = Experiment.make

    def stopped(self: Experiment, name: str, *given: Any) -> Any:
        if name == "label":
            raise Interrupted("stopped")
        return honest(self, name, *given)

    monkeypatch.setattr(Experiment, "make", stopped)
    first = run_of(root, patience=9)
    with pytest.raises(Interrupted):
        to_the_batch(first)

    made = []
    monkeypatch.setattr(Experiment, "make", lambda self, name, *given: made.append(name) or honest(self, name, *given))
    again = run_of(root, patience=9)
    assert again.begun() == first.begun() and again.begun() is not None
    assert to_the_batch(again) == expected
    assert "sample" not in made and "label" in made

    begun = again.begin()
    found = again.add(begun)
    assert found.rows == found.pairs > 0
    sources = sorted((root / "data/tiny/source").iterdir())
    third = run_of(root, patience=9)  # stopped once more, after the rows were added
    assert third.look_up() is None
    assert third.add(third.begin()) == found
    assert sorted((root / "data/tiny/source").iterdir()) == sources
    assert third.finish(begun, found).trained == ""  # nothing was trained here
    assert third.look_up() == "rounds"


def test_the_reward_model_of_the_present_data_may_judge(root: Path) -> None:
    run = run_of(root, judge="reward", prompts=4, pairs="on-policy")
    rows = [json.loads(line) for line in to_the_batch(run).splitlines()]
    assert rows and {row["collected"]["kind"] for row in rows} == {"on-policy"}
    assert {row["annotator"] for row in rows} == {"judge reward"}
    assert run.place.name.startswith("tiny-reward-")  # not the collection by gold
    assert run.begin().number == 1


def test_people_judge_in_a_sheet_and_the_same_call_goes_on(root: Path) -> None:
    run = run_of(root, judge="file", prompts=3, per_prompt=2, pairs="on-policy")
    assert run.look_up() is None
    begun = run.begin()
    run.sample(begun)
    waits = run.judge(begun)
    sheet = run._sheet(begun)
    assert f"3 comparisons wait for people: in {sheet}" in waits and "A, B or tie" in waits

    rows = list(csv.DictReader(io.StringIO(sheet.read_bytes().decode("utf-8-sig"))))
    assert len(rows) == 3 and not {"policy", "other"} & set(rows[0])
    for filled in ((2, "1 comparisons wait"), (3, "")):
        for row, better in zip(rows[: filled[0]], ("A", "B", "tie"), strict=False):
            row["better"] = better
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        sheet.write_text(stream.getvalue(), encoding="utf-8")
        waits = run_of(root, judge="file", prompts=3, per_prompt=2, pairs="on-policy").judge(begun)
        assert waits.startswith(filled[1]) and bool(waits) == bool(filled[1])
    written = [json.loads(line) for line in run._batch(begun).read_text().splitlines()]
    shown = {row["prompt"]: (row["answer_a"], row["answer_b"]) for row in rows}
    assert len(written) == 2  # the tie makes no row
    for row, better in zip(rows[:2], ("A", "B"), strict=True):
        (made,) = [one for one in written if one["prompt"] == row["prompt"]]
        sides = shown[row["prompt"]] if better == "A" else shown[row["prompt"]][::-1]
        assert (made["chosen"], made["rejected"]) == sides
        assert made["collected"]["judge_identity"] == f"human:{sheet.stem}"


def test_what_cannot_be_collected_is_refused_before_anything_is_drawn(root: Path) -> None:
    with pytest.raises(PrefloopError, match="there is no judge"):
        run_of(root, judge="oracle")
    with pytest.raises(RecipeError, match=r"needs the section evaluate\.llm"):
        run_of(root, judge="llm")
    registry = root / "data/datasets.yaml"
    kept = registry.read_text()
    registry.write_text(kept.replace("format: preferences", "format: scored"))
    with pytest.raises(DataError, match="its format is scored"):
        run_of(root)
    registry.write_text(kept.replace("files:", "hub: some/where\n      elsewhere:").partition("elsewhere")[0])
    with pytest.raises(DataError, match="no rows can be added to 'tiny'"):
        run_of(root)


def test_when_every_prompt_was_sampled_it_says_so(root: Path) -> None:
    run = run_of(root, prompts=1000, pairs="on-policy", per_prompt=2, rounds=2)
    to_the_batch(run)
    begun = run.begin()
    assert begun.prompts == collected_prompts(root)
    run.finish(begun, run.add(begun))
    assert run.look_up() == "prompts"
    assert "every prompt of the training pairs was sampled" in run.ended("prompts")  # it did one round
    with pytest.raises(DataError, match="every prompt of the training pairs was sampled"):
        run_of(root, prompts=1000, pairs="on-policy", per_prompt=2, rounds=2).ended("prompts")


def collected_prompts(root: Path) -> int:
    table = pd.read_parquet(root / "data/tiny/preferences.parquet")
    return table.loc[table["part"] == "train", "prompt"].nunique()
