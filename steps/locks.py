"""Who may work: one training per device, one retraining per model. Others wait in line and are told for whom.

A lock is a file in `var/locks`; the system lets go of it when its holder dies. Beside it stands who holds it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

POLL = 0.25  # seconds between two looks at a lock that is taken


def devices() -> list[str]:
    """The devices a training here would use: `cuda-0`, … or `cpu`. Nothing heavy is imported to find out."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not there or visible in ("", "-1") or metadata.version("torch").endswith("+cpu"):
        return ["cpu"]
    if visible is None:
        return [f"cuda-{path.name.removeprefix('nvidia')}" for path in there]
    return sorted({f"cuda-{name.strip()}" for name in visible.split(",") if name.strip()})


@contextmanager
def held(folder: Path, names: Sequence[str], holder: str, told: Callable[[str], None]) -> Iterator[None]:
    """Hold the locks of these names; where one is taken, wait until it is free.

    Args:
        folder: where lock files are kept.
        names: taken in sorted order, so that two that want the same ones never wait for each other.
        holder: what others are told is running here.
        told: called once for a lock that is taken, with who holds it and since when.
    """
    with ExitStack() as stack:
        for name in sorted(set(names)):
            stack.enter_context(_one(folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.lock", name, holder, told))
        yield


@contextmanager
def _one(path: Path, name: str, holder: str, told: Callable[[str], None]) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(path), path.with_suffix(".json")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        told(f"for {name}, which {_holder(note)} has")
        lock.acquire(poll_interval=POLL)
    try:
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"pid": os.getpid(), "what": holder, "since": f"{datetime.now():%F %T}"}))
        draft.replace(note)
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _holder(note: Path) -> str:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return f"{found['what']} (process {found['pid']}, since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just got it, or is about to let go
        return "another process"
