"""How many prompts a comparison needs. Pure functions; every one names its source."""

from __future__ import annotations

import math
from typing import Literal

from scipy import optimize, stats

Interval = Literal["wilson", "normal"]


def prompts_needed(
    effect: float,
    rate: float = 0.5,
    power: float = 0.8,
    confidence: float = 0.95,
    tie_share: float = 0.0,
    interval: Interval = "wilson",
) -> int:
    """Prompts until the interval of a win rate of `rate + effect` excludes `rate` with probability `power`.

    √n |effect| = z₁ σ₀ + z₂ σ₁, with σ₀ the deviation that the interval takes for granted at `rate` and σ₁ the true
    one at `rate + effect` (Lachin 1981, Control. Clin. Trials 2, p. 93). A verdict with mean p and ties t has variance
    p (1 − p) − t / 4; Wilson's interval knows no ties and takes p (1 − p).

    Args:
        effect: in points of 1, as 0.03; may be negative.
        rate: what the interval has to exclude.
        confidence: of the two-sided interval; excluding on the right side alone has level (1 − confidence) / 2.
        tie_share: share of prompts expected to tie, each counted ½.
        interval: `wilson`, or `normal` for one that knows the verdicts' own variance (also the bootstrap).

    Raises:
        ValueError: a share outside [0, 1], no effect, or a rate that the ties leave no room for.
    """
    if effect == 0:
        raise ValueError("no number of prompts shows an effect of 0")
    return math.ceil(_prompts(effect, rate, power, confidence, tie_share, interval) - 1e-9)


def detectable_effect(
    n: int,
    rate: float = 0.5,
    power: float = 0.8,
    confidence: float = 0.95,
    tie_share: float = 0.0,
    interval: Interval = "wilson",
) -> float:
    """Smallest rise above `rate` that n prompts show with probability `power`: the inverse of `prompts_needed`.

    Raises:
        ValueError: n below 1, or so few that not even the highest possible rate would show.
    """
    if n < 1:
        raise ValueError("an effect needs at least one prompt")
    most = 1 - tie_share / 2 - rate
    if most <= 0 or _prompts(most, rate, power, confidence, tie_share, interval) > n:
        raise ValueError(f"{n} prompts show no effect with this power")
    return float(
        optimize.brentq(lambda x: _prompts(x, rate, power, confidence, tie_share, interval) - n, 1e-9, most, xtol=1e-12)
    )


def _prompts(
    effect: float, rate: float, power: float, confidence: float, tie_share: float, interval: Interval
) -> float:
    shares = {"rate": rate, "power": power, "confidence": confidence, "tie_share": tie_share}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} lies in [0, 1], not {share:g}")
    for level in (rate, rate + effect):
        if not tie_share / 2 - 1e-12 <= level <= 1 - tie_share / 2 + 1e-12:
            raise ValueError(f"with {tie_share:.0%} ties a rate of {level:g} cannot be")
    assumed = rate * (1 - rate) - (tie_share / 4 if interval == "normal" else 0)
    true = (rate + effect) * (1 - rate - effect) - tie_share / 4
    reach = stats.norm.ppf((1 + confidence) / 2) * math.sqrt(max(assumed, 0))
    return float(((reach + stats.norm.ppf(power) * math.sqrt(max(true, 0))) / effect) ** 2)
