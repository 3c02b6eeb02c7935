"""What saw a row: versions of the data, tables, steps and models. For whoever is asked to delete it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from steps import registry, tracking
from steps.datasets import read_table
from steps.errors import DataError, PrefloopError
from steps.evidence import Evidence
from steps.rankings import whole_groups
from steps.registry import Version
from steps.report import plain, plain_table
from steps.sightings import (
    NO_COMMIT,
    Sighting,
    Tables,
    find_rows,
    history_of,
    places_of,
    versions_with,
    where_forgotten,
)
from steps.step_tags import STEP, step_names, step_tag
from steps.tracking import Forwarder, Record

SCHEMA = "prefloop.rows/1"
TRAINED, ASKED, FITTED, MEASURED = "trained on", "asked in training", "judge fitted on", "measured on"
UNUSED, UNCLEAR = "in the table it read, not used", "in the table it read"
GRADES = ("no", "maybe", "yes")
LEARNS = (TRAINED, ASKED, UNCLEAR)  # what may leave a trace in weights
HINDSIGHT = "chain_of_hindsight"
PAIRED = ("reward", "dpo", "relative", HINDSIGHT)
ON_POLICY = ("ppo", "groups", "rloo", "grpo", "spo")  # the last three of runs made before they shared a section


@dataclass(frozen=True)
class StepSaw:
    """A step that read a table with some of the rows.

    Attributes:
        uses: what became of the rows, such as `trained on` → how many of them.
        rows: row ids by use.
    """

    step: str
    key: str
    run_id: str
    table: str
    md5: str
    uses: dict[str, int]
    rows: dict[str, list[str]]


@dataclass(frozen=True)
class ModelSaw:
    """A model version some step behind which read the rows.

    Attributes:
        learnt: whether its weights may hold something of the rows: `yes`, `maybe`, or `no` where they were only
            measured with.
        because: what its steps did with the rows, in words.
    """

    model: str
    aliases: list[str]
    run_id: str
    learnt: str
    because: list[str]


@dataclass(frozen=True)
class RowLineage:
    """Everything that saw some rows.

    Attributes:
        asked: the row ids, or the file.
        rows: row id → places (dataset, file, line, part) it was read from.
        versions: dataset → (version digest, revision) of every version that holds one of them.
        unknown: what could not be looked at, and why.
    """

    asked: list[str]
    rows: dict[str, list[dict[str, Any]]]
    versions: dict[str, list[tuple[str, str]]]
    sightings: list[Sighting]
    steps: list[StepSaw]
    models: list[ModelSaw]
    unknown: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As docs/lineage.md describes it."""
        return {"schema": SCHEMA, **asdict(self)}


def trace(root: Path, forwarder: Forwarder, *, rows: Sequence[str] = (), file: str | None = None) -> RowLineage:
    """Look for rows in every version of every dataset that git's history or a run names, and for what read those.

    Args:
        rows: row ids.
        file: a batch file instead, by its name in `data/NAME/source`; all of its rows are looked for.

    Raises:
        DataError: no version that can be had holds such a row or file.
    """
    unknown: list[str] = []
    history = history_of(root)
    runs, problem = _runs(forwarder)
    if problem:
        unknown.append(problem)
    with tempfile.TemporaryDirectory() as scratch:
        tables = Tables(history, root, Path(scratch))
        tables.add_what_runs_read(runs)
        places = places_of(tables, rows, file)
        sightings = list(find_rows(tables, {*places, *rows}))
        if not (places or sightings):
            raise DataError(
                "no version of the data holds such a row" if file is None else f"no version of the data read '{file}'",
                where=str(root / "dvc.lock"),
                have=file or ", ".join(rows[:5]),
                then=where_forgotten(root, rows)
                or next(iter(tables.missing()), "ids stand in the column row_id of the tables"),
            )
        steps = [saw for record in runs for saw in _step_saw(record, sightings, tables)]
        unknown += [*tables.missing(), *_unreadable_tables(runs, tables)]
    models = _models(steps, Evidence(root, forwarder), unknown) if not problem else []
    held = {(one.dataset, one.md5) for one in sightings}
    return RowLineage(
        asked=[file] if file else list(rows),
        rows=places,
        versions=versions_with(history, held),
        sightings=sightings,
        steps=steps,
        models=models,
        unknown=unknown,
    )


# -- steps -------------------------------------------------------------------------------------------------------


def _runs(forwarder: Forwarder) -> tuple[list[Record], str]:
    """Every step MLflow knows, or why they cannot be had."""
    try:
        return tracking.find_runs(forwarder.client, "tags.`prefloop.step` != ''"), ""
    except PrefloopError as error:
        return [], f"{error.what} ({error.where}), so which runs and models read these tables is not known"


def _step_saw(record: Record, sightings: Sequence[Sighting], tables: Tables) -> Iterator[StepSaw]:
    step, key = record.tags["prefloop.step"], record.tags.get("prefloop.key", "")
    read_here = {str(given["md5"]) for given in record.datasets}
    for seen in sightings:
        if seen.md5 not in read_here:
            continue
        path = tables.path(seen.dataset, seen.table, seen.md5)
        assert path is not None
        uses = used(step, seen.table, read_table(path), record.params)
        rows: dict[str, list[str]] = {}
        for row, lines in seen.rows.items():
            for use in sorted({uses[line] for line in lines}):
                rows.setdefault(use, []).append(row)
        if len(rows) > 1 and UNUSED in rows:
            elsewhere = {row for use, ids in rows.items() if use != UNUSED for row in ids}
            rows[UNUSED] = [row for row in rows[UNUSED] if row not in elsewhere]
            rows = {use: ids for use, ids in rows.items() if ids}
        counts = {use: len(ids) for use, ids in rows.items()}
        yield StepSaw(step, key, record.run_id, f"{seen.dataset}/{seen.table}", seen.md5, counts, rows)


def used(step: str, table: str, frame: pd.DataFrame, params: Mapping[str, str]) -> list[str]:
    """What a step did with each line of a table, as its settings decide it.

    The same choices as `steps.sft`, `steps.pairs`, `steps.baseline` and `steps.evaluate` make, said again without the
    libraries those need; a test holds the two against each other.

    Args:
        params: the step's, as they were logged: `sft.rows`, `dpo.min_margin` and so on.
    """
    settings = _Settings(params)
    lines = pd.Series(UNUSED, index=range(len(frame)))
    if step == "sft" and table == "demonstrations":
        lines[: settings.whole("sft.rows", len(frame))] = TRAINED
    elif table == "preferences" and "relative.loss.candidates" in params:  # learns from its own answers
        lines[(frame["part"] == "train").to_numpy()] = ASKED
        lines[_first_held_out(frame, settings.whole("relative.held_out"), even=True)] = MEASURED
    elif table == "preferences" and params.get("reward.loss", "bradley_terry") != "bradley_terry":
        fitting = frame[_training(frame, "reward", settings, count=len(frame))]
        lines[whole_groups(fitting, settings.whole("reward.pairs")).index] = TRAINED
        held_out = frame[frame["part"] == "held_out"]
        lines[whole_groups(held_out, settings.whole("reward.held_out")).index] = MEASURED
    elif table == "preferences" and (section := settings.section(PAIRED)):
        lines[_training(frame, section, settings)] = TRAINED
        lines[_first_held_out(frame, settings.whole(f"{section}.held_out"), even=True)] = MEASURED
    elif table == "preferences" and (section := settings.section(ON_POLICY)):
        lines[(frame["part"] == "train").to_numpy()] = ASKED
        lines[_first_held_out(frame, settings.whole(f"{section}.held_out"), even=False)] = MEASURED
    elif table == "demonstrations" and settings.section(ON_POLICY):
        if settings.number("ppo.ptx_coefficient", 1.0) > 0:
            lines[:] = TRAINED
    elif table == "demonstrations" and settings.section((HINDSIGHT,)):
        if settings.number(f"{HINDSIGHT}.sft_coefficient", 0.0) > 0:
            lines[:] = TRAINED
    elif step in ("baseline", "evaluate") and table == "prompts":
        asked = settings.whole("evaluate.prompts", settings.whole("sampling.prompts"))
        lines[:asked] = MEASURED
    elif step == "evaluate" and table == "demonstrations":
        pass  # only held against the probes
    elif step == "evaluate" and table == "gold":
        lines[:] = FITTED
    elif step == "evaluate" and table == "preferences":
        lines[(frame["part"] == "held_out").to_numpy()] = MEASURED
    else:
        lines[:] = UNCLEAR
    return lines.tolist()


@dataclass(frozen=True)
class _Settings:
    params: Mapping[str, str]

    def section(self, names: Iterable[str]) -> str | None:
        return next((name for name in names if any(param.startswith(f"{name}.") for param in self.params)), None)

    def number(self, name: str, otherwise: float) -> float:
        said = self.params.get(name, "None")
        return otherwise if said == "None" else float(said)

    def whole(self, name: str, otherwise: int | None = None) -> int | None:
        said = self.params.get(name, "None")
        return otherwise if said == "None" else int(said)


def _training(frame: pd.DataFrame, section: str, settings: _Settings, count: int | None = None) -> Any:
    """(n,) whether `pairs.training_and_held_out` trains on a line; on so many of them, else as many as it is set to."""
    length = frame[["chosen", "rejected"]].map(len).max(axis=1)
    fit = (frame["part"] == "train") & ~(frame["margin"] < settings.number(f"{section}.min_margin", 0.0))
    if (limit := settings.whole(f"{section}.max_chars")) is not None:
        fit &= length <= limit
    count = settings.whole(f"{section}.pairs") if count is None else count
    return (fit & (fit.cumsum() <= (len(frame) if count is None else count))).to_numpy()


def _first_held_out(frame: pd.DataFrame, count: int | None, *, even: bool) -> Any:
    """(n,) whether a line is one of the first held-out pairs; cut to full batches of 32 where a trainer wants that."""
    held = frame["part"] == "held_out"
    count = min(count if count is not None else len(frame), int(held.sum()))
    if even and count:
        count = count // min(count, 32) * min(count, 32)
    return (held & (held.cumsum() <= count)).to_numpy()


def _unreadable_tables(runs: Sequence[Record], tables: Tables) -> list[str]:
    """Steps that read a table that no revision names and DVC's cache has not: nobody can look into it."""
    known = {md5 for (name, table, md5), at in tables.of.items() if at != [NO_COMMIT] or tables.path(name, table, md5)}
    lost = {
        (given["name"], given["md5"], record.tags["prefloop.step"], record.tags.get("prefloop.key", ""))
        for record in runs
        for given in record.datasets
        if given["md5"] not in known
    }
    return [
        f"{step} {key} read {name} (md5 {md5}), which no dvc.lock in git names, so whether it saw the rows is not known"
        for name, md5, step, key in sorted(lost)
    ]


# -- models ------------------------------------------------------------------------------------------------------


def _models(steps: Sequence[StepSaw], evidence: Evidence, unknown: list[str]) -> list[ModelSaw]:
    """Model versions behind which one of the steps stands, also by way of an earlier model they began at."""
    saw: dict[tuple[str, str], list[StepSaw]] = {}
    for step in steps:
        saw.setdefault((step.step, step.key), []).append(step)
    known = registry.every_version(evidence.client)
    made_of = {version.uri: _made_of(version, evidence, unknown) for version in known}
    learnt: dict[str, tuple[str, list[str]]] = {}  # policy digest → how, why
    found: dict[str, ModelSaw] = {}
    for version in sorted(known, key=_number):  # an earlier model first: a later one may begin at it
        reasons, grade = [], "no"
        weights, starts = made_of[version.uri]
        for name in sorted(step_names(version.tags)):
            for step in saw.get((name, version.tags[STEP + name]), []):
                said = _uses(step)
                reasons.append(f"{name} {step.key[:12]}, {step.table}: {said}")
                if name in weights:
                    grade = max(grade, _grade(step), key=GRADES.index)
        for start in starts:
            if start in learnt:
                grade = max(grade, learnt[start][0], key=GRADES.index)
                reasons.append(f"began at an earlier model that saw them ({learnt[start][1][0]})")
        if reasons:
            found[version.uri] = ModelSaw(
                version.uri, registry.aliases_of(evidence.client, version), version.run_id, grade, reasons
            )
            if grade != "no":
                learnt[version.tags.get("policy_digest", "")] = (grade, [version.uri])
    return list(found.values())


def _number(version: Version) -> tuple[str, int]:
    return version.name, int(version.version)


def _grade(step: StepSaw) -> str:
    if TRAINED in step.uses:
        return "yes"
    return "maybe" if set(step.uses) & set(LEARNS) else "no"


def _made_of(version: Version, evidence: Evidence, unknown: list[str]) -> tuple[set[str], set[str]]:
    """(steps whose work is in a version's weights, digests of models it began at), by the manifests.

    Where a manifest is gone, every training step counts: to train once too often is the lesser harm.
    """
    run = tracking.read_run(evidence.client, version.run_id)
    digests: dict[str, str] = {}
    inputs: dict[str, Mapping[str, str]] = {}
    for name in step_names(version.tags):
        said = step_tag(run.tags, name) if run else None
        manifests, _ = evidence.manifests(name, version.tags[STEP + name], said.run_id if said else "")
        if manifests:
            digests[manifests[0][1]["digest"]] = name
            inputs[name] = manifests[0][1]["inputs"]
    weights, pending = {"policy"}, ["policy"]
    starts: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in inputs:
            if STEP + name in version.tags:
                unknown.append(f"{version.uri}: the manifest of {name} is gone, so every training step counts")
            return {"sft", "reward", "policy"}, starts
        for digest in inputs[name].values():
            further = digests.get(digest)
            if further is None:
                starts.add(digest)
            elif further not in weights:
                weights.add(further)
                pending.append(further)
    return weights, starts


# -- in words ----------------------------------------------------------------------------------------------------


def print_rows(out: Console, found: RowLineage) -> None:
    """Where the rows stand, who read them, and which models may hold something of them."""
    out.print(f"[bold]{len(found.rows):,} {'row' if len(found.rows) == 1 else 'rows'}[/]", highlight=False)
    for row, places in list(found.rows.items())[:5]:
        said = "; ".join(f"{p['dataset']}, {p['file']} line {p['line']}" for p in places[:3])
        out.print(f"  {plain(row)}  {plain(said)}", highlight=False)
    if len(found.rows) > 5:
        out.print(f"  … and {len(found.rows) - 5:,} more", highlight=False)
    out.print()
    listed = plain_table("dataset", "table", "rows", "md5", "found by", "in the versions of", right=("rows",))
    for seen in found.sightings:
        at = [revision[:12] for revision in seen.revisions]
        more = f" and {len(at) - 2} more" if len(at) > 2 else ""
        listed.add_row(
            seen.dataset, seen.table, f"{len(seen.rows):,}", seen.md5[:12], seen.by, ", ".join(at[:2]) + more
        )
    out.print(listed if found.sightings else "no table holds them: they were only ever read")
    out.print()
    steps = plain_table("step", "key", "read", "what became of the rows", "MLflow run")
    for step in found.steps:
        uses = _uses(step)
        steps.add_row(step.step, step.key[:12], plain(step.table), uses, step.run_id[:12])
    out.print(steps if found.steps else "no step that MLflow knows read such a table")
    out.print()
    models = plain_table("model", "alias", "learnt from them", "because")
    for model in found.models:
        style = {"yes": "bold red", "maybe": "yellow", "no": "green"}[model.learnt]
        models.add_row(
            plain(model.model),
            ", ".join(model.aliases),
            f"[{style}]{model.learnt}[/]",
            "\n".join(map(plain, model.because)),
        )
    out.print(models if found.models else "no model version stands on such a step")
    if found.unknown:
        out.print("\n[yellow]not known[/]", highlight=False)
        for sentence in dict.fromkeys(found.unknown):
            out.print(f"  {plain(sentence)}", highlight=False)


def _uses(step: StepSaw) -> str:
    """What became of the rows; how many of them, where it is not one."""
    many = sum(step.uses.values()) > 1
    return ", ".join(f"{count:,} {use}" if many else use for use, count in sorted(step.uses.items()))
