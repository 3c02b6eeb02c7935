"""What a record of each format means, as canonical rows. A new format is a function here and a line in `FORMATS`.

A function gets a record's fields, renamed as the registry's `columns` say, and returns the rows it stands for: one for
most, several for rankings. What it cannot make sense of it refuses with `BadRecord`, in words for whoever mends it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Fields = Mapping[str, Any]
Row = dict[str, Any]
Turn = dict[str, str]

ROLES = {"human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant"}
ROLES |= {"assistant": "assistant", "bot": "assistant", "model": "assistant", "system": "system"}
MARKS = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:", "system": "\n\nSystem:"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant|System):")


class BadRecord(Exception):
    """A record that cannot become a row.

    Args:
        why: in words for whoever mends it.
        check: the check it fails, by its name in `steps.checks`.
    """

    def __init__(self, why: str, check: str = "unreadable") -> None:
        super().__init__(why)
        self.check = check


# -- reading fields ----------------------------------------------------------------------------------------------


def at(fields: Any, path: str) -> Any:
    """A field by its name or, where there is none of that name, by a dotted path into nested ones. None if absent."""
    if isinstance(fields, Mapping) and path in fields:
        return fields[path]
    for name in path.split("."):
        if isinstance(fields, Mapping):
            fields = fields.get(name)
        elif isinstance(fields, Sequence) and not isinstance(fields, str) and name.isdecimal():
            fields = fields[int(name)] if int(name) < len(fields) else None
        else:
            return None
    return fields


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    names |= {str: "text", bytes: "bytes"}
    return "missing" if value is None else names.get(type(value), f"a {type(value).__name__}")


def text(value: Any, name: str, *, optional: bool = True) -> str | None:
    """Text, or None where it is missing: validation says so of a row that needs it."""
    if value is None and optional:
        return None
    if not isinstance(value, str):
        raise BadRecord(f"{name} is {kind_of(value)}, not text", "not_text")
    if not value.isascii() and _SURROGATE.search(value):
        raise BadRecord(f"{name} holds half a surrogate pair, which is no character", "encoding")
    return value


def number(value: Any, name: str) -> float | None:
    """A finite number, also one written as text."""
    if value is None or value == "":
        return None
    if isinstance(value, bool | list | dict):
        raise BadRecord(f"{name} is {kind_of(value)}, not a number")
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadRecord(f"{name} is not a number") from error
    if not math.isfinite(found):
        raise BadRecord(f"{name} is {found}, not a finite number")
    return found


def truth(value: Any, name: str) -> bool:
    """A yes or no: a boolean, 1 for yes, 0 or −1 for no, or in words."""
    words = {"true": True, "up": True, "yes": True, "1": True, "false": False, "down": False, "no": False, "0": False}
    words |= {"1.0": True, "0.0": False, "-1": False, "-1.0": False}
    found = value if isinstance(value, bool) else words.get(str(value).strip().lower())
    if found is None:
        raise BadRecord(f"{name} is {value!r}, neither true nor false")
    return found


def several(value: Any, name: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise BadRecord(f"{name} is {kind_of(value)}, not a list")
    return value


# -- conversations -----------------------------------------------------------------------------------------------


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of turns rather than text."""
    if isinstance(value, str):
        return False
    return isinstance(value, list) or (isinstance(value, Mapping) and bool({"content", "value"} & set(value)))


def turns(value: Any, name: str) -> list[Turn]:
    """Turns of a conversation, from `role`/`content` or ShareGPT's `from`/`value`."""
    found = []
    for place, turn in enumerate([value] if isinstance(value, Mapping) else several(value, name), start=1):
        if not isinstance(turn, Mapping):
            raise BadRecord(f"turn {place} of {name} is {kind_of(turn)}, not an object", "turns")
        role = turn.get("role", turn.get("from"))
        if str(role).lower() not in ROLES:
            raise BadRecord(
                f"turn {place} of {name} has the role {role!r}, known are user, assistant and system", "turns"
            )
        said = text(turn.get("content", turn.get("value")), f"turn {place} of {name}", optional=False)
        found.append({"role": ROLES[str(role).lower()], "content": (said or "").strip()})
    return found


def transcript(value: Any, name: str) -> list[Turn]:
    """Turns of an HH-RLHF transcript, marked `\\n\\nHuman:` and `\\n\\nAssistant:`."""
    said = text(value, name, optional=False) or ""
    marks = list(_MARK.finditer(said))
    if not marks or said[: marks[0].start()].strip():
        raise BadRecord(f"{name} does not begin with '\\n\\nHuman:' or '\\n\\nAssistant:'", "turns")
    ends = [mark.start() for mark in marks[1:]] + [len(said)]
    return [
        {"role": ROLES[mark.group(1).lower()], "content": said[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def check_ending(conversation: Sequence[Turn], name: str) -> None:
    """Refuse a conversation whose last turn is not the assistant's."""
    if not conversation:
        raise BadRecord(f"{name} has no turns", "turns")
    if conversation[-1]["role"] != "assistant":
        raise BadRecord(f"the last turn of {name} is the {conversation[-1]['role']}'s, not the assistant's", "turns")


def check_order(conversation: Sequence[Turn], name: str) -> None:
    """Refuse a conversation whose roles do not take turns, or whose last is not the assistant's."""
    check_ending(conversation, name)
    for place, (before, turn) in enumerate(itertools.pairwise(conversation), start=2):
        if turn["role"] == before["role"]:
            raise BadRecord(f"turns {place - 1} and {place} of {name} are both the {turn['role']}'s", "turns")
        if turn["role"] == "system":
            raise BadRecord(f"turn {place} of {name} is the system's, which may only begin", "turns")


def written(conversation: Sequence[Turn]) -> str:
    """A conversation as the text an answer follows, in the marks of HH-RLHF."""
    return "".join(f"{MARKS[turn['role']]} {turn['content']}" for turn in conversation) + MARKS["assistant"]


def spoken(answer: str) -> str:
    """An answer as it follows the mark of its turn; an empty one stays empty."""
    return f" {answer}" if answer else ""


def as_answer(prompt: str, text: str) -> str:
    """What a model said, as the data have answers: bare, or behind the mark of a dialogue's turn with a space."""
    text = text.strip()
    return spoken(text) if prompt.endswith(MARKS["assistant"]) else text


def _pair_of_conversations(chosen: list[Turn], rejected: list[Turn], rest: Row) -> Row:
    """One pair of two conversations that share all turns but the last."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        check_ending(side, name)
    prompt, other = chosen[:-1], rejected[:-1]
    if prompt != other:
        place = next((n for n, (a, b) in enumerate(zip(prompt, other, strict=False), 1) if a != b), None)
        where = (
            f"at turn {place}" if place else f"chosen has {len(prompt)} turns before its answer, rejected {len(other)}"
        )
        raise BadRecord(f"the prompts of the two sides differ: {where}", "prompts_differ")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        check_order(side, name)
    return {
        **rest,
        "kind": "pair",
        "prompt": written(prompt),
        "turns": prompt,
        "chosen": spoken(chosen[-1]["content"]),
        "rejected": spoken(rejected[-1]["content"]),
    }


# -- formats -----------------------------------------------------------------------------------------------------


def _given(fields: Fields) -> Row:
    """What any record may say beside its texts."""
    said = {}
    for name in ("annotator", "time"):
        if (value := fields.get(name)) is not None:
            said[name] = str(value).encode("utf-8", "backslashreplace").decode()
    return said


def _margin(fields: Fields) -> float | None:
    """How much better the chosen side is: as given, or the difference of the two sides' scores."""
    if fields.get("margin") is not None:
        return number(fields["margin"], "margin")
    if fields.get("score_chosen") is None or fields.get("score_rejected") is None:
        return None
    sides = [number(fields[name], name) for name in ("score_chosen", "score_rejected")]
    return None if None in sides else sides[0] - sides[1]  # type: ignore[operator]


def preferences(fields: Fields) -> Iterator[Row]:
    """TRL's preference formats: text or turns, with the prompt apart or at the head of both sides.

    Also the columns of ultrafeedback_binarized, whose sides repeat the prompt and carry a score each.
    """
    rest = {**_given(fields), "margin": _margin(fields)}
    prompt, sides = fields.get("prompt"), [fields.get("chosen"), fields.get("rejected")]
    if any(map(is_conversation, sides)):
        chosen, rejected = (turns(side, name) for side, name in zip(sides, ("chosen", "rejected"), strict=True))
        head = turns(prompt, "prompt") if is_conversation(prompt) else []
        if head and chosen[: len(head)] != head:
            chosen, rejected = head + chosen, head + rejected
        elif not head and len(chosen) == len(rejected) == 1:
            head = [{"role": "user", "content": (text(prompt, "prompt", optional=False) or "").strip()}]
            chosen, rejected = head + chosen, head + rejected
        yield _pair_of_conversations(chosen, rejected, rest)
        return
    chosen_text, rejected_text = text(sides[0], "chosen"), text(sides[1], "rejected")
    if is_conversation(prompt):
        conversation = [*turns(prompt, "prompt"), {"role": "assistant", "content": ""}]
        check_order(conversation, "prompt")
        prompt_text: str | None = written(conversation[:-1])
        rest["turns"] = conversation[:-1]
        chosen_text, rejected_text = (side and spoken(side.strip()) for side in (chosen_text, rejected_text))
    elif prompt is None and chosen_text and rejected_text:
        prompt_text, chosen_text, rejected_text = _apart(chosen_text, rejected_text)
    else:
        prompt_text = text(prompt, "prompt")
    yield {**rest, "kind": "pair", "prompt": prompt_text, "chosen": chosen_text, "rejected": rejected_text}


def _apart(chosen: str, rejected: str) -> tuple[str | None, str, str]:
    """The words both sides begin with, and what follows on either side."""
    shared = next(
        (n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    return chosen[:shared] or None, chosen[shared:], rejected[shared:]


def hh(fields: Fields) -> Iterator[Row]:
    """HH-RLHF: two transcripts that share all turns but the last."""
    chosen, rejected = (transcript(fields.get(name), name) for name in ("chosen", "rejected"))
    yield _pair_of_conversations(chosen, rejected, {**_given(fields), "margin": _margin(fields)})


def sharegpt(fields: Fields) -> Iterator[Row]:
    """ShareGPT: `conversations`, with `chosen` and `rejected` turns after them, or with the answer at their end.

    A `system` field is the first turn, as where it stands among the others.
    """
    conversation = turns(fields.get("conversations", fields.get("messages")), "conversations")
    if fields.get("system"):
        system = turns({"role": "system", "content": fields["system"]}, "system")
        conversation = conversation if conversation[:1] == system else system + conversation
    if fields.get("chosen") is not None or fields.get("rejected") is not None:
        chosen, rejected = (conversation + turns(fields.get(name), name) for name in ("chosen", "rejected"))
        yield _pair_of_conversations(chosen, rejected, {**_given(fields), "margin": _margin(fields)})
    else:
        yield {**_given(fields), **_demonstration(conversation)}


def demonstrations(fields: Fields) -> Iterator[Row]:
    """What SFT imitates: `messages`, or `prompt` and `completion`, or `instruction`, `input` and `output`."""
    if fields.get("messages") is not None:
        yield {**_given(fields), **_demonstration(turns(fields["messages"], "messages"))}
        return
    asked, completion = fields.get("prompt", fields.get("instruction")), fields.get("completion", fields.get("output"))
    if is_conversation(asked) and is_conversation(completion):
        yield {**_given(fields), **_demonstration(turns(asked, "prompt") + turns(completion, "completion"))}
        return
    prompt = text(asked, "prompt")
    if extra := text(fields.get("input"), "input"):
        prompt = f"{prompt}\n{extra}"
    yield {**_given(fields), "kind": "demonstration", "prompt": prompt, "answer": text(_last(completion), "completion")}


def _last(completion: Any) -> Any:
    """What the last turn of a completion says; a completion that is no conversation as it is."""
    if not is_conversation(completion):
        return completion
    said = turns(completion, "completion")
    check_ending(said, "completion")
    return said[-1]["content"]


def _demonstration(conversation: list[Turn]) -> Row:
    check_order(conversation, "the conversation")
    prompt = conversation[:-1]
    return {
        "kind": "demonstration",
        "prompt": written(prompt),
        "turns": prompt,
        "answer": spoken(conversation[-1]["content"]),
    }


def prompts(fields: Fields) -> Iterator[Row]:
    """Prompts without answers, for sampling: text, or turns that end with the user's."""
    prompt = fields.get("prompt", fields.get("messages"))
    if not is_conversation(prompt):
        yield {**_given(fields), "kind": "prompt", "prompt": text(prompt, "prompt")}
        return
    conversation = turns(prompt, "prompt")
    check_order([*conversation, {"role": "assistant", "content": ""}], "prompt")
    yield {**_given(fields), "kind": "prompt", "prompt": written(conversation), "turns": conversation}


def _answers(fields: Fields) -> list[Any]:
    """The answers of one prompt: a list, or numbered fields such as `prediction 1`, `prediction 2`."""
    if fields.get("answers") is not None:
        return several(fields["answers"], "answers")
    stems: dict[str, dict[int, Any]] = {}
    for name, value in fields.items():
        if match := re.fullmatch(r"(.*?)[ _]?(\d{1,4})", str(name)):
            stems.setdefault(match.group(1), {})[int(match.group(2))] = value
    best = max(stems.values(), key=len, default={})
    if len(best) < 2:
        raise BadRecord("answers are missing: neither a list `answers` nor fields numbered from 1")
    return [best[place] for place in sorted(best)]


def comparisons(fields: Fields) -> Iterator[Row]:
    """Answers of one prompt with a verdict on every two of them, in the order (1,2), (1,3), …, (2,3), …

    `preference`: 0 for a tie, 1 for the first of the two, 2 for the second (FineGrainedRLHF). Of two answers it may
    stand without a list (LLMBar).
    """
    answers = [text(answer, f"answer {place}") for place, answer in enumerate(_answers(fields), start=1)]
    duels = list(itertools.combinations(answers, 2))
    said = fields.get("preference")
    alone = len(duels) == 1 and said is not None and not isinstance(said, list)
    verdicts = [said] if alone else several(said, "preference")
    if len(verdicts) != len(duels):
        raise BadRecord(f"{len(verdicts)} verdicts, and {len(answers)} answers make {len(duels)} pairs")
    rest = {**_given(fields), "kind": "pair", "prompt": text(fields.get("prompt"), "prompt")}
    for (first, second), verdict in zip(duels, map(_verdict, verdicts), strict=True):
        chosen, rejected = (second, first) if verdict == 2 else (first, second)
        yield {**rest, "chosen": chosen, "rejected": rejected, "tie": verdict == 0}


def _verdict(value: Any) -> int:
    found = {"0": 0, "1": 1, "2": 2}.get(str(value).removesuffix(".0"))
    if found is None:
        raise BadRecord(f"the verdict {value!r} is none of 0, 1, 2")
    return found


def rankings(fields: Fields) -> Iterator[Row]:
    """Answers of one prompt with a rank each, 1 the best, equal ranks for a tie: every two of them make a pair."""
    answers = [text(answer, f"answer {place}") for place, answer in enumerate(_answers(fields), start=1)]
    ranks = [number(rank, "rank") for rank in several(fields.get("ranks"), "ranks")]
    if len(ranks) != len(answers) or None in ranks:
        raise BadRecord(f"{len([rank for rank in ranks if rank is not None])} ranks for {len(answers)} answers")
    rest = {**_given(fields), "kind": "pair", "prompt": text(fields.get("prompt"), "prompt")}
    ranked = list(zip(ranks, answers, strict=True))
    for (rank, first), (other, second) in itertools.combinations(ranked, 2):
        chosen, rejected = (first, second) if rank <= other else (second, first)  # type: ignore[operator]
        yield {**rest, "chosen": chosen, "rejected": rejected, "tie": rank == other}


def scored(fields: Fields) -> Iterator[Row]:
    """Answers of one prompt with a score each: `answers` of objects with text and score, or `answers` and `scores`."""
    answers = _answers(fields)
    scores = fields.get("scores")
    if scores is not None and len(several(scores, "scores")) != len(answers):
        raise BadRecord(f"{len(scores)} scores for {len(answers)} answers")
    rest = {**_given(fields), "kind": "rated", "prompt": text(fields.get("prompt"), "prompt")}
    for place, answer in enumerate(answers):
        name = f"answer {place + 1}"
        score = None if scores is None else scores[place]
        if isinstance(answer, Mapping):
            known = ("text", "content", "response", "answer", "completion")
            said = next((answer[key] for key in known if key in answer), None)
            score = next((answer[key] for key in ("score", "rating", "overall_score") if key in answer), score)
            answer = said
        yield {**rest, "answer": text(answer, name), **_rated(score, f"the score of {name}")}


def _rated(score: Any, name: str) -> Row:
    if isinstance(score, list):
        ratings = [value for value in (number(one, name) for one in score) if value is not None]
        return {"score": sum(ratings) / len(ratings) if ratings else None, "ratings": ratings}
    return {"score": number(score, name)}


def labels(fields: Fields) -> Iterator[Row]:
    """One answer with thumbs up or down: `prompt`, `completion`, `label`. Up scores 1, down −1."""
    up = truth(fields.get("label"), "label")
    completion = _last(fields.get("completion"))
    prompt = fields.get("prompt")
    rest = _given(fields)
    if is_conversation(prompt):
        conversation = turns(prompt, "prompt")
        check_order([*conversation, {"role": "assistant", "content": ""}], "prompt")
        rest["turns"], prompt = conversation, written(conversation)
        completion = spoken(completion.strip()) if isinstance(completion, str) else completion
    yield {
        **rest,
        "kind": "rated",
        "prompt": text(prompt, "prompt"),
        "answer": text(completion, "completion"),
        "score": 1.0 if up else -1.0,
    }


# A format's reading of one record. `rated_sentences` joins two files and is read in `ingest`.
FORMATS: dict[str, Callable[[Fields], Iterator[Row]]] = {
    "preferences": preferences,
    "hh": hh,
    "sharegpt": sharegpt,
    "comparisons": comparisons,
    "rankings": rankings,
    "scored": scored,
    "labels": labels,
    "demonstrations": demonstrations,
    "prompts": prompts,
}
