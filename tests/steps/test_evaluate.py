"""The evaluation as a step: what it finds when it is known what there is to find."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from steps.baseline import read
from steps.config import load
from steps.evaluate import by_groups, group_metrics
from steps.experiment import Experiment
from steps.judges import GoldJudge
from steps.models import load_policy, load_tokenizer
from steps.sampling import sample
from steps.tracking import NullTracker

Run = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def root(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("evaluate") / "project", symlinks=True))


@pytest.fixture(scope="module")
def run(root: Path) -> Run:
    """Evaluate the tiny recipe with other settings; the facts and the folder."""

    def step(*settings: str, name: str = "evaluate") -> tuple[dict[str, Any], Path]:
        recipe = load(root / "recipes/tiny.yaml", list(settings))
        experiment = Experiment(recipe, root, Console(quiet=True), meets_champion=False)
        experiment.prepare_data()
        for one in recipe.STEPS[: recipe.STEPS.index(name) + 1]:
            outcome = experiment.run(one)
        return outcome.artifact.facts, outcome.artifact.path

    return step


def test_a_policy_that_learnt_nothing_ties_everywhere_and_is_not_promoted(run: Run) -> None:
    nothing = ["policy.dpo.trainer.learning_rate=0", "gate.win_rate_floor=0.5"]
    facts, _ = run(*nothing)
    assert (facts["win_rate"], facts["win_rate_ties"], facts["win_rate_p_value"]) == (0.5, 16, 1.0)
    assert facts["win_rate_length_controlled"] == pytest.approx(0.5)
    assert (facts["gold_gain"], facts["reward_gain"], facts["length_ratio"]) == (0, 0, 1)
    assert abs(facts["policy_kl_full"]) < 1e-6
    verdict, _ = run(*nothing, name="gate")
    assert verdict["promote"] is False


def test_the_configured_temperature_once_more_gives_the_same_rate(run: Run) -> None:
    facts, _ = run("evaluate.temperatures=[1.0, 0.1]")
    assert facts["win_rate_at_1"] == facts["win_rate"]
    assert 0 <= facts["win_rate_at_0.1_low"] <= facts["win_rate_at_0.1"] <= facts["win_rate_at_0.1_high"] <= 1


def test_answers_do_not_depend_on_how_often_one_looks(run: Run) -> None:
    whole, rounds = (
        pd.read_parquet(run(f"evaluate.stop_early={early}", "evaluate.batch_size=5")[1] / "completions.parquet")
        for early in ("false", "true")
    )
    texts = ["prompt", "start", "policy", "over_start"]
    assert rounds[texts].equals(whole[texts].head(len(rounds)))


def test_the_starts_answers_are_those_it_gives_when_it_is_asked_in_one_go(run: Run, root: Path) -> None:
    """What the evaluation itself would draw: the same model, prompts and random numbers."""
    settings = ["evaluate.batch_size=5", "evaluate.temperatures=[0.3]"]
    _, folder = run(*settings)
    _, baseline = run(*settings, name="baseline")
    inputs = json.loads((folder / "manifest.json").read_text())["inputs"]
    assert inputs["baseline"] == json.loads((baseline / "manifest.json").read_text())["digest"]
    table = pd.read_parquet(folder / "completions.parquet")
    recipe = load(root / "recipes/tiny.yaml", settings)
    _, sft = run(*settings, name="sft")
    base = next((root / "var/store").glob("base-*"))
    model, tokenizer = load_policy(base, "float32", sft / "adapter"), load_tokenizer(base)
    for temperature in (1.0, 0.3):
        asked = list(table["prompt"])
        drawn = sample(model, tokenizer, asked, recipe.evaluate, recipe.seed, NullTracker(), "", temperature)
        kept = read(baseline)[temperature]
        assert (kept.texts, kept.tokens) == (drawn.texts, drawn.tokens)
        assert (kept.lengths == drawn.lengths).all()
        if temperature == recipe.evaluate.temperature:
            assert list(table["start"]) == kept.texts
            assert list(table["start_tokens"]) == list(kept.lengths)


def test_another_judge_and_another_policy_find_the_answers_of_the_start(run: Run) -> None:
    _, usual = run(name="baseline")
    for settings in (["evaluate.judge=reward"], ["evaluate.confidence=0.9"], ["policy.method=best_of_n"]):
        assert run(*settings, name="baseline")[1] == usual
    for settings in (["evaluate.temperature=0.5"], ["evaluate.prompts=15"], ["seed=4"]):
        assert run(*settings, name="baseline")[1] != usual


def test_win_rates_by_label_are_corrected_for_their_number() -> None:
    """20 of 20 has p = 2 · 2⁻²⁰, 12 of 20 p = 0.503; three rare prompts stand together; times 3 for the least."""
    over = pd.Series([1.0] * 20 + [1.0] * 12 + [0.0] * 8 + [1.0, 0.0, np.nan])
    asked = pd.DataFrame({"prompt": range(50), "source": ["a"] * 20 + ["b"] * 20 + ["c", "d", "e", *["f"] * 7]})
    (a, b, rest) = by_groups(over, asked.assign(topic="one"), 0.95)["win_rate_by"]
    assert [(group["by"], group["group"], group["win_rate"]) for group in (a, b, rest)] == [
        ("source", "a", 1.0),
        ("source", "b", 0.6),
        ("source", "other", 0.5),
    ]
    assert a["win_rate_p_value"] == pytest.approx(3 * 2 * 0.5**20)
    assert rest["win_rate_wins"] + rest["win_rate_losses"] == 2
    assert group_metrics([{**a, "group": "a // b"}]) == {"win_rate_by_source/a_b": 1.0}
    assert by_groups(over, asked[["prompt"]], 0.95) == {}


def test_an_evaluation_that_may_end_early_does_once_it_is_decided(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that likes capital letters less: the best of eight by a reward for them loses every time."""
    from steps import reward_model

    def letters(answers: list[str]) -> np.ndarray:
        return np.array([sum(letter < "M" for letter in answer) for answer in answers], float)

    monkeypatch.setattr(
        reward_model, "reward_scores", lambda model, tokenizer, prompts, answers, at_most: letters(answers)
    )
    monkeypatch.setattr(GoldJudge, "score", lambda self, prompts, answers=None: -letters(answers or prompts))
    monkeypatch.setattr(GoldJudge, "identity", "letters")
    best = ["policy.method=best_of_n", "policy.best_of_n.n=8", "evaluate.prompts=25", "evaluate.batch_size=5"]
    facts, folder = run(*best, "evaluate.stop_early=true")
    assert facts["prompts"] < 25
    assert facts["win_rate_high"] < 0.5
    assert len(pd.read_parquet(folder / "completions.parquet")) == facts["prompts"]


def test_people_are_met_where_the_data_has_their_answers(run: Run) -> None:
    facts, folder = run("evaluate.rouge=true")
    table = pd.read_parquet(folder / "completions.parquet")
    assert facts["human_win_rate"] == table["over_human"].mean() == 0  # a model of 7,000 parameters against people
    assert 0 <= facts["policy_rougeL"] < 0.2


def test_every_verdict_lies_beside_the_answers(run: Run) -> None:
    _, folder = run()
    table = pd.read_parquet(folder / "completions.parquet")
    kept = pd.read_json(folder / "verdicts.jsonl", lines=True)
    met = kept.merge(table, left_on=["prompt", "first", "second"], right_on=["prompt", "policy", "start"])
    assert len(met) == len(table)
    assert (met["preference"] == met["over_start"]).all()


def make_classifier(root: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, num_labels=1, pad_token_id=0, **size)
    LlamaForSequenceClassification(config).save_pretrained(root / "judge")
    tokenizer.save_pretrained(root / "judge")
    return root / "judge"


def test_a_reward_model_somebody_else_trained_may_judge(run: Run, root: Path) -> None:
    make_classifier(root, 0)
    theirs = ["evaluate.judge=reward", "evaluate.reward_model=./judge"]
    facts, first = run(*theirs)
    assert facts["judge"] == "reward"
    own, _ = run("evaluate.judge=reward")
    assert facts["judge_accuracy"] != own["judge_accuracy"]
    make_classifier(root, 1)
    _, second = run(*theirs)
    assert first != second  # other weights are another judge


def test_gold_and_reward_of_answers_drawn_in_training_are_traced(run: Run) -> None:
    from steps.tracking import curves

    facts, folder = run("policy.method=ppo")
    traced = curves(folder)
    assert [step for step, _ in traced["samples/gold"]] == [step for step, _ in traced["samples/reward"]]
    assert len(traced["samples/gold"]) >= 2
    assert facts["policy_kl_k3"] >= 0
