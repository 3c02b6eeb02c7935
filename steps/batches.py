"""Batches of records: added, repaired, exported. A batch is a file in `data/NAME/source` that nobody changes again.

Where each batch came from stands in `data/NAME/batches.jsonl`, one line a batch, which git keeps.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from steps import datasets, drift, entries, versions
from steps.artifact import digest_file
from steps.datasets import Dataset
from steps.errors import DataError, EnvironmentProblem, Interrupted, PrefloopError, did_you_mean

RECORDS = "batches.jsonl"
FORGOTTEN = "forgotten.jsonl"  # which rows were to be forgotten, when, by whose word and why: ids, never texts
EXAMPLES = 10  # rows that a message names
PATIENCE = 600.0  # seconds a training waits for whoever else prepares the data
FORMATS = tuple(name for name in datasets.Format.__args__ if name != "rated_sentences")  # type: ignore[attr-defined]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TABULAR = re.compile(r"\.[ct]sv(\.(gz|zst|bz2))?$", re.IGNORECASE)


@dataclass(frozen=True)
class State:
    """A dataset at one moment: what `dvc.lock` names, and what was counted. Empty before the first time."""

    tables: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    checks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Addition:
    """What adding came to.

    Attributes:
        records: provenance of the batches that were not there before.
        already: files that were there, with the same bytes.
        repeated: rows of the batches that were in the dataset already.
        forgotten: records of the batches that stay out, for they are to be forgotten.
        drift: the new rows held against those before.
        paths: what git should be told about.
    """

    name: str
    records: list[dict[str, Any]]
    already: list[str]
    before: State
    after: State
    repeated: int
    drift: list[drift.Finding]
    paths: list[str]
    forgotten: int = 0


def columns_of(assignments: Sequence[str]) -> dict[str, str]:
    """What files call the fields of their format, from `FIELD=YOURS`.

    Raises:
        DataError: something else.
    """
    columns: dict[str, str] = {}
    for text in assignments:
        name, _, own = text.partition("=")
        if not (name and own):
            raise DataError("a column is FIELD=YOURS", where="--columns", have=text, then="such as prompt=question")
        columns[name] = own
    return columns


def add(
    name: str,
    files: Sequence[Path],
    root: Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> Addition:
    """Copy files into a dataset as immutable batches, note where they came from, and run the stages.

    Args:
        format: makes the dataset's entry in the registry when there is none.
        columns: what the files call the format's fields, for the entry that is made.

    Raises:
        DataError: a file is missing, another one of its name is there, the dataset takes no files, or the stages
            failed. Then nothing is added: files, registry, tables and `dvc.lock` are as they were.
        EnvironmentProblem: another process is working on the data.
    """
    return _add(name, {file: file.name for file in files}, root, format=format, columns=columns)


def refresh(name: str, root: Path) -> tuple[versions.DataVersion, list[drift.Finding]]:
    """Bring a dataset up to date before it is trained on, and hold its valid rows against those of before.

    Returns:
        the version, and what was compared: nothing where the rows are the same or there were none.

    Raises:
        DataError: a stage failed.
        EnvironmentProblem: another process is working on the data.
    """
    here = datasets.folder(name, root)
    with _old_rows(here) as old:
        version = versions.prepare(name, root, wait=PATIENCE)
        valid = here / "valid.parquet"
        if old is None or digest_file(old) == digest_file(valid):
            return version, []
        from steps.changes import read

        return version, drift.compare(read(old, drift.COLUMNS), read(valid, drift.COLUMNS))


def restore(name: str, file: Path, root: Path) -> Addition:
    """Add repaired records as a batch of their own, `repaired-<digest>`, when all of its rows pass validation.

    Raises:
        DataError: naming the rows that still fail, by the line of `file`; then nothing is added.
        EnvironmentProblem: another process is working on the data.
    """
    _check_there(file)
    if name not in datasets.names(root):
        datasets.dataset(name, root)
    suffix = re.search(r"(\.[A-Za-z0-9]+)?(\.(gz|zst|bz2))?$", file.name)
    batch = f"repaired-{digest_file(file)[:8]}{suffix.group() if suffix else ''}"
    return _add(name, {file: batch}, root, judge=lambda here: _refuse_unfit(here, batch, file))


def _add(
    name: str,
    files: Mapping[Path, str],
    root: Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] = MappingProxyType({}),
    judge: Callable[[Path], None] = lambda here: None,
) -> Addition:
    for file in files:
        _check_there(file)
    _check_entry(name, format, root)
    is_new = name not in datasets.names(root)
    if columns and not is_new:
        raise DataError(f"'{name}' has its columns already", where=str(datasets.REGISTRY), then="leave --columns out")
    here = datasets.folder(name, root)
    with versions.one_writer(root), taken_back_on_failure(name, root) as copied, _old_rows(here) as old:
        before = state(name, root)
        targets = [_copied(file, here, batch, copied) for file, batch in files.items()]
        _register(name, targets, root, format, columns)
        try:
            _prepare(name, root, [_in_source(target, here) for target in targets])
        except DataError as error:
            if is_new:
                raise _not_made(name, list(files), format, error) from error
            raise
        known = {record["file"]: record for record in records(name, root)}
        names = [_in_source(target, here) for target in targets]
        new = [batch for batch in names if batch not in known]
        if new:
            judge(here)
        made = [_record(file, here, batch, root) for file, batch in zip(files, names, strict=True) if batch in new]
        if made:
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in made)
            path = here / RECORDS
            versions.put((path.read_bytes() if path.is_file() else b"") + lines.encode(), path)
        return Addition(
            name=name,
            records=made,
            already=[batch for batch in names if batch in known],
            before=before,
            after=state(name, root),
            repeated=_repeated(here, new),
            drift=_drift(old, here, new),
            paths=[str(path.relative_to(root)) for path in _tracked(here, root, targets) if path.exists()],
            forgotten=_forgotten(name, root, new),
        )


# -- before anything is touched ----------------------------------------------------------------------------------


def _check_there(file: Path) -> None:
    if file.is_dir():
        raise DataError("a folder cannot be added", where=str(file), then=f"name its files: {file}/*")
    if not file.is_file():
        raise DataError("a file to add is not there", where=str(file), then="check the path")


def _check_entry(name: str, format: str | None, root: Path) -> None:
    """Refuse what no batch can be added to.

    Raises:
        DataError: saying why.
    """
    if format is not None and format not in FORMATS:
        raise DataError(
            f"there is no format '{format}'",
            where="--format",
            have=did_you_mean(format, FORMATS),
            then=f"one of {', '.join(FORMATS)}; data/README.md says what each holds",
        )
    if name not in (known := datasets.names(root)):
        if format is None:
            raise DataError(
                f"there is no dataset '{name}'",
                where=str(datasets.REGISTRY),
                have=did_you_mean(name, known) if known else "no datasets",
                then=f"give --format to make it, one of {', '.join(FORMATS)}",
            )
        if not _NAME.fullmatch(name):
            raise DataError(
                f"'{name}' cannot be a dataset's name",
                have="letters, digits, - and _ can",
                then=f"call it {re.sub('[^A-Za-z0-9_-]+', '-', name).strip('-') or 'mine'}",
            )
        return
    entry = datasets.dataset(name, root)
    if format not in (None, entry.format):
        raise DataError(
            f"'{name}' has the format {entry.format}, not {format}",
            where=str(datasets.REGISTRY),
            then="leave --format out, or add the file to a dataset of its own",
        )
    if not takes_files(entry):
        raise DataError(
            f"no files can be added to '{name}'",
            where=str(datasets.REGISTRY),
            have=f"its source is fetched from {entry.source.pypi or entry.source.hub}"
            if entry.source.pypi or entry.source.hub
            else "rated_sentences joins two files",
            then="add them to a dataset of their own, with --format",
        )


def _prepare(name: str, root: Path, batches: Sequence[str]) -> None:
    """Run the stages; when they fail, the message names rows of the batches that are at fault."""
    try:
        versions.prepare(name, root)
    except DataError as error:
        here = datasets.folder(name, root)
        bad = _unfit(here, batches) if (here / "quarantine.parquet").is_file() else []
        if not bad or any(f"{batch} line" in error.have for batch in batches):
            raise
        have = "\n        ".join([error.have, *_named(bad)])
        raise DataError(error.what, where=error.where, have=have, then=error.then) from error


def _not_made(name: str, files: Sequence[Path], format: str | None, error: DataError) -> DataError:
    """Why a new dataset was not made, in words that hold when all of it has been taken back."""
    fields = _fields(files[0])
    # The stage's own places and ways out are of files that have been taken back.
    found = [line for line in error.have.splitlines() if not line.strip().startswith(("where ", "next "))]
    told = ["\n".join(found), *([f"the fields of {files[0].name} are {', '.join(fields)}"] if fields else [])]
    again = f"prefloop data add {name} {shlex.join(map(str, files))} --format {format} --columns FIELD=YOURS"
    return DataError(
        error.what,
        where=", ".join(map(str, files)),
        have="\n        ".join(told),
        then=f"mend the file, or say which of its fields is which: `{again}`",
    )


def _fields(file: Path) -> list[str]:
    """What the first record of a file names, as far as it can be read."""
    from steps import readers
    from steps.sources import File

    with suppress(DataError, OSError):
        for record in readers.records(File("", file.name, file)):
            return list(record.value) if isinstance(record.value, dict) else []
    return []


def takes_files(entry: Dataset) -> bool:
    """Whether files can be added to a dataset: its source is not fetched whole, and its files stand on their own."""
    return not (entry.source.pypi or entry.source.hub or entry.format == "rated_sentences")


# -- in, and out again -------------------------------------------------------------------------------------------


@contextmanager
def taken_back_on_failure(name: str, root: Path, nothing: str = "was added to") -> Iterator[list[Path]]:
    """Undo all that happens inside when it fails or is interrupted; yields a list for the files that are copied.

    Args:
        nothing: what has not happened then, for the message.
    """
    here = datasets.folder(name, root)
    ours = _kept([root / datasets.REGISTRY, here / RECORDS, here / FORGOTTEN])
    made = _kept([root / "dvc.lock", *(here / file for file in versions.METRICS)])
    existed = here.is_dir()
    there = set(here.iterdir()) if existed else set()
    copied: list[Path] = []
    try:
        yield copied
    except BaseException as error:
        for path in copied:
            path.unlink(missing_ok=True)
        busy = isinstance(error, EnvironmentProblem)  # then what the stages make is another process's to write
        for path, content in (ours if busy else ours | made).items():
            versions.put(content, path)
        if not existed:
            shutil.rmtree(here, ignore_errors=True)
        elif not busy:
            with suppress(DataError):
                versions.outputs(name, root)
                versions.checkout(name, root)
            for path in set(here.iterdir()) - there:
                if path.is_file():
                    path.unlink()
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(f"stopped; nothing {nothing} '{name}'", then="run the same command again") from error
        if isinstance(error, PrefloopError):
            raise type(error)(
                f"nothing {nothing} '{name}': {error.what}", where=error.where, have=error.have, then=error.then
            ) from error
        raise


def _kept(paths: Sequence[Path]) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def _copied(file: Path, here: Path, batch: str, copied: list[Path]) -> Path:
    """Where a batch lies; it is copied there unless it is there already."""
    source = here / "source"
    resolved = file.resolve()
    if resolved.is_relative_to(source.resolve()):
        return source / resolved.relative_to(source.resolve())
    target, digest = source / batch, digest_file(file)
    if any(letter in batch for letter in "*?[]"):
        raise DataError("a batch's name may not hold *, ?, [ or ]", where=batch, then="rename the file")
    if target.exists():
        if target.is_file() and digest_file(target) == digest:
            return target
        raise DataError(
            "another file of that name is there, and batches are not changed",
            where=str(target),
            have="its bytes differ",
            then=f"give {file.name} a name of its own",
        )
    for record in _records(here):
        if record.get("sha256") == digest and (source / record["file"]).is_file():
            raise DataError(
                "the same bytes are there under another name",
                where=str(source / record["file"]),
                have=f"sha256 {digest}",
                then="nothing has to be added",
            )
    source.mkdir(parents=True, exist_ok=True)
    draft = here / f"{batch}.partial"  # not in `source`, where a stage would take it for a file
    copied += [draft, target]
    shutil.copyfile(file, draft)
    draft.replace(target)
    return target


def _in_source(target: Path, here: Path) -> str:
    return target.relative_to(here / "source").as_posix()


def _register(name: str, targets: Sequence[Path], root: Path, format: str | None, columns: Mapping[str, str]) -> None:
    """Make sure that the registry's entry takes every batch in."""
    path, here = root / datasets.REGISTRY, datasets.folder(name, root)
    text = path.read_text(encoding="utf-8")
    roles: dict[str, str] = {}
    entry = datasets.dataset(name, root) if name in datasets.names(root) else None
    for target in targets:
        if entry is None or not _covers(entry, target, here / "source"):
            batch = _in_source(target, here)
            taken = {*(entry.source.files if entry else ()), *roles}
            roles[_role(batch, taken)] = batch
    if entry is None:
        assert format is not None
        text = entries.with_entry(text, name, format, roles, columns)
    else:
        for role, batch in roles.items():
            text = entries.with_file(text, name, role, batch)
    versions.put(text.encode(), path)


def _covers(entry: Dataset, target: Path, source: Path) -> bool:
    for where in entry.source.files.values():
        if "://" in where:
            continue
        place = source / where
        if place == target or (place.is_dir() and target.is_relative_to(place)) or target in source.glob(where):
            return True
    return False


def _role(batch: str, taken: set[str]) -> str:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", batch.partition(".")[0]).strip("-") or "batch"
    numbered = (f"{stem}-{number}" for number in range(2, len(taken) + 3))
    return stem if stem not in taken else next(role for role in numbered if role not in taken)


# -- provenance --------------------------------------------------------------------------------------------------


def _record(file: Path, here: Path, batch: str, root: Path) -> dict[str, Any]:
    import pyarrow.dataset as tables

    rows = tables.dataset(here / "rows.parquet").count_rows(filter=tables.field("file") == batch)
    return {
        "file": batch,
        "original": file.name,
        "sha256": digest_file(here / "source" / batch),
        "bytes": (here / "source" / batch).stat().st_size,
        "rows": rows,
        "added": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": versions.git_user(root),
    }


def records(name: str, root: Path, revision: str = "", file: str = RECORDS) -> list[dict[str, Any]]:
    """Provenance of a dataset's batches, at a revision or in the work tree."""
    try:
        return _lines(versions.text(Path("data") / name / file, root, revision), file)
    except FileNotFoundError:
        return []


def _records(here: Path) -> list[dict[str, Any]]:
    path = here / RECORDS
    return _lines(path.read_text(encoding="utf-8")) if path.is_file() else []


def _lines(text: str, file: str = RECORDS) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(
                "a line of the batches' record cannot be read",
                where=f"{file} line {number}",
                have=str(error),
                then="mend it, or take git's version of the file",
            ) from error
    return found


def tracked(name: str, root: Path) -> list[str]:
    """The files beside a dataset's batches that git should be told about."""
    paths = _tracked(datasets.folder(name, root), root, [])
    return [str(path.relative_to(root)) for path in paths if path.exists()]


def _tracked(here: Path, root: Path, targets: Sequence[Path]) -> list[Path]:
    kept = [root / datasets.REGISTRY, root / "dvc.lock", here / ".gitignore", here / RECORDS, here / FORGOTTEN]
    return [*targets, *kept, *(here / file for file in versions.METRICS)]


def state(name: str, root: Path, revision: str = "") -> State:
    """What is known of a dataset; empty when it has not been prepared."""
    try:
        version = versions.at(name, root, revision)
    except DataError:
        return State()
    checks = versions.metrics(name, root, revision)["validation.json"].get("checks", {})
    held = {check: found["rows"] for check, found in checks.items() if found.get("severity") in ("quarantine", "stop")}
    return State(versions.outputs(name, root, revision), version.counts, held)


# -- what the new rows are like ----------------------------------------------------------------------------------


@contextmanager
def _old_rows(here: Path) -> Iterator[Path | None]:
    """The valid rows as they are now, kept while the stages write the next ones."""
    valid = here / "valid.parquet"
    if not valid.is_file():
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(shutil.copyfile(valid, Path(scratch) / "valid.parquet"))


def _drift(old: Path | None, here: Path, new: Sequence[str]) -> list[drift.Finding]:
    if old is None or not new:
        return []
    from steps.changes import read

    before = read(old, drift.COLUMNS)
    after = read(here / "valid.parquet", drift.COLUMNS)
    return drift.compare(before[~before["file"].isin(new)], after[after["file"].isin(new)], sources=False)


def _unfit(here: Path, batches: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of some batches that are in quarantine."""
    import pyarrow.dataset as tables

    columns = ["file", "line", "part", "reasons"]
    table = tables.dataset(here / "quarantine.parquet").to_table(
        columns=columns, filter=tables.field("file").isin(list(batches))
    )
    return table.to_pylist()


def _named(unfit: Sequence[Mapping[str, Any]], file: str | None = None) -> list[str]:
    """The first rows by their place and every reason."""
    shown = [f"{file or row['file']} line {row['line']}: {'; '.join(row['reasons'])}" for row in unfit[:EXAMPLES]]
    return shown + ([f"… and {len(unfit) - EXAMPLES:,} more"] if len(unfit) > EXAMPLES else [])


def _is_there_already(row: Mapping[str, Any]) -> bool:
    return all(reason.startswith("repeated:") for reason in row["reasons"])


def _repeated(here: Path, batches: Sequence[str]) -> int:
    return sum(map(_is_there_already, _unfit(here, batches))) if batches else 0


def _forgotten(name: str, root: Path, batches: Sequence[str]) -> int:
    """How many records of some batches stay out for good."""
    entry = datasets.dataset(name, root)
    if not (entry.forgotten and batches):
        return 0
    from steps.ingest import forgotten_records

    source = datasets.Source(files={str(number): batch for number, batch in enumerate(batches)})  # type: ignore
    return forgotten_records(entry.model_copy(update={"source": source}), datasets.folder(name, root) / "source")


def _refuse_unfit(here: Path, batch: str, file: Path) -> None:
    """Refuse a batch of repaired records whose rows do not all pass.

    A record of several answers may bring rows along that were never at fault; those repeat what is there, and pass.

    Raises:
        DataError: naming them.
    """
    import pyarrow.dataset as tables

    unfit = [row for row in _unfit(here, [batch]) if not _is_there_already(row)]
    fit = tables.dataset(here / "valid.parquet").count_rows(filter=tables.field("file") == batch)
    if unfit or not fit:
        raise DataError(
            f"{len(unfit)} repaired rows still fail" if unfit else "no repaired row is new",
            where=str(file),
            have="\n        ".join(_named(unfit, file.name)) or "every row repeats one that is there, or is forgotten",
            then="mend them, then run again",
        )


# -- out of quarantine -------------------------------------------------------------------------------------------


def export(name: str, root: Path, out: Path) -> int:
    """Write the quarantined records as JSON lines, to be edited and given to `restore`; returns how many there are.

    A record that could not be read is written as it stands in the source, so that its line is to be made JSON first.

    Raises:
        DataError: the dataset has not been prepared, or the file is there already.
    """
    if out.exists():
        raise DataError("the file to write is there already", where=str(out), then="remove it, or name another")
    bad = quarantine(name, root)
    here = datasets.folder(name, root)
    written: dict[tuple[str, int], str] = {(row["file"], row["line"]): row["raw"] or "" for row in bad}
    if any(_TABULAR.search(file) for file, _ in written):
        written |= _as_objects(datasets.dataset(name, root), here / "source", set(written))
    versions.put("".join(re.sub(r"[\r\n]+", " ", text) + "\n" for text in written.values()).encode(), out)
    return len(written)


def _as_objects(entry: Dataset, source: Path, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Records of tables of cells, as JSON objects under the names of their header."""
    from steps.ingest import records_of

    return {
        (file, record.line): json.dumps(record.value, ensure_ascii=False)
        for _, file, record in records_of(entry, source)
        if (file, record.line) in wanted and _TABULAR.search(file) and record.value is not None
    }


def quarantine(name: str, root: Path) -> list[dict[str, Any]]:
    """The quarantined rows of the work tree: file, line, part, raw, reasons.

    Raises:
        DataError: the dataset has not been prepared, or its table is not here.
    """
    import pyarrow.parquet as pq

    path = datasets.folder(name, root) / "quarantine.parquet"
    if not path.is_file():
        datasets.dataset(name, root)
        raise DataError(
            f"the quarantine of '{name}' is not here",
            where=str(path),
            then=f"`dvc pull`, or dvc repro split@{name}",
        )
    with pq.ParquetFile(path) as file:
        there = file.schema_arrow.names
        columns = [column for column in ("row_id", "file", "line", "part", "raw", "reasons") if column in there]
        return file.read(columns=columns).to_pylist()
