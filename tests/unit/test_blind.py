"""Blind comparison by people: nothing of whose answer is whose goes out, nothing that comes back is lost."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from steps.blind import COLUMNS, Exported, export, find_completions, read_back
from steps.errors import DataError
from steps.intervals import wilson
from steps.judges import Comparison
from steps.verdicts import VerdictStore

Cells = dict[str, str]
Rule = Callable[[Cells], str]


def completions(folder: Path, count: int = 40, **texts: str) -> Path:
    """Answers that say whose they are, so that a rater can be made who prefers one model."""
    rows = [
        {
            "prompt": texts.get("prompt", f"question {number}"),
            "policy": f"{texts.get('policy', '')}mine {number}",
            "start": f"{texts.get('start', '')}theirs {number}",
        }
        for number in range(count)
    ]
    pd.DataFrame(rows).to_parquet(folder / "completions.parquet")
    return folder / "completions.parquet"


def exported(
    folder: Path, name: str = "out.csv", count: int = 40, texts: Cells | None = None, **options: Any
) -> Exported:
    return export(completions(folder, count, **(texts or {})), folder / name, folder / "keys", **options)


def rows_of(path: Path) -> list[Cells]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))


def policy_is_better(row: Cells) -> str:
    return "A" if "mine" in row["answer_a"] else "B"


def filled(done: Exported, rule: Rule = policy_is_better, name: str = "ann.csv") -> Path:
    """A rater's copy of the export."""
    return written(done.file.with_name(name), [{**row, "better": rule(row)} for row in rows_of(done.file)])


def written(path: Path, rows: list[Cells]) -> Path:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(stream.getvalue(), encoding="utf-8")
    return path


# -- out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_every_pair_goes_out_and_some_twice_with_the_sides_swapped(tmp_path: Path, name: str) -> None:
    done = exported(tmp_path, name, repeat=0.25)
    rows = rows_of(done.file)
    assert (done.pairs, done.repeats, len(rows)) == (40, 10, 50)
    assert list(rows[0]) == list(COLUMNS)
    shown = [(row["prompt"], row["answer_a"], row["answer_b"]) for row in rows]
    assert len(set(shown)) == 50
    twice = [(prompt, b, a) for prompt, a, b in shown if (prompt, b, a) in shown]
    assert len(twice) == 20
    assert {prompt for prompt, _, _ in shown} == {f"question {number}" for number in range(40)}


def test_nothing_that_goes_out_says_whose_answer_it_is(tmp_path: Path) -> None:
    done = exported(tmp_path)
    text = done.file.read_text(encoding="utf-8-sig")
    assert not any(word in text.casefold() for word in ("policy", "start", "champion", "repeat", "seed"))
    assert all(row["better"] == row["comment"] == "" for row in rows_of(done.file))
    assert done.key.parent != done.file.parent


def test_sides_and_order_are_shuffled(tmp_path: Path) -> None:
    """Of 400 fair coins 150 to 250 fall heads (5 standard deviations), and neighbours tell nothing of each other."""
    rows = rows_of(exported(tmp_path, count=400, repeat=0).file)
    heads = [policy_is_better(row) == "A" for row in rows]
    assert 150 < sum(heads) < 250
    assert 150 < sum(one == other for one, other in itertools.pairwise(heads)) < 250
    assert [row["prompt"] for row in rows] != [f"question {number}" for number in range(400)]
    assert [row["id"].partition("-")[2] for row in rows] == [f"{number:04d}" for number in range(1, 401)]


def test_the_same_seed_makes_the_same_export(tmp_path: Path) -> None:
    first, again, other = (exported(tmp_path, f"{n}.csv", seed=seed) for n, seed in enumerate((1, 1, 2)))
    assert first.file.read_bytes() == again.file.read_bytes()
    assert first.key == again.key != other.key
    assert first.file.read_bytes() != other.file.read_bytes()


@pytest.mark.parametrize("start", ["=1+1 ", "+", "-", "@SUM(A1) ", "\t=1 ", "  =cmd|x ", "\r=1", "＝1", "\n-"])
def test_no_cell_is_a_formula(tmp_path: Path, start: str) -> None:
    done = exported(tmp_path, count=3, texts={"policy": start, "start": start, "prompt": f"{start}x"})
    for row in rows_of(done.file):
        for cell in ("prompt", "answer_a", "answer_b"):
            assert row[cell].startswith("'")
    store = VerdictStore(tmp_path / "v.jsonl")
    read_back([filled(done)], tmp_path / "keys", store)
    originals = {f"{start}{whose} {number}" for whose in ("mine", "theirs") for number in range(3)}
    table = store.table()
    assert {*table["first"], *table["second"]} == originals
    assert set(table["prompt"]) == {f"{start}x"}


def test_what_no_cell_can_hold_is_shown_as_a_sign(tmp_path: Path) -> None:
    done = exported(tmp_path, count=1, texts={"policy": "a\0b\x1b[31m"})
    assert "\N{REPLACEMENT CHARACTER}b" in done.file.read_text(encoding="utf-8-sig")
    assert "\x1b" not in done.file.read_text(encoding="utf-8-sig")


def test_only_so_many_pairs_as_are_asked_for(tmp_path: Path) -> None:
    done = exported(tmp_path, pairs=5, repeat=0.2)
    assert (done.pairs, done.repeats, len(rows_of(done.file))) == (5, 1, 6)
    assert exported(tmp_path, "more.csv", pairs=1000, repeat=0).pairs == 40


def test_a_file_that_may_hold_verdicts_is_not_overwritten(tmp_path: Path) -> None:
    done = exported(tmp_path)
    before = done.file.read_bytes()
    with pytest.raises(DataError, match="there already"):
        exported(tmp_path, seed=3)
    assert done.file.read_bytes() == before


def test_a_rival_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'champion'") as raised:
        exported(tmp_path, rival="champion")
    assert "rivals: start" in raised.value.have


def test_prompts_without_an_answer_of_the_rival_stay_at_home(tmp_path: Path) -> None:
    table = pd.DataFrame({"prompt": ["p", "q"], "policy": ["a", "b"], "human": ["c", None]})
    table.to_parquet(tmp_path / "t.parquet")
    assert export(tmp_path / "t.parquet", tmp_path / "o.csv", tmp_path / "keys", rival="human").pairs == 1


def test_a_run_is_found_by_its_name_and_by_what_its_journal_says(tmp_path: Path) -> None:
    step, run = tmp_path / "var/store/evaluate-0123abcd", tmp_path / "var/runs/20260101-000000-x"
    for folder in (step, run):
        folder.mkdir(parents=True)
    table = completions(step, 2)
    (run / "journal.jsonl").write_text(
        '{"op": "tags", "values": {"step.evaluate": "reused 0123abcd, MLflow run ab"}}\n'
    )
    for where in (str(table), str(step), str(run), run.name, step.name):
        assert find_completions(where, tmp_path) == table
    with pytest.raises(DataError, match="no finished evaluation") as raised:
        find_completions("20260101-000000-y", tmp_path)
    assert "did you mean '20260101-000000-x'?" in raised.value.then


# -- back --------------------------------------------------------------------------------------------------------


def test_the_win_rate_by_hand(tmp_path: Path) -> None:
    """Six for the policy, two ties, two against: 0.7, with Wilson's interval of 7 in 10; sign test of 6 against 2."""

    def rule(row: Cells) -> str:
        number = int(row["prompt"].split()[1])
        better = policy_is_better(row)
        return better if number < 6 else "tie" if number < 8 else {"A": "B", "B": "A"}[better]

    done = exported(tmp_path, count=10, repeat=0)
    result = read_back([filled(done, rule)], tmp_path / "keys")
    assert (result.prompts, result.wins, result.ties, result.losses) == (10, 6, 2, 2)
    assert result.rate == pytest.approx(0.7)
    assert (result.low, result.high) == pytest.approx(wilson(7, 10))
    assert result.p_value == pytest.approx(2 * (1 + 8 + 28) / 256)
    assert not result.problems


def test_several_verdicts_on_a_prompt_count_as_one(tmp_path: Path) -> None:
    done = exported(tmp_path, repeat=0.5)
    alone = read_back([filled(done)], tmp_path / "keys")
    three = read_back([filled(done, name=f"{n}.csv") for n in "abc"], tmp_path / "keys")
    assert len(three.verdicts) == 3 * len(alone.verdicts) == 180
    assert (three.prompts, three.low, three.high) == (alone.prompts, alone.low, alone.high) == (40, *wilson(40, 40))


def test_a_rater_who_always_says_a_contradicts_himself(tmp_path: Path) -> None:
    done = exported(tmp_path, repeat=0.5)
    (rater,) = read_back([filled(done, lambda row: "A")], tmp_path / "keys").raters
    assert rater.repeats is not None
    assert (rater.repeats.same.share, rater.repeats.same.n, rater.repeats.first.share) == (0.0, 20, 1.0)
    (steady,) = read_back([filled(done)], tmp_path / "keys").raters
    assert steady.repeats is not None
    assert (steady.repeats.same.share, steady.repeats.first.share) == (1.0, 0.5)


def test_agreement_of_raters(tmp_path: Path) -> None:
    """Two say the same everywhere, κ = 1; a third always says the opposite of them, κ < 0 for either."""
    done = exported(tmp_path, repeat=0.1)
    opposite = filled(done, lambda row: {"A": "B", "B": "A"}[policy_is_better(row)], "c.csv")
    result = read_back([filled(done, name="a.csv"), filled(done, name="b.csv"), opposite], tmp_path / "keys")
    assert result.kappa["a", "b"] == 1.0
    assert result.kappa["a", "c"] == result.kappa["b", "c"] < 0
    sides = result.verdicts[result.verdicts["repeats"].isna()]
    share = sides["shown"].mean()  # Fleiss: a third of the couples agree; chance is p² + (1 − p)²
    chance = share**2 + (1 - share) ** 2
    assert result.fleiss == pytest.approx((1 / 3 - chance) / (1 - chance))
    assert result.rate == pytest.approx(2 / 3)


def test_what_does_not_count_is_named_by_its_row_and_nothing_else_is_lost(tmp_path: Path) -> None:
    done = exported(tmp_path, count=10, repeat=0)
    rows = [{**row, "better": policy_is_better(row)} for row in rows_of(done.file)]
    other = {"A": "B", "B": "A"}
    rows[0]["better"] = ""
    rows[1]["better"] = "both"
    rows[2]["id"] = "nonsense"
    rows[4]["better"] = f" {rows[4]['better'].lower()} "
    rows += [{**rows[3], "better": other[rows[3]["better"]]}, dict(rows[5])]
    del rows[9]
    result = read_back([written(tmp_path / "ann.csv", rows)], tmp_path / "keys")
    named = {(problem.file, problem.row): problem.what for problem in result.problems}
    assert named == {
        ("ann", 2): "no verdict",
        ("ann", 3): "'both' is none of A, B and tie",
        ("ann", 4): "the id 'nonsense' is not of this export",
        ("ann", 11): "contradicts row 5, same id; neither counts",
        ("ann", 12): "says again what row 7 says; counted once",
    }
    assert (result.prompts, result.rate) == (5, 1.0)
    assert result.raters[0].missing == 2  # the row that was deleted, and the one whose id was changed


def test_ids_bring_texts_back_whatever_was_made_of_them_and_in_any_order(tmp_path: Path) -> None:
    done = exported(tmp_path, count=6, repeat=0)
    rows = [{**row, "better": policy_is_better(row), "comment": "fine"} for row in rows_of(done.file)]
    spoilt = [{**row, "prompt": "#NAME?", "answer_a": "", "answer_b": "1,00"} for row in reversed(rows)]
    store = VerdictStore(tmp_path / "v.jsonl")
    result = read_back([written(tmp_path / "ann.csv", spoilt)], tmp_path / "keys", store)
    assert result.rate == 1.0
    for row in rows:
        verdict = store.get("human:ann", Comparison(row["prompt"], row["answer_a"], row["answer_b"]))
        assert verdict is not None
        assert (verdict.preference, verdict.reason) == (float(row["better"] == "A"), "fine")
    assert set(store.table()["judge"]) == {"human"}


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(";", "cp1252"), ("\t", "utf-16"), (",", "utf-8-sig"), (";", "utf-8")]
)
def test_what_spreadsheets_make_of_csv(tmp_path: Path, delimiter: str, encoding: str) -> None:
    done = exported(tmp_path, count=6, texts={"policy": "für, immer; "}, repeat=0)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(["ID", "Prompt", "answer_a", "answer_b", " Better "])
    for row in rows_of(done.file):
        writer.writerow([row["id"], row["prompt"], row["answer_a"], row["answer_b"], policy_is_better(row)])
    writer.writerow(["", "", "", "", ""])
    (tmp_path / "ann.csv").write_bytes(stream.getvalue().encode(encoding))
    result = read_back([tmp_path / "ann.csv"], tmp_path / "keys")
    assert (result.prompts, result.rate, result.problems) == (6, 1.0, [])


@pytest.mark.parametrize("as_list", [False, True])
def test_json_comes_back_too(tmp_path: Path, as_list: bool) -> None:
    done = exported(tmp_path, "out.jsonl", count=6, repeat=0)
    records = [{**row, "better": policy_is_better(row)} for row in rows_of(done.file)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "ann.jsonl").write_text(json.dumps(records) if as_list else f"{lines}\nnot json\n[3]\n")
    result = read_back([tmp_path / "ann.jsonl"], tmp_path / "keys")
    assert (result.prompts, result.rate) == (6, 1.0)
    assert [problem.row for problem in result.problems] == ([] if as_list else [8, 9])


def test_importing_twice_stores_once(tmp_path: Path) -> None:
    done, store = exported(tmp_path, count=6, repeat=0), VerdictStore(tmp_path / "v.jsonl")
    for _ in range(2):
        assert not read_back([filled(done)], tmp_path / "keys", store).problems
    assert len(store.table()) == 6
    changed = read_back([filled(done, lambda row: "tie")], tmp_path / "keys", store)
    assert len(changed.problems) == 6
    assert "judged otherwise before" in changed.problems[0].what
    assert (changed.rate, len(store.table())) == (0.5, 6)


def test_files_of_one_name_are_two_raters(tmp_path: Path) -> None:
    done = exported(tmp_path, count=6, repeat=0)
    (tmp_path / "b").mkdir()
    first = filled(done)
    second = first.rename(tmp_path / "b" / "ann.csv")
    first = filled(done)
    assert [rater.name for rater in read_back([first, second], tmp_path / "keys").raters] == ["ann", "ann-2"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no column 'id'"),
        ("id,prompt\n1,2\n", "no column 'better'"),
        ("id,better\n", "no key fits"),
        ("id,better\n../../x-1,A\n", "no key fits"),
        ("[1, 2", "not JSON"),
    ],
)
def test_a_file_that_is_no_raters(tmp_path: Path, text: str, match: str) -> None:
    exported(tmp_path)
    (tmp_path / "ann.csv").write_text(text)
    with pytest.raises(DataError, match=match):
        read_back([tmp_path / "ann.csv"], tmp_path / "keys")


def test_a_file_nobody_filled(tmp_path: Path) -> None:
    done = exported(tmp_path)
    with pytest.raises(DataError, match="no row of the files counts"):
        read_back([done.file], tmp_path / "keys")


# -- the command -------------------------------------------------------------------------------------------------


def test_out_and_back_by_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli import app

    monkeypatch.setenv("PREFLOOP_ROOT", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")
    completions(tmp_path)
    run = CliRunner()
    answers, file = str(tmp_path / "completions.parquet"), str(tmp_path / "o.csv")
    out = run.invoke(app, ["compare-blind", "export", answers, file])
    assert out.exit_code == 0, out.output
    assert "40 pairs in" in out.output
    done = Exported(tmp_path / "o.csv", tmp_path, 40, 4, 0)
    ann = filled(done, lambda row: policy_is_better(row) if row["prompt"] != "question 3" else "?", "ann[red].csv")
    back = run.invoke(app, ["compare-blind", "import", str(ann), str(filled(done, name="bob.csv"))])
    assert back.exit_code == 0, back.output
    assert "people prefer the policy to the start in 100.0% of 40 prompts" in " ".join(back.output.split())
    assert "Cohen's κ of ann[red] and bob: 1.00" in back.output
    assert "'?' is none of A, B and tie" in back.output
    table = [line for line in back.output.splitlines() if str(tmp_path) not in line]
    assert max(map(len, table)) <= 100
    assert set(VerdictStore(tmp_path / "var/verdicts/verdicts.jsonl").table()["judge"]) == {"human"}
