"""Errors: what they say, and that they survive the way between processes."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from steps import errors
from steps.errors import PrefloopError, StepFailed, did_you_mean, read_error, write_error


def everything() -> list[type[PrefloopError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PrefloopError)]
    assert len(found) > 5
    return found


def test_an_error_says_what_where_found_and_next() -> None:
    text = str(PrefloopError("it broke", where="here.yaml", have="a hole", then="mend it"))
    assert text.splitlines() == ["it broke", "  where here.yaml", "  found a hole", "  next  mend it"]


def test_parts_that_are_not_given_leave_no_line() -> None:
    assert str(PrefloopError("it broke")) == "it broke"
    assert str(PrefloopError("it broke", then="mend it")) == "it broke\n  next  mend it"


@pytest.mark.parametrize("kind", everything())
def test_every_kind_survives_a_file(kind: type[PrefloopError], tmp_path: Path) -> None:
    write_error(kind("what", where="where", have="häve", then="then"), tmp_path / "error.json")
    again = read_error(tmp_path / "error.json")
    assert type(again) is kind
    assert (again.what, again.where, again.have, again.then) == ("what", "where", "häve", "then")


@pytest.mark.parametrize("kind", everything())
def test_every_kind_survives_pickling(kind: type[PrefloopError]) -> None:
    error = kind("what", where="where", have="have", then="then")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)


def test_a_foreign_error_is_kept_with_its_type_and_message(tmp_path: Path) -> None:
    write_error(ZeroDivisionError("by nought"), tmp_path / "error.json")
    again = read_error(tmp_path / "error.json")
    assert type(again) is StepFailed
    assert str(again) == "ZeroDivisionError: by nought"


@pytest.mark.parametrize("text", ["", "{", "{}", '{"kind": "Unknown", "what": "x"}', "[]", '{"kind": "StepFailed"}'])
def test_an_unreadable_error_file_is_no_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "error.json").write_text(text)
    assert read_error(tmp_path / "error.json") is None


def test_no_error_file_is_no_error(tmp_path: Path) -> None:
    assert read_error(tmp_path / "error.json") is None


def test_a_near_miss_is_suggested() -> None:
    assert did_you_mean("bta", ["gamma", "beta"]) == "did you mean 'beta'?"


def test_without_a_near_miss_the_first_twelve_are_listed() -> None:
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
    known = [f"option{number:02}" for number in range(13)]
    assert did_you_mean("zzz", known) == f"known: {', '.join(known[:12])}, …"
