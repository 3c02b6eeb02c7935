"""The model registry: versions in MLflow, `champion` on the one in use, `challenger` on one the gate kept back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.artifact import digest_file, digest_json, payload
from steps.errors import EnvironmentProblem, PrefloopError

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, CHALLENGER = "champion", "challenger"


@dataclass(frozen=True)
class Version:
    """A registered model version.

    Attributes:
        tags: `policy_digest`, `base_digest`, `base`, `data`, `data_digest`, `run` and the verdict among them.
    """

    name: str
    version: str
    run_id: str
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def champion(client: MlflowClient, name: str) -> Version | None:
    """The version in use, or None while there is none.

    Raises:
        EnvironmentProblem: the registry cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise EnvironmentProblem(
            "the model registry cannot be reached",
            where=str(client.tracking_uri),
            have=str(error).splitlines()[0],
            then="start it (or unset MLFLOW_TRACKING_URI), then run again: finished steps are reused",
        ) from error
    return Version(name, str(found.version), str(found.run_id), dict(found.tags))


def register(
    client: MlflowClient,
    name: str,
    run_id: str,
    artifact_path: str,
    tags: Mapping[str, Any],
    *,
    promote: bool,
    description: str,
) -> Version:
    """Register a run's model, once for each policy and evaluation, and set its alias.

    Args:
        artifact_path: where the model lies among the run's artifacts.
        tags: must hold `verdict`, and `policy_digest` and `evaluation`, which say whether this was registered before.
        description: Markdown; the model card.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Tuned by prefloop.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    alias = CHAMPION if promote else CHALLENGER
    for known in client.search_model_versions(f"name='{name}'"):
        if all(known.tags.get(tag) == str(tags[tag]) for tag in ("policy_digest", "evaluation")):
            version = known
            client.set_model_version_tag(name, known.version, "verdict", str(tags["verdict"]))
            break
    else:
        source = f"{client.get_run(run_id).info.artifact_uri}/{artifact_path}"
        version = client.create_model_version(
            name, source, run_id, tags={k: str(v) for k, v in tags.items()}, description=description
        )
    if promote and str(version.version) == _holder(client, name, CHALLENGER):
        client.delete_registered_model_alias(name, CHALLENGER)
    if promote or str(version.version) != _holder(client, name, CHAMPION):
        client.set_registered_model_alias(name, alias, version.version)
    return Version(name, str(version.version), str(version.run_id), dict(version.tags))


def _holder(client: MlflowClient, name: str, alias: str) -> str | None:
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)


def fetch_adapter(client: MlflowClient, version: Version, into: Path) -> Path:
    """A version's adapter as `into/adapter`, checked against the digest it was registered with.

    Raises:
        PrefloopError: what the registry holds is not what was registered.
    """
    folder = into / f"{version.name}-{version.version}"
    if not (folder / "adapter").is_dir():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fetched = Path(client.download_artifacts(version.run_id, "model/adapter", str(partial)))
        folder.mkdir(exist_ok=True)
        fetched.rename(folder / "adapter")
        shutil.rmtree(partial)
    if adapter_digest(folder) != version.tags.get("policy_digest"):
        raise PrefloopError(
            "the champion's adapter is not the one that was registered",
            where=version.uri,
            have=f"digest {adapter_digest(folder)}, registered {version.tags.get('policy_digest')}",
            then=f"remove {folder} to fetch it again",
        )
    return folder


def adapter_digest(folder: Path) -> str:
    """The digest a policy's artifact has: over the names and bytes of its files."""
    return digest_json({name: digest_file(path) for name, path in payload(folder).items()})
