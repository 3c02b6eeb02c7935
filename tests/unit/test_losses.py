"""Losses of policy gradients: by hand, by their gradients, and KL estimates against closed form."""

from __future__ import annotations

import math

import pytest
import torch

from steps.losses import clipped, clipped_policy_loss, clipped_value_loss, k1, k3


def loss_of(ratio: float, advantage: float, clip: float = 0.2) -> float:
    log_probs = torch.tensor([math.log(ratio)], dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    return float(clipped_policy_loss(log_probs, torch.zeros(1, dtype=torch.float64), advantages, clip))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.4),  # held at 1.2
        (0.5, 2.0, -1.0),  # the pessimistic side is not held
        (0.5, -2.0, 1.6),  # held at 0.8
        (1.5, -2.0, 3.0),
    ],
)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float) -> None:
    """Figure 1 of arXiv:1707.06347: −L^CLIP as a function of the ratio, for either sign of the advantage."""
    assert loss_of(ratio, advantage) == pytest.approx(loss)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.5, 1.0), (0.5, -1.0), (1.1, 1.0), (0.5, 1.0), (1.5, -1.0)])
def test_the_gradient_is_gone_just_where_clipped_says_so(ratio: float, advantage: float) -> None:
    log_probs = torch.tensor([math.log(ratio)], requires_grad=True)
    advantages, old = torch.tensor([advantage]), torch.zeros(1)
    clipped_policy_loss(log_probs, old, advantages, 0.2).sum().backward()
    assert bool(clipped(log_probs.detach(), old, advantages, 0.2)) == (float(log_probs.grad) == 0)


def test_at_the_start_the_gradient_is_that_of_the_plain_policy_gradient() -> None:
    log_probs = torch.randn(6, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(6, dtype=torch.float64)
    clipped_policy_loss(log_probs, log_probs.detach(), advantages, 0.2).sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [
        (1.0, 1.0, 2.0, 0.5),
        (1.1, 1.0, 2.0, 0.405),  # inside the clip
        (1.5, 1.0, 2.0, 0.32),  # held at 1.2: the larger error counts
        (3.0, 1.0, 2.0, 0.5),  # held at 1.2 the error would be smaller, so it does not count
    ],
)
def test_value_loss_by_hand(value: float, old: float, target: float, loss: float) -> None:
    found = clipped_value_loss(*(torch.tensor([number]) for number in (value, old, target)), 0.2)
    assert float(found) == pytest.approx(loss)


def test_without_a_clip_the_value_loss_is_half_the_square() -> None:
    values, old, returns = torch.randn(3, 20)
    torch.testing.assert_close(clipped_value_loss(values, old, returns, None), 0.5 * (values - returns) ** 2)


@pytest.mark.parametrize("seed", range(4))
def test_both_kl_estimates_are_right_in_expectation(seed: int) -> None:
    """Summed over the distribution itself, not over samples of it: exact."""
    draw = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 30, generator=draw, dtype=torch.float64).log_softmax(-1)
    exact = float((p.exp() * (p - q)).sum())
    assert float((p.exp() * k1(p - q)).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((p.exp() * k3(p - q)).sum()) == pytest.approx(exact, abs=1e-12)


def test_the_third_estimate_is_never_negative_and_nought_at_equality() -> None:
    ratios = torch.linspace(-5, 5, 101, dtype=torch.float64)
    assert (k3(ratios) >= 0).all()
    assert float(k3(torch.zeros(1))) == 0
