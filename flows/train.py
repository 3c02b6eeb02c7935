"""The pipeline on one page: human preferences in; a tuned, judged, registered model out."""

from __future__ import annotations

from pathlib import Path

from prefect import flow, runtime, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from rich.console import Console

from steps.config import Recipe
from steps.errors import StepKilled
from steps.experiment import Experiment
from steps.paths import project_root
from steps.registry import Version
from steps.run import Outcome
from steps.ui import mlflow_address

# The store decides what is reused, by content; Prefect's cache would hand out results whose files are gone.
plain = {"cache_policy": NO_CACHE, "persist_result": False}


def was_killed(task, task_run, state) -> bool:
    """A step whose process was killed goes on at its checkpoint; any other failure would only repeat itself."""
    return isinstance(state.result(raise_on_failure=False), StepKilled)


@task(
    name="data", tags=["dvc"], retries=1, retry_delay_seconds=5, task_run_name="{experiment.recipe.data.name}", **plain
)
def prepare_data(experiment: Experiment) -> None:
    """Ingest, validate and split, as far as DVC finds something changed."""
    experiment.prepare_data()


@task(tags=["model"], retries=1, retry_condition_fn=was_killed, task_run_name="{name}", **plain)
def step(experiment: Experiment, name: str) -> Outcome:
    """One model step: found in the store, or run."""
    return experiment.run(name)


@task(tags=["registry"], **plain)
def register(experiment: Experiment) -> Version:
    """A model version, with the alias the gate's verdict gives it."""
    return experiment.register()


@task(tags=["report"], **plain)
def report(experiment: Experiment, version: Version) -> None:
    """The run in words, numbers and a link, here and in the terminal."""
    create_markdown_artifact(experiment.finish(version), key="report", description=version.uri)
    numbers = [{"metric": name, "value": value} for name, value in experiment.metrics().items()]
    create_table_artifact(numbers, key="metrics", description=version.uri)
    create_link_artifact(mlflow_address(experiment.var), key="mlflow", link_text=f"MLflow: {experiment.recipe.name}")


@flow(name="train", flow_run_name="{recipe.name}", **{k: v for k, v in plain.items() if k == "persist_result"})
def train(recipe: Recipe, command: str = "", root: str | None = None) -> str:
    """Tune a language model on human preferences, and say whether it helped.

    Args:
        recipe: everything the experiment is made of.
        command: how the recipe was given on the command line, for the messages that say how to repeat a step.
        root: the project; found from the working directory when not given.

    Returns:
        the address of the registered model version.
    """
    tags = {"prefect.flow_run_id": str(runtime.flow_run.id), "prefloop.command": command}
    experiment = Experiment(recipe, Path(root) if root else project_root(), Console(highlight=False), tags)
    experiment.send_what_waits()

    prepare_data(experiment)
    step.with_options(name="base")(experiment, "base")  # the model everything stands on, as safetensors
    step.with_options(name="sft")(experiment, "sft")  # imitate demonstrations
    step.with_options(name="reward")(experiment, "reward")  # learn what people prefer
    step.with_options(name=f"policy: {recipe.policy.method}")(experiment, "policy")  # make it likelier
    step.with_options(name="evaluate")(experiment, "evaluate")  # win rate on held-out prompts, by a judge of its own
    step.with_options(name="gate")(experiment, "gate")  # promote, or keep the champion
    version = register(experiment)
    report(experiment, version)
    return version.uri
