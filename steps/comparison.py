"""Several methods, strengths and seeds side by side: which runs there are, and what they say together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steps.artifact import Artifact
from steps.config import Recipe, assigned
from steps.datasets import read_table
from steps.errors import RecipeError, did_you_mean
from steps.statistics import holm, pooled, sign_test
from steps.trainer_fields import REFERENCE_FREE

# Where each method keeps how strongly it is held to its start; a method without one makes one run a seed.
STRENGTH: dict[str, str | None] = {
    **{method: f"policy.{method}.trainer.beta" for method in ("dpo", "ipo", "cdpo", "robust", "rso", "kto")},
    **{method: f"policy.{method}.beta" for method in ("simpo", "cpo", "orpo")},
    **{method: f"policy.{method}.lam" for method in ("slic", "slic_sample_rank")},
    "ppo": "policy.ppo.kl.coefficient",
    "rloo": "policy.rloo.trainer.beta",
    "grpo": "policy.grpo.trainer.beta",
    "spo": "policy.spo.trainer.beta",
    "chain_of_hindsight": None,
    "best_of_n": None,
}
# Methods without a reference: their strength is on a scale of its own, so the numbers all others share pass them by.
OWN_SCALE = REFERENCE_FREE
WATCHED = ("reward", "policy", "evaluate")  # steps that may sound alarms
TRL_BETA = 0.1  # where a recipe says none
SYMBOLS = {"slic": "λ", "slic_sample_rank": "λ"}  # of a strength; β unless said


@dataclass(frozen=True)
class Variant:
    """One run of a comparison."""

    method: str
    beta: float | None
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.method, self.setting, f"seed {self.seed}")))

    @property
    def setting(self) -> str:
        """The strength under its symbol."""
        return "" if self.beta is None else f"{SYMBOLS.get(self.method, 'β')}={self.beta:g}"


def variants(recipe: Recipe, methods: Sequence[str], betas: Sequence[float], seeds: int) -> list[Variant]:
    """Every method at every strength with every seed, the first seed of all first.

    Args:
        methods: names of `policy.method`, `best-of-n` among them; `ppo@0.05` gives a method a strength of its own, and
            `dpo:apo_zero` or `dpo:sigmoid+sft` is DPO with another of TRL's losses, or their sum.
        betas: weight of the distance to the start, by each method's own name; not for methods in `OWN_SCALE`, which
            keep the recipe's.
        seeds: how many, counted from the recipe's.

    Raises:
        RecipeError: an unknown method, or a strength that a method refuses.
    """
    found = []
    for number, named in itertools.product(range(seeds), methods):
        name, _, own = named.partition("@")
        label = name.replace("-", "_")
        method, _, losses = label.partition(":")
        path = _strength_of(method, losses)
        seed = recipe.seed + number
        changes: dict[str, Any] = {"policy.method": method, "seed": seed}
        if losses:
            changes |= {f"policy.dpo.trainer.{name}": value for name, value in _losses(losses).items()}
        usual: Sequence[float] = betas
        if path and method in OWN_SCALE:
            usual = (_value_at(recipe, path),)
        for beta in strengths(own, usual) if path else (None,):
            found.append(Variant(label, beta, seed, assigned(recipe, changes | ({path: beta} if path else {}))))
    return found


def _strength_of(method: str, losses: str) -> str | None:
    """Where a method keeps its strength.

    Raises:
        RecipeError: there is no such method, or it takes no other losses.
    """
    if method not in STRENGTH:
        raise RecipeError(
            f"there is no method '{method.replace('_', '-')}'", where="--methods", have=did_you_mean(method, STRENGTH)
        )
    if losses and method != "dpo":
        raise RecipeError("only dpo takes another loss", where="--methods", have=f"{method}:{losses}")
    return STRENGTH[method]


def _losses(text: str) -> dict[str, Any]:
    """TRL's settings for losses with `+` between them, each with weight 1."""
    return {"loss_type": text.split("+"), "loss_weights": None}


def _value_at(recipe: Recipe, path: str) -> float:
    value: Any = recipe
    for name in path.split("."):
        value = getattr(value, name)
    return float(value)


def strengths(text: str, usual: Sequence[float] = ()) -> list[float]:
    """Numbers with commas or further `@` between them; the usual ones when there are none.

    Raises:
        RecipeError: something else.
    """
    try:
        return [float(part) for part in text.replace("@", ",").split(",")] if text else list(usual)
    except ValueError as error:
        raise RecipeError(
            "strengths are numbers with commas between them", have=text, then="such as 0.1,0.3,1"
        ) from error


def unit(variant: Variant) -> float:
    """What log π/ρ is multiplied by in a run's implicit rewards."""
    policy = variant.recipe.policy
    if variant.method == "chain_of_hindsight":
        return policy.chain_of_hindsight.beta
    if variant.method in OWN_SCALE:
        return float(policy.dpo.trainer.get("beta", TRL_BETA))
    return variant.beta or 1.0


def judged(variant: Variant) -> str:
    """The setting whose answers the judge sees: of best of n the largest n, whose row is one of several."""
    return f"n={variant.recipe.policy.best_of_n.n}" if variant.method == "best_of_n" else variant.setting


def rows_of(variant: Variant, made: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """A finished run as rows of the table: one, or for best of n one for each n.

    Args:
        made: the artifacts of its steps, by the step's name.
    """
    facts, policy, scale = made["evaluate"].facts, made["policy"], unit(variant)
    shared = {
        "method": variant.method,
        "seed": variant.seed,
        "seconds": sum(artifact.seconds for artifact in made.values()),
        "tuning": policy.cpu_seconds,
        "peak_mib": policy.peak_mib,
        "error": None,
    }
    if points := facts.get("best_of"):
        return [
            {**shared, "setting": f"n={point['n']}", **{name: point[name] for name in point if name != "n"}}
            for point in points
        ]
    return [
        {
            **shared,
            "setting": variant.setting,
            "kl": facts.get("policy_kl_full"),
            "gold": facts.get("policy_gold"),
            "reward": facts.get("policy_reward"),
            "win_rate": facts["win_rate"],
            "win_rate_low": facts["win_rate_low"],
            "win_rate_high": facts["win_rate_high"],
            "length_ratio": facts["length_ratio"],
            "accuracy": policy.facts.get("eval_rewards/accuracies"),
            **{side: _nats(policy.facts.get(f"eval_rewards/{side}"), scale) for side in ("chosen", "rejected")},
            "alarms": ", ".join(alarm["name"] for name in WATCHED for alarm in made[name].facts.get("alarms", ())),
        }
    ]


def _nats(reward: float | None, scale: float) -> float | None:
    return None if reward is None else reward / scale


def failed(variant: Variant, error: str) -> dict[str, Any]:
    """A run that ended without a result, as a row."""
    return {"method": variant.method, "seed": variant.seed, "setting": variant.setting, "error": error}


# What is averaged over seeds.
MEANS = (
    "kl", "gold", "reward", "win_rate", "length_ratio", "accuracy", "chosen", "rejected", "tuning", "peak_mib",
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """A method at one strength, over its seeds.

    Attributes:
        seeds, failures: how many runs there were, and how many of them ended without a result.
        kl, gold, reward, win_rate, length_ratio: means over seeds.
        win_rate_low, win_rate_high: interval of the pooled verdicts, clustered by prompt; None without verdicts.
        p_value: of the pooled wins against losses, corrected for the number of groups (Holm); None without verdicts.
        dominates, dominated: how many groups have more KL and no more gold, and the other way round.
        accuracy: share of held-out pairs the policy's implicit reward orders as people do; NaN where it has none.
        chosen, rejected: log π/ρ of held-out answers, in nats; below 0 they became less likely than at the start.
        tuning: processor seconds of the policy step.
        peak_mib: most memory of the policy step, libraries included, in MiB.
    """

    method: str
    setting: str
    seeds: int
    failures: int
    kl: float
    gold: float
    gold_spread: float
    reward: float
    win_rate: float
    win_rate_low: float | None
    win_rate_high: float | None
    p_value: float | None
    length_ratio: float
    dominates: int
    dominated: int
    accuracy: float
    chosen: float
    rejected: float
    tuning: float
    peak_mib: float


def groups(rows: Iterable[Mapping[str, Any]], verdicts: Mapping[tuple[str, str, int], pd.DataFrame]) -> list[Group]:
    """Rows over their seeds.

    Args:
        rows: as `rows_of` and `failed` make them.
        verdicts: by (method, setting, seed): prompt and `over_start`.
    """
    table = pd.DataFrame(list(rows))
    for name in MEANS:
        table[name] = pd.to_numeric(table[name], errors="coerce") if name in table else np.nan
    found: list[dict[str, Any]] = []
    for (method, setting), some in table.groupby(["method", "setting"], sort=False):
        ended = some[some["error"].isna()]
        keys = {int(seed): (str(method), str(setting), int(seed)) for seed in ended["seed"]}
        said = {seed: verdicts[key] for seed, key in keys.items() if key in verdicts}
        found.append(
            {
                "method": method,
                "setting": setting,
                "seeds": len(some),
                "failures": len(some) - len(ended),
                **{name: float(ended[name].mean()) for name in MEANS},
                "gold_spread": float(ended["gold"].std()) if len(ended) > 1 else 0.0,
                **_pooled(said),
            }
        )
    tested = [group for group in found if group["p_value"] is not None]
    for group, corrected in zip(tested, holm([group["p_value"] for group in tested]), strict=True):
        group["p_value"] = corrected
    for group in found:
        group["dominates"] = sum(_dominates(group, other) for other in found)
        group["dominated"] = sum(_dominates(other, group) for other in found)
    return [Group(**group) for group in found]


def _pooled(verdicts: Mapping[int, pd.DataFrame]) -> dict[str, Any]:
    """Interval and sign test of a setting's verdicts by seed, on the prompts every seed has a verdict on."""
    by_prompt = {seed: found.set_index("prompt")["over_start"] for seed, found in verdicts.items()}
    table = pd.DataFrame(by_prompt).dropna()
    if len(table) < 2:
        return {"win_rate_low": None, "win_rate_high": None, "p_value": None}
    found = pooled({seed: table[seed] for seed in table}, list(table.index))
    votes = table.mean(axis=1)  # a prompt's verdicts over seeds are not independent: each prompt votes once
    p_value = sign_test(int((votes > 0.5).sum()), int((votes < 0.5).sum()))
    return {"win_rate_low": found.low, "win_rate_high": found.high, "p_value": p_value}


def _dominates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Pareto: at least as much gold for at most as much KL, and better in one of the two."""
    no_worse = one["gold"] >= other["gold"] and one["kl"] <= other["kl"]
    return no_worse and (one["gold"] > other["gold"] or one["kl"] < other["kl"])


def in_words(found: Sequence[Group]) -> list[str]:
    """What a comparison says, in sentences."""
    whole = [group for group in found if np.isfinite(group.gold) and np.isfinite(group.kl)]
    if not whole:
        return ["No run came to a result."]
    best = max(whole, key=lambda group: group.gold)
    interval = "" if best.win_rate_low is None else f" [{best.win_rate_low:.3f}, {best.win_rate_high:.3f}]"
    said = [
        f"The highest gold score, {best.gold:+.2f}, is that of {_label(best)}, at {best.kl:.1f} nats from the start "
        f"(win rate {best.win_rate:.3f}{interval}).{_not_told_apart(best, whole)}"
    ]
    efficient = [group for group in whole if not group.dominated]
    said.append(
        f"{len(efficient)} of {len(whole)} settings lie on the frontier (nothing else has more gold for less KL): "
        + ", ".join(_label(group) for group in sorted(efficient, key=lambda group: group.kl))
        + "."
    )
    noticeable = 0.05 * (best.gold - min(group.gold for group in whole))
    for method in dict.fromkeys(group.method for group in whole):
        mine = sorted((group for group in whole if group.method == method), key=lambda group: group.kl)
        top = max(range(len(mine)), key=lambda place: mine[place].gold)
        if mine[-1].reward > mine[top].reward and mine[top].gold - mine[-1].gold > noticeable:
            said.append(
                f"{method} is over-optimised beyond {_label(mine[top])}: the reward goes on rising to "
                f"{mine[-1].reward:+.2f} while gold falls from {mine[top].gold:+.2f} to {mine[-1].gold:+.2f}."
            )
    if lost := sum(group.failures for group in found):
        said.append(f"{lost} of {sum(group.seeds for group in found)} runs ended without a result; the table says why.")
    return said


def _not_told_apart(best: Group, whole: Sequence[Group]) -> str:
    """Whose win rates may be as high as the best one's, in a sentence."""
    known = [group for group in whole if group is not best and group.win_rate_high is not None]
    if best.win_rate_low is None or not known:
        return ""
    close = [_label(group) for group in known if (group.win_rate_high or 0.0) >= best.win_rate_low]
    return (
        f" Intervals that overlap with its own: {', '.join(close)}." if close else " No other interval reaches its own."
    )


def _label(group: Group) -> str:
    return f"{group.method} {group.setting}".strip()


def verdicts_in(completions: Path) -> pd.DataFrame:
    """An evaluation's verdicts against the start: prompt, over_start."""
    return read_table(completions, columns=["prompt", "over_start"])
