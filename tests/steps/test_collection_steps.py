"""The work of a collection's round: answers drawn, scored and compared."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny

from steps import collection_steps, sampling
from steps.collection import SAMPLES, SCORES, VERDICTS
from steps.collection_steps import compare_answers, draw_answers, score_answers
from steps.config import Evaluate, Sampling
from steps.judges import Comparison, GoldJudge, Verdict
from steps.models import load_tokenizer
from steps.policy_prompt import write
from steps.tracking import NullTracker

PROMPTS = ["rain 1: ", "bread 2: ", "chess 3: "]


@pytest.fixture
def policy(base: Path, tmp_path: Path) -> Path:
    """The base itself, as a policy all of whose weights were trained leaves it."""
    shutil.copytree(base, tmp_path / "policy" / "adapter")
    return tmp_path / "policy"


def drawn(base: Path, policy: Path, out: Path, seed: int = 5, batch: int = 4) -> pd.DataFrame:
    out.mkdir()
    asked = out / "asked.parquet"
    pd.DataFrame({"prompt": PROMPTS, "response": "x"}).to_parquet(asked)
    sampling = Sampling.model_validate({"max_new_tokens": 6, "batch_size": batch})
    given: dict[str, Any] = {"base": base, "policy": policy, "asked": asked, "out": out, "tracker": NullTracker()}
    facts = draw_answers(sampling, "float32", 3, seed=seed, **given)
    assert (facts["prompts"], facts["samples"]) == (3, 9)
    return pd.read_parquet(out / SAMPLES)


def test_every_prompt_gets_its_answers_and_the_same_seed_the_same_ones(
    base: Path, policy: Path, tmp_path: Path
) -> None:
    first = drawn(base, policy, tmp_path / "first")
    assert list(first["prompt"]) == [prompt for prompt in PROMPTS for _ in range(3)]
    assert first["answer"].nunique() > 3  # those of one prompt differ
    assert first["tokens"].max() <= 6
    assert drawn(base, policy, tmp_path / "again", batch=7).equals(first)
    assert not drawn(base, policy, tmp_path / "other", seed=6).equals(first)


def test_a_policy_is_asked_as_it_wants_to_be_and_the_rows_keep_the_plain_prompt(
    base: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(policy / "adapter", "Good:")
    asked: list[str] = []
    honest, tokenizer = sampling.draw_tokens, load_tokenizer(base)

    def watched(model: Any, prompts: Sequence[Sequence[int]], *given: Any) -> Any:
        asked.extend(map(tokenizer.decode, prompts))
        return honest(model, prompts, *given)

    monkeypatch.setattr(sampling, "draw_tokens", watched)
    found = drawn(base, policy, tmp_path / "out")
    assert asked[0] == "rain 1: Good:" and found["prompt"][0] == "rain 1: "


def candidates(folder: Path, answers: Sequence[str]) -> Path:
    path = folder / "candidates.parquet"
    table = pd.DataFrame({"prompt": "p", "answer": list(answers), "own": True})
    table.to_parquet(path)
    return path


def test_gold_scores_are_the_judges_own(tmp_path: Path) -> None:
    rated = [(" ".join([word] * 3), 1.0) for word in tiny.GOOD] + [(" ".join([word] * 3), -1.0) for word in tiny.BAD]
    pd.DataFrame(rated, columns=["answer", "score"]).to_parquet(tmp_path / "gold.parquet")
    gold, answers = tmp_path / "gold.parquet", ["good good", "grim grim", "lamps"]
    given: dict[str, Any] = {"gold": gold, "seed": 0, "out": tmp_path, "tracker": NullTracker()}
    facts = score_answers("gold", "float32", candidates=candidates(tmp_path, answers), **given)
    judge = GoldJudge.from_table(gold)
    assert (facts["labels"], facts["identity"]) == (3, judge.identity)
    found = pd.read_parquet(tmp_path / SCORES)
    np.testing.assert_allclose(found["score"], judge.score(answers))
    assert found["score"][0] > found["score"][2] > found["score"][1]
    assert score_answers("gold", "float32", candidates=candidates(tmp_path, []), **given)["labels"] == 0
    assert list(pd.read_parquet(tmp_path / SCORES).columns) == ["prompt", "answer", "own", "score"]


def test_a_judge_that_compares_is_asked_about_every_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Alphabet:
        identity = "by letter"

        def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
            return [Verdict(math.nan if "z" in (c.first, c.second) else float(c.first < c.second)) for c in comparisons]

        def facts(self) -> dict[str, float]:
            return {"judge_cost": 0.5}

    monkeypatch.setattr(collection_steps, "make_judge", lambda *_, **__: Alphabet())
    monkeypatch.setenv("PREFLOOP_ROOT", str(tmp_path))
    given: dict[str, Any] = {"seed": 0, "out": tmp_path, "tracker": NullTracker()}
    table = candidates(tmp_path, ["b", "a", "z"])
    facts = compare_answers(Evaluate.model_validate({}), candidates=table, **given)
    assert facts == {"identity": "by letter", "labels": 3, "judge_cost": 0.5}
    found = pd.read_parquet(tmp_path / VERDICTS)
    assert list(zip(found["first"], found["second"], strict=True)) == [("b", "a"), ("b", "z"), ("a", "z")]
    np.testing.assert_array_equal(found["preference"], [0.0, math.nan, math.nan])
