"""Alarms: known ways in which tuning goes wrong, looked for in the metrics while they come in.

A rule sees every metric reported so far and says what is wrong, or nothing. It may `warn`, `stop` the training (the
best checkpoint from before is kept) or `fail` the gate; the recipe's `alarms` decide which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from steps.config import Alarms

Points = list[tuple[int, float]]
Curves = Mapping[str, Points]
# What a rule makes of the curves so far, the values that came in with the latest step among them: (value, words).
Rule = Callable[[Curves, float], tuple[float, str] | None]


@dataclass(frozen=True)
class Raised:
    """An alarm that went off.

    Attributes:
        action: `warn`, `stop` or `fail`.
        step: of training, or 0 at an evaluation.
    """

    name: str
    action: str
    step: int
    value: float
    limit: float
    message: str


class Watch:
    """Sees metrics go by and raises each alarm once, at the first step it is due."""

    def __init__(self, alarms: Alarms) -> None:
        self.alarms = alarms
        self.curves: dict[str, Points] = {}
        self.raised: dict[str, Raised] = {}

    def see(self, values: Mapping[str, float], step: int) -> list[Raised]:
        """Take in what was reported at a step; the alarms it raises."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append((step, float(value)))
        fresh = []
        for name, rule in RULES.items():
            alarm = getattr(self.alarms, name)
            if alarm.action == "ignore" or name in self.raised:
                continue
            if found := rule(self.curves, alarm.limit):
                value, message = found
                self.raised[name] = Raised(name, alarm.action, step, value, alarm.limit, message)
                fresh.append(self.raised[name])
        return fresh

    @property
    def stops_at(self) -> int | None:
        """The step at which training has to end, or None. A resumed run has yet to come to it again."""
        steps = [alarm.step for alarm in self.raised.values() if alarm.action == "stop"]
        return min(steps, default=None)

    def facts(self) -> list[dict[str, Any]]:
        """The raised alarms as plain values."""
        return [asdict(alarm) for alarm in self.raised.values()]


# -- the rules ---------------------------------------------------------------------------------------------------


def _last(curves: Curves, *names: str) -> float | None:
    """The newest value of the first of these metrics that there is."""
    return next((curves[name][-1][1] for name in names if name in curves), None)


def not_a_number(curves: Curves, limit: float) -> tuple[float, str] | None:
    for name, points in curves.items():
        if not math.isfinite(points[-1][1]):
            return points[-1][1], f"{name} is {points[-1][1]}"
    return None


def displaced_likelihood(curves: Curves, limit: float) -> tuple[float, str] | None:
    """Chosen answers become less likely while the margin grows (Razin et al. 2024, arXiv:2410.08847)."""
    for prefix in ("eval_", ""):
        chosen, margins = curves.get(f"{prefix}rewards/chosen"), curves.get(f"{prefix}rewards/margins")
        if chosen and margins:
            low = chosen[-1][1] < -limit and margins[-1][1] > 0
            grows = len(margins) == 1 or margins[-1][1] > margins[0][1]
            words = (
                f"chosen answers are less likely than under the reference (rewards/chosen {chosen[-1][1]:+.2f}) "
                f"while the margin grows to {margins[-1][1]:.2f}"
            )
            return (chosen[-1][1], words) if low and grows else None
    return None


def kl(curves: Curves, limit: float) -> tuple[float, str] | None:
    value = _last(curves, "kl", "policy_kl")
    if value is None or not value > limit:
        return None
    return value, f"the policy is {value:.1f} nats an answer from its start, the budget is {limit:g}"


def negative_kl(curves: Curves, limit: float) -> tuple[float, str] | None:
    """An estimate of KL may come out below 0 by chance; far below, answers were not drawn from the policy."""
    for value, error in ((_last(curves, name), _last(curves, f"{name}_error")) for name in ("kl", "policy_kl")):
        if value is not None and error is not None and value < -limit * error and value < 0:
            return value, f"KL is {value:.3f}, {-value / max(error, 1e-12):.1f} standard errors below 0"
    return None


def overoptimisation(curves: Curves, limit: float) -> tuple[float, str] | None:
    """The reward model is pleased and people are not (Gao et al. 2022, arXiv:2210.10760)."""
    reward, gold = (_errors(curves, f"{kind}_gain") for kind in ("reward", "gold"))
    if reward is None or gold is None or not (reward > limit and gold < -limit):
        return None
    gained, lost = curves["reward_gain"][-1][1], -curves["gold_gain"][-1][1]
    return gold, f"the reward model's score rose by {gained:.2f} while the gold judge's fell by {lost:.2f}"


def _errors(curves: Curves, name: str) -> float | None:
    """A mean in its standard errors."""
    value, error = _last(curves, name), _last(curves, f"{name}_error")
    return None if value is None or error is None else value / max(error, 1e-12)


def length(curves: Curves, limit: float) -> tuple[float, str] | None:
    value = _last(curves, "length_ratio")
    if value is None and (points := curves.get("completion_length")):
        value = points[-1][1] / max(points[0][1], 1e-9)
    if value is None or not value > limit:
        return None
    return value, f"answers are {value:.2f} times as long as at the start, the limit is {limit:g}"


def empty(curves: Curves, limit: float) -> tuple[float, str] | None:
    value, start = _last(curves, "policy_empty"), _last(curves, "start_empty")
    if value is None or not value > limit:
        return None
    before = "" if start is None else f", of the start's {start:.0%}"
    return value, f"{value:.0%} of the policy's answers are empty{before}"


def entropy(curves: Curves, limit: float) -> tuple[float, str] | None:
    """Entropy is gone: the policy says one thing, and can learn nothing more from its own answers."""
    points = curves.get("entropy")
    if "reward" not in curves or not points or not points[-1][1] < limit * points[0][1]:
        return None
    return points[-1][1], f"entropy fell from {points[0][1]:.2f} to {points[-1][1]:.2f} nats a token"


def critic(curves: Curves, limit: float, reports: int = 4) -> tuple[float, str] | None:
    """A critic that explains less than a constant would makes advantages worse than none (reports: rollouts)."""
    points = curves.get("explained_variance", [])[-reports:]
    mean = sum(value for _, value in points) / reports
    if len(points) < reports or not mean < limit:
        return None
    return mean, f"the critic's explained variance was {mean:.2f} over the last {reports} rollouts"


def reward_accuracy(curves: Curves, limit: float) -> tuple[float, str] | None:
    value = _last(curves, "eval_rewards/accuracies")
    if value is None or not value < limit:
        return None
    return value, f"the reward model orders {value:.3f} of held-out pairs right, the floor is {limit:g}"


def leak(curves: Curves, limit: float, reports: int = 2) -> tuple[float, str] | None:
    """Preferences are noisy: whoever is never wrong from the first steps on has seen the answer somewhere."""
    points = curves.get("rewards/accuracies", [])[:reports]
    if len(points) < reports or points[-1][0] > limit or min(value for _, value in points) < 1:
        return None
    return 1.0, f"every pair was ordered right from the start, up to step {points[-1][0]}: is the label in the text?"


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        not_a_number,
        displaced_likelihood,
        kl,
        negative_kl,
        overoptimisation,
        length,
        empty,
        entropy,
        critic,
        reward_accuracy,
        leak,
    )
}
# The alarms of each step: a step is run again when one of its own is changed, and only then.
OF_STEP: dict[str, tuple[str, ...]] = {
    "reward": ("not_a_number", "reward_accuracy", "leak"),
    "policy": ("not_a_number", "displaced_likelihood", "kl", "negative_kl", "length", "entropy", "critic", "leak"),
    "evaluate": ("kl", "negative_kl", "overoptimisation", "length", "empty"),
}


def of_step(name: str, alarms: Alarms) -> Alarms:
    """The recipe's alarms with all ignored that are not this step's."""
    silent = {alarm: {"action": "ignore"} for alarm in RULES if alarm not in OF_STEP.get(name, ())}
    return Alarms.model_validate({**alarms.model_dump(mode="json"), **silent})


QUIET = of_step("", Alarms())
