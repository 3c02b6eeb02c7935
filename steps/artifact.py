"""An artifact: a directory of files, and a manifest that says what it is and what it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steps.errors import PrefloopError
from steps.usage import USAGE, Usage

MANIFEST = "manifest.json"
CHART = "chart.png"
COMPLETIONS = "completions.parquet"  # what the models of an evaluation said
COSTS = ("seconds", "cpu_seconds", "peak_mib")  # of a manifest: making the same again takes others
NEXT_ROUND = "next_round.yaml"  # what an evaluation by topics wants to be written next
# What a step leaves beside its result: records of how it went, with times in them.
RECORDS = frozenset(
    {
        MANIFEST,
        CHART,
        "error.json",
        "facts.json",
        "journal.jsonl",
        "log.txt",
        "progress.json",
        "seconds.json",
        "spec.json",
        "tracking.json",
        "tracking.json.lock",
        USAGE,
    }
)

Facts = dict[str, Any]


def digest_file(path: Path, algorithm: str = "sha256") -> str:
    """Hex digest of one file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def digest_json(value: Any) -> str:
    """sha256 of a value's canonical JSON: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def payload(folder: Path) -> dict[str, Path]:
    """The files of a result by relative name, without the records that stand beside them."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: path
        for name, path in named.items()
        if name not in RECORDS and not name.startswith("checkpoints/") and not name.endswith(".tmp")
    }


@dataclass(frozen=True)
class Artifact:
    """The finished result of a step.

    Attributes:
        path: the directory.
        kind: the step that made it.
        key: sha256 over everything it was made from (never over paths).
        digest: sha256 over its files' names and bytes.
        inputs: digest of every input, by name.
        facts: the step's headline numbers and descriptions, JSON values only.
        files: sha256 of every file, by relative name.
        seconds: wall-clock time the step took, resumed parts included.
        cpu_seconds: processor time of the step's processes, resumed parts included; None where nobody measured it.
        peak_mib: most resident memory one of them had, libraries included; None likewise.
    """

    path: Path
    kind: str
    key: str
    digest: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float | None = None
    peak_mib: float | None = None


def seal(
    folder: Path,
    kind: str,
    key: str,
    inputs: Mapping[str, str],
    facts: Facts,
    seconds: float,
    used: Usage | None = None,
) -> Artifact:
    """Write the manifest, last of all: a directory with a manifest is whole."""
    files = {name: digest_file(path) for name, path in payload(folder).items()}
    digest = digest_json(files)
    cost = {} if used is None else {name: round(value, 2) for name, value in asdict(used).items()}
    artifact = Artifact(folder, kind, key, digest, dict(inputs), facts, files, round(seconds, 2), **cost)
    record = {name: value for name, value in asdict(artifact).items() if name != "path"}
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(record, indent=1, sort_keys=True), encoding="utf-8")
    temporary.rename(folder / MANIFEST)
    return artifact


def open_artifact(folder: Path) -> Artifact | None:
    """The artifact in a directory, or None where there is no whole one.

    Files are checked by name; their bytes are checked by `verify`.

    Raises:
        PrefloopError: a manifest that cannot be read, or files missing from it.
    """
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        artifact = Artifact(path=folder, **record)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise _broken(folder, f"its manifest cannot be read ({error})") from error
    if missing := [name for name in artifact.files if not (folder / name).is_file()]:
        raise _broken(folder, f"{len(missing)} of {len(artifact.files)} files are gone, {missing[0]} among them")
    return artifact


def verify(artifact: Artifact) -> None:
    """Compare every byte with the manifest.

    Raises:
        PrefloopError: naming the first file that differs.
    """
    for name, expected in artifact.files.items():
        if digest_file(artifact.path / name) != expected:
            raise _broken(artifact.path, f"{name} is not the file that was written")


def _broken(folder: Path, have: str) -> PrefloopError:
    return PrefloopError(
        "a stored artifact is broken", where=str(folder), have=have, then="remove that folder; the step runs again"
    )
