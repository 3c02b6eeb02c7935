"""Tracking: written to disk first, forwarded to MLflow from there. It and the registry alone know MLflow.

A run's journal is a file of JSON lines: start, params, metrics, tags, inputs, artifacts, end. Whoever works appends
to it and never waits. `forward` sends what has not been sent yet; a tracking server that is down costs a journal
that is sent later, not a metric and not a second of training. `tracking.json` beside the journal remembers the
MLflow run and how far it was sent, for each tracking server by its address.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock

from steps.alarms import QUIET, Raised, Watch
from steps.config import Alarms
from steps.errors import EnvironmentProblem
from steps.paths import Var

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

JOURNAL = "journal.jsonl"
SENT = "tracking.json"
BATCH = 1000  # MLflow's limit of metrics in one call


class Tracker(Protocol):
    """What a step may say while it works."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def progress(self, phase: str, done: int, total: int, values: Mapping[str, float] | None = None) -> None: ...

    def table(self, name: str, step: int, columns: Mapping[str, list]) -> None: ...

    @property
    def stops_at(self) -> int | None:
        """The training step an alarm wants the training to end at, or None."""


class NullTracker:
    """Says nothing to anybody."""

    stops_at: int | None = None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def progress(self, phase: str, done: int, total: int, values: Mapping[str, float] | None = None) -> None:
        pass

    def table(self, name: str, step: int, columns: Mapping[str, list]) -> None:
        pass


def append(folder: Path, op: str, **fields: Any) -> None:
    """Add one line to the journal in `folder`; a single write, so that lines of two processes never mix."""
    line = json.dumps({"op": op, "time": int(time.time() * 1000), **fields}) + "\n"
    descriptor = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a writer was killed inside its line
            line = "\n" + line
        written = os.write(descriptor, content := line.encode("utf-8"))
        while written < len(content):  # the disk is full: the next write says so
            written += os.write(descriptor, content[written:])
    finally:
        os.close(descriptor)


def entries(folder: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whole journal lines from byte `start` on, each with the byte offset behind it."""
    try:
        stream = (folder / JOURNAL).open("rb")
    except FileNotFoundError:
        return
    with stream:
        stream.seek(start)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            try:
                yield start, json.loads(line)
            except ValueError:  # the writer was killed inside this line
                continue


def has(folder: Path, op: str) -> bool:
    """Whether the journal in `folder` has such a line."""
    return any(entry["op"] == op for _, entry in entries(folder))


class Spool:
    """The tracker of a working step: its journal and a small file that says how far it is.

    A resumed step repeats training steps it has already reported. Training is bit-identical on resume, so the first
    report stands and a repeated one is dropped.

    Args:
        alarms: looked for in all that is reported; one that goes off is a metric and a tag of the run at once.
    """

    def __init__(self, folder: Path, alarms: Alarms | None = None) -> None:
        self.folder = folder
        self.reported: set[tuple[int, str]] = set()
        self.watch = Watch(alarms or QUIET)
        for _, entry in entries(folder):
            if entry["op"] == "metrics":
                self._see(entry["values"], entry["step"])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        fresh = {name: float(value) for name, value in values.items() if (step, name) not in self.reported}
        if not fresh:
            return
        raised = self._see(fresh, step)
        append(self.folder, "metrics", step=step, values=fresh)
        for alarm in raised:
            append(self.folder, "metrics", step=step, values={f"alarm/{alarm.name}": alarm.value})
            append(self.folder, "tags", values={f"alarm.{alarm.name}": f"{alarm.action} at {step}: {alarm.message}"})

    def _see(self, values: Mapping[str, float], step: int) -> list[Raised]:
        self.reported |= {(step, name) for name in values}
        return self.watch.see(values, step)

    @property
    def stops_at(self) -> int | None:
        return self.watch.stops_at

    def progress(self, phase: str, done: int, total: int, values: Mapping[str, float] | None = None) -> None:
        temporary = self.folder / "progress.json.tmp"
        temporary.write_text(
            json.dumps({"phase": phase, "done": done, "total": total, "values": dict(values or {})}), encoding="utf-8"
        )
        temporary.rename(self.folder / "progress.json")

    def table(self, name: str, step: int, columns: Mapping[str, list]) -> None:
        """Add rows to the table `NAME.json`."""
        path = self.folder / f"{name}.json"
        draft = path.with_name(path.name + ".tmp")
        draft.write_text(json.dumps(grown(path, step, columns), ensure_ascii=False), encoding="utf-8")
        draft.rename(path)
        append(self.folder, "artifact", path=path.name, table=True)


def grown(path: Path, step: int, columns: Mapping[str, list]) -> dict[str, Any]:
    """A table of the kind MLflow's pages show, with the rows of one more step; rows of it and later ones go."""
    names = ["step", *columns]
    before: list[list] = []
    with suppress(OSError, ValueError, KeyError):
        known = json.loads(path.read_text(encoding="utf-8"))
        before = [row for row in known["data"] if known["columns"] == names and row[0] < step]
    return {"columns": names, "data": [*before, *([step, *row] for row in zip(*columns.values(), strict=True))]}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a journal as (step, value) points in step order."""
    found: dict[str, list[tuple[int, float]]] = {}
    for _, entry in entries(folder):
        if entry["op"] == "metrics":
            for name, value in entry["values"].items():
                found.setdefault(name, []).append((entry["step"], value))
    return {name: sorted(points) for name, points in found.items()}


@dataclass
class Record:
    """A run as it was written down, in a journal or in MLflow.

    Attributes:
        run_id: MLflow's name of it; empty while it has none.
        started, ended: milliseconds since 1970; None where it is not known.
        metrics: the last value of each.
        datasets: what it read: name, md5, path, revision, rows, context.
        source: where this was read.
    """

    name: str
    run_id: str = ""
    status: str = ""
    started: int | None = None
    ended: int | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    datasets: list[dict[str, Any]] = field(default_factory=list)
    source: str = ""


def record_of(folder: Path) -> Record | None:
    """What the journal in `folder` says of its run; None where there is no journal."""
    found: Record | None = None
    for _, entry in entries(folder):
        op = entry["op"]
        if op == "start":
            began = found.started if found else entry["time"]
            found = found or Record(entry["name"], source=str(folder))
            found.tags |= {name: str(value) for name, value in entry["tags"].items()}
            found.status, found.started, found.ended = "RUNNING", began, None
        elif found is None:
            return None
        elif op in ("params", "tags"):
            values = {name: str(value) for name, value in entry["values"].items()}
            (found.params if op == "params" else found.tags).update(values)
        elif op == "metrics":
            found.metrics |= entry["values"]
        elif op == "inputs":
            found.datasets += entry["datasets"]
        elif op == "end":
            found.status, found.ended = entry["status"], entry["time"]
    return found


# -- MLflow ------------------------------------------------------------------------------------------------------


def tracking_uri(var: Var) -> str:
    """`$MLFLOW_TRACKING_URI`, or the project's own sqlite file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{var.path / 'mlflow.db'}"


def quiet_environment() -> None:
    """Settings MLflow reads on import: no telemetry, and seconds rather than minutes for a dead server."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


def forwarder(var: Var) -> Forwarder:
    """The forwarder of a project, to the server its environment names."""
    return Forwarder(tracking_uri(var), var.folder("mlflow-artifacts"))


class Forwarder:
    """Sends journals to one MLflow server.

    After a failure it leaves the server alone for `pause` seconds: nothing waits for a dead one.
    """

    def __init__(self, uri: str, artifacts: Path, pause: float = 30.0) -> None:
        self.uri, self.artifacts, self.pause = uri, artifacts, pause
        self.problem = ""
        self._client: MlflowClient | None = None
        self._not_before = 0.0

    @property
    def client(self) -> MlflowClient:
        if self._client is None:
            quiet_environment()
            if self.uri.startswith("sqlite:///"):
                _create_database(self.uri)
            from mlflow import MlflowClient

            # It would log a whole stack for what `problem` says in a line.
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            self._client = MlflowClient(self.uri, registry_uri=self.uri)
        return self._client

    def experiment(self, name: str) -> str:
        """The id of an experiment, made when it is not there. A local one keeps its artifacts under `artifacts`."""
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        location = (self.artifacts / name).as_uri() if self.uri.startswith("sqlite:///") else None
        return str(self.client.create_experiment(name, artifact_location=location))

    def forward(self, folder: Path, now: bool = False) -> bool:
        """Send what the journal in `folder` holds and the server has not got. True when nothing is left to send.

        Args:
            now: try although the server was dead a moment ago.
        """
        if time.monotonic() < self._not_before and not now:
            return False
        try:
            with FileLock(folder / f"{SENT}.lock"):
                self._forward(folder)
        except Exception as error:  # whatever the server or the way to it does, the work goes on
            self.problem = f"{type(error).__name__}: {error}"
            self._not_before = time.monotonic() + self.pause
            return False
        self.problem, self._not_before = "", 0.0
        return True

    def _forward(self, folder: Path) -> None:
        sent = _read_sent(folder, self.uri)
        for offset, batch in _batches(entries(folder, sent["offset"])):
            self._send(folder, sent, batch)
            sent["offset"] = offset
            _write_sent(folder, self.uri, sent)

    def _send(self, folder: Path, sent: dict[str, Any], batch: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        entry = batch[0]
        run_id = sent.get("run_id")
        if entry["op"] == "start":
            parent = self._run_of(Path(entry["parent"])) if entry.get("parent") else None
            tags = {**entry["tags"], **({"mlflow.parentRunId": parent} if parent else {})}
            if run_id is None:
                experiment = self.experiment(entry["experiment"])
                run = self._begun(experiment, entry) or self.client.create_run(
                    experiment, start_time=entry["time"], tags=tags, run_name=entry["name"]
                )
                sent["run_id"], sent["begun"] = run.info.run_id, entry["time"]
            else:  # the step was interrupted: its run goes on, under the flow run that resumed it
                self.client.update_run(run_id, status="RUNNING")
                self.client.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])
        elif run_id is None and entry["op"] == "end":
            pass  # of an attempt that could not even write its start, on a full disk
        elif run_id is None:
            raise EnvironmentProblem("a journal does not begin with its start", where=str(folder))
        elif entry["op"] == "metrics":
            points = [
                Metric(name, value, one["time"], one["step"]) for one in batch for name, value in one["values"].items()
            ]
            for first in range(0, len(points), BATCH):
                self.client.log_batch(run_id, metrics=points[first : first + BATCH])
        elif entry["op"] == "params":
            params = [Param(name, str(value)) for name, value in entry["values"].items()]
            for first in range(0, len(params), 100):
                self.client.log_batch(run_id, params=params[first : first + 100])
        elif entry["op"] == "tags":
            self.client.log_batch(run_id, tags=[RunTag(k, str(v)) for k, v in entry["values"].items()])
        elif entry["op"] == "inputs":
            self._log_inputs(run_id, entry["datasets"])
        elif entry["op"] == "artifact":
            self._log_artifact(run_id, folder / entry["path"], entry.get("under"))
            if entry.get("table"):  # as `mlflow.log_table` says it, so that MLflow's pages show it as one
                shown = json.dumps([{"path": entry["path"], "type": "table"}])
                self.client.set_tag(run_id, "mlflow.loggedArtifacts", shown)
        elif entry["op"] == "end":
            ended = max(entry["time"], sent.get("begun", 0))  # the clock may have been put back meanwhile
            self.client.set_terminated(run_id, entry["status"], ended)

    def _begun(self, experiment: str, entry: Mapping[str, Any]) -> Run | None:
        """The run somebody made of this line, and was killed before it could be noted."""
        found = self.client.search_runs([experiment], f"attributes.start_time = {entry['time']}")
        return next((run for run in found if run.info.run_name == entry["name"]), None)

    def _run_of(self, folder: Path) -> str | None:
        """The run of another journal, which is sent first when it has none yet."""
        if self.run_id(folder) is None:
            self._forward(folder)
        return self.run_id(folder)

    def _log_artifact(self, run_id: str, path: Path, under: str | None) -> None:
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), under)
        elif path.exists():
            self.client.log_artifact(run_id, str(path), under)

    def _log_inputs(self, run_id: str, datasets: Iterable[Mapping[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(
                    name=data["name"],
                    digest=data["md5"],
                    source_type="dvc",
                    source=json.dumps({k: data[k] for k in ("path", "md5", "revision")}),
                    profile=json.dumps({"rows": data["rows"]}),
                ),
                [InputTag("mlflow.data.context", data["context"])],
            )
            for data in datasets
        ]
        self.client.log_inputs(run_id, inputs)

    def run_id(self, folder: Path) -> str | None:
        """The MLflow run a journal was sent to, or None while it has none."""
        return _read_sent(folder, self.uri).get("run_id")

    def waiting(self, folder: Path) -> bool:
        """Whether the journal in `folder` holds lines this server has not got."""
        journal = folder / JOURNAL
        return journal.is_file() and journal.stat().st_size > _read_sent(folder, self.uri)["offset"]


# -- reading back ------------------------------------------------------------------------------------------------


def read_run(client: MlflowClient, run_id: str) -> Record | None:
    """One run of MLflow's, or None where it has none of that name.

    Raises:
        EnvironmentProblem: the tracking server cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    try:
        return _record(client.get_run(run_id))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise _unreachable(client, error) from error


def find_runs(client: MlflowClient, wanted: str = "", experiments: Iterable[str] | None = None) -> list[Record]:
    """The runs that fit a filter of MLflow's, the oldest first, over all experiments or those named.

    Raises:
        EnvironmentProblem: the tracking server cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    named = None if experiments is None else set(experiments)
    found: list[Record] = []
    try:
        ids = [one.experiment_id for one in client.search_experiments() if named is None or one.name in named]
        token: str | None = None
        while ids:
            page = client.search_runs(ids, wanted, page_token=token, order_by=["attributes.start_time ASC"])
            found += map(_record, page)
            if not (token := page.token):
                break
    except MlflowException as error:
        raise _unreachable(client, error) from error
    return found


def read_artifact(client: MlflowClient, run_id: str, path: str) -> str | None:
    """The text of a run's artifact, or None where it cannot be had: a server may know a run and not hold its files."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return Path(client.download_artifacts(run_id, path, scratch)).read_text(encoding="utf-8")
        except Exception:  # MLflow's stores raise whatever the way to the file does
            return None


def _record(run: Run) -> Record:
    data, info = run.data, run.info
    return Record(
        name=str(data.tags.get("mlflow.runName", info.run_id)),
        run_id=str(info.run_id),
        status=str(info.status),
        started=info.start_time,
        ended=info.end_time,
        tags=dict(data.tags),
        params=dict(data.params),
        metrics=dict(data.metrics),
        datasets=[_dataset(given) for given in (run.inputs.dataset_inputs if run.inputs else [])],
        source="MLflow",
    )


def _dataset(given: Any) -> dict[str, Any]:
    """An input of a run, as `_log_inputs` was given it; a run of somebody else's has a name and a digest at least."""
    known: dict[str, Any] = {"name": given.dataset.name, "md5": given.dataset.digest}
    for text, names in ((given.dataset.source, ("path", "revision")), (given.dataset.profile, ("rows",))):
        with suppress(ValueError, TypeError, AttributeError):
            known |= {name: value for name, value in json.loads(text).items() if name in names}
    context = [tag.value for tag in given.tags if tag.key == "mlflow.data.context"]
    return {**known, "context": context[0] if context else ""}


def _unreachable(client: MlflowClient, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        "the tracking server cannot be reached",
        where=str(client.tracking_uri),
        have=str(error).splitlines()[0],
        then="start it, or unset MLFLOW_TRACKING_URI for the project's own file",
    )


def _batches(lines: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Neighbouring metric lines together, everything else alone, each batch with the offset behind it."""
    batch: list[dict[str, Any]] = []
    behind = 0
    for offset, entry in lines:
        if batch and (entry["op"] != "metrics" or len(batch) >= BATCH):
            yield behind, batch
            batch = []
        if entry["op"] == "metrics":
            batch.append(entry)
        else:
            yield offset, [entry]
        behind = offset
    if batch:
        yield behind, batch


def _read_sent(folder: Path, uri: str) -> dict[str, Any]:
    try:
        return json.loads((folder / SENT).read_text(encoding="utf-8")).get(uri, {"offset": 0})
    except (OSError, ValueError):
        return {"offset": 0}


def servers_of(folder: Path) -> list[str]:
    """Addresses of the servers the journal in `folder` was sent to, even in part."""
    try:
        return list(json.loads((folder / SENT).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def _write_sent(folder: Path, uri: str, sent: Mapping[str, Any]) -> None:
    try:
        everything = json.loads((folder / SENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        everything = {}
    temporary = folder / f"{SENT}.tmp"
    temporary.write_text(json.dumps({**everything, uri: sent}), encoding="utf-8")
    temporary.rename(folder / SENT)


def _create_database(uri: str) -> None:
    """Create MLflow's tables once, before anybody writes: several writers creating them at once break the file."""
    path = Path(uri.removeprefix("sqlite:///"))
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            return
        from mlflow.store.db.utils import _initialize_tables
        from sqlalchemy import create_engine

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        draft = path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        engine = create_engine(f"sqlite:///{draft}")
        _initialize_tables(engine)
        engine.dispose()
        draft.rename(path)
