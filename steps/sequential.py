"""A comparison that may be looked at after every prompt and stopped at any time."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Decision = Literal["better", "worse", "undecided"]
STAKE = 0.5  # never more of the capital on one verdict, so that none can ruin the better


class SequentialTest:
    """Is a mean preference above or below a value? Its error holds wherever one stops.

    For every conceivable mean m two gamblers bet on the next verdict, one that it lies above m, one below; if m is the
    mean, neither is expected to gain. What has made either's capital 2 / α is ruled out; the means that are left form
    an interval that holds the true one at all times together with probability 1 − α (hedged capital: Waudby-Smith &
    Ramdas 2024, J. R. Stat. Soc. B 86, p. 1, arXiv:2010.09686, theorem 3, with predictable plug-in bets).

    "better" when the value and everything below it is ruled out, "worse" when it and everything above it is. A
    decision stays. For prompts that are alike the share of false "better" is at most α / 2, and so is that of "worse".
    Verdicts must come in an order that does not depend on what they say, one a prompt (several on one prompt: their
    mean).

    Args:
        confidence: 1 − α.
        value: ½ asks whether a model is better than another.
        steps: of the grid on which means are looked at; the interval's ends are multiples of 1 / steps.
    """

    def __init__(self, confidence: float = 0.95, value: float = 0.5, steps: int = 1000) -> None:
        if not 0 < confidence < 1 or not 0 < value < 1:
            raise ValueError("confidence and value lie between 0 and 1")
        # The value asked about is looked at exactly, wherever the grid's steps fall.
        self._means = np.union1d(np.linspace(0, 1, steps + 1), [value])
        self._value = int(np.searchsorted(self._means, value))
        self._limit = math.log(2 / (1 - confidence))
        self._rising = np.zeros(len(self._means))
        self._falling = np.zeros(len(self._means))
        with np.errstate(divide="ignore"):
            self._most_rising = STAKE / self._means
            self._most_falling = STAKE / (1 - self._means)
        self._low, self._high = -1, len(self._means)
        self._sum = self._squares = 0.0
        self.n = 0

    def see(self, preference: float) -> Decision:
        """Take note of one verdict in [0, 1] (½ a tie), and say what is known so far."""
        if not 0 <= preference <= 1:
            raise ValueError(f"a preference lies in [0, 1], not {preference:g}")
        variance = (0.25 + self._squares) / (self.n + 1)
        self.n += 1
        bet = math.sqrt(2 * self._limit / (variance * self.n * math.log(self.n + 1)))
        surprise = preference - self._means
        self._rising += np.log1p(np.minimum(bet, self._most_rising) * surprise)
        self._falling += np.log1p(-np.minimum(bet, self._most_falling) * surprise)
        # What was ruled out once stays so: the bound holds for all times together.
        self._low = max(self._low, self._last(self._rising >= self._limit))
        self._high = min(self._high, len(self._means) - 1 - self._last((self._falling >= self._limit)[::-1]))
        self._sum += preference
        self._squares += (preference - (0.5 + self._sum) / (self.n + 1)) ** 2
        return self.decision

    @staticmethod
    def _last(ruled_out: np.ndarray) -> int:
        """The last of those ruled out from the start on, or −1."""
        return len(ruled_out) - 1 if ruled_out.all() else int(ruled_out.argmin()) - 1

    @property
    def decision(self) -> Decision:
        """What the verdicts seen so far say."""
        if self._low >= self._value:
            return "better"
        return "worse" if self._high <= self._value else "undecided"

    @property
    def interval(self) -> tuple[float, float]:
        """The means not ruled out lie strictly between these two, or reach to 0 or 1."""
        low = self._means[self._low] if self._low >= 0 else 0.0
        high = self._means[self._high] if self._high < len(self._means) else 1.0
        return float(low), float(high)

    @property
    def rate(self) -> float:
        """Mean of the verdicts seen; NaN before the first."""
        return self._sum / self.n if self.n else math.nan
