"""`prefloop gc`: dead runs closed, forgotten work and unneeded artifacts cleared away. Looks first; `--yes` does it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from flows.command import environment

if TYPE_CHECKING:
    from rich.console import Console

    from steps.housekeeping import Finding, Survey
    from steps.paths import Var
    from steps.tracking import Forwarder

SETTLED = "prefect.state"  # tag of a dead run: what Prefect says of its flow run since


def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, only say what would be done.")] = False,
    older_than: Annotated[
        float, typer.Option("--older-than", min=0, metavar="DAYS", help="What was used since then is kept.")
    ] = 7.0,
    keep: Annotated[
        int, typer.Option("--keep", min=0, metavar="N", help="A model's newest versions that keep all they came from.")
    ] = 1,
) -> None:
    """Close dead runs; clear away forgotten work, and artifacts nothing needs. Looks first; --yes does it."""
    from rich.console import Console

    from steps import housekeeping
    from steps.dead_runs import dead_flows
    from steps.paths import Var
    from steps.tracking import forwarder

    var, console = Var(), Console(highlight=False)
    sender = forwarder(var)
    found = housekeeping.survey(var, sender, older_than, keep)
    zombies = dead_flows(var, SETTLED)
    if not yes:
        _print(console, found, [(finding, finding.would) for finding in found.findings], list(zombies))
        return
    done = housekeeping.clean(found, var, sender)
    _print(console, found, done, [], done=True)
    if zombies:
        console.print("asking Prefect …", style="dim")
        for said in crash_zombies(var, sender, zombies):
            console.print(said, soft_wrap=True)


def crash_dead_flows(var: Var, sender: Forwarder) -> None:
    """Tell Prefect, from within a flow, of earlier ones whose process is gone."""
    from steps.dead_runs import dead_flows

    if zombies := dead_flows(var, SETTLED):
        crash_zombies(var, sender, zombies)


def crash_zombies(var: Var, sender: Forwarder, zombies: dict[str, list[Path]], client: Any = None) -> list[str]:
    """Tell Prefect of flow runs whose process is gone; what came of each, in words.

    Args:
        zombies: Prefect's flow run ids → folders of their runs (`steps.dead_runs.dead_flows`).
        client: Prefect's synchronous client; of the server in use, or one started for this, when not given.
    """
    if client is None:
        environment(var)
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            return crash_zombies(var, sender, zombies, client)
    return [_crash(flow, folders, client, sender) for flow, folders in zombies.items()]


def _crash(flow: str, folders: list[Path], client: Any, sender: Forwarder) -> str:
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    from steps.tracking import append

    try:
        state = client.read_flow_run(UUID(flow)).state
        if state is not None and not state.is_final():
            said: Any = Crashed(message="Its process was gone; found by prefloop's housekeeping.")
            state = client.set_flow_run_state(UUID(flow), said, force=True).state or said
        name = state.name if state else "no state"
    except ObjectNotFound:
        name = "unknown"
    except Exception as error:  # of the way to the server; the next gc asks again
        return f"Prefect's flow run {flow} cannot be asked for: {type(error).__name__}: {error}"
    for folder in folders:
        append(folder, "tags", values={SETTLED: name})
        sender.forward(folder)
    return f"Prefect's flow run {flow}, of {folders[0].name}: {name}"


def _print(
    console: Console, found: Survey, rows: list[tuple[Finding, str]], zombies: list[str], done: bool = False
) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("in var/", overflow="fold", min_width=38)
    table.add_column("" if done else "would")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("age", justify="right", no_wrap=True)
    table.add_column("because", overflow="fold")
    styles = {"keep": "dim", "look": "yellow"}
    order = {"close": 0, "remove": 1, "keep": 2, "look": 3}
    for finding, what in sorted(rows, key=lambda row: order[row[0].would]):
        cells = (finding.what, what, _size(finding.size), _age(finding.age), finding.why)
        table.add_row(*(escape(cell) for cell in cells), style=styles.get(finding.would))
    for flow in zombies:
        table.add_row(f"Prefect flow run {flow[:8]}", "close", "", "", "its process is gone")
    if table.row_count:
        console.print(table)
        console.print()
    for line in _summary(found, rows, bool(zombies), done):
        console.print(escape(line), soft_wrap=True)


def _summary(found: Survey, rows: list[tuple[Finding, str]], zombies: bool, done: bool) -> list[str]:
    removed = [one for one, what in rows if what in ("remove", "removed")]
    closed = [one for one, what in rows if what in ("close", "closed")]
    freed = _size(sum(one.size for one in removed)) or "0 B"
    words = ("removed", "closed") if done else ("to remove", "to close")
    lines = [f"{words[0]}: {len(removed)}, {freed}; {words[1]}: {len(closed)}"]
    if found.problem:
        lines.append(f"finished artifacts were left alone, for a registry cannot be asked ({found.problem})")
    elif found.needed:
        lines.append(f"kept: {len(found.needed)} finished artifacts, {_size(found.needed_bytes)}")
        reasons = Counter(found.needed.values())
        lines += [f"  {count:>3} for {why}" for why, count in reasons.most_common(8)]
    if any(finding.would == "look" for finding in found.findings):
        lines.append(
            "what is broken or a link is left for you to look at" + (" (`prefloop gc` shows it)" if done else "")
        )
    lines.append("runs and models in MLflow, reports in var/runs, data and paid verdicts are never removed")
    if not done and (removed or closed or zombies):
        lines.append("nothing was done; `prefloop gc --yes` does it")
    return lines


def _size(count: int) -> str:
    if not count:
        return ""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}" if seconds >= 10 * length else f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def mount(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(gc)
