"""The gate: whether a policy becomes the champion. A pure function of what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steps.artifact import MANIFEST, Facts
from steps.config import Gate, Guard
from steps.tracking import Tracker


def decide(measured: Facts, gate: Gate, alarms: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Promote or keep, and why, in sentences.

    Args:
        measured: the evaluate step's facts.
        alarms: those that went off in training and evaluation; one whose action is `fail` keeps the policy back.

    Returns:
        `promote`, and `reasons`: every condition with the figures it was held against.
    """
    conditions = [
        (
            judge_counts(measured, gate),
            f"the {measured['judge']} judge orders {measured['judge_accuracy']:.1%} of held-out human pairs right "
            f"(floor {gate.judge_accuracy_floor:.0%})",
        ),
        (
            measured["win_rate_low"] > gate.win_rate_floor,
            f"win rate against the start {measured['win_rate']:.3f}, lower bound {measured['win_rate_low']:.3f} "
            f"(floor {gate.win_rate_floor:g})",
        ),
    ]
    if "champion_win_rate" in measured:
        conditions.append(
            (
                measured["champion_win_rate_low"] > 0.5,
                f"win rate against the champion {measured['champion_win_rate']:.3f}, "
                f"lower bound {measured['champion_win_rate_low']:.3f} (floor 0.5)",
            )
        )
    conditions += [_guarded(name, measured.get(name), guard) for name, guard in gate.guards.items()]
    conditions += [
        (alarm["action"] != "fail", f"alarm {alarm['name']} ({alarm['action']}): {alarm['message']}")
        for alarm in alarms
    ]
    return {
        "promote": all(met for met, _ in conditions),
        "reasons": [f"{'yes' if met else 'NO'}: {text}" for met, text in conditions],
    }


def judge_counts(measured: Facts, gate: Gate) -> bool:
    """Whether a judge's word may promote a model: as good as the floor, surely better than chance, seldom at a loss.

    Args:
        measured: facts of `steps.judge_validation.JudgeReport`. The interval's lower bound must reach chance (or a
            floor below chance), so that a handful of pairs vouches for nobody.
    """
    silent = 1 - measured.get("judge_judged", 1) / measured.get("judge_pairs", 1)
    surely = measured.get("judge_accuracy_low", 1) >= min(0.5, gate.judge_accuracy_floor)
    few = silent <= gate.judge_silence_ceiling + 1e-9
    return measured["judge_accuracy"] >= gate.judge_accuracy_floor and surely and few


def _guarded(name: str, value: Any, guard: Guard) -> tuple[bool, str]:
    low, high = (float("-inf") if guard.at_least is None else guard.at_least), guard.at_most
    bounds = [f"at least {guard.at_least:g}"] if guard.at_least is not None else []
    bounds += [f"at most {high:g}"] if high is not None else []
    if not isinstance(value, int | float):
        return False, f"{name} was not measured ({' and '.join(bounds)} wanted)"
    return low <= value <= (float("inf") if high is None else high), f"{name} {value:.3f} ({' and '.join(bounds)})"


def judge_evaluation(
    gate: Gate, *, evaluate: Path, policy: Path, seed: int, out: Path, tracker: Tracker, reward: Path | None = None
) -> Facts:
    """Read an evaluation's facts and all steps' alarms and decide; the verdict is kept as `verdict.json`.

    Args:
        reward: None where the recipe has no reward model.
    """
    steps = [step for step in (reward, policy, evaluate) if step is not None]
    facts = [json.loads((step / MANIFEST).read_text(encoding="utf-8"))["facts"] for step in steps]
    verdict = decide(facts[-1], gate, [alarm for found in facts for alarm in found.get("alarms", ())])
    (out / "verdict.json").write_text(json.dumps(verdict, indent=1), encoding="utf-8")
    return verdict
