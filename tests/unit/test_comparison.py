"""Comparisons: which runs there are, how seeds are put together, and who dominates whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny

from steps.artifact import Artifact
from steps.comparison import Group, failed, groups, in_words, rows_of, unit, variants
from steps.comparison_page import comparison_page, draw_frontier
from steps.config import Recipe, assigned, parse, read_yaml
from steps.errors import RecipeError


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse(read_yaml(tiny.RECIPE, "tiny"), "tiny")


def row(method: str, setting: str, seed: int, kl: float, gold: float, **more: Any) -> dict[str, Any]:
    shared = {"reward": gold, "win_rate": 0.6, "length_ratio": 1.0, "seconds": 10.0, "error": None}
    return {"method": method, "setting": setting, "seed": seed, "kl": kl, "gold": gold, **shared, **more}


def artifact(facts: dict[str, Any], seconds: float = 1.0) -> Artifact:
    return Artifact(Path(), "policy", "k", "d", facts=facts, seconds=seconds, cpu_seconds=2 * seconds, peak_mib=512.0)


def verdicts(*preferences: float) -> pd.DataFrame:
    return pd.DataFrame({"prompt": [f"p{place}" for place in range(len(preferences))], "over_start": preferences})


def test_every_method_at_every_strength_with_every_seed(recipe: Recipe) -> None:
    planned = variants(recipe, ["dpo", "ppo", "best-of-n"], [0.1, 1.0], 2)
    assert [variant.name for variant in planned[:5]] == [
        "dpo β=0.1 seed 3",
        "dpo β=1 seed 3",
        "ppo β=0.1 seed 3",
        "ppo β=1 seed 3",
        "best_of_n seed 3",
    ]
    assert len(planned) == 10
    assert {variant.recipe.seed for variant in planned} == {3, 4}
    assert planned[0].recipe.policy.dpo.trainer["beta"] == 0.1
    assert planned[3].recipe.policy.ppo.kl.coefficient == 1.0
    assert planned[0].recipe.sft == planned[4].recipe.sft == recipe.sft


def test_a_method_may_have_strengths_of_its_own(recipe: Recipe) -> None:
    planned = variants(recipe, ["dpo@0.1@2", "ppo"], [0.5], 1)
    assert [(variant.method, variant.beta) for variant in planned] == [("dpo", 0.1), ("dpo", 2.0), ("ppo", 0.5)]
    with pytest.raises(RecipeError, match="strengths are numbers"):
        variants(recipe, ["dpo@much"], [0.5], 1)


def test_an_unknown_method_and_a_strength_that_is_refused_are_named_at_once(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="there is no method 'dqo'") as unknown:
        variants(recipe, ["dqo"], [0.1], 1)
    assert "did you mean 'dpo'" in str(unknown.value)
    with pytest.raises(RecipeError, match=r"policy\.ppo\.kl\.coefficient"):
        variants(recipe, ["ppo"], [-1.0], 1)


def test_best_of_n_is_a_row_for_each_n(recipe: Recipe) -> None:
    (variant,) = variants(recipe, ["best_of_n"], [0.1], 1)
    points = [{"n": 1, "kl": 0.0, "gold": 0.1, "win_rate": 0.5}, {"n": 2, "kl": 0.19, "gold": 0.4, "win_rate": 0.6}]
    made = {"policy": artifact({}, 1.0), "evaluate": artifact({"best_of": points}, 2.0)}
    rows = rows_of(variant, made)
    assert [(one["setting"], one["kl"], one["seconds"]) for one in rows] == [("n=1", 0.0, 3.0), ("n=2", 0.19, 3.0)]


@pytest.mark.parametrize(
    ("method", "chosen"),
    # −0.4 on the scale of β 0.2, of TRL's 0.1 where the method has a scale of its own, of Chain of Hindsight's 0.1
    [("dpo@0.2", -2.0), ("ppo@0.2", -2.0), ("rloo@0.2", -2.0), ("simpo@0.2", -4.0), ("chain_of_hindsight", -4.0)],
)
def test_displacement_is_in_nats_whatever_the_scale(recipe: Recipe, method: str, chosen: float) -> None:
    plain = assigned(recipe, {"policy.dpo.trainer": {}})
    (variant,) = variants(plain, [method], [0.1], 1)
    tuned = artifact({"eval_rewards/chosen": -0.4, "eval_rewards/rejected": -0.8, "eval_rewards/accuracies": 0.7})
    judged = artifact({"win_rate": 0.6, "win_rate_low": 0.5, "win_rate_high": 0.7, "length_ratio": 1.0})
    (row,) = rows_of(variant, {"reward": artifact({}), "policy": tuned, "evaluate": judged})
    assert (row["chosen"], row["rejected"]) == pytest.approx((chosen, 2 * chosen))
    assert (row["accuracy"], row["tuning"], row["peak_mib"], row["seconds"]) == (0.7, 2.0, 512.0, 3.0)


def test_without_a_penalty_the_scale_is_a_nat(recipe: Recipe) -> None:
    (variant,) = variants(recipe, ["ppo@0"], [0.1], 1)
    assert unit(variant) == 1.0


def test_seeds_are_put_together_and_failures_counted() -> None:
    rows = [
        row("dpo", "β=1", 0, 2.0, 1.0),
        row("dpo", "β=1", 1, 4.0, 2.0),
        {"method": "dpo", "setting": "β=1", "seed": 2, "error": "the loss is not a number"},
    ]
    (group,) = groups(rows, {("dpo", "β=1", 0): verdicts(1, 1, 0), ("dpo", "β=1", 1): verdicts(1, 0, 0.5)})
    assert (group.seeds, group.failures, group.kl, group.gold) == (3, 1, 3.0, 1.5)
    assert group.win_rate_low is not None
    assert group.win_rate_low < 3.5 / 6 < group.win_rate_high
    # of three prompts one won twice, one is split and one lost on the whole: exact test of 1 against 1
    assert group.p_value == 1.0


def test_p_values_are_corrected_for_their_number() -> None:
    rows = [row("dpo", f"β={beta}", 0, beta, beta) for beta in (1, 2)]
    sure = verdicts(*[1] * 10)
    alone = groups(rows[:1], {("dpo", "β=1", 0): sure})[0].p_value
    both = [group.p_value for group in groups(rows, {("dpo", f"β={beta}", 0): sure for beta in (1, 2)})]
    assert alone == pytest.approx(2 * 0.5**10)
    assert both == pytest.approx([2 * alone] * 2)


def test_more_gold_for_less_kl_dominates() -> None:
    points = {"a": (1.0, 1.0), "b": (2.0, 2.0), "c": (2.0, 0.5), "d": (3.0, 2.0)}
    found = {g.method: g for g in groups([row(name, "", 0, *point) for name, point in points.items()], {})}
    assert {name: group.dominated for name, group in found.items()} == {"a": 0, "b": 0, "c": 2, "d": 1}
    assert {name: group.dominates for name, group in found.items()} == {"a": 1, "b": 2, "c": 0, "d": 0}


def test_equal_points_do_not_dominate_each_other() -> None:
    found = groups([row(name, "", 0, 1.0, 1.0) for name in "ab"], {})
    assert [group.dominated for group in found] == [0, 0]


def test_overoptimisation_is_said_in_words() -> None:
    rows = [
        row("ppo", "β=1", 0, 1.0, 0.5, reward=1.0),
        row("ppo", "β=0.1", 0, 9.0, 0.9, reward=2.0),
        row("ppo", "β=0", 0, 40.0, 0.2, reward=3.0),
    ]
    said = " ".join(in_words(groups(rows, {})))
    assert "The highest gold score, +0.90, is that of ppo β=0.1" in said
    assert "over-optimised beyond ppo β=0.1: the reward goes on rising to +3.00 while gold falls from +0.90" in said
    assert "2 of 3 settings lie on the frontier" in said


def test_a_comparison_in_which_all_runs_failed_says_so(recipe: Recipe) -> None:
    (variant,) = variants(recipe, ["dpo"], [0.1], 1)
    found = groups([failed(variant, "the disk is full")], {})
    assert in_words(found) == ["No run came to a result."]


def test_the_page_holds_its_picture_and_escapes_what_it_is_told(tmp_path: Path) -> None:
    found: list[Group] = groups([row("dpo", "β=<b>", 0, 1.0, 1.0), row("ppo", "", 0, 2.0, 0.5)], {})
    picture = draw_frontier(found, tmp_path / "frontier.png")
    page = comparison_page("<script>", found, ["a & b"], [("x", "<i>")], picture)
    assert "<script>" not in page
    assert "β=&lt;b&gt;" in page
    assert "a &amp; b" in page
    assert "&lt;i&gt;" in page
    assert "data:image/png;base64,iVBOR" in page
    assert "://" not in page
