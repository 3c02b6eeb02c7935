"""Housekeeping: the dead are told from the living, and nothing that is needed is ever cleared away."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from steps import dead_runs, heartbeat, housekeeping, registry
from steps.artifact import MANIFEST, Artifact, seal
from steps.dead_runs import DIED, close_dead, dead_flows, find_dead, living, story
from steps.errors import EnvironmentProblem
from steps.heartbeat import LOCK, life
from steps.housekeeping import TRASH, Survey, clean, survey
from steps.paths import Var
from steps.run import Input, StepSpec, Store, run_step
from steps.tracking import JOURNAL, SENT, Forwarder, append, entries

DAY = 86400.0
DEAD = "http://127.0.0.1:9"
HOLD = """
import sys
from pathlib import Path
from steps import heartbeat
heartbeat.begin(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
LOCKED = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


class Deaf(Forwarder):
    """Sends to a server that does not answer."""

    def _forward(self, folder: Path) -> None:
        raise ConnectionError("refused")


Children = Callable[[str, Path], subprocess.Popen]


@pytest.fixture
def child() -> Iterator[Children]:
    """Starts processes that hold a lock until they are killed."""
    started: list[subprocess.Popen] = []

    def start(code: str, path: Path) -> subprocess.Popen:
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", code, str(path)]
        process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env={**os.environ, "PYTHONPATH": root})
        started.append(process)
        assert process.stdout and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def age(path: Path, days: float) -> Path:
    """Make everything below a path look untouched for so many days."""
    then = time.time() - days * DAY
    for place in (*path.rglob("*"), path):
        os.utime(place, (then, then), follow_symlinks=False)
    return path


def begun(folder: Path, parent: Path | None = None, **tags: str) -> Path:
    """A folder whose journal says that its run goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    append(folder, "start", name=folder.name, experiment="e", parent=str(parent) if parent else None, tags=tags)
    return folder


def abandoned(folder: Path, parent: Path | None = None, **tags: str) -> Path:
    """A run whose process is gone: its lock is there, and nobody holds it."""
    begun(folder, parent, **tags)
    (folder / LOCK).touch()
    (folder / LOCK).write_text(json.dumps({"pid": os.getpid(), "inode": (folder / LOCK).stat().st_ino}))
    return folder


class Place:
    """A project's `var/`, with a store one can put things into."""

    def __init__(self, root: Path, uri: str) -> None:
        self.root, self.var = root, Var(root)
        self.store = Store(self.var.folder("store"))
        self.runs = self.var.folder("runs")
        self.forwarder = Forwarder(uri, self.var.folder("mlflow-artifacts"))
        self.models: set[str] = set()

    def artifact(self, kind: str, key: str, days: float = 30, **inputs: Artifact) -> Artifact:
        """A finished artifact of a key, last used so many days ago."""
        folder = self.store.path / f"{kind}-{key}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights.bin").write_bytes(f"{kind} {key}".encode() * 100)
        write_spec(folder, kind, inputs)
        sealed = seal(folder, kind, key, {name: given.digest for name, given in inputs.items()}, {}, 1.0)
        (self.store.locks / f"{folder.name}.lock").touch()
        age(folder, days)
        return sealed

    def partial(self, kind: str, key: str, days: float = 0, store: Store | None = None, **inputs: Artifact) -> Path:
        """Work in progress that somebody left."""
        folder = (store or self.store).path / f"{kind}-{key}.partial"
        folder.mkdir()
        write_spec(folder, kind, inputs)
        (folder / "progress.json").write_text(json.dumps({"phase": "training", "done": 24, "total": 64, "values": {}}))
        return age(folder, days)

    def chain(self, key: str) -> dict[str, Artifact]:
        """Artifacts of a whole pipeline."""
        made = {"base": self.artifact("base", key)}
        for kind, reads in {
            "sft": ("base",),
            "reward": ("base",),
            "policy": ("base", "sft"),
            "evaluate": ("base", "sft", "reward", "policy"),
            "gate": ("evaluate", "reward", "policy"),
        }.items():
            made[kind] = self.artifact(kind, key, **{name: made[name] for name in reads})
        return made

    def register(self, made: dict[str, Artifact], *, promote: bool, tagged: bool = True) -> registry.Version:
        """A registered version of a chain's policy."""
        run = self.forwarder.client.create_run(self.forwarder.experiment("e")).info.run_id
        tags = {
            "verdict": "v",
            "policy_digest": registry.adapter_digest(made["policy"].path),
            "evaluation": made["evaluate"].key,
            "base_digest": made["base"].digest,
            **({f"step.{kind}": artifact.key for kind, artifact in made.items()} if tagged else {}),
        }
        self.models.add("m")
        return registry.register(self.forwarder.client, "m", run, "model", tags, promote=promote, description="")

    def survey(self, **options: Any) -> Survey:
        return survey(self.var, self.forwarder, **options)

    def clean(self, found: Survey | None = None, **options: Any) -> dict[str, str]:
        return {
            finding.what: said for finding, said in clean(found or self.survey(**options), self.var, self.forwarder)
        }

    def there(self) -> set[str]:
        """Names of what lies in the store."""
        return {path.name for path in self.store.path.iterdir() if not path.name.startswith(".")}

    def status(self, folder: Path) -> str:
        return self.forwarder.client.get_run(str(self.forwarder.run_id(folder))).info.status


def write_spec(folder: Path, kind: str, inputs: dict[str, Artifact]) -> None:
    given = {name: Input(artifact.path, artifact.digest) for name, artifact in inputs.items()}
    (folder / "spec.json").write_text(json.dumps(StepSpec(kind, "m:f", {}, given, 0).to_json()))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def place(tmp_path: Path, database: str) -> Iterator[Place]:
    made = Place(tmp_path, database)
    yield made
    for model in made.models:
        made.forwarder.client.delete_registered_model(model)


def would(found: Survey) -> dict[str, str]:
    return {finding.what: finding.would for finding in found.findings}


# -- the living and the dead -------------------------------------------------------------------------------------


def test_a_run_lives_as_long_as_its_process_and_no_longer(tmp_path: Path, child: Children) -> None:
    process = child(HOLD, tmp_path)
    assert life(tmp_path) == "alive"
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
    kill(process)
    assert life(tmp_path) == "dead"


def test_a_process_number_given_out_again_brings_nobody_back(tmp_path: Path) -> None:
    abandoned(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert life(tmp_path) == "dead"


def test_this_process_knows_its_own_runs(tmp_path: Path) -> None:
    heartbeat.begin(tmp_path)
    assert life(tmp_path) == "alive"


def test_a_copied_folder_is_nobodys_to_close(place: Place) -> None:
    original = abandoned(place.root / "elsewhere")
    shutil.copytree(original, place.runs / "copy")
    assert life(place.runs / "copy") == "copied"
    assert close_dead(place.var, place.forwarder) == []


@pytest.mark.parametrize(("days", "expected"), [(0, "alive"), (0.9, "alive"), (1.1, "dead"), (-400, "alive")])
def test_without_a_lock_silence_decides_and_a_clock_set_back_condemns_nobody(
    tmp_path: Path, days: float, expected: str
) -> None:
    assert life(age(begun(tmp_path / "run"), days)) == expected


def test_clocks_do_not_matter_to_a_lock(tmp_path: Path, child: Children) -> None:
    child(HOLD, tmp_path)
    assert life(age(tmp_path, 4000)) == life(age(tmp_path, -4000)) == "alive"


def test_a_lock_that_was_cut_short_waits_for_silence(tmp_path: Path) -> None:
    (begun(tmp_path / "run") / LOCK).touch()
    assert life(tmp_path / "run") == "alive"
    assert life(age(tmp_path / "run", 2)) == "dead"


# -- closing -----------------------------------------------------------------------------------------------------


def test_a_dead_run_and_its_step_are_closed_in_mlflow_and_a_resumed_step_runs_on(place: Place) -> None:
    run = abandoned(place.runs / "r")
    step = begun(place.partial("sft", "k"), run)
    append(step, "metrics", step=1, values={"loss": 1.0})
    for folder in (run, step):
        assert place.forwarder.forward(folder)
        assert place.status(folder) == "RUNNING"
    last = [entry["time"] for _, entry in entries(step)][-1]

    assert close_dead(place.var, place.forwarder) == [run, step]

    assert place.status(run) == place.status(step) == "KILLED"
    told = place.forwarder.client.get_run(str(place.forwarder.run_id(step)))
    assert told.info.end_time == last
    assert DIED in told.data.tags
    assert close_dead(place.var, place.forwarder) == []

    begun(step, abandoned(place.runs / "second"))
    assert place.forwarder.forward(step)
    assert place.status(step) == "RUNNING"
    assert place.forwarder.run_id(step) == told.info.run_id
    append(step, "end", status="FINISHED")
    assert place.forwarder.forward(step)
    assert place.status(step) == "FINISHED"


def test_runs_of_others_on_the_same_server_are_not_touched(place: Place) -> None:
    theirs = place.forwarder.client.create_run(place.forwarder.experiment("e")).info.run_id
    close_dead(place.var, place.forwarder)
    assert place.forwarder.client.get_run(theirs).info.status == "RUNNING"


def test_a_living_run_and_the_step_it_is_between_two_lines_of_are_left(place: Place, child: Children) -> None:
    run = begun(place.runs / "r")
    process = child(HOLD, run)
    step = begun(place.partial("sft", "k"), run)  # the store's lock is free: its run is about to write the end
    assert find_dead(place.var) == []
    assert living(place.var) == [run]
    kill(process)
    assert [dead.folder for dead in find_dead(place.var)] == [run, step]


def test_a_step_somebody_works_on_again_is_left(place: Place, child: Children) -> None:
    step = begun(place.partial("sft", "k"), abandoned(place.runs / "r"))
    child(LOCKED, place.store.locks / "sft-k.lock")
    assert step not in close_dead(place.var, place.forwarder)


def test_a_step_of_another_project_is_left(place: Place) -> None:
    begun(place.partial("sft", "k"), abandoned(place.root / "other" / "var" / "runs" / "r"))
    assert find_dead(place.var) == []


def test_a_finished_step_whose_run_died_before_it_said_so_is_finished(place: Place) -> None:
    step = begun(place.artifact("sft", "k").path, abandoned(place.runs / "r"))
    close_dead(place.var, place.forwarder)
    assert place.status(step) == "FINISHED"


def test_rubbish_in_a_journal_stops_nobody(place: Place) -> None:
    run = abandoned(place.runs / "r")
    with (run / JOURNAL).open("ab") as journal:
        journal.write(b'[]\n3\n{"op": "tags"}\n{}\nnull\n{"op": "met')
    assert [dead.folder for dead in find_dead(place.var)] == [run]
    abandoned(place.runs / "empty")
    (place.runs / "empty" / JOURNAL).write_bytes(b"")
    assert [dead.folder for dead in find_dead(place.var)] == [run]


def test_while_one_closes_a_run_another_leaves_it(place: Place) -> None:
    run = abandoned(place.runs / "r")
    with heartbeat.claim(run) as found:
        assert found == "dead"
        assert close_dead(place.var, place.forwarder) == []
    assert close_dead(place.var, place.forwarder) == [run]
    assert [entry["op"] for _, entry in entries(run)].count("end") == 1


def test_an_end_a_dead_server_did_not_get_is_sent_by_the_next_run(place: Place) -> None:
    step = begun(place.partial("sft", "k"), abandoned(place.runs / "r"))
    assert len(close_dead(place.var, Deaf(place.forwarder.uri, place.root))) == 2
    assert not story(step).running
    close_dead(place.var, place.forwarder)
    assert place.status(step) == "KILLED"


# -- what is needed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tagged", [True, False])
def test_all_that_champion_and_challenger_came_from_stays_and_the_rest_goes(place: Place, tagged: bool) -> None:
    first, second, third = (place.chain(key) for key in ("one", "two", "three"))
    for made, promote in ((first, True), (second, False), (third, False)):
        place.register(made, promote=promote, tagged=tagged)
    stray = place.artifact("sft", "stray", base=first["base"])
    expected = {artifact.path.name for made in (first, third) for artifact in made.values()}
    if not tagged:
        expected -= {"gate-one", "gate-three"}  # nothing but a tag says which gate it was

    found = place.survey(keep=0)

    assert set(found.needed) == expected
    assert {name for name, what in would(found).items() if what == "remove"} == {
        f"store/{name}" for name in place.there() - expected
    }
    done = place.clean(found)
    assert set(done.values()) == {"removed"}
    assert place.there() == expected
    assert not (place.store.locks / f"{stray.path.name}.lock").exists()
    assert {path.stem for path in place.store.locks.iterdir()} == expected
    assert not (place.store.path / TRASH).exists()


def test_the_newest_versions_stay_too_when_asked_for(place: Place) -> None:
    for key in ("one", "two", "three"):
        place.register(place.chain(key), promote=True)
    for keep, expected in ((0, {"three"}), (1, {"three"}), (2, {"two", "three"}), (9, {"one", "two", "three"})):
        assert {name.split("-")[1] for name in place.survey(keep=keep).needed} == expected


def test_inputs_are_followed_by_digest_where_there_is_no_spec(place: Place) -> None:
    base = place.artifact("base", "a")
    sft = place.artifact("sft", "a", base=base)
    place.artifact("policy", "a", days=1, sft=sft)
    for spec in place.store.path.glob("*/spec.json"):
        spec.unlink()
    assert set(place.survey().needed) == {"base-a", "sft-a", "policy-a"}


def test_of_two_artifacts_with_the_same_bytes_the_one_that_was_read_is_needed(place: Place) -> None:
    old = place.artifact("base", "old")
    shutil.copytree(old.path, place.store.path / "base-new")
    manifest = place.store.path / "base-new" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "key": "new"}))
    age(manifest.parent, 30)
    place.artifact("sft", "a", days=1, base=old)
    assert set(place.survey().needed) == {"base-old", "sft-a"}


def test_what_runs_of_late_made_or_reused_stays(place: Place) -> None:
    place.artifact("sft", "used", base=place.artifact("base", "b"))
    place.artifact("sft", "old")
    for name, key, days in (("late", "used", 2), ("long ago", "old", 30)):
        run = abandoned(place.runs / name)
        append(run, "tags", values={"step.sft": f"reused {key}, MLflow run 0123"})
        append(run, "end", status="FINISHED")
        age(run, days)
    assert set(place.survey().needed) == {"sft-used", "base-b"}
    assert set(place.survey(older_than=1).needed) == set()


def test_what_a_living_run_uses_stays_however_old(place: Place, child: Children) -> None:
    for key in ("written-down", "just-taken", "other"):
        place.artifact("sft", key)
    run = begun(place.runs / "r")
    append(run, "tags", values={"step.sft": "reused written-down, MLflow run 0123"})
    process = child(HOLD, age(run, 30))
    age(run, 30)
    (place.store.path / "sft-just-taken" / MANIFEST).touch()
    assert set(place.survey(older_than=0).needed) == {"sft-written-down", "sft-just-taken"}
    kill(process)
    assert set(place.survey(older_than=0).needed) == set()


def test_nothing_is_judged_while_a_registry_is_silent(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    place.artifact("sft", "stray")
    old = place.partial("sft", "p", days=30)
    run = abandoned(place.runs / "r")
    (run / SENT).write_text(json.dumps({DEAD: {"offset": 0}}))  # the project once tracked there
    found = place.survey()
    assert DEAD in found.problem
    place.clean(found)
    assert place.there() == {"sft-stray"}
    assert not old.exists()


# -- work in progress --------------------------------------------------------------------------------------------


def test_a_running_step_keeps_its_work_and_its_inputs_however_old(place: Place, child: Children) -> None:
    base = place.artifact("base", "b")
    folder = place.partial("sft", "k", days=400, base=base)
    child(LOCKED, place.store.locks / "sft-k.lock")
    found = place.survey(older_than=0)
    (row,) = [finding for finding in found.findings if finding.what == "store/sft-k.partial"]
    assert (row.would, row.why) == ("keep", "a step is at work on it: training, 24 of 64")
    assert set(found.needed) == {"base-b"}
    place.clean(found)
    assert folder.is_dir()


def test_work_of_late_is_kept_with_its_inputs_and_forgotten_work_goes(place: Place) -> None:
    base, other = place.artifact("base", "b"), place.artifact("base", "other")
    late = place.partial("sft", "late", days=3, base=base)
    place.partial("sft", "forgotten", days=8, base=other)
    found = place.survey()
    assert would(found) == {
        "store/sft-late.partial": "keep",
        "store/sft-forgotten.partial": "remove",
        "store/base-other": "remove",
    }
    place.clean(found)
    assert place.there() == {"base-b", late.name}


def test_work_of_another_store_counts_and_its_results_are_left(place: Place) -> None:
    seeds = Store(place.var.folder("seeds"))
    place.partial("policy", "late", store=seeds, sft=place.artifact("sft", "a"))
    place.partial("policy", "forgotten", days=9, store=seeds)
    done = seeds.path / "policy-done"
    shutil.copytree(place.artifact("policy", "done", reward=place.artifact("reward", "r")).path, done)
    found = place.survey()
    assert set(found.needed) == {"sft-a", "reward-r"}
    place.clean(found)
    assert {path.name for path in seeds.path.iterdir()} == {".locks", "policy-late.partial", "policy-done"}


def test_a_spec_that_was_cut_short_is_no_reason_to_lose_checkpoints(place: Place) -> None:
    folder = place.partial("sft", "k")
    (folder / "spec.json").write_text('{"step": "s')
    assert would(place.survey()) == {f"store/{folder.name}": "keep"}


def test_closing_a_dead_step_does_not_make_its_work_young(place: Place) -> None:
    step = age(begun(place.partial("sft", "k"), age(abandoned(place.runs / "r"), 30)), 30)
    assert set(would(place.survey()).values()) == {"close", "remove"}
    assert place.clean()["runs/r"] == "closed"
    assert not step.exists()


def test_a_journal_the_server_has_not_got_is_not_thrown_away(place: Place) -> None:
    step = age(begun(place.partial("sft", "unheard"), abandoned(place.runs / "r")), 30)
    said = clean(place.survey(), place.var, Deaf(place.forwarder.uri, place.root))
    assert "left: the tracking server has not got its journal yet" in [what for _, what in said]
    assert step.is_dir()
    place.clean()
    assert not step.exists()
    wanted = "attributes.run_name = 'sft-unheard.partial'"
    (run,) = place.forwarder.client.search_runs([place.forwarder.experiment("e")], wanted)
    assert run.info.status == "KILLED"  # what MLflow remembers stays


# -- what is not what it seems -----------------------------------------------------------------------------------


def change(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**record, **values}))

    return edit


@pytest.mark.parametrize(
    "tamper",
    [
        change(inputs={}),
        change(key="another"),
        change(digest="0" * 64),
        change(files={}),
        change(files=None),
        change(more=1),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / "adapter" / "weights.bin").unlink(),
    ],
)
def test_a_tampered_artifact_is_shown_and_never_removed_nor_what_it_read(
    place: Place, tamper: Callable[[Path], None]
) -> None:
    base = place.artifact("base", "b")
    sft = place.artifact("sft", "a", base=base)
    tamper(sft.path)
    age(sft.path, 30)
    found = place.survey(older_than=0, keep=0)
    assert would(found) == {"store/sft-a": "look"}
    assert set(found.needed) == {"base-b"}
    assert place.clean(found) == {}
    assert place.there() == {"base-b", "sft-a"}


def test_links_are_shown_and_never_followed(place: Place, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("p")
    age(outside, 30)
    for link in ("store/sft-linked", "store/sft-linked.partial", "champions/linked-1"):
        place.var.folder("champions")
        (place.var.path / link).symlink_to(outside)
    inside = place.artifact("sft", "a")
    (inside.path / "way-out").symlink_to(outside)
    age(inside.path, 30)
    place.artifact("base", "b")
    shutil.move(place.artifact("base", "c").path, outside / "base-c")
    found = place.survey(older_than=0)
    linked = {name: what for name, what in would(found).items() if "linked" in name}
    assert linked == dict.fromkeys(("store/sft-linked", "store/sft-linked.partial", "champions/linked-1"), "look")
    place.clean(found)
    assert not inside.path.exists()
    assert (outside / "precious").read_text() == "p"
    assert (outside / "base-c" / MANIFEST).is_file()
    assert (place.store.path / "sft-linked").is_symlink()


def test_a_store_that_is_a_link_is_left_alone(place: Place, tmp_path: Path) -> None:
    place.artifact("sft", "a")
    place.store.path.rename(tmp_path / "disk")
    place.store.path.symlink_to(tmp_path / "disk")
    assert place.survey(older_than=0).findings == []


def test_nothing_is_old_after_the_clock_was_set_back(place: Place) -> None:
    place.artifact("sft", "a", days=-300)
    place.partial("sft", "k", days=-300)
    assert place.survey(older_than=0.001).to_do() == []


# -- at the same time --------------------------------------------------------------------------------------------


def test_only_one_clears_away_at_a_time(place: Place) -> None:
    place.artifact("sft", "a")
    found = place.survey()
    with FileLock(place.var.path / "gc.lock"), pytest.raises(EnvironmentProblem, match="another gc"):
        place.clean(found)
    assert place.there() == {"sft-a"}


def test_the_second_of_two_finds_it_done(place: Place) -> None:
    place.artifact("sft", "a")
    first, second = place.survey(), place.survey()
    assert place.clean(first) == {"store/sft-a": "removed"}
    assert place.clean(second) == {"store/sft-a": "left: it is gone already"}


def test_what_is_reused_after_the_survey_stays(place: Place) -> None:
    spec = StepSpec("sft", "steps.gate:judge_evaluation", {}, {}, 0)
    made = place.artifact("sft", spec.key)
    found = place.survey()
    assert would(found) == {f"store/{spec.name}": "remove"}
    assert run_step(spec, place.store, launch=lambda partial: pytest.fail("it is there")).reused
    assert place.clean(found) == {f"store/{spec.name}": "left: it is in use again"}
    assert made.path.is_dir()
    assert spec.name in place.survey().needed


def test_what_a_step_begins_after_the_survey_stays(place: Place, child: Children) -> None:
    folder = place.partial("sft", "k", days=30)
    found = place.survey()
    process = child(LOCKED, place.store.locks / "sft-k.lock")
    assert place.clean(found) == {"store/sft-k.partial": "left: a step is at work on it"}
    write_spec(folder, "sft", {})  # as every step does when it begins
    kill(process)
    assert place.clean(found) == {"store/sft-k.partial": "left: it is in use again"}
    assert folder.is_dir()


def test_a_removal_that_was_cut_short_is_finished_by_the_next(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.artifact("sft", "a")
    with monkeypatch.context() as patch:
        patch.setattr(housekeeping, "_throw_away", lambda paths: "cut short")
        place.clean()
    assert place.there() == set()  # nobody finds a half of it
    assert would(place.survey()) == {f"store/{TRASH}": "remove"}
    place.clean()
    assert not (place.store.path / TRASH).exists()


# -- small things left behind ------------------------------------------------------------------------------------


def test_locks_of_steps_that_are_no_more_go_and_held_ones_stay(place: Place, child: Children) -> None:
    place.artifact("sft", "a", days=0)
    place.partial("sft", "p")
    for name in ("sft-p", "sft-gone", "sft-held"):
        (place.store.locks / f"{name}.lock").touch()
    child(LOCKED, place.store.locks / "sft-held.lock")
    assert place.clean() == {"store/.locks": "removed"}
    assert {path.stem for path in place.store.locks.iterdir()} == {"sft-a", "sft-p", "sft-held"}


def test_drafts_and_adapters_out_of_use_go_when_they_are_old(place: Place) -> None:
    champions, run = place.var.folder("champions"), abandoned(place.runs / "r")
    append(run, "end", status="FINISHED")
    used = place.register(place.chain("one"), promote=True)
    for name, days in ((f"m-{used.version}", 90), ("m-71", 90), ("m-72", 1), ("m-73.partial", 2)):
        (champions / name / "adapter").mkdir(parents=True)
        age(champions / name, days)
    for path, days in ((run / "old.tmp", 2), (run / "new.tmp", 0), (run / "report.md", 90)):
        path.touch()
        age(path, days)
    done = place.clean()
    assert done == {"champions/m-71": "removed", "champions/m-73.partial": "removed", "*.tmp, *.new": "removed"}
    assert {path.name for path in champions.iterdir()} == {f"m-{used.version}", "m-72"}
    assert not (run / "old.tmp").exists()
    assert (run / "new.tmp").exists()
    assert (run / "report.md").exists()


def test_while_a_run_goes_on_no_fetched_adapter_goes(place: Place, child: Children) -> None:
    age(place.var.folder("champions/m-1"), 90)
    assert would(place.survey()) == {"champions/m-1": "remove"}
    child(HOLD, begun(place.runs / "r"))
    assert place.clean() == {}


# -- the command, and Prefect ------------------------------------------------------------------------------------


class Prefect:
    """As much of Prefect's client as is needed."""

    def __init__(self, **states: Any) -> None:
        self.states = states

    def read_flow_run(self, flow: Any) -> Any:
        from prefect.exceptions import ObjectNotFound

        if str(flow) not in self.states:
            raise ObjectNotFound(Exception("404"))
        return SimpleNamespace(state=self.states[str(flow)])

    def set_flow_run_state(self, flow: Any, state: Any, force: bool) -> Any:
        self.states[str(flow)] = state
        return SimpleNamespace(state=state)


def test_flow_runs_of_the_dead_are_crashed_once_and_those_of_the_living_never(place: Place, child: Children) -> None:
    from prefect.states import Completed, Running

    from flows.housekeeping import SETTLED, crash_zombies

    dead, done, lost, half = (str(uuid4()) for _ in range(4))
    for name, flow in (("dead", dead), ("done", done), ("lost", lost), ("half dead", half)):
        abandoned(place.runs / name, **{"prefect.flow_run_id": flow})
    abandoned(place.runs / "no flow", **{"prefect.flow_run_id": "None"})
    process = child(HOLD, begun(place.runs / "half alive", **{"prefect.flow_run_id": half}))
    finished = abandoned(place.runs / "finished", **{"prefect.flow_run_id": str(uuid4())})
    append(finished, "end", status="FINISHED")
    client = Prefect(**{dead: Running(), done: Completed(), half: Running()})

    before = dead_flows(place.var, SETTLED)
    close_dead(place.var, place.forwarder)
    zombies = dead_flows(place.var, SETTLED)
    assert before == zombies
    assert set(zombies) == {dead, done, lost}
    crash_zombies(place.var, place.forwarder, zombies, client)

    assert [client.states[flow].name for flow in (dead, done, half)] == ["Crashed", "Completed", "Running"]
    assert dead_flows(place.var, SETTLED) == {}
    kill(process)
    assert set(dead_flows(place.var, SETTLED)) == {half}


def test_the_command_looks_first_and_does_it_when_told(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli import app

    monkeypatch.setenv("PREFLOOP_ROOT", str(place.root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.forwarder.uri)
    monkeypatch.setenv("COLUMNS", "100")
    place.artifact("sft", "a")
    run = abandoned(place.runs / "r")

    def tree() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in place.var.path.rglob("*") if path.is_file()}

    before = tree()
    looked = CliRunner().invoke(app, ["gc"])
    assert looked.exit_code == 0, looked.output
    assert "store/sft-a" in looked.output
    assert "nothing was done" in looked.output
    assert tree() == before
    did = CliRunner().invoke(app, ["gc", "--yes"])
    assert did.exit_code == 0, did.output
    assert "removed: 1" in did.output
    assert place.there() == set()
    assert not story(run).running
    assert dead_runs.find_dead(place.var) == []
