"""`prefloop collect`: the current model's answers, judged, become rows to learn from. Nothing heavy before its time."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.command import Assignments, RecipePath, as_given, environment


def collect(
    recipe: RecipePath,
    assignments: Assignments = None,
    dataset: Annotated[
        str | None, typer.Option(help="The dataset that grows; the recipe's if not given.", metavar="NAME")
    ] = None,
    judge: Annotated[str, typer.Option(help="gold, reward, llm, or file for people.", metavar="NAME")] = "gold",
    rounds: Annotated[int, typer.Option(help="Of the whole collection.")] = 1,
    labels: Annotated[
        int | None, typer.Option(help="Budget of the whole collection; what its rounds take if not given.")
    ] = None,
    per_prompt: Annotated[int, typer.Option(help="Answers drawn to each prompt.")] = 4,
    prompts: Annotated[int, typer.Option(help="Prompts of one round, at most.")] = 64,
    pairs: Annotated[
        str, typer.Option(help="on-policy: best against worst; off-policy: best against the data's answer; or both.")
    ] = "both",
    patience: Annotated[int, typer.Option(help="Rounds in a row without a new champion that end it.")] = 2,
) -> None:
    """Let a judge compare the current model's answers, learn from that, and again; the same command goes on."""
    from steps.collection import Collecting, check
    from steps.config import load
    from steps.paths import Var, project_root

    given = [*(assignments or ()), *([f"data.name={dataset}"] if dataset else ())]
    loaded, root = load(recipe, given), project_root()
    how = Collecting(
        judge=judge,
        rounds=rounds,
        labels=labels,
        per_prompt=per_prompt,
        prompts=prompts,
        pairs=pairs,
        patience=patience,
    )
    check(how)  # says what is wrong before anything starts
    environment(Var(root))
    from flows.collect import collect as collect_flow

    collect_flow(loaded, how, command=as_given(recipe, given), root=str(root))


def mount(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(collect)
