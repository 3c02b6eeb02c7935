"""The model registry: one version for each policy, aliases where they belong, adapters as they were registered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from steps.artifact import seal
from steps.errors import EnvironmentProblem, PrefloopError
from steps.registry import Version, adapter_digest, champion, fetch_adapter, history, promote, register, rollback
from steps.tracking import Forwarder, append


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


class Runs:
    """Tracked runs that hold an adapter, for one model name."""

    def __init__(self, database: str, folder: Path) -> None:
        self.forwarder, self.folder, self.name = Forwarder(database, folder / "artifacts"), folder, folder.name
        self.client: MlflowClient = self.forwarder.client

    def policy(self, text: str) -> tuple[str, str]:
        """(run id, digest) of a policy step whose adapter holds `text`."""
        step, run = self.folder / f"step-{text}", self.folder / f"run-{text}"
        (step / "adapter").mkdir(parents=True)
        (step / "adapter" / "adapter_model.safetensors").write_text(text)
        (step / "adapter" / "adapter_config.json").write_text("{}")
        append(step, "start", name="n", experiment="e", parent=None, tags={})  # records do not count
        digest = seal(step, "policy", "k", {}, {}, 0).digest
        shutil.copytree(step / "adapter", run / "model" / "adapter")
        append(run, "start", name=run.name, experiment=self.name, parent=None, tags={})
        append(run, "artifact", path="model", under="model")
        assert self.forwarder.forward(run), self.forwarder.problem
        return str(self.forwarder.run_id(run)), digest

    def register(self, policy: tuple[str, str], *, promote: bool, evaluation: str = "e1", **tags: Any) -> Version:
        given = {"policy_digest": policy[1], "evaluation": evaluation, "verdict": f"promote: {promote}", **tags}
        return register(self.client, self.name, policy[0], "model", given, promote=promote, description="A card.")

    def versions(self) -> list[str]:
        return sorted(str(found.version) for found in self.client.search_model_versions(f"name='{self.name}'"))

    def aliases(self) -> dict[str, str]:
        return {name: str(version) for name, version in self.client.get_registered_model(self.name).aliases.items()}


@pytest.fixture
def runs(database: str, tmp_path: Path) -> Runs:
    return Runs(database, tmp_path)


def test_there_is_no_champion_before_the_first_model(runs: Runs) -> None:
    assert champion(runs.client, runs.name) is None


def test_there_is_no_champion_while_every_model_was_kept_back(runs: Runs) -> None:
    runs.register(runs.policy("a"), promote=False)
    assert champion(runs.client, runs.name) is None
    assert runs.aliases() == {"challenger": "1"}


def test_a_promoted_model_is_the_champion_with_its_tags_and_card(runs: Runs) -> None:
    run_id, digest = runs.policy("a")
    made = runs.register((run_id, digest), promote=True, base="tiny", rows=7)
    found = champion(runs.client, runs.name)
    assert found == Version(runs.name, "1", run_id, found.tags)
    assert found.tags["policy_digest"] == digest
    assert found.tags["rows"] == "7"
    assert found.uri == made.uri == f"models:/{runs.name}/1"
    assert runs.client.get_model_version(runs.name, "1").description == "A card."


def test_registering_twice_gives_one_version(runs: Runs) -> None:
    policy = runs.policy("a")
    first = runs.register(policy, promote=True)
    second = runs.register(policy, promote=True)
    assert runs.versions() == ["1"]
    assert (first.version, second.version) == ("1", "1")


def test_another_policy_and_another_evaluation_are_other_versions(runs: Runs) -> None:
    policy = runs.policy("a")
    runs.register(policy, promote=False)
    runs.register(policy, promote=False, evaluation="e2")
    runs.register(runs.policy("b"), promote=False)
    assert runs.versions() == ["1", "2", "3"]


def test_the_aliases_follow_the_verdicts(runs: Runs) -> None:
    runs.register(runs.policy("a"), promote=True)
    assert runs.aliases() == {"champion": "1"}
    runs.register(runs.policy("b"), promote=False)
    assert runs.aliases() == {"champion": "1", "challenger": "2"}
    runs.register(runs.policy("c"), promote=True)
    assert runs.aliases()["champion"] == "3"
    assert champion(runs.client, runs.name).version == "3"


def test_a_champion_registered_again_and_kept_back_stays_champion_and_is_no_challenger(runs: Runs) -> None:
    policy = runs.policy("a")
    runs.register(policy, promote=True)
    runs.register(policy, promote=False)
    assert runs.aliases() == {"champion": "1"}


def test_a_challenger_that_is_promoted_is_challenger_no_more(runs: Runs) -> None:
    policy = runs.policy("a")
    runs.register(policy, promote=False)
    runs.register(policy, promote=True)
    assert runs.aliases() == {"champion": "1"}
    assert champion(runs.client, runs.name).tags["verdict"] == "promote: True"


def test_models_of_different_names_do_not_meet(runs: Runs, database: str) -> None:
    (runs.folder / "other").mkdir()
    other = Runs(database, runs.folder / "other")
    other.name = f"{runs.name}-other"
    runs.register(runs.policy("a"), promote=True)
    assert champion(other.client, other.name) is None
    other.register(other.policy("a"), promote=True)
    assert other.versions() == ["1"]


def test_a_registry_that_cannot_be_reached_is_an_environment_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with pytest.raises(EnvironmentProblem) as caught:
        champion(Forwarder("http://127.0.0.1:9", tmp_path).client, "tiny")
    text = str(caught.value)
    assert "the model registry cannot be reached" in text
    assert "http://127.0.0.1:9" in text
    assert "run again" in text


# -- fetching ----------------------------------------------------------------------------------------------------


def test_the_adapter_that_is_fetched_is_the_one_the_step_made(runs: Runs, tmp_path: Path) -> None:
    policy = runs.policy("a")
    runs.register(policy, promote=True)
    folder = fetch_adapter(runs.client, champion(runs.client, runs.name), tmp_path / "champions")
    assert (folder / "adapter" / "adapter_model.safetensors").read_text() == "a"
    assert adapter_digest(folder) == policy[1]
    assert [path.name for path in (tmp_path / "champions").iterdir()] == [folder.name]


def test_an_adapter_is_fetched_once(runs: Runs, tmp_path: Path) -> None:
    runs.register(runs.policy("a"), promote=True)
    version = champion(runs.client, runs.name)
    folder = fetch_adapter(runs.client, version, tmp_path / "champions")
    shutil.rmtree(tmp_path / "artifacts")
    assert fetch_adapter(runs.client, version, tmp_path / "champions") == folder


def test_a_half_fetched_adapter_is_fetched_anew(runs: Runs, tmp_path: Path) -> None:
    runs.register(runs.policy("a"), promote=True)
    version = champion(runs.client, runs.name)
    half = (tmp_path / "champions" / f"{version.name}-{version.version}").with_suffix(".partial")
    (half / "model" / "adapter").mkdir(parents=True)
    (half / "model" / "adapter" / "adapter_model.safetensors").write_text("hal")
    folder = fetch_adapter(runs.client, version, tmp_path / "champions")
    assert (folder / "adapter" / "adapter_model.safetensors").read_text() == "a"


@pytest.mark.parametrize("where", ["registry", "fetched"])
@pytest.mark.parametrize("change", ["altered", "added", "removed"])
def test_an_adapter_that_was_tampered_with_is_refused(where: str, change: str, runs: Runs, tmp_path: Path) -> None:
    run_id, digest = runs.policy("a")
    runs.register((run_id, digest), promote=True)
    version = champion(runs.client, runs.name)
    if where == "fetched":
        adapter = fetch_adapter(runs.client, version, tmp_path / "champions") / "adapter"
    else:
        (adapter,) = (tmp_path / "artifacts").rglob("adapter")
    if change == "altered":
        (adapter / "adapter_model.safetensors").write_text("b")
    elif change == "added":
        (adapter / "more.json").write_text(json.dumps({}))
    else:
        (adapter / "adapter_config.json").unlink()
    with pytest.raises(PrefloopError) as caught:
        fetch_adapter(runs.client, version, tmp_path / "champions")
    text = str(caught.value)
    assert "the champion's adapter is not the one that was registered" in text
    assert version.uri in text
    assert digest in text
    assert "remove" in text


# -- by hand -----------------------------------------------------------------------------------------------------


def changes(runs: Runs) -> list[tuple]:
    return [(c["how"], c["who"], c["from"], c["to"], c["because"]) for c in history(runs.client, runs.name)]


def test_every_change_of_champion_is_written_down(runs: Runs) -> None:
    runs.register(runs.policy("a"), promote=True)
    runs.register(runs.policy("b"), promote=False)
    promote(runs.client, runs.name, "2", "people like it", "Ada")
    assert runs.aliases() == {"champion": "2"}
    assert changes(runs) == [
        ("promote", "gate", None, "1", "promote: True"),
        ("promote", "Ada", "1", "2", "people like it"),
    ]
    assert all(change["time"].endswith("+00:00") for change in history(runs.client, runs.name))


def test_promoting_the_champion_changes_nothing(runs: Runs) -> None:
    policy = runs.policy("a")
    runs.register(policy, promote=True)
    runs.register(policy, promote=True)
    promote(runs.client, runs.name, "1", "again", "Ada")
    assert len(changes(runs)) == 1


def test_rolling_back_goes_one_champion_further_down_each_time(runs: Runs) -> None:
    for name in "abc":
        runs.register(runs.policy(name), promote=True)
    assert rollback(runs.client, runs.name, "it swears", "Ada") == "2"
    assert rollback(runs.client, runs.name, "this too", "Ada") == "1"
    assert runs.aliases()["champion"] == "1"
    assert changes(runs)[3:] == [("rollback", "Ada", "3", "2", "it swears"), ("rollback", "Ada", "2", "1", "this too")]
    with pytest.raises(PrefloopError, match="no champion to go back to"):
        rollback(runs.client, runs.name, "more", "Ada")


def test_the_gate_does_not_undo_what_people_took_down_but_people_may(runs: Runs) -> None:
    runs.register(runs.policy("a"), promote=True)
    taken_down = runs.policy("b")
    runs.register(taken_down, promote=True)
    rollback(runs.client, runs.name, "it swears", "Ada")
    runs.register(taken_down, promote=True)
    assert runs.aliases()["champion"] == "1"
    promote(runs.client, runs.name, "2", "it does not", "Bob")
    assert runs.aliases()["champion"] == "2"
    rollback(runs.client, runs.name, "it does", "Ada")
    assert runs.aliases()["champion"] == "1"


def test_there_is_nothing_to_go_back_to_before_the_second_champion(runs: Runs) -> None:
    runs.register(runs.policy("a"), promote=True)
    with pytest.raises(PrefloopError, match="version 1 is the first one"):
        rollback(runs.client, runs.name, "no", "Ada")


def test_a_version_that_is_not_there_cannot_be_promoted(runs: Runs) -> None:
    runs.register(runs.policy("a"), promote=False)
    with pytest.raises(PrefloopError, match="no version 7"):
        promote(runs.client, runs.name, "7", "please", "Ada")
    with pytest.raises(PrefloopError, match="no model of that name"):
        promote(runs.client, "nobody", "1", "please", "Ada")
    with pytest.raises(PrefloopError, match="no model 'nobody'"):
        history(runs.client, "nobody")


def test_a_long_reason_is_cut_and_stays_readable(runs: Runs) -> None:
    runs.register(runs.policy("a"), promote=False)
    promote(runs.client, runs.name, "1", "é" * 9000, "Ada")
    assert changes(runs)[0][4] == "é" * 4000
