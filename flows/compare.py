"""Methods, strengths and seeds of one recipe side by side: one flow, what they share done once, one page at the end."""

from __future__ import annotations

from pathlib import Path

from prefect import flow, runtime, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from rich.console import Console

from flows.train import PLAIN
from steps.comparison import Variant, variants
from steps.comparison_run import ComparisonRun
from steps.config import Recipe
from steps.paths import project_root


@task(name="variant", task_run_name="{variant.name}", **PLAIN)
def run_variant(run: ComparisonRun, variant: Variant) -> None:
    """Every step up to the evaluation; a failure is noted, and the comparison goes on."""
    run.run(variant)


@task(name="report", task_run_name="report", **PLAIN)
def report(run: ComparisonRun) -> Path:
    """The table, the pictures and the page; also as artifacts of the flow."""
    page = run.finish()
    create_markdown_artifact("\n".join(f"- {said}" for said in run.said), key="comparison", description=str(page))
    create_table_artifact(run.table(), key="frontier", description=str(page))
    return page


@flow(name="compare", flow_run_name="{recipe.name}", persist_result=False)
def compare(
    recipe: Recipe, methods: list[str], betas: list[float], seeds: int, command: str = "", root: str | None = None
) -> str:
    """Run each method at each strength with each seed, and draw what that says; returns the page's place.

    Args:
        methods: names of `policy.method`.
        betas: weight of the distance to the start, which every method calls by another name.
        seeds: how many, counted from the recipe's.
        command: how the comparison was asked for.
        root: the project; found from the working directory when not given.
    """
    planned = variants(recipe, methods, betas, seeds)
    tags = {"prefect.flow_run_id": str(runtime.flow_run.id), "prefloop.command": command}
    run = ComparisonRun(recipe, planned, Path(root) if root else project_root(), Console(highlight=False), tags)
    for variant in planned:
        run_variant(run, variant)
    return str(report(run))
