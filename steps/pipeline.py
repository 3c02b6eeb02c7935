"""The pipeline as a table: each step's function, what it takes of the recipe, and what it reads.

The one place that says what a step depends on; the flow only says in which order they come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from steps import alarms
from steps.config import Recipe
from steps.policy_config import RELATIVES
from steps.run import Input, StepSpec
from steps.sections import Section
from steps.trainer_fields import ON_GROUPS


@dataclass(frozen=True)
class Step:
    """One row of the pipeline.

    Attributes:
        function: `module:function`.
        config: argument name → dotted path in the recipe.
        inputs: argument name → an earlier step, or `data/TABLE`, or `source` (the base model's files), or `classifier`,
            or `topics` and `probes` (files), or `start` and `champion` (adapters of an earlier run).
        optional: inputs that may be absent.
        random: whether the recipe's seed matters to it; what does not draw is shared by all seeds.
    """

    function: str
    config: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    random: bool = True


_ADAPTED = {"lora": "model.lora", "dtype": "model.dtype"}

STEPS: dict[str, Step] = {
    "base": Step("steps.base:prepare_base", {"name": "model.base"}, {"source": "source"}, random=False),
    "sft": Step(
        "steps.sft:train_sft", {"sft": "sft", **_ADAPTED}, {"base": "base", "demonstrations": "data/demonstrations"}
    ),
    "baseline": Step(
        "steps.baseline:answer_prompts",
        {"sampling": "evaluate.sampling", "dtype": "model.dtype"},
        {"base": "base", "sft": "sft", "prompts": "data/prompts"},
    ),
    "reward": Step(
        "steps.reward:train_reward",
        {"reward": "reward", **_ADAPTED},
        {"base": "base", "preferences": "data/preferences"},
    ),
    "evaluate": Step(
        "steps.evaluate:evaluate_policy",
        {"evaluate": "evaluate", "dtype": "model.dtype"},
        {
            "base": "base",
            "sft": "sft",
            "baseline": "baseline",
            "reward": "reward",
            "policy": "policy",
            "prompts": "data/prompts",
            "preferences": "data/preferences",
            "gold": "data/gold",
            "champion": "champion",
            "classifier": "classifier",
        },
        optional=frozenset({"champion", "classifier"}),
    ),
    "gate": Step(
        "steps.gate:judge_evaluation",
        {"gate": "gate"},
        {name: name for name in ("evaluate", "reward", "policy")},
        random=False,
    ),
}

# The reward step of a recipe that wants the reward on the start policy's scale: it reads what that answers.
NORMALISED_REWARD = Step(
    "steps.normalised_reward:train_normalised_reward",
    {"reward": "reward", **_ADAPTED},
    {"base": "base", "preferences": "data/preferences", "baseline": "baseline"},
)

# The evaluation of a recipe that names topics, and the gate behind it: without pairs there is no reward model.
BY_TOPIC = {
    "evaluate": Step(
        "steps.palms_evaluation:evaluate_topics",
        {"evaluate": "evaluate", "dtype": "model.dtype"},
        {
            "base": "base",
            "policy": "policy",
            "topics": "topics",
            "probes": "probes",
            "demonstrations": "data/demonstrations",
            "champion": "champion",
            "classifier": "classifier",
        },
        optional=frozenset({"champion", "classifier"}),
    ),
    "gate": replace(STEPS["gate"], inputs={name: name for name in ("evaluate", "policy")}),
}
# Where the policy is the SFT model itself, what it is held against is the base.
FROM_BASE = {
    name: replace(STEPS[name], inputs={role: given for role, given in STEPS[name].inputs.items() if role != "sft"})
    for name in ("baseline", "evaluate")
}

_START = {"start": "start"}  # where training begins, when not at the SFT model
_FROM_REWARD = {"base": "base", "sft": "sft", "reward": "reward", "preferences": "data/preferences", **_START}

_RELATIVE = {"relative": "policy.relative", "method": "policy.method", "dtype": "model.dtype"}
_GROUPS = {"groups": "policy.groups", "method": "policy.method", "dtype": "model.dtype"}
_FROM_PAIRS = {"base": "base", "sft": "sft", "preferences": "data/preferences", **_START}
_FROM_TARGETS = {**_FROM_PAIRS, "demonstrations": "data/demonstrations"}

# The policy step, by the recipe's method.
POLICIES: dict[str, Step] = {
    **{
        method: Step("steps.pair_methods:tune_policy", _RELATIVE, _FROM_PAIRS, optional=frozenset(_START))
        for method in RELATIVES
    },
    "kto": Step("steps.kto:tune_policy", _RELATIVE, _FROM_PAIRS, optional=frozenset(_START)),
    "slic": Step("steps.slic:tune_on_human_pairs", _RELATIVE, _FROM_TARGETS, optional=frozenset(_START)),
    "slic_sample_rank": Step(
        "steps.slic:tune_on_ranked_samples", _RELATIVE, {**_FROM_TARGETS, "reward": "reward"}, frozenset(_START)
    ),
    "dpo": Step(
        "steps.dpo:tune_policy",
        {"dpo": "policy.dpo", "dtype": "model.dtype"},
        {"base": "base", "sft": "sft", "preferences": "data/preferences", **_START},
        optional=frozenset(_START),
    ),
    "ppo": Step(
        "steps.ppo:tune_policy",
        {"ppo": "policy.ppo", "dtype": "model.dtype"},
        {**_FROM_REWARD, "demonstrations": "data/demonstrations"},
        optional=frozenset(_START),
    ),
    **{
        method: Step("steps.group_policy:tune_policy", _GROUPS, _FROM_REWARD, optional=frozenset(_START))
        for method in ON_GROUPS
    },
    "chain_of_hindsight": Step(
        "steps.chain_of_hindsight:tune_policy",
        {"chain_of_hindsight": "policy.chain_of_hindsight", "dtype": "model.dtype"},
        {
            "base": "base",
            "sft": "sft",
            "preferences": "data/preferences",
            "demonstrations": "data/demonstrations",
            **_START,
        },
        optional=frozenset(_START),
    ),
    "best_of_n": Step(
        "steps.best_of_n:tune_policy", {"best_of_n": "policy.best_of_n"}, {"sft": "sft", "reward": "reward"}
    ),
    "sft": Step("steps.sft_only:keep_policy", {}, {"sft": "sft"}, random=False),
}

TABLES = ("demonstrations", "preferences", "prompts", "gold")


def step_of(name: str, recipe: Recipe) -> Step:
    """The row of a step, which depends on the recipe's method, the scale of its reward, and how it evaluates."""
    if recipe.evaluate.topics and name in BY_TOPIC:
        return BY_TOPIC[name]
    if recipe.policy.method == "sft" and name in FROM_BASE:
        return FROM_BASE[name]
    if name == "reward" and recipe.reward.normalise:
        return NORMALISED_REWARD
    return POLICIES[recipe.policy.method] if name == "policy" else STEPS[name]


def tables_of(name: str, recipe: Recipe) -> list[str]:
    """The data tables a step reads."""
    inputs = step_of(name, recipe).inputs.values()
    return [given.removeprefix("data/") for given in inputs if given.startswith("data/")]


def module_of(name: str, recipe: Recipe) -> str:
    """The module that does a step's work."""
    return step_of(name, recipe).function.partition(":")[0]


def before(name: str, recipe: Recipe) -> set[str]:
    """The steps a step needs the results of, and those they need."""
    direct = {given for given in step_of(name, recipe).inputs.values() if given in Recipe.STEPS}
    return direct | {further for step in direct for further in before(step, recipe)}


def spec(name: str, recipe: Recipe, known: Mapping[str, Input]) -> StepSpec:
    """The spec of a step, from what is known of its inputs.

    Args:
        known: earlier steps' artifacts, `data/TABLE`, `source`, `champion`, `start`, `classifier`.

    Raises:
        KeyError: an input that is not known yet, by its name.
    """
    step = step_of(name, recipe)
    wanted = {
        argument: given for argument, given in step.inputs.items() if given in known or given not in step.optional
    }
    settings = {argument: _at(recipe, path) for argument, path in step.config.items()}
    if name in alarms.OF_STEP:
        settings["alarms"] = alarms.of_step(name, recipe.alarms).model_dump(mode="json")
    return StepSpec(
        step=name,
        function=step.function,
        config=settings,
        inputs={argument: known[given] for argument, given in wanted.items()},
        seed=recipe.seed if step.random else 0,
    )


def _at(recipe: Recipe, path: str) -> Any:
    value: Any = recipe
    for name in path.split("."):
        value = getattr(value, name)
    return value.model_dump(mode="json") if isinstance(value, Section) else value
