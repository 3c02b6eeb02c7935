"""Tags `step.NAME` of runs and of model versions: which artifact a step came to, and where its curves are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from steps.config import Recipe

STEP = "step."
_SAID = re.compile(r"^(?P<how>\w+) (?P<key>[^\s,]+), MLflow run (?P<run_id>.+)$")


@dataclass(frozen=True)
class StepTag:
    """What a run says of a step. A version's tag is the key alone.

    Attributes:
        key: of the artifact.
        run_id: the MLflow run that made it, or words where it had not been sent.
        reused: whether this run found it done.
    """

    key: str
    run_id: str
    reused: bool

    def __str__(self) -> str:
        return f"{'reused' if self.reused else 'run'} {self.key}, MLflow run {self.run_id}"


def step_tag(tags: Mapping[str, str], name: str) -> StepTag | None:
    """What a run's tags say of a step; None where they say nothing."""
    said = _SAID.match(tags.get(STEP + name, ""))
    return StepTag(said["key"], said["run_id"], said["how"] == "reused") if said else None


def step_names(tags: Iterable[str]) -> list[str]:
    """The steps that tags tell of, in the order of the pipeline, then what it does not know."""
    names = {tag.removeprefix(STEP) for tag in tags if tag.startswith(STEP)}
    return [name for name in Recipe.STEPS if name in names] + sorted(names - set(Recipe.STEPS))
