"""The `prefloop` command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows import collection, housekeeping, lineage, models, reproduce, serve
from flows.blind import app as blind
from flows.command import Assignments, RecipePath, as_given, environment
from flows.data import app as data
from flows.palms import app as palms

app = typer.Typer(
    help="Human preferences into better language models, with proof of where each model came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data, name="data")
app.add_typer(blind, name="compare-blind")
app.add_typer(palms, name="palms")


def main() -> None:
    """Run the command line; a known error becomes a message and status 1."""
    from steps.errors import Interrupted, PrefloopError

    atexit.register(gc.freeze)  # else the interpreter searches a hundred libraries for garbage before it ends
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a request to stop, whoever makes it
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a terminal that is closed; `nohup` ignores it
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        app()
    except Interrupted as error:
        sys.exit(_complain(error, 130))
    except PrefloopError as error:
        sys.exit(_complain(error, 1))
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # what Typer makes of an interrupt
            raise
        again = shlex.join(["prefloop", *sys.argv[1:]])
        typer.echo(f"\nstopped; nothing is lost\n  next  `{again}` goes on at the newest checkpoint", err=True)
        sys.exit(130)
    except Exception as error:
        if (problem := _of_machine(error)) is None:
            raise
        sys.exit(_complain(problem, 1))


def _of_machine(error: BaseException) -> Exception | None:
    """What is wrong with the machine, where an error or one of its causes tells: a full disk, a server that is gone."""
    from steps.errors import EnvironmentProblem

    again = f"`{shlex.join(['prefloop', *sys.argv[1:]])}` again: what is finished is reused, what was begun goes on"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            where, then = str(cause.filename or Path.cwd()), f"free some space, then {again}"
            return EnvironmentProblem("the disk is full", where=where, have=str(cause), then=then)
        if type(cause).__module__.startswith(("httpx", "httpcore")) and _passed(cause, "prefect.client"):
            where = os.environ.get("PREFECT_API_URL", "the server this run had started")
            have = f"{type(cause).__name__}: {cause}"
            return EnvironmentProblem("the Prefect server is gone", where=where, have=have, then=again)
        cause = cause.__cause__ or cause.__context__
    return None


def _passed(error: BaseException, module: str) -> bool:
    """Whether an error came by way of a module."""
    frame = error.__traceback__
    while frame is not None and not frame.tb_frame.f_globals.get("__name__", "").startswith(module):
        frame = frame.tb_next
    return frame is not None


def _complain(error: Exception, status: int) -> int:
    typer.echo(f"\n{error}", err=True)
    return status


@app.command()
def run(
    recipe: RecipePath,
    assignments: Assignments = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be reused or run; run nothing.")] = False,
) -> None:
    """Run the whole pipeline: data, SFT, reward model, policy, evaluation, gate, registry."""
    from steps.config import load
    from steps.paths import Var, project_root

    loaded = load(recipe, assignments or ())
    root = project_root()
    if dry_run:
        _show_plan(loaded, root)
        return
    environment(Var(root))
    from flows.train import train

    command = as_given(recipe, assignments)
    train(recipe=loaded, command=command, root=str(root))


@app.command()
def compare(
    recipe: RecipePath,
    methods: Annotated[
        str, typer.Option(help="Names of policy.method, with commas; dpo@0.1 has a beta of its own.")
    ] = "dpo,ppo,best-of-n",
    betas: Annotated[
        str, typer.Option(help="How strongly policies are held to their start, with commas.")
    ] = "0.1,0.3,1",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting, with seeds from the recipe's on.")] = 1,
    assignments: Assignments = None,
) -> None:
    """Run several methods, strengths and seeds, and draw gold score against distance from the start."""
    from steps.comparison import strengths, variants
    from steps.config import load
    from steps.paths import Var, project_root

    loaded = load(recipe, assignments or ())
    usual, named = strengths(betas), [name.strip() for name in methods.split(",") if name.strip()]
    variants(loaded, named, usual, seeds)  # says what is wrong before anything starts
    root = project_root()
    environment(Var(root))
    from flows.compare import compare as compare_flow

    command = as_given(recipe, assignments)
    compare_flow(loaded, named, usual, seeds, command=command, root=str(root))


@app.command()
def step(
    name: Annotated[str, typer.Argument(help="base, sft, baseline, reward, policy, evaluate or gate.")],
    recipe: RecipePath,
    assignments: Assignments = None,
    force: Annotated[bool, typer.Option("--force", help="Run it again although its artifact is there.")] = False,
) -> None:
    """Run one step, and whatever of the steps before it is not there yet. No Prefect involved."""
    from rich.console import Console

    from steps.config import Recipe, load
    from steps.errors import RecipeError, did_you_mean
    from steps.experiment import Experiment
    from steps.paths import Var, project_root
    from steps.pipeline import before

    if name not in Recipe.STEPS:
        raise RecipeError(f"there is no step '{name}'", have=did_you_mean(name, Recipe.STEPS))
    root = project_root()
    environment(Var(root))
    command = as_given(recipe, assignments)
    loaded = load(recipe, assignments or ())
    experiment = Experiment(loaded, root, Console(highlight=False), {"prefloop.command": command})
    experiment.prepare_data()
    for earlier in Recipe.STEPS[: Recipe.STEPS.index(name)]:
        if earlier in before(name, loaded):
            experiment.run(earlier)
    experiment.run_one(name, again=force)


@app.command()
def check(recipe: RecipePath, assignments: Assignments = None) -> None:
    """Read a recipe and say everything that is wrong with it."""
    from steps import datasets, enough, pipeline
    from steps.base import locate
    from steps.config import load
    from steps.paths import project_root

    loaded = load(recipe, assignments or ())
    root = project_root()
    datasets.dataset(loaded.data.name, root)
    base = locate(loaded.model.base, loaded.model.revision, root)
    tables = {name: datasets.folder(loaded.data.name, root) / f"{name}.parquet" for name in pipeline.TABLES}
    if all(path.is_file() for path in tables.values()):
        enough.check(loaded, tables)
    typer.echo(f"{recipe} is a valid recipe: {loaded.policy.method} on '{loaded.data.name}' from {loaded.model.base}")
    typer.echo(f"  base model {base.digest[:16]}")


@app.command()
def ui() -> None:
    """Start the MLflow and Prefect servers on loopback; Ctrl-C stops both."""
    from steps import ui as servers
    from steps.paths import Var, project_root

    var = Var(project_root())
    typer.echo("starting two servers …")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    started = servers.start(var)
    try:
        for name, (address, _) in started.items():
            typer.echo(f"{name:<8} {address}{servers.PAGES[name]}")
        typer.echo("Ctrl-C stops both")
        while all(child.poll() is None for _, child in started.values()):
            signal.sigtimedwait({signal.SIGCHLD}, 1.0)
    except KeyboardInterrupt:
        pass
    finally:
        servers.stop(started, var)
        typer.echo("stopped")


@app.command()
def doctor() -> None:
    """Say what is missing or too old on this machine, and what to do about it."""
    from steps.doctor import examine

    findings = examine(Path.cwd())
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        typer.echo(f"{'ok ' if finding.fine else 'NO '} {finding.what:<{width}}  {finding.have}")
        if not finding.fine:
            typer.echo(f"    next: {finding.then}")
    bad = sum(not finding.fine for finding in findings)
    typer.echo("all is well" if not bad else f"{bad} of {len(findings)} checks need your attention")
    if bad:
        raise typer.Exit(1)


models.mount(app)
collection.mount(app)
lineage.mount(app)
reproduce.mount(app)
serve.mount(app)
housekeeping.mount(app)


def _show_plan(recipe, root: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from steps.experiment import Experiment

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("step", "would", "key", "because"):
        table.add_column(title)
    for plan in Experiment(recipe, root, console).plan():
        table.add_row(plan.step, plan.what, plan.key, plan.because)
    console.print(table)


if __name__ == "__main__":
    main()
