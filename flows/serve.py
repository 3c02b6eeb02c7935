"""`prefloop serve` and `prefloop retrain`: the loop that runs by a clock, when data land, or by hand."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flows.command import Assignments, RecipePath, as_given, environment

if TYPE_CHECKING:
    from prefect.automations import Automation
    from prefect.deployments.runner import RunnerDeployment

    from steps.config import Recipe
    from steps.paths import Var

NewRecipeCounts = Annotated[
    bool, typer.Option("--new-recipe-counts", help="Train also where the data were tried, but not with this recipe.")
]
ZOMBIES = "prefloop: flows whose process is gone"
MISSED = 3  # heartbeats a flow may miss


def retrain(
    recipe: RecipePath,
    assignments: Assignments = None,
    force: Annotated[bool, typer.Option("--force", help="Train although the data were tried before.")] = False,
    new_recipe_counts: NewRecipeCounts = False,
) -> None:
    """Train if the data are new, and promote the model if it is better than the champion."""
    from steps.config import load
    from steps.paths import Var, project_root

    loaded, root = load(recipe, assignments or ()), project_root()
    environment(Var(root))
    from flows.retrain import retrain as retrain_flow

    command = as_given(recipe, assignments)
    retrain_flow(loaded, force=force, new_recipe_counts=new_recipe_counts, command=command, root=str(root))


def serve(
    recipe: RecipePath,
    assignments: Assignments = None,
    cron: Annotated[str | None, typer.Option(help='When to look for new data, such as "0 3 * * 1".')] = None,
    interval: Annotated[float | None, typer.Option(min=1, help="Seconds between two looks.", metavar="SECONDS")] = None,
    rrule: Annotated[str | None, typer.Option(help='As iCalendar has it, such as "FREQ=WEEKLY;BYDAY=MO".')] = None,
    quiet: Annotated[
        float, typer.Option(min=10, help="Seconds without further data after which new data are trained on.")
    ] = 60,
    new_recipe_counts: NewRecipeCounts = False,
) -> None:
    """Retrain by a clock and when `prefloop data add` brought something; Ctrl-C ends it."""
    from steps.config import load
    from steps.paths import Var, project_root

    loaded, root = load(recipe, assignments or ()), project_root()
    environment(Var(root))
    schedule = {"cron": cron, "interval": interval, "rrule": rrule}
    with server(Var(root)) as address:
        from prefect.exceptions import TerminationSignal
        from prefect.runner import Runner

        parameters = {"new_recipe_counts": new_recipe_counts, "command": as_given(recipe, assignments)}
        runner = Runner()
        runner.add_deployment(deployment(loaded, root, schedule, quiet, parameters))
        keep(zombies())
        data = loaded.data.name
        typer.echo(f"retrain   {loaded.name}: {_when(schedule)}, and {quiet:g} s after data landed in '{data}'")
        typer.echo(f"prefect   {address}/deployments")
        typer.echo("Ctrl-C ends it; `prefloop retrain` does one by hand")
        with suppress(KeyboardInterrupt, TerminationSignal):
            asyncio.run(runner.start())


def _when(schedule: dict[str, Any]) -> str:
    chosen = [f"{name} {value}" for name, value in schedule.items() if value is not None]
    return chosen[0] if chosen else "by no clock"


@contextmanager
def server(var: Var) -> Iterator[str]:
    """The address of a Prefect server: the one that runs, or one that is started and ended with us."""
    from steps import ui

    if api := os.environ.get("PREFECT_API_URL"):
        yield api.removesuffix("/api")
        return
    typer.echo("starting two servers …")
    started = ui.start(var)
    try:
        for name, (address, _) in started.items():
            typer.echo(f"{name:<9} {address}{ui.PAGES[name]}")
        address = started["prefect"][0]
        os.environ["PREFECT_API_URL"] = f"{address}/api"
        yield address
    finally:
        ui.stop(started, var)
        typer.echo("stopped")


def deployment(
    recipe: Recipe, root: Path, schedule: dict[str, Any], quiet: float, parameters: dict[str, Any] | None = None
) -> RunnerDeployment:
    """The `retrain` flow with a recipe, as Prefect runs it: one at a time, others in line.

    Args:
        schedule: `cron`, `interval` (seconds) or `rrule`; at most one is given.
        quiet: seconds without further data after which new data start a run. Adding several files one after the other
            is one run: every arrival starts the wait anew.

    Raises:
        PrefloopError: a schedule that cannot be read, or more than one.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import EntrypointType
    from prefect.events import DeploymentEventTrigger
    from prefect.events.schemas.automations import Posture

    from flows.announce import LANDED, resource_of
    from flows.retrain import retrain as flow
    from steps.errors import PrefloopError

    given = {name: value for name, value in schedule.items() if value is not None}
    if len(given) > 1:
        raise PrefloopError("one schedule at a time", have=", ".join(f"--{name}" for name in given))
    trigger = DeploymentEventTrigger(
        name=f"prefloop: data landed in {recipe.data.name}, for {recipe.name}",
        posture=Posture.Proactive,  # fires when what is expected stays away
        after={LANDED},
        expect={LANDED},
        match={"prefect.resource.id": resource_of(recipe.data.name)},
        for_each={"prefect.resource.id"},  # without it Prefect waits from the start, and not from an arrival
        threshold=1,
        within=timedelta(seconds=quiet),
    )
    try:
        made = flow.to_deployment(
            recipe.name,
            parameters={"recipe": recipe.model_dump(mode="json"), "root": str(root), **(parameters or {})},
            triggers=[trigger],
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
            entrypoint_type=EntrypointType.MODULE_PATH,
            tags=["prefloop"],
            **given,
        )
        return cast("RunnerDeployment", made)  # a coroutine only where an event loop runs
    except ValueError as error:
        raise PrefloopError(
            "the schedule cannot be read",
            where=", ".join(f"--{name} {value}" for name, value in given.items()),
            have=str(error).splitlines()[0],
            then='for example --cron "0 3 * * 1", --interval 86400 or --rrule "FREQ=WEEKLY;BYDAY=MO"',
        ) from error


def read_recipe(path: str, assignments: tuple[str, ...] = ()) -> dict[str, Any]:
    """A step of `prefect.yaml`: the recipe as a deployment's parameter."""
    from steps.config import load

    return {"recipe": load(path, assignments).model_dump(mode="json")}


# -- automations -------------------------------------------------------------------------------------------------


def zombies() -> Automation:
    """Call a flow crashed whose process no longer gives a sign of life."""
    from prefect.automations import Automation
    from prefect.client.schemas.objects import StateType
    from prefect.events import EventTrigger
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import Posture
    from prefect.settings import get_current_settings

    beat = get_current_settings().flows.heartbeat_frequency or 30
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    return Automation(
        name=ZOMBIES,
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ends},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=MISSED * beat),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name="Crashed",
                force=False,
                message=f"no sign of life for {MISSED * beat} s: its process is gone. Run it again: finished steps are "
                "reused, and the one that was under way goes on at its newest checkpoint",
            )
        ],
    )


def keep(automation: Automation) -> None:
    """Create an automation, or bring the one of its name up to date."""
    from prefect.automations import Automation

    try:
        automation.id = cast("Automation", Automation.read(name=automation.name)).id
    except ValueError:
        automation.create()
    else:
        automation.update()


def mount(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (retrain, serve):
        app.command()(command)
