"""Statistics of comparisons. Pure functions; every one names its source.

A preference is a verdict on one prompt as seen by the model under test: 1 won, 0 lost, ½ a tie, and anything between
where a judge gives a probability.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from steps.intervals import Numbers, checked_preferences, cluster_interval, numbered, score_interval

OTHER = "other"  # the group of what is too rare for one of its own


@dataclass(frozen=True)
class WinRate:
    """How often one model's answer was preferred to another's.

    Attributes:
        wins, ties, losses: of the first model.
        rate: (wins + ½ ties) / n.
        low, high: score interval of the rate, Wilson's where nothing ties (`score_interval`).
        p_value: exact two-sided sign test of wins against losses; ties say nothing.
    """

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float
    p_value: float

    @property
    def n(self) -> int:
        return self.wins + self.ties + self.losses


@dataclass(frozen=True)
class PooledRate:
    """A win rate over several seeds of the same comparison.

    Attributes:
        rate: mean over the prompts of the seeds that ended.
        low, high: of the rate, by prompt (`cluster_interval`). They tell what other prompts would do, with these very
            seeds; what another seed would do shows in `spread`.
        seeds: all that were started.
        failed: seeds without a result. They are in no rate, and never among `better`.
        better: seeds whose own rate is above ½.
        spread: sample standard deviation of the seeds' rates; NaN below two.
        by_seed: each seed's rate, NaN where it failed.
    """

    rate: float
    low: float
    high: float
    seeds: int
    failed: int
    better: int
    spread: float
    by_seed: dict[Hashable, float]


def win_rate(
    scores: Numbers,
    against: Numbers,
    confidence: float = 0.95,
    tie_width: float = 1e-9,
) -> WinRate:
    """Win rate from a judge's scores of two answers to each prompt.

    Args:
        scores, against: (n,), higher is better, prompt by prompt.
        tie_width: a difference no larger than this is a tie.
    """
    first, second = np.asarray(scores, float), np.asarray(against, float)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ValueError("win_rate compares two non-empty lists of the same length")
    difference = first - second
    if not np.isfinite(difference).all():
        raise ValueError("a score is not a number")
    wins = int((difference > tie_width).sum())
    losses = int((difference < -tie_width).sum())
    ties = len(difference) - wins - losses
    successes = wins + ties / 2
    low, high = score_interval(wins, ties, losses, confidence)
    return WinRate(wins, ties, losses, successes / len(difference), low, high, sign_test(wins, losses))


def won(preferences: Numbers, confidence: float = 0.95) -> WinRate:
    """Win rate in (n,) verdicts: above ½ is a win, below it a loss."""
    verdicts = np.asarray(preferences, float)
    return win_rate(verdicts, 1 - verdicts, confidence)


def win_rate_by(groups: Sequence[Hashable], preferences: Numbers, confidence: float = 0.95) -> dict[Hashable, WinRate]:
    """A win rate for each topic, source or other label, in the order of first appearance.

    Args:
        groups: (n,) the label of each prompt.
        preferences: (n,); above ½ is a win, below it a loss.
    """
    verdicts = checked_preferences(preferences)
    if len(groups) != len(verdicts):
        raise ValueError(f"{len(groups)} labels for {len(verdicts)} preferences")
    codes, labels = numbered(groups)
    return {label: won(verdicts[codes == code], confidence) for code, label in enumerate(labels)}


def few_groups(labels: Sequence[object], least: int = 10, most: int = 10) -> list[str]:
    """(n,) labels of which at most `most` differ: rare and missing ones become `OTHER`.

    Args:
        labels: (n,), text; anything else is missing.
        least: prompts a group needs to stand for itself.
    """
    counts = Counter(label for label in labels if isinstance(label, str) and label != OTHER)
    large = sorted((label for label in counts if counts[label] >= least), key=lambda label: (-counts[label], label))
    whole = len(large) <= most and sum(counts[label] for label in large) == len(labels)
    kept = set(large if whole else large[: most - 1])
    return [label if isinstance(label, str) and label in kept else OTHER for label in labels]


def pair_accuracy(chosen: Numbers, rejected: Numbers) -> float:
    """Share of pairs whose chosen side scores higher, a tie counted ½: the one rule for every accuracy of pairs.

    A tie is neither right nor wrong. Whoever knows nothing comes to ½ by it, whether he ties or guesses.

    Args:
        chosen, rejected: (n,).
    """
    difference = np.asarray(chosen, float) - np.asarray(rejected, float)
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def published_preferences(raw: Sequence[float | None] | np.ndarray) -> np.ndarray:
    """(m,) preferences for the model under test from AlpacaEval's coding of verdicts.

    There 1 is a win of the baseline, 2 one of the model, 1.5 or the older 0 a tie, anything between a probability, and
    NaN or None a verdict that could not be read; such rows are dropped (github.com/tatsu-lab/alpaca_eval, README).

    Args:
        raw: (n,).

    Raises:
        ValueError: a verdict that is neither 0 nor in [1, 2].
    """
    verdicts = np.array(raw, float).ravel()
    verdicts = verdicts[~np.isnan(verdicts)]
    verdicts[verdicts == 0] = 1.5
    strange = verdicts[(verdicts < 1) | (verdicts > 2)]
    if len(strange):
        raise ValueError(f"published verdicts are 0 or lie in [1, 2], found {strange[0]:g}")
    return verdicts - 1


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of wins against losses at ½; 1 where there is neither (Dixon & Mood 1946, JASA 41)."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Numbers) -> np.ndarray:
    """Adjusted p-values, in the order given: those ≤ α may be called significant with family-wise error α (Holm 1979,
    Scand. J. Stat. 6, p. 65)."""
    given = np.asarray(p_values, float)
    if given.ndim != 1 or not ((given >= 0) & (given <= 1)).all():
        raise ValueError("p-values are a list of numbers in [0, 1]")
    return multipletests(given, method="holm")[1] if len(given) else given


def pooled(
    by_seed: Mapping[Hashable, Numbers | None],
    prompts: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> PooledRate:
    """One win rate from several seeds that answered the same prompts.

    Args:
        by_seed: for each seed its (n,) preferences in the order of the prompts, or None if it failed.
        prompts: (n,) what the prompts are, where one comes up more than once.

    Raises:
        ValueError: seeds with different numbers of preferences, or all failed.
    """
    ended = {seed: checked_preferences(found) for seed, found in by_seed.items() if found is not None}
    if not ended:
        raise ValueError("no seed has a result")
    counts = {len(found) for found in ended.values()}
    if len(counts) > 1:
        raise ValueError(f"seeds have different numbers of preferences: {sorted(counts)}")
    ids = list(range(counts.pop())) if prompts is None else list(prompts)
    rates = {seed: float(ended[seed].mean()) if seed in ended else math.nan for seed in by_seed}
    known = [rates[seed] for seed in ended]
    together = np.concatenate(list(ended.values()))
    low, high = cluster_interval(together, ids * len(ended), confidence)
    return PooledRate(
        rate=float(together.mean()),
        low=low,
        high=high,
        seeds=len(by_seed),
        failed=len(by_seed) - len(ended),
        better=sum(rate > 0.5 for rate in known),
        spread=float(np.std(known, ddof=1)) if len(known) > 1 else math.nan,
        by_seed=rates,
    )


def best_of_n_kl(n: int) -> float:
    """Nats from a model to the best of n of its answers, at most: ln n − (n − 1) / n.

    Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; that it is an upper bound, reached where no answer comes
    twice: Beirami et al. 2024, arXiv:2401.01879.
    """
    if n < 1:
        raise ValueError("best of n needs n of at least 1")
    return math.log(n) - (n - 1) / n


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n (Li et al. 2016, arXiv:1510.03055, §5.2): different n-grams over all n-grams, words by spaces.

    Near 0 when a model says the same thing to everybody.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[str], n: int) -> float:
    """Share of n-grams that the same text had before, mean over texts (seq-rep-n of Welleck et al. 2019,
    arXiv:1908.04319), words by spaces; a text of fewer than n words is left out.

    Near 1 when answers go round in circles.
    """
    grams = [found for found in (_grams(text, n) for text in texts) if found]
    return float(np.mean([1 - len(set(found)) / len(found) for found in grams])) if grams else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def rouge(candidates: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of `rouge1`, `rouge2` and `rougeL` (Lin 2004, W04-1013, §2 and §3.1), by the package rouge-score.

    Its words are runs of ASCII letters and digits in lower case; text in another script counts as empty.

    Args:
        candidates, references: (n,), answer by answer.
    """
    if len(candidates) != len(references) or not len(candidates):
        raise ValueError("rouge compares two non-empty lists of the same length")
    from rouge_score.rouge_scorer import RougeScorer  # it imports nltk, which takes a second

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)
    scores = [scorer.score(reference, candidate) for candidate, reference in zip(candidates, references, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}
