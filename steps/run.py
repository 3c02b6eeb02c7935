"""Running a step: reuse what is there, resume what was begun, keep what is finished.

The store is content-addressed. A step's key is a sha256 over its configuration, its inputs' bytes, its seed, its
code and the libraries beneath it, never over paths or times. Work happens in `<step>-<key>.partial`; the manifest is
written last and the directory renamed, so that whatever carries a final name is whole.
"""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from steps import code, config, usage
from steps.artifact import MANIFEST, Artifact, Facts, digest_json, open_artifact, seal, verify
from steps.errors import PrefloopError, StepFailed
from steps.usage import Usage

PARTIAL = ".partial"
ALARMS = "alarms.json"
KEY_LENGTH = 16


@dataclass(frozen=True)
class Input:
    """Something a step reads: where it is now, and the digest of what it holds."""

    path: Path
    digest: str


@dataclass(frozen=True)
class StepSpec:
    """One step, fully said: on one kind of processor, the same spec means the same artifact.

    Attributes:
        step: its name, such as `reward`.
        function: `module:function` that does the work.
        config: the recipe's sections the function takes, as plain JSON values by argument name.
        inputs: what it reads, by argument name.
        seed: for every random choice it makes.
    """

    step: str
    function: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Input]
    seed: int

    @property
    def key(self) -> str:
        content = {
            "step": self.step,
            "config": {name: config.keyed(name, value) for name, value in self.config.items()},
            "inputs": {name: given.digest for name, given in self.inputs.items()},
            "seed": self.seed,
            "code": code.code_digest(self.function.partition(":")[0]),
            "libraries": code.library_versions(),
        }
        return digest_json(content)[:KEY_LENGTH]

    @property
    def name(self) -> str:
        return f"{self.step}-{self.key}"

    def to_json(self) -> dict[str, Any]:
        inputs = {name: {"path": str(given.path), "digest": given.digest} for name, given in self.inputs.items()}
        return {
            "step": self.step,
            "function": self.function,
            "config": dict(self.config),
            "inputs": inputs,
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> StepSpec:
        inputs = {name: Input(Path(given["path"]), given["digest"]) for name, given in record["inputs"].items()}
        return cls(record["step"], record["function"], record["config"], inputs, record["seed"])


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    artifact: Artifact
    reused: bool
    resumed: bool = False
    seconds: float = 0.0


@dataclass
class Store:
    """The directory that holds finished artifacts and work in progress."""

    path: Path
    locks: Path = field(init=False)

    def __post_init__(self) -> None:
        self.locks = self.path / ".locks"
        self.locks.mkdir(parents=True, exist_ok=True)

    def find(self, spec: StepSpec) -> Artifact | None:
        """The artifact of a spec, or None when it has yet to be made."""
        return open_artifact(self.path / spec.name)

    def partial(self, spec: StepSpec) -> Path:
        return self.path / (spec.name + PARTIAL)

    def lock(self, spec: StepSpec) -> FileLock:
        """Held while a step runs; the system lets go of it when its holder dies."""
        return self.lock_of(spec.name)

    def lock_of(self, name: str, timeout: float = -1) -> FileLock:
        """The lock of the step with that name; without end, or `timeout` seconds, others are waited for."""
        return FileLock(self.locks / f"{name}.lock", timeout=timeout)

    def forget(self, spec: StepSpec) -> None:
        """Drop a finished artifact and any work towards it."""
        for folder in (self.path / spec.name, self.partial(spec)):
            shutil.rmtree(folder, ignore_errors=True)


# Runs the step whose spec lies in a partial directory, and returns when its facts lie there too.
Launcher = Callable[[Path], None]


def execute(partial: Path) -> None:
    """Do a step's work, here, in this process.

    Args:
        partial: holds `spec.json`; the function's output goes beside it, its facts into `facts.json`, and what it
            used into `usage.json`.
    """
    before = Usage.so_far()
    try:
        _execute(partial)
    finally:
        usage.add(partial, Usage.so_far().since(before))


def _execute(partial: Path) -> None:
    from steps import charts
    from steps.tracking import Spool

    spec = StepSpec.from_json(json.loads((partial / "spec.json").read_text(encoding="utf-8")))
    module, _, name = spec.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    sections = {name: config.section(name, value) for name, value in spec.config.items()}
    tracker = Spool(partial, sections.pop("alarms", None))  # no step looks for alarms itself
    inputs = {name: given.path for name, given in spec.inputs.items()}
    facts: Facts = function(**sections, **inputs, seed=spec.seed, out=partial, tracker=tracker)
    if alarms := tracker.watch.facts():
        facts["alarms"] = alarms
        # As a file of the artifact, for the gate's key is made of its inputs' files.
        (partial / ALARMS).write_text(json.dumps(alarms, indent=1), encoding="utf-8")
    (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
    charts.draw(partial, spec.step, inputs, facts)


def run_step(
    spec: StepSpec,
    store: Store,
    launch: Launcher = execute,
    on_start: Callable[[Path, bool], None] = lambda partial, resumed: None,
) -> Outcome:
    """The artifact of a spec: found in the store, or made now.

    A second caller of the same spec waits for the first and gets its artifact. A step that was killed is taken up in
    its partial directory, where it finds its own checkpoints.

    Args:
        launch: how the work is run.
        on_start: told the working directory, and whether work was already in it, before the work begins.

    Raises:
        PrefloopError: the step failed; its partial directory is kept.
    """
    with store.lock(spec):
        if found := store.find(spec):
            verify(found)
            with suppress(OSError):
                (found.path / MANIFEST).touch()  # in use again: housekeeping leaves it
            return Outcome(found, reused=True)
        partial = store.partial(spec)
        resumed = partial.is_dir()
        partial.mkdir(exist_ok=True)
        (partial / "spec.json").write_text(json.dumps(spec.to_json(), indent=1), encoding="utf-8")
        spent = _read_seconds(partial / "seconds.json") or 0.0
        started = time.monotonic()
        on_start(partial, resumed)
        try:
            launch(partial)
        finally:
            seconds = time.monotonic() - started
            if partial.is_dir():
                (partial / "seconds.json").write_text(json.dumps(spent + seconds), encoding="utf-8")
        facts = _take(partial / "facts.json", spec)
        (partial / "seconds.json").unlink()
        used = usage.read(partial)
        (partial / usage.USAGE).unlink(missing_ok=True)
        shutil.rmtree(partial / "checkpoints", ignore_errors=True)
        inputs = {name: given.digest for name, given in spec.inputs.items()}
        artifact = seal(partial, spec.step, spec.key, inputs, facts, spent + seconds, used)
        final = store.path / spec.name
        partial.rename(final)
        whole = open_artifact(final)
        if whole is None or whole.digest != artifact.digest:
            raise StepFailed(f"the {spec.step} step's artifact vanished while it was stored", where=str(final))
        return Outcome(whole, reused=False, resumed=resumed, seconds=seconds)


def _read_seconds(path: Path) -> float | None:
    try:
        return float(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _take(path: Path, spec: StepSpec) -> Facts:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PrefloopError(
            f"the {spec.step} step ended without its facts", where=str(path.parent), have=str(error)
        ) from error
    path.unlink()
    return facts
