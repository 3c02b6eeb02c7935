"""What only all rows together show: repeats, contradictions, circles, lengths, and the dataset's statistics.

The rows pass by in chunks; what is kept of each is a few numbers, so that millions fit in memory.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from rensa import RMinHash
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from steps.intervals import wilson
from steps.readers import records
from steps.rows import CHUNK, PLACE, TEXTS, chunks, hashes
from steps.sources import File

ANSWERS = ["chosen", "rejected", "answer"]
COLUMNS = ["kind", *TEXTS, "tie", "margin", "score", "ratings", "annotator", "problem", *PLACE]
PERMUTATIONS, BANDS = 64, 8
NEAR = 0.9  # Jaccard similarity of their words from which two rows nearly repeat each other
TRANSCRIPT = re.compile(r"\s*Human:(.*?)(?:\n\nAssistant:|$)", re.DOTALL)
SHORTEST = 8  # words; below, a row is too short to be nearly another


@dataclass
class Overview:
    """What is known of all rows.

    Attributes:
        keys: text column → (n,) uint64 hashes of the normalised texts, 0 where there is none; where there are
            evaluation sets, `opening` too: what the user of a conversation says first.
        lengths: (n,) characters of the prompt and the longer answer.
        places: (n, 3) codes of source, file and line, for messages.
        repeats: row → the first row of the same content.
        near_repeats: row → an earlier row that is nearly the same.
        contradictions: row → a row with the same answers and the other label.
        cycles: row → how many answers its preference goes in a circle with.
        evaluation_keys: hashes of the normalised texts of the evaluation sets.
        latin_share: share of the letters that are Latin.
        statistics: numbers about the whole, for the report.
    """

    keys: dict[str, np.ndarray]
    lengths: np.ndarray
    places: pd.DataFrame
    repeats: dict[int, int] = field(default_factory=dict)
    near_repeats: dict[int, int] = field(default_factory=dict)
    contradictions: dict[int, int] = field(default_factory=dict)
    cycles: dict[int, int] = field(default_factory=dict)
    evaluation_keys: np.ndarray = field(default_factory=lambda: np.array([], dtype=np.uint64))
    latin_share: float = 1.0
    statistics: dict[str, float] = field(default_factory=dict)

    def place(self, row: int) -> str:
        """Where a row stands, for people."""
        source, line, part = (self.places[name].iloc[row] for name in ("file", "line", "part"))
        return f"{source} line {line}" + (f" ({part + 1})" if part else "")


def look_over(path: Path, evaluation_sets: Sequence[Path] = (), *, near: bool = True) -> Overview:
    """Pass over a table of canonical rows once.

    Args:
        evaluation_sets: files of any kind a source may be, whose texts must not be trained on.
        near: whether to look for near repeats.
    """
    parts: list[dict[str, np.ndarray]] = []
    places: list[pd.DataFrame] = []
    near_repeats = NearRepeats() if near else None
    letters = np.zeros(2)
    for table in chunks(path, [*COLUMNS, "turns"] if evaluation_sets else COLUMNS):
        part = _numbers(table)
        if evaluation_sets:
            part["opening"] = hashes(_openings(table["turns"]))
        parts.append(part)
        places.append(table.select(list(PLACE)).to_pandas().astype({"source": "category", "file": "category"}))
        letters += _letters(table)
        if near_repeats is not None:
            near_repeats.add(table, part["unread"])
    everything = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    if not everything:
        empty = np.array([], dtype=np.uint64)
        return Overview(dict.fromkeys(TEXTS, empty), empty.astype(int), pd.DataFrame(columns=list(PLACE)))
    place = _stacked(places)
    keys = {name: everything[name] for name in (*TEXTS, "opening") if name in everything}
    longer = np.maximum(
        np.maximum(everything["chosen_length"], everything["rejected_length"]), everything["answer_length"]
    )
    overview = Overview(keys, everything["prompt_length"] + longer, place)
    overview.latin_share = letters[1] / letters[0] if letters[0] else 1.0
    overview.repeats = _repeats(everything)
    record = place["file"].cat.codes.to_numpy().astype(np.int64) * 2**40 + place["line"].to_numpy()
    overview.near_repeats = {  # answers of one record are compared with each other, and may be alike
        row: other
        for row, other in (near_repeats.found(path) if near_repeats else {}).items()
        if row not in overview.repeats and record[row] != record[other]
    }
    overview.contradictions = _contradictions(everything)
    overview.cycles = _cycles(everything)
    overview.evaluation_keys = _evaluation_keys(evaluation_sets)
    overview.statistics = _statistics(everything, place)
    return overview


def _numbers(table: pa.Table) -> dict[str, np.ndarray]:
    """What is kept of each row: hashes and lengths of its texts, and what it says of them."""
    flags = {
        "tie": pc.fill_null(table["tie"], False),
        "unread": pc.is_valid(table["problem"]),
        "alone": pc.is_null(table["ratings"]),
        "kind": pc.fill_null(table["kind"], ""),
    }
    lengths = {f"{name}_length": pc.fill_null(pc.utf8_length(table[name]), 0) for name in TEXTS}
    numbers = {name: column.to_numpy(zero_copy_only=False) for name, column in (flags | lengths).items()}
    numbers |= {name: hashes(table[name]) for name in (*TEXTS, "annotator")}
    return numbers | {"score": table["score"].to_numpy(zero_copy_only=False).astype(float)}


def _letters(table: pa.Table) -> np.ndarray:
    """(2,) how many letters the texts have, and how many of them are Latin; texts of ASCII count whole."""
    letters = np.zeros(2)
    for name in TEXTS:
        plain = pc.fill_null(pc.string_is_ascii(table[name]), True)
        letters += pc.sum(pc.utf8_length(table[name].filter(plain))).as_py() or 0
        other = table[name].filter(pc.invert(plain))
        letters += [pc.sum(pc.count_substring_regex(other, rf"\p{{{kind}}}")).as_py() or 0 for kind in ("L", "Latin")]
    return letters


def _stacked(places: list[pd.DataFrame]) -> pd.DataFrame:
    from pandas.api.types import union_categoricals

    columns = {name: union_categoricals([part[name] for part in places]) for name in ("source", "file")}
    numbers = {name: np.concatenate([part[name].to_numpy() for part in places]) for name in ("line", "part")}
    return pd.DataFrame({**columns, **numbers})


def _mixed(*keys: np.ndarray) -> np.ndarray:
    """(n,) uint64: one hash of several; the order of the arguments counts."""
    mixed = np.zeros_like(keys[0])
    for key in keys:
        mixed = (mixed ^ key) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _repeats(rows: dict[str, np.ndarray]) -> dict[int, int]:
    """Row → the first row that says the same."""
    kinds = pd.util.hash_array(rows["kind"].astype(object), categorize=True)
    content = _mixed(kinds, *(rows[name] for name in TEXTS), rows["tie"].astype(np.uint64))
    content[rows["unread"] | (rows["kind"] == "")] = 0
    order = pd.Series(content)
    again = order.duplicated() & (content != 0)
    first = order[~order.duplicated()]
    firsts = pd.Series(first.index, index=first.to_numpy())
    return {int(row): int(firsts[content[row]]) for row in np.flatnonzero(again)}


def _pairs(rows: dict[str, np.ndarray]) -> np.ndarray:
    """Numbers of the rows that say one answer is better than another."""
    said = (rows["kind"] == "pair") & ~rows["tie"] & (rows["chosen"] != 0) & (rows["rejected"] != 0)
    return np.flatnonzero(said & (rows["chosen"] != rows["rejected"]))


def _contradictions(rows: dict[str, np.ndarray]) -> dict[int, int]:
    """Row → a row with the same prompt and the same two answers, the other one preferred.

    Of answers with thumbs up or down: a row with the same prompt and answer and the other thumb.
    """
    both = pd.concat([_judgements(rows), _thumbs(rows)], ignore_index=True)
    both = both[both.groupby("pair")["first"].transform("nunique") > 1]
    other = {(pair, way): int(group.iloc[0]) for (pair, way), group in both.groupby(["pair", "first"])["row"]}
    return {int(r.row): other[r.pair, not r.first] for r in both.itertuples()}


def _judgements(rows: dict[str, np.ndarray]) -> pd.DataFrame:
    """row, pair (the same for the same prompt and two answers, either way round), first (which of them is chosen)."""
    said = _pairs(rows)
    prompt, chosen, rejected = (rows[name][said] for name in ("prompt", "chosen", "rejected"))
    pair = _mixed(prompt, np.minimum(chosen, rejected), np.maximum(chosen, rejected))
    return pd.DataFrame({"row": said, "pair": pair, "first": chosen < rejected})


def _thumbs(rows: dict[str, np.ndarray]) -> pd.DataFrame:
    """row, pair (the same for the same prompt and answer), first (whether the thumb is up)."""
    said = np.flatnonzero((np.abs(rows["score"]) == 1) & rows["alone"] & (rows["answer"] != 0))
    pair = _mixed(rows["prompt"][said], rows["answer"][said])
    return pd.DataFrame({"row": said, "pair": pair, "first": rows["score"][said] > 0})


def _agreement(rows: dict[str, np.ndarray]) -> dict[str, float]:
    """How often two people who judged the same two answers preferred the same one, and what that allows a model.

    The observed agreement of Fleiss (1971), over judgements of known annotators, each counted once. Where annotators
    prefer one answer with probability p, they agree with a = p² + (1 − p)², and no model can foresee more than
    max(p, 1 − p) of their judgements; over all pairs that is at most (1 + √(2a − 1)) / 2, by Jensen's inequality.
    """
    said = _judgements(rows).assign(annotator=lambda frame: rows["annotator"][frame["row"]])
    said = said[said["annotator"] != 0].drop_duplicates(["pair", "annotator"])
    counts = said.groupby("pair")["first"].agg(["size", "sum"]).to_numpy(dtype=float)
    judged, first = counts[counts[:, 0] > 1].T
    twos = float((judged * (judged - 1)).sum())
    if not twos:
        return {}
    alike = float((first * (first - 1) + (judged - first) * (judged - first - 1)).sum()) / twos
    ceiling = (1 + max(2 * alike - 1, 0) ** 0.5) / 2
    return {"pairs_judged_again": float(len(judged)), "annotators_agree": alike, "annotators_ceiling": ceiling}


def _cycles(rows: dict[str, np.ndarray]) -> dict[int, int]:
    """Row → the number of answers, three or more, that its preference goes in a circle with.

    Answers are the nodes of a graph, preferences its edges from chosen to rejected; a circle lies within a strongly
    connected component.
    """
    pairs = _pairs(rows)
    if not len(pairs):
        return {}
    prompt, chosen, rejected = (rows[name][pairs] for name in ("prompt", "chosen", "rejected"))
    nodes, ends = np.unique(np.concatenate([_mixed(prompt, chosen), _mixed(prompt, rejected)]), return_inverse=True)
    start, end = ends[: len(pairs)], ends[len(pairs) :]
    graph = coo_array((np.ones(len(pairs)), (start, end)), shape=(len(nodes), len(nodes)))
    _, component = connected_components(graph, connection="strong")
    size = np.bincount(component)[component]
    inside = (component[start] == component[end]) & (size[start] >= 3)
    return {int(row): int(count) for row, count in zip(pairs[inside], size[start][inside], strict=True)}


class NearRepeats:
    """Finds rows whose answers are nearly those of an earlier row (MinHash, Broder 1997).

    Rows that share a band of their sketches are candidates; whether they are near is said by the Jaccard similarity of
    their sets of words, for which their texts are read once more. A row is held against the first row of each of its
    bands only, so that a thousand answers of one template cost a thousand comparisons and not half a million.
    """

    def __init__(self) -> None:
        self._bands: list[np.ndarray] = []

    def add(self, table: pa.Table, unread: np.ndarray) -> None:
        """Look at the next rows."""
        tokens, offsets = _tokens(table)
        sketches = RMinHash.digest_matrix_from_flat_token_hashes(tokens, offsets.astype(np.uint64), PERMUTATIONS, 0)
        bands = np.array(sketches.to_rows(), dtype=np.uint64).reshape(-1, BANDS, PERMUTATIONS // BANDS)
        mixed = _mixed(*bands.transpose(2, 0, 1))
        mixed[unread | (np.diff(offsets) < SHORTEST)] = 0
        self._bands.append(mixed)

    def found(self, path: Path) -> dict[int, int]:
        """Row → the first earlier row it nearly repeats."""
        candidates = self._candidates()
        firsts = {first for firsts in candidates.values() for first in firsts}
        words: dict[int, np.ndarray] = {}
        near: dict[int, int] = {}
        begins = 0
        for table in chunks(path, ANSWERS) if candidates else ():
            rows = [row for row in range(begins, begins + len(table)) if row in candidates or row in firsts]
            tokens, offsets = _tokens(table.take(pa.array([row - begins for row in rows], pa.int64())))
            for place, row in enumerate(rows):
                its = np.unique(tokens[offsets[place] : offsets[place + 1]])
                if row in firsts:
                    words[row] = its
                like = (first for first in candidates.get(row, ()) if jaccard(its, words[first]) >= NEAR)
                if (first := next(like, None)) is not None:
                    near[row] = first
            begins += len(table)
        return near

    def _candidates(self) -> dict[int, list[int]]:
        """Row → the first rows of its bands, where they are earlier ones."""
        bands = np.concatenate(self._bands) if self._bands else np.zeros((0, BANDS), dtype=np.uint64)
        found: dict[int, set[int]] = {}
        for band in bands.T:
            _, first, where = np.unique(band, return_index=True, return_inverse=True)
            earlier = first[where]
            for row in np.flatnonzero((band != 0) & (earlier != np.arange(len(band)))).tolist():
                found.setdefault(row, set()).add(int(earlier[row]))
        return {row: sorted(firsts) for row, firsts in found.items()}


def _tokens(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(tokens,) uint64 hashes of the words of each row's answers, in lower case, and (rows + 1,) where each begins."""
    sides = (pc.fill_null(table[name], "") for name in ANSWERS)
    said = pc.utf8_trim_whitespace(pc.utf8_lower(pc.binary_join_element_wise(*sides, " ")))
    words = pc.utf8_split_whitespace(said).combine_chunks()
    spelled = words.flatten().dictionary_encode()
    hashed = pd.util.hash_array(spelled.dictionary.to_numpy(zero_copy_only=False).astype(object), categorize=False)
    return hashed[spelled.indices.to_numpy()], words.offsets.to_numpy().astype(np.int64)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sets, each sorted and without repeats."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / max(len(one) + len(other) - both, 1)


def _evaluation_keys(paths: Iterable[Path]) -> np.ndarray:
    """Hashes of every text in the evaluation sets, wherever in a record it stands."""
    found = [np.array([], dtype=np.uint64)]
    for path in paths:
        read = records(File("evaluation_sets", path.name, path))
        texts = (text.encode("utf-8", "replace").decode() for record in read for text in _texts(record.value))
        while part := list(itertools.islice(texts, CHUNK)):
            found.append(hashes(pa.chunked_array([pa.array(part, pa.string())])))
    keys = np.unique(np.concatenate(found))
    return keys[keys != 0]


def _texts(value: object) -> Iterator[str]:
    """Every text in a value; of a transcript also what is said first."""
    if isinstance(value, str):
        yield value
        if said := TRANSCRIPT.match(value):
            yield said.group(1)
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _openings(turns: pa.ChunkedArray) -> pa.ChunkedArray:
    """(rows,) the first turn that is not the system's, null where there is no conversation."""
    found = []
    for chunk in turns.chunks:
        said = chunk.flatten()
        begins = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(chunk), 0).to_numpy())])
        roles = pc.equal(said.field("role"), "system").to_numpy(zero_copy_only=False).astype(int)
        place = begins[:-1] + np.append(roles, 0)[begins[:-1]]
        there = place < begins[1:]
        found.append(said.field("content").take(pa.array(np.where(there, place, 0), mask=~there)))
    return pa.chunked_array(found, pa.string())


def _statistics(rows: dict[str, np.ndarray], places: pd.DataFrame) -> dict[str, float]:
    """Numbers about the whole: lengths, the bias for the longer answer, ties, sources, prompts."""
    said = _pairs(rows)
    chosen, rejected = rows["chosen_length"][said], rows["rejected_length"][said]
    unequal = chosen != rejected
    count = int(unequal.sum())
    found: dict[str, float] = {
        "prompts": float(len(np.unique(rows["prompt"][rows["prompt"] != 0]))),
        "pairs": float(len(said)),
        "ties": float(rows["tie"].sum()),
        "largest_source_share": float(places["source"].value_counts(normalize=True).max()),
        "sources": float(places["source"].nunique()),
    }
    found |= _agreement(rows)
    if count:
        longer = int((chosen > rejected).sum())
        low, high = wilson(longer, count)
        found |= {"longer_chosen": longer / count, "longer_chosen_low": low, "longer_chosen_high": high}
    return found
