"""Answers that people ranked, prompt by prompt: from a table of pairs to groups that are learnt from together."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

GROUP, RANKS = "group", ("chosen_rank", "rejected_rank")


@dataclass(frozen=True)
class Group:
    """K answers to a prompt, and what people said of every two of them.

    Attributes:
        preferred: (K, K) how often answer i was preferred to answer j: 1, 0, ½ for a tie, between them where people
            differ; NaN where the two were not compared, and on the diagonal.
        margins: (K, K) by how much, where i was preferred; 0 where nobody said.
        ranks: (K,) 1 the best, equal for a tie.
    """

    prompt: str
    answers: tuple[str, ...]
    preferred: np.ndarray
    margins: np.ndarray
    ranks: np.ndarray

    @property
    def is_whole(self) -> bool:
        """Whether every two answers were compared."""
        return int(np.isnan(self.preferred).sum()) == len(self.answers)

    @property
    def best(self) -> np.ndarray:
        """(K,) share of the choice that falls to each answer: the best ones share it."""
        best = self.ranks == self.ranks.min()
        return best / best.sum()

    def pairs(self) -> Iterator[Group]:
        """Every two answers that were compared, as a group of their own."""
        for i, j in itertools.combinations(range(len(self.answers)), 2):
            if not np.isnan(self.preferred[i, j]):
                both = np.ix_([i, j], [i, j])
                answers = (self.answers[i], self.answers[j])
                wins = self.preferred[both]
                yield Group(self.prompt, answers, wins, self.margins[both], _ranks(wins))


def keys_of(pairs: pd.DataFrame) -> pd.Series:
    """(n,) what was ranked together: the table's `group`, else the prompt."""
    if GROUP not in pairs:
        return pairs["prompt"]
    return pairs[GROUP].where(pairs[GROUP].notna(), pairs["prompt"])


def whole_groups(pairs: pd.DataFrame, at_most: int | None) -> pd.DataFrame:
    """The first pairs of a table without tearing a group: at most so many, and the first group in any case."""
    if at_most is None or pairs.empty:
        return pairs
    keys = keys_of(pairs)
    sizes = keys.groupby(keys, sort=False).size()
    taken = sizes.index[(sizes.cumsum() <= at_most).to_numpy() | (np.arange(len(sizes)) == 0)]
    return pairs[keys.isin(taken)]


def groups_of(pairs: pd.DataFrame, at_most: int, *, known_by_rank: bool = True) -> list[Group]:
    """Groups of a table of prompt, chosen, rejected and, where it has them, margin, group, chosen_rank, rejected_rank.

    Pairs of equal rank are ties, which the table does not list. An answer is in one group, but for groups of more than
    `at_most` answers: those are cut, each into as many as it takes, and no pair is lost.

    Args:
        at_most: answers in a group, at least 2.
        known_by_rank: whether two answers of different rank count as compared although the table lacks the pair.
    """
    found = []
    for _, rows in pairs.groupby(keys_of(pairs), sort=False):
        listed = list(_listed(rows))
        found += [_group(part, known_by_rank) for part in _parts(listed, at_most)]
    return found


def torn(groups: Sequence[Group]) -> list[Group]:
    """Groups of which every two answers were compared as they are, the others as pairs.

    For losses that ask for a best answer or a whole ranking; of two answers they are all Bradley–Terry's.
    """
    return [part for group in groups for part in ([group] if group.is_whole else group.pairs())]


@dataclass(frozen=True)
class _Pair:
    prompt: str
    sides: tuple[str, str]
    margin: float
    ranks: tuple[float, float]


def _listed(rows: pd.DataFrame) -> Iterator[_Pair]:
    margins = rows["margin"].fillna(0.0) if "margin" in rows else itertools.repeat(0.0)
    ranks = [rows[name].astype(float) if name in rows else itertools.repeat(np.nan) for name in RANKS]
    for prompt, chosen, rejected, margin, *rank in zip(
        rows["prompt"], rows["chosen"], rows["rejected"], margins, *ranks, strict=False
    ):
        yield _Pair(prompt, (chosen, rejected), float(margin), (float(rank[0]), float(rank[1])))


def _parts(pairs: Sequence[_Pair], at_most: int) -> Iterator[list[_Pair]]:
    """Pairs in their order, as many at a time as hold `at_most` different answers."""
    held: set[Hashable] = set()
    part: list[_Pair] = []
    for pair in pairs:
        if part and len(held | set(pair.sides)) > at_most:
            yield part
            held, part = set(), []
        held |= set(pair.sides)
        part.append(pair)
    yield part


def _group(pairs: Sequence[_Pair], known_by_rank: bool) -> Group:
    answers = tuple(dict.fromkeys(side for pair in pairs for side in pair.sides))
    place = {answer: number for number, answer in enumerate(answers)}
    wins, margins = np.zeros((len(answers),) * 2), np.zeros((len(answers),) * 2)
    given = np.full(len(answers), np.nan)
    for pair in pairs:
        better, worse = place[pair.sides[0]], place[pair.sides[1]]
        wins[better, worse] += 1
        margins[better, worse] = pair.margin
        given[[better, worse]] = pair.ranks
    counts = wins + wins.T
    preferred = np.divide(wins, counts, out=np.full_like(wins, np.nan), where=counts > 0)
    apart = given[None, :] - given[:, None]  # above 0 where i came in before j
    open_ = (counts == 0) & ~np.isnan(apart) & ~np.eye(len(answers), dtype=bool)
    by_rank = open_ if known_by_rank else open_ & (apart == 0)
    preferred[by_rank] = (1 + np.sign(apart[by_rank])) / 2
    ranks = _ranks(preferred) if np.isnan(given).any() else given
    return Group(pairs[0].prompt, answers, preferred, margins, ranks)


def _ranks(preferred: np.ndarray) -> np.ndarray:
    """(K,) 1 plus the number of answers that were preferred to each."""
    return 1.0 + (np.nan_to_num(preferred, nan=0.0) > 0.5).sum(0)
