"""What a model was made from, as a graph: model ← policy ← reward, SFT, base ← dataset version ← raw files.

Read from what is left: the registry's tags, MLflow's runs, the manifests in the store and their copies in MLflow, git's
history of `dvc.lock`. Whatever cannot be found any more is said to be unknown, and what does not fit together is said
to contradict; nothing is filled in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from steps import data_lineage, provenance, registry, tracking
from steps.data_lineage import DataOrigin
from steps.errors import PrefloopError
from steps.evidence import VERSION, Evidence
from steps.registry import Version
from steps.step_tags import STEP, step_names, step_tag
from steps.tracking import Forwarder, Record

SCHEMA = "prefloop.lineage/1"
WATTS_PER_CORE = 10.0  # an assumption: a server's processor at full load, with its share of memory and losses


@dataclass(frozen=True)
class Node:
    """Something a model was made from, or the model.

    Attributes:
        id: unique in its graph, such as `step.policy`, `table.gold`, `file.first.jsonl`.
        kind: model, step, table, dataset, file, or source (models made elsewhere).
        title: for people.
        facts: JSON values; what is not known is None.
    """

    id: str
    kind: str
    title: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Edge:
    """`target` was made from `source`, which it calls `role`."""

    source: str
    target: str
    role: str


@dataclass(frozen=True)
class StepCost:
    """What a step took, in seconds; `reused` when this run found it done. None where nobody measured it."""

    step: str
    reused: bool
    wall: float | None
    cpu: float | None


@dataclass(frozen=True)
class Lineage:
    """A model, or a run, and everything it came from.

    Attributes:
        subject: `models:/NAME/VERSION`, or the run's name.
        nodes: the subject first.
        run: who ran it and with what: MLflow and Prefect run ids, times, recipe, seed, code, packages, hardware.
        verdict: whether the gate promoted it, and its reasons.
        costs: one for each step.
        watts: the assumption behind the energy.
        unknown: what is not known any more, and why.
        contradictions: what does not fit together; a lineage that has one proves nothing.
    """

    subject: str
    nodes: list[Node]
    edges: list[Edge]
    run: Mapping[str, Any]
    verdict: Mapping[str, Any]
    costs: list[StepCost]
    watts: float
    unknown: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)

    def node(self, id: str) -> Node | None:
        return next((node for node in self.nodes if node.id == id), None)

    def made_from(self, id: str) -> list[tuple[str, Node]]:
        """(role, node) of what a node was made from."""
        known = {node.id: node for node in self.nodes}
        return [(edge.role, known[edge.source]) for edge in self.edges if edge.target == id]

    def to_json(self) -> dict[str, Any]:
        """As docs/lineage.md describes it."""
        return {
            "schema": SCHEMA,
            "subject": self.subject,
            "nodes": [asdict(node) for node in self.nodes],
            "edges": [asdict(edge) for edge in self.edges],
            "run": dict(self.run),
            "verdict": dict(self.verdict),
            "cost": {"steps": [asdict(cost) for cost in self.costs], **total(self.costs, self.watts)},
            "unknown": self.unknown,
            "contradictions": self.contradictions,
        }


def total(costs: list[StepCost], watts: float) -> dict[str, Any]:
    """Seconds and energy of all steps, and of those this run did itself; None when a step's are not known."""
    found: dict[str, Any] = {}
    for name, part in (("all", costs), ("this_run", [cost for cost in costs if not cost.reused])):
        wall, cpu = (_sum([getattr(cost, kind) for cost in part]) for kind in ("wall", "cpu"))
        energy = None if cpu is None else round(cpu * watts / 3600, 4)
        found[name] = {"wall_seconds": wall, "cpu_seconds": cpu, "energy_wh": energy}
    return {**found, "watts_per_busy_core": watts}


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known), 2) if len(known) == len(values) else None


# -- what is asked about -----------------------------------------------------------------------------------------


def trace(subject: str, root: Path, forwarder: Forwarder, watts: float = WATTS_PER_CORE) -> Lineage:
    """The lineage of a model version or of a run.

    Args:
        subject: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, both also without `models:/`; a run's folder or its name;
            or an MLflow run id.

    Raises:
        PrefloopError: there is no such model, version or run.
        EnvironmentProblem: the tracking server cannot be reached and is needed.
    """
    evidence = Evidence(root, forwarder)
    run, version = evidence.subject(subject)
    return build(run, version, evidence, watts)


def of_run(folder: Path, root: Path, forwarder: Forwarder, model: str, watts: float = WATTS_PER_CORE) -> Lineage:
    """The lineage of a run that is just ending, from its own journal and the store alone: no server is asked.

    Args:
        model: the address of the version it has registered.
    """
    run = tracking.record_of(folder)
    if run is None:
        raise PrefloopError("a run has no journal", where=str(folder))
    evidence = Evidence(root, forwarder, local=True)
    named = VERSION.match(model)
    tags = {"run": folder.name}
    version = Version(named["name"], named["which"], forwarder.run_id(folder) or "", tags) if named else None
    ending = replace(run, run_id=forwarder.run_id(folder) or "", status="FINISHED", ended=int(time.time() * 1000))
    return build(ending, version, evidence, watts, thorough=False)


# -- building the graph ------------------------------------------------------------------------------------------


@dataclass
class _Step:
    name: str
    key: str
    run_id: str = ""
    reused: bool = False
    manifest: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    record: Record | None = None


def build(
    run: Record, version: Version | None, evidence: Evidence, watts: float = WATTS_PER_CORE, *, thorough: bool = True
) -> Lineage:
    """The lineage of a run, and of the version it registered.

    Args:
        thorough: see `data_lineage.trace`.
    """
    unknown: list[str] = [evidence.problem] if evidence.problem else []
    wrong: list[str] = []
    steps = _steps(run, version, evidence, unknown, wrong)
    data = _data(run, version, evidence.root, thorough)
    nodes = [_subject_node(run, version, evidence)]
    edges: list[Edge] = []
    nodes += [_step_node(step) for step in steps.values()]
    _add_data(data, nodes, unknown, wrong, edges)
    _add_inputs(steps, run, version, evidence, nodes, edges, unknown)
    top = nodes[0].id
    edges = [Edge(f"step.{name}", top, role) for name, role in _TOP.items() if name in steps] + edges
    _check_policy(steps, version, wrong)
    costs = [
        StepCost(step.name, step.reused, step.manifest.get("seconds"), step.manifest.get("cpu_seconds"))
        for step in steps.values()
    ]
    return Lineage(
        subject=version.uri if version else run.name,
        nodes=nodes,
        edges=edges,
        run=_run_facts(run, evidence, unknown),
        verdict=_verdict(run, version, steps),
        costs=costs,
        watts=watts,
        unknown=unknown,
        contradictions=wrong,
    )


_TOP = {"policy": "weights", "gate": "verdict"}


def _steps(
    run: Record, version: Version | None, evidence: Evidence, unknown: list[str], wrong: list[str]
) -> dict[str, _Step]:
    found: dict[str, _Step] = {}
    # A run that made a policy anew that was registered before shares the version, but not the gate's step, say.
    registered = version.tags if version and version.run_id == run.run_id else {}
    for name in step_names({*run.tags, *registered}):
        said = step_tag(run.tags, name)
        key = said.key if said else registered.get(STEP + name)
        if not key:
            continue
        other = registered.get(STEP + name, key)
        if other != key:
            wrong.append(f"the run says that {name} is {key}, the registered version says {other}")
        step = found[name] = _Step(name, key, said.run_id if said else "", said is not None and said.reused)
        manifests, problems = evidence.manifests(name, key, step.run_id)
        wrong += problems
        if manifests:
            step.where, step.manifest = manifests[0]
        else:
            unknown.append(f"{name}: no manifest of {key}, neither in the store nor in MLflow, so not what it read")
        step.record = evidence.step_record(name, key, step.run_id)
    if not found:
        unknown.append("no step of this run is known")
    return found


def _data(run: Record, version: Version | None, root: Path, thorough: bool) -> DataOrigin | None:
    tags = {**(version.tags if version else {}), **run.tags}
    tables = {}
    for given in run.datasets:
        name, _, table = str(given["name"]).rpartition("/")
        if name == tags.get("data", name):
            tables[table] = {"md5": given["md5"], "rows": given.get("rows")}
    if not tags.get("data"):
        return None
    recorded = "" if tags.get("data_revision") == "no git" else tags.get("data_revision", "")
    return data_lineage.trace(
        tags["data"], tables, root, digest=tags.get("data_digest", ""), recorded=recorded, thorough=thorough
    )


def _subject_node(run: Record, version: Version | None, evidence: Evidence) -> Node:
    if version is None:
        return Node("run", "run", run.name, {"status": run.status})
    facts: dict[str, Any] = {"name": version.name, "version": version.version, "run": run.name}
    if not evidence.local:
        facts["aliases"] = registry.aliases_of(evidence.client, version)
    for name in ("policy_digest", "base", registry.ROLLED_BACK):
        if name in version.tags:
            facts[name] = version.tags[name]
    return Node("model", "model", version.uri, facts)


def _step_node(step: _Step) -> Node:
    manifest = step.manifest
    numbers = {name: value for name, value in manifest.get("facts", {}).items() if not isinstance(value, list | dict)}
    facts = {
        "key": step.key,
        "digest": manifest.get("digest"),
        "mlflow_run": step.run_id or None,
        "reused": step.reused,
        "seed": _seed(step),
        "seconds": manifest.get("seconds"),
        "cpu_seconds": manifest.get("cpu_seconds"),
        "peak_mib": manifest.get("peak_mib"),
        "manifest_from": step.where or None,
        "facts": numbers,
    }
    return Node(f"step.{step.name}", "step", step.name, facts)


def _seed(step: _Step) -> int | None:
    said = step.record.params.get("seed") if step.record else None
    return int(said) if said is not None and said.lstrip("-").isdigit() else None


def _add_data(
    data: DataOrigin | None, nodes: list[Node], unknown: list[str], wrong: list[str], edges: list[Edge]
) -> None:
    if data is None:
        unknown.append("which data it read: the run wrote down none")
        return
    unknown += data.unknown
    wrong += data.contradictions
    if not data.tables:
        unknown.append(f"which tables of {data.name} it read: the run wrote down none")
    for table, known in data.tables.items():
        nodes.append(Node(f"table.{table}", "table", f"{data.name}/{table}", dict(known)))
        edges.append(Edge("dataset", f"table.{table}", "split"))
    facts = {
        "name": data.name,
        "digest": data.digest,
        "path": f"data/{data.name}",
        "recorded_revision": data.recorded or None,
        "found_at": data.found or None,
        "counts": dict(data.counts) or None,
        "validation": dict(data.validation) or None,
        "source": dict(data.source) or None,
    }
    nodes.append(Node("dataset", "dataset", f"{data.name} {data.digest[:12]}", facts))
    for file in data.files:
        said = {"sha256": file.sha256 or None, "known_by": file.known_by, "now": file.now or None, **file.facts}
        nodes.append(Node(f"file.{file.name}", "file", file.name, said))
        edges.append(Edge(f"file.{file.name}", "dataset", "raw"))


def _add_inputs(
    steps: Mapping[str, _Step],
    run: Record,
    version: Version | None,
    evidence: Evidence,
    nodes: list[Node],
    edges: list[Edge],
    unknown: list[str],
) -> None:
    """An edge for each input of each step, found by its digest and never by its name."""
    made = {step.manifest["digest"]: f"step.{name}" for name, step in steps.items() if step.manifest}
    made |= {node.facts["md5"]: node.id for node in nodes if node.kind == "table"}
    elsewhere: dict[str, str] = {}
    for name, step in steps.items():
        for role, digest in step.manifest.get("inputs", {}).items():
            if digest not in made:
                node = _made_elsewhere(role, digest, run, version, evidence)
                node = replace(node, id=f"source.{role}" if role not in elsewhere else f"source.{role}.{digest[:8]}")
                elsewhere[role] = made[digest] = node.id
                nodes.append(node)
                if not node.facts.get("origin"):
                    unknown.append(f"{name} read {role} {digest[:12]}, and where that came from is not known")
            edges.append(Edge(made[digest], f"step.{name}", role))


_MODELS = {
    "source": ("model.base", "model.revision"),
    "classifier": ("evaluate.reward_model", "evaluate.reward_revision"),
    "topics": ("evaluate.topics.file", ""),
    "probes": ("evaluate.topics.probes", ""),
}


def _made_elsewhere(role: str, digest: str, run: Record, version: Version | None, evidence: Evidence) -> Node:
    """A model that no step of this run made: the base's files, a judge's, the champion of that day."""
    if role in _MODELS:
        name, revision = (run.params.get(param) for param in _MODELS[role])
        name = name or (version.tags.get("base") if version and role == "source" else None)
        known = {"origin": name, "revision": None if revision in (None, "None") else revision}
        return Node("", "source", name or f"{role} {digest[:12]}", {"digest": digest, **known})
    try:
        earlier = [] if evidence.problem else registry.every_version(evidence.client)
    except PrefloopError:
        earlier = []
    for other in earlier:
        if other.tags.get("policy_digest") == digest:
            return Node("", "source", other.uri, {"digest": digest, "origin": other.uri})
    return Node("", "source", f"{role} {digest[:12]}", {"digest": digest, "origin": None})


def _check_policy(steps: Mapping[str, _Step], version: Version | None, wrong: list[str]) -> None:
    """The adapter that was registered must be the policy step's."""
    registered = version.tags.get("policy_digest") if version else None
    manifest = steps["policy"].manifest if "policy" in steps else {}
    if registered and manifest and registry.adapter_digest_of(manifest["files"]) != registered:
        wrong.append("the registered weights are not those the policy step's manifest lists")


def _verdict(run: Record, version: Version | None, steps: Mapping[str, _Step]) -> dict[str, Any]:
    facts = steps["gate"].manifest.get("facts", {}) if "gate" in steps else {}
    if facts:
        return {"promote": facts.get("promote"), "reasons": facts.get("reasons"), "from": "the gate's manifest"}
    if version and version.tags.get("verdict"):
        promoted = {"True": True, "False": False}.get(run.tags.get("promoted", ""))
        return {"promote": promoted, "reasons": version.tags["verdict"].split(" | "), "from": "the version's tags"}
    return {"promote": None, "reasons": None, "from": None}


_TAGS = {
    "command": "prefloop.command",
    "seed": "prefloop.seed",
    "recipe_sha256": "prefloop.recipe_sha256",
    "project_commit": "prefloop.git_commit",
    "code_commit": "prefloop.code_commit",
    "code_state": "prefloop.code_state",
    "libraries": "prefloop.libraries",
    "packages": "prefloop.packages",
    "machine": "prefloop.machine",
    "processor": "prefloop.processor",
    "cores": "prefloop.cores",
    "memory": "prefloop.memory",
    "gpus": "prefloop.gpus",
    "system": "prefloop.system",
    "prefect_flow_run": "prefect.flow_run_id",
    "drift": "data_drift",
}
OPTIONAL = {"command", "prefect_flow_run", "machine", "drift"}  # whose absence means that there was none


def _run_facts(run: Record, evidence: Evidence, unknown: list[str]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": run.name,
        "mlflow_run": run.run_id or None,
        "status": run.status or None,
        "started": run.started,
        "ended": run.ended,
        "read_from": run.source,
        **{name: run.tags.get(tag) for name, tag in _TAGS.items()},
    }
    facts["seed"] = facts["seed"] if facts["seed"] is not None else run.params.get("seed")
    facts["code"] = {tag.removeprefix("code."): value for tag, value in run.tags.items() if tag.startswith("code.")}
    installed = evidence.artifact(run, provenance.PACKAGES)
    facts["packages_txt"] = len(installed.split()) if installed is not None else None
    facts["recipe"] = evidence.artifact(run, "recipe.yaml") is not None
    missing = [name for name in _TAGS if facts[name] is None and name not in OPTIONAL]
    if missing:
        unknown.append(f"the run did not write down: {', '.join(missing)}")
    if not facts["recipe"]:
        unknown.append("recipe.yaml of the run can be had neither from its folder nor from MLflow")
    return facts
