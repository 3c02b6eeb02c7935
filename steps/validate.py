"""Second data stage: Great Expectations decides which rows are fit to learn from. Its only module.

A row that breaks a rule goes to quarantine with its line number and every reason; nothing is lost:
`valid + quarantined = read`. `python -m steps.validate NAME` writes `valid.parquet`, `quarantine.parquet` and the
counts, `validation.json`.
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from steps.datasets import Rules, dataset, folder, write_metrics, write_table
from steps.errors import DataError, PrefloopError

CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f�]"


@dataclass(frozen=True)
class Check:
    """One expectation of one column, and what to say of a row that breaks it."""

    reason: str
    expectation: str
    arguments: dict[str, Any]

    @property
    def label(self) -> str:
        """The reason without what differs from row to row."""
        return re.sub(r":? \{.*", "", self.reason)


def normalised(text: object) -> str | None:
    """Text as two people would call it the same: case, width, spaces and outer punctuation ignored."""
    if not isinstance(text, str):
        return None
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).strip(" .!?\"'")


def _repeated(keys: pd.Series, rows: pd.DataFrame) -> pd.Series:
    """For every row that repeats an earlier one: where the first is. Else null."""
    places = rows["file"] + " line " + rows["line"].astype(str)
    first = pd.Series(range(len(rows)), index=rows.index).groupby(keys).transform("min")
    again = keys.notna() & (first != range(len(rows)))
    return first.map(lambda place: places.iloc[int(place)], na_action="ignore").where(again).astype("object")


def _text_checks(column: str) -> list[Check]:
    return [
        Check(f"{column} is missing", "ExpectColumnValuesToNotBeNull", {"column": column}),
        Check(f"{column} is empty", "ExpectColumnValuesToMatchRegex", {"column": column, "regex": r"\S"}),
        Check(
            f"{column} holds control or replacement characters",
            "ExpectColumnValuesToNotMatchRegex",
            {"column": column, "regex": CONTROL},
        ),
    ]


def rated_sentences_checks(rows: pd.DataFrame, rules: Rules) -> tuple[pd.DataFrame, list[Check]]:
    """Checks of sentences with ratings, and the helper columns they look at."""
    means = rows["ratings"].map(lambda values: float(np.mean(values)) if len(values) else np.nan)
    helpers = pd.DataFrame(
        {
            "raters": rows["ratings"].map(len),
            "repeated": _repeated(rows["answer"].map(normalised), rows),
            "mean_error": (means - rows["score"]).abs(),
        }
    )
    low, high = rules.score_range or (None, None)
    checks = [
        *_text_checks("answer"),
        Check("score is missing", "ExpectColumnValuesToNotBeNull", {"column": "score"}),
        Check(
            f"fewer than {rules.min_raters} raters",
            "ExpectColumnValuesToBeBetween",
            {"column": "raters", "min_value": rules.min_raters},
        ),
        Check(
            "score is not the mean of the raw ratings",
            "ExpectColumnValuesToBeBetween",
            {"column": "mean_error", "max_value": 0.01},
        ),
        Check("repeats {repeated}", "ExpectColumnValuesToBeNull", {"column": "repeated"}),
    ]
    if rules.score_range:
        bounds = {"column": "score", "min_value": low, "max_value": high}
        checks.append(Check(f"score outside {low:g} to {high:g}", "ExpectColumnValuesToBeBetween", bounds))
    return helpers, checks


def preferences_checks(rows: pd.DataFrame, rules: Rules) -> tuple[pd.DataFrame, list[Check]]:
    """Checks of prompt, chosen, rejected, and the helper columns they look at."""
    sides = rows[["prompt", "chosen", "rejected"]].map(normalised)
    same = (sides["chosen"] == sides["rejected"]) & sides["chosen"].notna()
    complete = sides.notna().all(axis=1)
    keys = sides["prompt"].str.cat([sides["chosen"], sides["rejected"]], sep="\x1f").where(complete)
    helpers = pd.DataFrame({"sides_differ": ~same, "repeated": _repeated(keys, rows)})
    checks = [
        Check("could not be read: {problem}", "ExpectColumnValuesToBeNull", {"column": "problem"}),
        *(check for column in sides for check in _text_checks(column)),
        Check("margin is negative", "ExpectColumnValuesToBeBetween", {"column": "margin", "min_value": 0}),
        Check(
            "chosen and rejected are the same",
            "ExpectColumnValuesToBeInSet",
            {"column": "sides_differ", "value_set": [True]},
        ),
        Check("repeats {repeated}", "ExpectColumnValuesToBeNull", {"column": "repeated"}),
    ]
    return helpers, checks


CHECKS: dict[str, Callable[[pd.DataFrame, Rules], tuple[pd.DataFrame, list[Check]]]] = {
    "rated_sentences": rated_sentences_checks,
    "preferences": preferences_checks,
}


def failing_rows(frame: pd.DataFrame, checks: list[Check]) -> dict[int, list[Check]]:
    """Index labels of the rows that break a check, each with the checks it breaks.

    Raises:
        DataError: an expectation could not be evaluated. Great Expectations reports that as an unsuccessful result
            without rows; taken at its word, bad rows would pass.
    """
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("rows").add_dataframe_asset("rows")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    failing: dict[int, list[Check]] = {}
    for check in checks:
        expectation = getattr(gx.expectations, check.expectation)(**check.arguments)
        result = batch.validate(expectation, result_format={"result_format": "COMPLETE"})
        if thrown := _thrown(result.exception_info):
            raise DataError(
                "a check could not be evaluated", where=f"{check.expectation} {check.arguments}", have=thrown
            )
        for label in result.result.get("unexpected_index_list") or ():
            failing.setdefault(label, []).append(check)
    return failing


def _thrown(info: dict[str, Any] | None) -> str:
    """The message of an exception inside an expectation; it lies one level down for some of them."""
    if not info:
        return ""
    nested = [info, *(value for value in info.values() if isinstance(value, dict))]
    return next((str(i.get("exception_message")) for i in nested if i.get("raised_exception")), "")


def validate(rows: pd.DataFrame, kind: str, rules: Rules) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Rows apart: those fit to learn from, those in quarantine with their reasons, and the counts."""
    helpers, checks = CHECKS[kind](rows, rules)
    frame = pd.concat([rows.reset_index(drop=True), helpers.reset_index(drop=True)], axis=1)
    failing = failing_rows(frame.drop(columns=["ratings"], errors="ignore"), checks)
    bad = sorted(failing)
    reasons = [[c.reason.format(**frame.loc[label].to_dict()) for c in failing[label]] for label in bad]
    quarantine = rows.iloc[bad].assign(reasons=reasons)
    valid = rows.drop(index=rows.index[bad])
    if len(valid) + len(quarantine) != len(rows):
        raise DataError("validation lost rows", have=f"{len(rows)} read, {len(valid)} + {len(quarantine)} kept")
    counts = {check.label: 0 for check in checks}
    for broken in failing.values():
        for check in broken:
            counts[check.label] += 1
    return valid, quarantine, {"read": len(rows), "valid": len(valid), "quarantined": len(quarantine), **counts}


def main(name: str) -> None:
    entry = dataset(name)
    rows = pd.read_parquet(folder(name) / "rows.parquet")
    valid, quarantine, counts = validate(rows, entry.format, entry.rules)
    write_table(valid, folder(name) / "valid.parquet")
    write_table(quarantine, folder(name) / "quarantine.parquet")
    write_metrics(counts, folder(name) / "validation.json")
    print(f"validate {name}: {counts['read']:,} read = {counts['valid']:,} valid + {counts['quarantined']:,} bad")
    for row in quarantine.head(10).itertuples():
        print(f"  line {row.line}: {'; '.join(row.reasons)}")
    if valid.empty:
        raise DataError(
            f"no row of '{name}' is fit to learn from",
            where=str(folder(name) / "quarantine.parquet"),
            have=f"{counts['quarantined']} rows in quarantine",
            then="read their reasons above, then mend the source or the rules",
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except PrefloopError as error:
        sys.exit(f"{error}")
