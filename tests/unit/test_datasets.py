"""The dataset registry, and tables that are the same bytes for the same rows."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from steps.datasets import Source, dataset, names, read_table, write_metrics, write_table
from steps.errors import DataError

REPOSITORY = Path(__file__).parents[2]
ENTRY = """\
datasets:
  mine:
    format: preferences
    source: {files: {pairs: pairs.jsonl}}
"""


def registry(root: Path, text: str) -> Path:
    (root / "data").mkdir(exist_ok=True)
    (root / "data" / "datasets.yaml").write_text(text)
    return root


def refusal(root: Path, text: str, name: str = "mine") -> str:
    with pytest.raises(DataError) as caught:
        dataset(name, registry(root, text))
    assert "datasets.yaml" in str(caught.value)
    return str(caught.value)


def test_every_dataset_of_the_repository_is_valid() -> None:
    assert names(REPOSITORY)
    for name in names(REPOSITORY):
        entry = dataset(name, REPOSITORY)
        assert entry.source.files or entry.source.hub


def test_an_entry_has_defaults(tmp_path: Path) -> None:
    entry = dataset("mine", registry(tmp_path, ENTRY))
    assert entry.source.files == {"pairs": "pairs.jsonl"}
    assert entry.rules.min_raters == 0
    assert 0 < entry.split.demonstrations + entry.split.preferences + entry.split.held_out < 0.95


def test_an_unknown_dataset_gets_a_suggestion(tmp_path: Path) -> None:
    text = refusal(tmp_path, ENTRY, "mien")
    assert "there is no dataset 'mien'" in text
    assert "did you mean 'mine'?" in text
    assert "add an entry `mien:`" in text


@pytest.mark.parametrize("text", ["", "datasets", "datasets:", "datasets: 3", "a: [", "other: {}", "[1]"])
def test_an_unreadable_registry_is_a_data_error(text: str, tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path, text)


def test_a_missing_registry_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"datasets\.yaml"):
        names(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("format: preferences", "format: gossip"), "format"),
        (("format: preferences", "format: rated_sentences"), "{topic}"),
        (("{files:", "{pypi: 'a==1', files:"), "needs its sha256"),
        (("{files:", "{sha256: abc, files:"), "is not a sha256"),
        (("{files:", "{pypi: 'a>=1', files:"), "source.pypi"),
        (("{files: {pairs: pairs.jsonl}}", "{}"), "give either `files` or `hub`"),
        (("{files:", "{hub: a/b, files:"), "give either `files` or `hub`"),
        (("{files: {pairs: pairs.jsonl}}", "{hub: a/b, revision: main}"), "source.revision"),
        (("{files: {", "{sha256: " + "a" * 64 + ", files: {more: m.jsonl, "), "a sha256 each"),
        (("{files:", "{sha256: {other: " + "a" * 64 + "}, files:"), "none of `files`"),
        (("{files:", "{sha256: {pairs: abc}, files:"), "is not a sha256"),
        (("format:", "rules: {checks: {empty: loudly}}\n    format:"), "rules.checks.empty"),
        (("format:", "rules: {max_chars: 0}\n    format:"), "rules.max_chars"),
        (("{files: {pairs: pairs.jsonl}}", "{hub: a/b, revision: " + "a" * 40 + ", split: test}"), None),
        (("datasets:\n", "datasets:\n"), None),
    ],
)
def test_an_entry_that_is_not_valid_is_refused_by_path(
    change: tuple[str, str], said: str | None, tmp_path: Path
) -> None:
    text = ENTRY.replace(*change)
    if said is None:
        assert dataset("mine", registry(tmp_path, text))
    else:
        assert said in refusal(tmp_path, text)


def test_a_check_is_set_by_a_word_or_with_a_threshold(tmp_path: Path) -> None:
    text = ENTRY + "    rules: {checks: {empty: warn, length_bias: {severity: stop, threshold: 0.7}}}\n"
    rules = dataset("mine", registry(tmp_path, text)).rules
    assert (rules.of("empty").severity, rules.of("empty").threshold) == ("warn", None)
    assert (rules.of("length_bias").severity, rules.of("length_bias").threshold) == ("stop", 0.7)
    assert (rules.of("mojibake").severity, rules.of("mojibake").threshold) == (None, None)


def test_a_digest_is_of_its_file_or_of_the_one_there_is() -> None:
    one, each = "0" * 64, {"a": "1" * 64}
    assert Source(files={"a": "a"}, sha256=one).digest_of("a") == one
    several = Source(files={"a": "a", "b": "b"}, sha256=each)
    assert (several.digest_of("a"), several.digest_of("b")) == ("1" * 64, None)


def test_unknown_keys_and_shares_without_gold_are_all_reported(tmp_path: Path) -> None:
    text = ENTRY + "    splt: {}\n    split: {demonstrations: 0.4, preferences: 0.4, held_out: 0.2}\n"
    said = refusal(tmp_path, text)
    assert "splt" in said
    assert "leave less than 5 % of the prompts for gold" in said


def test_the_same_rows_are_the_same_bytes_whatever_their_index(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": ["x", None, "ü"], "b": [1.0, float("nan"), 3.0], "c": [[1.0], [], [2.0, 3.0]]})
    write_table(frame, tmp_path / "one")
    write_table(frame.set_axis([7, 8, 9]), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = pd.read_parquet(tmp_path / "one")
    assert list(again["a"].fillna("-")) == ["x", "-", "ü"]
    assert [list(values) for values in again["c"]] == [[1.0], [], [2.0, 3.0]]


def test_a_table_that_is_replaced_while_it_is_read_is_read_whole(tmp_path: Path) -> None:
    sizes, path = (10, 1000), tmp_path / "rows.parquet"
    frames = [pd.DataFrame({"prompt": [f"prompt {row}" for row in range(size)]}) for size in sizes]
    write_table(frames[0], path)
    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(lambda: [write_table(frames[turn % 2], path) for turn in range(400)])
        seen = {len(read_table(path)) for _ in iter(writing.done, True)}
    assert writing.exception() is None
    assert seen == set(sizes)


def test_metrics_are_sorted_json_with_a_last_newline(tmp_path: Path) -> None:
    write_metrics({"b": 1, "a": "ü"}, tmp_path / "m.json")
    text = (tmp_path / "m.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["a", "b"]
    assert "ü" in text
