"""The gate: every condition must be met, and none can be met by reaching its floor from below."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steps.config import Gate
from steps.gate import decide, judge_evaluation
from steps.statistics import win_rate
from steps.tracking import NullTracker

GATE = Gate(win_rate_floor=0.5, judge_accuracy_floor=0.6)
GOOD = {
    "judge": "gold",
    "judge_accuracy": 0.8,
    "win_rate": 0.7,
    "win_rate_low": 0.6,
    "length_ratio": 1.1,
    "distinct_ratio": 0.9,
}
BEATS_CHAMPION = {"champion_win_rate": 0.6, "champion_win_rate_low": 0.55}


def test_a_policy_that_meets_every_condition_is_promoted() -> None:
    verdict = decide(GOOD, GATE)
    assert verdict["promote"] is True
    assert len(verdict["reasons"]) == 4
    assert all(reason.startswith("yes: ") for reason in verdict["reasons"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"judge_accuracy": 0.59}, "NO: the gold judge orders 59.0%"),
        ({"win_rate_low": 0.49}, "NO: win rate against the start 0.700, lower bound 0.490"),
        ({"champion_win_rate_low": 0.49}, "NO: win rate against the champion 0.600, lower bound 0.490"),
    ],
)
def test_each_condition_alone_keeps_a_policy_back(change: dict[str, float], reason: str) -> None:
    verdict = decide({**GOOD, **BEATS_CHAMPION, **change}, GATE)
    assert verdict["promote"] is False
    refused = [said for said in verdict["reasons"] if said.startswith("NO: ")]
    assert len(refused) == 1
    assert refused[0].startswith(reason)


@pytest.mark.parametrize("change", [{"win_rate_low": 0.5}, {"champion_win_rate_low": 0.5}])
def test_a_lower_bound_on_the_floor_does_not_promote(change: dict[str, float]) -> None:
    assert decide({**GOOD, **BEATS_CHAMPION, **change}, GATE)["promote"] is False


def test_a_judge_exactly_on_its_floor_counts() -> None:
    assert decide({**GOOD, "judge_accuracy": 0.6}, GATE)["promote"] is True


def test_without_a_champion_there_is_no_champion_condition() -> None:
    assert not any("champion" in reason for reason in decide(GOOD, GATE)["reasons"])
    assert any("champion" in reason for reason in decide({**GOOD, **BEATS_CHAMPION}, GATE)["reasons"])


def test_the_floors_are_those_of_the_recipe() -> None:
    assert decide(GOOD, Gate(win_rate_floor=0.6))["promote"] is False
    assert decide(GOOD, Gate(judge_accuracy_floor=0.81))["promote"] is False


@pytest.mark.parametrize("name", ["judge_accuracy", "win_rate_low", "champion_win_rate_low"])
def test_what_is_not_a_number_does_not_promote(name: str) -> None:
    assert decide({**GOOD, **BEATS_CHAMPION, name: float("nan")}, GATE)["promote"] is False


@pytest.mark.parametrize(
    ("guard", "value", "met"),
    [
        ({"at_most": 1.5}, 1.5, True),
        ({"at_most": 1.5}, 1.51, False),
        ({"at_least": 0.5}, 0.5, True),
        ({"at_least": 0.5}, 0.49, False),
        ({"at_least": 0.5, "at_most": 1}, 0.7, True),
        ({"at_least": 0.5, "at_most": 1}, float("nan"), False),
        ({"at_most": 1.5}, None, False),
    ],
)
def test_a_guard_holds_its_fact_in_its_range(guard: dict[str, float], value: float | None, met: bool) -> None:
    gate = Gate.model_validate({"guards": {"policy_repetition": guard}})
    assert decide({**GOOD, "policy_repetition": value}, gate)["promote"] is met


def alarm(action: str) -> dict[str, Any]:
    return {"name": "kl", "action": action, "step": 3, "value": 50.0, "limit": 40.0, "message": "far away"}


@pytest.mark.parametrize(("action", "promoted"), [("warn", True), ("stop", True), ("fail", False)])
def test_an_alarm_keeps_a_policy_back_when_its_action_says_so(action: str, promoted: bool) -> None:
    verdict = decide(GOOD, GATE, [alarm(action)])
    assert verdict["promote"] is promoted
    assert verdict["reasons"][-1] == f"{'yes' if promoted else 'NO'}: alarm kl ({action}): far away"


def test_a_model_against_itself_is_promoted_no_oftener_than_the_interval_errs() -> None:
    draw = np.random.default_rng(0)
    promoted = 0
    for _ in range(1000):
        found = win_rate(draw.normal(size=200), draw.normal(size=200))
        promoted += decide({**GOOD, "win_rate": found.rate, "win_rate_low": found.low}, GATE)["promote"]
    assert promoted <= 25 + 3 * np.sqrt(1000 * 0.025 * 0.975)


def test_the_step_reads_an_evaluation_and_all_alarms_and_keeps_its_verdict(tmp_path: Path) -> None:
    steps = {"reward": {"alarms": [alarm("warn")]}, "policy": {"alarms": [alarm("fail")]}, "evaluate": GOOD}
    for name, facts in steps.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"facts": facts, "files": {}}))
    out = tmp_path / "out"
    out.mkdir()
    folders = {name: tmp_path / name for name in steps}
    facts = judge_evaluation(GATE, **folders, seed=0, out=out, tracker=NullTracker())
    assert facts == decide(GOOD, GATE, [alarm("warn"), alarm("fail")])
    assert facts["promote"] is False
    assert json.loads((out / "verdict.json").read_text()) == facts
