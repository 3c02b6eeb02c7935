"""Runs made to misbehave: each raises its alarm, and its action follows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from steps import reward_model
from steps.config import load
from steps.errors import StepFailed
from steps.experiment import Experiment
from steps.judges import GoldJudge
from steps.tracking import curves

Run = Callable[..., tuple[dict[str, Any], Path]]
EVERY_STEP = ["policy.dpo.trainer.logging_steps=1", "policy.dpo.trainer.save_steps=1"]


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a step of the tiny recipe with other settings, and what it needs; the facts and the folder."""
    root = Path(shutil.copytree(finished, tmp_path_factory.mktemp("alarms") / "project", symlinks=True))

    def step(name: str, *settings: str) -> tuple[dict[str, Any], Path]:
        experiment = Experiment(load(root / "recipes/tiny.yaml", list(settings)), root, Console(quiet=True))
        experiment.prepare_data()
        for one in experiment.recipe.STEPS[: experiment.recipe.STEPS.index(name) + 1]:
            outcome = experiment.run(one)
        return outcome.artifact.facts, outcome.artifact.path

    return step


def alarms(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {alarm["name"]: alarm for alarm in facts.get("alarms", ())}


def test_a_policy_that_leaves_its_start_is_stopped_and_the_best_checkpoint_is_kept(run: Run) -> None:
    ppo = ["policy.method=ppo", "policy.ppo.rollouts=8", "policy.ppo.trainer.learning_rate=0.1"]
    ppo += ["policy.ppo.kl.coefficient=0"]
    ppo += ["policy.ppo.trainer.lr_scheduler_type=constant", "model.lora={r: 8, top_layers: 2}"]
    _, free = run("policy", *ppo, "alarms.kl.action=ignore")
    kl, reward = curves(free)["kl"], [value for _, value in curves(free)["reward"]]
    place = next(i for i in range(3, len(kl)) if kl[i][1] > max(value for _, value in kl[:i]))
    limit = (kl[place][1] + max(value for _, value in kl[:place])) / 2
    facts, stopped = run("policy", *ppo, f"alarms.kl={{limit: {limit}, action: stop}}")
    assert (alarms(facts)["kl"]["step"], alarms(facts)["kl"]["value"]) == kl[place]
    assert curves(stopped)["kl"] == kl[: place + 1]
    assert curves(stopped)["alarm/kl"] == [kl[place]]
    # Of the three newest checkpoints the newest made the alarm; the next report tells how good the others were.
    best = max((place - 3, place - 2), key=lambda i: (reward[i + 1], i)) if place > 3 else place - 2
    assert facts["steps"] == kl[best][0]


def test_an_alarm_before_the_first_checkpoint_says_so(run: Run) -> None:
    with pytest.raises(StepFailed, match="before there was a checkpoint to keep"):
        run("policy", "policy.method=ppo", "alarms.kl={limit: -1, action: stop}")


def test_what_is_not_a_number_stops_the_training_and_the_last_sound_checkpoint_is_kept(run: Run) -> None:
    settings = ["policy.dpo.trainer.learning_rate=1e38", "policy.dpo.trainer.warmup_steps=3"]
    facts, path = run("policy", *settings, *EVERY_STEP)
    assert not np.isfinite(alarms(facts)["not_a_number"]["value"])
    assert facts["steps"] < alarms(facts)["not_a_number"]["step"]
    assert all(bool(torch.isfinite(w).all()) for w in load_file(path / "adapter/adapter_model.safetensors").values())


def test_dpo_that_pushes_both_answers_down_is_noticed(run: Run) -> None:
    facts, _ = run("policy", "policy.dpo.trainer.learning_rate=0.1", "policy.dpo.trainer.max_steps=16", *EVERY_STEP)
    raised = alarms(facts)["displaced_likelihood"]
    assert raised["action"] == "warn"
    assert raised["value"] < 0


def test_a_policy_that_grows_sure_of_itself_is_noticed(run: Run) -> None:
    settings = ["policy.ppo.trainer.learning_rate=0.3", "policy.ppo.kl.coefficient=0", "alarms.entropy.limit=1"]
    facts, path = run("policy", "policy.method=ppo", *settings)
    drawn = [value for _, value in curves(path)["entropy"]]
    assert alarms(facts)["entropy"]["value"] == next(value for value in drawn if value < drawn[0])


def test_a_critic_that_knows_nothing_is_noticed(run: Run) -> None:
    settings = ["policy.ppo.rollouts=6", "policy.ppo.critic_learning_rate=1", "policy.ppo.value_clip=null"]
    facts, _ = run("policy", "policy.method=ppo", *settings)
    assert alarms(facts)["critic"]["value"] < 0


def test_a_label_in_the_text_is_noticed(run: Run) -> None:
    settings = ["reward.trainer.learning_rate=0.3", "reward.trainer.logging_steps=1", "reward.trainer.max_steps=20"]
    facts, path = run("reward", *settings)
    seen = [value for _, value in curves(path)["rewards/accuracies"]][:2]
    assert ("leak" in alarms(facts)) is (seen == [1.0, 1.0])


def test_a_reward_model_below_its_floor_fails_the_gate(run: Run) -> None:
    facts, _ = run("gate", "alarms.reward_accuracy.limit=1.01")
    assert facts["promote"] is False
    assert any(reason.startswith("NO: alarm reward_accuracy (fail)") for reason in facts["reasons"])


def test_answers_that_grow_are_noticed_at_the_evaluation(run: Run) -> None:
    facts, _ = run("evaluate", "alarms.length.limit=0.01")
    assert alarms(facts)["length"]["step"] == 0


def test_a_policy_that_fools_its_reward_model_fails_the_gate(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward model counts a letter; people like answers the less the more there are."""

    def letters(answers: Sequence[str]) -> np.ndarray:
        return np.array([sum(letter < "M" for letter in answer) for answer in answers], float)

    monkeypatch.setattr(
        reward_model, "reward_scores", lambda model, tokenizer, prompts, answers, at_most: letters(answers)
    )
    monkeypatch.setattr(GoldJudge, "score", lambda self, prompts, answers=None: -letters(answers or prompts))
    settings = ["policy.method=best_of_n", "policy.best_of_n.n=8", "gate.win_rate_floor=0"]
    facts, _ = run("evaluate", *settings)
    assert facts["reward_gain"] == -facts["gold_gain"] > 0
    assert alarms(facts)["overoptimisation"]["action"] == "fail"
    verdict, _ = run("gate", *settings)
    assert verdict["promote"] is False
    assert any(reason.startswith("NO: alarm overoptimisation") for reason in verdict["reasons"])
