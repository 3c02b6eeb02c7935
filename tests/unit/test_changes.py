"""Rows that came, went and changed between two versions."""

from __future__ import annotations

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from steps.changes import compare

ROWS = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from(["x", "y"]), st.integers(1, 6), st.booleans()),
    unique_by=lambda row: row[1:3],
    max_size=10,
)


def table(rows: list[tuple[str, str, int, bool]]) -> pd.DataFrame:
    columns = {"row_id": [r[0] for r in rows], "file": [r[1] for r in rows], "line": [r[2] for r in rows]}
    return pd.DataFrame({**columns, "part": 0, "bad": [r[3] for r in rows]}).astype(
        {"row_id": "str", "file": "str", "line": "int64", "part": "int64", "bad": bool}
    )


def test_a_row_that_moved_is_the_same_and_one_that_was_rewritten_is_changed() -> None:
    before = table([("a", "x", 1, False), ("b", "x", 2, False), ("c", "x", 3, False), ("d", "x", 4, False)])
    after = table([("b", "x", 1, False), ("a", "x", 2, True), ("e", "x", 3, False), ("f", "x", 9, False)])
    found = compare(before, after)
    assert found.same == 2
    assert list(found.came["row_id"]) == ["f"] and list(found.went["row_id"]) == ["d"]
    assert found.changed[["row_id_before", "row_id_after", "line"]].to_numpy().tolist() == [["c", "e", 3]]
    assert (found.into_quarantine, found.out_of_quarantine) == (1, 0)


@given(ROWS, ROWS)
def test_nothing_is_lost(before: list, after: list) -> None:
    found = compare(table(before), table(after))
    assert found.same + len(found.went) + len(found.changed) == len(before)
    assert found.same + len(found.came) + len(found.changed) == len(after)


@given(ROWS)
def test_a_version_and_itself_differ_in_nothing(rows: list) -> None:
    found = compare(table(rows), table(rows))
    assert (found.same, len(found.came), len(found.went), len(found.changed)) == (len(rows), 0, 0, 0)
    assert (found.into_quarantine, found.out_of_quarantine) == (0, 0)
