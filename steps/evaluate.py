"""Did tuning help? The step that lets policy, start, champion and people's own answers meet, and sums up what came."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from steps.artifact import COMPLETIONS, MANIFEST, Facts, digest_file
from steps.baseline import held_out_prompts
from steps.baseline import read as read_baseline
from steps.best_of_n import PICKS, answers_drawn, curve
from steps.classifier import load_classifier
from steps.config import Evaluate
from steps.contest import CHAMPION, HUMAN, POLICY, START, Contest, Contestant, Scores
from steps.datasets import read_table
from steps.divergence import divergence
from steps.intervals import bootstrap_interval
from steps.judge_validation import validate
from steps.judges import GoldJudge, make_judge, usage_facts
from steps.length_control import length_controlled_win_rate
from steps.models import ADAPTER, load_policy, load_tokenizer
from steps.paths import Var
from steps.policy_prompt import asked_after
from steps.power import detectable_effect
from steps.reward_model import RewardModel
from steps.statistics import (
    OTHER,
    WinRate,
    best_of_n_kl,
    distinct,
    few_groups,
    holm,
    repetition,
    rouge,
    win_rate,
    win_rate_by,
    won,
)
from steps.tracking import Tracker

EVALUATION = "evaluation.json"
GOLD, REWARD = "gold", "reward"


def evaluate_policy(
    evaluate: Evaluate,
    dtype: str,
    *,
    base: Path,
    baseline: Path,
    reward: Path,
    policy: Path,
    prompts: Path,
    preferences: Path,
    gold: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
    sft: Path | None = None,
    champion: Path | None = None,
    classifier: Path | None = None,
) -> Facts:
    """Sample, judge, and say with what confidence the policy beats its start, its champion and people's own answers.

    Args:
        baseline: the start's answers to the same prompts.
        prompts: table of held-out prompts.
        preferences: its held-out pairs tell how far the judge agrees with people, and hold people's own answers.
        gold: table of answer, score that no training step saw; it may be empty where `evaluate.judge` is not `gold`.
        sft: the start; None where that is the base, for the policy is the SFT model.
        champion: directory that holds the champion's weights.
        classifier: a reward model somebody else trained, for the judge `reward`.

    Raises:
        DataError: fewer held-out prompts than the recipe asks for.
    """
    asked = held_out_prompts(prompts, evaluate.prompts)
    human = read_table(preferences)
    human = human[human["part"] == "held_out"]
    tokenizer, proxy = load_tokenizer(base), RewardModel(base, dtype, reward / ADAPTER)
    scores: dict[str, Scores] = {REWARD: proxy.careful_scores}  # by which the best of n is picked
    by_people = GoldJudge.from_table(gold) if pq.read_metadata(gold).num_rows else None
    if by_people is not None:
        scores[GOLD] = by_people.score
    stranger = load_classifier(classifier) if classifier is not None else None
    judge = make_judge(
        evaluate,
        gold=by_people,
        reward_scores=stranger.scores if stranger else proxy.scores,
        reward_identity=stranger.identity if stranger else digest_file(reward / MANIFEST),
        verdicts=Var().folder("verdicts") if evaluate.judge == "llm" else out,
    )
    models = contestants(base, dtype, start=sft, policy=policy, champion=champion)
    models[START] = replace(models[START], said=read_baseline(baseline))
    if champion is not None and (champion / ADAPTER / PICKS).is_dir():
        its_own = RewardModel(base, dtype, champion / ADAPTER / PICKS)
        models[CHAMPION] = replace(models[CHAMPION], picks=its_own.careful_scores)
    own_words = human.drop_duplicates("prompt").set_index("prompt")["chosen"].to_dict()
    contest = Contest(evaluate, models, tokenizer, own_words, judge, scores, seed, tracker)

    report = validate(judge, human.head(evaluate.judge_pairs or len(human)), evaluate.confidence)
    table = contest.hold(list(asked["prompt"]))
    table.to_parquet(out / COMPLETIONS, index=False)
    facts = {
        "judge": evaluate.judge,
        "confidence": evaluate.confidence,
        **report.facts(),
        **comparisons(table, evaluate, seed),
        **by_groups(table[f"over_{START}"], asked, evaluate.confidence),
        **about_answers(table, evaluate),
        **moved(contest, table, evaluate),
        **at_temperatures(contest, table, evaluate),
        **best_of(contest, table, evaluate),
        **usage_facts(judge),
    }
    if evaluate.stop_early:
        facts["win_rate_low"], facts["win_rate_high"] = contest.test.interval
    if GOLD in scores:
        trace(policy, scores, tracker)
    numbers = {name: value for name, value in facts.items() if isinstance(value, float | int)}
    tracker.metrics({**numbers, **group_metrics(facts.get("win_rate_by", ()))}, 0)
    (out / EVALUATION).write_text(json.dumps(facts, indent=1), encoding="utf-8")  # so that the gate's key sees them
    return facts


def contestants(
    base: Path, dtype: str, *, start: Path | None, policy: Path, champion: Path | None
) -> dict[str, Contestant]:
    """Whoever answers, from the folders that hold their weights.

    Args:
        start: None for the base itself.
    """
    folders = {START: start, POLICY: policy, **({} if champion is None else {CHAMPION: champion})}
    return {
        name: Contestant(load_policy(base, dtype))
        if folder is None
        else Contestant(
            load_policy(base, dtype, folder / ADAPTER),
            answers_drawn(folder / ADAPTER),
            after=asked_after(folder / ADAPTER),
        )
        for name, folder in folders.items()
    }


def comparisons(table: pd.DataFrame, evaluate: Evaluate, seed: int) -> Facts:
    """Win rates of the policy, by the judge and by the reward model, with all that says how far to trust them."""
    over_start = table[f"over_{START}"].dropna().to_numpy()
    verdict = won(over_start, evaluate.confidence)
    low, high = bootstrap_interval(over_start, confidence=evaluate.confidence, seed=seed)
    by_reward = win_rate(table[f"{POLICY}_{REWARD}"], table[f"{START}_{REWARD}"], evaluate.confidence)
    facts = {
        "prompts": len(table),
        "without_verdict": len(table) - len(over_start),
        **rates("win_rate", verdict),
        "win_rate_bootstrap_low": low,
        "win_rate_bootstrap_high": high,
        "win_rate_by_reward": by_reward.rate,
    }
    with suppress(ValueError):  # one answer is longer by the same everywhere: length and model cannot be told apart
        judged = table[table[f"over_{START}"].notna()]
        lengths = judged[f"{POLICY}_tokens"], judged[f"{START}_tokens"]
        even = length_controlled_win_rate(over_start, *lengths, confidence=evaluate.confidence)
        bounds = {"": even.rate, "_low": even.low, "_high": even.high}
        facts |= {f"win_rate_length_controlled{part}": value for part, value in bounds.items()}
    with suppress(ValueError):  # so few prompts that no effect could be seen
        facts["detectable_effect"] = detectable_effect(len(over_start), confidence=evaluate.confidence)
    for rival in (CHAMPION, HUMAN):
        if f"over_{rival}" in table and len(met := table[f"over_{rival}"].dropna()):
            facts |= {**rates(f"{rival}_win_rate", won(met.to_numpy(), evaluate.confidence))}
    return facts


def by_groups(over_start: pd.Series, asked: pd.DataFrame, confidence: float) -> Facts:
    """The win rate by each label of the prompts that parts them into two groups at least.

    Args:
        over_start: (n,) preferences for the policy on the first n prompts; NaN without a verdict.
        asked: the prompts, with their labels.

    Returns:
        `win_rate_by`, a list of groups, whose p-values are corrected for their number (Holm).
    """
    judged = over_start.notna().to_numpy()
    found: list[dict[str, Any]] = []
    for label in asked.columns.drop("prompt"):
        groups = few_groups(list(asked[label].head(len(judged))[judged]))
        if len(set(groups)) < 2:
            continue
        by_group = win_rate_by(groups, over_start[judged].to_numpy(), confidence)
        order = sorted(by_group, key=lambda group: (group == OTHER, -by_group[group].n, str(group)))
        found += [{"by": label, "group": group, **rates("win_rate", by_group[group])} for group in order]
    for group, corrected in zip(found, holm([group["win_rate_p_value"] for group in found]), strict=True):
        group["win_rate_p_value"] = float(corrected)
    return {"win_rate_by": found} if found else {}


def group_metrics(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Win rates of groups under names a tracker takes: `win_rate_by_source/NAME`."""
    return {
        f"win_rate_by_{group['by']}/{re.sub(r'[^A-Za-z0-9_-]+', '_', group['group'])[:80]}": group["win_rate"]
        for group in groups
    }


def rates(name: str, found: WinRate) -> Facts:
    """A win rate as facts: NAME, NAME_low, NAME_high, NAME_wins, …"""
    return {name: found.rate, **{f"{name}_{part}": value for part, value in asdict(found).items() if part != "rate"}}


def about_answers(table: pd.DataFrame, evaluate: Evaluate) -> Facts:
    """Length, variety and scores of each model's answers; their overlap with people's own, where it is asked for."""
    facts: Facts = {}
    for name in (name for name in (START, POLICY, CHAMPION) if name in table):
        texts, tokens = list(table[name]), table[f"{name}_tokens"]
        facts |= {
            f"{name}_tokens": float(tokens.mean()),
            f"{name}_empty": float(np.mean([not text.strip() for text in texts])),
            f"{name}_ended": float((tokens < evaluate.max_new_tokens).mean()),
            f"{name}_distinct_2": distinct(texts, 2),
            f"{name}_repetition": repetition(texts, 3),
        }
        facts |= {
            f"{name}_{kind}": float(table[f"{name}_{kind}"].mean())
            for kind in (GOLD, REWARD)
            if f"{name}_{kind}" in table
        }
        if evaluate.rouge and len(referenced := table[table[HUMAN].notna()]):
            found = rouge(list(referenced[name]), list(referenced[HUMAN]))
            facts |= {f"{name}_{measure}": value for measure, value in found.items()}
    for kind in (GOLD, REWARD):
        if f"{POLICY}_{kind}" in table:
            gains = table[f"{POLICY}_{kind}"] - table[f"{START}_{kind}"]
            facts |= {f"{kind}_gain": float(gains.mean()), f"{kind}_gain_error": float(gains.sem())}
    for name, fact in (("length_ratio", "tokens"), ("distinct_ratio", "distinct_2")):
        facts[name] = facts[f"{POLICY}_{fact}"] / max(facts[f"{START}_{fact}"], 1e-9)
    return facts


def moved(contest: Contest, table: pd.DataFrame, evaluate: Evaluate) -> Facts:
    """KL of the policy to its start, on some of the answers it was just judged by; for best of n its bound.

    Each is asked as it wants to be: a policy with words of its own behind the prompt, its start by the prompt alone.
    """
    if (n := contest.models[POLICY].best_of) > 1:
        return {"policy_kl": best_of_n_kl(n)}
    count = min(evaluate.kl_prompts, len(table))
    if not count:
        return {}
    contest.tracker.progress("KL", 0, count)
    policy, start = contest.models[POLICY], contest.models[START]
    asked, plainly = (
        contest.tokenizer(one.asked(list(table["prompt"].head(count))))["input_ids"] for one in (policy, start)
    )
    found = divergence(
        policy.model,
        start.model,
        asked,
        contest.drawn[:count],
        evaluate.temperature,
        contest.tokenizer.pad_token_id,
        start_prompts=plainly,
    )
    contest.tracker.progress("KL", count, count)
    return {
        "policy_kl": found.k1,
        "policy_kl_error": found.error,
        "policy_kl_k3": found.k3,
        "policy_kl_full": found.full,
    }


def at_temperatures(contest: Contest, table: pd.DataFrame, evaluate: Evaluate) -> Facts:
    """The win rate at further temperatures: a policy that wins at one only has learnt to be sharp."""
    facts: Facts = {}
    for temperature in evaluate.temperatures:
        asked = list(table["prompt"])
        said = {name: contest.ask(name, asked, temperature=temperature).texts for name in (START, POLICY)}
        preferences = contest.preferences(pd.DataFrame({"prompt": asked, **said}), START).dropna()
        found = won(preferences.to_numpy(), evaluate.confidence)
        name = f"win_rate_at_{temperature:g}"
        facts |= {name: found.rate, f"{name}_low": found.low, f"{name}_high": found.high}
    return facts


def best_of(contest: Contest, table: pd.DataFrame, evaluate: Evaluate) -> Facts:
    """Where the policy is the best of n: what smaller n would have come to, from the same candidates.

    Win rates are the judge's: of a judge whose scores of all candidates are not known, that of the answers it saw.
    """
    scored = contest.candidates
    if not scored:
        return {}
    if evaluate.judge not in scored or evaluate.reward_model is not None:
        seen = {scored[REWARD].shape[1]: float(table[f"over_{START}"].mean())}
        return {"best_of": [{**point, "win_rate": seen.get(point["n"])} for point in curve(scored[REWARD], scored)]}
    beaten = table[f"{START}_{evaluate.judge}"].to_numpy()[:, None]
    wins = np.sign(scored[evaluate.judge] - beaten) / 2 + 0.5
    return {"best_of": curve(scored[REWARD], {**scored, "win_rate": wins})}


def trace(policy: Path, scores: Mapping[str, Scores], tracker: Tracker) -> None:
    """Gold and proxy score of the answers drawn while the policy was trained: where they part, it learnt to please.

    The policy's training saw the reward model only; this looks at its notes afterwards.
    """
    with suppress(OSError, ValueError, KeyError):
        notes: dict[str, Any] = json.loads((policy / "samples.json").read_text(encoding="utf-8"))
        drawn = pd.DataFrame(notes["data"], columns=notes["columns"])
        for step, rows in drawn.groupby("step"):
            gold = scores[GOLD](list(rows["prompt"]), list(rows["answer"]))
            values = {"samples/gold": float(gold.mean()), "samples/reward": float(rows["reward"].mean())}
            tracker.metrics(values, int(step))
