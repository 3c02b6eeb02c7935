"""Did tuning help? Both models answer the same held-out prompts with the same seeds; a judge compares the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steps.artifact import Facts
from steps.config import Evaluate
from steps.errors import DataError
from steps.judges import GoldJudge
from steps.models import ADAPTER, load_policy, load_reward_model, load_tokenizer
from steps.sampling import sample
from steps.statistics import distinct, wilson, win_rate
from steps.tracking import Tracker

COMPLETIONS = "completions.parquet"


@torch.no_grad()
def reward_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    batch_size: int = 50,
) -> np.ndarray:
    """(n,) what the reward model gives each answer to its prompt."""
    model.eval()
    texts = [p + a + tokenizer.eos_token for p, a in zip(prompts, answers, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    scores = np.zeros(len(texts))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        inputs = tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, padding_side="right")
        scores[rows] = model(**inputs.to(model.device)).logits.squeeze(-1).float().cpu().numpy()
    return scores


def evaluate_policy(
    evaluate: Evaluate,
    dtype: str,
    *,
    base: Path,
    sft: Path,
    reward: Path,
    policy: Path,
    prompts: Path,
    preferences: Path,
    gold: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
    champion: Path | None = None,
) -> Facts:
    """Sample, judge, and say with what confidence the policy beats its start (and the champion, where there is one).

    Args:
        prompts: table of held-out prompts.
        preferences: its held-out pairs tell how far the judge agrees with people.
        gold: table of answer, score for the judge.
        champion: directory that holds the champion's adapter.

    Raises:
        DataError: fewer held-out prompts than the recipe asks for.
    """
    asked = list(pd.read_parquet(prompts)["prompt"].head(evaluate.prompts))
    if len(asked) < evaluate.prompts:
        raise DataError(
            "too few held-out prompts",
            where=str(prompts),
            have=f"{len(asked)}, the recipe asks for {evaluate.prompts}",
            then=f"lower evaluate.prompts to {len(asked)}, or add data",
        )
    tokenizer = load_tokenizer(base)
    contestants = {"start": sft / ADAPTER, "policy": policy / ADAPTER}
    if champion is not None:
        contestants["champion"] = champion / ADAPTER
    table = pd.DataFrame({"prompt": asked})
    for name, adapter in contestants.items():
        model = load_policy(base, dtype, adapter)
        table[name], table[f"{name}_tokens"] = sample(model, tokenizer, asked, evaluate, seed, tracker, name)

    tracker.progress("judging", 0, 1)
    ratings = pd.read_parquet(gold)
    judge = GoldJudge(list(ratings["answer"]), list(ratings["score"]))
    proxy = load_reward_model(base, dtype, reward / ADAPTER)
    for name in contestants:
        table[f"{name}_gold"] = judge.score(list(table[name]))
        table[f"{name}_reward"] = reward_scores(proxy, tokenizer, asked, list(table[name]))
    table.to_parquet(out / COMPLETIONS, index=False)
    tracker.progress("judging", 1, 1)

    human = pd.read_parquet(preferences)
    human = human[human["part"] == "held_out"]
    judge_accuracy = judge.accuracy(human)
    judge_low, judge_high = wilson(judge_accuracy * len(human), len(human))
    verdict = win_rate(table["policy_gold"], table["start_gold"], evaluate.confidence)
    by_reward = win_rate(table["policy_reward"], table["start_reward"], evaluate.confidence)
    facts = {
        **{f"win_rate_{name}": value for name, value in asdict(verdict).items() if name != "rate"},
        "win_rate": verdict.rate,
        "win_rate_by_reward": by_reward.rate,
        "confidence": evaluate.confidence,
        "judge": evaluate.judge,
        "judge_accuracy": judge_accuracy,
        "judge_accuracy_low": judge_low,
        "judge_accuracy_high": judge_high,
        "prompts": len(asked),
        "length_ratio": float(table["policy_tokens"].mean() / max(table["start_tokens"].mean(), 1e-9)),
    }
    for name in contestants:
        facts |= {
            f"{name}_tokens": float(table[f"{name}_tokens"].mean()),
            f"{name}_gold": float(table[f"{name}_gold"].mean()),
            f"{name}_reward": float(table[f"{name}_reward"].mean()),
            f"{name}_distinct_2": distinct(list(table[name]), 2),
            f"{name}_ended": float((table[f"{name}_tokens"] < evaluate.max_new_tokens).mean()),
        }
    if champion is not None:
        duel = win_rate(table["policy_gold"], table["champion_gold"], evaluate.confidence)
        facts |= {
            "champion_win_rate": duel.rate,
            "champion_win_rate_low": duel.low,
            "champion_win_rate_high": duel.high,
        }
    return facts
