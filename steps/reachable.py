"""Which finished artifacts of the store something still needs, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from steps.artifact import MANIFEST, Artifact, digest_json, open_artifact
from steps.dead_runs import is_folder
from steps.errors import PrefloopError
from steps.registry import Version, adapter_digest_of
from steps.run import PARTIAL, StepSpec
from steps.step_tags import STEP, step_names, step_tag

SPEC = "spec.json"


@dataclass
class Shelf:
    """The finished artifacts of a store.

    Attributes:
        whole: by name.
        broken: name → what is wrong. Nothing a broken artifact says is believed.
        links: names that are links; never followed.
    """

    whole: dict[str, Artifact] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, store: Path) -> Shelf:
        """What lies in a store; bytes of files are not looked at."""
        shelf = cls()
        for path in sorted(store.iterdir()):
            if path.name.startswith(".") or (path.name.endswith(PARTIAL) and is_folder(path)):
                continue
            if path.is_symlink():
                shelf.links.append(path.name)
            elif path.is_dir():
                try:
                    shelf.whole[path.name] = _checked(path)
                except (PrefloopError, OSError, TypeError, AttributeError) as error:
                    shelf.broken[path.name] = getattr(error, "have", "") or str(error)
        return shelf

    def inputs_of(self, folder: Path) -> set[str]:
        """Names of the artifacts that the step in a folder reads, by its spec and its manifest."""
        names: set[str] = set()
        spec = read_spec(folder)
        for given in spec.inputs.values() if spec else ():
            at = self.whole.get(given.path.name)
            names |= {given.path.name} if at and at.digest == given.digest else self.with_digest(given.digest)
        artifact = self.whole.get(folder.name)
        if artifact and artifact.path == folder:
            for digest in artifact.inputs.values():
                if not any(self.whole[name].digest == digest for name in names):
                    names |= self.with_digest(digest)
        return names

    def with_digest(self, digest: str | None) -> set[str]:
        """Every artifact of those bytes."""
        return {name for name, artifact in self.whole.items() if artifact.digest == digest}

    def of_version(self, version: Version) -> set[str]:
        """What a registered version was made of and judged by, as far as it is here."""
        tags = version.tags
        names = {f"{name}-{tags[STEP + name]}" for name in step_names(tags)}
        names |= {f"evaluate-{tags.get('evaluation')}"} | self.with_digest(tags.get("base_digest"))
        policies = {name: artifact for name, artifact in self.whole.items() if artifact.kind == "policy"}
        names |= {name for name, one in policies.items() if adapter_digest_of(one.files) == tags.get("policy_digest")}
        return names

    def needed(self, roots: Mapping[str, str], folders: Iterable[tuple[Path, str]]) -> dict[str, str]:
        """Everything that roots need, directly or not, each with why.

        Args:
            roots: name → why.
            folders: steps whose inputs are needed, each with why, wherever they lie.
        """
        pending = list(roots.items()) + [(name, why) for folder, why in folders for name in self.inputs_of(folder)]
        found: dict[str, str] = {}
        while pending:
            name, why = pending.pop(0)
            artifact = self.whole.get(name)
            if name in found or artifact is None:
                continue
            found[name] = why
            pending += [(further, why) for further in sorted(self.inputs_of(artifact.path))]
        return found


def read_spec(folder: Path) -> StepSpec | None:
    """The spec in a step's folder, or None where there is none that can be read."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return StepSpec.from_json(json.loads((folder / SPEC).read_text(encoding="utf-8")))
    return None


def keys_of(tags: Mapping[str, str]) -> Iterator[str]:
    """Names of the artifacts a run says it made or reused."""
    for name in step_names(tags):
        if said := step_tag(tags, name):
            yield f"{name}-{said.key}"


def _checked(folder: Path) -> Artifact:
    """An artifact whose manifest agrees with itself, with its place and with its spec.

    Raises:
        PrefloopError: it does not.
    """
    artifact = open_artifact(folder)
    if artifact is None:
        raise PrefloopError("no artifact", have=f"it has no {MANIFEST}")
    if f"{artifact.kind}-{artifact.key}" != folder.name:
        raise PrefloopError("tampered", have=f"its manifest is that of {artifact.kind}-{artifact.key}")
    if digest_json(artifact.files) != artifact.digest:
        raise PrefloopError("tampered", have="its manifest's digest is not that of its files")
    spec = read_spec(folder)
    if spec is not None and {name: given.digest for name, given in spec.inputs.items()} != dict(artifact.inputs):
        raise PrefloopError("tampered", have="its manifest and its spec name different inputs")
    return artifact
