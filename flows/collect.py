"""Online collection on one page: the model answers, a judge compares, pairs are new data, the model is retrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.events import emit_event
from prefect.states import Completed
from rich.console import Console

from flows.announce import LANDED, resource_of
from flows.retrain import PATIENT, retrain
from flows.train import PLAIN, was_killed
from steps import locks
from steps.collection import Collecting, Round, Stopped
from steps.collection_run import Begun, CollectionRun
from steps.config import Recipe
from steps.errors import Interrupted, PrefloopError
from steps.paths import Var, project_root


@task(name="look up", task_run_name="look up", **PATIENT, **PLAIN)
def look_up(run: CollectionRun) -> Stopped | None:
    """Data brought up to date; why the collection is at its end, or None when a round is due."""
    return run.look_up()


@task(name="sample", retries=1, retry_condition_fn=was_killed, task_run_name="sample, round {begun.number}", **PLAIN)
def sample(run: CollectionRun, begun: Begun) -> None:
    """Several answers of the current model to each of the round's prompts."""
    run.sample(begun)


@task(name="judge", retries=1, retry_condition_fn=was_killed, task_run_name="judge, round {begun.number}", **PLAIN)
def judge(run: CollectionRun, begun: Begun) -> str:
    """The judge's word on the answers, as a batch of pairs; what people have to do first, or nothing."""
    return run.judge(begun)


@task(name="add", task_run_name="add, round {begun.number}", **PLAIN)
def add(run: CollectionRun, begun: Begun) -> Round:
    """A new version of the data, ingested, validated and split, with the round's pairs."""
    found = run.add(begun)
    if found.rows:
        resource = {"prefect.resource.id": resource_of(run.name), "prefect.resource.name": run.name}
        emit_event(LANDED, resource=resource, payload={"collection": run.place.name, "rows": found.rows})
    return found


@task(name="report", task_run_name="report", **PLAIN)
def report(run: CollectionRun, why: str) -> None:
    """The rounds, on the terminal and as artifacts of the flow."""
    run.show(why)
    create_markdown_artifact(f"# {run.recipe.name}\n\n{why}\n", key="collection", description=why)
    if run.done:
        create_table_artifact(run.table(), key="rounds", description=run.place.name)


def one_round(run: CollectionRun, command: str) -> str:
    """The next round, or the one that was begun, to its end; what people have to do first, or nothing."""
    if run.begun() is None and run.model() is None:
        retrain(run.recipe, command=command, root=str(run.root))
    begun = run.begin()
    sample(run, begun)
    if waits := judge(run, begun):
        return waits
    found = add(run, begun)
    if found.rows:
        retrain(run.recipe, command=command, root=str(run.root))
    run.finish(begun, found)
    return ""


def rounds(run: CollectionRun, command: str) -> str:
    """Rounds until one of the ends is reached; which, in words."""
    while (why := look_up(run)) is None:
        if waits := one_round(run, command):
            return waits
    return run.ended(why)


@flow(name="collect", flow_run_name="{recipe.name}", persist_result=False)
def collect(recipe: Recipe, how: Collecting, command: str = "", root: str | None = None) -> Any:
    """Rounds of sampling the current model, judging, adding rows and retraining; returns why it ended.

    Args:
        recipe: what is retrained; its dataset is the one that grows.
        how: judge, rounds, budget and the like.
        command: how the recipe was given, for the messages that say how to repeat a step.
        root: the project; found from the working directory when not given.
    """
    where, console = Path(root) if root else project_root(), Console(highlight=False)
    tags = {"prefect.flow_run_id": str(runtime.flow_run.id), "prefloop.command": command}
    run = CollectionRun(recipe, how, where, console, tags)
    holder = f"`collect` of {command or recipe.name}"

    def waits(whom: str) -> None:
        console.print(f"collect   waits     {whom}", markup=False, soft_wrap=True)

    with locks.held(Var(where).folder("locks"), [f"collecting {recipe.name}"], holder, waits):
        run.catch_up()  # another one may have been at it
        try:
            why = rounds(run, command)
            report(run, why)
        except (Interrupted, KeyboardInterrupt):
            run.close("KILLED")
            raise
        except PrefloopError:
            run.close("FAILED")
            raise
        run.close("FINISHED", why)
    return Completed(message=why, data=why)
