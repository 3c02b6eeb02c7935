"""Third data stage: who learns from what. No prompt stands in two of the parts, and no text but phrases like a refusal.

Prompts, with everything people said about their answers, are dealt to four parts by a hash of the prompt, so that
the order of the rows does not matter:

- `demonstrations` (prompt, completion): what SFT imitates.
- `preferences` (prompt, chosen, rejected, margin, agreement, part): `train` for the reward model and the policy,
  `held_out` to measure both. Where a record ranks several answers the table also says `group`, what was ranked
  together, and `chosen_rank` and `rejected_rank`, 1 the best: so that ties, which make no pair, can be told.
- `prompts` (prompt, source and, where records have one, topic): the held-out prompts, for sampling.
- `gold` (answer, score): human ratings for the judge; no other step learns from them.

`python -m steps.split NAME`.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from steps.datasets import Dataset, Split, dataset, folder, read_table, write_metrics, write_table
from steps.errors import DataError, PrefloopError
from steps.rows import ANSWERS, hashes

USES = {"train": 2, "held_out": 1}  # how many pairs one answer may be part of
MANY, NEIGHBOURS = 1000, 16  # answers of one prompt from which not all pairs are looked at, and how many then are
PHRASE = 10  # prompts from which an answer to all of them is a phrase, which gives nothing away
TOPIC_ROWS = 12  # a word is a topic when at least this many answers hold it …
TOPIC_BALANCE = 0.35  # … and at least this share of them is liked, and at least this share is not
COLUMNS = ["row_id", "kind", "prompt", "chosen", "rejected", "tie", "margin", "answer", "score", "ratings"]
COLUMNS += ["source", "file", "line", "part"]
LABELS = ("source", "topic")  # what win rates are told by; `topic` where the registry names a field for it
PAIR = ["prompt", "chosen", "rejected", "margin", "agreement", "chosen_id", "rejected_id"]
RANKS = ["group", "chosen_rank", "rejected_rank"]
RANKED = ("comparisons", "rankings", "scored")  # formats whose records say more than which of two answers is better
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
        possible = [(unit_hash(seed, a.row_id, b.row_id), a, b) for a, b in _twos(members, seed) if a.score != b.score]
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
    return pd.DataFrame(pairs, columns=["order", *PAIR]).sort_values("order").drop(columns="order")


def _twos(members: list[Any], seed: int) -> Iterable[tuple[Any, Any]]:
    """Every two answers of a prompt; of one with very many, each with its neighbours in an order set by hashes."""
    if len(members) <= MANY:
        return itertools.combinations(members, 2)
    order = sorted(range(len(members)), key=lambda place: unit_hash(seed, members[place].row_id))
    beside = itertools.chain.from_iterable(zip(order, order[step:], strict=False) for step in range(1, NEIGHBOURS + 1))
    return ((members[min(two)], members[max(two)]) for two in beside)


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
    parts = _dealt(rows, entry.split)
    if entry.format in RANKED:
        parts |= {name: with_ranks(parts[name], rows) for name in USES}
    parts = _without_leaks(parts, _phrases(rows))
    seed = entry.split.seed
    for name in ("demonstrations", "gold"):
        parts[name] = _in_hash_order(parts[name], seed).reset_index(drop=True)
    pairs = [parts[name].assign(part=name) for name in USES]
    asked = set(parts["held_out"]["prompt"]) | set(parts["prompts"]["prompt"])
    tables = {
        "demonstrations": parts["demonstrations"],
        "preferences": pd.concat(pairs, ignore_index=True),
        "prompts": _labelled(sorted(asked, key=lambda prompt: unit_hash(seed, prompt)), rows),
        "gold": parts["gold"],
    }
    if all(table.empty for table in tables.values()):
        raise DataError(
            "the split leaves nothing",
            have=f"{len(rows)} rows",
            then="add data, or change the shares under `split:` in data/datasets.yaml",
        )
    return tables


def _labelled(prompts: list[str], rows: pd.DataFrame) -> pd.DataFrame:
    """Prompts with where they come from and what they are about, by the first row of each, in files and lines."""
    first = rows.sort_values(["file", "line", "part"], kind="stable").drop_duplicates("prompt").set_index("prompt")
    labels = {name: first[name].reindex(prompts).to_numpy() for name in LABELS if name in rows}
    return pd.DataFrame({"prompt": prompts, **labels}, dtype="str")


def _topic_prompts(rows: pd.DataFrame, template: str) -> list[str | None]:
    found = topics(rows["answer"], rows["score"] > 0)
    return [template.replace("{topic}", topic) if topic else None for topic in found]


def _dealt(rows: pd.DataFrame, shares: Split) -> dict[str, pd.DataFrame]:
    """Rows by what they are for, with prompts, and all that belongs to them, dealt by hash.

    A prompt without answers is for sampling, so it and all its rows are held out. A row without a prompt goes to gold.
    """
    kind = rows["kind"]
    held = rows.loc[kind == "prompt", "prompt"].unique().tolist()
    dealt = _parts_of(rows["prompt"].dropna().unique().tolist(), set(held), shares)
    part = rows["prompt"].map(dealt).fillna("gold")
    pairs = (kind == "pair") & ~rows["tie"].fillna(False).astype(bool)
    rated = kind == "rated"
    return {
        "demonstrations": _demonstrations(rows, pairs, rated, part),
        "train": _preferences(rows, pairs, rated, part == "preferences", USES["train"], shares.seed),
        "held_out": _preferences(rows, pairs, rated, part == "held_out", USES["held_out"], shares.seed),
        "prompts": rows.loc[kind == "prompt", ["prompt", "row_id"]],
        "gold": _gold(rows, pairs & (part == "gold"), rated & (part == "gold")),
    }


def _parts_of(prompts: list[str], held: set[str], shares: Split) -> dict[str, str]:
    """Prompt → the part it is dealt to; one that is only spelled otherwise goes where the other goes.

    Of several spellings the one that is held out decides, else the first by its hash.
    """
    dealt = {prompt: "held_out" if prompt in held else part_of(prompt, shares) for prompt in prompts}
    keys = pd.Series(_text_keys(pd.Series(prompts, dtype="str")), index=prompts)
    again = keys[keys.duplicated(keep=False)]
    for _, spellings in again.groupby(again):
        first = min(spellings.index, key=lambda prompt: (prompt not in held, unit_hash(shares.seed, prompt)))
        dealt |= dict.fromkeys(spellings.index, dealt[first])
    return dealt


def _demonstrations(rows: pd.DataFrame, pairs: pd.Series, rated: pd.Series, part: pd.Series) -> pd.DataFrame:
    """What SFT imitates: demonstrations that are not held out, and of its share of the prompts the answers given.

    A demonstration whose prompt also has compared or rated answers goes where those go. Of a pair it is the chosen
    side. Rated answers stand for themselves, whatever their score, unless they were thumbed down.
    """
    ours = part == "demonstrations"
    given = (rows["kind"] == "demonstration") & (part != "held_out")
    if given.any():
        elsewhere = _text_keys(rows.loc[rows["kind"].isin(["pair", "rated"]) & ~ours, "prompt"].dropna())
        given[given] = ~np.isin(_text_keys(rows.loc[given, "prompt"]), elsewhere)
    down = rows["score"] == -1
    down[down] = rows.loc[down, "ratings"].map(_length) == 0
    named = [
        _renamed(rows, given, answer="completion"),
        _renamed(rows, pairs & ours, chosen="completion"),
        _renamed(rows, rated & ours & ~down, answer="completion"),
    ]
    return pd.concat([frame[["prompt", "completion", "row_id"]] for frame in named], ignore_index=True)


def _renamed(rows: pd.DataFrame, mask: pd.Series, **names: str) -> pd.DataFrame:
    """The rows a mask is true for, with a column under another name."""
    columns = ["prompt", "score", "row_id", *names]
    return rows.loc[mask, columns].rename(columns=names)


def _length(values: object) -> int:
    return len(values) if isinstance(values, np.ndarray | list) else 0


def _preferences(
    rows: pd.DataFrame, pairs: pd.Series, rated: pd.Series, ours: pd.Series, uses: int, seed: int
) -> pd.DataFrame:
    """The comparisons of a part: those people made, and those their ratings make."""
    said = rows.loc[pairs & ours, ["row_id", "prompt", "chosen", "rejected", "margin"]]
    said = _in_hash_order(said, seed).rename(columns={"row_id": "chosen_id"})
    said = said.assign(agreement=np.nan, rejected_id=said["chosen_id"])[PAIR]
    made = pairs_of(rows[rated & ours], uses, seed)
    return pd.concat([frame for frame in (said, made) if len(frame)], ignore_index=True) if len(made) else said


def with_ranks(pairs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Pairs with what was ranked together and where either side came in.

    A rank is 1 plus the number of answers that were preferred to it, so that answers that tied have the same one. It is
    missing where some two answers of a record have no valid verdict: not known is no tie.

    Args:
        pairs: of one part, with `chosen_id`.
        rows: all canonical rows, ties among them.

    Returns:
        the pairs with `group` (the least row id of the record or, of rated answers, of the prompt), `chosen_rank` and
        `rejected_rank`.
    """
    rows = rows[rows["kind"].isin(["pair", "rated"])]
    place = rows["file"].astype(str) + "\x1f" + rows["line"].astype(str)
    together = place.where(rows["kind"] == "pair", rows["prompt"])
    rows = rows.assign(group=rows.groupby(together)["row_id"].transform("min"))
    ranks = _ranks(rows)
    groups = rows.drop_duplicates("row_id").set_index("row_id")["group"]
    pairs = pairs.assign(group=pairs["chosen_id"].map(groups))
    for side in ("chosen", "rejected"):
        found = [ranks.get(key) for key in zip(pairs["group"], pairs[side], strict=True)]
        pairs[f"{side}_rank"] = pd.array(found, dtype="Int64")
    return pairs[[*PAIR, *RANKS]]


def _ranks(rows: pd.DataFrame) -> dict[tuple[str, str], int]:
    """(group, answer) → its rank, from verdicts on every two answers or from ratings."""
    ranks: dict[tuple[str, str], int] = {}
    for group, said in rows[rows["kind"] == "pair"].groupby("group"):
        sides = list(zip(said["chosen"], said["rejected"], said["tie"].fillna(False), strict=True))
        answers = {answer for *both, _ in sides for answer in both}
        if len({frozenset(both) for *both, _ in sides}) < len(answers) * (len(answers) - 1) // 2:
            continue
        above = Counter(worse for _, worse in {(better, worse) for better, worse, tie in sides if not tie})
        ranks |= {(group, answer): above[answer] + 1 for answer in answers}
    rated = rows[rows["kind"] == "rated"].groupby(["group", "answer"])["score"].mean()
    placed = rated.groupby(level="group").rank(method="min", ascending=False)
    return ranks | {key: int(rank) for key, rank in placed.items()}


def _gold(rows: pd.DataFrame, pairs: pd.Series, rated: pd.Series) -> pd.DataFrame:
    """Scored answers for the judge: people's ratings as they are; a chosen side scores 1, a rejected one −1."""
    frames = [rows[rated]]
    frames += [
        _renamed(rows, pairs, **{side: "answer"}).assign(score=score)
        for side, score in (("chosen", 1.0), ("rejected", -1.0))
    ]
    return pd.concat([frame[["answer", "score", "row_id"]] for frame in frames], ignore_index=True)


def _in_hash_order(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    order = [unit_hash(seed, identity) for identity in frame["row_id"].tolist()]
    return frame.iloc[np.argsort(order, kind="stable")]


def texts_of(part: pd.DataFrame) -> pd.DataFrame:
    """The answers in a part, whatever their columns are called."""
    return part[[name for name in ("completion", "chosen", "rejected", "answer") if name in part]]


def _text_keys(texts: pd.Series) -> np.ndarray:
    """(n,) uint64: one number for texts that differ in case, width, spaces and outer punctuation at most."""
    keys = hashes(pa.Table.from_pandas(texts.to_frame(), preserve_index=False)[0].cast(pa.large_string()))
    bare = keys == 0  # nothing but punctuation
    keys[bare] = pd.util.hash_array(texts[bare].to_numpy(dtype=object), categorize=False)
    return keys


def _phrases(rows: pd.DataFrame) -> np.ndarray:
    """(n,) uint64: keys of answers that stand under so many prompts that they say nothing of any, like a refusal."""
    sides = [rows[["prompt", name]].dropna().set_axis(["prompt", "text"], axis=1) for name in ANSWERS if name in rows]
    said = pd.concat(sides, ignore_index=True).drop_duplicates()
    said["key"] = _text_keys(said["text"]) if len(said) else []
    prompts = said.groupby("key")["prompt"].nunique()
    return prompts.index[prompts >= PHRASE].to_numpy(dtype=np.uint64)


def _without_leaks(parts: dict[str, pd.DataFrame], phrases: np.ndarray) -> dict[str, pd.DataFrame]:
    """Take from a part the rows whose text stands in an earlier one; gold and held-out are served first.

    Args:
        phrases: keys of texts that may stand in all parts, beside a text that does not.
    """
    seen = np.array([], dtype=np.uint64)
    clean = {}
    for name in ("prompts", "gold", "held_out", "train", "demonstrations"):
        texts = texts_of(parts[name])
        keys = np.array([_text_keys(texts[side]) for side in texts], dtype=np.uint64).reshape(texts.shape[::-1])
        stands, own = np.isin(keys, seen), ~np.isin(keys, phrases)
        leaks = (stands & (own | ~own.any(0))).any(0)
        clean[name] = parts[name][~leaks]
        seen = np.concatenate([seen, keys.ravel()])
    return clean


def pairs_left_out(rows: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> int:
    """How many of people's comparisons are in no table, for a text of theirs stands in a part that was served first."""
    ids = [table[name] for table in tables.values() for name in ("row_id", "chosen_id", "rejected_id") if name in table]
    compared = (rows["kind"] == "pair") & ~rows["tie"].fillna(False).astype(bool)
    return int((~rows.loc[compared, "row_id"].isin(pd.concat(ids))).sum())


def main(name: str) -> None:
    entry = dataset(name)
    valid = folder(name) / "valid.parquet"
    rows = read_table(valid, columns=[*COLUMNS, *({"topic"} & set(entry.columns))])
    tables = split(rows, entry)
    for table, frame in tables.items():
        write_table(frame, folder(name) / f"{table}.parquet")
    pairs = tables["preferences"]
    counts = {table: len(frame) for table, frame in tables.items()}
    counts |= {f"preferences_{part}": int((pairs["part"] == part).sum()) for part in USES}
    counts["pairs_left_out"] = pairs_left_out(rows, tables)
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
