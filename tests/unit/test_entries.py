"""Edits of the registry: one line more, everything else as it was."""

from __future__ import annotations

import pytest
import yaml

from steps import entries
from steps.datasets import Split
from steps.errors import DataError
from steps.split import part_of

BLOCK = """\
# Ours.
datasets:
  first:
    format: hh   # as published
    source:
      files:
        one: one.jsonl  # the first

    # about the split
    split: {seed: 1}

  second:
    format: labels
    source: {files: {a: a.csv}}
# the end
"""


def test_a_line_goes_under_the_last_of_its_block() -> None:
    edited = entries.with_file(BLOCK, "first", "two", "two.jsonl")
    assert edited == BLOCK.replace("# the first\n", "# the first\n        two: two.jsonl\n")


def test_a_flow_mapping_grows_on_its_line() -> None:
    edited = entries.with_file(BLOCK, "second", "b", "b c.csv")
    assert edited == BLOCK.replace("{a: a.csv}", '{a: a.csv, b: "b c.csv"}')


def test_a_new_entry_goes_to_the_end() -> None:
    edited = entries.with_entry(BLOCK, "third", "scored", {"on": "on.jsonl"})
    seed = yaml.safe_load(edited)["datasets"]["third"]["split"]["seed"]
    block = '  third:\n    format: scored\n    source:\n      files:\n        "on": on.jsonl\n'
    block += f"    split: {{seed: {seed}}}\n"
    assert edited == BLOCK.replace("# the end\n", block + "# the end\n")


def test_a_new_entry_says_what_its_files_call_the_fields() -> None:
    made = yaml.safe_load(entries.with_entry(BLOCK, "third", "hh", {"p": "p.csv"}, {"chosen": "the good one"}))
    assert made["datasets"]["third"]["columns"] == {"chosen": "the good one"}


def test_rows_of_one_part_of_another_dataset_are_dealt_to_all_parts() -> None:
    prompts = [f"p{number}" for number in range(2000)]
    shares = Split()
    train = [prompt for prompt in prompts if part_of(prompt, shares) == "preferences"]
    assert {part_of(prompt, shares) for prompt in train} == {"preferences"}
    made = yaml.safe_load(entries.with_entry(BLOCK, "derived", "preferences", {"pairs": "p.jsonl"}))
    seeded = Split(**made["datasets"]["derived"]["split"])
    assert {part_of(prompt, seeded) for prompt in train} == {"demonstrations", "preferences", "held_out", "gold"}


def test_a_last_line_without_its_end_is_no_obstacle() -> None:
    edited = entries.with_file(BLOCK.partition("\n\n")[0], "first", "two", "2.jsonl")
    assert yaml.safe_load(edited)["datasets"]["first"]["source"]["files"] == {"one": "one.jsonl", "two": "2.jsonl"}


@pytest.mark.parametrize("name", ["null", "yes", "1", "1e3", "a: b", "# a", "ü", "-", "a\nb", "'", '"'])
def test_every_name_is_read_back_as_it_was(name: str) -> None:
    edited = entries.with_file(BLOCK, "first", name, name)
    assert yaml.safe_load(edited)["datasets"]["first"]["source"]["files"][name] == name


@pytest.mark.parametrize(
    "registry",
    [
        "datasets:\n  first: {format: hh, source: {hub: a/b}}\n",
        "datasets:\n  first:\n    format: hh\n    source: &s\n      files: *f\n",
    ],
)
def test_what_cannot_be_edited_is_said_with_the_line_to_add(registry: str) -> None:
    with pytest.raises((DataError, yaml.YAMLError)):
        entries.with_file(registry, "first", "two", "two.jsonl")


def test_an_empty_registry_is_left_to_people() -> None:
    with pytest.raises(DataError, match="add this by hand"):
        entries.with_entry("datasets: {}\n", "first", "hh", {"one": "one.jsonl"})
