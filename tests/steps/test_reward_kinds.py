"""Reward models of every kind on the tiny model: whole groups, dialogue, ties, a scale of their own, ensembles."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import BAD, GOOD
from torch import nn

from steps import reward as reward_step
from steps.backbone import Rows, Scorer, add_adapter, linear_head
from steps.config import Lora, Reward
from steps.formats import hh
from steps.models import ADAPTER, load_policy, load_reward_model, load_tokenizer, lora_config, score_head
from steps.normalised_reward import train_normalised_reward
from steps.policy_config import PPO
from steps.ppo import known_moments
from steps.ppo_trainer import Moments
from steps.rankings import groups_of
from steps.reward import accuracy, ensemble_facts, train_reward, with_known
from steps.reward_model import Reading, RewardModel, disagreement, member_folders, reward_scores, tokens_of
from steps.reward_scorers import CarefulScorer, careful_scorer, members_of
from steps.reward_trainers import WholeGroups, share_right, tokenised_groups
from steps.rollouts import AnswerReward
from steps.tracking import NullTracker, Spool, curves

LORA = Lora(r=4, alpha=8, target_modules=("q_proj", "v_proj"), top_layers=1)
TRAINER = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 3, "logging_steps": 2}


def ranked_pairs(questions: int = 48, seed: int = 0) -> pd.DataFrame:
    """Four answers a question with 0, 1, 1 and 3 kind words of 3: a last, two that tie, and a best."""
    draw = random.Random(seed)
    rows = []
    for number in range(questions):
        answers = [
            (" ".join([*draw.choices(GOOD, k=kind), *draw.choices(BAD, k=3 - kind)]) + f" {number}.{place}", rank)
            for place, (kind, rank) in enumerate([(3, 1), (1, 2), (1, 2), (0, 4)])
        ]
        for (better, first), (worse, second) in itertools.combinations(answers, 2):
            if first < second:
                ranks = {"chosen_rank": first, "rejected_rank": second}
                sides = {"prompt": f"{number}: ", "chosen": better, "rejected": worse, "margin": math.nan}
                part = "train" if number < questions * 2 // 3 else "held_out"
                rows.append({**sides, **ranks, "group": f"g{number}", "part": part})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranked") / "preferences.parquet"
    ranked_pairs().to_parquet(path)
    return path


def train(base: Path, preferences: Path, out: Path, **settings) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    reward = Reward.model_validate({"trainer": TRAINER, **settings})
    return train_reward(
        reward, LORA, "float32", base=base, preferences=preferences, seed=1, out=out, tracker=NullTracker()
    )


# -- whole groups ------------------------------------------------------------------------------------------------


def test_every_candidate_of_a_prompt_is_in_one_batch_element_and_once(base: Path) -> None:
    groups = groups_of(ranked_pairs(3), 16)
    rows = tokenised_groups(groups, load_tokenizer(base), None)
    batch = WholeGroups(pad=0)(list(rows))
    there = batch["place"][batch["place"] >= 0]
    assert sorted(there.tolist()) == list(range(len(batch["input_ids"]))) == list(range(12))
    for number, group in enumerate(groups):
        for k, answer in enumerate(group.answers):
            ids = batch["input_ids"][batch["place"][number, k]][batch["attention_mask"][batch["place"][number, k]] == 1]
            assert ids.tolist() == tokens_of(load_tokenizer(base), [group.prompt], [answer])[0]
    preferred = batch["preferred"].numpy()
    assert all(np.array_equal(preferred[n], group.preferred, equal_nan=True) for n, group in enumerate(groups))


@pytest.mark.parametrize("loss", ["rankings", "best_of_k", "plackett_luce"])
def test_a_loss_of_groups_learns_the_order(base: Path, ranked: Path, tmp_path: Path, loss: str) -> None:
    facts = train(base, ranked, tmp_path, loss=loss, trainer={**TRAINER, "max_steps": 30})
    pairs = pd.read_parquet(tmp_path / "held_out.parquet")
    assert facts["accuracy"] > 0.85 and facts["accuracy_low"] <= facts["accuracy"] <= facts["accuracy_high"]
    assert facts["groups"] == 32 and facts["mean_candidates"] == 4 and facts["pairs"] == 32 * 5
    assert facts["held_out"] == len(pairs) == 16 * 5
    assert facts["accuracy"] == pytest.approx((pairs["difference"] > 0).mean())
    model, tokenizer = load_reward_model(base, "float32", tmp_path / "adapter"), load_tokenizer(base)
    sides = [reward_scores(model, tokenizer, list(pairs["prompt"]), list(pairs[s])) for s in ("chosen", "rejected")]
    assert pairs["difference"].to_numpy() == pytest.approx(sides[0] - sides[1], abs=1e-5)


def test_one_prompt_at_a_time_makes_the_same_model_as_four(base: Path, ranked: Path, tmp_path: Path) -> None:
    """Padding and company in a batch change nothing: 1 × 4 equals 4 × 1, to float error."""
    weights = []
    for batch, accumulated in ((4, 1), (1, 4)):
        own = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "max_steps": 2}
        train(base, ranked, tmp_path / str(batch), loss="rankings", trainer={**TRAINER, **own})
        weights.append(load_file(tmp_path / str(batch) / "adapter/adapter_model.safetensors"))
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=2e-5), name


def test_a_resumed_training_ends_with_the_same_bytes(base: Path, ranked: Path, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(base, ranked, straight, loss="plackett_luce")
    shutil.copytree(straight / "checkpoints", resumed / "checkpoints")
    shutil.rmtree(resumed / "checkpoints/checkpoint-6")
    train(base, ranked, resumed, loss="plackett_luce")
    file = "adapter/adapter_model.safetensors"
    assert (straight / file).read_bytes() == (resumed / file).read_bytes()


# -- dialogue ----------------------------------------------------------------------------------------------------

HISTORY = "\n\nHuman: rain?\n\nAssistant: yes\n\nHuman: sure?"


def test_the_shared_turns_are_the_prompt_and_the_last_ones_the_sides() -> None:
    record = {"chosen": f"{HISTORY}\n\nAssistant: quite", "rejected": f"{HISTORY}\n\nAssistant: no"}
    (row,) = hh(record)
    assert row["prompt"] == f"{HISTORY}\n\nAssistant:"
    assert (row["chosen"], row["rejected"]) == (" quite", " no")


def test_one_number_is_read_at_the_end_of_an_answer_and_nothing_else_is_scored(base: Path) -> None:
    """Neither prompt tokens nor padding: the head reads the state of the last token, alone or in company."""
    torch.manual_seed(0)
    model, tokenizer = load_reward_model(base, "float32").eval(), load_tokenizer(base)
    nn.init.normal_(model.score.weight)
    answers = [" quite", " no, and here is much more of an answer than the others have", ""]
    alone = [reward_scores(model, tokenizer, [HISTORY], [answer])[0] for answer in answers]
    together = reward_scores(model, tokenizer, [HISTORY] * 3, answers)
    assert together == pytest.approx(np.array(alone), abs=1e-5)
    for answer, score in zip(answers, alone, strict=True):
        ids = torch.tensor(tokens_of(tokenizer, [HISTORY], [answer]))
        with torch.no_grad():
            last = model.model(input_ids=ids).last_hidden_state[0, -1]
            assert (model.score.weight @ last).item() == pytest.approx(score, abs=1e-5)
            padded = torch.nn.functional.pad(ids, (0, 40), value=tokenizer.pad_token_id)
            mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long()[None]
            assert model(input_ids=padded, attention_mask=mask).logits.item() == pytest.approx(score, abs=1e-5)


def test_rewards_that_are_equal_count_half_and_are_told(
    base: Path, ranked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of zeros that learns nothing ties on every pair: accuracy ½, where counting ties as errors gives 0."""

    def blank(*args):
        model = load_reward_model(*args)
        nn.init.zeros_(model.score.weight)
        return model

    monkeypatch.setattr(reward_step, "load_reward_model", blank)
    facts = train(base, ranked, tmp_path, trainer={**TRAINER, "learning_rate": 0.0, "max_steps": 1}, held_out=64)
    assert facts["accuracy"] == facts["eval_rewards/accuracies"] == 0.5
    assert facts["tied_rewards"] == facts["held_out"] == 64
    assert facts["eval_loss"] == pytest.approx(math.log(2)) and facts["log_loss"] == pytest.approx(math.log(2))
    assert share_right(torch.tensor([0.0, 1.0, -1.0, 0.0])) == 0.5


def test_the_accuracy_the_alarm_reads_is_that_of_all_pairs(base: Path, tmp_path: Path) -> None:
    """Groups of one pair beside groups of five: no mean over batches is told on the way."""
    table = ranked_pairs(48)
    held_out = table["part"] == "held_out"
    lone = table["group"].isin([f"g{number}" for number in range(40, 48)]) & table.duplicated("group")
    table[~(held_out & lone)].to_parquet(tmp_path / "uneven.parquet")
    told = Spool(tmp_path)
    reward = Reward.model_validate({"loss": "rankings", "trainer": {**TRAINER, "max_steps": 1}, "held_out": 60})
    given = {"base": base, "preferences": tmp_path / "uneven.parquet", "seed": 1, "out": tmp_path}
    facts = train_reward(reward, LORA, "float32", **given, tracker=told)
    values = [value for _, value in curves(tmp_path)["eval_rewards/accuracies"]]
    assert facts["held_out"] == 48 and values == pytest.approx([facts["accuracy"]] * len(values))


def test_an_interval_with_ties_is_narrower_than_of_as_many_wins_and_losses() -> None:
    tied, apart = pd.DataFrame({"difference": [0.0] * 40}), pd.DataFrame({"difference": [1.0, -1.0] * 20})
    narrow, wide = accuracy(tied, 0), accuracy(apart, 0)
    assert narrow["accuracy"] == wide["accuracy"] == 0.5
    assert narrow["accuracy_high"] - narrow["accuracy_low"] < wide["accuracy_high"] - wide["accuracy_low"]


def test_pairs_of_a_ranking_are_not_taken_for_so_many_opinions() -> None:
    """Six pairs each of 20 questions, all right or all wrong: as uncertain as 20 pairs, not as 120."""
    right = np.repeat([1.0, -1.0], 60)
    alone = accuracy(pd.DataFrame({"difference": right}), 0)
    together = accuracy(pd.DataFrame({"difference": right, "group": np.repeat(range(20), 6)}), 0)
    width = [found["accuracy_high"] - found["accuracy_low"] for found in (alone, together)]
    assert width[1] > 2 * width[0]


def test_what_is_too_long_loses_its_beginning_and_no_pair_is_left_out(base: Path, ranked: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    whole, cut = (tokens_of(tokenizer, ["a long prompt"], ["said"], at_most)[0] for at_most in (None, 6))
    assert cut == whole[-6:] and cut[-1] == tokenizer.eos_token_id and len(whole) == 18
    for loss in ("bradley_terry", "rankings"):
        own = {**TRAINER, "max_steps": 1, "max_length": 8}
        assert train(base, ranked, tmp_path / loss, loss=loss, trainer=own, held_out=64)["held_out"] >= 60


def test_what_is_scored_is_as_long_as_what_was_learnt(base: Path, ranked: Path, tmp_path: Path) -> None:
    """From a text, and from tokens as a policy is given its rewards."""
    train(base, ranked, tmp_path, trainer={**TRAINER, "max_steps": 1, "max_length": 12})
    weights, tokenizer = tmp_path / ADAPTER, load_tokenizer(base)
    assert Reading.of(weights).max_length == 12
    model = RewardModel(base, "float32", weights)
    prompts, answers = ["once upon a time 1: ", "never, or so they say 1: "], ["good", "bad"]
    scores = model.scores(prompts, answers)
    ends = [prompt[len(answer) + 1 - 12 :] for prompt, answer in zip(prompts, answers, strict=True)]
    assert model.scores(ends, answers) == pytest.approx(scores, abs=1e-6)
    assert reward_scores(load_reward_model(base, "float32", weights), tokenizer, prompts, answers)[0] != scores[0]
    scorer = Scorer(load_reward_model(base, "float32", weights), "default", linear_head(score_head(weights)))
    read = AnswerReward(scorer, tokenizer, 1, 12)(prompts, None, [tokenizer(text)["input_ids"] for text in answers])
    assert read == pytest.approx(scores, abs=1e-5)


def test_pairs_learnt_from_by_prompt_are_counted_by_prompt() -> None:
    pairs = pd.DataFrame({"prompt": ["a", "a", "b"], "chosen": "yes", "rejected": "no"})
    assert list(with_known(pairs, np.ones((1, 3)), ranked=True)["group"]) == ["a", "a", "b"]
    assert "group" not in with_known(pairs, np.ones((1, 3)))
    assert list(with_known(pairs.assign(group=[None, None, "g"]), np.ones((1, 3)))["group"]) == ["a", "a", "g"]


def test_a_margin_of_the_table_reaches_the_loss(base: Path, ranked: Path, tmp_path: Path) -> None:
    """Equal seeds, one step at a learning rate of 0: the loss of pairs with margin 2 is larger than without."""
    table = tmp_path / "preferences.parquet"
    pd.read_parquet(ranked).assign(margin=2.0).to_parquet(table)
    own = {**TRAINER, "max_steps": 1, "learning_rate": 0.0}
    for loss in ("bradley_terry", "rankings"):
        plain, held = (
            train(base, table, tmp_path / f"{loss}{weight}", loss=loss, margin_weight=weight, trainer=own, held_out=64)
            for weight in (0.0, 1.0)
        )
        assert held["eval_loss"] > plain["eval_loss"] + 0.5


# -- a scale of its own, and ensembles ---------------------------------------------------------------------------

PROMPTS = [f"{n}: " for n in range(40)]
SAID = [" ".join(random.Random(n).choices(GOOD + BAD, k=3)) for n in range(40)]


@pytest.fixture(scope="module")
def ensemble(base: Path, ranked: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Two members on the scale of a start whose answers are `SAID`, with a penalty of 2 deviations."""
    out, baseline = tmp_path_factory.mktemp("ensemble"), tmp_path_factory.mktemp("baseline")
    cold = pd.DataFrame({"temperature": 0.7, "prompt": PROMPTS, "answer": SAID})
    hot = cold.assign(temperature=1.5, answer="never looked at")
    pd.concat([cold, hot]).to_parquet(baseline / "answers.parquet")
    reward = Reward(loss="rankings", ensemble=2, normalise=True, uncertainty_penalty=2.0, trainer=TRAINER)
    read = {"base": base, "preferences": ranked, "baseline": baseline}
    facts = train_normalised_reward(reward, LORA, "float32", **read, seed=1, out=out, tracker=NullTracker())
    return out, facts


def test_rewards_have_mean_0_and_variance_1_on_the_starts_answers_after_a_reload(base: Path, ensemble) -> None:
    out, facts = ensemble
    rewards = RewardModel(base, "float32", out / "adapter").scores(PROMPTS, SAID)
    assert rewards.mean() == pytest.approx(0, abs=1e-4) and rewards.std() == pytest.approx(1, abs=1e-4)
    written = json.loads((out / "adapter/reward.json").read_text())
    assert (written["mean"], written["deviation"]) == (facts["start_mean"], facts["start_deviation"])
    assert written["answers"] == 40 and written["members"] == 2 and written["penalty"] == 2.0


def test_members_are_different_models_and_their_mean_is_the_reward(base: Path, ensemble) -> None:
    out, facts = ensemble
    model = RewardModel(base, "float32", out / "adapter")
    members = model.members(PROMPTS, SAID)
    assert members.shape == (2, 40) and np.abs(members[0] - members[1]).max() > 0.01
    assert model.scores(PROMPTS, SAID) == pytest.approx(members.mean(0))
    careful = members.mean(0) - 2.0 * np.abs(members[0] - members[1]) / math.sqrt(2)
    assert model.careful_scores(PROMPTS, SAID) == pytest.approx(careful)
    reading = Reading.of(out / "adapter")
    for member, folder in zip(members, member_folders(out / "adapter"), strict=True):
        alone = reward_scores(load_reward_model(base, "float32", folder), load_tokenizer(base), PROMPTS, SAID)
        assert member == pytest.approx(reading.scaled(alone), abs=1e-5)
    pairs = pd.read_parquet(out / "held_out.parquet")
    assert facts["disagreement"] == pytest.approx(pairs["disagreement"].mean())
    assert facts["accuracy"] == pytest.approx(((1 + np.sign(pairs["difference"])) / 2).mean())
    assert len(facts["member_accuracies"]) == 2


def test_the_first_member_is_the_model_that_one_alone_would_be(base: Path, ranked: Path, ensemble, tmp_path) -> None:
    train(base, ranked, tmp_path, loss="rankings")
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / file).read_bytes() == (ensemble[0] / file).read_bytes()
    assert Reading.of(tmp_path / "adapter") == Reading(max_length=1024)


def test_disagreement_that_knows_the_errors_says_so() -> None:
    """Members agree where both are right and differ where their mean is wrong."""
    differences = np.array([[1.0] * 8 + [3.0, 2.5], [1.2] * 8 + [-4.0, -4.0]])
    facts = ensemble_facts(differences)
    assert facts["errors_by_disagreement"] == 1.0
    assert facts["errors_by_closeness"] == pytest.approx(1.0)
    assert facts["member_accuracies"] == [1.0, 0.8]
    assert disagreement(differences[:1]) == pytest.approx(np.zeros(10))


def test_a_scorer_of_the_head_reads_the_same_number(base: Path, ensemble) -> None:
    """What PPO reads off the weights, token by token, is what the sequence classifier says."""
    weights = member_folders(ensemble[0] / "adapter")[1]
    model, tokenizer = load_reward_model(base, "float32", weights), load_tokenizer(base)
    ids = tokens_of(tokenizer, PROMPTS[:5], SAID[:5])
    rows = Rows.of([row[:3] for row in ids], [row[3:] for row in ids], tokenizer.pad_token_id)
    with torch.no_grad():
        read = Scorer(model, "default", linear_head(score_head(weights))).scores(rows, tokenizer.pad_token_id)
    assert read.numpy() == pytest.approx(reward_scores(model, tokenizer, PROMPTS[:5], SAID[:5]), abs=1e-5)


def test_a_policy_is_given_the_mean_less_the_uncertainty(base: Path, ensemble) -> None:
    """Adapters of all members over the policy's base read what the evaluation reads, on either scale."""
    weights = ensemble[0] / "adapter"
    policy = get_peft_model(load_policy(base, "float32"), lora_config(LORA, base, "CAUSAL_LM"))
    tokenizer, reading = load_tokenizer(base), Reading.of(weights)
    ids = tokens_of(tokenizer, PROMPTS[:6], SAID[:6])
    rows = Rows.of([row[:3] for row in ids], [row[3:] for row in ids], tokenizer.pad_token_id)
    expected = RewardModel(base, "float32", weights).careful_scores(PROMPTS[:6], SAID[:6])

    def member(name: str, folder: Path) -> Scorer:
        add_adapter(policy, name, folder)
        return Scorer(policy, name, linear_head(score_head(folder)))

    scorer = careful_scorer(member("reward", weights), weights, member, scaled=True)
    with torch.no_grad():
        read = scorer.scores(rows, tokenizer.pad_token_id).numpy()
        plain = CarefulScorer(members_of(scorer), Reading(members=2, penalty=2.0))
        raw = plain.scores(rows, tokenizer.pad_token_id).numpy()
    assert read == pytest.approx(expected, abs=1e-5)
    assert (raw - reading.mean) / reading.deviation == pytest.approx(expected, abs=1e-5)
    assert known_moments(PPO(), ensemble[0]) == Moments(reading.mean, reading.deviation)
    assert known_moments(PPO(normalise_reward=0), ensemble[0]) is None
