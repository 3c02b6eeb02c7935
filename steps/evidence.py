"""Where what is known of runs and steps lies: in `var/`, in MLflow, in the registry; and whether it agrees."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from steps import registry, tracking
from steps.artifact import COSTS, MANIFEST, digest_json
from steps.errors import EnvironmentProblem, PrefloopError, did_you_mean
from steps.paths import Var
from steps.registry import Version
from steps.tracking import Forwarder, Record

VERSION = re.compile(r"^(?:models:/)?(?P<name>[^/@]+)[/@](?P<which>[^/@]+)$")
_RUN_ID = re.compile(r"^[0-9a-f]{32}$")


class Evidence:
    """Where to look for what is known of runs and steps.

    Args:
        local: look into this project's `var/` alone; so it becomes when the tracking server turns out to be away.

    Attributes:
        problem: why the server was not asked, where it should have been.
    """

    def __init__(self, root: Path, forwarder: Forwarder, local: bool = False) -> None:
        self.root, self.forwarder, self.local = root, forwarder, local
        self.var, self.problem = Var(root).path, ""

    @property
    def client(self) -> Any:
        """MLflow's client."""
        return self.forwarder.client

    def subject(self, name: str) -> tuple[Record, Version | None]:
        """The run, and the model version if there is one, that somebody names."""
        folder = Path(name.rstrip("/")).name
        if (record := self._journal(folder)) is not None:
            return record, self._registered(record)
        if _RUN_ID.match(name):
            if (record := tracking.read_run(self.client, name)) is not None:
                return record, self._registered(record)
            raise PrefloopError(f"there is no MLflow run {name}", where=self.forwarder.uri)
        if named := VERSION.match(name):
            version = registry.find(self.client, named["name"], named["which"])
            return self._run_of(version), version
        for record in tracking.find_runs(self.client, f"attributes.run_name = '{_quoted(folder)}'"):
            return record, self._registered(record)
        runs = [path.name for path in (self.var / "runs").iterdir()] if (self.var / "runs").is_dir() else []
        raise PrefloopError(
            f"there is no model version and no run '{name}'",
            where=self.forwarder.uri,
            have=did_you_mean(name, runs) if runs else "no run at all",
            then="name NAME@champion, NAME/VERSION, a folder of var/runs, or an MLflow run id",
        )

    def _journal(self, name: str) -> Record | None:
        """A run of this project by its folder; MLflow's account of it where there is one, for people may add tags."""
        folder = self.var / "runs" / name
        record = tracking.record_of(folder) if name and folder.is_dir() else None
        if record is None:
            return None
        if run_id := self.forwarder.run_id(folder):
            try:
                return tracking.read_run(self.client, run_id) or replace(record, run_id=run_id)
            except EnvironmentProblem as error:
                self._do_without(error)
                return replace(record, run_id=run_id)
        return record

    def _do_without(self, error: EnvironmentProblem) -> None:
        self.local, self.problem = True, f"{error.what} ({error.where}), so not what it alone knows"

    def _registered(self, record: Record) -> Version | None:
        named = VERSION.match(record.tags.get("model", ""))
        if not named or self.local:
            return None
        try:
            return registry.find(self.client, named["name"], named["which"])
        except EnvironmentProblem as error:
            self._do_without(error)
        except PrefloopError:  # it was deleted
            pass
        return None

    def _run_of(self, version: Version) -> Record:
        if (record := tracking.read_run(self.client, version.run_id)) is not None:
            return record
        if (record := self._journal(version.tags.get("run", ""))) is not None:
            return record
        return Record(version.tags.get("run") or version.run_id, version.run_id, source="the version's tags")

    def manifests(self, name: str, key: str, run_id: str) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
        """The manifests of a step that can be had, by where they lie, and what is wrong with others."""
        texts = {}
        path = self.var / "store" / f"{name}-{key}" / MANIFEST
        if path.is_file():
            texts["the store"] = path.read_text(encoding="utf-8", errors="replace")
        if not self.local and _RUN_ID.match(run_id):
            text = tracking.read_artifact(self.client, run_id, MANIFEST)
            if text is not None:
                texts["MLflow"] = text
        sound, wrong = [], []
        for where, text in texts.items():
            manifest, problem = checked(text, name, key)
            if problem:
                wrong.append(f"the manifest of {name} in {where} {problem}")
            else:
                sound.append((where, manifest))
        if len(sound) == 2 and _result(sound[0][1]) != _result(sound[1][1]):
            wrong.append(f"the manifest of {name} in the store is not the one MLflow holds")
        return sound[::-1], wrong  # MLflow's first: it was sent away when the step was done

    def step_record(self, name: str, key: str, run_id: str) -> Record | None:
        """What was written down about a step while it ran."""
        if not self.local and _RUN_ID.match(run_id):
            return tracking.read_run(self.client, run_id)
        return tracking.record_of(self.var / "store" / f"{name}-{key}")

    def artifact(self, run: Record, name: str) -> str | None:
        """The text of a run's file, from its folder or from MLflow."""
        path = self.var / "runs" / run.name / name
        if path.is_file():
            return path.read_text(encoding="utf-8")
        return None if self.local or not run.run_id else tracking.read_artifact(self.client, run.run_id, name)


def checked(text: str, kind: str, key: str) -> tuple[dict[str, Any], str]:
    """A manifest, and what is wrong with it: it must be of that step and that key, and its digest that of its files."""
    try:
        manifest = dict(json.loads(text))
        files, digest = dict(manifest["files"]), manifest["digest"]
        inputs, facts = dict(manifest["inputs"]), dict(manifest["facts"])
    except (ValueError, TypeError, KeyError) as error:
        return {}, f"cannot be read ({type(error).__name__}: {error})"
    if manifest.get("kind") != kind or manifest.get("key") != key:
        return {}, f"is of {manifest.get('kind')} {manifest.get('key')}, not of {kind} {key}"
    if digest_json(files) != digest:
        return {}, "has been changed: its digest is not that of the files it lists"
    return {**manifest, "inputs": inputs, "facts": facts}, ""


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


def _result(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name not in COSTS}
