"""How two runs differ in data, recipe, code, packages and hardware, and what came of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from steps import changes, lineage, provenance, versions
from steps.data_lineage import WORK_TREE
from steps.errors import PrefloopError
from steps.evidence import Evidence
from steps.experiment import HEADLINES, PREFIX, flat
from steps.lineage import Lineage
from steps.report import plain, plain_table
from steps.tracking import Forwarder, Record

SCHEMA = "prefloop.diff/1"
EXAMPLES = 10  # of rows, files and packages that are named
HARDWARE = ("processor", "cores", "memory", "gpus", "system", "machine")

Two = list[Any]  # before and after; None where there is none


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    run: Record
    graph: Lineage
    recipe: dict[str, Any]
    packages: dict[str, str] | None


@dataclass(frozen=True)
class Difference:
    """Everything two runs differ in; what is the same is not listed.

    Attributes:
        runs: the two subjects.
        data: `version`, `tables` → md5s, and `rows`: came, went, changed, same, and the first ids of each, or
            `rows_unknown`: why they cannot be told.
        recipe: dotted path → values.
        code: `commits`, `states`, `files` changed between the commits (or `files_unknown`), and `steps` → digests.
        packages: name → versions; None where a run did not list them, then `libraries` tells what it wrote down.
        hardware: what → values.
        steps: step → keys, and which of its inputs differ.
        metrics: name → before, after, difference and intervals, of every headline, also those that are the same.
        unknown: what is not known of the two.
    """

    runs: Two
    data: dict[str, Any]
    recipe: dict[str, Two]
    code: dict[str, Any]
    packages: dict[str, Two] | None
    libraries: dict[str, Two]
    hardware: dict[str, Two]
    steps: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    unknown: list[str]

    def to_json(self) -> dict[str, Any]:
        """As docs/lineage.md describes it."""
        return {"schema": SCHEMA, **asdict(self)}


def compare(before: str, after: str, root: Path, forwarder: Forwarder) -> Difference:
    """Compare two runs, or the runs of two model versions.

    Args:
        before, after: as `lineage.trace` takes them.

    Raises:
        PrefloopError: there is no such run or version.
        EnvironmentProblem: the tracking server cannot be reached and is needed.
    """
    evidence = Evidence(root, forwarder)
    a, b = (_side(name, evidence) for name in (before, after))
    two = (a.graph.run, b.graph.run)
    return Difference(
        runs=[a.graph.subject, b.graph.subject],
        data=_data(a, b, root),
        recipe=_differing(a.recipe, b.recipe),
        code=_code(a, b),
        packages=None if a.packages is None or b.packages is None else _differing(a.packages, b.packages),
        libraries=_differing(*(_libraries(run) for run in two)),
        hardware=_differing(*({name: run[name] for name in HARDWARE} for run in two)),
        steps=_steps(a.graph, b.graph),
        metrics=_metrics(a, b),
        unknown=[f"{side.graph.subject}: {said}" for side in (a, b) for said in side.graph.unknown],
    )


def _side(name: str, evidence: Evidence) -> Side:
    run, version = evidence.subject(name)
    text = evidence.artifact(run, "recipe.yaml")
    recipe = flat(yaml.safe_load(text)) if text is not None else dict(run.params)
    installed = evidence.artifact(run, provenance.PACKAGES)
    packages = None if installed is None else dict(line.split("==", 1) for line in installed.split() if "==" in line)
    return Side(run, lineage.build(run, version, evidence), recipe, packages)


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Two]:
    names = sorted({*before, *after})
    return {name: [before.get(name), after.get(name)] for name in names if before.get(name) != after.get(name)}


def _libraries(run: Mapping[str, Any]) -> dict[str, str]:
    parts = (part.rpartition(" ") for part in (run["libraries"] or "").split(", ") if part)
    return {name: version for name, _, version in parts}


# -- data --------------------------------------------------------------------------------------------------------


def _data(a: Side, b: Side, root: Path) -> dict[str, Any]:
    first, second = a.graph.node("dataset"), b.graph.node("dataset")
    if first is None or second is None:
        return {"rows_unknown": "a run did not write down which data it read"}
    digests = [first.facts["digest"], second.facts["digest"]]
    if digests[0] == digests[1]:
        return {}
    tables = ({node.title: node.facts["md5"] for node in side.graph.nodes if node.kind == "table"} for side in (a, b))
    found: dict[str, Any] = {"version": digests, "tables": _differing(*tables)}
    names = {first.facts["name"], second.facts["name"]}
    if len(names) > 1:
        return {**found, "rows_unknown": f"they are two datasets, {' and '.join(sorted(names))}"}
    revisions = [node.facts["found_at"] for node in (first, second)]
    if None in revisions:
        return {**found, "rows_unknown": "no dvc.lock names one of the two versions any more"}
    try:
        return {**found, "rows": _rows(names.pop(), revisions, root)}
    except PrefloopError as error:
        return {**found, "rows_unknown": f"{error.what}: {error.where}"}


def _rows(name: str, revisions: list[str], root: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for side, revision in enumerate(revisions):
            folders.append(Path(scratch) / str(side))
            at = "" if revision == WORK_TREE else revision
            versions.fetch(name, root, at, folders[-1], ["valid.parquet", "quarantine.parquet"])
        found = changes.compare(*(changes.identities(folder) for folder in folders))
    counts = {kind: len(getattr(found, kind)) for kind in ("came", "went", "changed")}
    named = {
        "came": found.came["row_id"].head(EXAMPLES).tolist(),
        "went": found.went["row_id"].head(EXAMPLES).tolist(),
        "changed": found.changed[["row_id_before", "row_id_after"]].head(EXAMPLES).to_numpy().tolist(),
    }
    return {
        **counts,
        "same": found.same,
        "into_quarantine": found.into_quarantine,
        "out_of_quarantine": found.out_of_quarantine,
        "first": named,
    }


# -- code and steps ----------------------------------------------------------------------------------------------


def _code(a: Side, b: Side) -> dict[str, Any]:
    found: dict[str, Any] = {}
    runs = (a.graph.run, b.graph.run)
    commits = [str(run["code_commit"] or run["project_commit"] or "") for run in runs]
    states = [run["code_state"] for run in runs]
    if commits[0] != commits[1]:
        found["commits"] = commits
        heads = [commit.rstrip("+") for commit in commits]
        listed = provenance.git(["diff", "--name-status", *heads, "--", *provenance.CODE], provenance.HERE)
        if listed is None:
            found["files_unknown"] = "git does not know both commits"
        else:
            found["files"] = [line.replace("\t", " ") for line in listed.decode(errors="replace").splitlines()]
    if states[0] != states[1] or commits[0] != commits[1]:
        found["states"] = states
    if steps := _differing(runs[0]["code"], runs[1]["code"]):
        found["steps"] = steps
    return found


def _steps(a: Lineage, b: Lineage) -> dict[str, dict[str, Any]]:
    nodes = [{node.title: node for node in graph.nodes if node.kind == "step"} for graph in (a, b)]
    found = {}
    for name in dict.fromkeys([*nodes[0], *nodes[1]]):
        pair = [side.get(name) for side in nodes]
        keys = [node.facts["key"] if node else None for node in pair]
        if keys[0] != keys[1]:
            inputs = [_inputs(graph, f"step.{name}") for graph in (a, b)]
            found[name] = {"keys": keys, "inputs": sorted(_differing(*inputs))}
    return found


def _inputs(graph: Lineage, id: str) -> dict[str, str]:
    """role → digest of what a step read."""
    return {role: str(node.facts.get("md5") or node.facts.get("digest")) for role, node in graph.made_from(id)}


# -- what came of it ---------------------------------------------------------------------------------------------


def _metrics(a: Side, b: Side) -> dict[str, dict[str, Any]]:
    found = {}
    for step, names in HEADLINES.items():
        for name in names:
            row = PREFIX.get(step, "") + name
            values = [side.run.metrics.get(row) for side in (a, b)]
            if values == [None, None]:
                continue
            difference = None if None in values else values[1] - values[0]  # type: ignore[operator]
            intervals = [_interval(side, step, name) for side in (a, b)]
            found[row] = {"before": values[0], "after": values[1], "difference": difference, "intervals": intervals}
    return {name: one for name, one in found.items() if not name.endswith(("_low", "_high"))}


def _interval(side: Side, step: str, name: str) -> list[float] | None:
    node = side.graph.node(f"step.{step}")
    facts = {**side.run.metrics, **(node.facts["facts"] if node else {})}
    bounds = [facts.get(f"{name}_{end}") for end in ("low", "high")]
    return None if None in bounds else bounds  # type: ignore[return-value]


# -- in words ----------------------------------------------------------------------------------------------------


def print_difference(out: Console, found: Difference) -> None:
    """Part by part; a part in which the two are the same is one line."""
    out.print(f"[bold]{plain(found.runs[0])} → {plain(found.runs[1])}[/]", highlight=False)
    _print_data(out, found.data)
    _print_values(out, "recipe", found.recipe)
    _print_code(out, found.code)
    if found.packages is None:
        _print_values(out, "packages (those written down)", found.libraries)
    else:
        _print_values(out, "packages", found.packages)
    _print_values(out, "hardware", found.hardware)
    _print_steps(out, found.steps)
    _print_metrics(out, found.metrics)
    if found.unknown:
        out.print("\n[yellow]not known[/]", highlight=False)
        for sentence in found.unknown:
            out.print(f"  {plain(sentence)}", highlight=False)


def _print_data(out: Console, data: Mapping[str, Any]) -> None:
    if not data:
        _same(out, "data")
        return
    out.print("\n[bold]data[/]", highlight=False)
    if version := data.get("version"):
        out.print(f"  version {version[0][:12]} → {version[1][:12]}", highlight=False)
    for table, md5s in data.get("tables", {}).items():
        said = " → ".join("none" if md5 is None else md5[:12] for md5 in md5s)
        out.print(f"  {plain(table)} {said}", highlight=False)
    if rows := data.get("rows"):
        kinds = ("came", "went", "changed", "same", "into_quarantine", "out_of_quarantine")
        said = ", ".join(f"{rows[kind]:,} {kind.replace('_', ' ')}" for kind in kinds if rows[kind] or kind == "same")
        out.print(f"  rows: {said}", highlight=False)
        for kind, ids in rows["first"].items():
            if ids:
                named = ", ".join(one if isinstance(one, str) else " → ".join(one) for one in ids[:4])
                out.print(f"  {kind}: {plain(named)}{', …' if rows[kind] > 4 else ''}", highlight=False, style="dim")
    elif "rows_unknown" in data:
        out.print(f"  rows: not known, for {plain(data['rows_unknown'])}", highlight=False)


def _print_values(out: Console, title: str, values: Mapping[str, Two]) -> None:
    if not values:
        _same(out, title)
        return
    out.print(f"\n[bold]{title}[/]", highlight=False)
    table = plain_table("", "before", "after")
    for name, (before, after) in values.items():
        table.add_row(plain(name), *("none" if one is None else plain(str(one)) for one in (before, after)))
    table.show_header = False
    out.print(table)


def _print_code(out: Console, code: Mapping[str, Any]) -> None:
    if not code:
        _same(out, "code")
        return
    out.print("\n[bold]code[/]", highlight=False)
    if commits := code.get("commits"):
        out.print(f"  commit {' → '.join(commit[:12] or 'not known' for commit in commits)}", highlight=False)
    if states := code.get("states"):
        out.print(f"  {' → '.join(plain(state or 'clean or not: not known') for state in states)}", highlight=False)
    files = code.get("files", [])
    for line in files[:EXAMPLES]:
        out.print(f"  {plain(line)}", highlight=False)
    if len(files) > EXAMPLES:
        out.print(f"  … and {len(files) - EXAMPLES:,} more files", highlight=False)
    if "files_unknown" in code:
        out.print(f"  changed files not known: {code['files_unknown']}", highlight=False)
    for step, digests in code.get("steps", {}).items():
        said = " → ".join(digest or "not known" for digest in digests)
        out.print(f"  code behind {plain(step)}: {said}", highlight=False)


def _print_steps(out: Console, steps: Mapping[str, Mapping[str, Any]]) -> None:
    if not steps:
        _same(out, "steps")
        return
    out.print("\n[bold]steps made anew[/]", highlight=False)
    table = plain_table("step", "key before", "after", "inputs that differ")
    for name, step in steps.items():
        table.add_row(plain(name), *(key or "none" for key in step["keys"]), plain(", ".join(step["inputs"])))
    out.print(table)


def _print_metrics(out: Console, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    if not metrics:
        return
    out.print("\n[bold]what came of it[/]", highlight=False)
    table = plain_table("metric", "before", "after", "difference")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, one in metrics.items():
        cells = [
            _value(one[end], interval) for end, interval in zip(("before", "after"), one["intervals"], strict=True)
        ]
        difference = one["difference"]
        table.add_row(plain(name), *cells, "" if difference is None else f"{difference:+.4g}")
    out.print(table)


def _value(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" + (escape(f" [{interval[0]:.3g}, {interval[1]:.3g}]") if interval else "")


def _same(out: Console, title: str) -> None:
    out.print(f"[bold]{title}[/] the same", highlight=False)
