"""Whether to train again: what the registry has seen, held against the data there are. Decides, and trains nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steps import datasets, drift, versions
from steps.artifact import digest_file, digest_json
from steps.config import Recipe
from steps.errors import PrefloopError
from steps.registry import ROLLED_BACK, Version
from steps.versions import DataVersion

VALID = "valid.parquet"
SHORT = 12  # characters of a digest that people read
Why = Literal["first", "new data", "new recipe", "forced", "nothing new", "kept back"]


@dataclass(frozen=True)
class Decision:
    """Whether to train, and why.

    Attributes:
        why: in a word or two.
        because: in a sentence, with what was held against what.
        champion: the version in use, if there is one.
    """

    why: Why
    because: str
    champion: Version | None

    @property
    def train(self) -> bool:
        return self.why not in ("nothing new", "kept back")


def decide(
    champion: Version | None,
    tried: Sequence[Version],
    data: DataVersion,
    recipe: str,
    *,
    new_recipe_counts: bool = False,
    force: bool = False,
) -> Decision:
    """Train when there is something that was not tried.

    What counts is the data. With `new_recipe_counts` a recipe that no version of these data was made with counts too:
    a registered version from before recipes were noted down counts as made with another one.

    Args:
        champion: the version in use.
        tried: every registered version, the oldest first; the champion among them.
        data: the dataset as it is now.
        recipe: digest of the recipe (`recipe_digest`).
        force: train whatever was tried.
    """
    now = f"{data.name} {data.digest[:SHORT]}"
    same = [version for version in tried if _saw(version, data)]
    if new_recipe_counts:
        same_recipe = [version for version in same if version.tags.get("recipe_digest") == recipe]
        if same and not same_recipe:
            return Decision("new recipe", f"the recipe is new to the data ({now})", champion)
        same = same_recipe
    if same and not force:
        if champion is not None and champion.version in {version.version for version in same}:
            return Decision("nothing new", f"nothing new since {champion.uri} (data {now})", champion)
        return Decision("kept back", f"already tried as {same[-1].uri} (data {now}), {_kept_back(same[-1])}", champion)
    if same:
        return Decision("forced", f"asked for, although {same[-1].uri} has seen the same data ({now})", champion)
    if champion is None:
        return Decision("first", f"there is no champion yet; data {now}", None)
    before = f"{champion.tags.get('data')} {str(champion.tags.get('data_digest'))[:SHORT]}"
    return Decision("new data", f"new data since {champion.uri}: {now}, it saw {before}", champion)


def _saw(version: Version, data: DataVersion) -> bool:
    return (version.tags.get("data"), version.tags.get("data_digest")) == (data.name, data.digest)


def _kept_back(version: Version) -> str:
    """Why a version is not the champion."""
    if reason := version.tags.get(ROLLED_BACK):
        return f"and taken down by people: {reason}"
    failed = [reason for reason in version.tags.get("verdict", "").split(" | ") if reason.startswith("NO: ")]
    if failed:
        return "and kept back because " + "; ".join(reason.removeprefix("NO: ") for reason in failed)
    return "and since replaced by another champion"


def recipe_digest(recipe: Recipe) -> str:
    """Over all of a recipe that can change a model or the verdict on it."""
    return digest_json({name: value for name, value in recipe.used().items() if name not in ("name", "launch")})


# -- what the new data are like ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """The data as they are now held against those of a model.

    Attributes:
        against: the model's address.
        findings: empty where too few rows were there to compare.
        problem: why nothing could be compared; empty when all went well.
    """

    against: str
    findings: list[drift.Finding]
    problem: str = ""

    @property
    def drifted(self) -> list[drift.Finding]:
        return [finding for finding in self.findings if finding.drifted]

    def in_words(self) -> str:
        """One line."""
        if self.problem:
            return f"not compared with the data of {self.against}: {self.problem}"
        if not self.findings:
            return f"too few rows to compare with the data of {self.against}"
        names = ", ".join(finding.what for finding in self.drifted)
        return f"drift since {self.against}: {names}" if names else f"no drift since {self.against}"

    def markdown(self) -> str:
        """The report: every comparison, those that drifted in bold."""
        lines = ["# Drift", "", self.in_words() + ".", ""]
        if self.findings:
            lines += ["| what | before | now | measure | effect | threshold | p |", "|---|---|---|---|---:|---:|---:|"]
        for finding in self.findings:
            name = f"**{finding.what}**" if finding.drifted else finding.what
            numbers = f"{finding.effect:.3f} | {finding.threshold:g} | {finding.p_value:.2g}"
            before, after = (text.replace("|", "\\|") for text in (finding.before, finding.after))
            lines.append(f"| {name} | {before} | {after} | {finding.measure} | {numbers} |")
        return "\n".join(lines) + "\n"


def drift_since(version: Version, data: DataVersion, root: Path) -> Drift:
    """Hold the rows added since against those a registered model was made from; says so where those cannot be had."""
    from steps.changes import read

    new = datasets.folder(data.name, root) / VALID
    if version.tags.get("data") != data.name:
        return Drift(version.uri, [], f"it was made from another dataset, {version.tags.get('data')}")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            before, now = (read(path, drift.COLUMNS) for path in (valid_rows(version, root, Path(scratch)), new))
            added = now[~now["row_id"].isin(before["row_id"])]
            return Drift(version.uri, drift.compare(before, added, sources=False))  # a new batch is a new source
        except (PrefloopError, OSError) as error:
            said = error.what if isinstance(error, PrefloopError) else str(error)
            return Drift(version.uri, [], said)


def valid_rows(version: Version, root: Path, scratch: Path) -> Path:
    """The table of valid rows a registered model's data were split from.

    Sought by its md5 in DVC's cache, where every version lies that was prepared here, committed or not; else at the
    git revision the model was made at.

    Raises:
        PrefloopError: it can be had from neither.
    """
    if md5 := version.tags.get("data_valid"):
        kept = root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
        if kept.is_file() and digest_file(kept, "md5") == md5:
            return kept
    name, revision = str(version.tags.get("data")), str(version.tags.get("data_revision")).removesuffix("+")
    digest = version.tags.get("data_digest")
    if revision in ("", "no git", "None") or versions.at(name, root, revision).digest != digest:
        raise PrefloopError(
            f"its data ({str(digest)[:SHORT]}) were never committed, and DVC's cache does not hold them",
            then=f"commit dvc.lock and data/{name} after `prefloop data add`, and `dvc push`",
        )
    return versions.fetch(name, root, revision, scratch, [VALID])[VALID]
