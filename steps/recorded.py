"""What was written down about a finished run, as far as running it again needs it, and what is wrong with that."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steps import data_lineage, provenance, registry, tracking, versions
from steps.artifact import digest_file
from steps.errors import PrefloopError
from steps.evidence import Evidence
from steps.experiment import flat
from steps.step_tags import STEP, step_names, step_tag
from steps.tracking import Forwarder, Record


@dataclass(frozen=True)
class StepThen:
    """A step as it was written down.

    Attributes:
        key: of its artifact.
        manifest: empty where none can be had.
        settings: `seed`, the recipe's part of it and the digest of its `code`, as text; what is not known is missing.
        surroundings: processor, architecture, GPUs, threads and libraries of the run that did it, as far as known.
        problems: what is wrong with what was kept of it.
    """

    name: str
    key: str
    manifest: Mapping[str, Any]
    settings: Mapping[str, str] = field(default_factory=dict)
    surroundings: Mapping[str, str] = field(default_factory=dict)
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class Original:
    """A run as it was written down.

    Attributes:
        subject: `models:/NAME/VERSION`, or the run's name.
        commit: full name of the commit its code stood on.
        state: `clean`, or how the work tree differed from the commit.
        recipe: YAML.
        tables: table → md5.
        problems: what is wrong with what was kept of the run.
    """

    subject: str
    run: str
    commit: str
    state: str
    recipe: str
    data: str
    revision: str
    tables: Mapping[str, str]
    steps: Mapping[str, StepThen]
    problems: Sequence[str] = ()

    @property
    def clean(self) -> bool:
        return self.state == provenance.CLEAN


def original(subject: str, root: Path, forwarder: Forwarder) -> Original:
    """Collect what was written down about a run.

    Args:
        subject: a model version or a run, as `prefloop lineage` takes them.

    Raises:
        PrefloopError: there is no such run, or too little was written down to run it again.
    """
    evidence = Evidence(root, forwarder)
    run, version = evidence.subject(subject)
    tags = {**(version.tags if version else {}), **run.tags}
    commit, state = _code_of(tags, run.name)
    recipe = evidence.artifact(run, "recipe.yaml")
    if recipe is None:
        raise _too_little(run, "its recipe is neither in var/runs nor among MLflow's artifacts")
    problems = _recipe_problems(recipe, tags)
    steps = {}
    for name in step_names(tags):
        said = step_tag(run.tags, name)
        key, run_id = (said.key, said.run_id) if said else (tags[STEP + name], "")
        steps[name] = _step_then(name, key, run_id, run, evidence)
    if not steps:
        raise _too_little(run, "no step of it was finished")
    policy = steps["policy"].manifest if "policy" in steps else {}
    if (
        version is not None
        and policy
        and registry.adapter_digest_of(policy["files"]) != version.tags.get("policy_digest")
    ):
        problems.append(f"the policy's manifest is not of the adapter that {version.uri} was registered with")
    tables = {str(one["name"]).rpartition("/")[2]: str(one["md5"]) for one in run.datasets}
    if not tags.get("data") or not tables:
        raise _too_little(run, "it did not write down which data it read")
    return Original(
        subject=version.uri if version else run.name,
        run=run.name,
        commit=versions.commit(root, commit),
        state=state,
        recipe=recipe,
        data=tags["data"],
        revision=_revision(tags["data"], tables, tags.get("data_revision", ""), root),
        tables=tables,
        steps=steps,
        problems=problems,
    )


def _too_little(run: Record, have: str) -> PrefloopError:
    return PrefloopError(f"{run.name} cannot be run again", where=run.source, have=have)


def _code_of(tags: Mapping[str, str], name: str) -> tuple[str, str]:
    """(commit, `clean` or how the work tree differed)."""
    if commit := tags.get("prefloop.code_commit"):
        state = tags.get("prefloop.code_state", "")
    else:
        commit = tags.get("prefloop.git_commit", "no git")
        state = "not committed as it was" if commit.endswith("+") else provenance.CLEAN
    commit = commit.rstrip("+")
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        raise PrefloopError(
            f"{name} cannot be run again: its code was in no git repository",
            have=commit or "no commit was written down",
            then="runs of a project that is under git can be",
        )
    return commit, state


def _recipe_problems(recipe: str, tags: Mapping[str, str]) -> list[str]:
    said, found = tags.get("prefloop.recipe_sha256"), hashlib.sha256(recipe.encode()).hexdigest()
    if said in (None, found):
        return []
    return [f"recipe.yaml is not the one that was run: sha256 {found[:12]}, not {said[:12]}"]


def _step_then(name: str, key: str, run_id: str, run: Record, evidence: Evidence) -> StepThen:
    sound, problems = evidence.manifests(name, key, run_id)
    manifest = sound[0][1] if sound else {}
    stored = evidence.var / "store" / f"{name}-{key}"
    problems += _tampered(stored, manifest)
    record = evidence.step_record(name, key, run_id)
    doer = run
    if record is not None and (parent := record.tags.get("mlflow.parentRunId")) and parent != run.run_id:
        with suppress(PrefloopError):
            doer = tracking.read_run(evidence.client, parent) or run
    settings = dict(record.params) if record else {}
    with suppress(OSError, ValueError, KeyError):
        spec = json.loads((stored / "spec.json").read_text(encoding="utf-8"))
        settings = settings or settings_of(spec["seed"], spec["config"])
    if digest := run.tags.get(f"code.{name}"):
        settings["code"] = digest
    return StepThen(name, key, manifest, settings, _surroundings(doer.tags), problems)


def _tampered(stored: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files of the store that are not those the step left."""
    name = manifest.get("kind", stored.name)
    files = manifest.get("files", {}) if stored.is_dir() else {}
    found = []
    for file, digest in files.items():
        if not (stored / file).is_file():
            found.append(f"{name}: {file} is gone from {stored.name} in the store")
        elif digest_file(stored / file) != digest:
            found.append(f"{name}: {file} in the store is not the file that was made ({stored.name})")
    return found


def settings_of(seed: Any, config: Mapping[str, Any]) -> dict[str, str]:
    """Seed and configuration as MLflow's parameters have them."""
    return {name: str(value) for name, value in flat({"seed": seed, **config}).items()}


def _surroundings(tags: Mapping[str, str]) -> dict[str, str]:
    """What a step ran with, as far as its run says."""
    found = {
        "libraries": tags.get("prefloop.libraries", ""),
        "processor": tags.get("prefloop.processor", ""),
        "architecture": tags.get("prefloop.machine", "").partition(",")[0],
        "threads": tags.get("prefloop.threads", ""),
        "gpus": tags.get("prefloop.gpus", ""),
    }
    return {name: value for name, value in found.items() if value}


def _revision(name: str, tables: Mapping[str, str], recorded: str, root: Path) -> str:
    """A commit whose `dvc.lock` names these tables; empty for the work tree.

    Raises:
        PrefloopError: neither git's history nor the work tree knows them.
    """
    found = data_lineage.revision_of(name, tables, "" if recorded == "no git" else recorded, root)
    if found is not None:
        return found
    raise PrefloopError(
        f"the data version of that run is gone: no dvc.lock names its tables of '{name}'",
        where="git's history of dvc.lock, and the work tree",
        have=", ".join(f"{table} {md5[:12]}" for table, md5 in tables.items()),
        then="fetch the branch that holds it, then run again",
    )


def problems(then: Original) -> list[str]:
    """Everything that is wrong with what was kept of a run."""
    return [*then.problems, *(problem for step in then.steps.values() for problem in step.problems)]
