"""Chain of Hindsight: two answers and what people thought of them, chained into one text to be learnt from.

Liu, Sferrazza & Abbeel 2023, "Chain of Hindsight Aligns Language Models with Feedback", arXiv:2302.02676, §2: feedback
is put into words in front of the answer it is about, and the model learns to predict the answers, not the feedback
(eq. 2). Asked with the words of praise, it then gives the kind of answer that was praised.

A token the second answer could copy from the first is sometimes hidden from it (§2, against the shortcut of copying).
Hiding is done in attention, as the authors' forgetful causal masking does (Liu et al. 2022, arXiv:2210.13432): the
token stays in its place, and what comes later cannot look at it. Here only tokens of the good answer are hidden, and
only from what follows it, where the paper hides any token of the past.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

GOOD, BAD = 1, -1
NEITHER = 0  # the side of a token of prompt or feedback
SIDES = {"good": GOOD, "bad": BAD}
IGNORED = -100  # the label of a token that is not learnt


@dataclass(frozen=True)
class Template:
    """In what words feedback is given, and in which order the answers come.

    Attributes:
        feedback: what stands in front of each answer.
        sides: GOOD or BAD for each; an answer may be left out.
    """

    feedback: tuple[str, ...]
    sides: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """A template from text that holds {good} and {bad}, or one of them.

        Raises:
            ValueError: it is not such a text.
        """
        feedback: list[str] = []
        sides: list[int] = []
        before = ""
        for words, field, form, conversion in string.Formatter().parse(text):
            before += words
            if field is None:  # a brace that was doubled, or the end
                continue
            if field not in SIDES or form or conversion:
                raise ValueError(f"knows {{good}} and {{bad}}, found {{{field}}}")
            feedback.append(before)
            sides.append(SIDES[field])
            before = ""
        if not sides:
            raise ValueError("holds neither {good} nor {bad}")
        if before:
            raise ValueError(f"nothing is learnt of what follows the last answer, found {before!r}")
        if len(set(sides)) < len(sides):
            raise ValueError("holds an answer twice")
        return cls(tuple(feedback), tuple(sides))


def openings(templates: Sequence[Template]) -> dict[int, str]:
    """The words that a good and a bad answer are asked for with: those of the first template that begins with it."""
    found: dict[int, str] = {}
    for template in templates:
        found.setdefault(template.sides[0], template.feedback[0])
    return found


def draws_of(seed: int, row: int, epoch: int) -> np.random.Generator:
    """The random numbers of a pair in an epoch. They depend on nothing else, so that a resumed run repeats them."""
    return np.random.default_rng([seed, row, epoch])


@dataclass(frozen=True)
class Chain:
    """A sequence to be learnt from: prompt, feedback, answer, and perhaps feedback and answer again.

    Attributes:
        ids: (L,) tokens; each answer ends with the end token, so that asked for one the model stops after it.
        sides: (L,) GOOD or BAD for tokens of an answer, its end included, NEITHER for those of prompt and feedback.
        blind_from: the first place after the first answer; L where it is the only one.
        hidden: places of tokens that those from `blind_from` on cannot look at.
    """

    ids: tuple[int, ...]
    sides: tuple[int, ...]
    blind_from: int
    hidden: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        sides: Sequence[int],
        openers: Sequence[Sequence[int]],
        answers: Mapping[int, Sequence[int]],
    ) -> Chain:
        """Answers in the order of `sides`, each after its opener.

        Args:
            openers: tokens in front of each answer: prompt and feedback of the first, feedback alone of the second.
            answers: by side, tokens with their end.
        """
        ids: list[int] = []
        kinds: list[int] = []
        ends: list[int] = []
        for side, opener in zip(sides, openers, strict=True):
            ids += [*opener, *answers[side]]
            kinds += [NEITHER] * len(opener) + [side] * len(answers[side])
            ends.append(len(ids))
        return cls(tuple(ids), tuple(kinds), ends[0])

    @property
    def labels(self) -> list[int]:
        """(L,) the tokens of answers, −100 elsewhere: the indicator of eq. 2."""
        return [token if side else IGNORED for token, side in zip(self.ids, self.sides, strict=True)]

    def hiding(self, least: float, most: float, draw: np.random.Generator) -> Chain:
        """The same with some of the good answer's tokens hidden from the bad one, if that comes second.

        Args:
            least, most: a share of the tokens is drawn between these. Their number is rounded up or down at random, so
                that each is hidden with the share's probability however short the answer; its end is never hidden.
        """
        if self.sides[self.blind_from - 1] != GOOD or self.blind_from == len(self.ids):
            return self
        first = self.sides.index(GOOD)
        count = self.blind_from - 1 - first
        hidden = int(draw.uniform(least, most) * count + draw.random())
        places = first + np.sort(draw.choice(count, hidden, replace=False)) if hidden else ()
        return replace(self, hidden=tuple(int(place) for place in places))

    def cut(self, length: int | None) -> Chain:
        """As far as `length` tokens."""
        if length is None or len(self.ids) <= length:
            return self
        hidden = tuple(place for place in self.hidden if place < length)
        return Chain(self.ids[:length], self.sides[:length], min(self.blind_from, length), hidden)


def visible(chains: Sequence[Chain]) -> np.ndarray:
    """Who may look at whom.

    Args:
        chains: B of them, the longest of L tokens.

    Returns:
        (B, L, L) of bool: whether the token in the second place sees that in the third. All see those before
        themselves, and themselves; none sees padding, which stands on the right; those from `blind_from` on see no
        hidden token.
    """
    width = max(len(chain.ids) for chain in chains)
    found = np.repeat(np.tri(width, dtype=bool)[None], len(chains), axis=0)
    for number, chain in enumerate(chains):
        found[number, :, len(chain.ids) :] = False
        found[number, chain.blind_from :, list(chain.hidden)] = False
    return found
