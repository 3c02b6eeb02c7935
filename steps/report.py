"""What a run came to, in words: one text for the terminal, MLflow, Prefect and the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from steps.datasets import read_table
from steps.policy_config import RELATIVES

if TYPE_CHECKING:
    from steps.run import Outcome

EXAMPLES = 3


def headline(name: str, facts: Mapping[str, Any]) -> str:
    """The few numbers of a step that matter, in one short line."""
    if name == "data":
        return (
            f"{facts['read']:,} rows, {facts['quarantined']} in quarantine; "
            f"{facts['demonstrations']:,} demonstrations, {facts['preferences']:,} pairs, {facts['gold']:,} gold"
        )
    if name == "base":
        return f"{facts['base']}, {facts['bytes'] / 2**20:.0f} MiB"
    if name == "sft":
        return f"loss {facts['loss']:.2f} on {facts['rows']} demonstrations"
    if name == "baseline":
        return f"the start answered {facts['prompts']} held-out prompts, {facts['tokens']:.1f} tokens on average"
    if name == "reward":
        return (
            f"orders {facts['accuracy']:.3f} of {facts['held_out']} held-out pairs right "
            f"[{facts['accuracy_low']:.2f}, {facts['accuracy_high']:.2f}]"
        )
    if name == "policy":
        if facts["method"] == "sft":
            return "the SFT model as it is; its start is the base model"
        if facts["method"] == "best_of_n":
            return f"the best of {facts['n']} answers, at most {facts['kl_bound']:.1f} nats from the start"
        if "reward" in facts:
            kl = f", KL {facts['kl']:.1f} nats" if "kl" in facts else ""
            return (
                f"{facts['method']}: reward {facts['reward_at_start']:+.2f} → {facts['reward']:+.2f}{kl}, "
                f"accuracy {facts['accuracy']:.3f}"
            )
        return (
            f"{facts['method']}: accuracy {facts['accuracy']:.3f}, "
            f"rewards {facts['eval_rewards/chosen']:+.2f} / {facts['eval_rewards/rejected']:+.2f}"
        )
    if name == "evaluate":
        return (
            f"win rate {facts['win_rate']:.3f} [{facts['win_rate_low']:.2f}, {facts['win_rate_high']:.2f}], "
            f"length × {facts['length_ratio']:.2f}"
        )
    if name == "gate":
        return "promote" if facts["promote"] else "keep back"
    if name == "sample":
        return f"{facts['samples']} answers to {facts['prompts']} prompts, {facts['tokens']:.1f} tokens on average"
    if name == "label":
        return f"{facts['labels']:,} labels"
    return ""


def step_rows(
    outcomes: Mapping[str, Outcome], data: Mapping[str, int], seconds: float
) -> list[tuple[str, str, str, str]]:
    """(step, reused or run, seconds, headline) of every step, the data stages first."""
    rows = [("data", "checked", f"{seconds:.1f}", headline("data", data))]
    for name, outcome in outcomes.items():
        how = "reused" if outcome.reused else "resumed" if outcome.resumed else "run"
        rows.append((name, how, f"{outcome.seconds:.1f}", headline(name, outcome.artifact.facts)))
    return rows


def findings(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader should know beyond the numbers, in sentences."""
    measured, policy = facts["evaluate"], facts["policy"]
    before = "the base model" if policy["method"] == "sft" else "its SFT start"
    by_reward = measured.get("win_rate_by_reward")
    said = [
        f"On {measured['prompts']} held-out prompts the {measured['judge']} judge prefers the tuned policy to {before} "
        f"in {measured['win_rate']:.1%} ({measured['confidence']:.0%} interval {measured['win_rate_low']:.1%} to "
        f"{measured['win_rate_high']:.1%}; {measured['win_rate_wins']} wins, {measured['win_rate_ties']} ties, "
        f"{measured['win_rate_losses']} losses)."
        + ("" if by_reward is None else f" The reward model prefers it in {by_reward:.1%}."),
        judge_in_words(measured),
        *topics_in_words(measured),
        f"Answers have {measured['policy_tokens']:.1f} tokens on average, the start's {measured['start_tokens']:.1f} "
        f"(× {measured['length_ratio']:.2f}).",
    ]
    said += groups_in_words(measured.get("win_rate_by", ()))
    if "win_rate_length_controlled" in measured:
        said.append(
            f"Were all answers equally long, the win rate would be {measured['win_rate_length_controlled']:.1%} "
            f"({measured['win_rate_length_controlled_low']:.1%} to {measured['win_rate_length_controlled_high']:.1%})."
        )
    for rival, words in (("champion", "the champion's"), ("human", "those people chose in the data")):
        if f"{rival}_win_rate" in measured:
            said.append(
                f"The policy's answers win {measured[f'{rival}_win_rate']:.1%} against {words} "
                f"({measured[f'{rival}_win_rate_low']:.1%} to {measured[f'{rival}_win_rate_high']:.1%})."
            )
    if "policy_kl_full" in measured:
        said.append(f"The policy is {measured['policy_kl_full']:.1f} nats an answer away from its start.")
    if "detectable_effect" in measured and measured["win_rate_low"] <= 0.5 <= measured["win_rate_high"]:
        said.append(
            f"It is not known which of the two is better: {measured['prompts']} prompts would show a rise of "
            f"{100 * measured['detectable_effect']:.0f} points or more in four cases of five."
        )
    if not 0.8 <= measured["length_ratio"] <= 1.2:
        said.append("Length moved by more than 20 %: part of the win may be length.")
    if measured["policy_distinct_2"] < 0.7 * measured["start_distinct_2"]:
        said.append(
            f"Answers repeat themselves: distinct-2 fell from {measured['start_distinct_2']:.2f} to "
            f"{measured['policy_distinct_2']:.2f}."
        )
    if policy.get("prompt_after"):
        said.append(
            f"The policy is asked with words of its own: {_quoted(repr(policy['prompt_after']))} goes behind every "
            f"prompt, as `adapter/prompt.json` says. Whoever samples from it has to put it there; the start and the "
            f"judge saw the prompt alone, and the distance is that of the policy so asked from the start asked plainly."
        )
    if "classification_accuracy" in policy:
        said.append(
            f"Of {policy['held_out']} held-out pairs it tells the better answer in "
            f"{policy['classification_accuracy']:.1%} ({policy['classification_accuracy_low']:.1%} to "
            f"{policy['classification_accuracy_high']:.1%}), by which is likelier after praise than after blame."
        )
    if policy.get("likelihood_displaced") and policy["method"] in ("dpo", *RELATIVES):
        said.append(
            f"Displaced likelihood: the chosen answers became less likely than under the reference "
            f"(rewards/chosen {policy['eval_rewards/chosen']:+.2f}), "
            f"the rejected ones came to {policy['eval_rewards/rejected']:+.2f}. "
            f"The policy learnt what to avoid rather than what to imitate; a known failure of DPO and its relatives. A "
            f"larger beta, or weight on the likelihood of chosen answers (dpo with loss_type [sigmoid, sft], cpo, "
            f"orpo), holds them up."
        )
    return said


def groups_in_words(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each label win rates are told by, and one on which groups differ from ½."""
    if not groups:
        return []
    said = []
    for label in dict.fromkeys(group["by"] for group in groups):
        told = [
            f"{_quoted(group['group'])} {group['win_rate']:.1%} ({group['win_rate_low']:.1%} to "
            f"{group['win_rate_high']:.1%}, {_prompts(group)} prompts)"
            for group in groups
            if group["by"] == label
        ]
        said.append(f"Win rate by {label}: {', '.join(told)}.")
    sure = [group for group in groups if group["win_rate_p_value"] < 0.05]
    names = ", ".join(f"{_quoted(group['group'])} ({group['win_rate']:.1%})" for group in sure)
    which = f"{names} {'differs' if len(sure) == 1 else 'differ'}" if sure else "none differs"
    said[-1] += f" With {len(groups)} groups looked at, {which} from ½ at 5 % (Holm's correction)."
    return said


def topics_in_words(measured: Mapping[str, Any]) -> list[str]:
    """A sentence for each topic with a position, and what the next round aims at; nothing of other evaluations."""
    if "topics" not in measured:
        return []
    said = [
        f"{_quoted(score['topic'])}: {score['before']:.2f} before ({score['before_low']:.2f} to "
        f"{score['before_high']:.2f}), {score['after']:.2f} after ({score['after_low']:.2f} to "
        f"{score['after_high']:.2f}); {score['change']:+.2f} ({score['change_low']:+.2f} to "
        f"{score['change_high']:+.2f}, {score['probes']} probes)."
        for score in measured["topics"]
    ]
    aims = ", ".join(f"{_quoted(name)} ({count})" for name, count in measured["weakest"].items())
    return [*said, f"The next round aims at the weakest topics, with so many new demonstrations: {aims}."]


def _prompts(group: Mapping[str, Any]) -> int:
    return int(group["win_rate_wins"] + group["win_rate_ties"] + group["win_rate_losses"])


def _quoted(name: str) -> str:
    """A name out of the data, such that no Markdown in it is taken for any."""
    plain = printable(name).replace("`", "'")
    return f"`{plain if len(plain) <= 40 else plain[:39] + '…'}`"


def judge_in_words(measured: Mapping[str, Any]) -> str:
    """Who judged, and how far that judge agrees with people."""
    of = {
        "gold": "The judge was fitted on human ratings or comparisons no training step saw; it",
        "reward": "The judge is a reward model (one the policy was tuned against flatters it); it",
        "llm": "The judge is a language model, asked in both orders; it",
    }
    if "topics" in measured:
        of["gold"] = "The judge knows the words of the other probes' answers, and nothing of what they mean; it"
        tried = "of the probes' answers as they were written, against a bad one and against a good one on another topic"
    else:
        tried = "of held-out human pairs as people did"
    said = f"{of[measured['judge']]} orders {measured['judge_accuracy']:.1%} {tried}"
    if measured.get("judge_swap_consistency", 1) < 1:
        said += f", and {measured['judge_swap_consistency']:.1%} of its verdicts stay when the answers change places"
    if measured.get("judge_ceiling"):
        said += f" (one person: {measured['judge_ceiling']:.1%})"
    return said + "."


def printable(text: str) -> str:
    """A model's words without what steers a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()


def plain(text: str) -> str:
    """Text that steers neither rich nor the terminal."""
    return escape(printable(text))


def plain_table(*titles: str, right: Sequence[str] = ()) -> Table:
    """A table without lines, whose cells fold rather than being cut.

    Args:
        right: titles of columns of numbers.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title, justify="right" if title in right else "left", overflow="fold")
    return table


def examples(completions: Path, count: int = EXAMPLES) -> list[dict[str, str]]:
    """The first prompts with the answers before and after; not picked."""
    rows = read_table(completions, columns=["prompt", "start", "policy"]).head(count).to_dict("records")
    return [{name: text.strip() for name, text in row.items()} for row in rows]


def print_report(
    console: Console,
    rows: Sequence[tuple[str, str, str, str]],
    said: Sequence[str],
    shown: Sequence[Mapping[str, str]],
    verdict: Mapping[str, Any],
    model: str,
    hints: Sequence[tuple[str, str]],
) -> None:
    """The end of a run in a terminal of 100 columns, or a log file."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("step")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("came to", overflow="fold")
    for step, how, seconds, line in rows:
        table.add_row(step, f"[dim]{how}[/]" if how == "reused" else how, seconds, escape(line))
    console.print()
    console.print(table)
    console.print()
    for sentence in said:
        console.print(f"• {escape(sentence)}")
    console.print()
    for example in shown:
        for label, name in (("prompt", "prompt"), ("before", "start"), ("after ", "policy")):
            console.print(Text.assemble((label, "dim"), "  ", printable(example[name])))
        console.print()
    style = "green" if verdict["promote"] else "yellow"
    console.print(f"[{style}]{'promoted' if verdict['promote'] else 'kept back'}[/]  {escape(model)}")
    for reason in verdict["reasons"]:
        console.print(f"  {escape(reason)}")
    console.print()
    for label, command in hints:
        console.print(f"[dim]{label:<18}[/] {escape(command)}", soft_wrap=True)


def markdown(
    title: str,
    rows: Sequence[tuple[str, str, str, str]],
    said: Sequence[str],
    shown: Sequence[Mapping[str, str]],
    verdict: Mapping[str, Any],
    model: str,
) -> str:
    """The same as Markdown; model output is fenced, so that nothing in it is taken for markup."""
    lines = [f"# {title}", "", "| step | | seconds | came to |", "| --- | --- | ---: | --- |"]
    lines += [f"| {step} | {how} | {seconds} | {line} |" for step, how, seconds, line in rows]
    lines += ["", *(f"- {sentence}" for sentence in said), "", "## Answers before and after", ""]
    for example in shown:
        block = [f"prompt: {example['prompt'].strip()}", f"before: {example['start']}", f"after:  {example['policy']}"]
        text = "\n".join(block).replace("```", "'''")
        lines += ["```text", text, "```", ""]
    lines += [f"## {'Promoted' if verdict['promote'] else 'Kept back'}: {model}", ""]
    lines += [f"- {reason}" for reason in verdict["reasons"]]
    return "\n".join(lines) + "\n"
