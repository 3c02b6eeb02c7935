"""What prefloop says when something is wrong: what, where, what it found, and the next command."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path


class PrefloopError(Exception):
    """An error with a way out.

    Args:
        what: one sentence, no full stop.
        where: the file, key or row that is wrong.
        have: what was found there.
        then: the next command or edit.
    """

    def __init__(self, what: str, *, where: str = "", have: str = "", then: str = "") -> None:
        self.what, self.where, self.have, self.then = what, where, have, then
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = (("where", self.where), ("found", self.have), ("next", self.then))
        return "\n".join([self.what, *(f"  {label:<6}{text}" for label, text in parts if text)])

    def __reduce__(self):
        return (_rebuild, (type(self), self.what, self.where, self.have, self.then))


class RecipeError(PrefloopError):
    """The recipe cannot be used as it is written."""


class DataError(PrefloopError):
    """A dataset is missing, broken, or not what the registry says."""


class ModelError(PrefloopError):
    """A base model or adapter cannot be loaded."""


class EnvironmentProblem(PrefloopError):
    """The machine lacks something: a package, disk space, a server."""


class StepFailed(PrefloopError):
    """A step ended without its artifact."""


class StepKilled(StepFailed):
    """A step's process was killed from outside; it can go on at its newest checkpoint."""


class Interrupted(PrefloopError):
    """Work was stopped from outside; what was done is kept."""


_KINDS = {
    kind.__name__: kind
    for kind in (
        PrefloopError,
        RecipeError,
        DataError,
        ModelError,
        EnvironmentProblem,
        StepFailed,
        StepKilled,
        Interrupted,
    )
}


def _rebuild(kind: type[PrefloopError], what: str, where: str, have: str, then: str) -> PrefloopError:
    return kind(what, where=where, have=have, then=then)


def write_error(error: BaseException, path: Path) -> None:
    """Leave an error where another process can read it."""
    if not isinstance(error, PrefloopError):
        error = StepFailed(f"{type(error).__name__}: {error}")
    record = {"kind": type(error).__name__, **{k: getattr(error, k) for k in ("what", "where", "have", "then")}}
    path.write_text(json.dumps(record), encoding="utf-8")


def read_error(path: Path) -> PrefloopError | None:
    """Read back what `write_error` left, or None when there is nothing readable."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return _rebuild(_KINDS[record.pop("kind")], **record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint such as `did you mean 'beta'?`, or the list of what is known when nothing is close."""
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    shown = ", ".join(options[:12]) + (", …" if len(options) > 12 else "")
    return f"known: {shown}"
