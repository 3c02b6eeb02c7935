"""The pipeline on one page: human preferences in; a tuned, judged, registered model out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from rich.console import Console

from flows.housekeeping import crash_dead_flows
from flows.own_server import keep_apart
from steps.config import Recipe
from steps.errors import StepKilled
from steps.experiment import Experiment
from steps.paths import project_root
from steps.ui import PAGES, mlflow_address

keep_apart()

# The store decides what is reused, by content; Prefect's cache would hand out results whose files are gone.
# One tag for all: Prefect asks its server for a slot per set of tags, which takes seconds for each new set.
PLAIN: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False, "tags": ["prefloop"]}


def was_killed(task: Any, run: Any, state: Any) -> bool:
    """A step whose process was killed goes on at its checkpoint; any other failure would only repeat itself."""
    return isinstance(state.result(raise_on_failure=False), StepKilled)


def model_step(name: str, purpose: str) -> Any:
    """A task that finds a step's artifact in the store, or makes it."""

    def run(experiment: Experiment) -> None:
        experiment.run(name)

    options = {"name": name, "task_run_name": name, "description": purpose, **PLAIN}
    return task(retries=1, retry_condition_fn=was_killed, **options)(run)


@task(name="data", retries=1, retry_delay_seconds=5, task_run_name="data", **PLAIN)
def prepare_data(experiment: Experiment) -> None:
    """Ingest, validate and split, as far as DVC finds something changed; and see whether that is enough."""
    experiment.prepare_data()
    experiment.check_data()


base = model_step("base", "the model everything stands on, as safetensors")
sft = model_step("sft", "imitate demonstrations")
baseline = model_step("baseline", "what every policy is compared with: the start's answers to held-out prompts")
reward = model_step("reward", "learn what people prefer")
policy = model_step("policy", "make it likelier")
evaluate = model_step("evaluate", "win rate on held-out prompts, by a judge that trained nothing")
gate = model_step("gate", "promote, or keep the champion")


@task(name="registry", task_run_name="registry", **PLAIN)
def register(experiment: Experiment) -> str:
    """A model version, with the alias the gate's verdict gives it; then the report, in words, numbers and a link."""
    model = experiment.register().uri
    create_markdown_artifact(experiment.finish(model), key="report", description=model)
    numbers = [{"metric": name, "value": value} for name, value in experiment.metrics().items()]
    create_table_artifact(numbers, key="metrics", description=model)
    pages = mlflow_address(experiment.var) + PAGES["mlflow"]
    create_link_artifact(pages, key="mlflow", link_text=f"MLflow: {experiment.recipe.name}")
    return model


def run_steps(experiment: Experiment) -> str:
    """The pipeline; returns the model version's address."""
    crash_dead_flows(experiment.var, experiment.forwarder)
    experiment.send_what_waits()
    prepare_data(experiment)
    for step in (base, sft, baseline, reward, policy, evaluate, gate):
        if step.name in experiment.recipe.steps:
            step(experiment)
    return register(experiment)


@flow(name="train", flow_run_name="{recipe.name}", persist_result=False)
def train(recipe: Recipe, command: str = "", root: str | None = None) -> str:
    """Tune a language model on human preferences and say whether it helped; returns the model version's address.

    Args:
        recipe: everything the experiment is made of.
        command: how the recipe was given, for the messages that say how to repeat a step.
        root: the project; found from the working directory when not given.
    """
    tags = {"prefect.flow_run_id": str(runtime.flow_run.id), "prefloop.command": command}
    return run_steps(Experiment(recipe, Path(root) if root else project_root(), Console(highlight=False), tags))
