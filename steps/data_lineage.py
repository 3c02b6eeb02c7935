"""Where a dataset version came from: its place in git's history, what was counted, and its raw files with hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steps import batches, datasets, provenance, versions
from steps.artifact import digest_file
from steps.errors import PrefloopError
from steps.versions import digest_of

WORK_TREE = "work tree"
SMALL = 64 * 2**20  # bytes; a larger file is hashed only when somebody asks for the lineage


@dataclass(frozen=True)
class RawFile:
    """A file a dataset version was made from.

    Attributes:
        sha256: empty where nobody wrote it down and the bytes cannot be had.
        known_by: who says so: `batches.jsonl`, `data/datasets.yaml`, git, or the bytes themselves.
        facts: rows, bytes, added, by, as far as they were written down.
        now: whether the file of the work tree is still that one; empty where this was not looked at.
    """

    name: str
    sha256: str
    known_by: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    now: str = ""


@dataclass(frozen=True)
class DataOrigin:
    """A dataset version and what it was made from.

    Attributes:
        tables: table → md5 and rows, as the run wrote them down.
        recorded: the revision the run wrote down, with `+` where the work tree differed from it; empty without git.
        found: a commit whose `dvc.lock` names these tables, `work tree`, or empty when neither does.
        counts, validation: what split and validation counted of that version; empty where it was not found.
        source: `data/NAME/source` as DVC has it, and the registry's entry for the source.
        unknown: what is not known any more, and why.
        contradictions: what does not fit together.
    """

    name: str
    digest: str
    tables: Mapping[str, Mapping[str, Any]]
    recorded: str
    found: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    files: list[RawFile] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)


def trace(
    name: str,
    tables: Mapping[str, Mapping[str, Any]],
    root: Path,
    *,
    digest: str = "",
    recorded: str = "",
    thorough: bool = True,
) -> DataOrigin:
    """Find a version by its tables' md5s, or by its digest where no tables are known, and say what it was made from.

    Args:
        tables: table → md5 and rows.
        digest: the version's name (`DataVersion.digest`), as it was written down.
        recorded: the revision that was written down.
        thorough: look through git's whole history, and hash files of any size; else the recorded commit, the work tree
            and small files are all that is looked at.
    """
    wanted = {table: str(known["md5"]) for table, known in tables.items()}
    origin = DataOrigin(name, digest or digest_of(wanted), tables, recorded)
    if digest and wanted and set(wanted) == set(versions.TABLES) and digest != digest_of(wanted):
        origin.contradictions.append(f"the md5s of {name}'s tables do not make the digest {digest[:12]}")
    revision = revision_of(name, wanted, recorded, root, digest=digest, thorough=thorough)
    if revision is None:
        looked = "in git's history or the work tree" if thorough else "in the recorded commit or the work tree"
        origin.unknown.append(f"{name}: no dvc.lock {looked} names these tables, so no counts and no raw files")
        return origin
    if not tables:
        tables = {table: {"md5": md5, "rows": None} for table, md5 in _tables_at(name, root, revision).items()}
    lock = _stages(name, root, revision)
    counts, validation, problems = _counted(name, root, revision, lock)
    entry = _entry(name, lock)
    files, missing = _raw_files(name, entry, lock, root, revision, thorough)
    changed = [f"{file.name}: {file.now}" for file in files if file.now.startswith("changed")]
    return DataOrigin(
        name,
        origin.digest,
        tables,
        recorded,
        found=revision or WORK_TREE,
        counts=counts,
        validation=validation,
        source={**_source_folder(name, lock), **entry.get("source", {}), "format": entry.get("format")},
        files=files,
        unknown=[*problems, *missing],
        contradictions=[*origin.contradictions, *changed],
    )


# -- in git's history --------------------------------------------------------------------------------------------


def revisions(root: Path) -> list[str]:
    """Every commit of every branch that changed `dvc.lock`, the newest first; empty without git."""
    return (provenance.git(["log", "--all", "--format=%H", "--", "dvc.lock"], root) or b"").decode().split()


def revision_of(
    name: str, wanted: Mapping[str, str], recorded: str, root: Path, *, digest: str = "", thorough: bool = True
) -> str | None:
    """A commit, or "" for the work tree, whose `dvc.lock` names these tables; None where there is none.

    Args:
        wanted: table → md5; with none of them the version is sought by its digest.
        recorded: the revision that was written down, which is looked at first.
        thorough: look through git's whole history too.
    """
    for one in _candidates(recorded, root, thorough):
        known = _tables_at(name, root, one)
        if known and (wanted.items() <= known.items() if wanted else digest_of(known) == digest):
            return one
    return None


def _tables_at(name: str, root: Path, revision: str) -> dict[str, str]:
    """table → md5 at a revision; empty where the dataset had not been prepared, or there is no such revision."""
    try:
        known = versions.outputs(name, root, revision)
    except PrefloopError:
        return {}
    return {table: known[f"{table}.parquet"] for table in versions.TABLES if f"{table}.parquet" in known}


def _candidates(recorded: str, root: Path, thorough: bool) -> Iterator[str]:
    if head := recorded.rstrip("+"):
        yield head
    if thorough:
        yield from (one for one in revisions(root) if one != head)
    yield ""


def _stages(name: str, root: Path, revision: str) -> dict[str, Any]:
    """The stages of a dataset by stage, as `dvc.lock` has them."""
    known = versions.stages(root, revision)
    return {stage: known[f"{stage}@{name}"] for stage in versions.STAGES}


def _entry(name: str, lock: Mapping[str, Any]) -> dict[str, Any]:
    """The registry's entry the version was made with."""
    params = lock["ingest"].get("params", {}).get(str(datasets.REGISTRY), {})
    return dict(params.get(f"datasets.{name}") or {})


def _counted(name: str, root: Path, revision: str, lock: Mapping[str, Any]) -> tuple[dict, dict, list[str]]:
    """What split and validation counted, when the files are those `dvc.lock` names."""
    found, problems = {}, []
    named = {out["path"]: out["md5"] for stage in ("validate", "split") for out in lock[stage]["outs"]}
    for file in versions.METRICS:
        path = f"data/{name}/{file}"
        try:
            text = versions.text(Path(path), root, revision)
        except (FileNotFoundError, PrefloopError):
            problems.append(f"{path} of that version is not kept, so what it counted is not known")
            continue
        if hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() == named.get(path):
            found[file] = json.loads(text)
        else:
            problems.append(f"{path} is not the one dvc.lock names, so what it counted is not known")
    read = found.get("validation.json", {})
    keys = ("read", "valid", "quarantined")
    validation = {key: read[key] for key in keys if key in read}
    if read:
        held = {check: one for check, one in read.get("checks", {}).items() if one.get("rows")}
        validation["found"] = {check: {"rows": one["rows"], "done": one["severity"]} for check, one in held.items()}
        validation["broken_bounds"] = [bound for bound, one in read.get("bounds", {}).items() if not one.get("kept")]
    return found.get("split.json", {}), validation, problems


# -- raw files ---------------------------------------------------------------------------------------------------


def _source_folder(name: str, lock: Mapping[str, Any]) -> dict[str, Any]:
    for dep in lock["ingest"].get("deps", ()):
        if dep["path"] == f"data/{name}/source":
            return {"folder": dep["path"], "md5": dep["md5"], "files_in_folder": dep.get("nfiles")}
    return {}


def _raw_files(
    name: str, entry: Mapping[str, Any], lock: Mapping[str, Any], root: Path, revision: str, thorough: bool
) -> tuple[list[RawFile], list[str]]:
    source = entry.get("source", {})
    if fetched := source.get("pypi") or source.get("hub"):
        known = str(source.get("sha256") or "")
        facts = {key: source[key] for key in ("archive", "config", "split", "revision") if source.get(key)}
        return [RawFile(str(fetched), known, str(datasets.REGISTRY), facts)], (
            [] if known else [f"{name}: no sha256 of {fetched} stands in the registry; its commit is all there is"]
        )
    sums = source.get("sha256")
    found: dict[str, RawFile] = {}
    for role, where in source.get("files", {}).items():
        if "://" in where:
            digest = sums.get(role, "") if isinstance(sums, dict) else sums or ""
            found[where] = RawFile(where, digest, str(datasets.REGISTRY) if digest else "nobody")
    patterns = [where for where in source.get("files", {}).values() if "://" not in where]
    recorded = {record["file"]: record for record in batches.records(name, root, revision)}
    folder = datasets.folder(name, root) / "source"
    is_here = lambda: _folder_md5(folder) == _source_folder(name, lock).get("md5")  # noqa: E731
    for file in sorted(_files_of(name, root, revision) | set(recorded)):
        if file in recorded:
            record = recorded[file]
            facts = {key: record[key] for key in ("rows", "bytes", "added", "by", "original") if key in record}
            raw = RawFile(file, str(record.get("sha256", "")), batches.RECORDS, facts)
        elif _fits(file, patterns):
            raw = _hashed(name, file, root, revision, is_here, thorough)
        else:
            continue
        found[file] = RawFile(raw.name, raw.sha256, raw.known_by, raw.facts, _now(folder / file, raw, thorough))
    unnamed = [raw for raw in found.values() if not raw.sha256]
    return list(found.values()), [f"{name}: the hash of {raw.name} is not known ({raw.known_by})" for raw in unnamed]


def _files_of(name: str, root: Path, revision: str) -> set[str]:
    """Files below `data/NAME/source`, of a commit and of the work tree."""
    place = f"data/{name}/source"
    folder = root / place
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    listed = provenance.git(["ls-tree", "-r", "-z", "--name-only", revision or "HEAD", "--", place], root) or b""
    kept = {Path(path).relative_to(place).as_posix() for path in listed.decode(errors="replace").split("\0") if path}
    return here | kept


def _fits(file: str, patterns: list[str]) -> bool:
    """Whether the registry's `files` take a file in: by name, by folder or by pattern."""
    path = Path(file)
    return any(file == one or file.startswith(one.rstrip("/") + "/") or path.match(one) for one in patterns)


def _hashed(name: str, file: str, root: Path, revision: str, is_here: Any, thorough: bool) -> RawFile:
    """A file nobody wrote down, by its bytes in git, or in the work tree when the whole folder is DVC's still."""
    place = f"data/{name}/source/{file}"
    if revision and (held := provenance.git(["cat-file", "blob", f"{revision}:./{place}"], root)) is not None:
        return RawFile(file, hashlib.sha256(held).hexdigest(), f"git, at {revision[:12]}", {"bytes": len(held)})
    path = root / place
    if not path.is_file():
        return RawFile(file, "", "not in git, and not here any more")
    if not thorough and path.stat().st_size > SMALL:
        return RawFile(file, "", "large, and not hashed when this was written", {"bytes": path.stat().st_size})
    if is_here():
        proof = "its bytes; the folder's md5 is dvc.lock's"
        return RawFile(file, digest_file(path), proof, {"bytes": path.stat().st_size})
    return RawFile(file, "", "the folder has changed since, and git does not keep it")


def _now(path: Path, raw: RawFile, thorough: bool) -> str:
    if not raw.sha256 or (not thorough and raw.known_by != batches.RECORDS and not raw.known_by.startswith("git")):
        return ""
    if not path.is_file():
        return "not here any more"
    if not thorough and path.stat().st_size > SMALL:
        return ""
    return "here" if digest_file(path) == raw.sha256 else "changed: the file of the work tree has other bytes"


def _folder_md5(folder: Path) -> str:
    """What DVC calls a folder: an md5 over the names and md5s of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = [{"md5": digest_file(path, "md5"), "relpath": path.relative_to(folder).as_posix()} for path in files]
    listed.sort(key=lambda one: one["relpath"].split("/"))
    text = json.dumps(listed, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"
