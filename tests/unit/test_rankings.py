"""Rankings: losses by hand and against each other, groups of a table, and what the split keeps of a record."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steps.config import Reward, parse
from steps.datasets import Dataset
from steps.errors import RecipeError
from steps.formats import FORMATS
from steps.losses import best_of_k_loss, plackett_luce_loss, ranking_loss
from steps.rankings import Group, groups_of, torn, whole_groups
from steps.row_lineage import MEASURED, TRAINED, UNUSED, used
from steps.rows import row_id
from steps.split import RANKS, split

NAN = math.nan


def wins(*rows: list[float]) -> torch.Tensor:
    """(1, K, K) preferences, from the entries above the diagonal."""
    size = len(rows) + 1
    found = torch.full((size, size), NAN, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, value in enumerate(row, start=i + 1):
            found[i, j], found[j, i] = value, 1 - value
    return found[None]


def rewards_of(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64, requires_grad=grad)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# -- losses ------------------------------------------------------------------------------------------------------


def test_best_of_k_is_the_cross_entropy_of_a_softmax() -> None:
    """exp r = 4, 2, 1, 1: the best is drawn with probability ½, log 2."""
    rewards = rewards_of(math.log(4), math.log(2), 0, 0)
    there, best = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    assert best_of_k_loss(rewards, best, there).item() == pytest.approx(math.log(2))
    shared = torch.tensor([[0.5, 0.5, 0, 0]], dtype=torch.float64)
    assert best_of_k_loss(rewards, shared, there).item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_rankings_weigh_a_pair_by_the_number_of_pairs() -> None:
    """Three answers, all in order: the mean of three Bradley–Terry losses, 1 / (3 choose 2) each."""
    loss = ranking_loss(rewards_of(2, 1, -1), wins([1, 1], [1]))
    assert loss.item() == pytest.approx(-(math.log(sigma(1)) + math.log(sigma(3)) + math.log(sigma(2))) / 3)


def test_a_tie_is_half_a_win_of_either_and_least_where_rewards_are_equal() -> None:
    apart = ranking_loss(rewards_of(1, 0), wins([0.5])).item()
    assert apart == pytest.approx(-0.5 * (math.log(sigma(1)) + math.log(sigma(-1))))
    rewards = rewards_of(0.3, 0.3, grad=True)
    level = ranking_loss(rewards, wins([0.5]))
    level.backward()
    assert level.item() == pytest.approx(math.log(2)) and level.item() < apart
    assert rewards.grad.abs().max() == 0


def test_what_was_not_compared_is_not_learnt_from() -> None:
    rewards = rewards_of(1, 0, 5, grad=True)
    loss = ranking_loss(rewards, wins([1, NAN], [NAN]))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(sigma(1)))
    assert rewards.grad[0, 2] == 0 and rewards.grad.isfinite().all()
    assert ranking_loss(rewards, wins([NAN, NAN], [NAN])).item() == 0


def test_a_margin_has_to_be_reached_from_whichever_side_won() -> None:
    """−log σ(r_w − r_l − m): the loss at a difference of m is log 2, as it is at 0 without one."""
    margins = torch.zeros(1, 2, 2, dtype=torch.float64)
    margins[0, 0, 1] = 1.5
    assert ranking_loss(rewards_of(1.5, 0), wins([1]), margins).item() == pytest.approx(math.log(2))
    assert ranking_loss(rewards_of(0, 1.5), wins([0]), margins.mT).item() == pytest.approx(math.log(2))


def test_plackett_luce_is_a_draw_without_replacement() -> None:
    """exp r = 1, 2, 3 in the order 3, 1, 2: 3/6 · 1/3 · 1."""
    rewards = rewards_of(0, math.log(2), math.log(3))
    loss = plackett_luce_loss(rewards, torch.tensor([[2.0, 3.0, 1.0]], dtype=torch.float64))
    assert loss.item() == pytest.approx(-math.log(1 / 6))


def test_plackett_luce_is_a_probability_over_all_rankings() -> None:
    rewards = rewards_of(0.3, -1.2, 2.0, 0.1)
    chances = [
        math.exp(-plackett_luce_loss(rewards, torch.tensor([order], dtype=torch.float64)).item())
        for order in itertools.permutations((1.0, 2.0, 3.0, 4.0))
    ]
    assert sum(chances) == pytest.approx(1)


def test_answers_that_tie_are_drawn_together() -> None:
    rewards = rewards_of(1, 0, -1, grad=True)
    plackett_luce_loss(rewards, torch.tensor([[1.0, 1.0, 3.0]], dtype=torch.float64)).sum().backward()
    assert rewards.grad[0, 0] > rewards.grad[0, 1]  # the higher of the two comes down, against the lower


@given(st.floats(-5, 5), st.floats(-5, 5), st.booleans())
def test_of_two_answers_all_losses_are_bradley_terrys(first: float, second: float, won: bool) -> None:
    rewards = rewards_of(first, second)
    ranks = torch.tensor([[1.0, 2.0] if won else [2.0, 1.0]], dtype=torch.float64)
    best = (ranks == 1).double()
    expected = math.log1p(math.exp(second - first if won else first - second))
    for loss in (
        best_of_k_loss(rewards, best, torch.ones(1, 2, dtype=torch.bool)),
        ranking_loss(rewards, wins([float(won)])),
        plackett_luce_loss(rewards, ranks),
    ):
        assert loss.item() == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=5), st.integers(0, 3))
def test_padding_and_order_change_no_loss(values: list[float], more: int) -> None:
    size = len(values)
    whole = wins(*([1.0] * (size - 1 - i) for i in range(size - 1)))
    ranks = torch.arange(1.0, size + 1, dtype=torch.float64)[None]
    best = (ranks == 1).double()
    rewards = rewards_of(*values)

    def losses(order: list[int], pad: int) -> list[float]:
        def filled(given: torch.Tensor, value: float) -> torch.Tensor:
            return torch.nn.functional.pad(given, (0, pad) * (given.dim() - 1), value=value)

        there = filled(torch.ones(1, size, dtype=torch.bool), False)
        moved = rewards[:, order]
        return [
            best_of_k_loss(filled(moved, 0), filled(best[:, order], 0), there).item(),
            ranking_loss(filled(moved, 0), filled(whole[:, order][:, :, order], NAN)).item(),
            plackett_luce_loss(filled(moved, 0), filled(ranks[:, order], NAN)).item(),
        ]

    plain = losses(list(range(size)), 0)
    assert losses(list(range(size)), more) == pytest.approx(plain)
    assert losses(list(reversed(range(size))), more) == pytest.approx(plain)


def test_padding_gets_no_gradient_and_makes_none_infinite() -> None:
    rewards = rewards_of(1, 0, 0, grad=True)
    there = torch.tensor([[True, True, False]])
    total = (
        best_of_k_loss(rewards, torch.tensor([[1.0, 0, 0]], dtype=torch.float64), there)
        + plackett_luce_loss(rewards, torch.tensor([[1.0, 2.0, NAN]], dtype=torch.float64))
        + ranking_loss(rewards, wins([1, NAN], [NAN]))
    )
    total.sum().backward()
    assert rewards.grad.isfinite().all() and rewards.grad[0, 2] == 0
    assert rewards.grad[0, 0] == pytest.approx(3 * (sigma(1) - 1))


# -- groups ------------------------------------------------------------------------------------------------------


def table(*pairs: tuple[str, str, str], **columns: list) -> pd.DataFrame:
    return pd.DataFrame(pairs, columns=["prompt", "chosen", "rejected"]).assign(**columns)


def test_ties_are_read_off_ranks_and_missing_pairs_too() -> None:
    """a > b = c > d, of which the table lists what differs, and lacks (a, d)."""
    pairs = table(
        ("p", "a", "b"), ("p", "a", "c"), ("p", "b", "d"), ("p", "c", "d"),
        group=["g"] * 4, chosen_rank=[1, 1, 2, 2], rejected_rank=[2, 2, 4, 4],
    )  # fmt: skip
    (group,) = groups_of(pairs, 16)
    said = {(a, b): group.preferred[i, j] for i, a in enumerate(group.answers) for j, b in enumerate(group.answers)}
    assert said["b", "c"] == said["c", "b"] == 0.5
    assert said["a", "d"] == 1 and said["d", "a"] == 0
    assert group.is_whole and dict(zip(group.answers, group.ranks, strict=True)) == {"a": 1, "b": 2, "c": 2, "d": 4}
    (strict,) = groups_of(pairs, 16, known_by_rank=False)  # of pairs that a margin left out
    assert np.isnan(strict.preferred).sum() == 4 + 2 and (strict.preferred == 0.5).sum() == 2


def test_without_ranks_nothing_is_made_up() -> None:
    (group,) = groups_of(table(("p", "a", "b"), ("p", "c", "d")), 16)
    assert not group.is_whole and (~np.isnan(group.preferred)).sum() == 4
    assert [part.answers for part in torn([group])] == [("a", "b"), ("c", "d")]
    assert all(part.is_whole and list(part.ranks) == [1, 2] for part in torn([group]))


def test_people_who_differ_make_a_share() -> None:
    (group,) = groups_of(table(("p", "a", "b"), ("p", "b", "a"), ("p", "a", "b")), 16)
    assert group.preferred[0, 1] == pytest.approx(2 / 3)
    assert list(group.ranks) == [1, 2]


def test_several_best_answers_share_the_choice() -> None:
    group = Group("p", ("a", "b", "c"), np.full((3, 3), 0.5), np.zeros((3, 3)), np.array([1.0, 1.0, 3.0]))
    assert list(group.best) == [0.5, 0.5, 0]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40), st.integers(2, 6))
def test_a_large_group_is_cut_and_no_pair_is_lost(sides: list[tuple[int, int]], at_most: int) -> None:
    sides = [(a, b) for a, b in dict.fromkeys(sides) if a < b]
    if not sides:
        return
    groups = groups_of(table(*[("p", str(a), str(b)) for a, b in sides]), at_most)
    assert max(len(group.answers) for group in groups) <= at_most
    kept = [
        (group.answers[i], group.answers[j])
        for group in groups
        for i, j in np.argwhere(np.nan_to_num(group.preferred) == 1)
    ]
    assert sorted(kept) == sorted((str(a), str(b)) for a, b in sides)


def test_a_group_is_taken_whole_or_not_at_all() -> None:
    pairs = table(("p", "a", "b"), ("q", "a", "b"), ("p", "a", "c"), ("r", "a", "b"), ("p", "b", "c"))
    assert list(whole_groups(pairs, 4)["prompt"]) == ["p", "q", "p", "p"]
    assert list(whole_groups(pairs, 2)["prompt"]) == ["p", "p", "p"]  # the first group in any case
    assert len(whole_groups(pairs, None)) == 5


def test_what_a_step_saw_is_told_by_whole_groups() -> None:
    frame = table(*[("p", "a", "b"), ("q", "a", "b"), ("p", "a", "c")] * 2, margin=[NAN] * 6).assign(
        part=["train"] * 3 + ["held_out"] * 3
    )
    params = {"reward.loss": "rankings", "reward.pairs": "2", "reward.held_out": "400", "reward.min_margin": "0.0"}
    assert used("reward", "preferences", frame, params) == [TRAINED, UNUSED, TRAINED, *[MEASURED] * 3]


# -- what the split keeps of a record ----------------------------------------------------------------------------


def canonical(records: list[dict], format: str, drop: tuple[int, ...] = ()) -> pd.DataFrame:
    rows = []
    for line, record in enumerate(records, start=1):
        for part, row in enumerate(FORMATS[format](record)):
            rows.append({"file": "f", "line": line, "part": part, "source": "s", **row, "row_id": row_id(row)})
    frame = pd.DataFrame(rows)
    for name in ("chosen", "rejected", "tie", "margin", "answer", "score", "ratings"):
        if name not in frame:
            frame[name] = None
    return frame.drop(index=list(drop))


def entry(format: str) -> Dataset:
    shares = {"seed": 0, "demonstrations": 0.1, "preferences": 0.4, "held_out": 0.4}
    return Dataset(format=format, source={"files": {"a": "f"}}, split=shares)


def compared(number: int) -> dict:
    """Of four answers the first is best, the second and third tie, the last is worst."""
    return {
        "prompt": f"question {number}",
        "answers": [f"{number} {word}" for word in ("north", "east", "west", "south")],
        "preference": [1, 1, 1, 0, 1, 1],
    }


def test_a_record_of_comparisons_comes_back_with_its_ties() -> None:
    preferences = split(canonical([compared(n) for n in range(60)], "comparisons"), entry("comparisons"))["preferences"]
    groups = groups_of(preferences, 16)
    assert len(groups) == preferences["group"].nunique() > 20
    for group in groups:
        ranks = {answer.split()[1]: rank for answer, rank in zip(group.answers, group.ranks, strict=True)}
        assert ranks == {"north": 1, "east": 2, "west": 2, "south": 4} and group.is_whole
        assert (group.preferred == 0.5).sum() == 2
    both = preferences.groupby("group")["part"].nunique()
    assert both.max() == 1  # a group is on one side


def test_rankings_and_comparisons_say_the_same() -> None:
    ranked = [{**compared(n), "ranks": [1, 2, 2, 3]} for n in range(40)]
    made = [
        split(canonical(records, format), entry(format))["preferences"]
        for records, format in (([compared(n) for n in range(40)], "comparisons"), (ranked, "rankings"))
    ]
    pd.testing.assert_frame_equal(*made)


def test_a_missing_verdict_is_no_tie() -> None:
    """Without the verdict on (north, south) north is beaten by nobody, and neither would south be by north."""
    every_third = tuple(range(2, 6 * 60, 6))
    rows = canonical([compared(n) for n in range(60)], "comparisons", drop=every_third)
    preferences = split(rows, entry("comparisons"))["preferences"]
    assert preferences[["chosen_rank", "rejected_rank"]].isna().all(axis=None)
    for group in groups_of(preferences, 16):
        assert not group.is_whole and (group.preferred == 0.5).sum() == 0


def test_scored_answers_are_ranked_by_their_scores() -> None:
    records = [
        {"prompt": f"q{n}", "answers": [f"{n} a", f"{n} b", f"{n} c", f"{n} d"], "scores": [5, 3, 3, 1]}
        for n in range(60)
    ]
    preferences = split(canonical(records, "scored"), entry("scored"))["preferences"]
    for group in groups_of(preferences[preferences["part"] == "train"], 16):
        ranks = {answer.split()[1]: rank for answer, rank in zip(group.answers, group.ranks, strict=True)}
        assert ranks.items() <= {"a": 1, "b": 2, "c": 2, "d": 4}.items()
        assert group.is_whole


def test_other_formats_have_the_columns_they_had() -> None:
    pairs = [{"prompt": f"p{n}", "chosen": f"{n} yes", "rejected": f"{n} no"} for n in range(40)]
    rows = canonical(pairs, "preferences")
    assert not set(RANKS) & set(split(rows, entry("preferences"))["preferences"])


# -- the recipe --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"uncertainty_penalty": 1.0}, "ensemble=2"),
        ({"loss": "best_of_k", "margin_weight": 1.0}, "margin_weight"),
        ({"loss": "ranking"}, "reward.loss"),
        ({"candidates": 1}, "reward.candidates"),
    ],
)
def test_a_recipe_that_asks_for_what_cannot_be_is_refused(settings: dict, word: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse({"name": "x", "model": {"base": "b"}, "reward": settings}, "here")
    assert word in str(caught.value)


def test_defaults_are_one_plain_model() -> None:
    reward = Reward()
    assert (reward.loss, reward.ensemble, reward.normalise) == ("bradley_terry", 1, False)
