"""SLiC-HF: pairs are pulled apart by a margin, and what SFT imitates is held on to; no reference model.

Zhao et al. 2023, arXiv:2305.10425. "Direct" learns from people's pairs; "sample-rank" from answers of the SFT model
itself, of which a reward model ranks one first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from steps.artifact import Facts
from steps.backbone import answer_tokens
from steps.config import Sampling
from steps.datasets import read_table
from steps.errors import DataError
from steps.models import ADAPTER, device, load_policy, load_tokenizer
from steps.pair_methods import TARGET, learn
from steps.pairs import COLUMNS, training_and_held_out
from steps.policy_config import Relative
from steps.reward_model import Reading
from steps.reward_scorers import members_of, reward_scorer
from steps.rollouts import AnswerReward, prompts_of
from steps.sampling import sample
from steps.tracking import Tracker

CANDIDATES = "candidates.parquet"  # prompt, answer, reward: what sample-rank drew


def tune_on_human_pairs(
    relative: Relative, method: str, dtype: str, *, preferences: Path, demonstrations: Path, **step: Any
) -> Facts:
    """SLiC-HF-direct from the SFT model.

    Args:
        preferences: table of prompt, chosen, rejected, margin, part.
        demonstrations: table of prompt, completion: what the λ term holds on to.
        step: as `steps.dpo.learn_from_pairs` has it.
    """
    train, held_out, batch = training_and_held_out(preferences, relative)
    train = with_targets(train, relative, demonstrations, step["base"], step["seed"])
    return learn(relative, method, (train, held_out, batch), dtype, **step)


def tune_on_ranked_samples(
    relative: Relative,
    method: str,
    dtype: str,
    *,
    preferences: Path,
    demonstrations: Path,
    reward: Path,
    **step: Any,
) -> Facts:
    """SLiC-HF-sample-rank from the SFT model; the prompts are those of the training pairs.

    Args:
        reward: the reward step's artifact, which ranks the candidates.
    """
    _, held_out, batch = training_and_held_out(preferences, relative)
    kept = step["out"] / CANDIDATES
    if not kept.is_file():  # a resumed run has them
        found = draw_candidates(relative, dtype, preferences=preferences, reward=reward, **_given(step))
        found.to_parquet(kept.with_suffix(".partial"), index=False)
        kept.with_suffix(".partial").rename(kept)
    candidates = read_table(kept)
    pairs = best_against_others(candidates).head(relative.pairs)
    if pairs.empty:
        raise DataError(
            "no two candidates differ",
            where=str(kept),
            have=f"{len(candidates)} answers to {candidates['prompt'].nunique()} prompts",
            then="raise policy.slic_sample_rank.temperature",
        )
    longest = pairs[["chosen", "rejected"]].map(len).max(axis=1).sort_values(kind="stable")
    train = Dataset.from_pandas(pairs.loc[longest.index, COLUMNS], preserve_index=False)
    train = with_targets(train, relative, demonstrations, step["base"], step["seed"])
    facts = learn(relative, method, (train, held_out, batch), dtype, **step)
    return {**facts, "candidates": len(candidates), "ranked_prompts": int(candidates["prompt"].nunique())}


def _given(step: dict[str, Any]) -> dict[str, Any]:
    return {name: step[name] for name in ("base", "sft", "seed", "tracker")}


def draw_candidates(
    relative: Relative,
    dtype: str,
    *,
    base: Path,
    sft: Path,
    reward: Path,
    preferences: Path,
    seed: int,
    tracker: Tracker,
) -> pd.DataFrame:
    """The SFT model's answers to as many training prompts as give the recipe's number of pairs: prompt, answer, reward.

    Candidates of one prompt stand together. The reward model reads an answer that was cut off as if it ended there; of
    an ensemble the reward is less its uncertainty.
    """
    own, tokenizer = relative.loss, load_tokenizer(base)
    prompts = prompts_of(preferences, at_least=1)
    if relative.pairs is not None:
        prompts = prompts[: math.ceil(relative.pairs / (own["candidates"] - 1))]
    asked = [prompt for prompt in prompts for _ in range(own["candidates"])]
    drawing = {name: own[name] for name in ("temperature", "max_new_tokens", "batch_size")}
    sampling = Sampling(prompts=max(len(asked), 2), **drawing)
    model = load_policy(base, dtype, sft / ADAPTER)
    said = sample(model, tokenizer, asked, sampling, seed, tracker, "candidates", sampling.temperature)
    ranker = reward_scorer(model, base, dtype, reward / ADAPTER)
    for one in members_of(ranker):
        one.model.eval()
        one.head.to(device())
    scores: list[float] = []
    score = AnswerReward(ranker, tokenizer, 32, Reading.of(reward / ADAPTER).max_length)
    for first in range(0, len(asked), 256):
        rows = slice(first, first + 256)
        scores += score(asked[rows], None, said.tokens[rows])
        tracker.progress("ranking", min(first + 256, len(asked)), len(asked))
    return pd.DataFrame({"prompt": asked, "answer": said.texts, "reward": scores})


def best_against_others(candidates: pd.DataFrame) -> pd.DataFrame:
    """Of every prompt's candidates the one with the highest reward against each other answer, said once: pairs.

    Args:
        candidates: prompt, answer, reward.

    Returns:
        prompt, chosen, rejected; prompts in the order they came.
    """
    once = candidates.drop_duplicates(["prompt", "answer"]).reset_index(drop=True)
    best = once.loc[once.groupby("prompt", sort=False)["reward"].idxmax(), ["prompt", "answer"]]
    pairs = once.merge(best.rename(columns={"answer": "chosen"}), on="prompt").rename(columns={"answer": "rejected"})
    return pairs.loc[pairs["chosen"] != pairs["rejected"], COLUMNS].reset_index(drop=True)


def with_targets(train: Dataset, relative: Relative, demonstrations: Path, base: Path, seed: int) -> Dataset:
    """Training pairs with a demonstration beside each, drawn by the seed; as they are where the λ term needs none.

    Pairs are sorted by length, and so are the demonstrations drawn for them: that saves padding.

    Args:
        demonstrations: table of prompt, completion.

    Raises:
        DataError: there are no demonstrations.
    """
    if relative.loss["target"] == "chosen" or not relative.loss["lam"]:
        return train
    table = read_table(demonstrations)
    if table.empty:
        raise DataError(
            "there are no demonstrations to hold on to",
            where=str(demonstrations),
            then="add data, or set target=chosen in the method's section",
        )
    order = np.random.default_rng(seed).permutation(len(table))
    drawn = table.iloc[np.resize(order, len(train))]
    lengths = drawn["prompt"].map(len) + drawn["completion"].map(len)
    drawn = drawn.iloc[lengths.to_numpy().argsort(kind="stable")]
    asked, said = answer_tokens(load_tokenizer(base), list(drawn["prompt"]), list(drawn["completion"]))
    longest = relative.trainer.get("max_length", 1024)  # TRL's default
    if longest is not None:
        said = [ids[: max(longest - len(before), 1)] for before, ids in zip(asked, said, strict=True)]
        asked = [before[-(longest - 1) :] for before in asked]
    return train.add_column(TARGET[0], asked).add_column(TARGET[1], said)
