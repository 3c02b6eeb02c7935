"""What a person sees while a step works: one bar with loss, accuracy and time left, or plain lines in a log file."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOWN = {
    "loss": "loss",
    "mean_token_accuracy": "accuracy",
    "rewards/accuracies": "accuracy",  # where there are both, of pairs and not of tokens
    "eval_rewards/accuracies": "held-out",
}


def _summary(values: dict[str, float]) -> str:
    parts = {label: values[name] for name, label in SHOWN.items() if name in values}
    return "  ".join(f"{label} {value:.3f}" for label, value in parts.items())


def read_progress(folder: Path) -> dict | None:
    """The last state a working step left in its directory."""
    try:
        return json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextmanager
def watch(
    step: str, folder: Path, console: Console, each: Callable[[], object] = lambda: None, period: float = 0.25
) -> Iterator[None]:
    """Show the progress a step writes into `folder` while the body runs.

    Args:
        each: called every second or so from the watching thread, such as to forward metrics.
        period: seconds between two looks.
    """
    stop = threading.Event()
    show = _bar if console.is_terminal else _lines
    looker = threading.Thread(target=show, args=(step, folder, console, stop, each, period), daemon=True)
    looker.start()
    try:
        yield
    finally:
        stop.set()
        looker.join()


def _bar(step, folder, console, stop, each, period) -> None:
    wide = console.width >= 96
    columns = (
        TextColumn("{task.fields[step]:<9}"),
        TextColumn("[dim]{task.description:<10}"),
        BarColumn(bar_width=20 if wide else 6),
        TextColumn("{task.completed:>4.0f}/{task.total:<4.0f}"),
        *([TimeElapsedColumn()] if wide else []),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=1, step=step, values="")
        phase, last = "", 0.0
        while True:
            ended = stop.wait(period)
            if state := read_progress(folder):
                if state["phase"] != phase:
                    phase = state["phase"]
                    progress.reset(task, total=state["total"], description=phase)
                progress.update(task, completed=state["done"], total=state["total"], values=_summary(state["values"]))
            if ended:
                return
            if time.monotonic() - last > 1:
                each()
                last = time.monotonic()


def _lines(step, folder, console, stop, each, period, between: float = 15.0) -> None:
    """A line for every phase, and now and then one for how far it is, unless that would repeat the last."""
    told, said, last = ("", 0), time.monotonic(), 0.0
    while not stop.wait(period):
        if state := read_progress(folder):
            reached = (state["phase"], state["done"])
            if reached[0] != told[0] or (reached != told and time.monotonic() - said > between):
                told, said = reached, time.monotonic()
                text = f"{step}: {told[0]} {told[1]}/{state['total']}  {_summary(state['values'])}"
                console.print(text.rstrip(), highlight=False)
        if time.monotonic() - last > 1:
            each()
            last = time.monotonic()
