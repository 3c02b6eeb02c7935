"""The gate: whether a policy becomes the champion. A pure function of what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steps.artifact import MANIFEST, Facts
from steps.config import Gate
from steps.tracking import Tracker


def decide(measured: Facts, gate: Gate) -> dict[str, Any]:
    """Promote or keep, and why, in sentences.

    Args:
        measured: the evaluate step's facts.

    Returns:
        `promote`, and `reasons`: every condition with the figures it was held against.
    """
    conditions = [
        (
            measured["judge_accuracy"] >= gate.judge_accuracy_floor,
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
    return {
        "promote": all(met for met, _ in conditions),
        "reasons": [f"{'yes' if met else 'NO'}: {text}" for met, text in conditions],
    }


def judge_evaluation(gate: Gate, *, evaluate: Path, seed: int, out: Path, tracker: Tracker) -> Facts:
    """Read an evaluation's facts and decide; the verdict is kept as `verdict.json`."""
    measured = json.loads((evaluate / MANIFEST).read_text(encoding="utf-8"))["facts"]
    verdict = decide(measured, gate)
    (out / "verdict.json").write_text(json.dumps(verdict, indent=1), encoding="utf-8")
    return verdict
