"""What the `prefloop data` commands print: tables that fit 100 columns, in a terminal or a log file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from steps import batches, datasets, versions
from steps.batches import Addition, State
from steps.changes import Changes
from steps.drift import Finding
from steps.errors import DataError
from steps.report import plain, plain_table, printable

if TYPE_CHECKING:
    from steps.forget import Forgotten, Remains

WIDTH = 100  # of a log; a terminal has its own
EXAMPLES = 10
STYLES = {"quarantine": "yellow", "stop": "red", "warn": "cyan"}


def console() -> Console:
    """A console for results: a terminal's own width, or that of a log."""
    probe = Console(highlight=False)
    return probe if probe.is_terminal else Console(highlight=False, width=WIDTH)


def _cut(text: str, width: int) -> str:
    line = " ".join(printable(text).split())
    return escape(line if len(line) <= width else line[: width - 1] + "…")


# -- list, show --------------------------------------------------------------------------------------------------


def print_list(out: Console, root: Path) -> None:
    """Every dataset of the registry, and how it stands."""
    table = plain_table(
        "dataset", "format", "version", "rows", "quarantine", "pairs", "", right=("rows", "quarantine", "pairs")
    )
    for name in datasets.names(root):
        try:
            entry: Any = datasets.dataset(name, root).format
        except DataError as error:
            table.add_row(plain(name), "", "", "", "", "", plain(error.have.splitlines()[0]))
            continue
        try:
            version = versions.current(name, root)
        except DataError:
            table.add_row(name, entry, "", "", "", "", "not prepared")
            continue
        counts = [f"{version.counts.get(key, 0):,}" for key in ("read", "quarantined", "preferences")]
        table.add_row(name, entry, version.digest[:12], *counts, _standing(name, version, root))
    out.print(table)


def _standing(name: str, version: versions.DataVersion, root: Path) -> str:
    import yaml

    entries = yaml.safe_load((root / datasets.REGISTRY).read_text(encoding="utf-8"))["datasets"]
    if versions.settings(name, root) != entries[name]:
        return "its entry has changed since"
    if any(not table.path.is_file() for table in version.tables.values()):
        return "its tables are not here: dvc pull"
    return "prepared"


def print_version(out: Console, version: versions.DataVersion, root: Path, revision: str) -> None:
    """One version: what names it, its tables, counts and batches."""
    name = version.name
    facts = plain_table("", "")
    facts.add_row("dataset", name)
    facts.add_row("version", version.digest)
    facts.add_row("revision", version.revision or "no git")
    for key, value in _source(name, root, revision):
        facts.add_row(key, plain(value))
    facts.show_header = False
    out.print(facts)
    out.print()
    tables = plain_table("table", "rows", "md5", right=("rows",))
    rows = {**version.counts, "rows": version.counts.get("read"), "quarantine": version.counts.get("quarantined")}
    for file, md5 in versions.outputs(name, root, revision).items():
        if file.endswith(".parquet"):
            count = rows.get(file.removesuffix(".parquet"))
            tables.add_row(file, "" if count is None else f"{count:,}", md5)
    out.print(tables)
    if found := batches.records(name, root, revision):
        out.print()
        listed = plain_table("batch", "rows", "sha256", "added", "by", right=("rows",))
        for record in found:
            cells = [str(record.get(key, "")) for key in ("file", "rows", "sha256", "added", "by")]
            listed.add_row(*(plain(cell) for cell in [*cells[:2], cells[2][:16], *cells[3:]]))
        out.print(listed)


def _source(name: str, root: Path, revision: str) -> list[tuple[str, str]]:
    import yaml

    try:
        entry = yaml.safe_load(versions.text(datasets.REGISTRY, root, revision))["datasets"][name]
        source = entry["source"]
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return []
    found = [("format", str(entry.get("format", "")))]
    found += [("source", str(source[key])) for key in ("pypi", "hub") if source.get(key)]
    if gone := entry.get("forgotten"):
        found.append(("forgotten", f"{len(gone):,} rows, never to be in it"))
    files = source.get("files") or {}
    found += [(f"source {role}", str(file)) for role, file in list(files.items())[:20]]
    return found + ([("", f"… and {len(files) - 20} more")] if len(files) > 20 else [])


# -- report ------------------------------------------------------------------------------------------------------


def print_report(out: Console, name: str, root: Path, *, everything: bool) -> None:
    """What validation found, the rows in quarantine, and the dataset's statistics.

    Raises:
        DataError: the dataset has not been validated.
    """
    found = versions.metrics(name, root)
    counts, split = found["validation.json"], found["split.json"]
    if not counts:
        datasets.dataset(name, root)
        raise DataError(
            f"the dataset '{name}' has not been validated",
            where=str(datasets.folder(name, root) / "validation.json"),
            then=f"dvc repro split@{name}",
        )
    out.print(
        f"{name}: {counts['read']:,} rows read = {counts['valid']:,} valid + {counts['quarantined']:,} in quarantine"
    )
    out.print()
    _print_checks(out, counts)
    out.print()
    _print_statistics(out, counts, split)
    _print_left_out(out, {**counts, **split})
    bad = batches.quarantine(name, root)
    if bad:
        out.print()
        _print_quarantine(out, bad if everything else bad[:EXAMPLES])
        if not everything and len(bad) > EXAMPLES:
            out.print(f"… and {len(bad) - EXAMPLES:,} more: prefloop data report {name} --all", style="dim")
    if bad and batches.takes_files(datasets.dataset(name, root)):
        out.print()
        out.print(f"[dim]mend them[/]  prefloop data report {name} --export bad.jsonl", soft_wrap=True)
        out.print(f"[dim]then     [/]  prefloop data restore {name} bad.jsonl", soft_wrap=True)


def _print_checks(out: Console, counts: Mapping[str, Any]) -> None:
    table = plain_table("check", "severity", "rows", "for example", right=("rows",))
    checks = counts.get("checks", {})
    for check, found in sorted(checks.items(), key=lambda item: -item[1]["rows"]):
        if found["rows"]:
            examples = [plain(example) for example in counts.get("examples", {}).get(check, [])[:3]]
            severity = f"[{STYLES.get(found['severity'], 'none')}]{found['severity']}[/]"
            table.add_row(check, severity, f"{found['rows']:,}", "\n".join(examples))
    if table.rows:
        out.print(table)
    if clean := [check for check, found in checks.items() if not found["rows"]]:
        out.print(f"nothing found by {', '.join(clean)}", style="dim")


def _print_statistics(out: Console, counts: Mapping[str, Any], split: Mapping[str, Any]) -> None:
    statistics, bounds = counts.get("statistics", {}), counts.get("bounds", {})
    table = plain_table("statistic", "value", "", right=("value",))
    if "longer_chosen" in statistics:
        low, high = (statistics.get(f"longer_chosen_{end}", float("nan")) for end in ("low", "high"))
        bias = f"95 % interval {low:.1%} to {high:.1%}" + _over("length_bias", bounds)
        table.add_row("longer side chosen", f"{statistics['longer_chosen']:.1%}", bias)
    if "agreement" in split:
        ceiling = "how often a rater sides with the rest: the most a model of them can be right"
        table.add_row("agreement", f"{split['agreement']:.1%}", ceiling)
    if "annotators_agree" in statistics:
        again = f"of two annotators on {statistics['pairs_judged_again']:,.0f} pairs: a model of them can be right in "
        again += f"{statistics['annotators_ceiling']:.1%} at most"
        table.add_row("agreement", f"{statistics['annotators_agree']:.1%}", again)
    if statistics.get("pairs"):
        ties = statistics.get("ties", 0)
        share = ties / (statistics["pairs"] + ties)
        table.add_row("pairs", f"{statistics['pairs']:,.0f}", f"and {ties:,.0f} ties ({share:.1%})")
    if "prompts" in statistics:
        table.add_row("prompts", f"{statistics['prompts']:,.0f}", "")
    if "sources" in statistics:
        largest = f"the largest has {statistics['largest_source_share']:.1%} of the rows"
        table.add_row("sources", f"{statistics['sources']:,.0f}", largest + _over("source_imbalance", bounds))
    if "quarantined_share" in statistics:
        table.add_row("in quarantine", f"{statistics['quarantined_share']:.1%}", _over("quarantined", bounds).strip())
    if "latin_share" in statistics:
        table.add_row("latin letters", f"{statistics['latin_share']:.1%}", "")
    if "cut_share" in statistics:
        table.add_row("over max_chars", f"{statistics['cut_share']:.1%}", "of all characters")
    out.print(table)


def _over(bound: str, bounds: Mapping[str, Any]) -> str:
    found = bounds.get(bound)
    return "" if not found or found["kept"] else f"; [cyan]over {found['limit']:.0%}[/]"


def _print_quarantine(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        part = f" ({row['part'] + 1})" if row.get("part") else ""
        out.print(f"{plain(row['file'] or '')} line {row['line']}{part}  [yellow]{plain('; '.join(row['reasons']))}[/]")
        out.print(f"  {_cut(row.get('raw') or '', out.width - 2)}", style="dim")


# -- add, restore ------------------------------------------------------------------------------------------------


def print_addition(out: Console, added: Addition) -> None:
    """What an addition changed, and what to do next."""
    for file in added.already:
        out.print(f"{plain(file)} is there already, with the same bytes")
    if not added.records and added.before.tables == added.after.tables:
        out.print("nothing has changed")
        return
    for record in added.records:
        out.print(f"{plain(record['file'])}: {record['rows']:,} rows, {record['bytes']:,} bytes")
    if added.repeated:
        out.print(f"{added.repeated:,} of them were there already, and went to quarantine as repeats")
    if added.forgotten:
        out.print(
            f"records that stay out, for they are to be forgotten: {added.forgotten:,}; the files still hold them"
        )
    out.print()
    _print_counts(out, added.before, added.after)
    _print_lock(out, added.before.tables, added.after.tables)
    print_drift(out, added.drift, "the new rows", "those before")
    out.print()
    if added.after.counts.get("quarantined", 0) > added.before.counts.get("quarantined", 0):
        out.print(f"[dim]why not[/]  prefloop data report {added.name}", soft_wrap=True)
    out.print("[dim]keep it[/]  git add " + escape(" ".join(map(_shell, added.paths))), soft_wrap=True)
    rows = sum(record["rows"] for record in added.records)
    out.print(f"         git commit -m {_shell(f'{added.name}: {rows:,} rows more')}", soft_wrap=True)
    out.print("         dvc push")


def _shell(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _print_counts(out: Console, before: State, after: State) -> None:
    table = plain_table("", "before", "after", "", right=("before", "after"))

    def row(label: str, old: int, new: int) -> None:
        table.add_row(label, f"{old:,}", f"{new:,}", f"{new - old:+,}" if new != old else "[dim]=[/]")

    labels = {"read": "rows read", "valid": "valid", "quarantined": "in quarantine"}
    for key, label in labels.items():
        row(label, before.counts.get(key, 0), after.counts.get(key, 0))
    for check, rows in after.checks.items():
        if rows != before.checks.get(check, 0):
            row(f"  {check}", before.checks.get(check, 0), rows)
    for key in ("demonstrations", "preferences", "prompts", "gold"):
        row(key, before.counts.get(key, 0), after.counts.get(key, 0))
    out.print(table)
    _print_left_out(out, after.counts)


def _print_left_out(out: Console, counts: Mapping[str, Any]) -> None:
    """What the split could not use, where that is worth a word."""
    if left_out := counts.get("pairs_left_out"):
        out.print(
            f"{left_out:,} pairs are in no table, for an answer of theirs stands in another part of the split too"
        )
    for table, use in (("preferences", "train on"), ("prompts", "evaluate with")):
        if counts.get("valid") and counts.get(table) == 0:
            out.print(f"[yellow]warn[/]     {table}: none, so there is nothing to {use}")


def _print_lock(out: Console, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    changed = [file for file in after if before.get(file) != after[file]]
    if not changed:
        return
    out.print()
    table = plain_table("dvc.lock", "md5 before", "md5 after")
    for file in changed:
        table.add_row(file, before.get(file, "")[:12] or "new", after[file][:12])
    out.print(table)
    out.print(f" {len(changed)} of {len(after)} files changed", style="dim")


def print_drift(out: Console, findings: Sequence[Finding], new: str, old: str) -> None:
    """Findings of the drift check; those that count first, as warnings."""
    if not findings:
        return
    moved = [finding for finding in findings if finding.drifted]
    out.print()
    if not moved:
        out.print(f"no drift: {new} look like {old} ({', '.join(finding.what for finding in findings)})")
        return
    out.print(f"[cyan]warn[/]  {new} do not look like {old}")
    table = plain_table("", "before", "after", "effect", "from", "p")
    for finding in moved:
        effect = f"{finding.measure} {finding.effect:.2f}"
        cells = [
            finding.what,
            finding.before,
            finding.after,
            effect,
            f"{finding.threshold:g}",
            f"{finding.p_value:.1g}",
        ]
        table.add_row(*map(plain, cells))
    out.print(table)


# -- forget ------------------------------------------------------------------------------------------------------


def print_forgotten(out: Console, done: Forgotten, left: Remains) -> None:
    """What forgetting changed, who learned from the rows, and where their text still is."""
    for row in done.already:
        out.print(f"{plain(row)} was forgotten before")
    if not done.asked:
        out.print("nothing has changed")
        return
    others = len(done.rows) - len(done.asked)
    made = f", and {others:,} more made of the same records" if others else ""
    out.print(f"forgotten: {', '.join(done.asked[:EXAMPLES])}{made}", soft_wrap=True)
    for file, line in done.places[:EXAMPLES]:
        out.print(f"  {plain(file)} line {line}", style="dim")
    out.print()
    _print_counts(out, done.before, done.after)
    _print_lock(out, done.before.tables, done.after.tables)
    if done.alike:
        more = f" … and {len(done.alike) - EXAMPLES:,} more" if len(done.alike) > EXAMPLES else ""
        out.print(f"\n[cyan]warn[/]  rows that stay and hold one of their answers: {len(done.alike):,}, with the ids")
        out.print(f"      {' '.join(done.alike[:EXAMPLES])}{more}", soft_wrap=True)
    _print_learners(out, done)
    _print_remains(out, left)
    out.print("\n[dim]keep it[/]  git add " + escape(" ".join(map(_shell, done.paths))), soft_wrap=True)
    out.print(
        f"         git commit -m {_shell(f'{done.name}: rows to be forgotten, {len(done.rows):,}')}", soft_wrap=True
    )
    out.print("         dvc push")


def _print_learners(out: Console, done: Forgotten) -> None:
    out.print()
    if done.learners:
        out.print("these were given them; what may have learned from them should be trained again:")
        table = plain_table("model", "", "learnt", "run", "because")
        for one in done.learners:
            style = {"yes": "red", "maybe": "yellow"}.get(one.learnt, "")
            learnt = f"[{style}]{one.learnt}[/]" if style else one.learnt
            cells = [plain(one.model or "not registered"), ", ".join(one.aliases), learnt, plain(one.run)]
            table.add_row(*cells, "\n".join(map(plain, one.because)))
        out.print(table)
        for command in dict.fromkeys(one.command for one in done.learners if one.learnt != "no"):
            out.print(f"  {escape(command)}", soft_wrap=True)
    else:
        known = "no model and no run that is known of was given them"
        out.print(f"{known}, but this could not be found out:" if done.unknown else known)
    for sentence in done.unknown:
        out.print(f"[yellow]not known[/]  {plain(sentence)}", soft_wrap=True)


def _print_remains(out: Console, left: Remains) -> None:
    from steps.forget import purge_commands

    out.print("\n[yellow]not removed[/]: no table of this version holds the text, but these still do")
    for file, lines in left.files.items():
        numbers = ", ".join(map(str, lines[:EXAMPLES])) + (", …" if len(lines) > EXAMPLES else "")
        kept = ", also in git's history" if file in left.in_git else ""
        out.print(f"  {plain(file)}, line {numbers}: a batch is not changed{kept}", soft_wrap=True)
    if left.fetched:
        out.print(f"  {plain(left.fetched)}, which the data is fetched from, and its copy in var/downloads")
    remotes = "".join(f", the remote '{remote}'" for remote in left.remotes)
    out.print(f"  earlier versions, in DVC's cache{remotes}", soft_wrap=True)
    out.print("  var/store, var/runs and MLflow's artifacts, where runs quote what they were given")
    out.print("to remove them, once the new version is committed and pushed (there is no way back):")
    for command, removes in purge_commands(left):
        out.print(f"  {escape(command)}", soft_wrap=True)
        out.print(f"      {removes}", style="dim", soft_wrap=True)


# -- diff --------------------------------------------------------------------------------------------------------


def print_changes(out: Console, changes: Changes, preview: Callable[[str, list[str]], Mapping[str, str]]) -> None:
    """Rows that came, went and changed, with the first of each.

    Args:
        preview: texts of rows of the version "before" or "after", by row_id.
    """
    parts = [f"{len(changes.came):,} rows came", f"{len(changes.went):,} went", f"{len(changes.changed):,} changed"]
    out.print(", ".join([*parts, f"{changes.same:,} are the same"]))
    if changes.into_quarantine or changes.out_of_quarantine:
        out.print(
            f"of the same, {changes.into_quarantine:,} went into quarantine, {changes.out_of_quarantine:,} left it"
        )
    shown = [
        ("came", changes.came, "row_id", "after", "+", "green"),
        ("went", changes.went, "row_id", "before", "-", "red"),
    ]
    for title, rows, key, side, sign, style in shown:
        if len(rows):
            out.print(f"\n{title}")
            _print_rows(out, rows.head(3), key, preview(side, list(rows[key].head(3))), sign, style)
    if len(changes.changed):
        out.print("\nchanged")
        first = changes.changed.head(3)
        old = preview("before", list(first["row_id_before"]))
        new = preview("after", list(first["row_id_after"]))
        for row in first.to_dict("records"):
            out.print(f"  {plain(row['file'])} line {row['line']}", style="dim")
            out.print(f"  [red]- {_cut(old.get(row['row_id_before'], ''), out.width - 4)}[/]")
            out.print(f"  [green]+ {_cut(new.get(row['row_id_after'], ''), out.width - 4)}[/]")


def _print_rows(out: Console, rows: Any, key: str, texts: Mapping[str, str], sign: str, style: str) -> None:
    for row in rows.to_dict("records"):
        out.print(f"  {plain(row['file'])} line {row['line']}", style="dim")
        out.print(f"  [{style}]{sign} {_cut(texts.get(row[key], ''), out.width - 4)}[/]")
