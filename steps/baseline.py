"""What every policy is compared with: the SFT start's answers to held-out prompts, drawn once for all evaluations.

Another policy on the same start, another judge and another run of a comparison find them in the store.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from steps.artifact import Facts
from steps.config import Sampling
from steps.datasets import read_table
from steps.errors import DataError
from steps.models import ADAPTER, load_policy, load_tokenizer
from steps.sampling import Answers, sample
from steps.statistics import distinct
from steps.tracking import Tracker

ANSWERS = "answers.parquet"


def answer_prompts(
    sampling: Sampling,
    dtype: str,
    *,
    base: Path,
    prompts: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
    sft: Path | None = None,
) -> Facts:
    """The start's answers at each of the recipe's temperatures, with the random numbers every policy draws with.

    Args:
        sft: the start; None where that is the base.
        prompts: table of held-out prompts.

    Raises:
        DataError: fewer held-out prompts than the recipe asks for.
    """
    asked = list(held_out_prompts(prompts, sampling.prompts)["prompt"])
    model, tokenizer = load_policy(base, dtype, sft and sft / ADAPTER), load_tokenizer(base)
    said = {
        temperature: sample(model, tokenizer, asked, sampling, seed, tracker, f"start at {temperature:g}", temperature)
        for temperature in dict.fromkeys((sampling.temperature, *sampling.temperatures))
    }
    write(said, asked, out / ANSWERS)
    usual = said[sampling.temperature]
    facts = {
        "prompts": len(asked),
        "tokens": float(usual.lengths.mean()),
        "ended": float((usual.lengths < sampling.max_new_tokens).mean()),
        "distinct_2": distinct(usual.texts, 2),
    }
    tracker.metrics(facts, 0)
    return facts


def held_out_prompts(prompts: Path, count: int) -> pd.DataFrame:
    """The first rows of the table of prompts.

    Raises:
        DataError: there are fewer.
    """
    asked = read_table(prompts).head(count)
    if len(asked) < count:
        raise DataError(
            "too few held-out prompts",
            where=str(prompts),
            have=f"{len(asked)}, the recipe asks for {count}",
            then=f"lower evaluate.prompts to {len(asked)}, or add data",
        )
    return asked


def write(said: dict[float, Answers], prompts: list[str], path: Path) -> None:
    """Answers by temperature as a table: temperature, prompt, answer, length, tokens."""
    tables = [
        pd.DataFrame(
            {
                "temperature": temperature,
                "prompt": prompts,
                "answer": answers.texts,
                "length": answers.lengths,
                "tokens": answers.tokens,
            }
        )
        for temperature, answers in said.items()
    ]
    pd.concat(tables, ignore_index=True).to_parquet(path, index=False)


def read(baseline: Path) -> dict[float, Answers]:
    """A baseline's answers by temperature, in the order of the prompts."""
    table = read_table(baseline / ANSWERS)
    return {
        float(str(temperature)): Answers(
            list(rows["answer"]), rows["length"].to_numpy(), [list(tokens) for tokens in rows["tokens"]]
        )
        for temperature, rows in table.groupby("temperature", sort=False)
    }
