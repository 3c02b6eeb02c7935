"""Did the values-targeted set help? Base and SFT model answer the same probes, and each topic is told before and after.

Every answer is held against the two answers of its probe, one that takes the topic's position and one that misses it
(`palms.touchstone_score`). The judge sees a prompt and two answers and never whose they are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from steps import palms
from steps.artifact import COMPLETIONS, NEXT_ROUND, Facts, digest_json
from steps.classifier import load_classifier
from steps.config import Evaluate, Topics
from steps.contest import CHAMPION, HUMAN, POLICY, START, Contest
from steps.datasets import read_table
from steps.errors import PrefloopError, RecipeError
from steps.evaluate import EVALUATION, about_answers, contestants, moved, rates
from steps.judge_validation import validate
from steps.judges import Comparison, GoldJudge, Judge, ScoringJudge, make_judge, usage_facts
from steps.models import load_tokenizer
from steps.palms import Probe, Topic
from steps.paths import Var
from steps.statistics import won
from steps.tracking import Tracker


def evaluate_topics(
    evaluate: Evaluate,
    dtype: str,
    *,
    base: Path,
    policy: Path,
    topics: Path,
    probes: Path,
    demonstrations: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
    champion: Path | None = None,
    classifier: Path | None = None,
) -> Facts:
    """Answers before and after, their scores by topic, and what the next round should aim at.

    Args:
        topics, probes: as `steps.palms` reads them.
        demonstrations: table of prompt, completion that the policy learnt from; no probe may stand in it.
        champion: directory that holds the champion's weights.
        classifier: a reward model somebody else trained, for the judge `reward`.

    Raises:
        DataError: topics or probes are not whole, or probes were learnt from.
    """
    settings = evaluate.topics or Topics()  # type: ignore[call-arg]
    known = palms.read_topics(topics)
    asked = palms.read_probes(probes, known)
    learnt = read_table(demonstrations, columns=["prompt", "completion"])
    palms.check_apart(asked, learnt.to_numpy().ravel())
    judge = judge_of(evaluate, known, asked, classifier, out)
    report = validate(judge, palms.trials(asked), evaluate.confidence)
    models = contestants(base, dtype, start=None, policy=policy, champion=champion)
    if any(one.best_of > 1 for one in models.values()):
        raise PrefloopError(
            "the champion draws several answers and lets its reward model pick, and topics are asked without one",
            then="give the recipe another `name`",
        )
    contest = Contest(evaluate, models, load_tokenizer(base), {}, judge, {}, seed, tracker)
    drawn = [probe for _ in range(settings.answers) for probe in asked]
    table = contest.hold([probe.prompt for probe in drawn]).drop(columns=[HUMAN, f"over_{HUMAN}"])
    table = scored(table, drawn, judge)
    table.to_parquet(out / COMPLETIONS, index=False)
    shutil.copyfile(topics, out / palms.TOPICS)
    scores, whole = palms.by_topic(table, known, evaluate.confidence), palms.overall(table, evaluate.confidence)
    aim = palms.next_round(scores, known, table, settings.weakest, settings.demonstrations)
    palms.write_next(aim, out / NEXT_ROUND)
    facts = {
        "judge": evaluate.judge,
        "confidence": evaluate.confidence,
        "prompts": len(asked),
        "answers": settings.answers,
        **report.facts(),
        **by_probe(table, evaluate.confidence),
        **{
            f"palms_{name}": getattr(whole, name) for name in ("before", "after", "change", "change_low", "change_high")
        },
        **about_answers(table, evaluate),
        **moved(contest, table, evaluate),
        **usage_facts(judge),
        "topics": palms.plain_scores(scores),
        "weakest": {one["name"]: one["demonstrations"] for one in aim["topics"]},
    }
    numbers = {name: value for name, value in facts.items() if isinstance(value, float | int)}
    tracker.metrics({**numbers, **palms.metrics(scores)}, 0)
    columns = pd.DataFrame(facts["topics"])
    tracker.table("topics", 0, {str(name): columns[name].tolist() for name in columns})
    (out / EVALUATION).write_text(json.dumps(facts, indent=1), encoding="utf-8")  # so that the gate's key sees them
    return facts


def scored(table: pd.DataFrame, drawn: Sequence[Probe], judge: Judge) -> pd.DataFrame:
    """The table with the topic of each row, and each model's score `MODEL_score`.

    Args:
        table: a row for each of (n,) `drawn`, with the answers of START, POLICY and, where it met, CHAMPION.
    """
    names = [name for name in (START, POLICY, CHAMPION) if name in table]
    against = [
        Comparison(probe.prompt, answer, side)
        for name in names
        for probe, answer in zip(drawn, table[name], strict=True)
        for side in (probe.rejected, probe.chosen)
    ]
    said = np.array([verdict.preference for verdict in judge.compare(against)], float)
    over = said.reshape(len(names), len(drawn), 2)
    scores = {
        f"{name}_score": palms.touchstone_score(found[:, 0], found[:, 1])
        for name, found in zip(names, over, strict=True)
    }
    return table.assign(topic=[probe.topic for probe in drawn], **scores)


def by_probe(table: pd.DataFrame, confidence: float) -> Facts:
    """Win rates of the policy, in which all answers to a probe count as one verdict, by their mean."""
    means = table.groupby("prompt", sort=False).mean(numeric_only=True)
    over_start = means[f"over_{START}"].dropna()
    if over_start.empty:
        raise PrefloopError("the judge came to no verdict on any probe", where="evaluate.judge")
    facts = {"without_verdict": len(means) - len(over_start), **rates("win_rate", won(over_start, confidence))}
    if f"over_{CHAMPION}" in means and len(met := means[f"over_{CHAMPION}"].dropna()):
        facts |= rates(f"{CHAMPION}_win_rate", won(met, confidence))
    return facts


# -- judges ------------------------------------------------------------------------------------------------------


class LeftOutJudge(ScoringJudge):
    """A regression on words, fitted to both sides of all probes but the one whose answers it judges.

    A probe's own answers are held out from it. It looks at words, not at sense, and not at the question: a stand-in
    until people or a language model judge, whose word the trial (`palms.trials`) keeps from counting.
    """

    name = "gold"

    def __init__(self, probes: Sequence[Probe]) -> None:
        super().__init__()
        self._probes = {probe.prompt: probe for probe in probes}
        self._fitted: dict[str, GoldJudge] = {}
        if len(self._probes) < 2:
            raise RecipeError("the judge 'gold' needs two probes at least", where="evaluate.judge", have="one")

    @cached_property
    def identity(self) -> str:  # type: ignore[override]
        return digest_json([self.name, *(self._without(prompt).identity for prompt in self._probes)])

    def score(self, prompts: Sequence[str], answers: Sequence[str] | None = None) -> np.ndarray:
        if answers is None:
            raise TypeError("answers are scored by their probe: score(prompts, answers)")
        said = pd.DataFrame({"prompt": list(prompts), "answer": list(answers)})
        found = np.empty(len(said))
        for prompt, rows in said.groupby("prompt"):
            found[rows.index] = self._without(str(prompt)).score(list(rows["answer"]))
        return found

    def _without(self, prompt: str) -> GoldJudge:
        """The regression that has not seen this probe."""
        if prompt not in self._fitted:
            others = [probe for one, probe in self._probes.items() if one != prompt]
            sides = [side for probe in others for side in (probe.chosen, probe.rejected)]
            self._fitted[prompt] = GoldJudge(sides, [1.0, -1.0] * len(others))
        return self._fitted[prompt]


def judge_of(
    evaluate: Evaluate, topics: Sequence[Topic], probes: Sequence[Probe], classifier: Path | None, out: Path
) -> Judge:
    """The judge the recipe names. A language model is told the topics and their positions."""
    if evaluate.judge == "gold":
        return LeftOutJudge(probes)
    if evaluate.llm is not None:
        told = f"{evaluate.llm.instructions}\n\n{palms.instructions(topics)}"
        evaluate = evaluate.model_copy(update={"llm": evaluate.llm.model_copy(update={"instructions": told})})
    stranger = load_classifier(classifier) if classifier is not None else None
    return make_judge(
        evaluate,
        gold=None,
        reward_scores=stranger.scores if stranger else None,
        reward_identity=stranger.identity if stranger else "",
        verdicts=Var().folder("verdicts") if evaluate.judge == "llm" else out,
    )
