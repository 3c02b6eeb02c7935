"""Tracked runs of a pipeline, written by hand: manifests, journals, a registry and a git history, but no training."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from steps import registry, tracking
from steps.artifact import digest_file, seal
from steps.data_lineage import _folder_md5
from steps.datasets import write_metrics, write_table
from steps.pipeline import TABLES
from steps.rows import row_id
from steps.tracking import Forwarder, append
from steps.usage import Usage
from steps.versions import digest_of

REPOSITORY = Path(__file__).parents[1]
NAME = "toy"
STAGES = {"ingest": ("rows",), "validate": ("valid", "quarantine"), "split": TABLES}
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org")
CPU, WALL = 6.0, 12.5  # seconds of each step
PARAMS = {
    "base": {"name": "package:small"},
    "sft": {"sft.rows": 3},
    "reward": {"reward.pairs": 2, "reward.min_margin": 1.5, "reward.max_chars": None, "reward.held_out": 2},
    "policy": {"dpo.pairs": None, "dpo.min_margin": 0.0, "dpo.max_chars": None, "dpo.held_out": 2},
    "evaluate": {"evaluate.prompts": 1},
    "gate": {},
}
READS = {
    "base": {"source": "source"},
    "sft": {"base": "base", "demonstrations": "demonstrations"},
    "reward": {"base": "base", "preferences": "preferences"},
    "policy": {"base": "base", "sft": "sft", "preferences": "preferences"},
    "evaluate": {
        "base": "base",
        "sft": "sft",
        "reward": "reward",
        "policy": "policy",
        "prompts": "prompts",
        "preferences": "preferences",
        "gold": "gold",
    },
    "gate": {"evaluate": "evaluate", "reward": "reward", "policy": "policy"},
}
FACTS: dict[str, dict[str, Any]] = {
    "base": {"base": "package:small", "bytes": 2**20},
    "sft": {"loss": 2.5, "rows": 3},
    "reward": {"accuracy": 0.75, "accuracy_low": 0.5, "accuracy_high": 0.9, "held_out": 2},
    "policy": {"method": "dpo", "accuracy": 0.5, "eval_rewards/chosen": 0.1, "eval_rewards/rejected": -0.1},
    "evaluate": {"win_rate": 0.6, "win_rate_low": 0.55, "win_rate_high": 0.65, "length_ratio": 1.0},
    "gate": {"promote": True, "reasons": ["yes: win rate 0.600"]},
}
PROVENANCE = {
    "prefloop.git_commit": "c" * 40,
    "prefloop.code_commit": "c" * 40,
    "prefloop.code_state": "clean",
    "prefloop.seed": "7",
    "prefloop.recipe_sha256": "5" * 64,
    "prefloop.libraries": "torch 1.0, trl 2.0",
    "prefloop.packages": "2 packages, sha256 0123456789abcdef",
    "prefloop.processor": "a processor",
    "prefloop.cores": "2",
    "prefloop.memory": "8.0 GiB",
    "prefloop.gpus": "none found",
    "prefloop.system": "Linux 1, Python 3.11",
    "prefect.flow_run_id": "a-flow-run",
}


@dataclass
class Project:
    """A project and what is known of it."""

    root: Path

    @cached_property
    def forwarder(self) -> Forwarder:
        return Forwarder(f"sqlite:///{self.root / 'var/mlflow.db'}", self.root / "var/mlflow-artifacts")

    def git(self, *arguments: str) -> str:
        done = subprocess.run([*GIT, *arguments], cwd=self.root, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(self.root / "data" / NAME / f"{name}.parquet")

    def md5s(self) -> dict[str, str]:
        folder = self.root / "data" / NAME
        return {table: digest_file(folder / f"{table}.parquet", "md5") for table in TABLES}

    def manifest(self, step: str) -> Path:
        return next((self.root / "var/store").glob(f"{step}-*/manifest.json"))


def make(root: Path) -> Project:
    """A project with one dataset and one commit; nothing has run."""
    project = Project(root)
    (root / "data" / NAME / "source").mkdir(parents=True)
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "data/datasets.yaml").write_text("datasets: {toy: {}}\n")
    (root / ".gitignore").write_text("var/\n*.parquet\n")
    (root / "data" / NAME / "source/first.jsonl").write_text('{"a": 1}\n')
    (root / "data" / NAME / "source/second.jsonl").write_text('{"a": 2}\n')
    record = {"file": "first.jsonl", "sha256": digest_file(root / "data" / NAME / "source/first.jsonl"), "rows": 11}
    (root / "data" / NAME / "batches.jsonl").write_text(
        json.dumps({**record, "by": "Ada", "added": "2026-01-01"}) + "\n"
    )
    project.git("init", "-q")
    version(project)
    return project


def version(project: Project, without: frozenset[str] = frozenset()) -> str:
    """Write the tables, without some rows, and commit the lock that names them; the commit."""
    folder = project.root / "data" / NAME
    shown = [row for row in canonical() if row["row_id"] not in without]
    for name, rows in {**_tables(shown), "rows": shown, "valid": shown, "quarantine": []}.items():
        columns = list(canonical()[0]) if name in ("rows", "valid", "quarantine") else _COLUMNS[name]
        write_table(pd.DataFrame(rows, columns=columns), folder / f"{name}.parquet")
    checks = {"repeated": {"rows": 1, "severity": "quarantine"}}
    write_metrics(
        {"read": len(shown) + 1, "valid": len(shown), "quarantined": 1, "checks": checks, "bounds": {}},
        folder / "validation.json",
    )
    write_metrics({"demonstrations": 4, "gold": 1, "prompts": 2}, folder / "split.json")
    lock = {"schema": "2.0", "stages": {f"{stage}@{NAME}": _stage(folder, stage) for stage in STAGES}}
    (project.root / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    project.git("add", "-A")
    project.git("commit", "-qm", "a version")
    return project.git("rev-parse", "HEAD")


def _stage(folder: Path, stage: str) -> dict[str, Any]:
    files = [f"{table}.parquet" for table in STAGES[stage]]
    files += {"validate": ["validation.json"], "split": ["split.json"]}.get(stage, [])
    outs = [{"path": f"data/{NAME}/{file}", "md5": digest_file(folder / file, "md5")} for file in files]
    source = {"files": {"one": "first.jsonl", "two": "second.jsonl"}}
    entry = {"format": "preferences", "source": source}
    deps = [{"path": f"data/{NAME}/source", "md5": _folder_md5(folder / "source"), "nfiles": 2}]
    return {"deps": deps, "params": {"data/datasets.yaml": {f"datasets.{NAME}": entry}}, "outs": outs}


def canonical() -> list[dict[str, Any]]:
    """Eleven rows: four demonstrations, six pairs (four to train on, two held out) and one that is gold."""
    rows: list[dict[str, Any]] = []
    for number in range(4):
        rows.append({"kind": "demonstration", "prompt": f"d{number}", "answer": f"completion {number}"})
    for number in range(6):
        margin = float(number % 3)  # of the four to train on: 0, 1, 2, 0
        texts = {"chosen": f"good {number}", "rejected": f"bad {number}"}
        rows.append({"kind": "pair", "prompt": f"p{number // 2}", **texts, "margin": margin})
    rows.append({"kind": "rated", "answer": "gold answer", "score": 1.0})
    names = ("kind", "prompt", "chosen", "rejected", "tie", "margin", "answer", "score", "ratings")
    whole = [{name: row.get(name) for name in names} for row in rows]
    return [
        {"row_id": row_id(row), **row, "file": "first.jsonl", "line": line, "part": 0}
        for line, row in enumerate(whole, start=1)
    ]


_COLUMNS = {
    "demonstrations": ["prompt", "completion", "row_id"],
    "preferences": ["prompt", "chosen", "rejected", "margin", "agreement", "chosen_id", "rejected_id", "part"],
    "prompts": ["prompt"],
    "gold": ["answer", "score", "row_id"],
}


def _tables(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    pairs = [row for row in rows if row["kind"] == "pair"]
    sides = [
        {
            **{name: row[name] for name in ("prompt", "chosen", "rejected", "margin")},
            "agreement": None,
            "chosen_id": row["row_id"],
            "rejected_id": row["row_id"],
            "part": "held_out" if row["prompt"] == "p2" else "train",
        }
        for row in pairs
    ]
    demonstrations = [
        {"prompt": row["prompt"], "completion": row["answer"], "row_id": row["row_id"]}
        for row in rows
        if row["kind"] == "demonstration"
    ]
    gold = [{name: row[name] for name in ("answer", "score", "row_id")} for row in rows if row["kind"] == "rated"]
    return {
        "demonstrations": demonstrations,
        "preferences": sides,
        "prompts": [{"prompt": "p2"}, {"prompt": "never asked"}],
        "gold": gold,
    }


def run(
    project: Project,
    name: str,
    *,
    changed: Mapping[str, str] = {},
    facts: Mapping[str, Mapping[str, Any]] = {},
    params: Mapping[str, Mapping[str, Any]] = {},
    tags: Mapping[str, str] = {},
    recipe: Mapping[str, Any] = {},
    packages: str = "mlflow==3.0\ntorch==1.0\n",
    register: bool = True,
    cpu_seconds: float | None = CPU,
) -> str:
    """A run of the whole pipeline, sent to MLflow; the version's address.

    Args:
        changed: step → what sets its files apart from those of other runs; steps not named are shared by all runs.
    """
    forwarder, var = project.forwarder, project.root / "var"
    folder = var / "runs" / name
    folder.mkdir(parents=True)
    text = yaml.safe_dump({"name": NAME, "seed": 7, "policy": {"dpo": {"beta": 0.1}}, **recipe})
    (folder / "recipe.yaml").write_text(text)
    (folder / "packages.txt").write_text(packages)
    append(folder, "start", name=name, experiment=NAME, parent=None, tags={**PROVENANCE, **tags})
    append(folder, "params", values={"model.base": "package:small", "seed": 7})
    for file in ("recipe.yaml", "packages.txt"):
        append(folder, "artifact", path=file)
    md5s, head = project.md5s(), project.git("rev-parse", "HEAD")
    append(folder, "tags", values={"data": NAME, "data_digest": digest_of(md5s), "data_revision": head})
    append(folder, "inputs", datasets=[_dataset(project, table, head) for table in TABLES])
    made: dict[str, str] = {"source": "f" * 64, **md5s}
    keys: dict[str, str] = {}
    for step in READS:
        inputs = {role: made[given] for role, given in READS[step].items()}
        of_step = {**FACTS[step], **facts.get(step, {})}
        settings = {"seed": 7, **PARAMS[step], **params.get(step, {})}
        mark = json.dumps([inputs, of_step, settings, changed.get(step, "")], sort_keys=True)
        keys[step] = hashlib.sha256(mark.encode()).hexdigest()[:16]
        place = var / "store" / f"{step}-{keys[step]}"
        how = "reused" if place.is_dir() else "run"
        if how == "run":
            (place / "adapter").mkdir(parents=True)
            (place / "adapter/weights").write_text(mark)
            append(place, "start", name=place.name, experiment=NAME, parent=str(folder), tags=_tags(step, keys[step]))
            append(place, "params", values=settings)
            tables = [given for given in READS[step].values() if given in TABLES]
            if tables:
                append(place, "inputs", datasets=[_dataset(project, table, head) for table in tables])
            used = None if cpu_seconds is None else Usage(cpu_seconds, 512.0)
            seal(place, step, keys[step], inputs, of_step, WALL, used)
            append(place, "artifact", path="manifest.json")
            append(place, "end", status="FINISHED")
        made[step] = json.loads((place / "manifest.json").read_text())["digest"]
        assert forwarder.forward(place), forwarder.problem
        append(folder, "tags", values={f"step.{step}": f"{how} {keys[step]}, MLflow run {forwarder.run_id(place)}"})
    measured = {**FACTS["evaluate"], **facts.get("evaluate", {})}
    append(folder, "metrics", step=0, values={"win_rate": measured["win_rate"], "sft/loss": 2.5})
    policy = var / "store" / f"policy-{keys['policy']}"
    shutil.copytree(policy / "adapter", folder / "model/adapter")
    append(folder, "artifact", path="model", under="model")
    assert forwarder.forward(folder), forwarder.problem
    if register:
        known = {
            "policy_digest": registry.adapter_digest(policy),
            "evaluation": keys["evaluate"],
            "base": "package:small",
            "data": NAME,
            "data_digest": digest_of(md5s),
            "data_revision": head,
            "run": name,
            "verdict": "yes: win rate 0.600",
            **{f"step.{step}": key for step, key in keys.items()},
        }
        run_id = str(forwarder.run_id(folder))
        version = registry.register(forwarder.client, NAME, run_id, "model", known, promote=True, description="A card.")
        append(folder, "tags", values={"model": version.uri, "promoted": True})
    append(folder, "end", status="FINISHED")
    assert forwarder.forward(folder), forwarder.problem
    return version.uri if register else name


def _tags(step: str, key: str) -> dict[str, str]:
    return {"prefloop.step": step, "prefloop.key": key}


def _dataset(project: Project, table: str, revision: str) -> dict[str, Any]:
    path = f"data/{NAME}/{table}.parquet"
    rows = len(project.table(table))
    name = f"{NAME}/{table}"
    md5 = digest_file(project.root / path, "md5")
    return {"name": name, "md5": md5, "path": path, "revision": revision, "rows": rows, "context": table}


def journal_of(project: Project, name: str) -> tracking.Record:
    """What a run's journal says."""
    record = tracking.record_of(project.root / "var/runs" / name)
    assert record is not None
    return record
