"""A step that ran again beside what it was: its bytes, its numbers, and what explains that they are others.

On the same kind of processor, with the same libraries and as many threads, the bytes must be the same. Elsewhere sums
are made in another order, and the numbers must agree within `TOLERANCES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from steps.artifact import MANIFEST, open_artifact
from steps.experiment import is_number
from steps.recorded import Original, StepThen, problems, settings_of

EQUAL, CLOSE, DIFFERS, UNKNOWN = "equal", "within tolerance", "differs", "not recorded"


@dataclass(frozen=True)
class Tolerance:
    """How far a number may lie from what it was: `absolute + relative · |then|`."""

    absolute: float = 0.0
    relative: float = 0.0

    def holds(self, then: float, now: float) -> bool:
        if math.isnan(then) or math.isnan(now):
            return math.isnan(then) and math.isnan(now)
        return abs(now - then) <= self.absolute + self.relative * abs(then)

    def __str__(self) -> str:
        parts = [f"{self.absolute:g}" * bool(self.absolute), f"{self.relative:.0%}" * bool(self.relative)]
        return "±" + " ± ".join(filter(None, parts)) if any(parts) else "exactly"


# What another processor, another number of threads or other libraries may do to a number; the first pattern counts.
# Two samples of 200 answers, each with a standard error of at most 0.035 = √(¼/200), differ by less than
# 1.96 · √2 · 0.035 = 0.098 in nineteen of twenty cases: what rests on sampled answers may move by that.
# docs/reproduce.md has the table in words.
TOLERANCES: tuple[tuple[str, Tolerance], ...] = (
    ("*steps", Tolerance()),
    ("*rows", Tolerance()),
    ("*pairs", Tolerance()),
    ("*prompts", Tolerance()),
    ("held_out", Tolerance()),
    ("bytes", Tolerance()),
    ("*confidence", Tolerance()),
    ("*_wins", Tolerance(5, 0.2)),
    ("*_losses", Tolerance(5, 0.2)),
    ("*_ties", Tolerance(5, 0.2)),
    ("*p_value*", Tolerance(1.0)),  # a number that spans twenty decades; the win rate beside it is held tighter
    ("judge_*", Tolerance(0.02)),
    ("*win_rate*", Tolerance(0.1)),
    ("*accurac*", Tolerance(0.05)),
    ("*loss*", Tolerance(0.01, 0.02)),
    ("*logps*", Tolerance(0.5, 0.02)),
    ("*kl*", Tolerance(0.2, 0.2)),
    ("*reward*", Tolerance(0.1, 0.1)),
    ("*", Tolerance(0.05, 0.1)),
)


def tolerance_of(metric: str) -> Tolerance:
    """How far a metric may lie from what it was."""
    return next(tolerance for pattern, tolerance in TOLERANCES if fnmatchcase(metric, pattern))


@dataclass(frozen=True)
class Change:
    """A number that is not what it was; NaN where there is none."""

    metric: str
    then: float
    now: float
    tolerance: Tolerance

    @property
    def holds(self) -> bool:
        return self.tolerance.holds(self.then, self.now)

    def __str__(self) -> str:
        then, now = ("none" if math.isnan(value) else f"{value:.6g}" for value in (self.then, self.now))
        return f"{self.metric} {then} then, {now} now (allowed: {self.tolerance})"

    def to_json(self) -> dict[str, Any]:
        then, now = (None if math.isnan(value) else value for value in (self.then, self.now))
        return {"name": self.metric, "then": then, "now": now, "within": self.holds}


@dataclass(frozen=True)
class StepNow:
    """A step beside what it was.

    Attributes:
        verdict: `equal` (every byte), `within tolerance`, `differs`, or `not recorded`.
        files: files that differ, each as name, sha256 then and now; an empty one is a file that is not there.
        changes: numbers that differ, those out of tolerance first.
        because: what explains a difference, the likeliest first.
        elsewhere: whether the machine, its libraries or the number of threads is otherwise, and nothing else is known
            to be.
        follows: earlier steps that differ and that this one reads.
    """

    name: str
    key_then: str
    key_now: str
    verdict: str
    files: list[tuple[str, str, str]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    because: list[str] = field(default_factory=list)
    elsewhere: bool = False
    follows: list[str] = field(default_factory=list)
    seconds_then: float | None = None
    seconds_now: float | None = None


@dataclass(frozen=True)
class Result:
    """What reproducing came to.

    Attributes:
        equal: whether the run counts as reproduced.
        verdict: that in a sentence.
    """

    original: Original
    steps: list[StepNow]
    equal: bool
    verdict: str

    @property
    def first(self) -> StepNow | None:
        """The first step that is not equal, byte for byte."""
        return next((step for step in self.steps if step.verdict in (CLOSE, DIFFERS)), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "subject": self.original.subject,
            "commit": self.original.commit,
            "state": self.original.state,
            "equal": self.equal,
            "verdict": self.verdict,
            "problems": problems(self.original),
            "steps": [
                {
                    "step": step.name,
                    "verdict": step.verdict,
                    "key": {"then": step.key_then, "now": step.key_now},
                    "files": [{"name": name, "then": then, "now": now} for name, then, now in step.files],
                    "metrics": [change.to_json() for change in step.changes],
                    "because": step.because,
                    "follows": step.follows,
                    "seconds": {"then": step.seconds_then, "now": step.seconds_now},
                }
                for step in self.steps
            ],
        }


def compared(then: Original, answer: Mapping[str, Any], earlier: Sequence[StepNow], here: Mapping[str, str]) -> StepNow:
    """A step that ran again beside what it was.

    Args:
        answer: what `steps.repeat` said of it.
        earlier: the steps before it, compared.
        here: what runs were told apart by, as it is now.
    """
    name = answer["step"]
    now = open_artifact(Path(answer["folder"]))
    assert now is not None
    was = then.steps.get(name)
    if was is None or not was.manifest:
        return StepNow(name, was.key if was else "", answer["key"], UNKNOWN, seconds_now=now.seconds)
    files = _other_files(was.manifest["files"], now.files)
    changes = _changes(was.manifest["facts"], now.facts)
    if not files and not changes and was.manifest["digest"] == now.digest:
        verdict = EQUAL
    else:
        verdict = CLOSE if all(change.holds for change in changes) else DIFFERS
    because: list[str] = []
    follows: list[str] = []
    elsewhere = False
    if verdict != EQUAL or was.key != answer["key"]:
        other = {step.name for step in earlier if step.verdict in (CLOSE, DIFFERS)}
        read = {role for role, digest in now.inputs.items() if was.manifest["inputs"].get(role) != digest}
        follows = [step.name for step in earlier if step.name in other & read]
        surroundings = _surrounding_reasons(was.surroundings, here)
        content = _reasons(was, answer, read - other)
        elsewhere = bool(surroundings) and not content
        because = [*content, *surroundings]
        if not because and was.key != answer["key"]:
            because = ["the step's key is another, so its code was"]
        if not then.clean:
            same = "; but this step's code was the commit's" if was.key == answer["key"] else ""
            because.append(f"the work tree was not clean ({then.state}){same}")
    return StepNow(
        name,
        was.key,
        answer["key"],
        verdict,
        files,
        changes,
        because,
        elsewhere,
        follows,
        was.manifest.get("seconds"),
        now.seconds,
    )


def _other_files(then: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = sorted({*then, *now})
    return [(name, then.get(name, ""), now.get(name, "")) for name in names if then.get(name) != now.get(name)]


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    before, after = numbers(then), numbers(now)
    nothing = float("nan")
    found = [
        Change(name, before.get(name, nothing), after.get(name, nothing), tolerance_of(name.rpartition(".")[2]))
        for name in {**before, **after}
        if not _same(before.get(name), after.get(name))
    ]
    return sorted(found, key=lambda change: change.holds)


def _same(then: float | None, now: float | None) -> bool:
    return then == now or (then is not None and now is not None and math.isnan(then) and math.isnan(now))


def numbers(facts: Any, prefix: str = "") -> dict[str, float]:
    """Every number of a step's facts by its dotted name, a yes or no as 1 or 0."""
    if is_number(facts) or isinstance(facts, bool):
        return {prefix: float(facts)}
    inner = facts.items() if isinstance(facts, Mapping) else enumerate(facts) if isinstance(facts, list) else ()
    found: dict[str, float] = {}
    for name, value in inner:
        found |= numbers(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _reasons(was: StepThen, answer: Mapping[str, Any], inputs: set[str]) -> list[str]:
    """What of a step itself is known to be otherwise than it was."""
    found = [f"another {role} goes in" for role in sorted(inputs)]
    settings = settings_of(answer["seed"], answer["config"])
    for name in sorted(set(settings) & set(was.settings)):
        if settings[name] != was.settings[name]:
            found.append(f"{name} was {was.settings[name]}, and the recipe that was kept says {settings[name]}")
    if not answer["code"].startswith(was.settings.get("code", "")):  # runs write down its first digits
        found.append("the code behind the step is not that of the commit")
    return found


def _surrounding_reasons(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    found = []
    if "libraries" in then and then["libraries"] != now["libraries"]:
        before, after = (dict(one.rsplit(" ", 1) for one in side["libraries"].split(", ")) for side in (then, now))
        found += [
            f"{name} was {before.get(name, 'not there')}, and is {after.get(name, 'not there')}"
            for name in {**before, **after}
            if before.get(name) != after.get(name)
        ]
    words = {"processor": "the processor", "architecture": "the processor's kind", "gpus": "the GPU"}
    for name, what in words.items():
        if name in then and then[name] != now[name]:
            found.append(f"{what} was {then[name]}, and is {now[name]}")
    if "threads" in then and then["threads"] != now["threads"]:
        found.append(f"there were {then['threads']} threads, and are {now['threads']}")
    return found


def judged(then: Original, steps: list[StepNow]) -> Result:
    """The verdict over all steps."""
    broken = problems(then)
    first = next((step for step in steps if step.verdict in (CLOSE, DIFFERS)), None)
    missing = [step.name for step in steps if step.verdict == UNKNOWN]
    unclean = "" if then.clean else ", although the work tree was not clean then"
    if first is None and not broken and not missing:
        return Result(then, steps, True, f"equal: every byte of {len(steps)} steps{unclean}")
    if first is None and broken:
        return Result(then, steps, False, f"differs: what comes out is what was written down, but {broken[0]}")
    if first is None:
        return Result(then, steps, False, f"cannot be told: nothing was written down of {', '.join(missing)}")
    where = difference(first)
    if first.elsewhere and not broken and all(step.verdict != DIFFERS for step in steps):
        return Result(then, steps, True, f"equal within tolerances{unclean}; first in {where}")
    unclean = "" if then.clean else "; the work tree was not clean then"
    return Result(then, steps, False, f"differs, first in {where}{unclean}")


def difference(step: StepNow) -> str:
    """The first difference of a step, in words: its file and its number, with both values."""
    parts = []
    for name, before, after in step.files[:1]:
        parts.append(f"{name} (sha256 {before[:12] or 'none'} then, {after[:12] or 'none'} now)")
    parts += [str(change) for change in step.changes[:1]]
    return f"{step.name}: " + "; ".join(parts or [f"{MANIFEST}'s facts that are no numbers"])
