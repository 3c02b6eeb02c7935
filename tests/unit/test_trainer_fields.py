"""The trainer fields read from source are the ones TRL really has."""

from __future__ import annotations

import dataclasses

import pytest
import trl

from steps.trainer_fields import CONFIGS, OWNED, fields_of


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_fields_are_those_of_the_dataclass(kind: str) -> None:
    real = {field.name for field in dataclasses.fields(getattr(trl, CONFIGS[kind][1]))}
    assert fields_of(kind) == {name for name in real if not name.startswith("_")}
    assert "learning_rate" in real


@pytest.mark.parametrize("name", sorted(OWNED))
def test_every_owned_field_is_a_field_of_some_trainer(name: str) -> None:
    assert any(name in fields_of(kind) for kind in CONFIGS)


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(KeyError):
        fields_of("none of them")
