"""`prefloop serve` beside a Prefect server: data land, one run follows, a webhook hears of it; then nothing is new."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny

from flows.announce import landed as landed_at
from steps import ui
from steps.paths import Var

PATIENCE = 600  # seconds a starved machine may take for what takes a few
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)


@dataclass
class Loop:
    """A project with a Prefect server and a served deployment.

    Attributes:
        added: what `prefloop data add` printed, before anything was served.
        calls: what the webhook was told and nobody has asked for; `told` what somebody has looked through.
        said: what `prefloop serve` printed.
    """

    root: Path
    api: str
    added: str = ""
    calls: queue.Queue[str] = field(default_factory=queue.Queue)
    told: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def prefloop(self, *arguments: str) -> str:
        result = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=PATIENCE, **self.place())
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def place(self) -> dict[str, Any]:
        return {"cwd": self.root, "env": {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "COLUMNS": "100"}}

    def ask(self, what: str) -> list[dict[str, Any]]:
        return httpx.post(f"{self.api}/{what}/filter", json={}, timeout=60).json()

    def heard(self, wanted: str) -> str:
        """The first of the webhook's calls that holds `wanted`; two that are due at once come in either order."""
        while not (found := [call for call in self.told if wanted in call]):
            self.told.append(self.calls.get(timeout=PATIENCE))
        return found[0]

    def mlflow_runs(self) -> int:
        with sqlite3.connect(self.root / "var/mlflow.db") as database:
            return database.execute("select count(*) from runs").fetchone()[0]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flows.cli", *arguments]


@pytest.fixture(scope="module")
def loop(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    root = Path(shutil.copytree(finished, tmp_path_factory.mktemp("loop") / "project", symlinks=True))
    var = Var(root)
    started = ui.start(var, ["prefect"])
    made = Loop(root, f"{started['prefect'][0]}/api")
    hook = webhook(made.calls)
    for number in (1, 2):
        tiny.write_rows(tiny.preference_rows(30, seed=number), root / f"week{number}.jsonl")
    made.added = made.prefloop("data", "add", "tiny", "week1.jsonl", "week2.jsonl")
    serving = subprocess.Popen(
        command("serve", "recipes/tiny.yaml", "--cron", "0 3 * * 1", "--quiet", "10"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **made.place(),
    )
    try:
        notify(made, f"http://127.0.0.1:{hook.server_port}/told")
        ready = threading.Event()
        threading.Thread(target=listen, args=(serving, made.said, ready), daemon=True).start()
        assert ready.wait(PATIENCE), made.said
        assert serving.poll() is None, made.said
        yield made
    finally:
        serving.send_signal(signal.SIGINT)
        serving.wait(60)
        ui.stop(started, var)
        hook.shutdown()


def listen(serving: subprocess.Popen[str], said: list[str], ready: threading.Event) -> None:
    assert serving.stdout is not None
    for line in serving.stdout:
        said.append(line)
        if "Ctrl-C ends it" in line:
            ready.set()
    ready.set()


def webhook(calls: queue.Queue[str]) -> ThreadingHTTPServer:
    """A server on loopback that keeps what it is told."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            calls.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def notify(loop: Loop, address: str) -> None:
    """Make the automation that the documentation shows, with another address and for completed runs too."""
    (code,) = SNIPPET.findall((tiny.REPOSITORY / "docs/retraining.md").read_text())
    code = re.sub(r'url="[^"]+"', f'url="{address}"', code)
    code = code.replace('"prefect.flow-run.Failed",', '"prefect.flow-run.Failed", "prefect.flow-run.Completed",')
    place = loop.place()
    place["env"] = {**place["env"], **ui.prefect_environment(Var(loop.root)), "PREFECT_API_URL": loop.api}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE, **place)


@pytest.fixture(scope="module")
def landed(loop: Loop) -> str:
    """What the webhook heard after data landed three times, one after the other."""
    script = (
        "from pathlib import Path; from flows.announce import landed\n"
        "for _ in range(3): assert landed('tiny', Path(), {})"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE, **loop.place())
    return loop.heard("prefloop.model.kept-back") + "\n" + loop.heard("prefect.flow-run.Completed")


def test_what_is_served_waits_in_line_and_shows_the_recipe_as_a_form(loop: Loop) -> None:
    (deployment,) = loop.ask("deployments")
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert deployment["global_concurrency_limit"]["limit"] == 1
    schema = deployment["parameter_openapi_schema"]
    fields = schema["definitions"]["Recipe"]["properties"]
    assert {"seed", "model", "policy", "gate"} <= set(fields)
    assert schema["definitions"]["Recipe"]["additionalProperties"] is False
    assert [schedule["schedule"]["cron"] for schedule in deployment["schedules"]] == ["0 3 * * 1"]
    rules = {rule["name"]: rule for rule in loop.ask("automations")}
    zombies = rules["prefloop: flows whose process is gone"]
    assert (zombies["trigger"]["posture"], zombies["trigger"]["within"]) == ("Proactive", 90)
    assert zombies["actions"][0]["state"] == "CRASHED"


def test_a_parameter_that_does_not_fit_is_refused_before_anything_runs(loop: Loop) -> None:
    (deployment,) = loop.ask("deployments")
    recipe = {**deployment["parameters"]["recipe"], "sed": 4}
    reply = httpx.post(
        f"{loop.api}/deployments/{deployment['id']}/create_flow_run", json={"parameters": {"recipe": recipe}}
    )
    assert reply.status_code in (409, 422)
    assert "sed" in reply.text


def test_adding_data_tells_the_server(loop: Loop) -> None:
    assert "told http://127.0.0.1:" in loop.added


def test_adding_data_without_a_server_says_nothing_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # nobody listens there
    assert landed_at("tiny", tmp_path, {}) == ""
    monkeypatch.delenv("PREFECT_API_URL")
    assert landed_at("tiny", tmp_path, {}) == ""


def test_three_arrivals_are_one_run_and_the_webhook_hears_of_it(loop: Loop, landed: str) -> None:
    runs = [run for run in loop.ask("flow_runs") if run["state_type"] != "SCHEDULED"]
    assert [run["state_name"] for run in runs] == ["Completed"]
    assert "models:/tiny/2" in landed
    assert runs[0]["state"]["message"].startswith("kept models:/tiny/1; models:/tiny/2 did not pass: win rate against")
    assert any(key == "drift" for key in artifacts(loop))


def test_the_clock_has_made_its_next_runs(loop: Loop, landed: str) -> None:
    due = [run["expected_start_time"] for run in loop.ask("flow_runs") if run["state_type"] == "SCHEDULED"]
    assert due
    assert {f"{datetime.fromisoformat(when):%A %H:%M}" for when in due} == {"Monday 03:00"}


def artifacts(loop: Loop) -> dict[str, str]:
    return {found["key"]: found["data"] for found in loop.ask("artifacts") if found["key"]}


def test_drift_and_verdict_are_artifacts_and_tags(loop: Loop, landed: str) -> None:
    found = artifacts(loop)
    assert {"drift", "verdict", "report"} <= set(found)
    assert "models:/tiny/1" in found["drift"]
    assert "| answer length |" in found["drift"].replace("**", "")
    assert "win rate against the champion" in found["verdict"]
    assert "Trained because: new data since models:/tiny/1" in found["verdict"]
    with sqlite3.connect(loop.root / "var/mlflow.db") as database:
        tags = dict(database.execute("select key, value from model_version_tags where version = 2"))
        told = dict(database.execute("select key, value from tags where key like 'prefloop.%' or key = 'verdict'"))
    assert "NO: win rate against the champion" in tags["verdict"]
    assert (tags["met"], tags["start"]) == ("1", "sft")
    assert told["prefloop.retrained_because"].startswith("new data since models:/tiny/1")
    assert "since models:/tiny/1" in told["prefloop.drift"]


def test_the_same_data_are_not_tried_again_and_leave_no_run(loop: Loop, landed: str) -> None:
    before = loop.mlflow_runs()
    output = loop.prefloop("retrain", "recipes/tiny.yaml")
    assert "rests     already tried as models:/tiny/2" in output
    assert "kept back because win rate against the champion" in output
    assert loop.mlflow_runs() == before
    completed = [run["state"]["message"] for run in loop.ask("flow_runs") if run["state_name"] == "Completed"]
    assert any(message.startswith("already tried as models:/tiny/2") for message in completed)


def test_the_champions_data_again_are_nothing_new(loop: Loop, landed: str) -> None:
    for number in (1, 2):
        (loop.root / f"data/tiny/source/week{number}.jsonl").unlink()
    (loop.root / "data/datasets.yaml").write_text(tiny.REGISTRY)
    output = loop.prefloop("retrain", "recipes/tiny.yaml")
    assert "nothing new since models:/tiny/1" in output
