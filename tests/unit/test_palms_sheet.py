"""Sheets for people to rate: seeded order, nothing that says whose, and ratings that come back by topic."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from flows.palms import app
from steps import palms, palms_sheet
from steps.artifact import COMPLETIONS, NEXT_ROUND
from steps.errors import DataError

TOPICS = """\
topics:
  - {name: health, position: Send people to a doctor., weaknesses: [diagnoses]}
  - {name: work, position: Be fair., weaknesses: [is rude]}
"""


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """Two topics with five probes each, two answers to a probe, before and after."""
    folder = tmp_path / "var/store/evaluate-0"
    folder.mkdir(parents=True)
    (folder / palms.TOPICS).write_text(TOPICS, encoding="utf-8")
    asked = [(topic, number, draw) for draw in range(2) for topic in ("health", "work") for number in range(5)]
    said = (tuple(f"{who} {topic}{number}{draw}" for who in ("one", "two")) for topic, number, draw in asked)
    rows = [(topic, f"{topic} {number}?", *both) for (topic, number, _), both in zip(asked, said, strict=True)]
    pd.DataFrame(rows, columns=["topic", "prompt", "start", "policy"]).assign(
        start_score=0.0, policy_score=1.0
    ).to_parquet(folder / COMPLETIONS)
    return folder


def written(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def rated(path: Path, out: Path, rating) -> Path:
    """A rater's copy, with what `rating` says of each row."""
    rows = written(path)
    with out.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "rating": rating(row)} for row in rows)
    return out


def test_every_answer_is_in_the_sheet_once_and_nothing_says_whose_it_is(evaluation: Path, tmp_path: Path) -> None:
    done = palms_sheet.export(evaluation, tmp_path / "sheet.csv", tmp_path / "keys")
    rows = written(done.file)
    assert len(rows) == done.answers == 40 and len({row["answer"] for row in rows}) == 40
    assert {row["position"] for row in rows if row["topic"] == "work"} == {"Be fair."}
    assert list(rows[0]) == list(palms_sheet.COLUMNS) and {row["rating"] for row in rows} == {""}
    text = done.file.read_text(encoding="utf-8-sig")
    assert not any(word in text for word in ("start", "policy", "before", "after", "base"))
    assert [row["id"].rpartition("-")[2] for row in rows] == [f"{place:04d}" for place in range(1, 41)]


def test_the_order_is_drawn_from_the_seed_and_mixes_both_models(evaluation: Path, tmp_path: Path) -> None:
    sheets = [
        palms_sheet.export(evaluation, tmp_path / f"{place}.csv", tmp_path / "keys", seed=seed).file
        for place, seed in enumerate((0, 0, 1))
    ]
    orders = [[row["answer"] for row in written(sheet)] for sheet in sheets]
    assert orders[0] == orders[1] != orders[2]
    whose = [answer.split()[0] for answer in orders[0]]
    assert 5 <= whose[:20].count("one") <= 15
    assert sum(one != other for one, other in itertools.pairwise(whose)) > 10


def test_ratings_come_back_by_topic_with_the_mean_over_raters_first(evaluation: Path, tmp_path: Path) -> None:
    """Before: 1 by both. After: 5 and 3 of health, which is ¾ of the scale; 2 and 2 of work, which is ¼."""
    done = palms_sheet.export(evaluation, tmp_path / "sheet.csv", tmp_path / "keys")

    def says(health: int):
        return lambda row: 1 if row["answer"].startswith("one") else health if row["topic"] == "health" else 2

    files = [rated(done.file, tmp_path / f"{name}.csv", says(said)) for name, said in (("ann", 5), ("bo", 3))]
    found = palms_sheet.read_back(files, tmp_path / "keys")
    assert [(one.topic, one.before, one.after, one.probes) for one in found.scores] == [
        ("health", 0, 0.75, 5), ("work", 0, 0.25, 5),
    ]  # fmt: skip
    assert found.raters == {"ann": 40, "bo": 40} and not found.missing and not found.problems
    assert [one.topic for one in palms.weakest(found.scores, 1)] == ["work"]


@pytest.mark.parametrize(
    ("rating", "said"), [("6", "no whole number"), ("0", "no whole"), ("2.5", "no wh"), ("", "no r")]
)
def test_a_rating_off_the_scale_does_not_count_and_is_named(
    rating: str, said: str, evaluation: Path, tmp_path: Path
) -> None:
    done = palms_sheet.export(evaluation, tmp_path / "sheet.csv", tmp_path / "keys")
    first = written(done.file)[0]["id"]
    file = rated(done.file, tmp_path / "ann.csv", lambda row: rating if row["id"] == first else "4.0")
    found = palms_sheet.read_back([file], tmp_path / "keys")
    (problem,) = found.problems
    assert (problem.file, problem.row) == ("ann", 2) and said in problem.what
    assert found.missing == 1 and found.raters == {"ann": 39}
    assert {score.after for score in found.scores} == {0.75}
    assert sum(score.missing for score in found.scores) == 1


def test_an_answer_rated_twice_in_a_file_counts_for_neither(evaluation: Path, tmp_path: Path) -> None:
    done = palms_sheet.export(evaluation, tmp_path / "sheet.csv", tmp_path / "keys")
    file = rated(done.file, tmp_path / "ann.csv", lambda row: 4)
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines, lines[1]]), encoding="utf-8")
    found = palms_sheet.read_back([file], tmp_path / "keys")
    assert found.raters == {"ann": 39} and "rated before" in found.problems[0].what


def test_what_cannot_be_counted_is_an_error(evaluation: Path, tmp_path: Path) -> None:
    done = palms_sheet.export(evaluation, tmp_path / "sheet.csv", tmp_path / "keys")
    with pytest.raises(DataError, match="is there already"):
        palms_sheet.export(evaluation, tmp_path / "sheet.csv", tmp_path / "keys")
    with pytest.raises(DataError, match="no row of the files counts"):
        palms_sheet.read_back([done.file], tmp_path / "keys")
    with pytest.raises(DataError, match="no key fits"):
        palms_sheet.read_back([done.file], tmp_path / "other")
    done.key.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="damaged"):
        palms_sheet.read_back([done.file], tmp_path / "keys")
    (tmp_path / "bad.csv").write_text("id,comment\n", encoding="utf-8")
    with pytest.raises(DataError, match="no column 'rating'"):
        palms_sheet.read_back([tmp_path / "bad.csv"], tmp_path / "keys")


def test_the_commands_from_a_run_to_the_next_round(
    evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFLOOP_ROOT", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")

    def prefloop(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output + str(result.exception)
        return result.output

    assert "40 answers" in prefloop("sheet", "evaluate-0", tmp_path / "sheet.csv")
    file = rated(tmp_path / "sheet.csv", tmp_path / "ann.csv", lambda row: 4 if row["topic"] == "work" else 2)
    told = prefloop("count", file, "--weakest", 1, "--demonstrations", 7, "--out", tmp_path / "aim.yaml")
    assert "health: write 7 (score 0.25 before, 0.25 after)" in told and "ann: 40 ratings" in told
    (evaluation / NEXT_ROUND).write_bytes((tmp_path / "aim.yaml").read_bytes())
    shown = prefloop("next", "evaluate-0")
    assert "health: write 7" in shown and "Send people to a doctor." in shown
    assert json.loads(next((tmp_path / "var/blind").iterdir()).read_text())["kind"] == palms_sheet.KIND
