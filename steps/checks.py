"""What can be wrong with preference data: each check finds rows and says why. Pure functions, no framework.

`CHECKS` is the table: a name, what the check looks for, what is done about a row it finds unless the registry says
otherwise (`quarantine`, `warn` or `stop`), and the function. A check is given a chunk of canonical rows and what is
known of all of them (`steps.overview`); it returns {row of the chunk: reason}.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ftfy.badness import is_bad

from steps.datasets import Rules, Severity
from steps.overview import Overview
from steps.rows import TEXTS

Found = dict[int, str]

CONTROL = "[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd\ufffe\uffff]|\\x00"
# What each kind of row must say.
NEEDED = {"pair": ("prompt", "chosen", "rejected"), "rated": ("prompt", "answer"), "prompt": ("prompt",)}
NEEDED["demonstration"] = ("prompt", "answer")
PERSONAL = {
    "EMAIL": r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}",
    "CARD": r"\b(?:\d[ -]?){12,18}\d\b",
    "PHONE": r"\B\+\d(?:[ ().-]{0,2}\d){7,14}\b|\(\d{2,4}\)[ .-]?\d{3,4}[ .-]\d{3,4}\b"
    r"|\b\d{3}[ .-]\d{3}[ .-]\d{4}\b|\b0\d{2,4}[ -]\d{3,4}[ -]\d{3,4}\b",
}


@dataclass(frozen=True)
class Chunk:
    """Some rows of a dataset.

    Attributes:
        rows: canonical rows.
        first: the number of the first of them among all rows.
        all: what is known of all rows together.
        rules: the registry's bounds.
        needs_prompt: whether a row without a prompt is at fault; not where the split makes prompts itself.
    """

    rows: pa.Table
    first: int
    all: Overview
    rules: Rules
    needs_prompt: bool = True

    def column(self, name: str) -> pa.ChunkedArray:
        return self.rows[name]

    def where(self, mask: pa.ChunkedArray) -> list[int]:
        """Rows of the chunk a mask is true for."""
        return np.flatnonzero(pc.fill_null(mask, False).to_numpy(zero_copy_only=False)).tolist()

    def numbers(self, name: str) -> np.ndarray:
        """(rows,) a numeric column, NaN where it says nothing."""
        return self.rows[name].to_numpy(zero_copy_only=False).astype(float)

    def text(self, name: str, row: int) -> str:
        return self.rows[name][row].as_py() or ""

    def matching(self, pattern: str, *, ascii: bool = True) -> list[tuple[int, str]]:
        """(row, column) of every text a regular expression (RE2) fits; texts all of ASCII left out where asked."""
        found = []
        for name in TEXTS:
            texts = self.rows[name]
            if texts.null_count == len(texts) or (not ascii and pc.all(pc.string_is_ascii(texts)).as_py() is True):
                continue
            found += [(row, name) for row in self.where(pc.match_substring_regex(texts, pattern))]
        return found


def _merged(found: list[tuple[int, str]]) -> Found:
    """One reason a row, for checks that look at several of its texts."""
    merged: dict[int, list[str]] = {}
    for row, why in found:
        merged.setdefault(row, []).append(why)
    return {row: "; ".join(whys) for row, whys in sorted(merged.items())}


# -- what reading found ------------------------------------------------------------------------------------------


def _fault(name: str) -> Callable[[Chunk], Found]:
    def find(chunk: Chunk) -> Found:
        return {row: chunk.text("problem", row) for row in chunk.where(pc.equal(chunk.column("fault"), name))}

    return find


def unreadable(chunk: Chunk) -> Found:
    """A record that is no row; also one with half a surrogate pair, where the registry lets `encoding` pass."""
    found = _fault("unreadable")(chunk)
    if chunk.rules.of("encoding").severity in ("warn", "off"):
        found |= _fault("encoding")(chunk)
    return found


# -- one row at a time -------------------------------------------------------------------------------------------


def empty(chunk: Chunk) -> Found:
    """A text that is missing, or holds nothing but white space."""
    found = []
    kinds = chunk.column("kind")
    for name in TEXTS:
        needing = [kind for kind, needed in NEEDED.items() if name in needed]
        if name == "prompt" and not chunk.needs_prompt:
            continue
        needed = pc.is_in(kinds, pa.array(needing))
        texts = chunk.column(name)
        for row in chunk.where(pc.and_(needed, pc.is_null(texts))):
            found.append((row, f"{name} is missing"))
        blank = pc.invert(pc.match_substring_regex(texts, r"[^\s\v\pZ\p{Cf}\x{0085}]"))
        for row in chunk.where(pc.and_(needed, pc.and_(pc.is_valid(texts), blank))):
            found.append((row, f"{name} is empty"))
    return _merged(found)


def encoding(chunk: Chunk) -> Found:
    """Control and replacement characters, and halves of surrogate pairs."""
    broken = [(row, f"{name} holds control or replacement characters") for row, name in chunk.matching(CONTROL)]
    return _merged([*_fault("encoding")(chunk).items(), *broken])


def mojibake(chunk: Chunk) -> Found:
    """Text that was decoded with the wrong table, such as â€™ for an apostrophe (ftfy's judgement)."""
    return _merged(
        [
            (row, f"{name} looks decoded with the wrong table")
            for row, name in chunk.matching(r"[\x{0080}-\x{ffff}]", ascii=False)
            if is_bad(chunk.text(name, row))
        ]
    )


def script(chunk: Chunk) -> Found:
    """Text mostly in another script than Latin, in a dataset that is mostly Latin."""
    if chunk.all.latin_share < 0.9:
        return {}
    found = []
    for row, name in chunk.matching(r"[^\p{Latin}\P{L}]", ascii=False):
        letters = [letter for letter in chunk.text(name, row) if letter.isalpha()]
        foreign = sum(ord(letter) > 0x24F for letter in letters)
        if foreign > len(letters) / 2:
            found.append((row, f"{name} is mostly in another script than the rest"))
    return _merged(found)


def same_sides(chunk: Chunk) -> Found:
    """Chosen and rejected that are the same but for case, width, spaces and outer punctuation."""
    keys = chunk.all.keys
    rows = slice(chunk.first, chunk.first + len(chunk.rows))
    same = (keys["chosen"][rows] == keys["rejected"][rows]) & (keys["chosen"][rows] != 0)
    return dict.fromkeys(np.flatnonzero(same).tolist(), "chosen and rejected are the same")


def label_against_score(chunk: Chunk) -> Found:
    """A chosen side that scores below the rejected one."""
    margins = chunk.numbers("margin")
    return {row: f"chosen scores {-margins[row]:g} below rejected" for row in np.flatnonzero(margins < 0).tolist()}


def score_range(chunk: Chunk) -> Found:
    """A rated answer without a score, or with one outside the registry's `score_range`."""
    scores = chunk.numbers("score")
    low, high = chunk.rules.score_range or (-np.inf, np.inf)
    missing = chunk.where(pc.and_(pc.equal(chunk.column("kind"), "rated"), pc.is_null(chunk.column("score"))))
    outside = np.flatnonzero((scores < low) | (scores > high)).tolist()
    return dict.fromkeys(missing, "score is missing") | {
        row: f"score {scores[row]:g} is outside {low:g} to {high:g}" for row in outside
    }


def raters(chunk: Chunk) -> Found:
    """A rated answer that too few people rated."""
    if not chunk.rules.min_raters:
        return {}
    counts = pc.fill_null(pc.list_value_length(chunk.column("ratings")), 0).to_numpy(zero_copy_only=False)
    few = chunk.where(
        pc.and_(pc.equal(chunk.column("kind"), "rated"), pa.chunked_array([counts < chunk.rules.min_raters]))
    )
    return {row: f"{counts[row]} raters, fewer than {chunk.rules.min_raters}" for row in few}


def score_against_ratings(chunk: Chunk) -> Found:
    """A score that is not the mean of the raw ratings beside it."""
    found = {}
    ratings, scores = chunk.column("ratings"), chunk.numbers("score")
    for row in chunk.where(pc.greater(pc.list_value_length(ratings), 0)):
        mean = float(np.mean(ratings[row].as_py()))
        if abs(mean - scores[row]) > 0.01:
            found[row] = f"score {scores[row]:g} is not the mean of the raw ratings, {mean:.3f}"
    return found


def too_long(chunk: Chunk) -> Found:
    """Prompt and longer answer together over the registry's `max_chars`."""
    if not chunk.rules.max_chars:
        return {}
    rows = slice(chunk.first, chunk.first + len(chunk.rows))
    lengths = chunk.all.lengths[rows]
    return {
        row: f"{lengths[row]} characters, {lengths[row] - chunk.rules.max_chars} over the budget"
        for row in np.flatnonzero(lengths > chunk.rules.max_chars).tolist()
    }


def personal(chunk: Chunk) -> Found:
    """E-mail addresses, phone numbers, and card numbers whose check digit is right."""
    found = []
    for label, pattern in PERSONAL.items():
        for row, name in chunk.matching(pattern):
            if any(_is_personal(label, match) for match in re.findall(pattern, chunk.text(name, row))):
                found.append((row, f"{name} holds what looks like {_named(label)}"))
    return _merged(found)


def _named(label: str) -> str:
    return {"EMAIL": "an e-mail address", "PHONE": "a phone number", "CARD": "a card number"}[label]


def _is_personal(label: str, match: str) -> bool:
    return label != "CARD" or luhn([int(letter) for letter in match if letter.isdigit()])


def luhn(digits: list[int]) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def redacted(text: str) -> str:
    """Text with labels written over what looks like personal data."""
    for label, pattern in PERSONAL.items():
        text = re.sub(pattern, _hidden(label), text)
    return text


def _hidden(label: str) -> Callable[[re.Match[str]], str]:
    return lambda match: f"[{label}]" if _is_personal(label, match.group()) else match.group()


# -- rows among rows ---------------------------------------------------------------------------------------------


def _of_all(attribute: str, reason: Callable[[Overview, int, int], str]) -> Callable[[Chunk], Found]:
    """A check of what `steps.overview` found: {row: another row} over all rows."""

    def find(chunk: Chunk) -> Found:
        pairs: dict[int, int] = getattr(chunk.all, attribute)
        rows = range(chunk.first, chunk.first + len(chunk.rows))
        return {row - chunk.first: reason(chunk.all, row, pairs[row]) for row in rows if row in pairs}

    return find


def evaluation_leak(chunk: Chunk) -> Found:
    """A prompt, opening of a conversation or answer that stands in one of the registry's `evaluation_sets`."""
    rows = slice(chunk.first, chunk.first + len(chunk.rows))
    return _merged(
        [
            (row, f"{name} stands in an evaluation set")
            for name, keys in chunk.all.keys.items()
            for row in np.flatnonzero(np.isin(keys[rows], chunk.all.evaluation_keys)).tolist()
        ]
    )


# -- the table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        looks_for: in words, for reports.
        severity: what is done about a row unless the registry says otherwise.
        find: {row of a chunk: reason}.
        unreadable: whether such a row has no texts, so that it cannot be kept with a warning.
    """

    looks_for: str
    severity: Severity
    find: Callable[[Chunk], Found]
    unreadable: bool = False


CHECKS: dict[str, Check] = {
    "unreadable": Check("records that are no row", "quarantine", unreadable, True),
    "not_text": Check("numbers, booleans, lists where text belongs", "quarantine", _fault("not_text"), True),
    "turns": Check("roles out of order, a last turn not the assistant's", "quarantine", _fault("turns"), True),
    "prompts_differ": Check("two sides with different prompts", "quarantine", _fault("prompts_differ"), True),
    "empty": Check("a side or prompt that is missing or blank", "quarantine", empty),
    "encoding": Check("control characters, halves of surrogate pairs", "quarantine", encoding),
    "mojibake": Check("text decoded with the wrong table", "warn", mojibake),
    "script": Check("text in another script than the rest", "warn", script),
    "same_sides": Check("chosen equal to rejected", "quarantine", same_sides),
    "repeated": Check(
        "rows that repeat an earlier one",
        "quarantine",
        _of_all("repeats", lambda all, row, first: f"repeats {all.place(first)}"),
    ),
    "near_repeat": Check(
        "rows that nearly repeat an earlier one (MinHash)",
        "warn",
        _of_all("near_repeats", lambda all, row, first: f"nearly repeats {all.place(first)}"),
    ),
    "both_labels": Check(
        "the same two answers, each preferred once",
        "quarantine",
        _of_all("contradictions", lambda all, row, other: f"{all.place(other)} says the opposite"),
    ),
    "cycle": Check(
        "preferences of one prompt that go round in a circle",
        "warn",
        _of_all("cycles", lambda all, row, size: f"part of a circle among {size} answers to this prompt"),
    ),
    "label_against_score": Check("a chosen side that scores less", "quarantine", label_against_score),
    "score_range": Check("a score that is missing or out of range", "quarantine", score_range),
    "raters": Check("answers with too few raters", "quarantine", raters),
    "score_against_ratings": Check("a score that is not the ratings' mean", "quarantine", score_against_ratings),
    "evaluation_leak": Check("texts of a named evaluation set", "quarantine", evaluation_leak),
    "too_long": Check("rows over the budget of characters", "warn", too_long),
    "personal": Check("e-mail addresses, phone and card numbers", "warn", personal),
}
