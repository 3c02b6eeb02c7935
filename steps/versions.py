"""Dataset versions: DVC makes them, `dvc.lock` names them. The only module that calls DVC."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from steps import datasets
from steps.artifact import digest_file
from steps.errors import DataError, EnvironmentProblem
from steps.paths import Var
from steps.pipeline import TABLES
from steps.run import Input

STAGES = ("ingest", "validate", "split")
METRICS = ("validation.json", "split.json")
WAIT = 3.0  # seconds a writer waits for another one; a check that finds nothing to do takes less
_BUSY = ("Unable to acquire lock", "is busy, it is being blocked by")


@dataclass(frozen=True)
class DataVersion:
    """One version of one dataset.

    Attributes:
        tables: each table's file and md5, as `dvc.lock` has them.
        revision: the git commit the project stands on, with `+` when `dvc.lock` or the registry differ from it; empty
            without git.
        counts: rows per table, and rows read and quarantined.
    """

    name: str
    tables: Mapping[str, Input]
    revision: str
    counts: Mapping[str, int]

    @property
    def digest(self) -> str:
        """One md5 for the version: over its tables' names and md5s."""
        return digest_of({name: table.digest for name, table in self.tables.items()})


def digest_of(tables: Mapping[str, str]) -> str:
    """The name of a version, from its tables' md5s."""
    lines = "".join(f"{name} {md5}\n" for name, md5 in sorted(tables.items()))
    return hashlib.md5(lines.encode(), usedforsecurity=False).hexdigest()


# -- making versions ---------------------------------------------------------------------------------------------


def prepare(name: str, root: Path, wait: float = WAIT) -> DataVersion:
    """Bring a dataset up to date with its source, the registry and the stages' code: `dvc repro`.

    `dvc.lock` changes when all stages have passed, or not at all.

    Args:
        wait: seconds another process may go on working on the data before this one gives up.

    Raises:
        DataError: no such dataset, or a stage failed; its own message is in `have`.
        EnvironmentProblem: another process is running DVC here, or the project is in no git repository.
    """
    datasets.dataset(name, root)
    (datasets.folder(name, root) / "source").mkdir(parents=True, exist_ok=True)
    with one_writer(root, wait), _lock_kept(root) as put_back:
        result = _repro(name, root, wait)
        if result.returncode == 0:
            return current(name, root)
        output = (result.stdout + result.stderr).strip()
        if _is_busy(result):
            raise _busy(root)
        put_back()
    if "is not a git repository" in output:
        raise EnvironmentProblem(
            "DVC wants a git repository",
            where=str(root),
            have="no .git here or above",
            then="`git init`, or `dvc config --local core.no_scm true` to do without",
        )
    raise DataError(
        f"preparing the dataset '{name}' failed",
        where=f"dvc repro split@{name}",
        have=_tail(output) or f"DVC was killed (status {result.returncode})",
        then="mend what it says, then run again",
    )


def _repro(name: str, root: Path, wait: float) -> subprocess.CompletedProcess[str]:
    """`dvc repro`, again while another DVC is at work, such as one that outlived whoever started it."""
    end = time.monotonic() + wait
    while _is_busy(result := _dvc(["repro", f"split@{name}"], root)) and time.monotonic() < end:
        time.sleep(0.5)
    return result


def _is_busy(result: subprocess.CompletedProcess[str]) -> bool:
    return result.returncode != 0 and any(sign in result.stdout + result.stderr for sign in _BUSY)


@contextmanager
def one_writer(root: Path, wait: float = WAIT) -> Iterator[None]:
    """Keep every other writer of the data out; ends with the process, however it dies.

    Raises:
        EnvironmentProblem: another process has been working on the data for longer than `wait` seconds.
    """
    from filelock import FileLock, Timeout

    place = Var(root).path / "data.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place, timeout=WAIT, is_singleton=True).acquire(timeout=wait):
            _clear_after_the_dead(root)
            yield
    except Timeout:
        raise _busy(root) from None


def _busy(root: Path) -> EnvironmentProblem:
    return EnvironmentProblem(
        "another process is working on the data",
        where=str(root),
        have="its lock is taken",
        then="wait for it to end, then run again",
    )


@contextmanager
def _lock_kept(root: Path) -> Iterator[Any]:
    """Yields what puts `dvc.lock` back as it was; an interruption does so too."""
    lock, kept = root / "dvc.lock", root / ".dvc" / "tmp" / "dvc.lock.before"
    before = lock.read_bytes() if lock.is_file() else None
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(before or b"")

    def put_back() -> None:
        put(before, lock)

    try:
        yield put_back
    except KeyboardInterrupt:
        put_back()
        raise
    finally:
        kept.unlink(missing_ok=True)


def put(content: bytes | None, path: Path) -> None:
    """Give a file its content, all at once; None removes it."""
    if content is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".partial")
        draft.write_bytes(content)
        draft.replace(path)


def _clear_after_the_dead(root: Path) -> None:
    """Remove what a writer killed with SIGKILL leaves behind: DVC itself would stumble over it for ever.

    A stage that outlived its DVC is ended. Entries of `.dvc/tmp/rwlock` go when their process is gone or its number
    now belongs to another program, and so does the file when it was cut short. A `dvc.lock` that was cut short is
    put back.
    """
    scratch = root / ".dvc" / "tmp"
    _end_orphans(root)
    rwlock = scratch / "rwlock"
    if rwlock.is_file() and rwlock.stat().st_size > 2:
        with suppress(OSError):
            put(_living_entries(rwlock.read_bytes()), rwlock)
    elif rwlock.is_file() and rwlock.read_bytes() != b"{}":
        rwlock.unlink()
    kept = scratch / "dvc.lock.before"
    if kept.is_file():
        if not _is_lock(root / "dvc.lock"):
            put(kept.read_bytes() or None, root / "dvc.lock")
        kept.unlink()


def _living_entries(content: bytes) -> bytes:
    try:
        entries = json.loads(content)
        write = {path: info for path, info in entries.get("write", {}).items() if _lives(**info)}
        read = {
            path: living
            for path, infos in entries.get("read", {}).items()
            if (living := [info for info in infos if _lives(**info)])
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return b"{}"
    return json.dumps({"write": write, "read": read}).encode()


def _lives(pid: int, cmd: str) -> bool:
    """Whether a process of that number is still the one with that command; DVC looks at the number alone."""
    import psutil

    try:
        return " ".join(psutil.Process(pid).cmdline()).endswith(" ".join(cmd.split()[1:]))
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _end_orphans(root: Path) -> None:
    """End stages of this project that no DVC waits for any more; they would write beside the next ones."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "-m" not in (command := process.cmdline()) or not any(f"steps.{stage}" in command for stage in STAGES):
                continue
            ours = process.environ().get("DVC_ROOT") == str(root.resolve())
            if ours and not any(map(_is_dvc, process.parents())):
                process.kill()
                process.wait(10)


def _is_dvc(process: Any) -> bool:
    import psutil

    with suppress(psutil.Error):  # a process that is gone, or dead and not yet taken note of, waits for nobody
        return any(Path(part).name == "dvc" for part in process.cmdline())
    return False


def _is_lock(path: Path) -> bool:
    try:
        return isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
    except FileNotFoundError:
        return True
    except (OSError, ValueError, yaml.YAMLError):
        return False


def checkout(name: str, root: Path) -> bool:
    """Make the tables of the work tree those `dvc.lock` names; whether all of them could be had."""
    return _dvc(["checkout", "--force", *(f"{stage}@{name}" for stage in STAGES)], root).returncode == 0


# -- reading versions --------------------------------------------------------------------------------------------


def current(name: str, root: Path) -> DataVersion:
    """The version `dvc.lock` names; nothing is run.

    Raises:
        DataError: the dataset has not been prepared.
    """
    return at(name, root)


def at(name: str, root: Path, revision: str = "") -> DataVersion:
    """The version `dvc.lock` names at a git revision, or in the work tree.

    Raises:
        DataError: no such revision, or the dataset had not been prepared there.
        EnvironmentProblem: a revision is asked for and there is no git.
    """
    outs = outputs(name, root, revision)
    folder = datasets.folder(name, root)
    try:
        tables = {table: Input(folder / f"{table}.parquet", outs[f"{table}.parquet"]) for table in TABLES}
        found = metrics(name, root, revision)
        if any(not values for values in found.values()):
            raise KeyError(next(f"{file} is missing" for file, values in found.items() if not values))
    except KeyError as error:
        raise _not_prepared(name, root, revision, str(error)) from error
    counts = {key: value for values in found.values() for key, value in values.items() if type(value) is int}
    return DataVersion(name, tables, commit(root, revision) if revision else git_revision(root), counts)


def is_committed(name: str, root: Path) -> bool:
    """Whether git's last commit names the tables of the work tree; yes where there is no git to be told."""
    try:
        return outputs(name, root) == outputs(name, root, "HEAD")
    except EnvironmentProblem:
        return True
    except DataError:
        return False


def outputs(name: str, root: Path, revision: str = "") -> dict[str, str]:
    """File in `data/NAME` → md5, of all that the stages made and DVC keeps, as `dvc.lock` has it.

    Raises:
        DataError: the dataset has not been prepared.
    """
    try:
        found = stages(root, revision)
        outs = {out["path"]: out["md5"] for stage in STAGES for out in found[f"{stage}@{name}"]["outs"]}
    except (KeyError, TypeError, ValueError, FileNotFoundError, yaml.YAMLError) as error:
        raise _not_prepared(name, root, revision, str(error)) from error
    prefix = f"data/{name}/"
    kept = {path.removeprefix(prefix): md5 for path, md5 in outs.items() if path.startswith(prefix)}
    return {file: md5 for file, md5 in kept.items() if file not in METRICS}


def stages(root: Path, revision: str = "") -> dict[str, Any]:
    """Every stage of every dataset as `dvc.lock` has it, by `STAGE@NAME`.

    Raises:
        FileNotFoundError, YAMLError, KeyError, TypeError: there is no such file, or it is none of DVC's.
        DataError, EnvironmentProblem: as `text`.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(text(Path("dvc.lock"), root, revision), loader)["stages"]  # noqa: S506  (a safe loader)


def settings(name: str, root: Path) -> Any:
    """The registry entry the prepared version was made with; None where there is none."""
    with suppress(OSError, KeyError, TypeError, yaml.YAMLError):
        return stages(root)[f"split@{name}"]["params"][str(datasets.REGISTRY)][f"datasets.{name}"]
    return None


def metrics(name: str, root: Path, revision: str = "") -> dict[str, dict[str, Any]]:
    """What validation and split counted, by file; empty where they left nothing."""
    found: dict[str, dict[str, Any]] = {}
    for file in METRICS:
        found[file] = {}
        with suppress(FileNotFoundError, ValueError):
            found[file] = json.loads(text(Path("data") / name / file, root, revision))
    return found


def text(path: Path, root: Path, revision: str = "") -> str:
    """A small file that git keeps, at a revision or in the work tree.

    Raises:
        FileNotFoundError: it is not there.
        DataError: no such revision.
        EnvironmentProblem: a revision is asked for and there is no git.
    """
    if not revision:
        return (root / path).read_text(encoding="utf-8")
    held = _git(["show", f"{commit(root, revision)}:./{path.as_posix()}"], root)
    if held.returncode:
        raise FileNotFoundError(f"no {path} at {revision}")
    return held.stdout


def commit(root: Path, revision: str) -> str:
    """The full name of a git revision.

    Raises:
        DataError: there is none of that name.
        EnvironmentProblem: there is no git repository.
    """
    found = _git(["rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"], root)
    if found.returncode == 0:
        return found.stdout.strip()
    if _git(["rev-parse", "--git-dir"], root).returncode:
        raise EnvironmentProblem(
            "earlier versions are git's to name, and this is no git repository",
            where=str(root),
            have=f"asked for '{revision}'",
            then="leave the revision out for the version of the work tree",
        )
    raise DataError(
        f"git knows no revision '{revision}'", where=str(root), then="`git log --oneline -- dvc.lock` lists versions"
    )


def _not_prepared(name: str, root: Path, revision: str, have: str) -> DataError:
    return DataError(
        f"the dataset '{name}' has not been prepared" + (f" at {revision}" if revision else ""),
        where=str(root / "dvc.lock"),
        have=have,
        then="`git log --oneline -- dvc.lock` lists versions"
        if revision
        else f"dvc repro split@{name}, or `prefloop run`",
    )


def fetch(name: str, root: Path, revision: str, to: Path, files: list[str] | None = None) -> dict[str, Path]:
    """Copy a version's tables out of DVC's cache or remote, and hold them against `dvc.lock`.

    Args:
        to: a folder; what is in it under the tables' names is replaced.
        files: file names in `data/NAME`; all tables when not given.

    Raises:
        DataError: the version is not there, a table can be had neither from the cache nor from the remote, or is not
            the one `dvc.lock` names.
        EnvironmentProblem: a revision is asked for and there is no git.
    """
    from dvc.api import DVCFileSystem

    known = outputs(name, root, revision)
    wanted = [file for file in known if file.endswith(".parquet")] if files is None else files
    to.mkdir(parents=True, exist_ok=True)
    where = f"{name}@{revision}" if revision else name
    try:
        store = DVCFileSystem(url=str(root), rev=commit(root, revision) if revision else None)
        for file in wanted:
            draft = to / f"{file}.partial"
            store.get_file(f"data/{name}/{file}", str(draft))
            _check_md5(draft, known[file], where)
            draft.replace(to / file)
    except (DataError, EnvironmentProblem):
        raise
    except Exception as error:  # DVC and its stores raise whatever the way to the remote does
        raise DataError(
            f"a table of '{where}' can be had neither from DVC's cache nor from its remote",
            where=f"data/{name}/{file}" if wanted else where,
            have=f"{type(error).__name__}: {error}"[:500],
            then="`dvc push` where that version was made, or check the remote with `dvc remote list`",
        ) from error
    return {file: to / file for file in wanted}


def cached(md5s: Iterable[str], root: Path) -> dict[str, Path]:
    """Where DVC's cache on this machine keeps files, for those it has; they are to be read, not written."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        paths = {md5: Path(repo.cache.local.oid_to_path(md5)) for md5 in md5s}
    return {md5: path for md5, path in paths.items() if path.is_file()}


def _check_md5(path: Path, expected: str, where: str) -> None:
    found = digest_file(path, "md5")
    if found != expected:
        path.unlink()
        raise DataError(
            "a table is not the one dvc.lock names",
            where=f"{where}: {path.name.removesuffix('.partial')}",
            have=f"md5 {found}, expected {expected}",
            then="`dvc checkout --force` makes the work tree's tables those of dvc.lock",
        )


def git_revision(root: Path) -> str:
    """The commit of the project, with `+` when what decides the data differs from it; empty without git."""
    head = _git(["rev-parse", "HEAD"], root)
    if head.returncode:
        return ""
    status = _git(["status", "--porcelain", "--", "dvc.lock", "dvc.yaml", "data/datasets.yaml", "steps"], root)
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def git_user(root: Path) -> str:
    """Name and address from git's configuration, else the machine's user."""
    parts = [_git(["config", "--get", f"user.{key}"], root).stdout.strip() for key in ("name", "email")]
    if any(parts):
        return " ".join(filter(None, [parts[0], f"<{parts[1]}>" if parts[1] else ""]))
    import getpass

    with suppress(OSError, KeyError):
        return getpass.getuser()
    return "unknown"


def remotes(root: Path) -> list[str]:
    """Names and addresses of the DVC remotes, in turn."""
    return _dvc(["remote", "list"], root).stdout.split()


def remote_names(root: Path) -> list[str]:
    """Names of the DVC remotes."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        return sorted(repo.config["remote"])


def in_git(files: Sequence[str], root: Path) -> list[str]:
    """Those of some files, relative to the project, that git keeps."""
    listed = _git(["ls-files", "-z", "--", *files], root).stdout if files else ""
    return [file for file in listed.split("\0") if file]


def _git(arguments: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, encoding="utf-8")
    except FileNotFoundError:
        return subprocess.CompletedProcess(arguments, 127, "", "git is not installed")


def _dvc(arguments: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as problems,
    ):
        # Files, for a pipe stays open as long as any stage does, also when DVC is dead.
        command = [sys.executable, "-m", "dvc", *arguments]
        child = subprocess.Popen(command, cwd=root, env=environment, stdout=said, stderr=problems)
        try:
            status = child.wait()
        finally:
            if child.returncode is None:
                child.kill()
                child.wait()  # `subprocess.run` does not wait after Ctrl-C, and then its stages are no orphans yet
            if child.returncode < 0:
                _end_orphans(root)
        said.seek(0)
        problems.seek(0)
        return subprocess.CompletedProcess(command, status, said.read(), problems.read())


_CHATTER = (
    "Running stage '",
    "> python -m steps.",
    "Updating lock file",
    "Generating lock file",
    "ERROR: failed to repro",
)


def _tail(output: str, count: int = 12) -> str:
    """The last lines of what the stages said, without DVC's account of running them."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith(_CHATTER)]
    return "\n        ".join(lines[-count:])
