"""Verdicts with what they were about, on disk: nothing is judged twice, and none is lost.

JSON lines, only ever appended to. A line is written whole, under a lock, by one call; a writer that was killed inside
one leaves a torn line, which the next writer closes and every reader passes over.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd

from steps.artifact import digest_json
from steps.errors import PrefloopError
from steps.judges import Comparison, Judge, Paid, Verdict, usage_facts

STORE = "verdicts.jsonl"
_CHUNK = 1000  # verdicts of a judge that gives them all at once, between two writes
_NAMES = frozenset(field.name for field in fields(Verdict))


def verdict_key(identity: str, comparison: Comparison) -> str:
    """sha256 of (judge's identity, prompt, first, second)."""
    texts = [identity, comparison.prompt, comparison.first, comparison.second]
    # A lone surrogate, which no UTF-8 has, becomes the escape JSON has for it.
    return digest_json([text.encode("utf-8", "backslashreplace").decode() for text in texts])


class VerdictStore:
    """The verdicts of any number of judges in one file, for any number of processes at a time.

    The first verdict on a comparison stays; a later one by another process is kept in the file and not used. What a
    judge could not say (no verdict) is kept for its cost and asked again.

    Args:
        path: the file; it and its folder are made with the first verdict.

    Attributes:
        damaged: lines that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = 0
        self._verdicts: dict[str, Verdict] = {}
        self._costs: dict[str, float] = {}
        self._read = 0
        self.refresh()

    def __len__(self) -> int:
        return len(self._verdicts)

    def refresh(self) -> None:
        """Read what was added since, by whatever process."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._read)
                added = stream.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unusable("read", error) from error
        whole = added.rfind(b"\n") + 1  # what follows is being written, or torn
        self._read += whole
        for line in added[:whole].splitlines():
            self._take(line)

    def get(self, identity: str, comparison: Comparison) -> Verdict | None:
        """The verdict that is known, as of the last `refresh`."""
        return self._verdicts.get(verdict_key(identity, comparison))

    def cost(self, identity: str, comparison: Comparison) -> float:
        """What was spent on a comparison, failed attempts included."""
        return self._costs.get(verdict_key(identity, comparison), 0.0)

    def add(self, judge: str, identity: str, judged: Iterable[tuple[Comparison, Verdict]]) -> None:
        """Append verdicts; when this returns they are on disk.

        Raises:
            PrefloopError: the file cannot be written.
        """
        lines = []
        for comparison, verdict in judged:
            named = {"key": verdict_key(identity, comparison), "judge": judge, "identity": identity}
            lines.append(json.dumps({**named, **asdict(comparison), **_plain(verdict)}))
        if not lines:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)  # ends with the file's closing, however the process does
                stream.write(_end_of_torn_line(stream) + "".join(line + "\n" for line in lines).encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise self._unusable("written", error) from error
        self.refresh()

    def table(self) -> pd.DataFrame:
        """Every line that can be read, in the order of writing: key, judge, identity, texts and verdict."""
        if not self.path.is_file():
            return pd.DataFrame()
        records = (_record(line) for line in self.path.read_bytes().splitlines())
        return pd.DataFrame([record for record in records if record is not None])

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        record = _record(line)
        if record is None:
            self.damaged += 1
            return
        key, verdict = record["key"], _verdict(record)
        self._costs[key] = self._costs.get(key, 0.0) + verdict.cost
        if verdict.given:
            self._verdicts.setdefault(key, verdict)

    def _unusable(self, what: str, error: OSError) -> PrefloopError:
        return PrefloopError(
            f"the verdict store cannot be {what}",
            where=str(self.path),
            have=error.strerror or type(error).__name__,
            then="see to the disk and the file's rights, then run again: what is in it is kept",
        )


def _end_of_torn_line(stream: Any) -> bytes:
    """What ends the line that a killed writer left open, if one did."""
    if not stream.seek(0, os.SEEK_END):
        return b""
    stream.seek(-1, os.SEEK_END)
    return b"" if stream.read(1) == b"\n" else b"\n"


def _plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON has it: none is null."""
    values = asdict(verdict)
    return values if verdict.given else {**values, "preference": None}


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of the store, or None where it is damaged."""
    try:
        record = json.loads(line)
        comparison = Comparison(record["prompt"], record["first"], record["second"])
        sound = record["key"] == verdict_key(record["identity"], comparison) and _is_sound(record)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if sound else None


def _is_sound(record: dict[str, Any]) -> bool:
    return record["preference"] in (None, 0, 0.5, 1) and record.get("cost", 0.0) >= 0


def _verdict(record: dict[str, Any]) -> Verdict:
    values = {name: value for name, value in record.items() if name in _NAMES}
    preference, orders = values.pop("preference"), values.pop("orders", None)
    return Verdict(math.nan if preference is None else float(preference), **values, orders=orders and tuple(orders))


class Remembered:
    """A judge that is asked only for what the store does not hold, and whose verdicts are stored as they come."""

    def __init__(self, judge: Judge, store: VerdictStore) -> None:
        self._judge, self._store = judge, store
        self.name, self.identity = judge.name, judge.identity
        self._charged: set[Comparison] = set()

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Verdicts in the order of the comparisons; one that stands twice is judged once.

        Raises:
            PrefloopError: of the judge or of the store; every verdict that came before it is kept.
        """
        self._store.refresh()
        found = {c: self._store.get(self.identity, c) for c in dict.fromkeys(comparisons)}
        unknown = [comparison for comparison, verdict in found.items() if verdict is None]
        if isinstance(self._judge, Paid):
            self._ask_paid(self._judge, list(found), unknown, found)
        else:
            for start in range(0, len(unknown), _CHUNK):
                chunk = unknown[start : start + _CHUNK]
                said = self._judge.compare(chunk)
                self._store.add(self.name, self.identity, zip(chunk, said, strict=True))
                found.update(zip(chunk, said, strict=True))
        verdicts = [found[comparison] for comparison in comparisons]
        return [verdict for verdict in verdicts if verdict is not None]

    def facts(self) -> dict[str, float]:
        return usage_facts(self._judge)

    def _ask_paid(
        self, judge: Paid, asked: list[Comparison], unknown: list[Comparison], found: dict[Comparison, Verdict | None]
    ) -> None:
        before = [comparison for comparison in asked if comparison not in self._charged]
        spent = sum(self._store.cost(self.identity, comparison) for comparison in before)
        judge.charge(spent, sum(found[comparison] is not None for comparison in before))
        self._charged.update(asked)

        def keep(number: int, verdict: Verdict) -> None:
            self._store.add(self.name, self.identity, [(unknown[number], verdict)])
            found[unknown[number]] = verdict

        if unknown:
            judge.compare_each(unknown, keep)
