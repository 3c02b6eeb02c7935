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
COLUMNS = ["row_id", "kind", "prompt", "chosen", "rejected", "tie", "margin", "answer", "score", "ratings"]
COLUMNS += ["file", "line", "part"]
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


def agreement(chosen: object, rejected: object) -> float:
    """P(a rater of the chosen answer rates it above what a rater of the rejected one gives it), ties counted ½.

    The common-language effect size (Vargha & Delaney 2000, eq. 1): 1 where everybody agrees, ½ where nobody can tell;
    NaN where one of the two has no raw ratings.
    """
    if not (_length(chosen) and _length(rejected)):
        return float("nan")
    difference = np.subtract.outer(np.asarray(chosen, float), np.asarray(rejected, float))
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


def split(rows: pd.DataFrame, entry: Dataset) -> dict[str, pd.DataFrame]:
    """The tables of a dataset, each in an order set by hashes, whatever the order of `rows`.

    Args:
        rows: canonical rows that validation let through.

    Raises:
        DataError: no table that a step could learn from has a row.
    """
    rows = rows.sort_values(["row_id", "file", "line", "part"], kind="stable").reset_index(drop=True)
    if entry.format == "rated_sentences":
        rows = rows.assign(prompt=_topic_prompts(rows, entry.prompt or ""))
    parts = _without_leaks(_dealt(rows, entry.split))
    seed = entry.split.seed
    for name in ("demonstrations", "gold"):
        parts[name] = _in_hash_order(parts[name], seed).reset_index(drop=True)
    pairs = [parts[name].assign(part=name) for name in USES]
    asked = set(parts["held_out"]["prompt"]) | set(parts["prompts"]["prompt"])
    tables = {
        "demonstrations": parts["demonstrations"],
        "preferences": pd.concat(pairs, ignore_index=True),
        "prompts": pd.DataFrame({"prompt": sorted(asked, key=lambda prompt: unit_hash(seed, prompt))}, dtype="str"),
        "gold": parts["gold"],
    }
    if all(table.empty for table in tables.values()):
        raise DataError(
            "the split leaves nothing",
            have=f"{len(rows)} rows",
            then="add data, or change the shares under `split:` in data/datasets.yaml",
        )
    return tables


def _topic_prompts(rows: pd.DataFrame, template: str) -> list[str | None]:
    found = topics(rows["answer"], rows["score"] > 0)
    return [template.replace("{topic}", topic) if topic else None for topic in found]


def _dealt(rows: pd.DataFrame, shares: Split) -> dict[str, pd.DataFrame]:
    """Rows by what they are for, with prompts, and all that belongs to them, dealt by hash.

    A prompt without answers is for sampling, so it and all its rows are held out. A row without a prompt goes to gold.
    """
    held = set(rows.loc[rows["kind"] == "prompt", "prompt"])
    dealt = {
        prompt: "held_out" if prompt in held else part_of(prompt, shares) for prompt in rows["prompt"].dropna().unique()
    }
    part = rows["prompt"].map(dealt).fillna("gold")
    kind = rows["kind"]
    pairs = rows[(kind == "pair") & ~rows["tie"].fillna(False).astype(bool)]
    rated = rows[kind == "rated"]
    return {
        "demonstrations": _demonstrations(rows, pairs, part),
        "train": _preferences(pairs, rated, part, "preferences", shares.seed),
        "held_out": _preferences(pairs, rated, part, "held_out", shares.seed),
        "prompts": rows.loc[kind == "prompt", ["prompt", "row_id"]],
        "gold": _gold(pairs, rated, part),
    }


def _demonstrations(rows: pd.DataFrame, pairs: pd.DataFrame, part: pd.Series) -> pd.DataFrame:
    """What SFT imitates: demonstrations that are not held out, and of its share of the prompts the answers given.

    A demonstration whose prompt also has compared or rated answers goes where those go. Of a pair it is the chosen
    side. Rated answers stand for themselves, whatever their score, unless they were
    thumbed down.
    """
    elsewhere = set(rows.loc[rows["kind"].isin(["pair", "rated"]) & (part != "demonstrations"), "prompt"])
    given = rows[(rows["kind"] == "demonstration") & (part != "held_out") & ~rows["prompt"].isin(elsewhere)]
    chosen = pairs[part.loc[pairs.index] == "demonstrations"]
    rated = rows[(rows["kind"] == "rated") & (part == "demonstrations")]
    rated = rated[~((rated["score"] == -1) & (rated["ratings"].map(_length) == 0))]
    named = [
        given.rename(columns={"answer": "completion"}),
        chosen.drop(columns="answer").rename(columns={"chosen": "completion"}),
        rated.rename(columns={"answer": "completion"}),
    ]
    return pd.concat([frame[["prompt", "completion", "row_id"]] for frame in named], ignore_index=True)


def _length(values: object) -> int:
    return len(values) if isinstance(values, np.ndarray | list) else 0


def _preferences(pairs: pd.DataFrame, rated: pd.DataFrame, part: pd.Series, name: str, seed: int) -> pd.DataFrame:
    """The comparisons of a part: those people made, and those their ratings make."""
    said = _in_hash_order(pairs[part.loc[pairs.index] == name], seed)
    said = said[["prompt", "chosen", "rejected", "margin"]].assign(
        agreement=np.nan, chosen_id=said["row_id"], rejected_id=said["row_id"]
    )
    uses = USES["train" if name == "preferences" else name]
    made = pairs_of(rated[part.loc[rated.index] == name], uses, seed)
    return pd.concat([frame for frame in (said, made) if len(frame)], ignore_index=True) if len(made) else said


def _gold(pairs: pd.DataFrame, rated: pd.DataFrame, part: pd.Series) -> pd.DataFrame:
    """Scored answers for the judge: people's ratings as they are; a chosen side scores 1, a rejected one −1."""
    sides = pairs[part.loc[pairs.index] == "gold"].drop(columns=["answer", "score"])
    frames = [rated[part.loc[rated.index] == "gold"]]
    frames += [
        sides.rename(columns={side: "answer"}).assign(score=score)
        for side, score in (("chosen", 1.0), ("rejected", -1.0))
    ]
    return pd.concat([frame[["answer", "score", "row_id"]] for frame in frames], ignore_index=True)


def _in_hash_order(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    order = frame["row_id"].map(lambda identity: unit_hash(seed, identity))
    return frame.loc[order.sort_values(kind="stable").index]


def texts_of(part: pd.DataFrame) -> set[str]:
    """Every answer in a part, whatever its column is called."""
    columns = [name for name in ("completion", "chosen", "rejected", "answer") if name in part]
    return set().union(*(set(part[name]) for name in columns))


def _without_leaks(parts: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Take from a part the rows whose text stands in an earlier one; gold and held-out are served first."""
    seen: set[str] = set()
    clean = {}
    for name in ("prompts", "gold", "held_out", "train", "demonstrations"):
        part = parts[name]
        columns = [column for column in ("completion", "chosen", "rejected", "answer") if column in part]
        clean[name] = part[~part[columns].map(seen.__contains__).any(axis=1)]
        seen |= texts_of(part)
    return clean


def main(name: str) -> None:
    entry = dataset(name)
    rows = pd.read_parquet(folder(name) / "valid.parquet", columns=COLUMNS)
    tables = split(rows, entry)
    for table, frame in tables.items():
        write_table(frame, folder(name) / f"{table}.parquet")
    pairs = tables["preferences"]
    counts = {table: len(frame) for table, frame in tables.items()}
    counts |= {f"preferences_{part}": int((pairs["part"] == part).sum()) for part in USES}
    counts["ties"] = int(rows["tie"].fillna(False).sum())
    rated = pairs["agreement"].dropna()
    ceiling = {"agreement": round(float(rated.mean()), 4)} if len(rated) else {}
    write_metrics({**counts, **ceiling}, folder(name) / "split.json")
    print(f"split {name}: " + ", ".join(f"{count:,} {table}" for table, count in counts.items()))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except PrefloopError as error:
        sys.exit(f"{error}")
