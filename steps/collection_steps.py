"""The work of a round of collection: the policy's answers are drawn, and judges that are not people judge them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from steps.artifact import MANIFEST, Facts, digest_file
from steps.collection import SAMPLES, SCORES, VERDICTS, duels
from steps.config import Evaluate, Sampling
from steps.datasets import read_table, write_table
from steps.judges import Comparison, GoldJudge, RewardJudge, ScoringJudge, make_judge, usage_facts
from steps.models import ADAPTER, load_policy, load_tokenizer
from steps.paths import Var
from steps.policy_prompt import asked_after
from steps.reward_model import RewardModel
from steps.sampling import sample
from steps.tracking import Tracker


def draw_answers(
    sampling: Sampling,
    dtype: str,
    per_prompt: int,
    *,
    base: Path,
    policy: Path,
    asked: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
) -> Facts:
    """Several answers of a policy to each prompt: SAMPLES, a table of prompt, answer, tokens.

    Every answer has random numbers of its own, by the seed and its place in the table.

    Args:
        policy: folder that holds the weights.
        asked: table of prompt.
    """
    prompts = list(read_table(asked, columns=["prompt"])["prompt"])
    each = [prompt for prompt in prompts for _ in range(per_prompt)]
    after = asked_after(policy / ADAPTER)
    model, tokenizer = load_policy(base, dtype, policy / ADAPTER), load_tokenizer(base)
    said = sample(model, tokenizer, each, sampling, seed, tracker, "answers", after=after)
    write_table(pd.DataFrame({"prompt": each, "answer": said.texts, "tokens": said.lengths}), out / SAMPLES)
    facts = {
        "prompts": len(prompts),
        "samples": len(each),
        "tokens": float(said.lengths.mean()),
        "ended": float((said.lengths < sampling.max_new_tokens).mean()),
    }
    tracker.metrics(facts, 0)
    return facts


def score_answers(
    judge: str,
    dtype: str,
    *,
    candidates: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
    base: Path | None = None,
    reward: Path | None = None,
    gold: Path | None = None,
) -> Facts:
    """A number for each answer, by `gold` or `reward`: SCORES, the table of candidates with a column score.

    Args:
        candidates: table of prompt, answer, own.
        base, reward: for the judge `reward`, which is what policies are given: an ensemble less its uncertainty.
        gold: for the judge `gold`, table of answer, score.
    """
    table = read_table(candidates)
    tracker.progress("judging", 0, len(table))
    by: ScoringJudge
    if judge == "gold":
        assert gold is not None
        by = GoldJudge.from_table(gold)
    else:
        assert base is not None and reward is not None
        model = RewardModel(base, dtype, reward / ADAPTER)
        by = RewardJudge(model.careful_scores, digest_file(reward / MANIFEST))
    scores = by.score(list(table["prompt"]), list(table["answer"])) if len(table) else np.zeros(0)
    write_table(table.assign(score=scores), out / SCORES)
    tracker.progress("judging", len(table), len(table))
    return {"identity": by.identity, "labels": len(table)}


def compare_answers(evaluate: Evaluate, *, candidates: Path, seed: int, out: Path, tracker: Tracker) -> Facts:
    """A verdict on every two answers of a prompt, by the recipe's language model: VERDICTS.

    Each is asked in both orders and kept in the project's store as it comes, so that an interruption loses none.

    Args:
        evaluate: its judge is `llm`.
        candidates: table of prompt, answer, own.
    """
    table = duels(read_table(candidates))
    tracker.progress("judging", 0, len(table))
    judge = make_judge(evaluate, gold=None, reward_scores=None, reward_identity="", verdicts=Var().folder("verdicts"))
    said = judge.compare([Comparison(*row) for row in table[["prompt", "first", "second"]].itertuples(index=False)])
    write_table(table.assign(preference=[float(one.preference) for one in said]), out / VERDICTS)
    tracker.progress("judging", len(table), len(table))
    return {"identity": judge.identity, "labels": len(table), **usage_facts(judge)}
