"""What online collection comes to: labels and their budget, pairs from a judge's word, when to stop. Pure functions.

A round samples several answers of the current policy to prompts of the training pairs, lets a judge say which are
better, and makes pairs of that (Ziegler et al. 2019, arXiv:1909.08593, §2.3; Guo et al. 2024, arXiv:2402.04792). Best
against worst of K answers is the on-policy pair of Dong et al. 2024, arXiv:2405.07863, §3; the best of them against
the answer the data hold is the off-policy one.

A label is one thing a judge is asked. `reward` and `gold` score answers: a label is one answer. `llm` and `file`
compare: a label is one comparison of two answers, which `llm` is shown in both orders. Answers to a prompt that are the
same text are one answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd

from steps.datasets import REGISTRY, Dataset
from steps.errors import DataError, PrefloopError, did_you_mean
from steps.formats import MARKS, as_answer
from steps.judges import TIE_WIDTH
from steps.sections import Section
from steps.self_play import win_rates
from steps.split import unit_hash

SCORING, COMPARING = ("gold", "reward"), ("file", "llm")  # judges, by what one label of theirs is
ON, OFF = "on-policy", "off-policy"
SAMPLES, SCORES, VERDICTS = "samples.parquet", "scores.parquet", "verdicts.parquet"  # what the work of a round leaves
Stopped = Literal["rounds", "labels", "prompts", "patience"]


class Collecting(Section):
    """How a collection goes on, and when it ends.

    Attributes:
        judge: `gold`, `reward`, `llm`, or `file` for people.
        per_prompt: K, answers drawn to each prompt.
        prompts: of one round, at most.
        pairs: `both`, `on-policy` (best against worst of the K) or `off-policy` (best against the data's answer).
        rounds: of the whole collection.
        labels: budget of the whole collection; None for as many as the rounds need.
        patience: rounds in a row without a new champion after which it ends.
    """

    judge: str = "gold"
    per_prompt: int = 4
    prompts: int = 64
    pairs: str = "both"
    rounds: int = 1
    labels: int | None = None
    patience: int = 2


def check(how: Collecting) -> None:
    """Refuse what no round can be made of.

    Raises:
        PrefloopError: no such judge, fewer than two answers a prompt, or a budget smaller than a round.
    """
    judges = sorted((*SCORING, *COMPARING))
    if how.judge not in judges:
        raise PrefloopError(f"there is no judge '{how.judge}'", where="--judge", have=did_you_mean(how.judge, judges))
    if how.pairs not in (kinds := ("both", ON, OFF)):
        raise PrefloopError(f"there are no pairs '{how.pairs}'", where="--pairs", have=did_you_mean(how.pairs, kinds))
    if how.per_prompt < 2:
        raise PrefloopError(
            "a pair needs two answers to a prompt", where="--per-prompt", have=str(how.per_prompt), then="2 or more"
        )
    for name in ("prompts", "rounds", "patience"):
        if getattr(how, name) < 1:
            raise PrefloopError(f"--{name} begins at 1", where=f"--{name}", have=str(getattr(how, name)))
    if how.labels is not None and how.labels < labels_of(how, how.prompts):
        raise PrefloopError(
            "the budget is smaller than one round",
            where="--labels",
            have=f"{how.labels:,} labels, and a round may take {labels_of(how, how.prompts):,}: "
            f"{labels_a_prompt(how)} for each of {how.prompts:,} prompts",
            then="raise --labels, or lower --prompts or --per-prompt",
        )


# -- labels ------------------------------------------------------------------------------------------------------


def labels_a_prompt(how: Collecting) -> int:
    """Most labels one prompt may take: n answers, or n (n − 1) / 2 comparisons, with n = K, and 1 for the data's."""
    answers = how.per_prompt + (how.pairs != ON)
    return answers if how.judge in SCORING else answers * (answers - 1) // 2


def labels_of(how: Collecting, prompts: int) -> int:
    """Most labels so many prompts may take."""
    return prompts * labels_a_prompt(how)


def labels_in(candidates: pd.DataFrame, judge: str) -> int:
    """Labels that answers to be judged take.

    Args:
        candidates: as `candidates` makes them.
    """
    return len(candidates) if judge in SCORING else len(duels(candidates))


# -- what is asked -----------------------------------------------------------------------------------------------


def prompts_left(preferences: pd.DataFrame, asked: Iterable[str], seed: int) -> pd.DataFrame:
    """Prompts of the training pairs that were not sampled yet, in an order set by hashes alone.

    Args:
        preferences: table of prompt, chosen, part; held-out pairs among them.

    Returns:
        prompt, and response: what the data's first pair of that prompt says is the better answer.

    Raises:
        DataError: the dataset has no training pairs.
    """
    train = preferences[preferences["part"] == "train"]
    if train.empty:
        raise DataError(
            "the dataset has no training pairs, and their prompts are what is sampled",
            have=f"{len(preferences):,} pairs, none of them for training",
            then="add pairs, or raise the share `preferences` under `split:` in data/datasets.yaml",
        )
    first = train.drop_duplicates("prompt").set_index("prompt")["chosen"]
    done = set(asked)
    order = sorted((unit_hash(seed, prompt), prompt) for prompt in first.index if prompt not in done)
    prompts = [prompt for _, prompt in order]
    return pd.DataFrame({"prompt": prompts, "response": first.reindex(prompts).to_numpy()}, dtype="object")


def round_seed(seed: int, number: int) -> int:
    """The seed of a round's answers, below 2³¹."""
    return int(unit_hash("round", seed, number) * 2**31)


def candidates(
    asked: pd.DataFrame, samples: pd.DataFrame, how: Collecting, fit: Callable[[str], bool] = bool
) -> pd.DataFrame:
    """The answers to be judged: of every prompt the policy's, then the data's where off-policy pairs are wanted.

    Texts that nobody would call different, by case, spaces and outer punctuation, are one answer, the policy's first;
    a prompt with a single answer is left out, for nothing can be said of it.

    Args:
        asked: prompt, response.
        samples: prompt, answer.
        fit: whether a row could hold a text.

    Returns:
        prompt, answer, own (whether the policy said it); prompts in the order of `asked`.
    """
    said: dict[str, list[tuple[str, bool]]] = {prompt: [] for prompt in asked["prompt"]}
    for prompt, answer in zip(samples["prompt"], samples["answer"], strict=True):
        said[prompt].append((as_answer(prompt, answer), True))
    if how.pairs != ON:
        for prompt, response in zip(asked["prompt"], asked["response"], strict=True):
            said[prompt].append((response, False))
    rows = []
    for prompt, answers in said.items():
        usable = [one for one in answers if fit(one[0]) and not _goes_on(prompt, one[0])]
        once = _once(usable)
        rows += [(prompt, answer, own) for answer, own in once] if len(once) > 1 else []
    return pd.DataFrame(rows, columns=["prompt", "answer", "own"])


def _goes_on(prompt: str, text: str) -> bool:
    """Whether an answer in a dialogue speaks for the next turns too, so that no transcript could hold it."""
    return prompt.endswith(MARKS["assistant"]) and any(mark in text for mark in MARKS.values())


def _once(answers: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Answers without those that only spell an earlier one otherwise."""
    import pyarrow as pa

    from steps.rows import hashes

    if not answers:
        return []
    keys = hashes(pa.chunked_array([pa.array([text for text, _ in answers], pa.large_string())]))
    named = [key or text for key, (text, _) in zip(keys.tolist(), answers, strict=True)]
    return [one for place, one in enumerate(answers) if named[place] not in named[:place]]


def duels(candidates: pd.DataFrame) -> pd.DataFrame:
    """Every two answers of every prompt: prompt, first, second."""
    rows = [
        (prompt, first, second)
        for prompt, answers in candidates.groupby("prompt", sort=False)["answer"]
        for first, second in combinations(answers, 2)
    ]
    return pd.DataFrame(rows, columns=["prompt", "first", "second"])


# -- what was said -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """The n answers to a prompt, and what a judge said of them.

    Attributes:
        own: (n,) whether the policy said it.
        scores: (n,) the judge's, or of a judge that compares an answer's win rate among the others.
        preferred: (n, n) 1 where the answer of the row is better than that of the column, ½ for a tie, 0 else.
    """

    prompt: str
    answers: Sequence[str]
    own: np.ndarray
    scores: np.ndarray
    preferred: np.ndarray


@dataclass(frozen=True)
class Pair:
    """A comparison to learn from.

    Attributes:
        kind: `on-policy` or `off-policy`.
        scores: of the chosen and of the rejected answer.
    """

    prompt: str
    chosen: str
    rejected: str
    kind: str
    scores: tuple[float, float]

    @property
    def margin(self) -> float:
        return self.scores[0] - self.scores[1]


def by_scores(scored: pd.DataFrame, tie_width: float = TIE_WIDTH) -> list[Judged]:
    """What a judge says that gives answers numbers; two within the width of a tie are alike.

    Args:
        scored: prompt, answer, own, score.

    Raises:
        PrefloopError: a score is not a number.
    """
    if not np.isfinite(scored["score"].to_numpy(float)).all():
        raise PrefloopError(
            "the judge gave a score that is not a number",
            have=f"{int((~np.isfinite(scored['score'])).sum())} of {len(scored)}",
            then="look at the judge's weights: training may have diverged",
        )
    found = []
    for prompt, rows in scored.groupby("prompt", sort=False):
        scores = rows["score"].to_numpy(float)
        difference = scores[:, None] - scores[None, :]
        preferred = np.where(np.abs(difference) <= tie_width, 0.5, difference > 0)
        found.append(Judged(str(prompt), list(rows["answer"]), rows["own"].to_numpy(bool), scores, preferred))
    return found


def by_verdicts(candidates: pd.DataFrame, verdicts: pd.DataFrame) -> tuple[list[Judged], int]:
    """What a judge says that compares: an answer's score is its win rate among the others of its prompt.

    Args:
        candidates: prompt, answer, own.
        verdicts: prompt, first, second, preference (for the first; NaN without a verdict), for every two answers.

    Returns:
        what was said of every prompt, and how many prompts are left out for a verdict is missing.
    """
    said = {
        (prompt, first, second): preference
        for prompt, first, second, preference in verdicts[["prompt", "first", "second", "preference"]].itertuples(
            index=False
        )
    }
    found, silent = [], 0
    for prompt, rows in candidates.groupby("prompt", sort=False):
        answers = list(rows["answer"])
        preferred = np.full((len(answers), len(answers)), 0.5)
        for (i, first), (j, second) in combinations(enumerate(answers), 2):
            preferred[i, j] = said[str(prompt), first, second]
            preferred[j, i] = 1 - preferred[i, j]
        if np.isnan(preferred).any():
            silent += 1
            continue
        found.append(Judged(str(prompt), answers, rows["own"].to_numpy(bool), win_rates(preferred), preferred))
    return found, silent


def pairs_of(judged: Iterable[Judged], kinds: str) -> tuple[list[Pair], int]:
    """The pairs a judge's word makes, and the ties among them, which make none.

    On-policy the best of the policy's answers against the worst of them, off-policy against the data's answer,
    whichever of the two is better. The judge must have preferred the chosen side to that very rejected one: of judges
    that compare, the answer that wins most often need not have won against each.

    Args:
        kinds: `both`, `on-policy` or `off-policy`.
    """
    pairs, ties = [], 0
    for one in judged:
        own = np.flatnonzero(one.own)
        if not len(own):
            continue
        best, worst = own[one.scores[own].argmax()], own[one.scores[own].argmin()]
        wanted = [(ON, worst)] if len(own) > 1 and kinds != OFF else []
        wanted += [(OFF, place) for place in np.flatnonzero(~one.own) if kinds != ON]
        for kind, other in wanted:
            chosen, rejected = (best, other) if one.preferred[best, other] >= 0.5 else (other, best)
            if best == other or one.preferred[chosen, rejected] != 1 or (kind == ON and chosen != best):
                ties += 1
                continue
            scores = float(one.scores[chosen]), float(one.scores[rejected])
            pairs.append(Pair(one.prompt, one.answers[chosen], one.answers[rejected], kind, scores))
    return pairs, ties


# -- rows --------------------------------------------------------------------------------------------------------

# A pair as a record of a format that says which of two answers is better.
RECORDS: dict[str, Callable[[Pair], dict[str, Any]]] = {
    "preferences": lambda pair: {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected},
    "hh": lambda pair: {"chosen": pair.prompt + pair.chosen, "rejected": pair.prompt + pair.rejected},
    "comparisons": lambda pair: {
        "prompt": pair.prompt,
        "answers": [pair.chosen, pair.rejected],
        "preference": [1],
    },
    "rankings": lambda pair: {"prompt": pair.prompt, "answers": [pair.chosen, pair.rejected], "ranks": [1, 2]},
}


def check_takes_pairs(name: str, entry: Dataset) -> None:
    """Refuse a dataset whose format has no record for a pair.

    Raises:
        DataError: saying why.
    """
    if entry.format in RECORDS and not entry.prompt:
        return
    raise DataError(
        f"collected pairs cannot be written for '{name}'",
        where=str(REGISTRY),
        have="its prompts are made from a template"
        if entry.format in RECORDS
        else f"its format is {entry.format}; a pair can be a record of {', '.join(RECORDS)}",
        then="collect into a dataset of preferences: docs/collection.md shows how to make one of another's pairs",
    )


def batch(pairs: Iterable[Pair], entry: Dataset, judge: str, origin: Mapping[str, Any]) -> str:
    """Pairs as JSON lines of a dataset's format, each with where it came from under `collected`.

    The margin stays there, for it is on the judge's scale: a row's own `margin` is people's, which recipes filter by.

    Args:
        origin: what all of them share: model, round, judge, seeds.
    """
    lines = []
    for pair in pairs:
        fields = {entry.columns.get(name, name): value for name, value in RECORDS[entry.format](pair).items()}
        where = {**origin, "kind": pair.kind, "scores": list(pair.scores), "margin": pair.margin}
        record = {**fields, entry.columns.get("annotator", "annotator"): f"judge {judge}", "collected": where}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


# -- rounds ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """What a round came to.

    Attributes:
        sampled: address of the model whose answers were judged.
        policy_digest: of its weights.
        samples: answers drawn; `candidates` of them, and of the data's, were judged.
        silent: prompts left out for the judge came to no verdict.
        margin: mean difference of the two sides' scores; None without pairs.
        rows: by which the dataset's valid rows grew; `quarantined` those set aside.
        trained: address of the model that was trained on the new version; empty where nothing was.
        win_rate: of that model against its start; champion_win_rate: against the champion it met.
    """

    number: int
    sampled: str
    policy_digest: str
    prompts: int
    samples: int
    candidates: int
    labels: int
    on_policy: int
    off_policy: int
    ties: int
    silent: int = 0
    margin: float | None = None
    rows: int = 0
    quarantined: int = 0
    trained: str = ""
    promoted: bool = False
    win_rate: float | None = None
    champion_win_rate: float | None = None

    @property
    def pairs(self) -> int:
        return self.on_policy + self.off_policy

    def metrics(self) -> dict[str, float]:
        """The round as MLflow has it."""
        values = {
            "labels": self.labels,
            "pairs": self.pairs,
            "pairs/on-policy": self.on_policy,
            "pairs/off-policy": self.off_policy,
            "ties": self.ties,
            "silent": self.silent,
            "rows": self.rows,
            "quarantined": self.quarantined,
            "reward_margin": self.margin,
            "win_rate": self.win_rate,
            "champion_win_rate": self.champion_win_rate,
            "promoted": self.promoted,
        }
        return {name: float(value) for name, value in values.items() if value is not None}


def labels_used(done: Sequence[Round]) -> int:
    return sum(one.labels for one in done)


def quiet(done: Sequence[Round]) -> int:
    """How many rounds in a row, up to the last, made no champion."""
    return next((back for back, one in enumerate(reversed(done)) if one.promoted), len(done))


def stopped(how: Collecting, done: Sequence[Round], left: int) -> Stopped | None:
    """Why a collection is at its end, or None when another round is due.

    Args:
        left: prompts that were not sampled yet; a last round may be smaller for want of them, never for want of labels.
    """
    if len(done) >= how.rounds:
        return "rounds"
    if quiet(done) >= how.patience:
        return "patience"
    if not left:
        return "prompts"
    due = labels_of(how, min(how.prompts, left))
    return "labels" if how.labels is not None and labels_used(done) + due > how.labels else None


def in_words(why: Stopped, how: Collecting, done: Sequence[Round]) -> str:
    """Why it ended, for whoever asked for it."""
    used = f"{labels_used(done):,} labels used"
    if why == "rounds":
        return f"all {how.rounds} rounds are done; {used}"
    if why == "patience":
        return f"no new champion in {quiet(done)} rounds in a row; {used}"
    if why == "prompts":
        return f"every prompt of the training pairs was sampled in the {len(done)} rounds before; {used}"
    return f"the labels left do not pay for another round; {used} of {how.labels:,}"
