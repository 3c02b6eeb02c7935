"""Which rows came, went and changed between two versions of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

PLACE = ["file", "line", "part"]
IDS = ("row_id", "chosen_id", "rejected_id")  # columns of a table that name canonical rows


@dataclass(frozen=True)
class Changes:
    """Rows of two versions that are not in both.

    Attributes:
        came, went: row_id, file, line, part.
        changed: row_id before and after, file, line, part: another row stands where one stood.
        same: how many rows are in both.
        into_quarantine, out_of_quarantine: rows of both that are judged otherwise.
    """

    came: pd.DataFrame
    went: pd.DataFrame
    changed: pd.DataFrame
    same: int
    into_quarantine: int = 0
    out_of_quarantine: int = 0


def compare(before: pd.DataFrame, after: pd.DataFrame) -> Changes:
    """Match rows by `row_id`, equal ones one to one; what is left over by its place.

    Args:
        before, after: row_id, file, line, part, and optionally `bad`, whether the row is in quarantine.
    """
    before, after = (_numbered(rows) for rows in (before, after))
    both = before.merge(after, on=["row_id", "copy"], suffixes=("_before", ""))
    keys = pd.MultiIndex.from_frame(both[["row_id", "copy"]])
    went, came = (rows[~pd.MultiIndex.from_frame(rows[["row_id", "copy"]]).isin(keys)] for rows in (before, after))
    changed = went.merge(came, on=PLACE, suffixes=("_before", "_after"))
    places = pd.MultiIndex.from_frame(changed[PLACE])
    went, came = (rows[~pd.MultiIndex.from_frame(rows[PLACE]).isin(places)] for rows in (went, came))
    return Changes(
        came=came[["row_id", *PLACE]].reset_index(drop=True),
        went=went[["row_id", *PLACE]].reset_index(drop=True),
        changed=changed[["row_id_before", "row_id_after", *PLACE]],
        same=len(both),
        into_quarantine=int((both["bad"] & ~both["bad_before"]).sum()),
        out_of_quarantine=int((both["bad_before"] & ~both["bad"]).sum()),
    )


def _numbered(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the same content told apart by a number."""
    rows = rows.assign(bad=rows["bad"].astype(bool) if "bad" in rows else False)
    rows = rows.sort_values(["bad", *PLACE], kind="stable")
    return rows.assign(copy=rows.groupby("row_id").cumcount())


def identities(folder: Path) -> pd.DataFrame:
    """row_id, file, line, part and `bad` of every row of a version whose tables lie in a folder."""
    frames = [
        read(folder / f"{table}.parquet", ["row_id", *PLACE]).assign(bad=bad)
        for table, bad in (("valid", False), ("quarantine", True))
    ]
    rows = pd.concat(frames, ignore_index=True)
    return rows.assign(part=rows["part"].fillna(0).astype("int64") if "part" in rows else 0)


def read(path: Path, columns: list[str]) -> pd.DataFrame:
    """Columns of a table, as far as it has them: older versions have fewer."""
    with pa.OSFile(str(path)) as file:
        there = pq.read_schema(file).names
        return pd.read_parquet(file, columns=[name for name in columns if name in there])


def previews(folder: Path, row_ids: list[str]) -> dict[str, str]:
    """row_id → its texts in one line, from a version's valid and quarantined rows."""
    found: dict[str, str] = {}
    for table in ("valid", "quarantine"):
        path = folder / f"{table}.parquet"
        names = pq.read_schema(path).names
        columns = [name for name in ("row_id", "prompt", "chosen", "rejected", "answer", "raw") if name in names]
        wanted = pyarrow.dataset.dataset(path).to_table(
            columns=columns, filter=pyarrow.dataset.field("row_id").isin(row_ids)
        )
        for row in wanted.to_pylist():
            texts = [row.get(name) for name in ("prompt", "chosen", "rejected", "answer")]
            found.setdefault(row["row_id"], " | ".join(filter(None, texts)) or row.get("raw") or "")
    return found
