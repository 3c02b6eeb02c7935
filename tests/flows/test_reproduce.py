"""A finished run comes out again, and what is planted in its place is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from flows.cli import app
from steps import provenance, recorded, registry, reproduce, sameness, tracking
from steps.artifact import digest_json
from steps.errors import PrefloopError, StepFailed
from steps.paths import Var
from steps.recorded import Original
from steps.sameness import CLOSE, DIFFERS, EQUAL, TOLERANCES, Result, StepNow, Tolerance

STEPS = ("base", "sft", "reward", "policy", "evaluate", "gate")


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def settle(root: Path) -> Path:
    """Commit what the run left, and write down that its code was that of the project's first commit, untouched."""
    first = git(root, "rev-list", "--max-parents=0", "HEAD")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "the data version of the run")
    client = tracking.forwarder(Var(root)).client
    tags = {"prefloop.code_commit": first, "prefloop.code_state": provenance.CLEAN}
    (run_id,) = {version.run_id for version in client.search_model_versions("name='tiny'")}
    for name, value in tags.items():
        client.set_tag(run_id, name, value)
    return root


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project, committed; read from it, do not write."""
    to = tmp_path_factory.mktemp("reproduced") / "project"
    return settle(Path(shutil.copytree(finished, to, symlinks=True)))


@pytest.fixture
def own(project: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(project, tmp_path / "project", symlinks=True))


def written(root: Path, subject: str = "tiny/1") -> Original:
    return recorded.original(subject, root, tracking.forwarder(Var(root)))


def run(then: Original, root: Path, **settings) -> Result:
    return reproduce.reproduce(then, root, tracking.forwarder(Var(root)), **settings)


def contents(root: Path) -> dict[str, str]:
    """sha256 of every file of `var/`, of the data and of git's list of work trees."""
    files = [path for part in ("var", "data") for path in (root / part).rglob("*") if path.is_file()]
    found = {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {**found, "work trees": git(root, "worktree", "list", "--porcelain")}


# -- the run itself ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(project: Path) -> tuple[Result, dict[str, str], dict[str, str]]:
    """The whole run once more; the project before and after."""
    before = contents(project)
    result = run(written(project), project)
    return result, before, contents(project)


def test_every_byte_comes_out_again(again: tuple[Result, dict, dict]) -> None:
    result, _, _ = again
    assert [(step.name, step.verdict) for step in result.steps] == [(name, EQUAL) for name in result.original.steps]
    assert set(STEPS) <= {step.name for step in result.steps}
    assert all(step.key_now == step.key_then for step in result.steps)
    assert result.equal and result.verdict.startswith("equal: every byte of") and result.first is None
    assert json.loads(json.dumps(result.to_json()))["steps"][0]["verdict"] == EQUAL


def test_nothing_of_the_project_changes(again: tuple[Result, dict, dict]) -> None:
    _, before, after = again
    assert after == before and any(name.endswith("mlflow.db") for name in before)


# -- what is planted ---------------------------------------------------------------------------------------------


def test_a_recipe_with_another_seed_is_found_out_by_running_it(own: Path) -> None:
    then = written(own)
    planted = dataclasses.replace(then, recipe=then.recipe.replace("seed: 3", "seed: 4", 1))
    said: list[object] = []
    result = run(planted, own, until="sft", tell=said.append)
    assert [step.name for step in said if isinstance(step, StepNow)] == ["base", "sft"]
    base, sft = result.steps
    assert base.verdict == EQUAL  # it draws nothing
    assert sft.verdict in (CLOSE, DIFFERS) and sft.key_now != sft.key_then and not sft.follows
    assert sft.because == ["seed was 3, and the recipe that was kept says 4"]
    assert [name for name, _, _ in sft.files] == ["adapter/adapter_model.safetensors"]
    (loss,) = [change for change in sft.changes if change.metric == "loss"]
    assert loss.then == then.steps["sft"].manifest["facts"]["loss"] != loss.now
    assert not result.equal and result.verdict.startswith("differs, first in sft: adapter/adapter_model.safetensors")
    assert f"{loss.then:.6g} then, {loss.now:.6g} now" in result.verdict


def test_a_tampered_artifact_is_named(own: Path, again: tuple[Result, dict, dict]) -> None:
    (weights,) = (own / "var/store").glob("sft-*/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    then = written(own)
    (problem,) = recorded.problems(then)
    assert problem.startswith("sft: adapter/adapter_model.safetensors in the store is not the file that was made")
    result = sameness.judged(then, again[0].steps)
    assert not result.equal and problem in result.verdict


def test_a_manifest_that_was_changed_with_its_file_is_found_out_by_mlflows_copy(own: Path) -> None:
    (path,) = (own / "var/store").glob("sft-*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["files"]["adapter/adapter_model.safetensors"] = "0" * 64
    manifest["digest"] = digest_json(manifest["files"])
    path.write_text(json.dumps(manifest))
    then = written(own)
    assert "the manifest of sft in the store is not the one MLflow holds" in recorded.problems(then)
    assert then.steps["sft"].manifest["files"] != manifest["files"]


def test_a_data_version_that_is_gone_is_named_before_anything_runs(own: Path) -> None:
    then = written(own)
    md5 = then.tables["gold"]
    for path in (own / ".dvc/cache/files/md5").rglob(md5[2:]):
        path.unlink()
    (own / "data/tiny/gold.parquet").unlink()
    with pytest.raises(PrefloopError, match="neither from DVC's cache nor from its remote"):
        run(then, own, until="base")
    assert not (own / "var/reproduce").exists()
    lock = (own / "dvc.lock").read_text().replace(md5, "0" * 32)
    (own / "dvc.lock").write_text(lock)
    git(own, "checkout", "-q", "--orphan", "other")  # and a history that has never known it
    git(own, "add", "-A")
    git(own, "commit", "-qm", "other")
    for branch in git(own, "branch", "--format=%(refname:short)").split():
        if branch != "other":
            git(own, "branch", "-qD", branch)
    with pytest.raises(PrefloopError, match="the data version of that run is gone") as raised:
        recorded._revision("tiny", then.tables, "no git", own)
    assert f"gold {md5[:12]}" in raised.value.have


def test_a_stop_leaves_nothing_behind(own: Path) -> None:
    before = contents(own)

    def stop(said: object) -> None:
        if said == "running the steps":
            assert len(git(own, "worktree", "list").splitlines()) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(written(own), own, tell=stop)
    assert contents(own) == before and not (own / "var/reproduce").exists()
    left = own / "var/reproduce/20200101-000000-1"  # of a process that was killed
    git(own, "worktree", "add", "-q", "--detach", str(left / "tree"))
    with reproduce._workplace(own) as place:
        assert not left.exists() and place.is_dir()
    assert contents(own) == before


def test_a_step_that_fails_says_what_the_code_of_then_said(own: Path) -> None:
    then = written(own)
    planted = dataclasses.replace(then, recipe=then.recipe.replace("base: base", "base: ./nowhere"))
    with pytest.raises(StepFailed, match="the run cannot be repeated: there is no such model directory"):
        run(planted, own, until="base")


def test_the_command_says_no_by_its_status(own: Path) -> None:
    (page,) = (own / "var/store").glob("gate-*/verdict.json")
    page.write_text("{}")
    arguments = ["reproduce", "tiny@champion", "--until", "base"]
    done = CliRunner().invoke(app, arguments, env={"PREFLOOP_ROOT": str(own), "COLUMNS": "100"})
    assert done.exit_code == 1, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("models:/tiny/1  run ") and lines[1].startswith("code ")
    assert "kept wrongly  gate: verdict.json in the store is not the file that was made" in done.output
    assert any(line.split()[:2] == ["base", "equal"] for line in lines)
    assert "differs: what comes out is what was written down, but gate" in done.output


# -- comparing, without running ----------------------------------------------------------------------------------


def otherwise(result: Result, name: str, **parts) -> tuple[Original, dict]:
    """The original with parts of a step's record changed, and what `steps.repeat` would say of the step as it was."""
    then = result.original
    step = dataclasses.replace(then.steps[name], **parts)
    original = dataclasses.replace(then, steps={**then.steps, name: step})
    return original, {"step": name, "key": step.key, "seed": 3, "config": {}, "code": "", "libraries": {}}


HERE = {"libraries": "torch 2.13.0+cpu, trl 1.16.0", "processor": "A", "architecture": "x86_64", "threads": "2"}


@pytest.fixture
def stored(project: Path, again: tuple[Result, dict, dict], monkeypatch: pytest.MonkeyPatch):
    """A comparison of the stored sft step with what is said of it, its loss moved by a factor."""

    def compare(surroundings: dict[str, str], factor: float, state: str = provenance.CLEAN) -> Result:
        manifest = dict(again[0].original.steps["sft"].manifest)
        manifest["facts"] = {**manifest["facts"], "loss": manifest["facts"]["loss"] * factor}
        manifest["files"] = {**manifest["files"], "adapter/adapter_model.safetensors": "0" * 64}
        manifest["digest"] = digest_json(manifest["files"])
        then, answer = otherwise(again[0], "sft", manifest=manifest, surroundings=surroundings, settings={})
        then = dataclasses.replace(then, state=state)
        answer["folder"] = str(project / "var/store" / f"sft-{answer['key']}")
        return sameness.judged(then, [sameness.compared(then, answer, [], HERE)])

    return compare


def test_another_library_explains_what_stays_within_tolerance_and_not_more(stored) -> None:
    old = {**HERE, "libraries": "torch 2.12.0+cpu, trl 1.16.0"}
    near = stored(old, 1.001)
    assert near.steps[0].because == ["torch was 2.12.0+cpu, and is 2.13.0+cpu"]
    assert near.equal and near.verdict.startswith("equal within tolerances; first in sft: adapter/")
    far = stored(old, 1.5)
    assert not far.equal and "allowed: ±0.01 ± 2%" in far.verdict


@pytest.mark.parametrize(
    ("what", "value", "says"),
    [
        ("processor", "B", "the processor was B, and is A"),
        ("architecture", "aarch64", "the processor's kind was aarch64, and is x86_64"),
        ("threads", "8", "there were 8 threads, and are 2"),
    ],
)
def test_another_machine_explains_other_bytes(stored, what: str, value: str, says: str) -> None:
    result = stored({**HERE, what: value}, 1.001)
    assert result.equal and result.steps[0].because == [says]


def test_on_the_same_machine_the_bytes_have_to_be_the_same(stored) -> None:
    result = stored(HERE, 1.001)
    assert result.steps[0].verdict == CLOSE and not result.steps[0].because and not result.equal
    unknown = stored({}, 1.001)
    assert not unknown.equal


def test_a_work_tree_that_was_not_clean_is_said_whatever_the_verdict(stored, again) -> None:
    result = stored(HERE, 1.001, state="2 files differ")
    assert not result.equal and result.verdict.endswith("; the work tree was not clean then")
    assert result.steps[0].because == [
        "the work tree was not clean (2 files differ); but this step's code was the commit's"
    ]
    dirty = dataclasses.replace(again[0].original, state="2 files differ")
    assert sameness.judged(dirty, again[0].steps).verdict.endswith("although the work tree was not clean then")


def test_a_tolerance_is_absolute_plus_relative() -> None:
    assert Tolerance(0.1, 0.1).holds(2.0, 2.3) and not Tolerance(0.1, 0.1).holds(2.0, 2.31)
    assert Tolerance().holds(3.0, 3.0) and not Tolerance().holds(3.0, 3.0000001)
    nothing = float("nan")
    assert Tolerance().holds(nothing, nothing) and not Tolerance(9, 9).holds(nothing, 1.0)
    assert sameness.tolerance_of("steps") == Tolerance() and str(Tolerance()) == "exactly"
    # Two win rates of 200 answers each lie within it in nineteen of twenty cases: 1.96 · √(2 · ¼ / 200) = 0.098.
    assert sameness.tolerance_of("win_rate").absolute > 1.96 * (2 * 0.25 / 200) ** 0.5


def test_a_gate_that_decides_otherwise_is_out_of_tolerance() -> None:
    (change,) = sameness._changes({"promote": True, "n": [1.0]}, {"promote": False, "n": [1.0]})
    assert str(change) == "promote 1 then, 0 now (allowed: ±0.05 ± 10%)" and not change.holds
    (gone,) = sameness._changes({"alarms": [{"value": 1.0}]}, {"alarms": []})
    assert str(gone).startswith("alarms.0.value 1 then, none now") and not gone.holds


def test_steps_are_chosen_by_name(again: tuple[Result, dict, dict]) -> None:
    then = again[0].original
    assert reproduce.wanted_steps(then, ["sft", "reward"]) == ["sft", "reward"]
    assert reproduce.wanted_steps(then, until="sft") == ["base", "sft"]
    with pytest.raises(PrefloopError, match="no step 'sftt'"):
        reproduce.wanted_steps(then, until="sftt")


def test_the_page_gives_the_tolerances_of_the_code() -> None:
    page = (tiny.REPOSITORY / "docs/reproduce.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[:2] for row in rows] == [[f"| `{pattern}`", str(held)] for pattern, held in TOLERANCES]


# -- what it needs besides ---------------------------------------------------------------------------------------


def test_the_champion_of_then_comes_from_the_registry_and_only_where_one_was_met(project: Path, tmp_path: Path) -> None:
    then = written(project)
    forwarder = tracking.forwarder(Var(project))
    assert reproduce._adapters(then, ["gate"], tmp_path, forwarder) == {}  # the first run met none
    (version,) = registry.every_version(forwarder.client)
    met = met_champion(then, version.tags["policy_digest"])
    found = reproduce._adapters(met, ["evaluate"], tmp_path, forwarder)
    folder, digest = found["champion"]
    assert digest == version.tags["policy_digest"] == registry.adapter_digest(Path(folder))
    assert reproduce._adapters(met, ["policy"], tmp_path, forwarder) == {}
    with pytest.raises(PrefloopError, match="took as its champion is not in the registry any more") as raised:
        reproduce._adapters(met_champion(then, "0" * 64), ["gate"], tmp_path, forwarder)
    assert raised.value.then == "--until policy leaves that step out"


def met_champion(then: Original, digest: str) -> Original:
    evaluate = then.steps["evaluate"]
    manifest = {**evaluate.manifest, "inputs": {**evaluate.manifest["inputs"], "champion": digest}}
    return dataclasses.replace(then, steps={**then.steps, "evaluate": dataclasses.replace(evaluate, manifest=manifest)})


def test_what_a_run_does_not_say_of_its_surroundings_is_left_out() -> None:
    old = {"prefloop.machine": "x86_64, 2 cores, Python 3.11.7"}
    assert recorded._surroundings(old) == {"architecture": "x86_64"}
    assert recorded._surroundings({**old, "prefloop.threads": "4"})["threads"] == "4"
    assert recorded._surroundings({}) == {}


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("tags", "state"),
    [
        ({"prefloop.git_commit": COMMIT}, provenance.CLEAN),
        ({"prefloop.git_commit": COMMIT + "+"}, "not committed as it was"),
        (
            {"prefloop.git_commit": COMMIT + "+", "prefloop.code_commit": COMMIT, "prefloop.code_state": "clean"},
            "clean",
        ),
    ],
)
def test_the_commit_and_whether_it_was_all_of_the_code(tags: dict[str, str], state: str) -> None:
    assert recorded._code_of(tags, "a run") == (COMMIT, state)
    with pytest.raises(PrefloopError, match="a run cannot be run again: its code was in no git repository"):
        recorded._code_of({"prefloop.git_commit": "no git"}, "a run")
