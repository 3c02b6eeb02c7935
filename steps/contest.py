"""The same prompts to all models, with the same random numbers; who is preferred to whom goes into one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steps.config import Evaluate
from steps.judges import Comparison, Judge, Scores
from steps.sampling import Answers, sample
from steps.sequential import SequentialTest
from steps.tracking import Tracker

START, POLICY, CHAMPION, HUMAN = "start", "policy", "champion", "human"
APART = 10_007  # between the seeds of the candidates of one answer


@dataclass(frozen=True)
class Contestant:
    """A model that answers the contest's prompts.

    Attributes:
        after: what it wants its prompts to end with (`steps.policy_prompt`); the judge and the scores never see it.
        best_of: of how many answers the one with the highest reward is given.
        picks: the reward it goes by; the contest's own where it brings none.
        said: what it is known to answer to the prompts in their order, by temperature; not drawn again.
    """

    model: PreTrainedModel
    best_of: int = 1
    picks: Scores | None = None
    said: Mapping[float, Answers] = field(default_factory=dict)
    after: str = ""

    def asked(self, prompts: Sequence[str]) -> list[str]:
        """The prompts as the model gets them."""
        return [prompt + self.after for prompt in prompts]


class Contest:
    """Policy against its rivals on held-out prompts.

    Args:
        models: `start`, `policy` and, where there is one, `champion`.
        human: an answer people chose, for the prompts that have one.
        scores: what the answers are scored by besides the judge, by name (`reward` among them); a column `MODEL_NAME`
            each.

    Attributes:
        drawn: the policy's answers, as tokens.
        candidates: where the policy is the best of n: (prompts, n) scores of all, by kind.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        models: Mapping[str, Contestant],
        tokenizer: PreTrainedTokenizerBase,
        human: Mapping[str, str],
        judge: Judge,
        scores: Mapping[str, Scores],
        seed: int,
        tracker: Tracker,
    ) -> None:
        self.evaluate, self.models, self.tokenizer, self.human = evaluate, models, tokenizer, human
        self.judge, self.scores, self.seed, self.tracker = judge, scores, seed, tracker
        self.test = SequentialTest(confidence=evaluate.confidence)
        self.drawn: list[list[int]] = []
        self.candidates: dict[str, np.ndarray] = {}

    def hold(self, prompts: Sequence[str]) -> pd.DataFrame:
        """A row a prompt, as far as it took to tell: all of them, unless the recipe lets the evaluation end early.

        Returns:
            prompt; for each model X its answer X, `X_tokens`, and `X_NAME` for each kind of score; `human` where there
            is one; `over_X`, the judge's preference for the policy over X (1, ½ or 0; NaN without a verdict).
        """
        size = self.evaluate.batch_size if self.evaluate.stop_early else len(prompts)
        rounds = []
        for place in range(0, len(prompts), size):
            rounds.append(self._round(prompts[place : place + size], place))
            if self.evaluate.stop_early and self._is_decided(rounds[-1][f"over_{START}"]):
                break
        return pd.concat(rounds, ignore_index=True)

    def _is_decided(self, preferences: pd.Series) -> bool:
        for preference in preferences.dropna():
            self.test.see(preference)
        low, high = self.test.interval
        return low > 0.5 or high < 0.5  # ½ itself may be ruled out a step before: the gate asks for more than ½

    def _round(self, prompts: Sequence[str], place: int) -> pd.DataFrame:
        table = pd.DataFrame({"prompt": list(prompts), HUMAN: [self.human.get(prompt) for prompt in prompts]})
        for name in self.models:
            answers = self.ask(name, prompts, place)
            table[name], table[f"{name}_tokens"] = answers.texts, answers.lengths
            for kind, score in self.scores.items():
                table[f"{name}_{kind}"] = score(prompts, answers.texts)
            if name == POLICY:
                self.drawn += answers.tokens
        self.tracker.progress("judging", place, place + len(table))
        for rival in (*(name for name in self.models if name != POLICY), HUMAN):
            table[f"over_{rival}"] = self.preferences(table, rival)
        self.tracker.progress("judging", place + len(table), place + len(table))
        return table

    def ask(self, name: str, prompts: Sequence[str], place: int = 0, temperature: float | None = None) -> Answers:
        """A model's answers."""
        contestant, label = self.models[name], name if temperature is None else f"{name} at {temperature:g}"
        if known := contestant.said.get(temperature or self.evaluate.temperature):
            return known.part(place, len(prompts))

        def drawn(seed: int) -> Answers:
            given = self.evaluate, seed, self.tracker, label, temperature, place, contestant.after
            return sample(contestant.model, self.tokenizer, prompts, *given)

        if contestant.best_of == 1:
            return drawn(self.seed)
        tries = [drawn(self.seed + APART * number) for number in range(1, contestant.best_of + 1)]
        picks = contestant.picks or self.scores["reward"]
        rewards = np.array([picks(prompts, one.texts) for one in tries])
        if name == POLICY and temperature is None:
            self._keep(prompts, tries)
        best = rewards.argmax(0)
        chosen = list(enumerate(best))
        return Answers(
            [tries[pick].texts[row] for row, pick in chosen],
            np.array([tries[pick].lengths[row] for row, pick in chosen]),
            [tries[pick].tokens[row] for row, pick in chosen],
        )

    def _keep(self, prompts: Sequence[str], tries: Sequence[Answers]) -> None:
        """Note the scores of all candidates."""
        for kind, score in self.scores.items():
            scored = np.stack([score(prompts, one.texts) for one in tries], axis=1)
            before = self.candidates.get(kind)
            self.candidates[kind] = scored if before is None else np.concatenate([before, scored])

    def preferences(self, table: pd.DataFrame, rival: str) -> pd.Series:
        """The judge's preference for the policy over a rival in the rows where both answered."""
        both = table[table[rival].notna()]
        rows = zip(both["prompt"], both[POLICY], both[rival], strict=True)
        verdicts = self.judge.compare([Comparison(*row) for row in rows])
        return pd.Series([verdict.preference for verdict in verdicts], index=both.index, dtype=float)
