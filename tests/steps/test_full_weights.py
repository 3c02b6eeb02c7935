"""`model.lora: null`: every weight is trained, from SFT to evaluation, and a step leaves a whole model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steps import pipeline
from steps.artifact import payload
from steps.config import load, section
from steps.dpo import tune_policy as tune_by_dpo
from steps.errors import RecipeError
from steps.experiment import Experiment
from steps.group_policy import tune_policy as tune_by_groups
from steps.models import ADAPTER, checkpoint_files, is_whole_model, load_policy, load_reward_model, score_head
from steps.ppo import tune_policy as tune_by_ppo
from steps.reward import train_reward
from steps.sft import train_sft
from steps.tracking import Spool, curves
from steps.trainer_fields import ON_GROUPS

WHOLE = ["name=whole", "model.lora=null", "evaluate.prompts=8"]
PPO = ["policy.method=ppo", "policy.ppo.backbone=separate"]
FUNCTIONS = {
    "sft": train_sft,
    "reward": train_reward,
    "dpo": tune_by_dpo,
    "ppo": tune_by_ppo,
    **dict.fromkeys(ON_GROUPS, tune_by_groups),
}


def experiment(root: Path, *sets: str) -> Experiment:
    """An experiment on data and a base that are there."""
    made = Experiment(load(root / "recipes/tiny.yaml", [*WHOLE, *sets]), root, Console(quiet=True))
    list(made.plan())  # which data and what of the store it would take
    return made


@pytest.fixture(scope="module")
def flows(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Experiment]:
    """The whole pipeline without adapters: by DPO, whose model becomes the champion, then by PPO against that one."""
    root = tmp_path_factory.mktemp("whole") / "project"
    shutil.copytree(finished, root, symlinks=True)
    made = {"dpo": experiment(root), "ppo": experiment(root, *PPO)}
    for name, one in made.items():
        for step in one.recipe.STEPS:
            one.run(step)
        if name == "dpo":
            one.register()
    return made


def left(flow: Experiment, step: str) -> Path:
    """What a step left in its folder of weights."""
    return flow.outcomes[step].artifact.path / ADAPTER


def work(
    flow: Experiment, name: str, out: Path, *sets: str, dtype: str = "float32", spool: Spool | None = None
) -> dict[str, Any]:
    """The facts of a step of a flow, worked once more in `out` and in this process.

    Args:
        name: of `FUNCTIONS`.
    """
    out.mkdir(parents=True, exist_ok=True)
    method = [] if name in ("sft", "reward") else [f"policy.method={name}"]
    recipe = load(flow.root / "recipes/tiny.yaml", [*WHOLE, "policy.ppo.backbone=separate", *method, *sets])
    step = pipeline.step_of("policy" if method else name, recipe)
    values = {argument: pipeline._at(recipe, path) for argument, path in step.config.items()}
    sections = {argument: section(argument, value) for argument, value in values.items()}
    inputs = {name: flow.known[given].path for name, given in step.inputs.items() if given in flow.known}
    given = {**sections, "dtype": dtype, **inputs}
    return FUNCTIONS[name](**given, seed=recipe.seed, out=out, tracker=spool or Spool(out))


# -- what is left behind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", ["dpo", "ppo"])
def test_a_policy_is_a_model_transformers_loads_by_itself(flows: dict[str, Experiment], flow: str) -> None:
    folder = left(flows[flow], "policy")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer("good warm")["input_ids"]) == "good warm"
    assert not (folder / "adapter_config.json").exists()


@pytest.mark.parametrize(("step", "before"), [("sft", "base"), ("policy", "sft")])
def test_every_weight_is_trained(flows: dict[str, Experiment], step: str, before: str) -> None:
    flow = flows["dpo"]
    start = flow.known["base"].path if before == "base" else left(flow, before)
    old, new = load_file(start / "model.safetensors"), load_file(left(flow, step) / "model.safetensors")
    assert old.keys() == new.keys()
    assert [name for name in old if torch.equal(old[name], new[name])] == []


def test_the_reward_models_head_is_kept(flows: dict[str, Experiment]) -> None:
    flow = flows["ppo"]
    folder = left(flow, "reward")
    model = load_reward_model(flow.known["base"].path, "float32", folder)
    assert torch.equal(model.score.weight, score_head(folder))
    assert flow.outcomes["reward"].artifact.facts["accuracy"] > 0.6


def test_no_whole_model_holds_a_path_of_this_machine(flows: dict[str, Experiment]) -> None:
    for flow in flows.values():
        for step in ("sft", "reward", "policy"):
            for name, path in payload(left(flow, step)).items():
                assert str(flow.root).encode() not in path.read_bytes(), name


def test_the_evaluation_compares_whole_models_with_a_whole_champion(flows: dict[str, Experiment]) -> None:
    facts = {name: flow.outcomes["evaluate"].artifact.facts for name, flow in flows.items()}
    assert all(0 <= fact["win_rate_low"] <= fact["win_rate"] <= fact["win_rate_high"] <= 1 for fact in facts.values())
    assert "champion_win_rate" not in facts["dpo"]
    assert 0 <= facts["ppo"]["champion_win_rate"] <= 1
    champion = flows["ppo"].known["champion"]
    assert champion.digest == flows["dpo"].known["policy"].digest
    assert is_whole_model(champion.path / ADAPTER)


# -- the reference is the start ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "precompute"), [("float32", "true"), ("bfloat16", "true"), ("bfloat16", "false")])
def test_at_first_dpos_loss_is_that_of_a_coin(
    flows: dict[str, Experiment], tmp_path: Path, dtype: str, precompute: str
) -> None:
    """−log σ(0) = ln 2: policy and reference agree on every answer, whatever the frozen weights' dtype."""
    settings = {"max_steps": 1, "logging_steps": 1, "precompute_ref_log_probs": precompute}
    sets = [f"policy.dpo.trainer.{name}={value}" for name, value in settings.items()]
    work(flows["dpo"], "dpo", tmp_path, *sets, dtype=dtype)
    found = curves(tmp_path)
    assert found["loss"][0][1] == pytest.approx(math.log(2), abs=1e-6)
    assert found["rewards/chosen"][0][1] == found["rewards/rejected"][0][1] == pytest.approx(0, abs=1e-6)
    assert found["eval_rewards/margins"][-1][1] != 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_first_ppos_kl_is_nought(flows: dict[str, Experiment], tmp_path: Path, dtype: str) -> None:
    work(flows["ppo"], "ppo", tmp_path, "policy.ppo.rollouts=2", dtype=dtype)
    kl = [value for _, value in curves(tmp_path)["kl"]]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-3


@pytest.mark.parametrize("method", ON_GROUPS)
def test_groups_of_answers_tune_a_whole_model(flows: dict[str, Experiment], tmp_path: Path, method: str) -> None:
    facts = work(flows["ppo"], method, tmp_path, "policy.rloo.rollouts=2")
    assert is_whole_model(tmp_path / ADAPTER)
    assert curves(tmp_path)["kl_per_token"][0][1] == pytest.approx(0, abs=1e-5)
    assert facts["eval_rewards/margins"] != 0


# -- interrupted -------------------------------------------------------------------------------------------------


class Dying(Spool):
    """Ends a step's work, as a kill would, when this update is reported."""

    at = 0

    def metrics(self, values, step) -> None:
        if step >= self.at and "loss" in values:
            raise KeyboardInterrupt
        super().metrics(values, step)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_a_resumed_run_ends_with_the_bytes_of_the_straight_one(
    flows: dict[str, Experiment], tmp_path: Path, name: str
) -> None:
    """Although the newest checkpoint lost the end of its weights, so that the one before is taken."""
    flow, dying = flows["ppo" if name == "ppo" else "dpo"], Dying(tmp_path)
    dying.at = 12 if name == "ppo" else 8  # checkpoints lie at 4 and 8, or at 3 and 6
    with pytest.raises(KeyboardInterrupt):
        work(flow, name, tmp_path, spool=dying)
    checkpoints = sorted((tmp_path / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    assert len(checkpoints) == 2
    torn = checkpoints[-1] / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:200])
    work(flow, name, tmp_path)
    straight = left(flow, name if name in ("sft", "reward") else "policy")
    made = {path: file.read_bytes() for path, file in payload(tmp_path / ADAPTER).items()}
    assert made == {path: file.read_bytes() for path, file in payload(straight).items()}


def test_a_checkpoint_is_asked_for_the_weights_it_holds(base: Path, finished: Path) -> None:
    whole = load_policy(base, "float32")
    adapted = load_policy(base, "float32", next((finished / "var/store").glob("sft-*")) / ADAPTER)
    assert {*checkpoint_files(whole)} ^ {*checkpoint_files(adapted)} == {
        "model.safetensors",
        "adapter_model.safetensors",
    }


# -- what cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["policy.method=ppo"], "policy: with model.lora=null .* set policy.ppo.backbone=separate"),
        (["model.dtype=nf4"], "model.lora: weights in four bits cannot be trained"),
        (["model.lora={rnk: 3}"], "model.lora.rnk: no such key"),
    ],
)
def test_what_cannot_be_trained_whole_is_said_of_the_recipe(finished: Path, sets: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load(finished / "recipes/tiny.yaml", [*WHOLE, *sets])


def test_adapters_and_whole_models_have_keys_of_their_own(flows: dict[str, Experiment], finished: Path) -> None:
    adapted = {json.loads(path.read_text())["key"] for path in (finished / "var/store").glob("*/manifest.json")}
    mine = {flow.outcomes[step].artifact.key for flow in flows.values() for step in ("sft", "reward", "policy")}
    assert not adapted & mine
