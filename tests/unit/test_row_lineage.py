"""What saw a row: exact where a step's choice is known, and said to be unknown where a table is gone."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pandas as pd
import pytest
import toy_runs
from rich.console import Console
from toy_runs import Project

from steps import row_lineage
from steps.errors import DataError
from steps.row_lineage import ASKED, FITTED, MEASURED, TRAINED, UNUSED, RowLineage, used
from steps.sections import Pairs
from steps.tracking import Forwarder

FIRST, SECOND = "20260101-000000-toy", "20260102-000000-toy"
ROWS = [row["row_id"] for row in toy_runs.canonical()]
DEMONSTRATIONS, PAIRS, GOLD = ROWS[:4], ROWS[4:10], ROWS[10]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two versions and a run on each; the second version is without the third demonstration."""
    made = toy_runs.make(tmp_path_factory.mktemp("rows") / "project")
    shutil.copytree(toy_runs.REPOSITORY / ".dvc", made.root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    toy_runs.run(made, FIRST)
    keep_in_cache(made)
    toy_runs.version(made, without=frozenset(DEMONSTRATIONS[2:3]))
    toy_runs.run(made, SECOND)
    return made


def keep_in_cache(project: Project) -> None:
    for path in (project.root / "data/toy").glob("*.parquet"):
        md5 = toy_runs.digest_file(path, "md5")
        place = project.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def traced(project: Project, *rows: str, **given: str) -> RowLineage:
    return row_lineage.trace(project.root, project.forwarder, rows=rows, **given)


def uses(found: RowLineage) -> set[tuple[str, str, str]]:
    return {(step.step, step.table.partition("/")[2], use) for step in found.steps for use in step.uses}


def test_a_row_that_was_trained_on(project: Project) -> None:
    found = traced(project, DEMONSTRATIONS[0])
    assert uses(found) == {("sft", "demonstrations", TRAINED)}
    assert [(model.model, model.learnt) for model in found.models] == [
        ("models:/toy/1", "yes"),
        ("models:/toy/2", "yes"),
    ]
    (place,) = found.rows[DEMONSTRATIONS[0]]
    assert place == {"dataset": "toy", "file": "first.jsonl", "line": 1, "part": 0}


def test_a_row_beyond_the_recipes_limit_was_read_and_not_used(project: Project) -> None:
    # Of four demonstrations the recipe takes three; without the third, the fourth is the third.
    found = traced(project, DEMONSTRATIONS[3])
    first, second = (model for model in found.models)
    assert (first.learnt, second.learnt) == ("no", "yes")
    assert uses(found) == {("sft", "demonstrations", UNUSED), ("sft", "demonstrations", TRAINED)}


def test_a_row_that_is_gone_is_found_in_the_version_before(project: Project) -> None:
    found = traced(project, DEMONSTRATIONS[2])
    assert [model.model for model in found.models] == ["models:/toy/1"]
    held = {seen.table: seen.revisions for seen in found.sightings}
    assert set(held) == {"valid", "demonstrations"}
    assert held["demonstrations"] == [project.git("rev-parse", "HEAD~1")]
    assert [revision for _, revision in found.versions["toy"]] == [project.git("rev-parse", "HEAD~1")]


def test_the_judges_row_left_no_trace_in_weights(project: Project) -> None:
    found = traced(project, GOLD)
    assert uses(found) == {("evaluate", "gold", FITTED)}
    assert {model.learnt for model in found.models} == {"no"}


def test_a_held_out_row_is_found_in_the_prompts_by_what_it_says(project: Project) -> None:
    found = traced(project, PAIRS[5])
    assert ("prompts", "content") in {(seen.table, seen.by) for seen in found.sightings}
    assert uses(found) == {
        ("reward", "preferences", MEASURED),
        ("policy", "preferences", MEASURED),
        ("evaluate", "preferences", MEASURED),
        ("evaluate", "prompts", MEASURED),
    }
    assert {model.learnt for model in found.models} == {"no"}


def test_what_the_reward_model_alone_learnt_is_not_in_a_dpo_policy(project: Project) -> None:
    reward = next(step for step in traced(project, PAIRS[2]).steps if step.step == "reward")
    assert reward.uses == {TRAINED: 1}  # margin 2; the reward model wants 1.5
    found = traced(project, PAIRS[0])
    reward = next(step for step in found.steps if step.step == "reward")
    assert reward.uses == {UNUSED: 1}  # margin 0, which the policy takes
    assert {model.learnt for model in found.models} == {"yes"}


def test_all_rows_of_a_file(project: Project) -> None:
    for name in ("first.jsonl", "data/toy/source/first.jsonl"):
        assert set(traced(project, file=name).rows) == set(ROWS)
    with pytest.raises(DataError, match="no version of the data read"):
        traced(project, file="other.jsonl")


def test_a_row_nobody_has_seen(project: Project) -> None:
    with pytest.raises(DataError, match="no version of the data holds such a row"):
        traced(project, "0" * 16)


def test_a_dead_server_is_said_to_know_nothing(project: Project) -> None:
    down = Forwarder("http://127.0.0.1:9", project.root / "nowhere")
    found = row_lineage.trace(project.root, down, rows=[GOLD])
    assert found.sightings and not found.steps and not found.models
    assert any("which runs and models read these tables is not known" in said for said in found.unknown)


def test_tables_that_are_gone_are_said_to_be_unknown(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.root, tmp_path / "copy")
    copy = Project(tmp_path / "copy")
    shutil.rmtree(copy.root / ".dvc/cache")
    found = traced(copy, DEMONSTRATIONS[0])
    assert {model.model for model in found.models} == {"models:/toy/2"}
    assert any("can be had neither from DVC's cache nor from its remote" in said for said in found.unknown)


def test_a_version_that_was_never_committed_is_found_in_the_cache(project: Project, tmp_path: Path) -> None:
    """Data that was replaced before git knew of it: the run that read it knows the tables' md5s."""
    shutil.copytree(project.root, tmp_path / "copy")
    copy = Project(tmp_path / "copy")
    shutil.rmtree(copy.root / ".git")
    copy.git("init", "--quiet")
    found = traced(copy, DEMONSTRATIONS[2])
    assert [(model.model, model.learnt) for model in found.models] == [("models:/toy/1", "yes")]
    (seen,) = found.sightings
    assert (seen.table, seen.revisions) == ("demonstrations", ["no commit"])
    shutil.rmtree(copy.root / ".dvc/cache")
    left = traced(copy, DEMONSTRATIONS[0])
    assert any("so whether it saw the rows is not known" in said for said in left.unknown)
    (copy.root / "data/toy/forgotten.jsonl").write_text(f'{{"row_id": "{DEMONSTRATIONS[2]}"}}\n')
    with pytest.raises(DataError, match=r"it was forgotten: data/toy/forgotten\.jsonl"):
        traced(copy, DEMONSTRATIONS[2])


def test_the_answer_in_words_fits_a_hundred_columns(project: Project) -> None:
    out = Console(width=100, file=io.StringIO())
    row_lineage.print_rows(out, traced(project, DEMONSTRATIONS[3]))
    text = out.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "learnt from them" in text and "in the table it read, not used" in text
    assert DEMONSTRATIONS[3] in text


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, [0, 1, 2, 3]),
        ({"pairs": 2}, [0, 1]),
        ({"min_margin": 1.0}, [1, 2]),
        ({"max_chars": 5}, [1, 2]),
        ({"min_margin": 1.0, "pairs": 1}, [1]),
    ],
)
@pytest.mark.parametrize("section", ["dpo", "relative"])
def test_a_trainers_choice_is_the_one_pairs_makes(
    tmp_path: Path, section: str, settings: dict, trained: list[int]
) -> None:
    from steps.pairs import training_and_held_out

    texts = ["longer answer", "short", "brief", "longer answer too", *(f"h{n}" for n in range(40))]
    frame = pd.DataFrame(
        {
            "prompt": [f"p{n}" for n in range(44)],
            "chosen": [f"{text}" for text in texts],
            "rejected": ["no"] * 44,
            "margin": [0.0, 1.0, 2.0, 0.5] + [0.0] * 40,
            "part": ["train"] * 4 + ["held_out"] * 40,
        }
    )
    frame.to_parquet(tmp_path / "preferences.parquet")
    config = Pairs(**settings, held_out=35)
    params = {f"{section}.{name}": str(value) for name, value in config.model_dump().items()}
    found = used("policy", "preferences", frame, params)
    assert [line for line, use in enumerate(found) if use == TRAINED] == trained
    train, held_out, _ = training_and_held_out(tmp_path / "preferences.parquet", config)
    assert set(train["prompt"]) == {f"p{line}" for line, use in enumerate(found) if use == TRAINED}
    assert set(held_out["prompt"]) == {f"p{line}" for line, use in enumerate(found) if use == MEASURED}


def test_a_policy_that_learns_from_its_own_answers_is_asked_every_prompt() -> None:
    frame = pd.DataFrame({"part": ["train", "train", "held_out", "held_out"], "prompt": list("abcd")})
    assert used("policy", "preferences", frame, {"ppo.held_out": "1"}) == [ASKED, ASKED, MEASURED, UNUSED]


@pytest.mark.parametrize(("weight", "use"), [("0.0", UNUSED), ("0.5", TRAINED)])
def test_the_pre_training_mix_is_trained_on_when_it_is_on(weight: str, use: str) -> None:
    frame = pd.DataFrame({"prompt": ["a"], "completion": ["b"]})
    assert used("policy", "demonstrations", frame, {"ppo.ptx_coefficient": weight}) == [use]


def test_a_step_nobody_described_is_said_to_have_read_the_table() -> None:
    assert used("mystery", "gold", pd.DataFrame({"answer": ["a"]}), {}) == [row_lineage.UNCLEAR]
