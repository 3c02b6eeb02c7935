"""A model's lineage: the graph the manifests make, from whatever is left of them, and what does not fit together."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import toy_runs
from rich.console import Console
from toy_runs import READS, Project

from steps import lineage, lineage_page, tracking
from steps.artifact import digest_file, digest_json
from steps.data_lineage import _folder_md5
from steps.errors import PrefloopError
from steps.lineage import Lineage, Node, StepCost, total
from steps.versions import outputs

RUN = "20260101-000000-toy"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = toy_runs.make(tmp_path_factory.mktemp("lineage") / "project")
    toy_runs.run(project, RUN)
    return project


@pytest.fixture
def project(original: Project, tmp_path: Path) -> Project:
    """A copy to harm. MLflow's artifacts stay where they were: a local store's addresses are absolute."""
    shutil.copytree(original.root, tmp_path / "copy")
    return Project(tmp_path / "copy")


def traced(project: Project, subject: str = "toy@champion") -> Lineage:
    return lineage.trace(subject, project.root, project.forwarder)


def edges(found: Lineage) -> set[tuple[str, str, str]]:
    return {(edge.source, edge.target, edge.role) for edge in found.edges}


def test_the_edges_are_those_of_the_manifests(original: Project) -> None:
    found = traced(original)
    for step, reads in READS.items():
        of_step = {(role, node.id) for role, node in found.made_from(f"step.{step}")}
        kinds = {"source": "source.source", **{table: f"table.{table}" for table in toy_runs.TABLES}}
        assert of_step == {(role, kinds.get(given, f"step.{given}")) for role, given in reads.items()}
    assert {(role, node.id) for role, node in found.made_from("model")} == {
        ("weights", "step.policy"),
        ("verdict", "step.gate"),
    }
    assert not found.unknown and not found.contradictions


def test_raw_files_have_the_hashes_of_their_bytes(original: Project) -> None:
    found = traced(original)
    source = original.root / "data/toy/source"
    files = {node.title: node.facts for _, node in found.made_from("dataset")}
    assert {name: facts["sha256"] for name, facts in files.items()} == {
        name: digest_file(source / name) for name in ("first.jsonl", "second.jsonl")
    }
    assert files["first.jsonl"]["known_by"] == "batches.jsonl" and files["first.jsonl"]["by"] == "Ada"
    assert files["second.jsonl"]["known_by"].startswith("git, at ")
    assert {facts["now"] for facts in files.values()} == {"here"}


def test_the_version_is_found_in_git_with_its_counts(original: Project) -> None:
    facts = traced(original).node("dataset").facts
    assert facts["found_at"] == facts["recorded_revision"] == original.git("rev-parse", "HEAD")
    assert facts["validation"]["quarantined"] == 1
    assert facts["validation"]["found"] == {"repeated": {"rows": 1, "done": "quarantine"}}
    assert facts["counts"]["demonstrations"] == 4


def test_a_version_is_found_by_its_tables_where_the_recorded_commit_is_gone(project: Project) -> None:
    found = lineage.data_lineage.trace(
        "toy", {table: {"md5": md5} for table, md5 in project.md5s().items()}, project.root, recorded="d" * 40 + "+"
    )
    assert found.found == project.git("rev-parse", "HEAD") and not found.unknown


def test_a_version_is_found_by_its_digest_where_mlflow_has_lost_the_run(
    project: Project, original: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(project.root / "var/runs")
    monkeypatch.setattr(tracking, "read_run", lambda *_: None)
    found = traced(project)
    assert edges(found) == edges(traced(original))
    assert {node.facts["md5"] for node in found.nodes if node.kind == "table"} == set(project.md5s().values())
    assert any(said.startswith("the run did not write down: seed") for said in found.unknown)


def test_a_version_git_does_not_know_is_said_to_be_unknown(project: Project) -> None:
    found = lineage.data_lineage.trace("toy", {"gold": {"md5": "0" * 32}}, project.root)
    assert found.found == "" and not found.files and not found.counts
    assert "no dvc.lock" in found.unknown[0]


@pytest.mark.parametrize(
    "subject", ["models:/toy@champion", "models:/toy/1", "toy/1", RUN, f"var/runs/{RUN}", "run id"]
)
def test_every_name_of_a_model_means_the_same(original: Project, subject: str) -> None:
    run_id = original.forwarder.run_id(original.root / "var/runs" / RUN)
    named = traced(original, str(run_id) if subject == "run id" else subject)
    assert named.to_json() == traced(original).to_json()


def test_how_it_was_run_is_told(original: Project) -> None:
    run = traced(original).run
    assert run["code_commit"] == "c" * 40 and run["code_state"] == "clean"
    assert run["seed"] == "7" and run["prefect_flow_run"] == "a-flow-run"
    assert run["packages_txt"] == 2 and run["recipe"]
    assert run["mlflow_run"] == original.forwarder.run_id(original.root / "var/runs" / RUN)


def test_energy_is_processor_time_times_the_assumed_watts() -> None:
    # 6 steps of 6 s are 36 s; 36 s at 10 W are 360 J, a tenth of a watt hour.
    costs = [StepCost(step, step == "base", 12.5, 6.0) for step in READS]
    assert total(costs, 10.0)["all"] == {"wall_seconds": 75.0, "cpu_seconds": 36.0, "energy_wh": 0.1}
    assert total(costs, 10.0)["this_run"]["cpu_seconds"] == 30.0
    assert total([*costs, StepCost("old", False, 1.0, None)], 10.0)["all"] == {
        "wall_seconds": 76.0,
        "cpu_seconds": None,
        "energy_wh": None,
    }


def test_an_emptied_store_changes_nothing(project: Project, original: Project) -> None:
    shutil.rmtree(project.root / "var/store")
    shutil.rmtree(project.root / "var/runs")
    found = traced(project)
    assert edges(found) == edges(traced(original)) and not found.unknown
    assert found.verdict == {"promote": True, "reasons": ["yes: win rate 0.600"], "from": "the gate's manifest"}
    assert found.costs == traced(original).costs


def test_what_is_lost_is_not_invented(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(project.root / "var/store")
    shutil.rmtree(project.root / "var/runs")
    monkeypatch.setattr(tracking, "read_artifact", lambda *_: None)  # a server that kept runs and lost their files
    found = traced(project)
    assert {edge.target for edge in found.edges} <= {"model", "dataset", *(f"table.{t}" for t in toy_runs.TABLES)}
    assert [cost.wall for cost in found.costs] == [None] * len(READS)
    assert found.verdict["from"] == "the version's tags" and found.verdict["promote"] is True
    for step in READS:
        assert any(said.startswith(f"{step}: no manifest") for said in found.unknown)
    assert any("recipe.yaml" in said for said in found.unknown) and not found.contradictions


def test_a_journal_alone_gives_the_same_graph(original: Project) -> None:
    folder = original.root / "var/runs" / RUN
    server_that_is_down = tracking.Forwarder("http://127.0.0.1:9", original.root / "nowhere")
    found = lineage.of_run(folder, original.root, server_that_is_down, "models:/toy/1")
    assert edges(found) == edges(traced(original)) and not found.unknown and not found.contradictions


def test_a_run_is_traced_while_the_server_is_away(original: Project) -> None:
    found = lineage.trace(RUN, original.root, tracking.Forwarder("http://127.0.0.1:9", original.root / "nowhere"))
    below = {edge for edge in edges(traced(original)) if edge[1] != "model"}
    assert {edge for edge in edges(found) if edge[1] != "run"} == below
    assert found.unknown == ["the model registry cannot be reached (http://127.0.0.1:9), so not what it alone knows"]


def test_a_changed_batch_file_is_named(project: Project) -> None:
    (project.root / "data/toy/source/first.jsonl").write_text('{"a": 3}\n')
    (said,) = traced(project).contradictions
    assert said.startswith("first.jsonl: changed")


def edited(change: Callable[[dict], object], path: Path) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["files"].update({"adapter/weights": "0" * 64}), "has been changed"),
        (lambda m: m["inputs"].update({"preferences": "0" * 32}), "is not the one MLflow holds"),
        (lambda m: m.update(key="0" * 16), "is of policy 0000000000000000"),
        (lambda m: m.pop("files"), "cannot be read"),
    ],
)
def test_a_tampered_manifest_is_found_out(project: Project, original: Project, change: Callable, said: str) -> None:
    edited(change, project.manifest("policy"))
    found = traced(project)
    assert any(said in one for one in found.contradictions)
    assert edges(found) == edges(traced(original))  # by MLflow's copy


def test_registered_weights_that_no_step_made_are_found_out(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def forge(manifest: dict) -> None:
        manifest["files"]["adapter/weights"] = "0" * 64
        manifest["digest"] = digest_json(manifest["files"])

    edited(forge, project.manifest("policy"))
    monkeypatch.setattr(tracking, "read_artifact", lambda *_: None)
    assert any("registered weights" in said for said in traced(project).contradictions)


def test_an_old_manifest_without_processor_time_is_read(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(lambda manifest: manifest.pop("cpu_seconds"), project.manifest("sft"))
    monkeypatch.setattr(tracking, "read_artifact", lambda *_: None)
    found = traced(project)
    costs = {cost.step: cost for cost in found.costs}
    assert (costs["sft"].wall, costs["sft"].cpu) == (12.5, None)
    assert found.to_json()["cost"]["all"]["energy_wh"] is None and not found.contradictions


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ("tou@champion", "did you mean 'toy'?"),
        ("toy@challenger", "toy@champion, toy/1"),
        ("toy/9", "toy@champion, toy/1"),
        ("20260101-000001-toy", f"did you mean '{RUN}'?"),
        ("0" * 32, "no MLflow run"),
    ],
)
def test_a_name_nobody_knows_gets_a_hint(original: Project, subject: str, said: str) -> None:
    with pytest.raises(PrefloopError) as error:
        traced(original, subject)
    assert said in str(error.value)


def test_the_tree_fits_a_hundred_columns(original: Project) -> None:
    out = Console(width=100, file=io.StringIO())
    lineage_page.print_lineage(out, traced(original))
    lines = out.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for expected in ("models:/toy/1", "sha256", "clean", "a-flow-run", "promoted", "first.jsonl", "10 W"):
        assert expected in text


def test_json_has_the_documented_keys(original: Project) -> None:
    found = json.loads(json.dumps(traced(original).to_json()))
    assert found["schema"] == "prefloop.lineage/1"
    keys = {"schema", "subject", "nodes", "edges", "run", "verdict", "cost", "unknown", "contradictions"}
    assert set(found) == keys
    ids = {node["id"] for node in found["nodes"]}
    assert len(ids) == len(found["nodes"])
    assert all(edge["source"] in ids and edge["target"] in ids for edge in found["edges"])


def test_the_drawing_is_well_formed_and_escaped(original: Project) -> None:
    found = traced(original)
    nasty = "<script>alert(1)</script>\x00\x1b[31m&.jsonl"
    found.nodes.append(Node("file.nasty", "file", nasty, {"sha256": None, "known_by": nasty, "now": None}))
    found.edges.append(lineage.Edge("file.nasty", "dataset", "raw"))
    found.unknown.append(nasty)
    root = ElementTree.fromstring(lineage_page.svg(found))
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert "script" not in names and {"rect", "path", "text"} <= names
    assert any("<script>" in (element.text or "") for element in root.iter())


def test_many_raw_files_are_one_box(original: Project) -> None:
    found = traced(original)
    for number in range(20):
        found.nodes.append(Node(f"file.{number}", "file", f"{number}", {"sha256": "0" * 64, "known_by": "x"}))
        found.edges.append(lineage.Edge(f"file.{number}", "dataset", "raw"))
    assert "22 raw files" in lineage_page.svg(found)


def test_layers_go_down_along_every_edge(original: Project) -> None:
    nodes, drawn = lineage_page._drawn(traced(original))
    layers = lineage_page._layers("model", [node.id for node in nodes], drawn)
    assert all(layers[source] > layers[target] for source, target in drawn)
    assert layers["model"] == 0


def test_an_edge_that_follows_from_others_is_left_out() -> None:
    # c → b → a and c → a: the last follows. To the top nothing is left out.
    assert lineage_page._reduced([("b", "a"), ("c", "b"), ("c", "a")], "top") == [("b", "a"), ("c", "b")]
    assert lineage_page._reduced([("b", "a"), ("c", "b"), ("c", "a")], "a") == [("b", "a"), ("c", "b"), ("c", "a")]


def test_a_run_leaves_its_lineage(project: Project) -> None:
    folder = project.root / "var/runs" / RUN
    lineage_page.leave(folder, project.root, project.forwarder, "models:/toy/1")
    found = json.loads((folder / lineage_page.JSON).read_text())
    assert found["subject"] == "models:/toy/1" and found["run"]["status"] == "FINISHED"
    ElementTree.fromstring((folder / lineage_page.DRAWING).read_text())
    sent = [entry["path"] for _, entry in tracking.entries(folder) if entry["op"] == "artifact"]
    assert sent[-2:] == ["lineage.json", "lineage.svg"]


def test_a_lineage_that_cannot_be_written_does_not_stop_the_run(project: Project) -> None:
    folder = project.root / "var/runs" / RUN
    (folder / lineage_page.JSON).mkdir()
    lineage_page.leave(folder, project.root, project.forwarder, "models:/toy/1")
    assert toy_runs.journal_of(project, RUN).tags["lineage"].startswith("not written: IsADirectoryError")


def test_a_folder_is_called_what_dvc_calls_it() -> None:
    repository = Path(__file__).parents[2]
    lock = lineage.data_lineage._stages("reviews", repository, "")
    named = lineage.data_lineage._source_folder("reviews", lock)
    assert outputs("reviews", repository)
    assert _folder_md5(repository / "data/reviews/source") == named["md5"]
