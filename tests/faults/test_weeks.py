"""Three weeks of a served deployment whose week is half a minute: what stopped, what was kept back and why.

The answers are eight letters. The first half of the alphabet is liked, and held-out and gold pairs say so in every
week; what training reads is another matter.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_data
from forks import PATIENCE, Forks, wait_for

from steps import registry, tracking
from steps.datasets import Split
from steps.paths import Var
from steps.split import part_of

WEEK = 30  # seconds
SHARES = Split(seed=0, demonstrations=0.2, preferences=0.35, held_out=0.25)
REGISTRY = tiny.REGISTRY.replace("    split:", "    rules: {checks: {empty: stop}}\n    split:")
LIKED, DISLIKED = "abcdefgh", "stuvwxyz"
SETTINGS = {
    "name": "weeks",
    "evaluate.prompts": 50,
    "sft.trainer.max_steps": 80,
    "sft.trainer.save_steps": 100,
    "sft.trainer.learning_rate": 0.01,
    "reward.trainer.max_steps": -1,
    "reward.trainer.num_train_epochs": 1,
    "reward.trainer.save_steps": 100,
    "policy.dpo.trainer.max_steps": -1,
    "policy.dpo.trainer.num_train_epochs": 1,
    "policy.dpo.trainer.save_steps": 100,
    "policy.dpo.trainer.learning_rate": 0.001,
    "gate.win_rate_floor": 0.5,
    "model.lora.r": 16,
    "model.lora.alpha": 32,
    "model.lora.top_layers": 2,
    "model.lora.target_modules": "[q_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
    "launch.launcher": "process",
}
RECIPE = ("recipes/tiny.yaml", *(part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")))


def pairs(part: str, count: int, first: int, *, flipped: bool = False) -> list[dict[str, str]]:
    """Pairs whose prompts the split deals to a part. Demonstrations have letters of both kinds."""
    draw = random.Random(f"{part} {first}")
    prompts = (prompt for n in itertools.count(first) if part_of(prompt := f"{n:x}: ", SHARES) == part)
    found = []
    for prompt in itertools.islice(prompts, count):
        kinds = (LIKED + DISLIKED,) * 2 if part == "demonstrations" else (LIKED, DISLIKED)
        sides = ["".join(draw.choices(letters, k=8)) for letters in kinds]
        found.append({"prompt": prompt, "chosen": sides[flipped], "rejected": sides[not flipped]})
    return found


FIRST = [
    *pairs("demonstrations", 120, 0),
    *pairs("preferences", 48, 0),
    *pairs("held_out", 60, 0),
    *pairs("gold", 150, 0),
]
BROKEN = [{**row, "chosen": " "} for row in pairs("preferences", 20, 10_000)]
WORSE = pairs("preferences", 64, 20_000, flipped=True)
HELPFUL = pairs("preferences", 600, 30_000)


class Weeks:
    """A project that is served, with a week of `WEEK` seconds."""

    def __init__(self, root: Path, prefloop: Forks, api: str) -> None:
        self.root, self.prefloop, self.api = root, prefloop, api
        self.serving = prefloop(root, "serve", *RECIPE, "--interval", str(WEEK), "--quiet", "10")

    def arrives(self, name: str, rows: list[dict[str, str]]) -> tuple[int, str]:
        """A batch is added, and committed where that went well; the command's status and words."""
        batch = tiny.write_rows(rows, self.root.parent / f"{name}.jsonl")
        adding = self.prefloop(self.root, "data", "add", "tiny", str(batch))
        if (status := adding.wait()) == 0:
            commit(self.root, name)
        return status, adding.said()

    def states(self) -> list[tuple[str, str]]:
        """How the flow runs ended and what their states say, in the order in which they began."""
        runs = self.asks("flow_runs", {"deployments": {"name": {"any_": ["weeks"]}}, "sort": "START_TIME_ASC"})
        return [(run["state_name"], run["state"]["message"] or "") for run in runs if run["end_time"]]

    def said(self, words: str, before: int = 0) -> str:
        """What the next flow run says that has these words, leaving out the first few."""

        def found() -> str:
            assert self.serving.poll() is None, self.serving.said()
            time.sleep(1)  # every question is work for a server that has enough to do
            return next((message for _, message in self.states()[before:] if words in message), "")

        return str(wait_for(found))

    def alerts(self) -> list[tuple[str, str]]:
        """Event and model of all that the Prefect server was told, the oldest first."""
        events = self.asks("events", {"filter": {"event": {"prefix": ["prefloop.model."]}, "order": "ASC"}})["events"]
        ours = [event for event in events if event["resource"]["prefect.resource.id"] == "prefloop.model.weeks"]
        return [(event["event"], event["payload"]["model"]) for event in ours]

    def asks(self, what: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.api}/{what}/filter", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return json.load(reply)

    def lineage(self, model: str) -> dict[str, Any]:
        return json.loads(self.prefloop(self.root, "lineage", model, "--json").ended_well())


def commit(root: Path, message: str) -> None:
    tiny_data.git(root, "add", "-A")
    tiny_data.git(root, "commit", "-qm", message)


@pytest.fixture
def weeks(prefloop: Forks, prefect_server, tmp_path: Path) -> Iterator[Weeks]:
    prefect_server.start()
    root = tiny.make_project(tmp_path / "project")
    shutil.rmtree(root / "base")
    tiny.make_base(root / "base", width=128, spread=0.15)
    (root / "data/datasets.yaml").write_text(REGISTRY, encoding="utf-8")
    tiny.write_rows(FIRST, root / "data/tiny/source/pairs.jsonl")
    for name, value in (("name", "Ada"), ("email", "ada@example.org")):
        tiny_data.git(root, "config", f"user.{name}", value)
    made = Weeks(root, prefloop, prefect_server.environment["PREFECT_API_URL"])
    yield made
    made.serving.signal(signal.SIGINT)
    made.serving.wait()


@pytest.mark.every_fault
def test_three_weeks_are_told_as_they_were(weeks: Weeks) -> None:
    weeks.said("promoted models:/weeks/1")
    commit(weeks.root, "the first version")

    status, said = weeks.arrives("broken", BROKEN)
    assert status == 1 and "nothing was added to 'tiny'" in said, said
    weeks.said("nothing new since models:/weeks/1", before=len(weeks.states()))

    assert weeks.arrives("worse", WORSE)[0] == 0
    said = weeks.said("kept models:/weeks/1; models:/weeks/2 did not pass: ")
    assert "win rate against the champion" in said

    assert weeks.arrives("helpful", HELPFUL)[0] == 0
    weeks.said("promoted models:/weeks/3")
    assert {state for state, _ in weeks.states()} == {"Completed"}

    client = tracking.forwarder(Var(weeks.root)).client
    changes = registry.history(client, "weeks")
    assert [(change["how"], change["who"], change["from"], change["to"]) for change in changes] == [
        ("promote", "gate", None, "1"),
        ("promote", "gate", "1", "3"),
    ]
    assert {alias: found.version for alias in ("champion", "challenger") if (found := _alias(client, alias))} == {
        "champion": 3,
        "challenger": 2,
    }

    told = [("promoted", "1"), ("kept-back", "2"), ("promoted", "3")]
    expected = [(f"prefloop.model.{how}", f"models:/weeks/{version}") for how, version in told]
    assert wait_for(lambda: len(found := weeks.alerts()) >= 3 and found) == expected

    first, worse, best = (weeks.lineage(f"weeks/{version}") for version in (1, 2, 3))
    assert files(first) == {"pairs.jsonl"}
    assert files(worse) == {"pairs.jsonl", "worse.jsonl"}
    assert files(best) == {"pairs.jsonl", "worse.jsonl", "helpful.jsonl"}
    assert first["contradictions"] == worse["contradictions"] == best["contradictions"] == []
    assert [story["verdict"]["promote"] for story in (first, worse, best)] == [True, False, True]


def files(story: dict[str, Any]) -> set[str]:
    """The raw files a model was made from."""
    return {node["title"] for node in story["nodes"] if node["kind"] == "file"}


def _alias(client: Any, alias: str) -> Any:
    return client.get_model_version_by_alias("weeks", alias)
