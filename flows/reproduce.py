"""`prefloop reproduce`: a finished run once more, from its commit, data and recipe, held against what it left."""

from __future__ import annotations

import json
import signal
import sys
from typing import Annotated

import typer

SUBJECT = "models:/NAME@ALIAS, NAME/VERSION, a folder of var/runs, or an MLflow run id."


def reproduce(
    subject: Annotated[str, typer.Argument(help=SUBJECT, metavar="MODEL_OR_RUN")],
    steps: Annotated[
        str, typer.Option(help="Only these, with commas; what they need runs too.", metavar="STEP,…")
    ] = "",
    until: Annotated[str, typer.Option(help="Only up to this step.", metavar="STEP")] = "",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of a step; as many as then, when not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a run again beside the project and say whether the same comes out; status 1 when it does not."""
    from steps import reproduce as again
    from steps.data_report import console
    from steps.errors import Interrupted
    from steps.paths import Var, project_root
    from steps.recorded import original
    from steps.tracking import forwarder

    root, out = project_root(), console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    forward = forwarder(Var(root))
    with out.status("looking for what was written down"):
        then = original(subject, root, forward)
    names = [name.strip() for name in steps.split(",") if name.strip()]
    again.wanted_steps(then, names, until)
    if not as_json:
        _print_start(out, then)
    with out.status("") as status:

        def tell(said) -> None:
            if isinstance(said, str):
                status.update(said)
            elif not as_json:
                _print_step(out, said)

        try:
            result = again.reproduce(then, root, forward, names, until, threads, tell)
        except KeyboardInterrupt as stop:
            what = "stopped; nothing of it is left behind"
            raise Interrupted(what, then="the same command begins anew") from stop
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=1, ensure_ascii=False))
    else:
        _print_end(out, result)
    if not result.equal:
        raise typer.Exit(1)


def _print_start(out, then) -> None:
    from rich.markup import escape

    from steps.recorded import problems

    state = "" if then.clean else f"; the work tree was not clean, so the code is only near ({escape(then.state)})"
    out.print(f"{escape(then.subject)}  run {escape(then.run)}", soft_wrap=True)
    out.print(f"code {then.commit[:12]}{state}", soft_wrap=True)
    out.print(f"data {then.data} as dvc.lock has it at {then.revision[:12] or 'the work tree'}", soft_wrap=True)
    for problem in problems(then):
        out.print(f"[yellow]kept wrongly[/]  {escape(problem)}", soft_wrap=True)
    out.print()


def _print_step(out, step) -> None:
    from steps.sameness import EQUAL

    style = "green" if step.verdict == EQUAL else "yellow"
    took = "" if step.seconds_now is None else f"{step.seconds_now:8.1f} s"
    then = "" if step.seconds_then is None else f"  then {step.seconds_then:.1f} s"
    key = step.key_now if step.key_now == step.key_then else f"{step.key_now}, then {step.key_then or 'unknown'}"
    out.print(f"{step.name:<9} [{style}]{step.verdict:<16}[/] {took}  [dim]{key}{then}[/]", soft_wrap=True)


def _print_end(out, result) -> None:
    from rich.markup import escape

    from steps.sameness import EQUAL, UNKNOWN

    out.print()
    out.print(f"[{'green' if result.equal else 'red'}]{escape(result.verdict)}[/]", soft_wrap=True)
    first = result.first
    if first is None:
        return
    for reason in first.because or ["nothing that was written down explains it"]:
        out.print(f"  because  {escape(reason)}", soft_wrap=True)
    for step in result.steps:
        if step.verdict in (EQUAL, UNKNOWN):
            continue
        follows = f", follows {', '.join(step.follows)}" if step.follows else ""
        out.print(f"\n{step.name}: {len(step.files)} files, {len(step.changes)} numbers differ{follows}")
        for change in step.changes[:5]:
            out.print(f"  {escape(str(change))}", style="" if change.holds else "red", soft_wrap=True)


def mount(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(reproduce)
