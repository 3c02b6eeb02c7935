"""Tracking: nothing is lost, nothing is sent twice, and nobody waits for a dead server."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from steps import tracking
from steps.paths import Var
from steps.tracking import JOURNAL, SENT, Forwarder, Spool, append, curves, entries, tracking_uri

DEAD = "http://127.0.0.1:9"


def start(folder: Path, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    append(folder, "start", **{"name": folder.name, "experiment": "tiny", "parent": None, "tags": {"t": "1"}, **fields})
    return folder


def ops(folder: Path) -> list[str]:
    return [entry["op"] for _, entry in entries(folder)]


# -- the journal -------------------------------------------------------------------------------------------------


def test_what_is_appended_is_read_back_in_order_with_its_time(tmp_path: Path) -> None:
    before = int(time.time() * 1000)
    for number in range(3):
        append(tmp_path, "metrics", step=number, values={"lööss": 0.5})
    found = [entry for _, entry in entries(tmp_path)]
    assert [entry["step"] for entry in found] == [0, 1, 2]
    assert all(before <= entry["time"] <= time.time() * 1000 for entry in found)
    assert found[0]["values"] == {"lööss": 0.5}


def test_reading_goes_on_at_any_offset(tmp_path: Path) -> None:
    for number in range(3):
        append(tmp_path, "metrics", step=number, values={})
    offsets = [offset for offset, _ in entries(tmp_path)]
    assert offsets[-1] == (tmp_path / JOURNAL).stat().st_size
    assert [entry["step"] for _, entry in entries(tmp_path, offsets[0])] == [1, 2]
    assert list(entries(tmp_path, offsets[-1])) == []


def test_no_journal_has_no_entries(tmp_path: Path) -> None:
    assert list(entries(tmp_path)) == []
    assert curves(tmp_path) == {}


def test_a_half_written_last_line_is_skipped(tmp_path: Path) -> None:
    append(tmp_path, "tags", values={})
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'{"op": "metrics", "time": 17')
    assert ops(tmp_path) == ["tags"]


def test_a_line_counts_once_its_newline_is_written(tmp_path: Path) -> None:
    line = b'{"op": "tags", "time": 1, "values": {}}'
    (tmp_path / JOURNAL).write_bytes(line)
    assert ops(tmp_path) == []
    (tmp_path / JOURNAL).write_bytes(line + b"\n")
    assert ops(tmp_path) == ["tags"]


def test_a_half_written_line_takes_no_other_line_with_it(tmp_path: Path) -> None:
    append(tmp_path, "tags", values={})
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'{"op": "metrics", "time": 17')
    append(tmp_path, "params", values={})
    append(tmp_path, "end", status="FINISHED")
    assert ops(tmp_path) == ["tags", "params", "end"]


def test_a_line_of_rubbish_in_the_middle_is_skipped(tmp_path: Path) -> None:
    append(tmp_path, "tags", values={})
    with (tmp_path / JOURNAL).open("ab") as journal:
        journal.write(b'{"op": "metr\n\xff\xfe\n')
    append(tmp_path, "end", status="FINISHED")
    assert ops(tmp_path) == ["tags", "end"]


# -- a working step ----------------------------------------------------------------------------------------------


def test_a_reopened_spool_drops_what_it_has_reported_and_keeps_the_rest(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    first.metrics({"loss": 2.0}, 1)
    first.metrics({"loss": 1.5}, 2)
    again = Spool(tmp_path)
    again.metrics({"loss": 1.5, "eval_loss": 3}, 2)
    again.metrics({"loss": 1.0}, 3)
    assert curves(tmp_path) == {"loss": [(1, 2.0), (2, 1.5), (3, 1.0)], "eval_loss": [(2, 3.0)]}
    assert len(ops(tmp_path)) == 4


def test_a_spool_drops_a_repetition_of_its_own_too(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.metrics({"loss": 2.0}, 1)
    spool.metrics({"loss": 2.0}, 1)
    spool.metrics({}, 2)
    assert ops(tmp_path) == ["metrics"]


def test_progress_is_the_last_state_and_whole(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.progress("training", 1, 9)
    spool.progress("training", 2, 9, {"loss": 0.5})
    state = json.loads((tmp_path / "progress.json").read_text())
    assert state == {"phase": "training", "done": 2, "total": 9, "values": {"loss": 0.5}}
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]


def test_curves_come_in_step_order(tmp_path: Path) -> None:
    for step in (3, 1, 2):
        append(tmp_path, "metrics", step=step, values={"loss": float(step)})
    assert curves(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0)]}


def test_the_environment_names_the_server_before_the_project_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(Var(tmp_path)) == f"sqlite:///{tmp_path}/var/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert tracking_uri(Var(tmp_path)) == "http://there:5000"


# -- MLflow ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite file for this module: making its tables takes a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'var' / 'mlflow.db'}"


@pytest.fixture
def forwarder(database: str, tmp_path: Path) -> Forwarder:
    return Forwarder(database, tmp_path / "artifacts")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def whole_journal(folder: Path) -> Path:
    """Everything a step says, with two files to send."""
    start(folder)
    append(folder, "params", values={"seed": 3, "policy.dpo.trainer.beta": 0.1})
    append(folder, "tags", values={"promoted": True})
    data = {"name": "tiny/gold", "md5": "d" * 32, "path": "data/tiny/gold.parquet", "revision": "abc", "rows": 7}
    append(folder, "inputs", datasets=[{**data, "context": "gold"}])
    for step in range(1, 6):
        append(folder, "metrics", step=step, values={"loss": 1 / step, "rewards/margins": step})
    (folder / "chart.png").write_bytes(b"png")
    (folder / "model").mkdir()
    (folder / "model" / "recipe.yaml").write_text("name: tiny")
    append(folder, "artifact", path="chart.png")
    append(folder, "artifact", path="model", under="model")
    append(folder, "artifact", path="never-drawn.png")
    append(folder, "end", status="FINISHED")
    return folder


def files_of(client: MlflowClient, run_id: str, path: str | None = None) -> set[str]:
    listed = client.list_artifacts(run_id, path)
    return {file.path for file in listed if not file.is_dir}.union(
        *(files_of(client, run_id, file.path) for file in listed if file.is_dir)
    )


def assert_arrived(client: MlflowClient, run_id: str, name: str) -> None:
    run = client.get_run(run_id)
    assert run.info.run_name == name
    assert run.info.status == "FINISHED"
    assert run.info.start_time <= run.info.end_time
    assert run.data.params == {"seed": "3", "policy.dpo.trainer.beta": "0.1"}
    assert run.data.tags["t"] == "1"
    assert run.data.tags["promoted"] == "True"
    history = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 6)]
    assert run.data.metrics["rewards/margins"] == 5
    (given,) = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest, given.dataset.source_type) == ("tiny/gold", "d" * 32, "dvc")
    assert json.loads(given.dataset.source) == {
        "path": "data/tiny/gold.parquet",
        "md5": "d" * 32,
        "revision": "abc",
    }
    assert json.loads(given.dataset.profile) == {"rows": 7}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "gold")]
    assert files_of(client, run_id) == {"chart.png", "model/recipe.yaml"}


def test_everything_in_a_journal_arrives(forwarder: Forwarder, tmp_path: Path) -> None:
    folder = whole_journal(tmp_path / "whole")
    assert forwarder.waiting(folder)
    assert forwarder.forward(folder), forwarder.problem
    assert not forwarder.waiting(folder)
    assert_arrived(forwarder.client, forwarder.run_id(folder), "whole")


def test_a_second_forwarding_sends_nothing(forwarder: Forwarder, tmp_path: Path, database: str) -> None:
    folder = whole_journal(tmp_path / "twice")
    assert forwarder.forward(folder)
    run_id, sent = forwarder.run_id(folder), (folder / SENT).read_text()
    other = Forwarder(database, tmp_path / "artifacts")
    other._send = lambda *_: pytest.fail("something was sent")
    assert other.forward(folder), other.problem
    assert (folder / SENT).read_text() == sent
    assert other.run_id(folder) == run_id


def test_only_what_is_new_is_sent_the_next_time(forwarder: Forwarder, tmp_path: Path) -> None:
    folder = start(tmp_path / "grows")
    append(folder, "metrics", step=1, values={"loss": 2.0})
    assert forwarder.forward(folder)
    append(folder, "metrics", step=2, values={"loss": 1.0})
    assert forwarder.waiting(folder)
    assert forwarder.forward(folder)
    history = forwarder.client.get_metric_history(forwarder.run_id(folder), "loss")
    assert [point.step for point in history] == [1, 2]


def test_more_metrics_than_one_call_takes_all_arrive(
    forwarder: Forwarder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "BATCH", 7)
    folder = start(tmp_path / "many")
    for step in range(20):
        append(folder, "metrics", step=step, values={"a": step, "b": -step})
    assert forwarder.forward(folder)
    for name, sign in (("a", 1), ("b", -1)):
        history = forwarder.client.get_metric_history(forwarder.run_id(folder), name)
        assert [point.value for point in history] == [sign * step for step in range(20)]


def test_values_that_are_no_finite_numbers_hold_nothing_up(forwarder: Forwarder, tmp_path: Path) -> None:
    folder = start(tmp_path / "nan")
    append(folder, "metrics", step=1, values={"a": float("nan"), "b": float("inf"), "c": 1.0})
    append(folder, "params", values={"long": "x" * 7000, "none": None})
    assert forwarder.forward(folder), forwarder.problem
    assert forwarder.client.get_run(forwarder.run_id(folder)).data.metrics["c"] == 1


def test_a_step_stands_under_the_run_it_belongs_to(forwarder: Forwarder, tmp_path: Path) -> None:
    parent, child, orphan = tmp_path / "parent", tmp_path / "child", tmp_path / "orphan"
    start(parent)
    start(child, parent=str(parent))
    start(orphan, parent=str(tmp_path / "never-sent"))
    for folder in (parent, child, orphan):
        assert forwarder.forward(folder)
    tags = [forwarder.client.get_run(forwarder.run_id(folder)).data.tags for folder in (parent, child, orphan)]
    assert [found.get("mlflow.parentRunId") for found in tags] == [None, forwarder.run_id(parent), None]


def test_a_start_after_an_interruption_goes_on_with_the_same_run(forwarder: Forwarder, tmp_path: Path) -> None:
    folder, later = start(tmp_path / "step"), start(tmp_path / "later")
    append(folder, "metrics", step=1, values={"loss": 2.0})
    append(folder, "end", status="KILLED")
    for path in (folder, later):
        assert forwarder.forward(path)
    run_id = forwarder.run_id(folder)
    assert forwarder.client.get_run(run_id).info.status == "KILLED"

    start(folder, parent=str(later), tags={"resumed": "True"})
    assert forwarder.forward(folder)
    run = forwarder.client.get_run(run_id)
    assert forwarder.run_id(folder) == run_id
    assert run.info.status == "RUNNING"
    assert run.data.tags["resumed"] == "True"
    assert run.data.tags["mlflow.parentRunId"] == forwarder.run_id(later)

    append(folder, "metrics", step=2, values={"loss": 1.0})
    append(folder, "end", status="FINISHED")
    assert forwarder.forward(folder)
    run = forwarder.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert [point.step for point in forwarder.client.get_metric_history(run_id, "loss")] == [1, 2]


def test_the_end_of_an_attempt_whose_start_was_lost_holds_up_nothing(forwarder: Forwarder, tmp_path: Path) -> None:
    folder = tmp_path / "step"
    folder.mkdir()
    (folder / "journal.jsonl").write_text('{"op": "sta\n')  # the disk was full
    append(folder, "end", status="FAILED")
    start(folder)
    append(folder, "metrics", step=1, values={"loss": 2.0})
    assert forwarder.forward(folder), forwarder.problem
    assert forwarder.client.get_run(forwarder.run_id(folder)).data.metrics == {"loss": 2.0}


def test_a_journal_without_its_start_is_not_sent_and_says_so(forwarder: Forwarder, tmp_path: Path) -> None:
    append(tmp_path, "metrics", step=1, values={"loss": 1.0})
    assert forwarder.forward(tmp_path) is False
    assert "does not begin with its start" in forwarder.problem
    assert forwarder.waiting(tmp_path)


def test_a_dead_server_costs_no_line_and_little_time(
    impatient: None, tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = whole_journal(tmp_path / "late")
    before = (folder / JOURNAL).read_bytes()
    dead = Forwarder(DEAD, tmp_path / "artifacts")
    began = time.monotonic()
    assert dead.forward(folder) is False
    assert time.monotonic() - began < 10
    assert dead.problem
    with monkeypatch.context() as patch:
        patch.setattr(dead, "_forward", lambda _: pytest.fail("it should be left alone for a while"))
        assert dead.forward(folder) is False
    assert dead.waiting(folder)
    assert dead.run_id(folder) is None
    assert (folder / JOURNAL).read_bytes() == before

    alive = Forwarder(database, tmp_path / "artifacts")
    assert alive.forward(folder), alive.problem
    assert_arrived(alive.client, alive.run_id(folder), "late")
    assert dead.waiting(folder)  # what one server has got says nothing about another


def test_a_server_is_tried_again_after_the_pause(impatient: None, tmp_path: Path) -> None:
    folder = start(tmp_path / "step")
    dead = Forwarder(DEAD, tmp_path / "artifacts", pause=0)
    assert dead.forward(folder) is False
    tried: list[Path] = []
    dead._forward = tried.append
    assert dead.forward(folder) is True
    assert tried == [folder]
    assert dead.problem == ""


def test_an_interruption_between_two_batches_repeats_nothing_that_shows(
    forwarder: Forwarder, tmp_path: Path, database: str
) -> None:
    """The server got everything; the note of how far it was sent is the one from after the start."""
    folder = start(tmp_path / "noted")
    assert forwarder.forward(folder)
    noted = (folder / SENT).read_text()
    append(folder, "params", values={"a": 1})
    append(folder, "metrics", step=1, values={"loss": 2.0})
    append(folder, "end", status="FINISHED")
    assert forwarder.forward(folder)
    (folder / SENT).write_text(noted)
    again = Forwarder(database, tmp_path / "artifacts")
    assert again.forward(folder), again.problem
    history = again.client.get_metric_history(again.run_id(folder), "loss")
    assert [(point.step, point.value) for point in history] == [(1, 2.0)]


def test_a_run_that_was_made_and_could_not_be_noted_is_found_again(
    forwarder: Forwarder, tmp_path: Path, database: str
) -> None:
    """As after kill -9 between the two; a run of the same moment by another name is not taken for it."""
    folder, other = start(tmp_path / "made"), tmp_path / "other"
    other.mkdir()
    line = (folder / JOURNAL).read_text()
    (other / JOURNAL).write_text(line.replace('"made"', '"other"'))
    assert forwarder.forward(folder) and forwarder.forward(other)
    made, elsewhere = forwarder.run_id(folder), forwarder.run_id(other)
    (folder / SENT).unlink()
    append(folder, "end", status="FINISHED")
    again = Forwarder(database, tmp_path / "artifacts")
    assert again.forward(folder), again.problem
    assert again.run_id(folder) == made != elsewhere
    assert again.client.get_run(made).info.status == "FINISHED"


def test_an_unreadable_note_of_what_was_sent_is_taken_for_none(forwarder: Forwarder, tmp_path: Path) -> None:
    folder = start(tmp_path / "step")
    (folder / SENT).write_text("{")
    assert forwarder.waiting(folder)
    assert forwarder.run_id(folder) is None
    assert forwarder.forward(folder)
