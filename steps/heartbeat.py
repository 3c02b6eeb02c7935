"""Whether a run lives: its process holds a lock in the run's folder.

The kernel lets go of the lock however the process dies. Process numbers are given out again and clocks jump, so
neither is asked.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock

LOCK = "running.lock"
DAY = 86400.0  # seconds a folder without a lock has to be quiet before its run counts as dead

# `copied`: the lock is a copy of one that another process, maybe on another machine, may hold.
Life = Literal["alive", "dead", "copied"]

_held: dict[Path, FileLock] = {}


def begin(folder: Path) -> None:
    """Show, from now until this process ends, that the run in `folder` lives."""
    lock = FileLock(folder / LOCK, thread_local=False)
    lock.acquire()
    record = {"pid": os.getpid(), "inode": (folder / LOCK).stat().st_ino}
    (folder / LOCK).write_text(json.dumps(record), encoding="utf-8")
    _held[folder.resolve()] = lock


def life(folder: Path) -> Life:
    """Whether the process of the run in `folder` is there.

    A run without a lock (of an older prefloop, or one that died as it began) is dead when nothing in its folder
    changed for a day; so is one whose folder is gone.
    """
    with claim(folder) as found:
        return found


@contextmanager
def claim(folder: Path) -> Iterator[Life]:
    """As `life`; while the block runs, no other process can claim a dead run."""
    place = folder / LOCK
    if folder.resolve() in _held:
        yield "alive"
    elif not place.is_file():
        yield "dead" if quiet_for(folder) >= DAY else "alive"
    else:
        lock = FileLock(place, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except OSError:  # it is held, or somebody else's
            yield "alive"
            return
        try:
            yield _judge(place)
        finally:
            lock.release()


def _judge(place: Path) -> Life:
    """What a lock says that nobody holds."""
    try:
        inode = json.loads(place.read_text(encoding="utf-8"))["inode"]
    except (OSError, ValueError, KeyError, TypeError):  # its process died before it had written into it
        return "dead" if quiet_for(place.parent) >= DAY else "alive"
    return "dead" if inode == place.stat().st_ino else "copied"


def quiet_for(folder: Path) -> float:
    """Seconds since anything directly in a folder changed; 0 where the clock was set back, infinite without folder."""
    times = []
    with suppress(OSError):
        times = [folder.lstat().st_mtime, *(path.lstat().st_mtime for path in folder.iterdir())]
    return max(0.0, time.time() - max(times)) if times else float("inf")
