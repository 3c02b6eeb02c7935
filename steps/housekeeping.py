"""What `prefloop gc` finds and clears away: dead runs, work nobody takes up, artifacts nobody needs, stale locks.

`survey` only looks. `clean` does what a survey found, each thing under its own lock and only if nothing has touched it
since. MLflow's records, data, reports in `var/runs`, and verdicts that cost something are never removed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from steps import dead_runs, heartbeat, registry
from steps.artifact import MANIFEST
from steps.dead_runs import Dead, is_folder, is_held, step_name
from steps.errors import EnvironmentProblem
from steps.paths import Var
from steps.reachable import Shelf, keys_of, read_spec
from steps.registry import Version
from steps.run import PARTIAL, Store
from steps.tracking import JOURNAL, SENT, Forwarder, servers_of

DAY = 86400.0
HOUR = 3600.0
TRASH = ".trash"
_OF_TRACKING = (JOURNAL, SENT)
Would = Literal["close", "remove", "keep", "look"]


@dataclass(frozen=True)
class Finding:
    """One row of a survey.

    Attributes:
        what: where it is, below `var/`.
        would: `close` a run, `remove` files, `keep` them, or `look`: for people to decide.
        why: in words.
        size: bytes.
        age: seconds since it was last touched; None where that says nothing.
        paths: what would be removed.
        store: holds the lock that is taken before.
        touched: newest change in it, in nanoseconds since 1970, when it was surveyed.
        dead: the run that would be closed.
    """

    what: str
    would: Would
    why: str
    size: int = 0
    age: float | None = None
    paths: tuple[Path, ...] = ()
    store: Store | None = None
    touched: int = 0
    dead: Dead | None = None


@dataclass
class Survey:
    """What there is to clear away, and what is kept.

    Attributes:
        needed: finished artifacts that are kept → why.
        needed_bytes: what they take.
        problem: why finished artifacts could not be judged; empty when they were.
    """

    findings: list[Finding] = field(default_factory=list)
    needed: dict[str, str] = field(default_factory=dict)
    needed_bytes: int = 0
    problem: str = ""

    def to_do(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.would in ("close", "remove")]


def survey(var: Var, forwarder: Forwarder, older_than: float = 7.0, keep: int = 1) -> Survey:
    """Look for what could be cleared away; nothing is changed.

    Args:
        older_than: days after which what nobody has touched counts as forgotten.
        keep: a model's newest versions whose artifacts are kept, whatever their aliases.
    """
    limit, found = older_than * DAY, Survey()
    found.findings += [_closing(dead, var) for dead in dead_runs.find_dead(var)]
    stores = dead_runs.stores(var)
    partials = [finding for store in stores for finding in _partials(store, var, limit)]
    found.findings += partials
    versions = _versions(forwarder, var, keep, found)
    for store in stores:
        if store.path == var.path / "store":
            _judge_artifacts(store, var, limit, versions, partials, found)
        found.findings += _stale_locks(store, var)
    if versions is not None:
        found.findings += _champions(var, limit, versions)
    found.findings += [*_drafts(var), *_trash(var)]
    return found


def clean(found: Survey, var: Var, forwarder: Forwarder) -> list[tuple[Finding, str]]:
    """Do what a survey found; each finding with what became of it: `closed`, `removed`, or why it was left.

    Raises:
        EnvironmentProblem: another one is at work here.
    """
    with _only_one(var):
        closed = set(dead_runs.close_dead(var, forwarder))
        return [(finding, _deal_with(finding, var, forwarder, closed)) for finding in found.to_do()]


@contextmanager
def _only_one(var: Var) -> Iterator[None]:
    try:
        with FileLock(var.path / "gc.lock", timeout=0):
            yield
    except Timeout:
        raise EnvironmentProblem(
            "another gc is at work in this project",
            where=str(var.path / "gc.lock"),
            have="its lock is taken",
            then="wait for it to end",
        ) from None


# -- looking -----------------------------------------------------------------------------------------------------


def _closing(dead: Dead, var: Var) -> Finding:
    why = "its process is gone" if dead.status == "KILLED" else "finished, and its process was gone before it said so"
    return Finding(_short(dead.folder, var), "close", why, age=heartbeat.quiet_for(dead.folder), dead=dead)


def _partials(store: Store, var: Var, limit: float) -> Iterator[Finding]:
    """Work in progress, of living and of dead steps."""
    for folder in sorted(store.path.glob(f"*{PARTIAL}")):
        if folder.is_symlink():
            yield _link(folder, var)
            continue
        size, touched = _measure(folder)
        age, would, why = _age(touched), "keep", ""
        if is_held(store, step_name(folder)):
            why = f"a step is at work on it{_progress(folder)}"
        elif (store.path / step_name(folder) / MANIFEST).is_file():
            would, why = "remove", "its step has been finished elsewhere"
        elif age >= limit:
            would, why = "remove", f"nobody took it up{_progress(folder)}"
        elif read_spec(folder) is None:
            why = f"its spec is cut short; the same step takes it up{_progress(folder)}"
        else:
            why = f"the same step takes it up{_progress(folder)}"
        yield Finding(_short(folder, var), would, why, size, age, (folder,), store, touched)  # type: ignore[arg-type]


def _progress(folder: Path) -> str:
    with suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        return f": {state['phase']}, {int(state['done'])} of {int(state['total'])}"
    return ""


def _versions(forwarder: Forwarder, var: Var, keep: int, found: Survey) -> list[tuple[Version, str]] | None:
    """Versions to be kept, of every registry a run of this project was sent to; None when one cannot be asked."""
    uris = [forwarder.uri, f"sqlite:///{var.path / 'mlflow.db'}"]
    uris += [uri for folder in dead_runs.runs(var) for uri in servers_of(folder)]
    versions: list[tuple[Version, str]] = []
    for uri in dict.fromkeys(uris):
        if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
            continue  # looking must not create it
        try:
            asked = forwarder if uri == forwarder.uri else Forwarder(uri, forwarder.artifacts)
            versions += registry.kept(asked.client, keep)
        except Exception as error:  # without an answer nothing can be called unneeded
            found.problem = f"{uri}: {getattr(error, 'what', '') or f'{type(error).__name__}: {error}'}"
            return None
    return versions


def _judge_artifacts(
    store: Store,
    var: Var,
    limit: float,
    versions: list[tuple[Version, str]] | None,
    partials: list[Finding],
    found: Survey,
) -> None:
    shelf = Shelf.read(store.path)
    found.findings += [_link(store.path / name, var) for name in shelf.links]
    for name, why in shelf.broken.items():
        size, touched = _measure(store.path / name)
        said = f"broken: {why}"
        found.findings.append(Finding(_short(store.path / name, var), "look", said, size, _age(touched)))
    if versions is None:
        return
    ages = {name: _age(_touched(artifact.path / MANIFEST)) for name, artifact in shelf.whole.items()}
    roots = {name: f"{version.uri} ({why})" for version, why in versions for name in shelf.of_version(version)}
    for further in (_recent(ages, var, limit), _of_runs(var, limit)):
        roots = {**roots, **{name: why for name, why in further.items() if name not in roots}}
    folders = [(one.paths[0], "a step in progress") for one in partials if one.would == "keep" and one.paths]
    folders += [(store.path / name, "a broken artifact") for name in shelf.broken]
    folders += [(path, "another store") for path in _steps_elsewhere(store, var)]
    found.needed = shelf.needed(roots, folders)
    for name, artifact in shelf.whole.items():
        size, _ = _measure(artifact.path)
        if name in found.needed:
            found.needed_bytes += size
            continue
        why = "nothing needs it"
        touched = _touched(artifact.path / MANIFEST)
        found.findings.append(
            Finding(_short(artifact.path, var), "remove", why, size, ages[name], (artifact.path,), store, touched)
        )


def _of_runs(var: Var, limit: float) -> dict[str, str]:
    """Artifacts that runs of late, and runs that go on, made or reused."""
    alive = set(dead_runs.living(var))
    late = [folder for folder in dead_runs.runs(var) if folder in alive or heartbeat.quiet_for(folder) < limit]
    return {name: f"run {folder.name}" for folder in late for name in keys_of(dead_runs.story(folder).tags)}


def _recent(ages: dict[str, float], var: Var, limit: float) -> dict[str, str]:
    """Artifacts used of late; within an hour while a run goes on, for it may not have written down yet what it uses."""
    floor = HOUR if dead_runs.living(var) else 0.0
    return {name: "used of late" for name, age in ages.items() if age < max(limit, floor)}


def _steps_elsewhere(store: Store, var: Var) -> Iterator[Path]:
    for other in dead_runs.stores(var):
        if other.path != store.path:
            yield from (path for path in other.path.iterdir() if is_folder(path) and not path.name.startswith("."))


def _stale_locks(store: Store, var: Var) -> Iterator[Finding]:
    stale = [path for path in sorted(store.locks.glob("*.lock")) if _is_stale(path, store)]
    if stale:
        why = f"{_count(len(stale), 'lock')} of steps that are no more"
        yield Finding(_short(store.locks, var), "remove", why, paths=tuple(stale), store=store)


def _is_stale(lock: Path, store: Store) -> bool:
    name = lock.stem
    gone = not any(os.path.lexists(store.path / (name + end)) for end in ("", PARTIAL))
    return gone and not lock.is_symlink() and not is_held(store, name)


def _champions(var: Var, limit: float, versions: list[tuple[Version, str]]) -> Iterator[Finding]:
    """Fetched adapters of versions that are no longer in use; they can be fetched again."""
    folder = var.path / "champions"
    if not is_folder(folder) or dead_runs.living(var):
        return
    used = {f"{version.name}-{version.version}" for version, _ in versions}
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            yield _link(path, var)
        elif path.is_dir() and not path.name.startswith(".") and path.name not in used:
            size, touched = _measure(path)
            draft = path.name.endswith(PARTIAL)
            if (age := _age(touched)) >= (DAY if draft else limit):
                why = "a fetch that was cut short" if draft else "a copy of a version not in use; fetched when needed"
                yield Finding(_short(path, var), "remove", why, size, age, (path,), touched=touched)


def _drafts(var: Var) -> Iterator[Finding]:
    """Files a writer was killed over; a living one needs no day to finish."""
    places = [var.path.glob("*.new"), *(folder.glob("*.tmp") for folder in dead_runs.runs(var))]
    places += [
        path.glob("*.tmp") for store in dead_runs.stores(var) for path in store.path.iterdir() if is_folder(path)
    ]
    files = [path for place in places for path in place if path.is_file() and not path.is_symlink()]
    old = sorted(path for path in files if _age(_touched(path)) >= DAY)
    if old:
        size, age = sum(path.lstat().st_size for path in old), min(_age(_touched(path)) for path in old)
        yield Finding("*.tmp, *.new", "remove", f"{_count(len(old), 'draft')} cut short", size, age, tuple(old))


def _trash(var: Var) -> Iterator[Finding]:
    for folder in sorted(var.path.glob(f"*/{TRASH}")):
        if is_folder(folder) and is_folder(folder.parent) and (paths := tuple(sorted(folder.iterdir()))):
            size = sum(_measure(path)[0] for path in paths)
            yield Finding(_short(folder, var), "remove", "left by a gc that was cut short", size, paths=paths)


def _link(path: Path, var: Var) -> Finding:
    return Finding(_short(path, var), "look", "a link, which is not followed")


# -- clearing away -----------------------------------------------------------------------------------------------


def _deal_with(finding: Finding, var: Var, forwarder: Forwarder, closed: set[Path]) -> str:
    try:
        if finding.dead:
            return "closed" if finding.dead.folder in closed else "left: somebody came back to it"
        if finding.store and finding.paths[0].parent == finding.store.locks:
            return _remove_locks(finding.paths, finding.store)
        if finding.store:
            return _remove_step(finding, finding.store, forwarder)
        return _remove_plain(finding, var)
    except OSError as error:
        return f"left: {error.strerror or error}"


def _remove_step(finding: Finding, store: Store, forwarder: Forwarder) -> str:
    """Remove a step's folder; no step can begin or be reused meanwhile."""
    (folder,) = finding.paths
    name = step_name(folder)
    lock = store.lock_of(name, timeout=0)
    try:
        with lock:
            if not is_folder(folder):
                return "left: it is gone already"
            is_partial = folder.name.endswith(PARTIAL)
            now = _measure(folder)[1] if is_partial else _touched(folder / MANIFEST)
            if now != finding.touched:
                return "left: it is in use again"
            if forwarder.waiting(folder) and not forwarder.forward(folder):
                return "left: the tracking server has not got its journal yet"
            trash = _set_aside(folder)
            if not os.path.lexists(store.path / name) and not os.path.lexists(store.path / (name + PARTIAL)):
                (store.locks / f"{name}.lock").unlink(
                    missing_ok=True
                )  # whoever waits for it notices, and makes another
    except Timeout:
        return "left: a step is at work on it"
    return _throw_away([trash])


def _remove_locks(paths: Iterable[Path], store: Store) -> str:
    held = 0
    for path in paths:
        try:
            with store.lock_of(path.stem, timeout=0):
                if not any(os.path.lexists(store.path / (path.stem + end)) for end in ("", PARTIAL)):
                    path.unlink(missing_ok=True)
        except Timeout:
            held += 1
    return f"left: {held} are held" if held else "removed"


def _remove_plain(finding: Finding, var: Var) -> str:
    folders = [path for path in finding.paths if path.parent.name != TRASH and is_folder(path)]
    if folders and dead_runs.living(var):
        return "left: a run has begun"
    if any(_measure(path)[1] != finding.touched for path in folders):
        return "left: it is in use again"
    return _throw_away([_set_aside(path) if path in folders else path for path in finding.paths])


def _set_aside(path: Path) -> Path:
    """Give a folder a name nobody looks for, at once and whole."""
    trash = path.parent / TRASH
    trash.mkdir(exist_ok=True)
    if not is_folder(trash):
        raise OSError(0, f"{trash} is a link")
    return path.rename(trash / f"{path.name}.{uuid.uuid4().hex[:8]}")


def _throw_away(paths: Iterable[Path]) -> str:
    for path in paths:
        if is_folder(path):
            shutil.rmtree(path)  # removes links in it, and follows none
        elif path.parent.name == TRASH or _age(_touched(path)) >= DAY:  # a draft may have found a new writer
            path.unlink(missing_ok=True)
        if path.parent.name == TRASH:
            with suppress(OSError):  # something else is still in it
                path.parent.rmdir()
    return "removed"


# -- small things ------------------------------------------------------------------------------------------------


def _measure(path: Path) -> tuple[int, int]:
    """Bytes below a path, and its newest change in nanoseconds since 1970. Links are counted, not followed.

    What tracking writes beside a step's work is no change of the work.
    """
    size, times = 0, []
    for folder, _, files in os.walk(path):
        for name in files:
            with suppress(OSError):
                status = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - many small files
                size += status.st_size
                if not name.startswith(_OF_TRACKING):
                    times.append(status.st_mtime_ns)
    return size, max(times) if times else _touched(path)


def _touched(path: Path) -> int:
    try:
        return path.lstat().st_mtime_ns
    except OSError:
        return time.time_ns()


def _age(touched: int) -> float:
    """Seconds; 0 where the clock was set back behind it, so that nothing is taken for older than it is."""
    return max(0.0, (time.time_ns() - touched) / 1e9)


def _short(path: Path, var: Var) -> str:
    return str(path.relative_to(var.path))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
