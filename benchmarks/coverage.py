"""Do the intervals hold the truth as often as they say? `python -m benchmarks.coverage [EXPERIMENTS] [METHOD ...]`

Without arguments 10,000 simulated evaluations for each row, all methods. A 95 % interval should hold the true win rate
in 94 to 96 % of them, and a model against itself (rate ½) should have a lower bound above ½ in 2.5 %. For the clustered
methods each prompt is answered three times, and the answers' luck hangs together. First, a thousand evaluations of a
model against itself go through the gate. All of it takes two minutes of one idle core.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import numpy as np
from scipy import stats

from steps.config import Gate
from steps.gate import decide
from steps.intervals import bounds_of_draws, normal_interval, score_interval, wilson
from steps.length_control import length_controlled_win_rate
from steps.sequential import SequentialTest
from steps.statistics import win_rate

ANSWERS = 3
BLOCK = 100  # experiments whose prompts are resampled by the same draws; each row of figures has many blocks
RESAMPLES = 1000
ITSELF = "itself"  # as a method: the gate and the sequential test instead of an interval
SETTINGS = [(n, rate, ties) for n in (50, 200) for rate in (0.5, 0.7) for ties in (0.0, 0.4)]
Setting = tuple[int, float, float]  # prompts, rate, share of ties
Interval = tuple[float, float]
Method = Callable[[np.random.Generator, int, Setting], Sequence[Interval] | np.ndarray]


def verdicts(rng: np.random.Generator, size: int | tuple[int, int], rate: float, ties: float) -> np.ndarray:
    """Independent preferences of mean `rate`."""
    return rng.choice([0, 0.5, 1], size, p=[1 - rate - ties / 2, ties, rate - ties / 2])


def repeated(rng: np.random.Generator, experiments: int, n: int, rate: float, ties: float) -> np.ndarray:
    """(experiments, n, 3) preferences; a prompt's own chance of winning is drawn from a Beta distribution."""
    decided, size = (rate - ties / 2) / (1 - ties), (experiments, n, ANSWERS)
    luck = rng.beta(2 * decided, 2 * (1 - decided), (experiments, n, 1))
    return np.where(rng.random(size) < ties, 0.5, rng.random(size) < luck)


def each(one: Callable[[np.random.Generator, int, float, float], Interval]) -> Method:
    """A method that simulates and judges one experiment at a time."""

    def all_of_them(rng: np.random.Generator, experiments: int, setting: Setting) -> list[Interval]:
        return [one(rng, *setting) for _ in range(experiments)]

    return all_of_them


def by_counts(interval: Callable[[int, int, int], Interval]) -> Method:
    """A method that looks at wins, ties and losses alone: each triple that comes up is worked out once."""

    def all_of_them(rng: np.random.Generator, experiments: int, setting: Setting) -> list[Interval]:
        n, rate, ties = setting
        found, known = verdicts(rng, (experiments, n), rate, ties), cache(interval)
        triples = np.stack([(found == value).sum(1) for value in (1, 0.5, 0)], 1)
        return [known(*triple) for triple in triples.tolist()]

    return all_of_them


def by_bootstrap(method: Literal["bca", "percentile"]) -> Method:
    """`bootstrap_interval`, whose resamples a block of experiments shares: one product of matrices for all of them."""

    def all_of_them(rng: np.random.Generator, experiments: int, setting: Setting) -> list[Interval]:
        n, bounds = setting[0], []
        sizes = np.full(n, ANSWERS)
        for first in range(0, experiments, BLOCK):
            sums = repeated(rng, min(BLOCK, experiments - first), *setting).sum(2)
            places = rng.integers(n, size=(RESAMPLES, n)) + n * np.arange(RESAMPLES)[:, None]
            times = np.bincount(places.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n)
            means = sums @ times.T.astype(float) / (n * ANSWERS)
            bounds += [bounds_of_draws(*row, sizes, 0.95, method) for row in zip(means, sums, strict=True)]
        return bounds

    return all_of_them


def cluster(rng: np.random.Generator, experiments: int, setting: Setting) -> np.ndarray:
    """`cluster_interval` by its formula, for all experiments at once; that the two agree is tested."""
    sums = repeated(rng, experiments, *setting).sum(2)
    n, size = setting[0], setting[0] * ANSWERS
    means = sums.sum(1) / size
    errors = np.sqrt(n / (n - 1) * ((sums - ANSWERS * means[:, None]) ** 2).sum(1)) / size
    half = stats.t.ppf(0.975, n - 1) * errors
    return np.stack([means - half, means + half], 1)


def wilson_on_repeats(rng: np.random.Generator, experiments: int, setting: Setting) -> list[Interval]:
    """What happens if repeated answers are taken for new prompts."""
    size, known = setting[0] * ANSWERS, cache(wilson)
    return [known(won, size) for won in repeated(rng, experiments, *setting).sum((1, 2)).tolist()]


def normal(rng: np.random.Generator, n: int, rate: float, ties: float) -> Interval:
    return normal_interval(verdicts(rng, n, rate, ties))


def length_control(rng: np.random.Generator, n: int, rate: float, ties: float) -> Interval:
    """Verdicts with a liking for length, the model's answers longer by a quarter; the truth is the rate without it."""
    del ties
    one, two = rng.lognormal(6, 0.5, n) * 1.25, rng.lognormal(6, 0.5, n)
    log_odds = np.log(rate / (1 - rate)) + 1.5 * np.tanh((one - two) / (one - two).std(ddof=1))
    judged = (rng.random(n) < 1 / (1 + np.exp(-log_odds))).astype(float)
    found = length_controlled_win_rate(judged, one, two)
    return found.low, found.high


METHODS: dict[str, Method] = {
    "score": by_counts(score_interval),
    "wilson": by_counts(lambda wins, ties, losses: wilson(wins + ties / 2, wins + ties + losses)),
    "normal": each(normal),
    "cluster": cluster,
    "bootstrap": by_bootstrap("bca"),
    "percentile": by_bootstrap("percentile"),
    "wilson-repeats": wilson_on_repeats,
    "length": each(length_control),
}


def promotions(experiments: int, n: int, ties: float) -> float:
    """Share of evaluations of a model against itself that the gate promotes."""
    rng, promoted, gate = np.random.default_rng(7), 0, Gate(win_rate_floor=0.5, guards={})
    for _ in range(experiments):
        found = win_rate(verdicts(rng, n, 0.5, ties), np.full(n, 0.5))
        facts = {
            "judge": "gold",
            "judge_accuracy": 1.0,
            "win_rate": found.rate,
            "win_rate_low": found.low,
        }
        promoted += decide(facts, gate)["promote"]
    return promoted / experiments


def sequential_stops(experiments: int, n: int, ties: float) -> tuple[float, float]:
    """Share of sequential tests of a model against itself that end within n prompts, as better and as worse."""
    rng, ends = np.random.default_rng(8), []
    for _ in range(experiments):
        test = SequentialTest(steps=2)
        for verdict in verdicts(rng, n, 0.5, ties).tolist():
            if test.see(verdict) != "undecided":
                break
        ends.append(test.decision)
    return ends.count("better") / experiments, ends.count("worse") / experiments


def main(experiments: int, methods: list[str]) -> None:
    if ITSELF in methods:
        against_itself(experiments)
    print(f"{experiments} experiments a row; standard error of a coverage of 0.95: {(0.0475 / experiments) ** 0.5:.4f}")
    head = ("method", "n", "rate", "ties", "coverage", "too high", "too low", "width", "low > ½", "ms")
    print("{:<15}{:>5}{:>6}{:>6}{:>10}{:>10}{:>9}{:>8}{:>9}{:>8}".format(*head))
    for method in [name for name in methods if name != ITSELF]:
        for n, rate, ties in SETTINGS:
            if method == "length" and ties:
                continue
            began, rng = time.perf_counter(), np.random.default_rng([n, round(100 * rate), round(100 * ties)])
            bounds = np.array(METHODS[method](rng, experiments, (n, rate, ties)))
            # The simulated rate is a decimal; bounds that equal it but for rounding hold it.
            above, below = (bounds[:, 0] > rate + 1e-12).mean(), (bounds[:, 1] < rate - 1e-12).mean()
            promoted = f"{(bounds[:, 0] > 0.5).mean():.4f}" if rate == 0.5 else ""
            spent = 1000 * (time.perf_counter() - began) / experiments
            print(
                f"{method:<15}{n:>5}{rate:>6.2f}{ties:>6.2f}{1 - above - below:>10.4f}{above:>10.4f}{below:>9.4f}"
                f"{np.ptp(bounds, 1).mean():>8.3f}{promoted:>9}{spent:>8.2f}",
                flush=True,
            )


def against_itself(experiments: int) -> None:
    for ties in (0.0, 0.4):
        print(f"gate, n = 200, ties {ties:.0%}: {promotions(1000, 200, ties):.3f} promoted against itself, of 1000")
    for ties in (0.0, 0.4):
        better, worse = sequential_stops(min(experiments, 1000), 300, ties)
        print(f"sequential, up to 300 prompts, ties {ties:.0%}: {better:.3f} better and {worse:.3f} worse than itself")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, sys.argv[2:] or [*METHODS, ITSELF])
