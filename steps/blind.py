"""Blind comparison by people: pairs go out as a table without names, verdicts come back.

What goes out says nothing of which answer is whose. That stands in a key, a file of its own under `var/blind`, which
also holds the texts: whatever a spreadsheet made of them, an id brings back what was compared.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd

from steps.agreement import SwapConsistency, fleiss_kappa, rater_pairs, swap_consistency
from steps.artifact import COMPLETIONS, digest_json
from steps.datasets import read_table
from steps.errors import DataError, did_you_mean
from steps.intervals import wilson
from steps.judges import Comparison, Verdict
from steps.statistics import won
from steps.verdicts import VerdictStore

Key = TypeVar("Key")
COLUMNS = ("id", "prompt", "answer_a", "answer_b", "better", "comment")
_NEEDED = ("id", "better")
JUDGE = "human"
LONGEST_CELL = 32_767  # characters a spreadsheet takes
_PREFERENCES = {"a": 1.0, "b": 0.0, "tie": 0.5}
_FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]|[\t\r\n]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


@dataclass(frozen=True)
class Exported:
    """What went out.

    Attributes:
        pairs, repeats: rows are the sum of both.
        too_long: cells that a spreadsheet would cut.
    """

    file: Path
    key: Path
    pairs: int
    repeats: int
    too_long: int


class Problem(NamedTuple):
    """What could not be counted: in which file and row (the header is row 1; of JSON lines, the line), and why."""

    file: str
    row: int
    what: str


@dataclass(frozen=True)
class Rater:
    """One person's verdicts.

    Attributes:
        verdicts: how many count.
        missing: rows of the export that the file does not hold.
        repeats: what became of the pairs shown again with the sides swapped; None where none was judged twice.
    """

    name: str
    verdicts: int
    missing: int
    repeats: SwapConsistency | None


@dataclass(frozen=True)
class BlindResult:
    """What people said of the policy against a rival.

    Attributes:
        rival: whom the policy was compared with.
        prompts: prompts with a verdict; each has the same weight, whoever and how many judged it.
        wins, ties, losses: prompts by the mean of their verdicts.
        rate, low, high: mean preference for the policy, a tie ½, with the Wilson interval over prompts. That takes
            several verdicts on a prompt for one, which is never too narrow.
        p_value: exact sign test of wins against losses.
        raters: one a file.
        kappa: Cohen's κ of each two raters, over sides as they were shown.
        fleiss: Fleiss' κ of three raters or more, over pairs all of them judged.
        verdicts: table of rater, id, prompt, preference (for the policy), shown (for side A), repeats, comment.
    """

    rival: str
    prompts: int
    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float
    p_value: float
    raters: list[Rater]
    kappa: dict[tuple[str, str], float]
    fleiss: float | None
    problems: list[Problem]
    verdicts: pd.DataFrame = field(repr=False)


class _Row(NamedTuple):
    """A row of the key: which texts stand on which side, and whether side A is the policy's."""

    id: str
    prompt: str
    a: str
    b: str
    policy_is_a: bool
    repeats: str | None

    def shown(self) -> tuple[str, str, str, str]:
        """Id, prompt and answers as raters see them: in dialogues the data's answers begin with a space."""
        return self.id, self.prompt, self.a.strip(), self.b.strip()


class _Said(NamedTuple):
    """A row of a rater's file that counts."""

    row: _Row
    shown: float
    comment: str


# -- out ---------------------------------------------------------------------------------------------------------


def find_completions(where: str, root: Path) -> Path:
    """The table of an evaluation's answers.

    Args:
        where: the table, a folder that holds it, a run's report folder, or the name of either under `var/`.

    Raises:
        DataError: there is none.
    """
    runs, store = root / "var" / "runs", root / "var" / "store"
    for place in (Path(where), runs / where, store / where):
        if place.is_file():
            return place
        found = [place / COMPLETIONS, *(store / f"evaluate-{key}" / COMPLETIONS for key in _evaluations(place))]
        if there := [path for path in found if path.is_file()]:
            return there[-1]
    known = [path.name for path in (*runs.glob("*"), *store.glob("evaluate-*"))]
    raise DataError(
        "there is no finished evaluation",
        where=where,
        have=f"no {COMPLETIONS} there",
        then=did_you_mean(where, known) if known else "`prefloop run` makes one",
    )


def _evaluations(run: Path) -> list[str]:
    """Keys of the evaluations a run's journal names."""
    try:
        journal = (run / "journal.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    return re.findall(r'"step\.evaluate": "\w+ ([0-9a-f]+)', journal)


def export(
    completions: Path,
    out: Path,
    keys: Path,
    *,
    rival: str = "start",
    pairs: int | None = None,
    repeat: float = 0.1,
    seed: int = 0,
) -> Exported:
    """Write pairs for people to compare: JSON lines where `out` ends in .jsonl, else CSV for a spreadsheet.

    Sides and order are shuffled. Some pairs come twice, with the sides swapped, to see whether a rater stays with the
    answer or with the side.

    Args:
        completions: table of prompt, policy and the rival.
        keys: folder for the key, which the raters must not see.
        rival: column the policy is compared with.
        pairs: how many, drawn at random; all when not given.
        repeat: share of the pairs that come twice.

    Raises:
        DataError: `out` is there already, the table has no such rival, or nothing to compare.
    """
    if out.exists():
        raise DataError(
            "the file is there already, perhaps with somebody's verdicts", where=str(out), then="name another"
        )
    if not 0 <= repeat <= 1:
        raise DataError("the share of repeated pairs lies between 0 and 1", have=f"{repeat:g}")
    compared = _compared(completions, rival)
    draw = random.Random(seed)  # noqa: S311 - whoever holds the key may know the order
    picked = draw.sample(compared, min(pairs or len(compared), len(compared)))
    export_id = digest_json([seed, repeat, rival, picked])[:8]
    rows = _shuffled(picked, repeat, export_id, draw)
    key = {"export": export_id, "rival": rival, "rows": [row._asdict() for row in rows]}
    keys.mkdir(parents=True, exist_ok=True)
    kept = keys / f"{export_id}.json"
    kept.write_text(json.dumps(key, indent=1, ensure_ascii=False), encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    is_csv = out.suffix.lower() != ".jsonl"
    sheet = as_csv(COLUMNS, [row.shown() for row in rows]) if is_csv else _as_json_lines(rows)
    out.write_bytes(sheet)
    too_long = sum(len(text) > LONGEST_CELL for row in rows for text in (row.prompt, row.a, row.b)) if is_csv else 0
    return Exported(out, kept, len(picked), len(rows) - len(picked), too_long)


def _compared(completions: Path, rival: str) -> list[tuple[str, str, str]]:
    """(prompt, policy's answer, rival's answer), where both are there."""
    try:
        table = read_table(completions)
    except (OSError, ValueError) as error:
        raise DataError("the answers cannot be read", where=str(completions), have=str(error)) from error
    if missing := [name for name in ("prompt", "policy", rival) if name not in table]:
        have = ", ".join(name for name in ("start", "champion", "human") if name in table)
        raise DataError(f"the answers have no column '{missing[0]}'", where=str(completions), have=f"rivals: {have}")
    rows = table[["prompt", "policy", rival]].dropna()
    if rows.empty:
        raise DataError(f"no prompt has answers of the policy and of '{rival}'", where=str(completions))
    return [(str(prompt), str(policy), str(other)) for prompt, policy, other in rows.itertuples(index=False)]


def _shuffled(picked: Sequence[tuple[str, str, str]], repeat: float, export_id: str, draw: random.Random) -> list[_Row]:
    """All rows in the order they are shown; an id says the export and the place, nothing else."""
    sides = [draw.random() < 0.5 for _ in picked]
    again = draw.sample(range(len(picked)), round(repeat * len(picked)))
    shown = [(number, sides[number], False) for number in range(len(picked))]
    shown += [(number, not sides[number], True) for number in again]
    draw.shuffle(shown)
    ids = {(number, second): f"{export_id}-{place:04d}" for place, (number, _, second) in enumerate(shown, start=1)}
    rows = []
    for number, policy_is_a, second in shown:
        prompt, policy, other = picked[number]
        a, b = (policy, other) if policy_is_a else (other, policy)
        repeats = ids[number, False] if second else None
        rows.append(_Row(ids[number, second], prompt, a, b, policy_is_a, repeats))
    return rows


def as_csv(columns: Sequence[str], rows: Iterable[tuple[str, ...]]) -> bytes:
    """A sheet of rows, each an id and texts to read; the last two columns are left for people to fill in."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(columns)
    writer.writerows([name, *map(_harmless, texts), "", ""] for name, *texts in rows)
    return stream.getvalue().encode("utf-8-sig", "replace")  # the mark tells a spreadsheet that it is UTF-8


def _harmless(text: str) -> str:
    """A cell that no spreadsheet takes for a formula, and no reader for the end of the file."""
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))
    return f"'{text}" if _FORMULA.match(text) else text


def _as_json_lines(rows: Iterable[_Row]) -> bytes:
    records = (dict(zip(COLUMNS, (*row.shown(), "", ""), strict=True)) for row in rows)
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8", "replace")


# -- back --------------------------------------------------------------------------------------------------------


def read_back(
    files: Sequence[Path], keys: Path, store: VerdictStore | None = None, confidence: float = 0.95
) -> BlindResult:
    """Count what people said.

    A row that does not count is named, with why; every other one counts.

    Args:
        files: a rater's file each, CSV (commas, semicolons or tabs) or JSON lines; only `id`, `better` and `comment`
            are read of it.
        keys: folder of the keys.
        store: where the verdicts are kept, as judge `human`, identity `human:RATER`.

    Raises:
        DataError: a file cannot be read, no key fits, or no row counts.
    """
    found = {name: list(rater_rows(path, _NEEDED)) for name, path in named_files(files).items()}
    rival, rows = key_of(found, keys, _of_export, "an export", "import where the pairs were exported")
    problems: list[Problem] = []
    said = {name: _said(name, cells, rows, problems) for name, cells in found.items()}
    if store is not None:
        problems += _keep(store, said)
    table = _table(said)
    if table.empty:
        have = "; ".join(f"{file}, row {row}: {what}" for file, row, what in problems[:3])
        raise DataError("no row of the files counts", have=have, then="write A, B or tie into the column `better`")
    prompts = table.groupby(["prompt", "rater", "pair"])["preference"].mean().groupby("prompt").mean().to_numpy()
    counted = won(prompts, confidence)
    low, high = wilson(float(prompts.sum()), len(prompts), confidence)
    kappa, fleiss = _agreement(table)
    return BlindResult(
        rival=rival,
        prompts=len(prompts),
        wins=counted.wins,
        ties=counted.ties,
        losses=counted.losses,
        rate=float(prompts.mean()),
        low=low,
        high=high,
        p_value=counted.p_value,
        raters=[_rater(name, one, rows, found[name]) for name, one in said.items()],
        kappa=kappa,
        fleiss=fleiss,
        problems=problems,
        verdicts=table,
    )


def named_files(files: Sequence[Path]) -> dict[str, Path]:
    """Files by their raters' names: the file's, with a number where two are alike."""
    named: dict[str, Path] = {}
    for path in files:
        name, number = path.stem, 1
        while name in named:
            number += 1
            name = f"{path.stem}-{number}"
        named[name] = path
    return named


def rater_rows(path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(row, cells by column) of a rater's file, CSV or JSON lines; empty rows are passed over.

    Args:
        needed: columns a CSV file must have.

    Raises:
        DataError: it cannot be read, or lacks such a column.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError("a rater's file cannot be read", where=str(path), have=error.strerror or "") from error
    text = _decoded(raw)
    yield from _json_rows(text, path) if text.lstrip()[:1] in ("{", "[") else _csv_rows(text, path, needed)


def _decoded(raw: bytes) -> str:
    """What a spreadsheet may have saved: UTF-8, UTF-16 with its mark, or Windows' Western European."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", "replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace")


def _csv_rows(text: str, path: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    csv.field_size_limit(1 << 27)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise DataError("a rater's file is not CSV", where=str(path), have=str(error)) from error
    names = [name.strip().casefold() for name in rows[0]] if rows else []
    _check_columns(names, path, needed)
    for number, cells in enumerate(rows[1:], start=2):
        if any(cell.strip() for cell in cells):
            yield number, {"id": "", **dict(zip(names, cells, strict=False))}


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Of a JSON list, or of JSON lines; one that cannot be read stands in for its own unknown id."""
    is_list = text.lstrip().startswith("[")
    try:
        pieces = json.loads(text) if is_list else text.split("\n")
    except ValueError as error:
        raise DataError("a rater's file is not JSON", where=str(path), have=str(error)) from error
    for number, piece in enumerate(pieces, start=1):
        if is_list or piece.strip():
            yield number, {"id": "", **_fields(piece, is_list)}


def _fields(piece: Any, is_parsed: bool) -> dict[str, str]:
    try:
        record = piece if is_parsed else json.loads(piece)
    except ValueError:
        return {"id": piece}
    if not isinstance(record, dict):
        return {"id": str(record)}
    return {name.strip().casefold(): "" if value is None else str(value) for name, value in record.items()}


def _check_columns(names: Sequence[str], path: Path, needed: Sequence[str]) -> None:
    if missing := [name for name in needed if name not in names]:
        raise DataError(
            f"a rater's file has no column '{missing[0]}'",
            where=str(path),
            have=", ".join(names[:8]) or "nothing",
            then="save the export with its header, as CSV or JSON lines",
        )


def key_of(
    found: Mapping[str, Sequence[tuple[int, dict[str, str]]]],
    keys: Path,
    read: Callable[[Any], Key | None],
    what: str,
    then: str,
) -> Key:
    """The key that most of the ids in raters' files belong to.

    Args:
        found: each rater's rows, as `rater_rows` gives them.
        read: makes a key of what its file holds; None of a key of another kind.
        what: the key is of, with its article.
        then: what to do where there is none.

    Raises:
        DataError: there is none, or it is damaged.
    """
    named = pd.Series(
        [cells["id"].strip().rpartition("-")[0] for rows in found.values() for _, cells in rows], dtype=str
    )
    for export_id in named.value_counts().index:
        path = keys / f"{export_id}.json"
        if re.fullmatch(r"[0-9a-f]{8}", export_id) and path.is_file():
            try:
                if (key := read(json.loads(path.read_text(encoding="utf-8")))) is not None:
                    return key
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"the key of {what} is damaged", where=str(path), have=str(error)) from error
    raise DataError(
        "no key fits these files",
        where=str(keys),
        have=f"{len(named):,} rows" + (f", the first of {what.split()[-1]} '{named[0]}'" if len(named) else ""),
        then=f"{then}, and leave the column `id` as it was",
    )


def _of_export(key: Any) -> tuple[str, dict[str, _Row]]:
    """(rival, rows by id) of an export's key."""
    return key["rival"], {row["id"]: _Row(**row) for row in key["rows"]}


def _said(
    name: str, cells: Iterable[tuple[int, dict[str, str]]], rows: dict[str, _Row], problems: list[Problem]
) -> list[_Said]:
    """What counts of a rater's file; what does not is added to the problems."""
    taken: dict[str, tuple[int, _Said]] = {}
    contradicted = set()
    for number, cell in cells:
        row = rows.get(cell["id"].strip())
        better = (cell.get("better") or "").strip().strip("'\"").casefold()
        if row is None:
            problems.append(Problem(name, number, f"the id {cell['id'].strip()[:40]!r} is not of this export"))
        elif better not in _PREFERENCES:
            what = f"{better[:40]!r} is none of A, B and tie" if better else "no verdict"
            problems.append(Problem(name, number, what))
        elif row.id not in taken:
            taken[row.id] = number, _Said(row, _PREFERENCES[better], cell.get("comment") or "")
        elif taken[row.id][1].shown == _PREFERENCES[better]:
            problems.append(Problem(name, number, f"says again what row {taken[row.id][0]} says; counted once"))
        else:
            problems.append(Problem(name, number, f"contradicts row {taken[row.id][0]}, same id; neither counts"))
            contradicted.add(row.id)
    return [said for _, said in taken.values() if said.row.id not in contradicted]


def _keep(store: VerdictStore, said: dict[str, list[_Said]]) -> list[Problem]:
    """Store what is not stored yet; where another verdict is, the store keeps that."""
    problems = []
    for name, verdicts in said.items():
        identity, fresh = f"{JUDGE}:{name}", []
        for row, shown, comment in verdicts:
            comparison = Comparison(row.prompt, row.a, row.b)
            before = store.get(identity, comparison)
            if before is None:
                fresh.append((comparison, Verdict(shown, reason=comment)))
            elif before.preference != shown:
                problems.append(Problem(name, 0, f"{row.id} was judged otherwise before; the store keeps that verdict"))
        store.add(JUDGE, identity, fresh)
    return problems


def _table(said: dict[str, list[_Said]]) -> pd.DataFrame:
    columns = ["rater", "id", "pair", "prompt", "preference", "shown", "repeats", "comment"]
    rows = [
        (
            name,
            row.id,
            row.repeats or row.id,
            row.prompt,
            shown if row.policy_is_a else 1 - shown,
            shown,
            row.repeats,
            comment,
        )
        for name, verdicts in said.items()
        for row, shown, comment in verdicts
    ]
    return pd.DataFrame(rows, columns=columns)


def _rater(
    name: str, said: Sequence[_Said], rows: dict[str, _Row], cells: Sequence[tuple[int, dict[str, str]]]
) -> Rater:
    shown = {one.row.id: one.shown for one in said}
    twice = [(shown[one.row.repeats], 1 - one.shown) for one in said if one.row.repeats in shown]
    repeats = swap_consistency([one for one, _ in twice], [two for _, two in twice]) if twice else None
    missing = rows.keys() - {cell["id"].strip() for _, cell in cells}
    return Rater(name, len(said), len(missing), repeats)


def _agreement(table: pd.DataFrame) -> tuple[dict[tuple[str, str], float], float | None]:
    """(Cohen's κ of each two raters, Fleiss' κ of three or more), pairs shown again left out."""
    once = table[table["repeats"].isna()]
    ratings = once.pivot(index="id", columns="rater", values="shown")
    names = [str(name) for name in ratings.columns]
    if len(names) < 2:
        return {}, None
    found = rater_pairs(ratings.to_numpy(float))
    kappa = {(names[one], names[two]): value.kappa for (one, two), value in found.items()}
    full = ratings.dropna()
    return kappa, fleiss_kappa(full.to_numpy(float)) if len(names) > 2 and len(full) else None
