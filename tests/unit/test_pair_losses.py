"""Losses of pairs: numbers derived on paper, where their gradients vanish, and gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steps.pair_losses import (
    calibration_loss,
    conservative_loss,
    cpo_loss,
    log_odds,
    orpo_loss,
    simpo_loss,
    slic_loss,
)

LN2 = math.log(2)


def of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# -- at equal likelihoods ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_a_policy_that_sees_no_difference_pays_ln_2(smoothing: float) -> None:
    assert float(conservative_loss(of(0.0), smoothing)) == pytest.approx(LN2)


def test_equal_likelihoods_by_hand() -> None:
    equal, tokens = of(-12.0), of(4.0)
    assert float(calibration_loss(equal, equal, 1.5)) == 1.5
    assert float(slic_loss(equal, equal, of(-20.0), 1.5, 0.1)) == pytest.approx(1.5 + 0.1 * 20)
    assert float(simpo_loss(equal, equal, tokens, tokens, 2.0, 0.0)) == pytest.approx(LN2)
    assert float(simpo_loss(equal, equal, tokens, tokens, 2.0, 1.0)) == pytest.approx(-math.log(sigmoid(-1.0)))
    assert float(cpo_loss(equal, equal, tokens, 0.1, 0.0)) == pytest.approx(LN2)
    assert float(cpo_loss(equal, equal, tokens, 0.1, 1.0)) == pytest.approx(LN2 + 3)  # 12 nats over 4 tokens
    assert float(orpo_loss(equal, equal, tokens, tokens, 0.1)) == pytest.approx(3 + 0.1 * LN2)


# -- each by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.05, 0.1, 0.3])
def test_the_conservative_gradient_vanishes_where_the_policy_is_as_sure_as_the_labels(smoothing: float) -> None:
    """σ(m) = 1 − ε, at m = log((1 − ε)/ε); below it chosen answers are pulled up, above it down."""
    optimum = math.log((1 - smoothing) / smoothing)
    margins = of(optimum, optimum - 0.5, optimum + 0.5).requires_grad_()
    conservative_loss(margins, smoothing).sum().backward()
    gradient = margins.grad.tolist()
    assert gradient[0] == pytest.approx(0, abs=1e-12)
    assert gradient[1] < 0 < gradient[2]
    assert gradient[1] == pytest.approx(sigmoid(optimum - 0.5) - (1 - smoothing))


def test_without_smoothing_the_conservative_loss_is_dpos() -> None:
    margins = torch.linspace(-6, 6, 25, dtype=torch.float64)
    torch.testing.assert_close(conservative_loss(margins, 0.0), -torch.nn.functional.logsigmoid(margins))


@pytest.mark.parametrize(
    ("chosen", "rejected", "loss"),
    [(-10.0, -10.0, 1.0), (-10.0, -10.5, 0.5), (-10.0, -11.0, 0.0), (-10.0, -30.0, 0.0), (-12.0, -10.0, 3.0)],
)
def test_the_calibration_hinge_by_hand(chosen: float, rejected: float, loss: float) -> None:
    """δ = 1: nought once the chosen answer is e times as likely."""
    assert float(calibration_loss(of(chosen), of(rejected), 1.0)) == pytest.approx(loss)


def test_beyond_the_margin_only_what_sft_imitates_is_learnt_from() -> None:
    chosen, rejected, targets = (of(value).requires_grad_() for value in (-5.0, -9.0, -7.0))
    slic_loss(chosen, rejected, targets, 1.0, 0.25).sum().backward()
    assert (float(chosen.grad), float(rejected.grad), float(targets.grad)) == (0, 0, -0.25)


def test_simpo_looks_at_the_mean_of_a_token() -> None:
    """Twice the tokens at the same likelihood each: no difference; DPO's sum would see one."""
    short, long = (of(-6.0), of(3.0)), (of(-12.0), of(6.0))
    assert float(simpo_loss(long[0], short[0], long[1], short[1], 2.5, 0.0)) == pytest.approx(LN2)
    # −1 against −2 nats a token: 2.5 · 1 − 1.5 = 1
    found = simpo_loss(of(-4.0), of(-4.0), of(4.0), of(2.0), 2.5, 1.5)
    assert float(found) == pytest.approx(-math.log(sigmoid(1.0)))


@pytest.mark.parametrize(("probability", "odds"), [(0.5, 1.0), (0.8, 4.0), (0.25, 1 / 3), (1e-9, 1e-9)])
def test_odds_by_hand(probability: float, odds: float) -> None:
    assert float(log_odds(of(math.log(probability)))) == pytest.approx(math.log(odds), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_stay_finite_at_both_ends(dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, -1e-12, -1e-4, -LN2, -50.0, -1e4], dtype=dtype, requires_grad=True)
    found = log_odds(ends)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(ends.grad).all()


def test_the_odds_ratio_by_hand() -> None:
    """p = 0.8 and 0.5 a token: odds 4 and 1, so σ(log 4) = 0.8."""
    chosen, rejected = of(3 * math.log(0.8)), of(2 * math.log(0.5))
    found = orpo_loss(chosen, rejected, of(3.0), of(2.0), 0.5)
    assert float(found) == pytest.approx(-math.log(0.8) - 0.5 * math.log(0.8))


# -- gradients ---------------------------------------------------------------------------------------------------

LENGTHS = of(3.0, 7.0, 5.0), of(6.0, 2.0, 5.0)
OF_LIKELIHOODS = {
    "conservative": lambda chosen, rejected: conservative_loss(0.3 * (chosen - rejected), 0.1),
    "slic": lambda chosen, rejected: slic_loss(chosen, rejected, chosen, 1.0, 0.2),
    "simpo": lambda chosen, rejected: simpo_loss(chosen, rejected, *LENGTHS, 2.0, 0.7),
    "cpo": lambda chosen, rejected: cpo_loss(chosen, rejected, LENGTHS[0], 0.2, 0.5),
    "orpo": lambda chosen, rejected: orpo_loss(chosen, rejected, *LENGTHS, 0.3),
}


@pytest.mark.parametrize("name", OF_LIKELIHOODS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    chosen = of(-4.0, -9.0, -3.0).requires_grad_()
    rejected = of(-5.5, -8.5, -9.0).requires_grad_()
    assert torch.autograd.gradcheck(OF_LIKELIHOODS[name], (chosen, rejected))


@pytest.mark.parametrize("name", OF_LIKELIHOODS)
def test_a_loss_is_one_number_for_each_pair(name: str) -> None:
    chosen, rejected = of(-4.0, -9.0, -3.0), of(-5.5, -8.5, -9.0)
    whole = OF_LIKELIHOODS[name](chosen, rejected)
    assert whole.shape == (3,)
    other = OF_LIKELIHOODS[name](chosen, of(-5.5, -2.0, -9.0))
    assert whole[[0, 2]].tolist() == other[[0, 2]].tolist()
    assert float(whole[1]) < float(other[1])  # the likelier the rejected side, the dearer
