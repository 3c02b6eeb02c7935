"""Runs whose process is gone, though their journal says they run: closed, so that MLflow says so too.

A dead step's run stays its own: whoever takes the step up again appends another start, and it is running again. Only
journals of this project are looked at, never the tracking server, where runs of other machines may be.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from steps import heartbeat
from steps.artifact import MANIFEST
from steps.paths import Var
from steps.run import PARTIAL, Store
from steps.tracking import JOURNAL, Forwarder, append, entries

DIED = "prefloop.died"  # tag of a run that was found dead
FLOW = "prefect.flow_run_id"
TAIL = 4096  # bytes of a journal that are read to see whether it has ended


@dataclass(frozen=True)
class Dead:
    """A run nobody works on any more.

    Attributes:
        folder: of its journal.
        status: what MLflow is to say of it.
        store: holds the step's lock; None for a run of a whole recipe.
    """

    folder: Path
    status: str
    store: Store | None = None


@dataclass
class Story:
    """What a journal says of its run.

    Attributes:
        running: it has begun and not ended since.
        parent: folder of the run it is a part of.
        tags: the last value of each.
        last: milliseconds since 1970 of the latest line.
    """

    running: bool = False
    parent: Path | None = None
    tags: dict[str, str] = field(default_factory=dict)
    last: int = 0


def story(folder: Path) -> Story:
    """A journal, read from its beginning."""
    found = Story()
    for _, entry in entries(folder):
        if not isinstance(entry, dict):
            continue
        found.last = max(found.last, int(entry.get("time", 0)))
        if entry.get("op") == "start":
            found.running = True
            found.parent = Path(entry["parent"]) if entry.get("parent") else None
            found.tags |= {name: str(value) for name, value in entry.get("tags", {}).items()}
        elif entry.get("op") == "tags":
            found.tags |= {name: str(value) for name, value in entry.get("values", {}).items()}
        elif entry.get("op") == "end":
            found.running = False
    return found


def stores(var: Var) -> list[Store]:
    """The project's stores: `var/store`, and any other folder with locks. Links are not followed."""
    folders = sorted(path.parent for path in var.path.glob("*/.locks"))
    return [Store(folder) for folder in folders if is_folder(folder) and is_folder(folder / ".locks")]


def is_folder(path: Path) -> bool:
    """Whether it is a folder itself, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def runs(var: Var) -> list[Path]:
    """Folders of the runs of this project, the oldest first."""
    folder = var.path / "runs"
    return sorted(path for path in folder.iterdir() if is_folder(path)) if is_folder(folder) else []


def find_dead(var: Var) -> list[Dead]:
    """Runs that are to be closed: runs of recipes first, then steps."""
    found = []
    for folder in runs(var):
        if not _has_ended(folder) and heartbeat.life(folder) == "dead" and story(folder).running:
            found.append(Dead(folder, "KILLED"))
    for store in stores(var):
        for folder in sorted(path for path in store.path.iterdir() if (path / JOURNAL).is_file() and is_folder(path)):
            if not _has_ended(folder) and _step_is_dead(folder, store, var):
                found.append(Dead(folder, "FINISHED" if (folder / MANIFEST).is_file() else "KILLED", store))
    return found


def close_dead(var: Var, forwarder: Forwarder) -> list[Path]:
    """Close every dead run, in its journal and in MLflow; their folders.

    Milliseconds where there is none. What a server that is down does not get, it gets by the next call.
    """
    closed = [dead.folder for dead in find_dead(var) if _close(dead, var)]
    for folder in closed:
        forwarder.forward(folder)
    for store in stores(var):
        for folder in store.path.glob(f"*{PARTIAL}"):
            if folder not in closed and is_folder(folder) and _has_ended(folder) and forwarder.waiting(folder):
                forwarder.forward(folder)
    return closed


def _close(dead: Dead, var: Var) -> bool:
    """Append the end to a journal, unless somebody has come back to the run meanwhile, or may not write to it."""
    try:
        if dead.store is None:
            with heartbeat.claim(dead.folder) as life:
                return life == "dead" and _end(dead)
        with dead.store.lock_of(step_name(dead.folder), timeout=0):
            return dead.folder.is_dir() and _parent_is_dead(story(dead.folder), var) and _end(dead)
    except OSError:  # a lock that is held is one of them
        return False


def _end(dead: Dead) -> bool:
    found = story(dead.folder)
    if not found.running:
        return False
    if dead.status == "KILLED":
        append(dead.folder, "tags", values={DIED: "its process ended without a word"})
    append(dead.folder, "end", status=dead.status, time=found.last)  # its last sign of life
    return True


def _step_is_dead(folder: Path, store: Store, var: Var) -> bool:
    found = story(folder)
    return found.running and not is_held(store, step_name(folder)) and _parent_is_dead(found, var)


def _parent_is_dead(found: Story, var: Var) -> bool:
    """Whether a step's journal belongs to a run of this project that is gone; between two lines a run holds no lock."""
    parent = found.parent
    if parent is None or parent.parent.resolve() != (var.path / "runs").resolve():
        return False
    return heartbeat.life(parent) == "dead"


def step_name(folder: Path) -> str:
    """The step's name and key, of its finished folder or one in progress."""
    return folder.name.removesuffix(PARTIAL)


def is_held(store: Store, name: str) -> bool:
    """Whether a process is at work on the step with that name; an instant's truth."""
    if not (store.locks / f"{name}.lock").is_file():
        return False
    try:
        with store.lock_of(name, timeout=0):
            return False
    except OSError:  # it is held, or somebody else's
        return True


def _has_ended(folder: Path) -> bool:
    """Whether the last line of a journal is its end; reads no more than that line."""
    try:
        with (folder / JOURNAL).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
            return json.loads(stream.read().splitlines()[-1])["op"] == "end"
    except (OSError, IndexError, ValueError, KeyError, TypeError):
        return False


def living(var: Var) -> list[Path]:
    """Folders of the runs whose process is there, whether or not it has already closed their journal."""
    found = (folder for folder in runs(var) if heartbeat.life(folder) == "alive")
    return [folder for folder in found if (folder / heartbeat.LOCK).is_file() or story(folder).running]


def dead_flows(var: Var, settled: str) -> dict[str, list[Path]]:
    """Flow runs all of whose runs were found dead or would be: the orchestrator's id → folders of their runs.

    Args:
        settled: tag of a run whose flow run has been dealt with.
    """
    folders: dict[str, list[Path]] = {}
    stories = {folder: story(folder) for folder in runs(var)}
    for folder, found in stories.items():
        if (flow := found.tags.get(FLOW, "None")) != "None":
            folders.setdefault(flow, []).append(folder)
    dead = {}
    for flow, some in folders.items():
        told = [stories[folder] for folder in some]
        died = any(one.running or DIED in one.tags for one in told) and not any(settled in one.tags for one in told)
        if died and all(heartbeat.life(folder) == "dead" for folder in some):
            dead[flow] = some
    return dead
