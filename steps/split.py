"""Third data stage: who learns from what. No prompt, and no text, stands in two of the parts.

Prompts, with everything people said about their answers, are dealt to four parts by a hash of the prompt, so that
the order of the rows does not matter:

- `demonstrations` (prompt, completion): what SFT imitates.
- `preferences` (prompt, chosen, rejected, margin, agreement, part): `train` for the reward model and the policy,
  `held_out` to measure both.
- `prompts`: the held-out prompts, for sampling.
- `gold` (answer, score): human ratings for the judge; no other step learns from them.

`python -m steps.split NAME`.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pandas as pd

from steps.datasets import Dataset, Split, dataset, folder, write_metrics, write_table
from steps.errors import DataError, PrefloopError

USES = {"train": 2, "held_out": 1}  # how many pairs one answer may be part of
TOPIC_ROWS = 12  # a word is a topic when at least this many answers hold it …
TOPIC_BALANCE = 0.35  # … and at least this share of them is liked, and at least this share is not
_WORD = re.compile(r"[a-z]{4,}")


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    text = "\x1f".join(map(str, parts))
    return int(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:13], 16) / 16**13


def part_of(prompt: str, split: Split) -> str:
    """The part a prompt is dealt to."""
    share = unit_hash(split.seed, prompt)
    for part in ("demonstrations", "preferences", "held_out"):
        share -= getattr(split, part)
        if share < 0:
            return part
    return "gold"


def topics(answers: Iterable[str], liked: Iterable[bool]) -> list[str | None]:
    """For each answer the rarest of its words that is a topic, or None.

    A topic is a word that liked and disliked answers share, so that a prompt about it does not give away what people
    thought; words of one mood, and the commonest English ones, are no topics.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    words = [set(_WORD.findall(answer.lower())) - ENGLISH_STOP_WORDS for answer in answers]
    held = Counter(word for found in words for word in found)
    good = Counter(word for found, like in zip(words, liked, strict=True) if like for word in found)
    known = {
        word
        for word, count in held.items()
        if count >= TOPIC_ROWS and TOPIC_BALANCE <= good[word] / count <= 1 - TOPIC_BALANCE
    }
    return [min(found & known, key=lambda word: (held[word], word), default=None) for found in words]


def agreement(chosen: Iterable[float], rejected: Iterable[float]) -> float:
    """P(a rater of the chosen answer rates it above what a rater of the rejected one gives it), ties counted ½.

    The common-language effect size (Vargha & Delaney 2000, eq. 1): 1 where everybody agrees, ½ where nobody can tell.
    """
    difference = np.subtract.outer(np.asarray(list(chosen), float), np.asarray(list(rejected), float))
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def pairs_of(rows: pd.DataFrame, uses: int, seed: int) -> pd.DataFrame:
    """Pairs of answers to the same prompt that people rated differently, in an order set by hashes alone.

    Args:
        rows: row_id, prompt, answer, score, ratings.
        uses: how many pairs an answer may be part of.

    Returns:
        prompt, chosen, rejected, margin (difference of mean ratings), agreement, chosen_id, rejected_id.
    """
    pairs = []
    for prompt, group in rows.sort_values("row_id").groupby("prompt", sort=True):
        members = list(group.itertuples(index=False))
        possible = [
            (unit_hash(seed, a.row_id, b.row_id), a, b)
            for place, a in enumerate(members)
            for b in members[place + 1 :]
            if a.score != b.score
        ]
        used: Counter[str] = Counter()
        for order, a, b in sorted(possible, key=lambda pair: pair[0]):
            if used[a.row_id] >= uses or used[b.row_id] >= uses:
                continue
            used.update((a.row_id, b.row_id))
            chosen, rejected = (a, b) if a.score > b.score else (b, a)
            pairs.append(
                {
                    "order": order,
                    "prompt": prompt,
                    "chosen": chosen.answer,
                    "rejected": rejected.answer,
                    "margin": chosen.score - rejected.score,
                    "agreement": agreement(chosen.ratings, rejected.ratings),
                    "chosen_id": chosen.row_id,
                    "rejected_id": rejected.row_id,
                }
            )
    columns = ["order", "prompt", "chosen", "rejected", "margin", "agreement", "chosen_id", "rejected_id"]
    return pd.DataFrame(pairs, columns=columns).sort_values("order").drop(columns="order")


def split_rated_sentences(rows: pd.DataFrame, entry: Dataset) -> dict[str, pd.DataFrame]:
    """Parts of sentences with ratings. A sentence without a topic has no prompt; its rating goes to gold."""
    template = entry.prompt or ""
    prompts = [
        template.replace("{topic}", topic) if topic else None for topic in topics(rows["answer"], rows["score"] > 0)
    ]
    parts = pd.Series([part_of(prompt, entry.split) if prompt else "gold" for prompt in prompts], index=rows.index)
    rows = rows.assign(prompt=prompts)
    demonstrations = rows[parts == "demonstrations"].rename(columns={"answer": "completion"})
    seed = entry.split.seed
    return {
        "demonstrations": demonstrations[["prompt", "completion", "row_id"]],
        "train": pairs_of(rows[parts == "preferences"], USES["train"], seed),
        "held_out": pairs_of(rows[parts == "held_out"], USES["held_out"], seed),
        "gold": rows[parts == "gold"][["answer", "score", "row_id"]],
    }


def split_preferences(rows: pd.DataFrame, entry: Dataset) -> dict[str, pd.DataFrame]:
    """Parts of pairs. A chosen answer counts as a demonstration; for gold, chosen scores 1 and rejected −1."""
    parts = pd.Series([part_of(prompt, entry.split) for prompt in rows["prompt"]], index=rows.index)
    pairs = rows[["prompt", "chosen", "rejected", "margin"]].assign(
        agreement=np.nan, chosen_id=rows["row_id"], rejected_id=rows["row_id"]
    )
    order = rows["row_id"].map(lambda identity: unit_hash(entry.split.seed, identity))
    pairs = pairs.loc[order.sort_values(kind="stable").index]
    demonstrations = rows[parts == "demonstrations"].rename(columns={"chosen": "completion"})
    gold = rows[parts == "gold"]
    sides = [
        gold[[side, "row_id"]].rename(columns={side: "answer"}).assign(score=score)
        for side, score in (("chosen", 1.0), ("rejected", -1.0))
    ]
    return {
        "demonstrations": demonstrations[["prompt", "completion", "row_id"]],
        "train": pairs[parts.loc[pairs.index] == "preferences"],
        "held_out": pairs[parts.loc[pairs.index] == "held_out"],
        "gold": pd.concat(sides, ignore_index=True)[["answer", "score", "row_id"]],
    }


SPLITS = {"rated_sentences": split_rated_sentences, "preferences": split_preferences}


def split(rows: pd.DataFrame, entry: Dataset) -> dict[str, pd.DataFrame]:
    """The tables of a dataset, each in an order set by hashes, whatever the order of `rows`.

    Raises:
        DataError: a part is empty, or a text stands in two parts.
    """
    parts = SPLITS[entry.format](rows.sort_values("row_id", kind="stable").reset_index(drop=True), entry)
    parts = _without_leaks(parts)
    for name, part in parts.items():
        if part.empty:
            raise DataError(
                f"the split leaves nothing for {name}",
                have=f"{len(rows)} rows",
                then="add data, or change the shares under `split:` in data/datasets.yaml",
            )
    for name in ("demonstrations", "gold"):
        order = parts[name]["row_id"].map(lambda identity: unit_hash(entry.split.seed, identity))
        parts[name] = parts[name].loc[order.sort_values(kind="stable").index].reset_index(drop=True)
    held_out = parts["held_out"].assign(part="held_out")
    prompts = pd.DataFrame({"prompt": sorted(set(held_out["prompt"]), key=lambda p: unit_hash(entry.split.seed, p))})
    return {
        "demonstrations": parts["demonstrations"],
        "preferences": pd.concat([parts["train"].assign(part="train"), held_out], ignore_index=True),
        "prompts": prompts,
        "gold": parts["gold"],
    }


def texts_of(part: pd.DataFrame) -> set[str]:
    """Every answer in a part, whatever its column is called."""
    columns = [name for name in ("completion", "chosen", "rejected", "answer") if name in part]
    return set().union(*(set(part[name]) for name in columns))


def _without_leaks(parts: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Take from a part the rows whose text stands in an earlier one; gold and held-out are served first."""
    seen: set[str] = set()
    clean = {}
    for name in ("gold", "held_out", "train", "demonstrations"):
        part = parts[name]
        columns = [column for column in ("completion", "chosen", "rejected", "answer") if column in part]
        clean[name] = part[~part[columns].isin(seen).any(axis=1)]
        seen |= texts_of(part)
    return clean


def main(name: str) -> None:
    entry = dataset(name)
    rows = pd.read_parquet(folder(name) / "valid.parquet")
    tables = split(rows, entry)
    for table, frame in tables.items():
        write_table(frame, folder(name) / f"{table}.parquet")
    pairs = tables["preferences"]
    counts = {table: len(frame) for table, frame in tables.items()}
    counts |= {f"preferences_{part}": int((pairs["part"] == part).sum()) for part in USES}
    rated = pairs["agreement"].dropna()
    ceiling = {"agreement": round(float(rated.mean()), 4)} if len(rated) else {}
    write_metrics({**counts, **ceiling}, folder(name) / "split.json")
    print(f"split {name}: " + ", ".join(f"{count:,} {table}" for table, count in counts.items()))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except PrefloopError as error:
        sys.exit(f"{error}")
