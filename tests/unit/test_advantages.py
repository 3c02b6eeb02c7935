"""From scores to advantages: against sums written out, Monte-Carlo returns, and the papers' own formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steps.advantages import KLController, explained_variance, gae, masked_mean, token_rewards, whiten


def batch(seed: int, rows: int = 5, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask of rows of different length, in double precision."""
    draw = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, width, generator=draw, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=draw)
    mask = (torch.arange(width) < lengths[:, None]).double()
    return rewards * mask, values * mask, mask


def gae_written_out(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Σ_l (γλ)^l δ_{t+l}, term by term (arXiv:1506.02438, eq. 16)."""
    found = torch.zeros_like(rewards)
    for row, length in enumerate(mask.sum(1).int().tolist()):
        after = [*values[row, 1:length].tolist(), 0.0]
        deltas = [float(rewards[row, t]) + gamma * after[t] - float(values[row, t]) for t in range(length)]
        for t in range(length):
            found[row, t] = sum((gamma * lam) ** n * deltas[t + n] for n in range(length - t))
    return found


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_gae_is_the_sum_written_out(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = batch(seed)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = gae_written_out(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, (expected + values) * mask, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_lambda_one_gives_monte_carlo_returns_whatever_the_critic_says(gamma: float) -> None:
    rewards, values, mask = batch(4)
    _, returns = gae(rewards, values, mask, gamma, 1.0)
    for row, length in enumerate(mask.sum(1).int().tolist()):
        for t in range(length):
            ahead = sum(gamma ** (u - t) * float(rewards[row, u]) for u in range(t, length))
            assert float(returns[row, t]) == pytest.approx(ahead, abs=1e-12)


def test_lambda_nought_gives_one_step_errors() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    values = torch.tensor([[0.5, 1.5, 2.5]])
    advantages, _ = gae(rewards, values, torch.ones(1, 3), 0.9, 0.0)
    torch.testing.assert_close(advantages, torch.tensor([[1 + 0.9 * 1.5 - 0.5, 2 + 0.9 * 2.5 - 1.5, 3 - 2.5]]))


def test_a_perfect_critic_leaves_no_advantage() -> None:
    rewards, _, mask = batch(5)
    _, returns = gae(rewards, torch.zeros_like(rewards), mask, 0.97, 1.0)
    advantages, _ = gae(rewards, returns, mask, 0.97, 0.3)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), rtol=0, atol=1e-12)


def test_what_stands_behind_an_answer_changes_nothing() -> None:
    rewards, values, mask = batch(6)
    noise = torch.randn_like(values) * (1 - mask)
    torch.testing.assert_close(
        gae(rewards, values + noise, mask, 0.9, 0.95), gae(rewards, values, mask, 0.9, 0.95), rtol=0, atol=0
    )


def test_the_score_stands_at_the_last_token_and_every_token_pays_for_its_divergence() -> None:
    log_ratios = torch.tensor([[0.5, -0.25, 9.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    rewards = token_rewards(torch.tensor([4.0, -1.0]), log_ratios, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 4.025, 0.0], [-0.1, -0.2, -1.3]]))


def test_the_rewards_of_an_answer_sum_to_its_score_less_the_penalty() -> None:
    """R(x, y) = r(x, y) − β log[π(y|x)/ρ(y|x)] (arXiv:1909.08593, eq. 2)."""
    log_ratios, _, mask = batch(7)
    scores = torch.arange(5, dtype=torch.float64)
    total = token_rewards(scores, log_ratios, mask, 0.3).sum(1)
    torch.testing.assert_close(total, scores - 0.3 * (log_ratios * mask).sum(1))


@given(st.integers(0, 99))
def test_white_values_have_mean_nought_and_variance_one(seed: int) -> None:
    values, _, mask = batch(seed, rows=6, width=9)
    white = whiten(values, mask)
    assert float(masked_mean(white, mask)) == pytest.approx(0, abs=1e-9)
    assert float(masked_mean(white**2, mask)) == pytest.approx(1, abs=1e-6)
    assert (white[mask == 0] == 0).all()


def test_whitening_can_keep_the_mean() -> None:
    values, _, mask = batch(8)
    kept = whiten(values, mask, shift_mean=False)
    assert float(masked_mean(kept, mask)) == pytest.approx(float(masked_mean(values, mask)), abs=1e-9)


def test_several_processes_whiten_as_one() -> None:
    values, _, mask = batch(9, rows=6)
    halves = [(values[:2], mask[:2]), (values[2:], mask[2:])]

    def local_sums(function, *arguments):
        """What each process would add up at each of its calls of `total`."""
        seen: list[Tensor] = []
        function(*arguments, total=lambda sums: seen.append(sums) or sums)
        return seen

    first = [local_sums(lambda v, m, total: masked_mean(v, m, total), *half)[0] for half in halves]
    mean = masked_mean(values, mask)
    assert float((first[0] + first[1])[0] / (first[0] + first[1])[1]) == pytest.approx(float(mean), abs=1e-12)
    variance = masked_mean((values - mean) ** 2, mask)
    answers = [torch.stack([(values * mask).sum(), mask.sum()]), torch.stack([variance * mask.sum(), mask.sum()])]
    for part, part_mask in halves:
        given_back = iter(answers)
        white = whiten(part, part_mask, total=lambda sums, answers=given_back: next(answers))
        rows = slice(0, 2) if len(part) == 2 else slice(2, 6)
        torch.testing.assert_close(white, whiten(values, mask)[rows])


def test_explained_variance_of_known_critics() -> None:
    returns, noise, mask = batch(10, rows=40, width=20)
    assert float(explained_variance(returns, returns, mask)) == pytest.approx(1)
    assert float(explained_variance(returns + 3, returns, mask)) == pytest.approx(1)  # a bias explains no less
    assert float(explained_variance(torch.zeros_like(returns), returns, mask)) == pytest.approx(0)
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3)
    assert float(explained_variance(returns + noise, returns, mask)) == pytest.approx(0, abs=0.25)


def test_a_fixed_coefficient_stays() -> None:
    kl = KLController(0.05)
    kl.update(1e9)
    assert kl.coefficient == 0.05


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (7.2, 1.02), (60.0, 1.02), (0.0, 0.98), (-3.0, 0.98)],
)
def test_the_controller_moves_a_tenth_of_the_relative_error_held_to_a_fifth(kl: float, factor: float) -> None:
    """Ziegler et al. 2019, §2.2, with K_β = 0.1."""
    controller = KLController(0.2, target=6.0)
    controller.update(kl)
    assert controller.coefficient == pytest.approx(0.2 * factor)


def test_the_controller_brings_a_policy_that_answers_to_its_target() -> None:
    """Where KL falls as 1/β, the fixed point is the target."""
    controller = KLController(5.0, target=4.0)
    for _ in range(2000):
        controller.update(8.0 / controller.coefficient)
    assert 8.0 / controller.coefficient == pytest.approx(4.0, rel=1e-3)
    assert math.isfinite(controller.coefficient)
