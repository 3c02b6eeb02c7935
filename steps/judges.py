"""Judges: who says which of two answers is better. A judge's word counts once it agrees with people.

Every judge compares two answers to a prompt (`Judge`). Those that give each answer a number of its own share
`ScoringJudge`; a language model that reads both is in `steps.llm_judge`. `make_judge` builds the one a recipe names.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline, make_union

from steps.artifact import digest_json
from steps.config import Evaluate
from steps.datasets import read_table
from steps.errors import PrefloopError, RecipeError
from steps.statistics import pair_accuracy

TIE_WIDTH = 1e-9
# From prompts and answers, a number each: higher is better.
Scores = Callable[[Sequence[str], Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt."""

    prompt: str
    first: str
    second: str

    def swapped(self) -> Comparison:
        """The same answers, the other way round."""
        return Comparison(self.prompt, self.second, self.first)


@dataclass(frozen=True)
class Verdict:
    """What a judge said of a comparison.

    Attributes:
        preference: 1 the first answer is better, 0 the second, ½ a tie; NaN where the judge came to no verdict, which
            no statistic takes for one (`win_rate` refuses it).
        first_score, second_score: of a judge that gives each answer a number.
        reason: in the judge's words; without a verdict, why there is none.
        orders: the preference for the first answer when it was shown first, and when it was shown second; None where
            one order was asked only.
        cost: what the verdict was bought for.
    """

    preference: float
    first_score: float | None = None
    second_score: float | None = None
    reason: str = ""
    orders: tuple[float, float] | None = None
    cost: float = 0.0

    @property
    def given(self) -> bool:
        """Whether there is a verdict at all."""
        return not math.isnan(self.preference)

    def swapped(self) -> Verdict:
        """The verdict on the same answers the other way round."""
        orders = None if self.orders is None else (1 - self.orders[1], 1 - self.orders[0])
        return replace(
            self,
            preference=1 - self.preference,
            first_score=self.second_score,
            second_score=self.first_score,
            orders=orders,
        )


class Judge(Protocol):
    """Says which of two answers is better.

    Attributes:
        name: `gold`, `reward`, `llm`, `human`.
        identity: a digest of all that its verdicts depend on; two judges of one identity say the same.
    """

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison, in their order."""
        ...


@runtime_checkable
class Paid(Protocol):
    """A judge whose verdicts come one by one and cost something, so that none may be lost."""

    def compare_each(self, comparisons: Sequence[Comparison], keep: Callable[[int, Verdict], None]) -> None:
        """Call `keep(number of the comparison, verdict)` for each as it comes, from the caller's thread."""
        ...

    def charge(self, amount: float, verdicts: int) -> None:
        """Count towards the budget what was spent before, on so many verdicts and on what came to none."""
        ...


class ScoringJudge(ABC):
    """A judge that gives each answer a number: the higher is better, and two within the width of a tie are alike.

    An answer's number does not depend on the other answer, so neither does a verdict on their order.
    """

    name: ClassVar[str]

    def __init__(self, tie_width: float = TIE_WIDTH) -> None:
        self.tie_width = tie_width

    @property
    @abstractmethod
    def identity(self) -> str: ...

    @abstractmethod
    def score(self, prompts: Sequence[str], answers: Sequence[str] | None = None) -> np.ndarray:
        """(n,) a number for each answer to its prompt."""

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """Verdicts from the difference of the two scores.

        Raises:
            PrefloopError: a score is not a number.
        """
        if not comparisons:
            return []
        sides = [side for c in comparisons for side in ((c.prompt, c.first), (c.prompt, c.second))]
        # The same text scored twice may differ by a rounding error, which must not break a tie.
        places = {side: place for place, side in enumerate(dict.fromkeys(sides))}
        scores = np.asarray(self.score([prompt for prompt, _ in places], [answer for _, answer in places]), float)
        if not np.isfinite(scores).all():
            raise PrefloopError(
                f"the {self.name} judge gave a score that is not a number",
                have=f"{int((~np.isfinite(scores)).sum())} of {scores.size}",
                then="look at the judge's weights: training may have diverged",
            )
        found = scores[[places[side] for side in sides]].reshape(-1, 2)
        return [self._verdict(first, second) for first, second in found.tolist()]

    def _verdict(self, first: float, second: float) -> Verdict:
        difference = first - second
        preference = 0.5 if abs(difference) <= self.tie_width else float(difference > 0)
        return Verdict(preference, first, second, orders=(preference, preference))


class GoldJudge(ScoringJudge):
    """Ridge regression of people's mean ratings on words and character n-grams.

    Fitted anew from the `gold` table whenever it is needed (seconds, the same numbers every time), so that no fitted
    object has to be stored. Deliberately unlike the models it judges: it shares neither weights nor data with them.
    """

    name = "gold"

    def __init__(self, answers: Sequence[str], scores: Sequence[float], tie_width: float = TIE_WIDTH) -> None:
        super().__init__(tie_width)
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True)
        self._model = make_pipeline(make_union(words, characters), Ridge(alpha=1.0, solver="sparse_cg", tol=1e-6))
        self._ratings = list(answers), [float(score) for score in scores]
        self._model.fit(self._ratings[0], np.asarray(self._ratings[1]))

    @classmethod
    def from_table(cls, gold: Path, tie_width: float = TIE_WIDTH) -> GoldJudge:
        """The judge of a table of answer, score.

        Raises:
            RecipeError: the table is empty.
        """
        ratings = read_table(gold, columns=["answer", "score"])
        if ratings.empty:
            raise _lacks(cls.name, "human ratings no step learns from", "leave some of the data for gold")
        return cls(list(ratings["answer"]), list(ratings["score"]), tie_width)

    @cached_property
    def identity(self) -> str:  # type: ignore[override]
        """Digest of the ratings, of every setting of the regression, and of the library that fits it."""
        settings = self._model.get_params(deep=True)
        plain = {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str | tuple)}
        library = metadata.version("scikit-learn")
        return digest_json([self.name, library, repr(sorted(plain.items())), self.tie_width, *self._ratings])

    def score(self, prompts: Sequence[str], answers: Sequence[str] | None = None) -> np.ndarray:
        """(n,) ratings on the scale of the people it was fitted to.

        Prompts do not count for this judge and may be left out: `score(answers)` is `score(prompts, answers)`.
        """
        return self._model.predict(list(prompts if answers is None else answers))

    def accuracy(self, pairs: pd.DataFrame) -> float:
        """Share of human pairs (chosen, rejected) it orders as people did."""
        return pair_accuracy(self.score(list(pairs["chosen"])), self.score(list(pairs["rejected"])))


class RewardJudge(ScoringJudge):
    """A reward model as the judge: one of ours, or any that classifies sequences (`steps.classifier`).

    A policy tuned against a reward model has learnt to please it, so its word on that policy shows what was optimised
    and not what people would say; another one's word, held against people, may.

    Args:
        scores: from (n,) prompts and (n,) answers to (n,) numbers.
        identity: a digest of the weights and of how they are used.
    """

    name = "reward"

    def __init__(self, scores: Scores, identity: str, tie_width: float = TIE_WIDTH) -> None:
        super().__init__(tie_width)
        self._scores, self._identity = scores, identity

    @property
    def identity(self) -> str:
        return digest_json([self.name, self._identity, self.tie_width])

    def score(self, prompts: Sequence[str], answers: Sequence[str] | None = None) -> np.ndarray:
        if answers is None:
            raise TypeError("a reward model scores an answer to a prompt: score(prompts, answers)")
        return np.asarray(self._scores(prompts, answers), float)


class BothOrders:
    """A judge asked twice, with the answers in either order.

    The two verdicts where they agree, a tie where they do not: a preference for a place cannot win (Zheng et al. 2023,
    arXiv:2306.05685, §3.4). Without a verdict in one order there is none.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.name = judge.name
        self.identity = digest_json(["both orders", judge.identity])

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        # Both orders of a comparison side by side: whoever stops half-way has whole verdicts, not half of each.
        asked = [one for comparison in comparisons for one in (comparison, comparison.swapped())]
        said = self._judge.compare(asked)
        return [
            _combined(there, back.swapped(), same=c.first == c.second)
            for c, there, back in zip(comparisons, said[::2], said[1::2], strict=True)
        ]

    def facts(self) -> dict[str, float]:
        return usage_facts(self._judge)


def _combined(there: Verdict, back: Verdict, *, same: bool) -> Verdict:
    """One verdict of two on the same answers, both told from the first answer's side."""
    cost = there.cost if same else there.cost + back.cost  # of one text twice, one order was asked
    orders = (there.preference, back.preference)
    if not (there.given and back.given):
        missing = back if there.given else there
        return Verdict(math.nan, reason=missing.reason, orders=orders, cost=cost)
    if there.preference == back.preference:
        return replace(there, orders=orders, cost=cost)
    return Verdict(0.5, reason=f"in one order: {there.reason}; in the other: {back.reason}", orders=orders, cost=cost)


def usage_facts(judge: Judge) -> dict[str, float]:
    """What a judge was asked and cost, as flat numbers; nothing for one that costs nothing."""
    facts = getattr(judge, "facts", None)
    return facts() if facts is not None else {}


def make_judge(
    evaluate: Evaluate,
    *,
    gold: GoldJudge | None,
    reward_scores: Scores | None,
    reward_identity: str,
    verdicts: Path,
) -> Judge:
    """The judge a recipe names, with every verdict kept, and none asked for that is known.

    Args:
        gold: for the judge `gold`.
        reward_scores, reward_identity: for the judge `reward`, as `RewardJudge` takes them.
        verdicts: file of the verdict store, made when it is not there; or a folder, for one called `verdicts.jsonl`.

    Raises:
        RecipeError: what the judge needs is not there.
    """
    from steps.verdicts import STORE, Remembered, VerdictStore

    store = VerdictStore(verdicts / STORE if verdicts.is_dir() else verdicts)
    if evaluate.judge == "gold":
        if gold is None:
            raise _lacks("gold", "human ratings no step learns from", "give the dataset a gold part, or another judge")
        return Remembered(gold, store)
    if evaluate.judge == "reward":
        if reward_scores is None:
            raise _lacks("reward", "a reward model", "name one, or another judge")
        return Remembered(RewardJudge(reward_scores, reward_identity), store)
    if evaluate.llm is None:
        raise _lacks("llm", "the section evaluate.llm", "give it base_url and model at least")
    from steps.llm_judge import LLMJudge

    return BothOrders(Remembered(LLMJudge(evaluate.llm), store))


def _lacks(judge: str, what: str, then: str) -> RecipeError:
    return RecipeError(f"the judge '{judge}' needs {what}", where="evaluate.judge", have="none", then=then)
