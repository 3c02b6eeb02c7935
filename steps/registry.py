"""The model registry: versions in MLflow, `champion` on the one in use, `challenger` on one the gate kept back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steps.artifact import digest_file, digest_json, payload
from steps.errors import EnvironmentProblem, PrefloopError, did_you_mean

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, CHALLENGER = "champion", "challenger"
WEIGHTS = "adapter/"  # where a policy's files are that are its weights
MET = "met"  # tag of a version: the champion it was judged against
AUDIT = "audit."  # tags of the registered model: one for each change of champion
ROLLED_BACK = "rolled_back"  # tag of a version that was champion and that people took down


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


def find(client: MlflowClient, name: str, which: str) -> Version:
    """A version by its number, or by the alias it has.

    Raises:
        PrefloopError: there is no such model, or no such version of it.
        EnvironmentProblem: the registry cannot be reached.
    """
    aliases, known = _aliases(client, name), _versions(client, name)
    number = aliases.get(which, which)
    for version in known:
        if version.version == number:
            return version
    options = [f"{name}@{alias}" for alias in sorted(aliases)] + [f"{name}/{version.version}" for version in known]
    raise PrefloopError(
        f"there is no version '{which}' of the model '{name}'",
        where=f"models:/{name}",
        have=f"known: {', '.join(options[:12])}" if options else "no version at all",
        then=f"`prefloop history {name}` shows how its champion changed",
    )


def versions_of(client: MlflowClient, name: str) -> list[Version]:
    """Every version of a model, the oldest first; none while there is no such model.

    Raises:
        EnvironmentProblem: the registry cannot be reached.
    """
    return _versions(client, name)


def met_by(client: MlflowClient, version: Version) -> Version | None:
    """The champion a version was judged against, if there was one and it is still there."""
    return next((one for one in _versions(client, version.name) if one.version == version.tags.get(MET)), None)


def aliases_of(client: MlflowClient, version: Version) -> list[str]:
    """The aliases a version has now."""
    return sorted(alias for alias, number in _aliases(client, version.name).items() if number == version.version)


def every_version(client: MlflowClient) -> list[Version]:
    """Every version of every model.

    Raises:
        EnvironmentProblem: the registry cannot be reached.
    """
    return [version for name in _names(client) for version in _versions(client, name)]


def _names(client: MlflowClient) -> list[str]:
    with _reached(client):
        return sorted(model.name for model in client.search_registered_models(max_results=1000))


def _versions(client: MlflowClient, name: str) -> list[Version]:
    """The versions of a model, the oldest first."""
    with _reached(client):
        found = client.search_model_versions(f"name='{name}'", max_results=10_000)
    versions = [Version(name, str(one.version), str(one.run_id), dict(one.tags)) for one in found]
    return sorted(versions, key=lambda version: int(version.version))


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    if name not in (known := _names(client)):
        raise PrefloopError(
            f"there is no model '{name}'",
            where=str(client.tracking_uri),
            have=did_you_mean(name, known) if known else "no model at all",
            then="`prefloop run` registers models",
        )
    with _reached(client):
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


@contextmanager
def _reached(client: MlflowClient) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise EnvironmentProblem(
            "the model registry cannot be reached",
            where=str(client.tracking_uri),
            have=str(error).splitlines()[0],
            then="start it, or unset MLFLOW_TRACKING_URI for the project's own file",
        ) from error


def kept(client: MlflowClient, newest: int) -> list[tuple[Version, str]]:
    """The versions of every model that are to be kept, each with why: its aliases, or `newest`.

    Args:
        newest: how many of a model's newest versions count, whatever their aliases.

    Raises:
        EnvironmentProblem: the registry cannot be reached.
    """
    found = []
    for name in _names(client):
        aliases, versions = _aliases(client, name), _versions(client, name)
        for place, version in enumerate(reversed(versions)):
            held = sorted(alias for alias, number in aliases.items() if number == version.version)
            if why := ", ".join(held) or ("newest" if place < newest else ""):
                found.append((version, why))
    return found


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

    A version that people took down stays down, whatever the gate says.

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
    number = str(version.version)
    if promote and ROLLED_BACK not in version.tags:
        _crown(client, name, number, "gate", str(tags["verdict"]))
    elif number != _holder(client, name, CHAMPION):
        client.set_registered_model_alias(name, CHALLENGER, number)
    return Version(name, number, str(version.run_id), dict(version.tags))


def promote(client: MlflowClient, name: str, version: str, because: str, who: str) -> None:
    """Make a version the champion by hand.

    Raises:
        PrefloopError: there is no such version.
    """
    known = {str(found.version) for found in client.search_model_versions(f"name='{name}'")}
    if version not in known:
        raise PrefloopError(
            f"there is no version {version} of '{name}'",
            where=f"models:/{name}",
            have=f"versions {', '.join(sorted(known, key=int))}" if known else "no model of that name",
            then=f"`prefloop history {name}` shows what there is" if known else "`prefloop run` registers models",
        )
    if ROLLED_BACK in client.get_model_version(name, version).tags:
        client.delete_model_version_tag(name, version, ROLLED_BACK)
    _crown(client, name, version, who, because)


def rollback(client: MlflowClient, name: str, because: str, who: str) -> str:
    """Make the champion before the present one champion again; its version.

    The gate does not promote the one that was taken down again; people may.

    Raises:
        PrefloopError: there was none.
    """
    now, changes = _holder(client, name, CHAMPION), history(client, name)
    raised = [change for change in changes if change["to"] == now and change["how"] == "promote"]
    before = raised[-1]["from"] if raised else None
    if now is None or before is None:
        raise PrefloopError(
            "there is no champion to go back to",
            where=f"models:/{name}",
            have=f"version {now} is the first one" if now else "no champion at all",
            then=f"`prefloop history {name}` shows what there was; `prefloop promote {name} VERSION` chooses one",
        )
    client.set_model_version_tag(name, now, ROLLED_BACK, because[:4000])
    _crown(client, name, before, who, because, how="rollback")
    return before


def history(client: MlflowClient, name: str) -> list[dict[str, Any]]:
    """Every change of champion, the oldest first: time, how (promote or rollback), who, from, to, because."""
    from mlflow.exceptions import MlflowException

    try:
        tags = client.get_registered_model(name).tags
    except MlflowException as error:
        raise PrefloopError(
            f"there is no model '{name}'", where="the registry", then="`prefloop run` registers models"
        ) from error
    return [json.loads(value) for tag, value in sorted(tags.items()) if tag.startswith(AUDIT)]


def _crown(client: MlflowClient, name: str, version: str, who: str, because: str, how: str = "promote") -> None:
    """Set the champion; the audit trail, kept as tags of the registered model, is written before it changes."""
    before = _holder(client, name, CHAMPION)
    if before != version:
        time = datetime.now(UTC)
        entry = {"time": time.isoformat(timespec="seconds"), "how": how, "who": who, "from": before, "to": version}
        record = json.dumps({**entry, "because": because[:4000]}, ensure_ascii=False)
        client.set_registered_model_tag(name, _next_change(client, name, time), record)
        client.set_registered_model_alias(name, CHAMPION, version)
    if version == _holder(client, name, CHALLENGER):
        client.delete_registered_model_alias(name, CHALLENGER)


def _next_change(client: MlflowClient, name: str, time: datetime) -> str:
    """A tag for a change of champion that sorts behind those before it, though the clock may have been put back."""
    last = max((tag for tag in client.get_registered_model(name).tags if tag.startswith(AUDIT)), default="")
    tag = f"{AUDIT}{time:%Y%m%dT%H%M%S%f}"
    return tag if tag > last else f"{last}."


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
    """Over the names and bytes of a policy's weights, whatever notes stand beside them."""
    files = {name: path for name, path in payload(folder).items() if name.startswith(WEIGHTS)}
    return adapter_digest_of({name: digest_file(path) for name, path in files.items()})


def adapter_digest_of(files: Mapping[str, str]) -> str:
    """The same, from the digests of a policy's files as its manifest has them."""
    return digest_json({name: digest for name, digest in files.items() if name.startswith(WEIGHTS)})
