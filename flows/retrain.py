"""Retraining on one page: is there anything new? If so, the pipeline; then a new champion, or the old one, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.states import Completed
from rich.console import Console
from rich.markup import escape

from flows.train import PLAIN, run_steps
from steps import batches, locks, registry, tracking
from steps.config import Recipe
from steps.errors import EnvironmentProblem
from steps.experiment import Experiment
from steps.paths import Var, project_root
from steps.retraining import Decision, Drift, decide, drift_since, recipe_digest
from steps.versions import DataVersion

PROMOTED, KEPT_BACK = "prefloop.model.promoted", "prefloop.model.kept-back"
BETWEEN = 15  # seconds between two looks at data that somebody works on


@dataclass(frozen=True)
class Retrained:
    """What a retraining came to.

    Attributes:
        model: address of the version that was registered; empty where nothing was trained.
        promoted: whether it is the champion now.
        reasons: the gate's, each condition with the figures it was held against.
        drift: in one line; empty where there was nothing to compare.
    """

    decision: Decision
    model: str = ""
    promoted: bool = False
    reasons: tuple[str, ...] = ()
    drift: str = ""

    def in_words(self) -> str:
        """One line, for whoever looks at the flow's state."""
        if not self.model:
            return self.decision.because
        champion = self.decision.champion
        if champion is not None and champion.uri == self.model:
            return f"{self.model} came out again, and is the champion"
        if self.promoted:
            return f"promoted {self.model}"
        failed = "; ".join(reason.removeprefix("NO: ") for reason in self.reasons if reason.startswith("NO: "))
        kept = f"kept {champion.uri if champion else 'no champion'}; {self.model} did not pass"
        return f"{kept}: {failed or 'people took it down before'}"


def say(console: Console, how: str, line: str) -> None:
    """A line as the steps print theirs."""
    console.print(f"{'retrain':<9} [dim]{how:<8}[/]  {escape(line)}", soft_wrap=True)


def is_busy(task: Any, run: Any, state: Any) -> bool:
    """Somebody is adding data; whatever else is wrong would only repeat itself."""
    error = state.result(raise_on_failure=False)
    busy = isinstance(error, EnvironmentProblem) and error.what.startswith("another process")
    if busy:
        say(Console(highlight=False), "waits", f"{error.what}; tries again in {BETWEEN} s")
    return busy


PATIENT: dict[str, Any] = {"retries": 20, "retry_delay_seconds": BETWEEN, "retry_condition_fn": is_busy}


@task(name="look up", task_run_name="look up", **PATIENT, **PLAIN)
def look_up(recipe: Recipe, root: Path, new_recipe_counts: bool, force: bool) -> tuple[Decision, DataVersion]:
    """The champion's data against the data there are, after the stages have taken in what is new."""
    data, _ = batches.refresh(recipe.data.name, root)
    client = tracking.forwarder(Var(root)).client
    champion, tried = registry.champion(client, recipe.name), registry.versions_of(client, recipe.name)
    digest = recipe_digest(recipe)
    return decide(champion, tried, data, digest, new_recipe_counts=new_recipe_counts, force=force), data


@task(name="drift", task_run_name="drift", **PLAIN)
def report_drift(decision: Decision, data: DataVersion, root: Path) -> Drift | None:
    """The new data against those of the champion, as an artifact; None while there is no champion."""
    if decision.champion is None:
        return None
    found = drift_since(decision.champion, data, root)
    create_markdown_artifact(found.markdown(), key="drift", description=found.in_words())
    return found


@task(name="verdict", task_run_name="verdict", **PLAIN)
def tell(experiment: Experiment, decision: Decision, drift: str, model: str) -> Retrained:
    """What came of it, as an artifact and as an event that notifications can hang on."""
    champion = registry.champion(experiment.forwarder.client, experiment.recipe.name)
    reasons = tuple(experiment.outcomes["gate"].artifact.facts["reasons"])
    result = Retrained(decision, model, champion is not None and champion.uri == model, reasons, drift)
    lines = [f"# {experiment.recipe.name}", "", result.in_words(), "", f"Trained because: {decision.because}", ""]
    lines += [f"{drift}", ""] if drift else []
    lines += [f"- {reason}" for reason in reasons]
    create_markdown_artifact("\n".join(lines) + "\n", key="verdict", description=result.in_words())
    emit_event(
        PROMOTED if result.promoted else KEPT_BACK,
        resource={"prefect.resource.id": f"prefloop.model.{experiment.recipe.name}", "prefect.resource.name": model},
        payload={"model": model, "because": list(reasons), "trained because": decision.because},
    )
    return result


@flow(name="retrain", flow_run_name="{recipe.name}", persist_result=False)
def retrain(
    recipe: Recipe,
    force: bool = False,
    new_recipe_counts: bool = False,
    command: str = "",
    root: str | None = None,
) -> Any:
    """Train on the current data unless they were tried before, and promote what is better; returns a `Retrained`.

    Args:
        recipe: everything the experiment is made of.
        force: train although the data were tried before.
        new_recipe_counts: train also where only the recipe is new.
        command: how the recipe was given, for the messages that say how to repeat a step.
        root: the project; found from the working directory when not given.
    """
    where, console = Path(root) if root else project_root(), Console(highlight=False)
    turn, holder = f"retraining {recipe.name}", f"`retrain` of {command or recipe.name}"

    def waits(whom: str) -> None:
        say(console, "waits", whom)

    with locks.held(Var(where).folder("locks"), [turn], holder, waits):  # the next one then finds nothing new
        decision, data = look_up(recipe, where, new_recipe_counts, force)
        say(console, "trains" if decision.train else "rests", decision.because)
        if not decision.train:
            return Completed(message=decision.because, data=Retrained(decision))
        found = report_drift(decision, data, where)
        drift = found.in_words() if found else ""
        if drift:
            say(console, "drift", drift)
        tags = {
            "prefect.flow_run_id": str(runtime.flow_run.id),
            "prefloop.command": command,
            "prefloop.retrained_because": decision.because,
            "prefloop.drift": drift or "no champion to compare with",
        }
        experiment = Experiment(recipe, where, console, tags)
        result = tell(experiment, decision, drift, run_steps(experiment))
        say(console, "done", result.in_words())
        return Completed(message=result.in_words(), data=result)
