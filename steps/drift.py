"""Whether new data looks like the old: lengths, sources, labels, words. Pure functions; each names its statistic.

With a hundred thousand rows the smallest difference is significant, and with fifty a large one is not. So a finding
has drifted only when both hold: the difference would be rare by chance (p under `ALPHA`), and it is large enough to
matter (an effect size over its threshold, which does not grow with the number of rows).

The tests take the two sets for independent samples. Where one holds the other, as a version holds the one before,
that makes them cautious: the shared rows pull the two together.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

ALPHA = 0.01
FEWEST = 20  # rows on either side from which a comparison says something
RARE = 5  # expected count under which a cell makes the χ² approximation bad (Cochran 1954)
COLUMNS = ["row_id", "kind", "prompt", "chosen", "rejected", "tie", "answer", "score", "source", "file"]
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Finding:
    """One comparison of two sets of rows.

    Attributes:
        what: what is compared.
        before, after: the numbers side by side, in words.
        measure: the name of the effect size.
        effect: how large the difference is.
        threshold: from which it counts.
        p_value: how rare so large a difference is by chance.
    """

    what: str
    before: str
    after: str
    measure: str
    effect: float
    threshold: float
    p_value: float

    @property
    def drifted(self) -> bool:
        return self.effect >= self.threshold and self.p_value < ALPHA


def compare(before: pd.DataFrame, after: pd.DataFrame, *, sources: bool = True) -> list[Finding]:
    """Hold two sets of valid rows against each other.

    Args:
        before, after: canonical rows; columns that are missing are not compared.
        sources: whether a different mixture of sources is worth telling.
    """
    if min(len(before), len(after)) < FEWEST:
        return []
    found: list[Finding | None] = [
        lengths("prompt length", _lengths(before, "prompt"), _lengths(after, "prompt")),
        lengths("answer length", _lengths(before, "chosen", "answer"), _lengths(after, "chosen", "answer")),
        shares("longer side chosen", *_longer(before), *_longer(after)),
        shares("ties", *_ties(before), *_ties(after)),
        scores(_column(before, "score"), _column(after, "score")),
        vocabulary(_texts(before), _texts(after)),
    ]
    if sources and "source" in before and "source" in after:
        found.append(mixture("sources", Counter(before["source"].dropna()), Counter(after["source"].dropna())))
    return [finding for finding in found if finding is not None]


def lengths(what: str, before: np.ndarray, after: np.ndarray, threshold: float = 0.15) -> Finding | None:
    """Two-sample Kolmogorov–Smirnov test (Smirnov 1939; Conover 1999, §6.3).

    The effect is D, the largest distance between the two distribution functions: 0 for equal, 1 for disjoint ones.
    """
    if min(len(before), len(after)) < FEWEST:
        return None
    result = stats.ks_2samp(before, after)
    old, new = (f"median {np.median(values):.0f} characters" for values in (before, after))
    return Finding(what, old, new, "KS D", float(result.statistic), threshold, float(result.pvalue))


def shares(
    what: str, successes: int, n: int, successes_after: int, n_after: int, threshold: float = 0.2
) -> Finding | None:
    """Two-proportion z test with the pooled share (Fleiss, Levin & Paik 2003, §3.1).

    The effect is Cohen's h = |2·asin √p₁ − 2·asin √p₂|; 0.2 is a small one (Cohen 1988, ch. 6).
    """
    if min(n, n_after) < FEWEST:
        return None
    first, second = successes / n, successes_after / n_after
    pooled = (successes + successes_after) / (n + n_after)
    error = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / n_after))
    p_value = float(2 * stats.norm.sf(abs(first - second) / error)) if error else 1.0
    effect = abs(2 * math.asin(math.sqrt(first)) - 2 * math.asin(math.sqrt(second)))
    return Finding(what, f"{first:.1%}", f"{second:.1%}", "Cohen's h", effect, threshold, p_value)


def scores(before: np.ndarray, after: np.ndarray, threshold: float = 0.2) -> Finding | None:
    """Welch's t test of the mean score (Welch 1947).

    The effect is Cohen's d, the difference of the means over the pooled standard deviation; 0.2 is a small one
    (Cohen 1988, ch. 2).
    """
    if min(len(before), len(after)) < FEWEST:
        return None
    difference = abs(float(before.mean() - after.mean()))
    spread = math.sqrt(
        ((len(before) - 1) * before.var(ddof=1) + (len(after) - 1) * after.var(ddof=1)) / (len(before) + len(after) - 2)
    )
    if spread == 0:
        effect, p_value = (math.inf, 0.0) if difference else (0.0, 1.0)
    else:
        effect = difference / spread
        p_value = float(stats.ttest_ind(before, after, equal_var=False).pvalue)
    old, new = (f"mean {values.mean():.3g}" for values in (before, after))
    return Finding("score", old, new, "Cohen's d", effect, threshold, p_value)


def mixture(what: str, before: Counter[str], after: Counter[str], threshold: float = 0.1) -> Finding | None:
    """Pearson's χ² test of homogeneity (Pearson 1900; Agresti 2013, §3.2).

    The effect is Cramér's V = √(χ²/n) for two rows; 0.1 is a small one (Cohen 1988, ch. 7).
    """
    names = sorted({*before, *after}, key=lambda name: (-before[name] - after[name], name))
    if min(before.total(), after.total()) < FEWEST or len(names) < 2:
        return None
    table = np.array([[counts[name] for name in names] for counts in (before, after)], dtype=float)
    result = stats.chi2_contingency(table, correction=False)
    effect = math.sqrt(float(result.statistic) / table.sum())
    old, new = (
        ", ".join(f"{name} {counts[name] / counts.total():.0%}" for name in names[:3]) + (", …" if names[3:] else "")
        for counts in (before, after)
    )
    return Finding(what, old, new, "Cramér's V", effect, threshold, float(result.pvalue))


def vocabulary(before: Counter[str], after: Counter[str], threshold: float = 0.15) -> Finding | None:
    """Likelihood-ratio test of two unigram distributions, and their Jensen–Shannon distance (Lin 1991).

    With weights by size, G = 2·N·JSD, which is χ² distributed with K − 1 degrees of freedom when both come from one
    source (Grosse et al. 2002, eq. 12). So even then JSD is about (K − 1)/2N; that share, which sampling alone makes,
    is taken off before the root. JSD is given as a part of the entropy of the weights, the most it can be: the effect
    is 0 for one source and 1 for no word in common, whatever the sizes. Words expected less than `RARE` times on
    either side are one word.
    """
    sizes = np.array([before.total(), after.total()], dtype=float)
    if sizes.min() < 10 * FEWEST:
        return None
    table = _common(before, after, sizes)
    n, words = table.sum(), table.shape[1]
    if words < 2:
        return None
    weights = sizes / sizes.sum()
    result = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood")
    beyond_chance = max(0.0, (float(result.statistic) - (words - 1)) / (2 * n))
    most = float(-(weights * np.log(weights)).sum())
    unseen = sum(count for word, count in after.items() if word not in before) / sizes[1]
    return Finding(
        "words",
        f"{len(before):,} different",
        f"{len(after):,} different, {unseen:.1%} new",
        "JS distance",
        math.sqrt(beyond_chance / most),
        threshold,
        float(result.pvalue),
    )


def _common(before: Counter[str], after: Counter[str], sizes: np.ndarray) -> np.ndarray:
    """(2, K) counts of words, the rare ones in the last column."""
    together = before + after
    enough = RARE * sizes.sum() / sizes.min()
    kept = sorted(word for word, count in together.items() if count >= enough)
    counts = np.array([[side[word] for word in kept] for side in (before, after)], dtype=float).reshape(2, -1)
    rest = sizes - counts.sum(axis=1)
    return np.column_stack([counts, rest]) if rest.sum() >= enough else counts


# -- what is compared --------------------------------------------------------------------------------------------


def _column(rows: pd.DataFrame, name: str) -> np.ndarray:
    return rows[name].dropna().to_numpy(dtype=float) if name in rows else np.array([])


def _lengths(rows: pd.DataFrame, *names: str) -> np.ndarray:
    found = [rows[name].dropna().str.len().to_numpy() for name in names if name in rows]
    return np.concatenate(found) if found else np.array([])


def _sides(rows: pd.DataFrame) -> pd.DataFrame:
    if not {"chosen", "rejected"} <= set(rows.columns):
        return pd.DataFrame({"chosen": [], "rejected": [], "tie": []})
    pairs = rows[rows["chosen"].notna() & rows["rejected"].notna()]
    ties = pairs["tie"].fillna(False).astype(bool) if "tie" in pairs else False
    return pairs[["chosen", "rejected"]].assign(tie=ties)


def _longer(rows: pd.DataFrame) -> tuple[int, int]:
    """Pairs whose longer side is chosen, of those with sides of different length."""
    pairs = _sides(rows)
    pairs = pairs[~pairs["tie"].astype(bool)]
    difference = pairs["chosen"].str.len().to_numpy() - pairs["rejected"].str.len().to_numpy()
    return int((difference > 0).sum()), int((difference != 0).sum())


def _ties(rows: pd.DataFrame) -> tuple[int, int]:
    pairs = _sides(rows)
    return int(pairs["tie"].astype(bool).sum()), len(pairs)


def _texts(rows: pd.DataFrame) -> Counter[str]:
    columns = [rows[name].dropna() for name in ("chosen", "rejected", "answer") if name in rows]
    return words(text for column in columns for text in column)


def words(texts: Iterable[str]) -> Counter[str]:
    """How often each word occurs, case aside."""
    return Counter(word for text in texts for word in _WORD.findall(text.lower()))
