"""A comparison being run: one parent in MLflow, a run below it for each variant, and what they come to together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steps import comparison, tracking
from steps.artifact import COMPLETIONS
from steps.comparison import Group, Variant
from steps.comparison_page import comparison_page, draw_frontier, number
from steps.config import Recipe
from steps.errors import Interrupted, PrefloopError
from steps.experiment import Experiment, flat, new_folder
from steps.launch import launcher
from steps.paths import Var
from steps.versions import DataVersion

STEPS = Recipe.STEPS[: Recipe.STEPS.index("gate")]
RECORDED = ("kl", "gold", "win_rate", "accuracy", "chosen", "rejected")  # of a group, as metrics


SPELLED = {"β=": "beta ", "λ=": "lambda ", "n=": "n ", ":": " ", "+": " and "}  # what MLflow allows no name to hold


def metric_name(group: Group) -> str:
    """What a group's metrics are called."""
    name = f"{group.method}/{group.setting or 'plain'}"
    for sign, words in SPELLED.items():
        name = name.replace(sign, words)
    return name


class ComparisonRun:
    """Variants of a recipe, run one after the other; steps they share are found in the store.

    Args:
        tags: what the orchestrator wants written down.

    Attributes:
        data: the version all variants learn from, once the first has prepared it.
        rows: what each run came to, as `steps.comparison.rows_of` has it.
        said: the result in sentences, once it is finished.
    """

    def __init__(
        self, recipe: Recipe, planned: Sequence[Variant], root: Path, console: Console, tags: Mapping[str, str]
    ) -> None:
        self.recipe, self.planned, self.root, self.console, self.tags = recipe, planned, root, console, tags
        self.var = Var(root)
        self.folder = new_folder(self.var, f"{recipe.name}-compared")
        self.forwarder = tracking.forwarder(self.var)
        self.data: DataVersion | None = None
        self.launch = launcher(recipe.launch)  # one for all: what its worker has imported serves every variant
        self.rows: list[dict[str, Any]] = []
        self.errors: list[tuple[str, str]] = []
        self.verdicts: dict[tuple[str, str, int], Any] = {}
        self.said: list[str] = []
        start = {"name": self.folder.name, "experiment": recipe.name, "parent": None, "tags": dict(tags)}
        tracking.append(self.folder, "start", **start)
        tracking.append(self.folder, "params", values=flat(recipe.used()))
        self.forwarder.forward(self.folder)

    def run(self, variant: Variant) -> None:
        """Run a variant up to its evaluation; a failure is noted, for the others may still succeed.

        Raises:
            Interrupted: a second start finds all that was finished.
        """
        place = f"{self.planned.index(variant) + 1} of {len(self.planned)}"
        self.console.rule(f"[dim]{place}[/] {escape(variant.name)}", align="left", style="dim")
        tags = {**self.tags, "prefloop.variant": variant.name}
        experiment = Experiment(variant.recipe, self.root, self.console, tags, self.folder, meets_champion=False)
        experiment.launch = self.launch
        try:
            self.data = experiment.prepare_data(self.data)  # the same version under every variant
            for step in STEPS:
                experiment.run(step)
        except Interrupted:
            self._close("KILLED")
            raise
        except PrefloopError as error:
            self.rows.append(comparison.failed(variant, error.what))
            self.errors.append((variant.name, error.what))
            self.console.print(f"[red]failed[/] {escape(str(error))}")
            return
        rows = comparison.rows_of(variant, {step: made.artifact for step, made in experiment.outcomes.items()})
        self.rows += rows
        if (judged := comparison.judged(variant)) in {row["setting"] for row in rows}:
            completions = experiment.outcomes["evaluate"].artifact.path / COMPLETIONS
            self.verdicts[variant.method, judged, variant.seed] = comparison.verdicts_in(completions)
        experiment.close()

    def finish(self) -> Path:
        """Write the table, the pictures and the page, and send them; the page's place."""
        groups = comparison.groups(self.rows, self.verdicts)
        self.said = comparison.in_words(groups)
        (self.folder / "rows.json").write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
        picture = draw_frontier(groups, self.folder / "frontier.png")
        page = self.folder / "report.html"
        title = f"{self.recipe.name}: {', '.join(dict.fromkeys(variant.method for variant in self.planned))}"
        page.write_text(comparison_page(title, groups, self.said, self.errors, picture), encoding="utf-8")
        for file in ("rows.json", "frontier.png", "report.html"):
            tracking.append(self.folder, "artifact", path=file)
        for group in groups:
            name = metric_name(group)
            values = {f"{name}/{what}": getattr(group, what) for what in RECORDED}
            known = {what: value for what, value in values.items() if math.isfinite(value)}
            tracking.append(self.folder, "metrics", step=0, values=known)
        self._close("FINISHED")
        self._print(groups)
        return page

    def table(self) -> list[dict[str, Any]]:
        """The rows for an orchestrator's page."""
        return [{name: value for name, value in row.items() if value is not None} for row in self.rows]

    def _close(self, status: str) -> None:
        tracking.append(self.folder, "end", status=status)
        self.forwarder.forward(self.folder)

    def _print(self, groups: Sequence[Group]) -> None:
        table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim")
        table.add_column("method", min_width=18)
        for title in ("seeds", "KL", "gold", "win rate [95 %]", "pairs", "chosen", "CPU s", "MiB"):
            table.add_column(title, justify="right", no_wrap=True)
        for group in sorted(groups, key=lambda group: (group.method, group.kl)):
            rate = number(group.win_rate, ".3f")
            if group.win_rate_low is not None:
                rate += f" [{group.win_rate_low:.2f}, {group.win_rate_high:.2f}]"
            table.add_row(
                f"{group.method} {group.setting}",
                f"{group.seeds - group.failures} of {group.seeds}" if group.failures else f"{group.seeds}",
                number(group.kl, ".1f"),
                number(group.gold, "+.2f"),
                escape(rate),
                number(group.accuracy, ".2f"),
                number(group.chosen, "+.1f"),
                number(group.tuning, ".0f"),
                number(group.peak_mib, ".0f"),
            )
        self.console.print()
        self.console.print(table)
        for sentence in self.said:
            self.console.print(f"• {escape(sentence)}")
        self.console.print(f"[dim]page[/]  {self.folder / 'report.html'}", soft_wrap=True)
