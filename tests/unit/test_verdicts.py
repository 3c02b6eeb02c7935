"""The verdict store: nothing is judged twice, and no verdict is lost."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps.errors import PrefloopError
from steps.judges import Comparison, Verdict
from steps.verdicts import Remembered, VerdictStore, verdict_key

ONE = Comparison("p", "a", "b")


def numbered(count: int) -> list[Comparison]:
    return [Comparison(f"p{number}", "a", "b") for number in range(count)]


class Counting:
    """A judge that prefers the first answer and remembers what it was asked."""

    name, identity = "counting", "counting/1"

    def __init__(self) -> None:
        self.asked: list[Comparison] = []

    def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        self.asked += comparisons
        return [Verdict(1.0, reason=c.prompt) for c in comparisons]


class Paying(Counting):
    """One whose verdicts come one by one, and that stops at a certain one."""

    def __init__(self, stops_at: int = 10**9, says: float = 1.0) -> None:
        super().__init__()
        self.stops_at, self.says, self.charged = stops_at, says, []

    def compare_each(self, comparisons: Sequence[Comparison], keep: Callable[[int, Verdict], None]) -> None:
        for number, comparison in enumerate(comparisons):
            if len(self.asked) == self.stops_at:
                raise KeyboardInterrupt
            self.asked.append(comparison)
            keep(number, Verdict(self.says, cost=0.25))

    def charge(self, amount: float, verdicts: int) -> None:
        self.charged.append((amount, verdicts))


# -- keys --------------------------------------------------------------------------------------------------------


def test_the_key_is_of_judge_prompt_and_both_answers_in_their_order() -> None:
    keys = [
        verdict_key("j", ONE),
        verdict_key("k", ONE),
        verdict_key("j", Comparison("q", "a", "b")),
        verdict_key("j", ONE.swapped()),
        verdict_key("j", Comparison("pa", "", "b")),  # the same letters, cut elsewhere
        verdict_key("jp", Comparison("", "a", "b")),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


@given(texts=st.tuples(*[st.text(st.characters(), max_size=30)] * 4), preference=st.sampled_from([0, 0.5, 1]))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: tuple, preference: float) -> None:
    prompt, first, second, reason = texts
    path = tmp_path_factory.mktemp("store") / "v.jsonl"
    comparison = Comparison(prompt, first, second)
    verdict = Verdict(preference, 0.1 + 0.2, -1e-300, reason, (preference, 0.5), 1 / 3)
    VerdictStore(path).add("judge", "j", [(comparison, verdict)])
    assert VerdictStore(path).get("j", comparison) == verdict


# -- the file ----------------------------------------------------------------------------------------------------


def test_the_first_verdict_stays(tmp_path: Path) -> None:
    store = VerdictStore(tmp_path / "v.jsonl")
    store.add("j", "j", [(ONE, Verdict(1.0))])
    store.add("j", "j", [(ONE, Verdict(0.0))])
    assert VerdictStore(store.path).get("j", ONE) == Verdict(1.0)
    assert list(store.table()["preference"]) == [1.0, 0.0]


def test_what_another_process_added_is_seen(tmp_path: Path) -> None:
    here, there = (VerdictStore(tmp_path / "v.jsonl") for _ in range(2))
    there.add("j", "j", [(ONE, Verdict(1.0))])
    assert here.get("j", ONE) is None
    here.refresh()
    assert here.get("j", ONE) == Verdict(1.0)


@pytest.mark.parametrize("kept", [1, 20, -2, -1])
def test_a_line_torn_by_a_kill_costs_that_line_only(tmp_path: Path, kept: int) -> None:
    """All but the file's last bytes were written; -1 leaves a whole record that only lacks its end of line."""
    path = tmp_path / "v.jsonl"
    first, torn, after = numbered(3)
    VerdictStore(path).add("j", "j", [(first, Verdict(1.0))])
    whole = path.read_bytes()
    VerdictStore(path).add("j", "j", [(torn, Verdict(0.0))])
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:kept])
    assert len(VerdictStore(path)) == 1
    VerdictStore(path).add("j", "j", [(after, Verdict(0.5))])
    store = VerdictStore(path)
    assert (store.get("j", first), store.get("j", after)) == (Verdict(1.0), Verdict(0.5))
    assert store.damaged == (kept != -1)
    assert (store.get("j", torn) is None) == (kept != -1)


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[1]",
        "{}",
        '{"key": "x"}',
        json.dumps({"key": "0" * 64, "identity": "j", "prompt": "p", "first": "a", "second": "b", "preference": 1}),
        json.dumps({"key": verdict_key("j", ONE), "identity": "j", "prompt": "p", "first": "a", "second": "b"}),
        json.dumps(
            {"key": verdict_key("j", ONE), "identity": "j", "prompt": "p", "first": "a", "second": "b", "preference": 7}
        ),
    ],
)
def test_a_line_that_is_no_verdict_is_passed_over_and_counted(tmp_path: Path, line: str) -> None:
    path = tmp_path / "v.jsonl"
    path.write_text(line + "\n")
    store = VerdictStore(path)
    assert (len(store), store.damaged, len(store.table())) == (0, 1, 0)
    store.add("j", "j", [(ONE, Verdict(0.0))])
    assert VerdictStore(path).get("j", ONE) == Verdict(0.0)


def test_a_verdict_whose_texts_were_changed_by_hand_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    VerdictStore(path).add("j", "j", [(ONE, Verdict(1.0))])
    path.write_text(path.read_text().replace('"first": "a"', '"first": "c"'))
    assert len(VerdictStore(path)) == 0


def _write(path: Path, writer: int) -> None:
    store = VerdictStore(path)
    for number in range(40):
        store.add("j", f"w{writer}", [(Comparison(f"p{number}", "a" * 3000, "b"), Verdict(1.0))])


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write, args=(path, writer)) for writer in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    store = VerdictStore(path)
    assert (len(store), store.damaged, [writer.exitcode for writer in writers]) == (80, 0, [0, 0])


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrefloopError, match="cannot be"):
        VerdictStore(tmp_path / "file" / "v.jsonl").add("j", "j", [(ONE, Verdict(1.0))])


# -- a judge that remembers --------------------------------------------------------------------------------------


def test_only_what_is_not_known_is_asked(tmp_path: Path) -> None:
    store, judge = VerdictStore(tmp_path / "v.jsonl"), Counting()
    comparisons = numbered(4)
    Remembered(judge, store).compare(comparisons[:2])
    verdicts = Remembered(judge, VerdictStore(store.path)).compare([*comparisons[::-1], comparisons[0]])
    assert judge.asked == [*comparisons[:2], comparisons[3], comparisons[2]]
    assert [verdict.reason for verdict in verdicts] == ["p3", "p2", "p1", "p0", "p0"]


def test_another_judge_does_not_get_its_verdicts(tmp_path: Path) -> None:
    store, judge = VerdictStore(tmp_path / "v.jsonl"), Counting()
    Remembered(judge, store).compare([ONE])
    other = Counting()
    other.identity = "counting/2"
    Remembered(other, store).compare([ONE])
    assert other.asked == [ONE]


def test_what_came_before_an_interruption_is_kept(tmp_path: Path) -> None:
    path, comparisons = tmp_path / "v.jsonl", numbered(5)
    with pytest.raises(KeyboardInterrupt):
        Remembered(Paying(stops_at=3), VerdictStore(path)).compare(comparisons)
    second = Paying()
    assert len(Remembered(second, VerdictStore(path)).compare(comparisons)) == 5
    assert second.asked == comparisons[3:]


def test_what_was_spent_before_is_charged_once(tmp_path: Path) -> None:
    path, comparisons = tmp_path / "v.jsonl", numbered(3)
    Remembered(Paying(), VerdictStore(path)).compare(comparisons)
    judge = Paying()
    again = Remembered(judge, VerdictStore(path))
    again.compare(comparisons[:2])
    again.compare(comparisons)
    assert judge.charged == [(0.5, 2), (0.25, 1)]


def test_no_verdict_is_asked_again_and_its_cost_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    (silent,) = Remembered(Paying(says=math.nan), VerdictStore(path)).compare([ONE])
    assert not silent.given
    judge = Paying()
    (verdict,) = Remembered(judge, VerdictStore(path)).compare([ONE])
    assert verdict.given
    assert (judge.asked, judge.charged) == ([ONE], [(0.25, 0)])
    assert "NaN" not in path.read_text()
