"""The clock jumps by a day, back and forth: nothing hangs or lasts less than no time, and the order stays right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import states
from clocks import DAY, JUMPING
from forks import Forks
from states import RUN, ask, copy_without

from steps import registry, tracking
from steps.paths import Var


def test_a_run_ends_as_ever_and_nothing_lasts_less_than_no_time(
    prefloop: Forks, prefect_server, finished: Path, tmp_path: Path
) -> None:
    prefect_server.start()
    root = states.without_var(finished, tmp_path / "project")
    prefloop(root, *RUN, before=JUMPING).ended_well()
    states.equal(root, finished)
    times = ask(root / "var/mlflow.db", "select start_time, end_time from runs")
    assert all(start <= end for start, end in times)
    assert max(end for _, end in times) - min(start for start, _ in times) > 1000 * DAY  # the clock did jump
    for path in (root / "var/store").glob("*/manifest.json"):
        assert json.loads(path.read_text())["seconds"] >= 0
        said = [json.loads(line)["op"] for line in (path.parent / "journal.jsonl").read_text().splitlines()]
        assert said[0] == "start" and said[-1] == "end" and said.count("start") == 1
    again = prefloop(root, *RUN, before=JUMPING).ended_well()
    assert " done " not in again and again.count(" reused ") >= len(states.artifacts(root))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[timedelta]]:
    """How far the registry's clock is off, as the one item of a list."""
    off = [timedelta()]

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + off[0]

    monkeypatch.setattr(registry, "datetime", Clock)
    yield off


def test_the_champion_before_is_the_one_before_whatever_the_clock_said(
    finished: Path, tmp_path: Path, clock: list[timedelta]
) -> None:
    root = copy_without(finished, tmp_path / "project")
    client = tracking.forwarder(Var(root)).client
    first = client.get_model_version("tiny", "1")
    for _ in range(2):
        client.create_model_version("tiny", first.source, first.run_id)
    clock[0] = timedelta(days=1)
    registry.promote(client, "tiny", "2", "it is better", "Ada")
    clock[0] = timedelta(days=-1)
    registry.promote(client, "tiny", "3", "it is better still", "Ada")
    told = registry.history(client, "tiny")
    assert [change["to"] for change in told] == ["1", "2", "3"]
    assert told[-1]["time"] < told[0]["time"] < datetime.now(UTC).isoformat()
    assert registry.rollback(client, "tiny", "it was not", "Ada") == "2"
