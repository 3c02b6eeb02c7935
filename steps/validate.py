"""Second data stage: Great Expectations decides which rows are fit to learn from. Its only module.

Every check of `steps.checks` becomes an expectation: a column of reasons that must be empty. A row that breaks one goes
to quarantine, with its raw text, line and every reason, or is kept with a warning, or stops the stage, as the registry
says. Nothing is lost: `valid + quarantined = read`.

`python -m steps.validate NAME` writes `valid.parquet`, `quarantine.parquet`, the counts `validation.json`, and
`validation.html` for people.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from steps.checks import CHECKS, Chunk, Found, redacted
from steps.data_page import validation_page
from steps.datasets import Dataset, Rules, dataset, folder, write_metrics, write_text
from steps.errors import DataError, PrefloopError
from steps.ingest import raw_texts
from steps.overview import Overview, look_over
from steps.rows import CHUNK, SCHEMA, TEXTS, TOPIC, chunks, writing

REASONS = pa.field("reasons", pa.list_(pa.string()))
WARNINGS = pa.field("warnings", pa.list_(pa.string()))
QUARANTINE = SCHEMA.append(REASONS)
VALID = SCHEMA.remove(SCHEMA.get_field_index("raw"))  # with a topic where there is one, and WARNINGS
EXAMPLES = 5  # per check, in the counts

# Statistics of the whole dataset and the bounds between which nothing is said, unless the registry has a threshold.
BOUNDS: dict[str, tuple[str, float, str]] = {
    "length_bias": ("longer_chosen", 0.65, "share of pairs whose longer side is chosen"),
    "source_imbalance": ("largest_source_share", 0.95, "share of the largest source, where there are several"),
    "quarantined": ("quarantined_share", 0.2, "share of the rows in quarantine"),
}


def severity_of(check: str, rules: Rules) -> str:
    """What is done about a row that a check finds."""
    return rules.of(check).severity or (CHECKS[check].severity if check in CHECKS else "warn")


def check_settings(rules: Rules) -> None:
    """Refuse settings of checks that are not there, or that cannot be followed.

    Raises:
        DataError: naming the check.
    """
    from steps.errors import did_you_mean

    known = {*CHECKS, *BOUNDS}
    for name in rules.checks:
        if name not in known:
            raise DataError(f"there is no check '{name}'", where="rules.checks", have=did_you_mean(name, known))
        if name in CHECKS and CHECKS[name].unreadable and severity_of(name, rules) in ("warn", "off"):
            raise DataError(
                f"'{name}' cannot be set to {severity_of(name, rules)}",
                where="rules.checks",
                have="such a record has no texts that could be kept",
                then="quarantine or stop",
            )
        if name in CHECKS and rules.of(name).threshold is not None:
            raise DataError(f"'{name}' has no threshold", where="rules.checks", have=f"thresholds: {', '.join(BOUNDS)}")
        if name in BOUNDS and severity_of(name, rules) == "quarantine":
            raise DataError(f"'{name}' is about all rows; no row can go to quarantine for it", where="rules.checks")


# -- Great Expectations ------------------------------------------------------------------------------------------


class Expectations:
    """Great Expectations over tables of reasons and of statistics, in memory."""

    def __init__(self, name: str) -> None:
        os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
        import great_expectations as gx
        from great_expectations.data_context.types.base import ProgressBarsConfig

        self._gx = gx
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        asset = context.data_sources.add_pandas("rows").add_dataframe_asset(name)
        self._whole = asset.add_batch_definition_whole_dataframe("all")

    def empty(self, reasons: pd.DataFrame, notes: Mapping[str, str]) -> dict[str, list[int]]:
        """Expect every column to hold no reason; the index labels of the rows that do, by column.

        Raises:
            DataError: an expectation could not be evaluated. Great Expectations reports that as an unsuccessful
                result without rows; taken at its word, bad rows would pass.
        """
        kinds = {
            name: self._gx.expectations.ExpectColumnValuesToBeNull(column=name, notes=note)
            for name, note in notes.items()
        }
        return {name: rows for name, (rows, _) in self._validated(reasons, kinds).items()}

    def at_most(self, values: Mapping[str, float], limits: Mapping[str, float], notes: Mapping[str, str]) -> list[str]:
        """Expect every value to keep its limit; the names of those that do not."""
        kinds = {
            name: self._gx.expectations.ExpectColumnValuesToBeBetween(column=name, max_value=limit, notes=notes[name])
            for name, limit in limits.items()
        }
        frame = pd.DataFrame([values])
        return [name for name, (_, success) in self._validated(frame, kinds).items() if not success]

    def _validated(self, frame: pd.DataFrame, expectations: Mapping[str, Any]) -> dict[str, tuple[list[int], bool]]:
        """Index labels of the rows that break each expectation, and whether it holds.

        All of them go in one suite, for the library hashes the whole frame each time it is asked.
        """
        if not expectations:
            return {}
        suite = self._gx.ExpectationSuite("all", expectations=list(expectations.values()))
        batch = self._whole.get_batch({"dataframe": frame})
        results = batch.validate(suite, result_format={"result_format": "COMPLETE"}).results
        found = {}
        for result in results:
            name = result.expectation_config.kwargs["column"]  # type: ignore[union-attr]
            if thrown := _thrown(result.exception_info):
                raise DataError("a check could not be evaluated", where=f"the check '{name}'", have=thrown)
            found[name] = list(result.result.get("unexpected_index_list") or ()), bool(result.success)
        if missing := sorted(set(expectations) - set(found)):
            raise DataError("a check was not evaluated", where=f"the check '{missing[0]}'")
        return {name: found[name] for name in expectations}


def _thrown(info: dict[str, Any] | None) -> str:
    """The message of an exception inside an expectation; it lies one level down for some of them."""
    if not info:
        return ""
    nested = [info, *(value for value in info.values() if isinstance(value, dict))]
    return next((str(i.get("exception_message")) for i in nested if i.get("raised_exception")), "")


# -- the stage ---------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What validation counted."""

    read: int = 0
    valid: int = 0
    quarantined: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    cut: int = 0  # characters over the budget
    characters: int = 0


def validate(entry: Dataset, here: Path, local: Path, root: Path = Path()) -> dict[str, Any]:
    """Part `rows.parquet` in valid rows and quarantine.

    Args:
        here: the dataset's folder, which holds `rows.parquet` and gets the results.
        local: the folder of its source files, where the raw text of quarantined rows is read again.
        root: the project, from which `rules.evaluation_sets` are looked for.

    Returns:
        the counts.

    Raises:
        DataError: a check of severity `stop` found something, a check could not be evaluated, or no row is left.
    """
    rules = entry.rules
    check_settings(rules)
    checks = [name for name in CHECKS if severity_of(name, rules) != "off"]
    evaluation_sets = [root / path for path in rules.evaluation_sets]
    if missing := [path for path in evaluation_sets if not path.is_file()]:
        raise DataError("an evaluation set is not there", where=str(missing[0]), then="mend rules.evaluation_sets")
    with ThreadPoolExecutor(1) as pool:  # the library takes seconds to import
        importing = pool.submit(Expectations, here.name)
        overview = look_over(here / "rows.parquet", evaluation_sets, near="near_repeat" in checks)
        expectations, tally = importing.result(), Tally()
    bad = _judged(here / "rows.parquet", overview, entry, checks, expectations, tally, here / "valid.parquet")
    tally.quarantined = _write_quarantine(bad, entry, here, local)
    if tally.valid + tally.quarantined != tally.read:
        raise DataError("validation lost rows", have=f"{tally.read} read, {tally.valid} + {tally.quarantined} kept")
    counts = _counts(tally, overview, entry, checks, expectations)
    looks_for = {name: CHECKS[name].looks_for for name in checks} | {
        name: says for name, (_, _, says) in BOUNDS.items()
    }
    write_text(validation_page(here.name, counts, looks_for), here / "validation.html")
    write_metrics(counts, here / "validation.json")
    _stop_where_asked(tally, counts, rules)
    if not tally.read:
        raise DataError(
            f"'{here.name}' has no row", where=str(here / "source"), have="its files are empty", then="add data"
        )
    if not tally.valid:
        raise DataError(
            f"no row of '{here.name}' is fit to learn from",
            where=str(here / "quarantine.parquet"),
            have="\n        ".join([f"{tally.quarantined} rows in quarantine", *_first_examples(tally)]),
            then=f"read their reasons with `prefloop data report {here.name}`, then mend the source or the rules",
        )
    return counts


def _first_examples(tally: Tally) -> list[str]:
    """One example of each check, those that found most first."""
    return [f"{name}: {tally.examples[name][0]}" for name, _ in tally.rows.most_common(3) if tally.examples.get(name)]


def _judged(
    path: Path,
    overview: Overview,
    entry: Dataset,
    checks: list[str],
    expectations: Expectations,
    tally: Tally,
    valid: Path,
) -> Iterator[dict[str, Any]]:
    """Write the valid rows as they pass; yield the others, with their reasons."""
    rules = entry.rules
    notes = {name: CHECKS[name].looks_for for name in checks}
    keeps = {name for name in checks if severity_of(name, rules) == "warn"}
    topic = [TOPIC] if "topic" in entry.columns else []
    with writing(valid, pa.schema([*VALID, *topic, WARNINGS])) as writer:
        for table in chunks(path):
            chunk = Chunk(table, tally.read, overview, rules, needs_prompt=entry.format != "rated_sentences")
            found = {name: _found(name, chunk) for name in checks}
            failing = expectations.empty(_reasons(found, len(table)), notes)
            reasons: dict[int, list[str]] = {}
            warnings: dict[int, list[str]] = {}
            for name, rows in failing.items():
                tally.rows[name] += len(rows)
                for row in rows:
                    (warnings if name in keeps else reasons).setdefault(row, []).append(f"{name}: {found[name][row]}")
                    if len(tally.examples.setdefault(name, [])) < EXAMPLES:
                        tally.examples[name].append(f"{overview.place(tally.read + row)}: {found[name][row]}")
            kept = np.ones(len(table), dtype=bool)
            kept[list(reasons)] = False
            writer.write_table(_kept(table, kept, warnings, rules))
            lengths = overview.lengths[tally.read : tally.read + len(table)]
            tally.characters += int(lengths.sum())
            if rules.max_chars:
                tally.cut += int(np.maximum(lengths - rules.max_chars, 0).sum())
            tally.valid += int(kept.sum())
            tally.read += len(table)
            for row in sorted(reasons):
                yield {**table.slice(row, 1).to_pylist()[0], "reasons": reasons[row]}


def _found(name: str, chunk: Chunk) -> Found:
    try:
        return CHECKS[name].find(chunk)
    except Exception as error:  # a check that breaks has found nothing out; no row may pass for it
        have = f"{type(error).__name__}: {error}"
        raise DataError("a check could not be evaluated", where=f"the check '{name}'", have=have) from error


def _reasons(found: Mapping[str, Found], rows: int) -> pd.DataFrame:
    """(rows, checks) the reason a check has against a row, None where it has none."""
    columns = {}
    for name, whys in found.items():
        column = np.full(rows, None, dtype=object)
        column[list(whys)] = list(whys.values())
        columns[name] = column
    return pd.DataFrame(columns)


def _kept(table: pa.Table, kept: np.ndarray, warnings: Mapping[int, list[str]], rules: Rules) -> pa.Table:
    said = _lists(warnings, len(table))
    if rules.redact:
        for name in TEXTS:
            texts = [text and redacted(text) for text in table[name].to_pylist()]
            table = table.set_column(
                table.schema.get_field_index(name), SCHEMA.field(name), pa.array(texts, pa.string())
            )
        turns = [
            said and [{**turn, "content": redacted(turn["content"])} for turn in said]
            for said in table["turns"].to_pylist()
        ]
        field = SCHEMA.field("turns")
        table = table.set_column(table.schema.get_field_index("turns"), field, pa.array(turns, field.type))
    return table.drop_columns("raw").append_column(WARNINGS, said).filter(pa.array(kept))


def _lists(warnings: Mapping[int, list[str]], rows: int) -> pa.Array:
    """(rows,) a list of words for each row, empty for most."""
    counts = np.zeros(rows + 1, dtype=np.int32)
    counts[[row + 1 for row in warnings]] = [len(warnings[row]) for row in warnings]
    words = [word for row in sorted(warnings) for word in warnings[row]]
    return pa.ListArray.from_arrays(pa.array(np.cumsum(counts, dtype=np.int32)), pa.array(words, pa.string()))


def _write_quarantine(bad: Iterator[dict[str, Any]], entry: Dataset, here: Path, local: Path) -> int:
    """Write the rows in quarantine, each with its raw text; returns how many there are.

    Rows come in the order of the source, so that one more pass over it, as far as the last of them, finds every text.
    """
    source = raw_texts(entry, local)
    place, raw = None, None
    with writing(here / "quarantine.parquet", QUARANTINE) as writer:
        waiting = []
        for row in bad:
            if row["raw"] is None:
                while place != (row["file"], row["line"]):
                    place, raw = next(source, ((row["file"], row["line"]), None))
                row["raw"] = raw
            waiting.append(row)
            if len(waiting) == CHUNK:
                writer.write(waiting)
                waiting = []
        writer.write(waiting)
    return writer.rows


def _counts(
    tally: Tally, overview: Overview, entry: Dataset, checks: list[str], expectations: Expectations
) -> dict[str, Any]:
    rules = entry.rules
    statistics = {
        **overview.statistics,
        "latin_share": overview.latin_share,
        "quarantined_share": tally.quarantined / max(tally.read, 1),
    }
    if rules.max_chars:
        statistics["cut_share"] = tally.cut / max(tally.characters, 1)
    limits = {
        name: limit if (given := rules.of(name).threshold) is None else given
        for name, (statistic, limit, _) in BOUNDS.items()
        if statistic in statistics
        and severity_of(name, rules) != "off"
        and not (name == "source_imbalance" and statistics["sources"] < 2)
    }
    values = {name: statistics[BOUNDS[name][0]] for name in limits}
    notes = {name: f"{BOUNDS[name][2]}, at most {limit:g}" for name, limit in limits.items()}
    over = expectations.at_most(values, limits, notes)
    return {
        "read": tally.read,
        "valid": tally.valid,
        "quarantined": tally.quarantined,
        "checks": {name: {"rows": tally.rows[name], "severity": severity_of(name, rules)} for name in checks},
        "bounds": {
            name: {"value": round(values[name], 4), "limit": limit, "kept": name not in over}
            for name, limit in limits.items()
        },
        "statistics": {name: round(value, 4) for name, value in statistics.items()},
        "examples": tally.examples,
    }


def _stop_where_asked(tally: Tally, counts: Mapping[str, Any], rules: Rules) -> None:
    rows = [name for name in counts["checks"] if severity_of(name, rules) == "stop" and tally.rows[name]]
    over = [name for name, b in counts["bounds"].items() if severity_of(name, rules) == "stop" and not b["kept"]]
    if not rows and not over:
        return
    have = [f"{tally.rows[name]} rows: {'; '.join(tally.examples[name][:3])}" for name in rows]
    have += [f"{BOUNDS[name][2]} is {counts['bounds'][name]['value']:g}" for name in over]
    raise DataError(
        f"the data breaks a rule that stops: {', '.join(rows + over)}",
        where="rules.checks in data/datasets.yaml",
        have="\n        ".join(have),
        then="mend the source, or set the check to quarantine or warn",
    )


def report_lines(counts: Mapping[str, Any]) -> list[str]:
    """What validation came to, for a terminal."""
    lines = [f"{counts['read']:,} rows read = {counts['valid']:,} valid + {counts['quarantined']:,} in quarantine"]
    for name, check in counts["checks"].items():
        if check["rows"]:
            lines.append(f"  {check['severity']:<10} {check['rows']:>8,}  {CHECKS[name].looks_for}")
            lines += [f"             {example}" for example in counts["examples"].get(name, [])[:3]]
    for name, bound in counts["bounds"].items():
        if not bound["kept"]:
            lines.append(f"  warn       {bound['value']:>8.3f}  {BOUNDS[name][2]}, at most {bound['limit']:g}")
    return lines


def main(name: str) -> None:
    entry = dataset(name)
    counts = validate(entry, folder(name), folder(name) / "source")
    print(f"validate {name}: " + "\n".join(report_lines(counts)))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except PrefloopError as error:
        sys.exit(f"{error}")
