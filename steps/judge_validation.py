"""Does a judge say what people say? A judge is tried on pairs people judged before its word counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steps.agreement import (
    cohen_kappa,
    fleiss_kappa,
    length_bias,
    rater_ceiling,
    right_in_both_orders,
    share_of,
    swap_consistency,
)
from steps.errors import DataError, PrefloopError
from steps.judges import BothOrders, Comparison, Judge, Verdict
from steps.readers import records
from steps.sources import File

RATER = "rater"
LEAST_PAIRS_A_SILENCE = 20
_TEXTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class JudgeReport:
    """How a judge did on pairs that people judged. A share is of the pairs that got a verdict.

    Attributes:
        judge, identity: of the judge.
        pairs, judged: all pairs, and those the judge came to a verdict on.
        accuracy, low, high: share ordered as people did, a tie counted ½, with its Wilson interval.
        right_in_both_orders: share ordered so whichever answer was shown first; guessing gives ¼.
        swap_consistency: share of verdicts that stayed with the same answer when the two changed places.
        first: of the verdicts in either order that were no tie, the share for the answer shown first.
        ties: share of ties.
        longer, human_longer: how often judge and people are for the longer answer (characters), over pairs of
            different length, people on the pairs the judge decided.
        kappa: Cohen's κ of judge and people.
        fleiss: Fleiss' κ of the raters among themselves; None without raters.
        raters_agree: how often two people say the same; None where it is not known.
        ceiling: how often one person says what the others, or the label, say; None where it is not known.
        confidence: of the interval.
    """

    judge: str
    identity: str
    pairs: int
    judged: int
    accuracy: float
    low: float
    high: float
    right_in_both_orders: float
    swap_consistency: float
    first: float
    ties: float
    longer: float
    human_longer: float
    kappa: float
    fleiss: float | None
    raters_agree: float | None
    ceiling: float | None
    confidence: float

    def facts(self) -> dict[str, float]:
        """Flat numbers by names that begin with `judge_`; what is not known is left out."""
        values = {
            name: value for name, value in asdict(self).items() if name not in ("judge", "identity", "confidence")
        }
        named = {"low": "accuracy_low", "high": "accuracy_high"}
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        return {f"judge_{named.get(name, name)}": value for name, value in known.items()}

    def sentence(self) -> str:
        """The report in a few sentences."""
        ceiling = "" if self.ceiling is None else f" (one person: {self.ceiling:.1%})"
        said = (
            f"The {self.judge} judge orders {self.accuracy:.1%} of {self.judged:,} human pairs as people did "
            f"({self.confidence:.0%} interval {self.low:.1%} to {self.high:.1%}){ceiling}, "
            f"{self.right_in_both_orders:.1%} of them in both orders; κ {_number(self.kappa)}."
        )
        if self.swap_consistency < 1:
            said += f" When the answers change places, {self.swap_consistency:.1%} of its verdicts stay."
        if not math.isnan(self.longer):
            said += f" It is for the longer answer in {self.longer:.1%}, people in {self.human_longer:.1%}."
        if self.judged < self.pairs:
            said += f" On {self.pairs - self.judged:,} of {self.pairs:,} pairs it came to no verdict."
        return said


def validate(judge: Judge, pairs: pd.DataFrame, confidence: float = 0.95) -> JudgeReport:
    """Try a judge on pairs that people judged, in both orders.

    Args:
        judge: one that looks at one order only is asked in both, and where it contradicts itself that is a tie.
        pairs: prompt, chosen, rejected. Columns whose names begin with `rater` hold what each person said: 1 for the
            chosen side, 0 for the other, ½ for a tie, NaN for nothing. Or a column `agreement` holds the share of
            people who were for the chosen side.

    Raises:
        DataError: no pairs, or a column is missing.
        PrefloopError: no verdict on any pair.
    """
    if missing := [name for name in _TEXTS if name not in pairs]:
        raise DataError("pairs to try a judge on lack a column", have=", ".join(pairs.columns), then=", ".join(missing))
    if not len(pairs):
        raise DataError("there are no human pairs to try the judge on", then="hold more pairs out, or name a file")
    verdicts = _verdicts(judge, pairs)
    preferences = np.array([verdict.preference for verdict in verdicts])
    judged = ~np.isnan(preferences)
    if not judged.any():
        raise PrefloopError(f"the {judge.name} judge came to no verdict on any pair", have=verdicts[0].reason)
    orders = np.array([verdict.orders for verdict in verdicts], float).T
    people = np.ones(len(pairs))  # the chosen side comes first
    lengths = [pairs[side].str.len().to_numpy(float) for side in ("chosen", "rejected")]
    accuracy, swaps = share_of(preferences, confidence), swap_consistency(orders[0], orders[1], confidence)
    bias = length_bias(preferences, lengths[0], lengths[1], people, confidence)
    raters_agree, ceiling = _ceiling(pairs)
    return JudgeReport(
        judge=judge.name,
        identity=judge.identity,
        pairs=len(pairs),
        judged=int(judged.sum()),
        accuracy=accuracy.share,
        low=accuracy.low,
        high=accuracy.high,
        right_in_both_orders=right_in_both_orders(orders[0], orders[1], people, confidence).share,
        swap_consistency=swaps.same.share,
        first=swaps.first.share,
        ties=float((preferences[judged] == 0.5).mean()),
        longer=bias.longer.share,
        human_longer=bias.human_longer.share if bias.human_longer else math.nan,
        kappa=_kappa(preferences[judged]),
        fleiss=_fleiss(pairs),
        raters_agree=raters_agree,
        ceiling=ceiling,
        confidence=confidence,
    )


def labelled_pairs(path: Path) -> pd.DataFrame:
    """Pairs that people judged, from JSON, JSON lines or any other file data may come in (`steps.readers`).

    Args:
        path: records of {prompt, chosen, rejected} or of {input, output_1, output_2, label} with label 1 or 2, as in
            LLMBar (Zeng et al. 2023, arXiv:2310.07641). `agreement` and what begins with `rater` is taken along.

    Returns:
        table of prompt, chosen, rejected and what was taken along.

    Raises:
        DataError: the file cannot be read, or a record is none of these; with its line.
    """
    rows = [_pair(record, line, path) for line, record in _records(path)]
    if not rows:
        raise DataError("the file holds no pairs", where=str(path))
    return pd.DataFrame(rows)


# -- measuring ---------------------------------------------------------------------------------------------------


def _verdicts(judge: Judge, pairs: pd.DataFrame) -> list[Verdict]:
    """A verdict on each pair, chosen side first, that says what became of it in both orders."""
    columns = (pairs[name].astype(str) for name in _TEXTS)
    comparisons = [Comparison(*texts) for texts in zip(*columns, strict=True)]
    verdicts = judge.compare(comparisons[:1])
    # What kind of judge it is shows at the first pair; the other order of all is asked only where it is needed.
    asked = judge if verdicts[0].orders is not None else BothOrders(judge)
    return asked.compare(comparisons)


def _kappa(preferences: np.ndarray) -> float:
    """Cohen's κ with people, each pair taken in both orders, so that no side is the usual one."""
    both = np.concatenate([preferences, 1 - preferences])
    people = np.repeat([1.0, 0.0], len(preferences))
    return cohen_kappa(both.tolist(), people.tolist()).kappa


def _raters(pairs: pd.DataFrame) -> np.ndarray | None:
    """(pairs, raters) what each person said, or None where fewer than two are known."""
    names = [name for name in pairs if str(name).startswith(RATER)]
    return pairs[names].to_numpy(float) if len(names) > 1 else None


def _fleiss(pairs: pd.DataFrame) -> float | None:
    ratings = _raters(pairs)
    if ratings is None or np.isnan(ratings).any(1).all():
        return None
    return fleiss_kappa(np.concatenate([ratings, 1 - ratings]))


def _ceiling(pairs: pd.DataFrame) -> tuple[float | None, float | None]:
    """(how often two people say the same, how often one says what the others or the label say)."""
    ratings = _raters(pairs)
    if ratings is not None and ((~np.isnan(ratings)).sum(1) > 1).any():
        found = rater_ceiling(ratings)
        return found.rater_against_rater, found.rater_against_rest
    if "agreement" in pairs and pairs["agreement"].notna().any():
        share = pairs["agreement"].dropna().to_numpy(float)
        return float((share**2 + (1 - share) ** 2).mean()), float(share.mean())
    return None, None


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.2f}"


# -- reading -----------------------------------------------------------------------------------------------------


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Records with the lines they begin in."""
    for record in records(File("pairs", str(path), path)):
        if record.problem:
            then = "mend it, or take it out"
            raise DataError(
                "a record cannot be read", where=f"{path}, line {record.line}", have=record.problem, then=then
            )
        yield record.line, record.value


def _pair(record: Any, line: int, path: Path) -> dict[str, Any]:
    fields = record if isinstance(record, dict) else {}
    if "output_1" in fields:
        label = str(fields.get("label"))
        outputs = [fields.get("output_1"), fields.get("output_2")]
        chosen, rejected = outputs if label == "1" else outputs[::-1]
        pair = {"prompt": fields.get("input"), "chosen": chosen, "rejected": rejected}
        sound = label in ("1", "2")
    else:
        pair = {name: fields.get(name) for name in _TEXTS}
        sound = True
    if not sound or not all(isinstance(text, str) for text in pair.values()):
        raise DataError(
            "a record is no labelled pair",
            where=f"{path}, line {line}",
            have=f"fields {', '.join(map(str, fields)) or 'none'}" + ("" if sound else f", label {label!r}"),
            then="give {prompt, chosen, rejected} or {input, output_1, output_2, label: 1 or 2}, all of them text",
        )
    more = {name: value for name, value in fields.items() if name == "agreement" or name.startswith(RATER)}
    return {**pair, **more}
