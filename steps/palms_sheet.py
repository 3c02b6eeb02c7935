"""People rate answers by topic, one at a time and without knowing whose they are: sheets out, ratings back.

As in PALMS (arXiv:2106.10328, §4): a person reads the topic's position, a question and an answer, and says from 1 to 5
how well the answer takes the position. Base and SFT model stand mixed in one sheet; which is whose lies in a key, a
file of its own under `var/blind`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from steps import palms
from steps.artifact import COMPLETIONS, digest_json
from steps.blind import Problem, as_csv, key_of, named_files, rater_rows
from steps.datasets import read_table
from steps.errors import DataError
from steps.palms import AFTER, BEFORE, Topic, TopicScore

COLUMNS = ("id", "topic", "position", "question", "answer", "rating", "comment")
NEEDED = ("id", "rating")
LEAST, MOST = 1, 5  # the scale: 1 goes against the position, 5 takes it well
KIND = "ratings by topic"


@dataclass(frozen=True)
class Sheet:
    """What went out: a file for the raters, the key they must not see, and how many answers."""

    file: Path
    key: Path
    answers: int


@dataclass(frozen=True)
class Ratings:
    """What people said.

    Attributes:
        topics, scores: by topic, a rating r as (r − 1) / 4, the mean over raters first.
        raters: how many ratings of each file count.
        missing: answers of the sheet nobody rated.
        table: topic, prompt, `start_score`, `policy_score`.
    """

    topics: list[Topic]
    scores: list[TopicScore]
    raters: dict[str, int]
    missing: int
    problems: list[Problem]
    table: pd.DataFrame = field(repr=False)


def export(evaluation: Path, out: Path, keys: Path, *, seed: int = 0) -> Sheet:
    """Write every answer of an evaluation by topics as a row to be rated, in an order drawn from the seed.

    Args:
        evaluation: the evaluation's folder.
        out: a new CSV file.
        keys: folder for the key.

    Raises:
        DataError: `out` is there already, or the evaluation was not by topics.
    """
    if out.exists():
        raise DataError(
            "the file is there already, perhaps with somebody's ratings", where=str(out), then="name another"
        )
    topics = palms.read_topics(evaluation / palms.TOPICS)
    table = read_table(evaluation / COMPLETIONS)
    rows = [
        {"topic": topic, "prompt": prompt, "answer": answer, "whose": whose, "draw": draw}
        for whose in (BEFORE, AFTER)
        for draw, (topic, prompt, answer) in enumerate(table[["topic", "prompt", whose]].itertuples(index=False))
    ]
    random.Random(seed).shuffle(rows)  # noqa: S311 - whoever holds the key may know the order
    export_id = digest_json([KIND, seed, rows])[:8]
    rows = [{"id": f"{export_id}-{place:04d}", **row} for place, row in enumerate(rows, start=1)]
    keys.mkdir(parents=True, exist_ok=True)
    key = {"export": export_id, "kind": KIND, "topics": [topic.model_dump(mode="json") for topic in topics]}
    kept = keys / f"{export_id}.json"
    kept.write_text(json.dumps({**key, "rows": rows}, indent=1, ensure_ascii=False), encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    positions = {topic.name: " ".join(topic.position.split()) for topic in topics}
    shown = [
        (row["id"], row["topic"], positions[row["topic"]], palms.question(row["prompt"]), row["answer"]) for row in rows
    ]
    out.write_bytes(as_csv(COLUMNS, shown))
    return Sheet(out, kept, len(rows))


def read_back(files: Sequence[Path], keys: Path, confidence: float = 0.95) -> Ratings:
    """Count what people said.

    Args:
        files: a rater's file each; only `id` and `rating` are read of it.
        keys: folder of the keys.

    Raises:
        DataError: a file cannot be read, no key fits, no rating counts, or a topic has none before and after.
    """
    found = {name: list(rater_rows(path, NEEDED)) for name, path in named_files(files).items()}
    key = key_of(found, keys, _of_sheet, "a sheet", "count where the sheet was written")
    known = {row["id"]: row for row in key["rows"]}
    problems: list[Problem] = []
    said = {name: _ratings(name, rows, known, problems) for name, rows in found.items()}
    rated = pd.DataFrame(
        [(answer, score) for ratings in said.values() for answer, score in ratings.items()], columns=["id", "score"]
    )
    if rated.empty:
        have = "; ".join(f"{file}, row {row}: {what}" for file, row, what in problems[:3])
        raise DataError("no row of the files counts", have=have, then=f"write {LEAST} to {MOST} into `rating`")
    means = rated.groupby("id")["score"].mean()
    answers = pd.DataFrame(key["rows"]).set_index("id").assign(score=means)
    wide = answers.pivot(index=["topic", "prompt", "draw"], columns="whose", values="score").reset_index()
    table = wide.rename(columns={whose: f"{whose}_score" for whose in (BEFORE, AFTER)})
    topics = [Topic.model_validate(one) for one in key["topics"]]
    counts = {name: len(ratings) for name, ratings in said.items()}
    scores = palms.by_topic(table, topics, confidence)
    return Ratings(topics, scores, counts, int(answers["score"].isna().sum()), problems, table)


def _ratings(
    name: str, rows: Sequence[tuple[int, dict[str, str]]], known: dict[str, Any], problems: list[Problem]
) -> dict[str, float]:
    """Id → score of a rater's rows that count; what does not is added to the problems."""
    scores: dict[str, float] = {}
    twice = set()
    for number, row in rows:
        answer, written = row["id"].strip(), (row.get("rating") or "").strip()
        rating = int(float(written)) if re.fullmatch(r"\d(\.0+)?", written) else 0
        if answer not in known:
            problems.append(Problem(name, number, f"the id {answer[:40]!r} is not of this sheet"))
        elif not LEAST <= rating <= MOST:
            what = f"{written[:40]!r} is no whole number from {LEAST} to {MOST}" if written else "no rating"
            problems.append(Problem(name, number, what))
        elif answer in scores:
            problems.append(Problem(name, number, "this answer was rated before in the same file; neither counts"))
            twice.add(answer)
        else:
            scores[answer] = (rating - LEAST) / (MOST - LEAST)
    return {answer: score for answer, score in scores.items() if answer not in twice}


def _of_sheet(key: Any) -> dict[str, Any] | None:
    return key if key["kind"] == KIND and key["rows"] else None
