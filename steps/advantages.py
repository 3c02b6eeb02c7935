"""From scores of whole answers to an advantage for every token. Pure functions of tensors.

Shapes: B answers of at most T tokens; `mask` is (B, T), 1 where an answer has a token. A sum over several processes is
made by `total`, a function from a tensor of local sums to the sums over all of them; one process needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]


def alone(sums: Tensor) -> Tensor:
    """The sums over all processes, where there is one."""
    return sums


def masked_mean(values: Tensor, mask: Tensor, total: Total = alone) -> Tensor:
    """Mean of (B, T) values over the tokens there are; a scalar."""
    sums = total(torch.stack([(values * mask).sum(), mask.sum().to(values.dtype)]))
    return sums[0] / sums[1].clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, total: Total = alone) -> Tensor:
    """(B, T) values with variance 1 over the tokens there are, and mean 0 unless `shift_mean` is false."""
    mean = masked_mean(values, mask, total)
    variance = masked_mean((values - mean) ** 2, mask, total)
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (white if shift_mean else white + mean) * mask


def token_rewards(scores: Tensor, log_ratios: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """(B, T) rewards: the answer's score at its last token, and at every token what it costs to leave the reference.

    R(x, y) = r(x, y) − β log[π(y|x) / ρ(y|x)] (Ziegler et al. 2019, arXiv:1909.08593, eq. 2), token by token.

    Args:
        scores: (B,).
        log_ratios: (B, T), log π − log ρ of each token.
    """
    rewards = -kl_coefficient * log_ratios * mask
    last = (mask.sum(1) - 1).clamp(min=0).long()
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns a critic should learn, (B, T) each.

    Â_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V(s_{t+1}) − V(s_t), V = 0 after the last token (Schulman et al. 2015,
    arXiv:1506.02438, eq. 16). λ = 1 gives Monte-Carlo returns.

    Args:
        values: (B, T), V before each token.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    carried = torch.zeros_like(rewards[:, 0])
    after = torch.zeros_like(carried)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * after - values[:, t]
        carried = (delta + gamma * lam * carried) * mask[:, t]
        advantages[:, t], after = carried, values[:, t]
    return advantages, (advantages + values) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, total: Total = alone) -> Tensor:
    """1 − Var[returns − values] / Var[returns]: 1 for a perfect critic, 0 for one that knows the mean alone."""
    residual = returns - values

    def variance(of: Tensor) -> Tensor:
        return masked_mean((of - masked_mean(of, mask, total)) ** 2, mask, total)

    return 1 - variance(residual) / variance(returns).clamp(min=1e-8)


@dataclass
class KLController:
    """The coefficient of the KL penalty: fixed, or steered towards a target (Ziegler et al. 2019, §2.2).

    e = clip((KL − target) / target, −0.2, 0.2); β ← β (1 + rate · e), once for every rollout.

    Attributes:
        coefficient: β, in reward per nat.
        target: nats an answer; None keeps β as it is.
        rate: K_β of the paper.
    """

    coefficient: float
    target: float | None = None
    rate: float = 0.1

    def update(self, kl: float) -> None:
        """Take note of a rollout's mean KL, in nats an answer."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + self.rate * error
