"""Self-play rewards: win rates derived on paper, what holds of all of them, circles, and the method in a recipe."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from steps import pipeline
from steps.comparison import variants
from steps.config import Recipe, parse, read_yaml, section
from steps.errors import RecipeError
from steps.row_lineage import ASKED, MEASURED, used
from steps.self_play import for_leave_one_out, preferences, win_rates

GROUPS = st.lists(st.floats(-30, 30), min_size=2, max_size=8)


def rates_of(*scores: float) -> list[float]:
    return win_rates(preferences(np.array(scores))).tolist()


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Each reward less the mean of the others, as TRL's RLOOTrainer has it."""
    return rewards - (rewards.sum(-1, keepdims=True) - rewards) / (rewards.shape[-1] - 1)


# -- by hand -----------------------------------------------------------------------------------------------------


def test_of_two_answers_one_wins_with_p_and_the_other_with_the_rest() -> None:
    """σ(ln 3) = 3/4."""
    assert rates_of(math.log(3), 0.0) == pytest.approx([0.75, 0.25])


def test_three_answers_by_hand() -> None:
    """Odds 1 : 2 : 4, so 1/3 and 1/5 for the first, 2/3 and 1/3 for the second, 4/5 and 2/3 for the third."""
    assert rates_of(0.0, math.log(2), math.log(4)) == pytest.approx([4 / 15, 1 / 2, 11 / 15])


@pytest.mark.parametrize("answers", [2, 3, 7])
def test_answers_of_one_score_win_half(answers: int) -> None:
    assert rates_of(*[1.7] * answers) == pytest.approx([0.5] * answers)


def test_scores_far_apart_count_wins() -> None:
    """The best beats all, the worst none; no score is worth more than its wins."""
    assert rates_of(-1e4, 0.0, 50.0, 1e6) == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_preferences_that_go_in_a_circle_are_worth_half_each() -> None:
    """Rock, paper, scissors: no score of single answers says so, and self-play is at rest."""
    assert win_rates(CIRCLE).tolist() == [0.5, 0.5, 0.5]


def test_models_that_each_rank_may_go_in_a_circle_together() -> None:
    """Condorcet: abc, bca, cab. Two of three prefer a to b, b to c, and c to a."""
    members = np.array([[40.0, 20, 0], [0, 40, 20], [20, 0, 40]])
    together = preferences(members).mean(0)
    assert [together[0, 1], together[1, 2], together[2, 0]] == pytest.approx([2 / 3] * 3)
    assert win_rates(together).tolist() == pytest.approx([0.5] * 3)


def test_an_ensemble_is_less_sure_than_the_mean_of_its_scores() -> None:
    """One model is sure of either side: ¾ and ¼, together ½; σ of one sure and one indifferent is between theirs."""
    sure, unsure = [math.log(3), 0.0], [0.0, 0.0]
    split, half = np.array([sure, sure[::-1]]), np.array([sure, unsure])
    assert win_rates(preferences(split).mean(0)).tolist() == pytest.approx([0.5, 0.5])
    assert win_rates(preferences(half).mean(0)).tolist() == pytest.approx([0.625, 0.375])


def test_prompts_do_not_meet() -> None:
    scores = np.array([[0.0, 1.0], [5.0, 4.0]])
    apart = [win_rates(preferences(row)) for row in scores]
    assert np.array_equal(win_rates(preferences(scores)), apart)


def test_the_diagonal_is_not_looked_at() -> None:
    assert win_rates(np.array([[math.nan, 0.9], [0.1, math.inf]])).tolist() == pytest.approx([0.9, 0.1])


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 1, 1)])
def test_a_group_of_one_and_a_table_that_is_no_square_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least two answers"):
        win_rates(np.full(shape, 0.5))


# -- of all groups -----------------------------------------------------------------------------------------------


@given(GROUPS)
def test_the_mean_of_a_group_is_half_and_all_lie_between_0_and_1(scores: list[float]) -> None:
    rates = rates_of(*scores)
    assert sum(rates) / len(rates) == pytest.approx(0.5)
    assert all(-1e-12 <= rate <= 1 + 1e-12 for rate in rates)


@given(GROUPS, st.floats(-100, 100))
def test_a_constant_on_all_scores_changes_nothing(scores: list[float], constant: float) -> None:
    assert rates_of(*(score + constant for score in scores)) == pytest.approx(rates_of(*scores), abs=1e-10)


@given(GROUPS, st.floats(0.1, 5))
def test_a_higher_score_wins_more_and_the_others_less(scores: list[float], more: float) -> None:
    before, after = rates_of(*scores), rates_of(scores[0] + more, *scores[1:])
    assert after[0] >= before[0]
    assert all(now <= then + 1e-12 for now, then in zip(after[1:], before[1:], strict=True))
    close = rates_of(scores[0] / 10, *(score / 10 for score in scores[1:]))
    assert rates_of(scores[0] / 10 + more, *(score / 10 for score in scores[1:]))[0] > close[0]


@given(GROUPS)
def test_the_order_is_that_of_the_scores(scores: list[float]) -> None:
    by_rate = [rate for _, rate in sorted(zip(scores, rates_of(*scores), strict=True))]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(by_rate))


@given(GROUPS)
def test_what_leave_one_out_makes_of_it_is_the_win_rate_beyond_half(scores: list[float]) -> None:
    """Of win rates themselves it would be G/(G − 1) times as much."""
    rates, answers = np.array(rates_of(*scores)), len(scores)
    assert leave_one_out(for_leave_one_out(rates)) == pytest.approx(rates - 0.5, abs=1e-12)
    assert leave_one_out(rates) == pytest.approx((rates - 0.5) * answers / (answers - 1), abs=1e-12)


# -- what self-play comes to -------------------------------------------------------------------------------------

CIRCLE = np.array([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])  # rock, paper, scissors


def learnt(policy: np.ndarray, preferred: np.ndarray) -> np.ndarray:
    """The expected gradient in the logits of a policy of K answers, exact over all pairs of its draws.

    E[mean over the pair of (w − ½) ∇log π(y)], where ∇log π(y) = e_y − π.
    """
    answers = range(len(policy))
    found = np.zeros(len(policy))
    for pair in itertools.product(answers, answers):
        advantages = leave_one_out(for_leave_one_out(win_rates(preferred[np.ix_(pair, pair)])))
        scores = np.eye(len(policy))[list(pair)] - policy
        found += policy[list(pair)].prod() * (advantages[:, None] * scores).mean(0)
    return found


def test_the_gradient_is_that_of_the_win_rate_against_a_policy_that_stands_still() -> None:
    """∇ Σ π(y) P(y ≻ π) of a softmax is π (q − π·q), where q(y) = P(y ≻ π)."""
    policy, preferred = np.array([0.3, 0.2, 0.5]), preferences(np.array([0.0, 1.0, -2.0]))
    wins = preferred @ policy
    assert learnt(policy, preferred) == pytest.approx(policy * (wins - policy @ wins), abs=1e-12)


def test_rock_paper_scissors_leaves_a_uniform_policy_where_it_is_and_no_other() -> None:
    assert learnt(np.full(3, 1 / 3), CIRCLE) == pytest.approx(np.zeros(3), abs=1e-12)
    assert np.abs(learnt(np.array([0.5, 0.3, 0.2]), CIRCLE)).max() > 0.01


def test_where_the_wins_of_a_circle_differ_the_rest_is_at_the_minimax_winner() -> None:
    """Each answer comes as often as one of the other two beats the other: margins ¼, ¼, ½ give the policy ¼, ¼, ½."""
    preferred = 0.5 + np.array([[0, -0.5, 0.25], [0.5, 0, -0.25], [-0.25, 0.25, 0]])
    winner = np.array([0.25, 0.25, 0.5])
    assert preferred @ winner == pytest.approx([0.5] * 3)
    assert learnt(winner, preferred) == pytest.approx(np.zeros(3), abs=1e-12)
    assert np.abs(learnt(np.full(3, 1 / 3), preferred)).max() > 0.01


def test_self_play_in_a_circle_comes_to_the_minimax_winner_on_average() -> None:
    """Multiplicative weights on the win rate: no policy of the run is it, their mean is."""
    logits, policies = np.log([0.6, 0.3, 0.1]), []
    for _ in range(4000):
        policies.append(softmax(logits))
        logits = logits + 0.05 * (CIRCLE @ policies[-1] - 0.5)
    assert np.mean(policies, axis=0) == pytest.approx([1 / 3] * 3, abs=0.02)
    assert np.abs(policies[-1] - 1 / 3).max() > 0.1


# -- in a recipe -------------------------------------------------------------------------------------------------


SHARED = {"rollouts": 5, "trainer": {"num_generations": 4, "beta": 0.1, "learning_rate": 1e-3}}


def recipe(method: str = "spo", **own: object) -> Recipe:
    tree = read_yaml(tiny.RECIPE, "tiny")
    tree["policy"] = {"method": method, "rloo": SHARED, **({method: own} if own else {})}
    return parse(tree, "tiny")


def test_rollouts_and_training_are_rloos_where_a_section_says_nothing_else() -> None:
    assert recipe("rloo").policy.groups.model_dump() == recipe("rloo").policy.rloo.model_dump()
    grpo = recipe("grpo", trainer={"loss_type": "grpo", "num_generations": 8}).policy.groups
    assert grpo.rollouts == 5
    assert grpo.trainer == {"learning_rate": 1e-3, "loss_type": "grpo", "num_generations": 8}
    tree = read_yaml(tiny.RECIPE, "tiny")
    own = {"trainer": {**SHARED["trainer"], "normalize_advantages": True, "reward_clip_range": [-1, 1]}}
    tree["policy"] = {"method": "grpo", "rloo": own}
    assert parse(tree, "tiny").policy.groups.trainer == {
        "num_generations": 4,
        "learning_rate": 1e-3,
    }  # GRPO has neither


def test_the_weight_of_the_kl_is_each_methods_own() -> None:
    assert [recipe(method).policy.groups.trainer.get("beta") for method in ("rloo", "grpo", "spo")] == [0.1, None, None]
    assert recipe(trainer={"beta": 0.02}).policy.groups.trainer == {**SHARED["trainer"], "beta": 0.02}


def test_a_used_recipe_holds_rloos_section_beside_it() -> None:
    made = recipe(trainer={"beta": 0.02})
    assert list(made.used()["policy"]) == ["method", "start", "rloo", "spo"]
    assert parse(made.used(), "again").policy.groups == made.policy.groups
    assert list(recipe("rloo").used()["policy"]) == ["method", "start", "rloo"]


def test_steps_get_the_settings_and_the_name() -> None:
    step = pipeline.step_of("policy", recipe())
    settings = {name: pipeline._at(recipe(), path) for name, path in step.config.items()}
    assert section("groups", settings["groups"]) == recipe().policy.groups
    assert settings["method"] == "spo"


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"num_generations": 1}, "num_generations: answers to a prompt are held against each other, from 2; got 1"),
        ({"num_generations": "many"}, "from 2; got many"),
        ({"reward_clip_range": [0, 1]}, "a win rate lies between 0 and 1"),
        ({"max_steps": 3}, "set the method's `rollouts`"),
        ({"betta": 0.1}, "did you mean 'beta'"),
    ],
)
def test_what_cannot_work_is_refused_by_name(trainer: dict, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(trainer=trainer)
    assert "policy.spo.trainer" in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_one_answer_to_a_prompt_is_refused_of_its_relatives_too(method: str) -> None:
    tree = read_yaml(tiny.RECIPE, "tiny")
    tree["policy"] = {"method": method, method: {"trainer": {"num_generations": 1}}}
    with pytest.raises(RecipeError, match="from 2; got 1"):
        parse(tree, "tiny")


def test_it_has_a_row_in_a_comparison() -> None:
    planned = variants(recipe(), ["spo", "rloo@0.5"], [0.1, 0.2], 1)
    assert [variant.name for variant in planned] == ["spo β=0.1 seed 3", "spo β=0.2 seed 3", "rloo β=0.5 seed 3"]
    assert planned[1].recipe.policy.spo.trainer["beta"] == 0.2


def test_its_prompts_are_asked_in_training() -> None:
    frame = pd.DataFrame({"part": ["train", "held_out"], "prompt": ["a", "b"]})
    assert used("policy", "preferences", frame, {"groups.held_out": "1"}) == [ASKED, MEASURED]
