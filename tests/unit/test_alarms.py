"""Alarms: every known way to go wrong is seen in the metrics of a run that goes wrong, and in no other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from steps.alarms import OF_STEP, RULES, Watch, of_step
from steps.config import Alarms
from steps.tracking import Spool, curves, entries

SOUND = [
    {"loss": 0.69 - 0.05 * step, "rewards/chosen": 0.1 * step, "rewards/margins": 0.2 * step, "kl": 0.5 * step}
    | {"rewards/accuracies": 0.5 + 0.05 * step, "entropy": 2.0 - 0.1 * step, "reward": 0.1 * step}
    | {"completion_length": 20 + step, "explained_variance": 0.1 * step, "kl_error": 0.1}
    for step in range(8)
]


def raised(reports: Iterable[Mapping[str, float]], **changes: Mapping[str, object]) -> dict[str, int]:
    """Alarms of a run that reports one after the other, with the step each went off at."""
    watch = Watch(Alarms.model_validate(changes))
    for step, values in enumerate(reports):
        watch.see(values, step)
    return {name: alarm.step for name, alarm in watch.raised.items()}


def test_a_sound_run_raises_none() -> None:
    assert raised(SOUND) == {}


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([{"loss": 1.0}, {"loss": math.nan}], {"not_a_number": 1}),
        ([{"grad_norm": math.inf}], {"not_a_number": 0}),
        (
            [{"rewards/chosen": -0.1 * step, "rewards/margins": 0.3 * step} for step in range(3)],
            {"displaced_likelihood": 1},
        ),
        ([{"eval_rewards/chosen": -1.0, "eval_rewards/margins": 0.5}], {"displaced_likelihood": 0}),
        ([{"kl": 39.0}, {"kl": 41.0}], {"kl": 1}),
        ([{"policy_kl": 50.0}], {"kl": 0}),
        ([{"kl": -0.1, "kl_error": 0.1}, {"kl": -0.5, "kl_error": 0.1}], {"negative_kl": 1}),
        (
            [{"reward_gain": 1.0, "reward_gain_error": 0.1, "gold_gain": -0.3, "gold_gain_error": 0.1}],
            {"overoptimisation": 0},
        ),
        ([{"completion_length": 20.0}, {"completion_length": 31.0}], {"length": 1}),
        ([{"length_ratio": 1.6}], {"length": 0}),
        ([{"reward": 1.0, "entropy": 2.0}, {"reward": 1.0, "entropy": 0.3}], {"entropy": 1}),
        ([{"explained_variance": -0.1}] * 4, {"critic": 3}),
        ([{"eval_rewards/accuracies": 0.54}], {"reward_accuracy": 0}),
        ([{"rewards/accuracies": 1.0}] * 2, {"leak": 1}),
    ],
)
def test_a_run_that_goes_wrong_raises_its_alarm(reports: list[dict[str, float]], expected: dict[str, int]) -> None:
    assert raised(reports) == expected


@pytest.mark.parametrize(
    "reports",
    [
        [{"rewards/chosen": -0.5, "rewards/margins": -0.1}],  # nothing is learnt, nothing is displaced
        [{"kl": -0.2, "kl_error": 0.1}],  # chance
        [
            {"reward_gain": -1.0, "reward_gain_error": 0.1, "gold_gain": -0.3, "gold_gain_error": 0.1}
        ],  # no one is fooled
        [{"reward_gain": 1.0, "reward_gain_error": 0.1, "gold_gain": -0.1, "gold_gain_error": 0.1}],  # chance
        [{"entropy": 2.0}, {"entropy": 0.1}],  # imitation may be sure of itself
        [{"explained_variance": -0.1}] * 3,  # the critic has only begun
        [{"rewards/accuracies": 1.0}, {"rewards/accuracies": 0.9}],
    ],
)
def test_what_only_looks_like_it_raises_none(reports: list[dict[str, float]]) -> None:
    assert raised(reports) == {}


@pytest.mark.parametrize("name", RULES)
def test_an_alarm_that_is_ignored_is_silent(name: str) -> None:
    bad = [
        {"loss": math.nan, "kl": 99.0, "rewards/chosen": -1.0, "rewards/margins": 1.0, "completion_length": 10.0 * step}
        | {"reward_gain": 1.0, "gold_gain": -1.0, "reward_gain_error": 0.1, "gold_gain_error": 0.1}
        | {"explained_variance": -1.0, "eval_rewards/accuracies": 0.1, "policy_empty": 0.5}
        | {"rewards/accuracies": 1.0, "reward": 1.0, "entropy": 1.0 / step, "policy_kl": -9.0, "policy_kl_error": 0.1}
        for step in range(1, 10)
    ]
    assert name in raised(bad)
    assert name not in raised(bad, **{name: {"action": "ignore"}})


def test_an_alarm_goes_off_once_at_its_first_step() -> None:
    watch = Watch(Alarms())
    assert [len(watch.see({"kl": 50.0}, step)) for step in (3, 4)] == [1, 0]
    assert watch.raised["kl"].step == 3


def test_only_alarms_that_stop_end_the_training() -> None:
    watch = Watch(Alarms.model_validate({"kl": {"limit": 1, "action": "stop"}, "length": {"action": "warn"}}))
    watch.see({"length_ratio": 9.0}, 1)
    assert watch.stops_at is None
    watch.see({"kl": 2.0}, 4)
    assert watch.stops_at == 4


def test_a_step_watches_its_own_alarms_and_keeps_the_rest_out_of_its_key() -> None:
    given = Alarms.model_validate({"kl": {"limit": 3}, "reward_accuracy": {"limit": 0.9}})
    assert {name for names in OF_STEP.values() for name in names} == set(RULES) == set(Alarms.model_fields)
    assert of_step("reward", given).reward_accuracy.limit == 0.9
    assert of_step("reward", given) == of_step("reward", Alarms.model_validate({"reward_accuracy": {"limit": 0.9}}))
    assert of_step("policy", given).kl.limit == 3


def test_an_alarm_is_a_metric_and_a_tag_at_once(tmp_path: Path) -> None:
    spool = Spool(tmp_path, Alarms.model_validate({"kl": {"limit": 1, "action": "stop"}}))
    spool.metrics({"kl": 2.0}, 7)
    assert curves(tmp_path)["alarm/kl"] == [(7, 2.0)]
    tags = [entry["values"] for _, entry in entries(tmp_path) if entry["op"] == "tags"]
    assert tags == [{"alarm.kl": "stop at 7: the policy is 2.0 nats an answer from its start, the budget is 1"}]
    assert spool.stops_at == 7


def test_a_resumed_step_remembers_what_went_off_and_says_it_once(tmp_path: Path) -> None:
    alarms = Alarms.model_validate({"length": {"action": "stop"}})
    Spool(tmp_path, alarms).metrics({"completion_length": 10.0}, 1)
    Spool(tmp_path, alarms).metrics({"completion_length": 20.0}, 2)
    again = Spool(tmp_path, alarms)
    again.metrics({"completion_length": 20.0}, 2)
    assert again.stops_at == 2
    assert curves(tmp_path)["alarm/length"] == [(2, 2.0)]


def test_answers_without_a_word_are_told_beside_the_starts() -> None:
    watch = Watch(Alarms())
    assert watch.see({"policy_empty": 0.05, "start_empty": 0.0}, 0) == []
    (raised,) = watch.see({"policy_empty": 0.7, "start_empty": 0.75}, 1)
    assert (raised.name, raised.action) == ("empty", "warn")
    assert raised.message == "70% of the policy's answers are empty, of the start's 75%"
