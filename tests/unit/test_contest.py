"""A contest without models: who picks, when it ends, and what is told of the best of n."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from steps import contest, sampling
from steps.config import Evaluate
from steps.contest import CHAMPION, POLICY, Contest, Contestant
from steps.evaluate import best_of
from steps.sampling import Answers
from steps.tracking import NullTracker


def held(evaluate: Evaluate | None = None, **models: Contestant) -> Contest:
    scores = {"reward": lambda prompts, answers: np.array([len(text) for text in answers], float)}
    nobody: Any = None
    return Contest(evaluate or Evaluate(), models, nobody, {}, nobody, scores, 0, NullTracker())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Models say these, one after the other, to every prompt."""
    texts: list[str] = []

    def sample(model, tokenizer, prompts, *_):
        said = [texts.pop(0)] * len(prompts)
        return Answers(said, np.ones(len(said)), [[1]] * len(said))

    monkeypatch.setattr(contest, "sample", sample)
    return texts


def test_the_best_of_n_is_picked_by_the_models_own_reward_where_it_brings_one(drawn: list[str]) -> None:
    model: Any = None
    champion = Contestant(model, 2, picks=lambda prompts, answers: np.array([-len(text) for text in answers], float))
    match = held(champion=champion, policy=Contestant(model, 2))
    drawn += ["long", "s", "long", "s"]
    assert match.ask(CHAMPION, ["p"]).texts == ["s"]
    assert match.ask(POLICY, ["p"]).texts == ["long"]


class Letters:
    """A tokenizer whose tokens are letters."""

    eos_token_id = pad_token_id = 0

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(map(ord, text)) for text in texts]}

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(map(chr, tokens))


def test_an_answer_in_a_dialogue_has_the_space_that_the_datas_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the policy is asked with words of its own behind the prompt, which the judge never sees."""
    asked: list[str] = []
    said = [" Hello ", "Hello"]

    def draw_tokens(model: Any, prompts: list[list[int]], *_: Any) -> list[list[int]]:
        asked.extend("".join(map(chr, prompt)) for prompt in prompts)
        return [[*map(ord, said.pop(0)), 0]]

    monkeypatch.setattr(sampling, "draw_tokens", draw_tokens)
    model: Any = SimpleNamespace(eval=lambda: None)
    match = held(policy=Contestant(model, after="\nGood:\n"))
    match.tokenizer = Letters()  # type: ignore[assignment]
    assert match.ask(POLICY, ["\n\nHuman: Hi\n\nAssistant:"]).texts == [" Hello"]
    assert match.ask(POLICY, ["Say hello:"]).texts == ["Hello"]
    assert asked == ["\n\nHuman: Hi\n\nAssistant:\nGood:\n", "Say hello:\nGood:\n"]


@pytest.mark.parametrize("seed", range(8))
def test_an_early_end_leaves_an_interval_beyond_a_half(seed: int) -> None:
    """The test itself decides where ½ is ruled out; the gate asks for a lower bound above it."""
    match = held(Evaluate(stop_early=True))
    for verdict in (np.random.default_rng(seed).random(400) < 0.68).astype(float):
        if match._is_decided(pd.Series([verdict])):
            break
    low, high = match.test.interval
    assert low > 0.5 or high < 0.5


@pytest.mark.parametrize(
    ("judge", "rates"), [("reward", [0.875, 1.0]), ("gold", [0.5, 0.25]), ("llm", [None, 0.9]), ("other", [None, 0.9])]
)
def test_win_rates_of_smaller_n_are_the_judges_or_unknown(judge: str, rates: list[float | None]) -> None:
    candidates = {"reward": np.array([[1.0, 3.0], [3.0, 5.0]]), "gold": np.array([[2.0, 1.0], [1.0, 0.0]])}
    table = pd.DataFrame({"start_reward": [1.0, 1.0], "start_gold": [1.0, 1.0], "over_start": [0.8, 1.0]})
    asked: Any = SimpleNamespace(
        judge="reward" if judge == "other" else judge, reward_model="another" if judge == "other" else None
    )
    match: Any = SimpleNamespace(candidates=candidates)
    points = best_of(match, table, asked)["best_of"]
    assert [point["n"] for point in points] == [1, 2]
    assert [point["win_rate"] for point in points] == rates
