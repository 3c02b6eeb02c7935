"""Losses as pure functions of tensors: of policy gradients, token by token; estimates of KL; of reward models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def clipped_policy_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """−min(ρ Â, clip(ρ, 1−ε, 1+ε) Â) with ρ = π/π_old (Schulman et al. 2017, arXiv:1707.06347, eq. 7)."""
    ratio = (log_probs - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """½ max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²); unclipped when `clip` is None.

    After the reference implementation of PPO (openai/baselines, `ppo2`); the paper's eq. 9 has the plain square.
    """
    plain = (values - returns) ** 2
    if clip is None:
        return 0.5 * plain
    held = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.max(plain, (held - returns) ** 2)


def clipped(log_probs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """1 where the clip takes the gradient away: the ratio has left 1 ± ε on the side the advantage pushes to."""
    ratio = (log_probs - old).exp()
    return (((ratio > 1 + clip) & (advantages > 0)) | ((ratio < 1 - clip) & (advantages < 0))).to(log_probs.dtype)


def k1(log_ratios: Tensor) -> Tensor:
    """log π/ρ of tokens drawn from π: unbiased for KL(π‖ρ), negative at times (Schulman 2020, "Approximating KL")."""
    return log_ratios


def k3(log_ratios: Tensor) -> Tensor:
    """ρ/π − 1 + log π/ρ of tokens drawn from π: unbiased for KL(π‖ρ) and never negative (ibid.)."""
    return torch.expm1(-log_ratios) + log_ratios


# -- reward models: losses of one prompt's candidates, which are padded to K -------------------------------------


def best_of_k_loss(rewards: Tensor, best: Tensor, there: Tensor) -> Tensor:
    """−log softmax(r)_b of the candidate b that people liked best (Ziegler et al. 2019, arXiv:1909.08593, eq. 1).

    With two candidates that is Bradley–Terry's loss.

    Args:
        rewards: (B, K).
        best: (B, K) share of the choice that falls to each candidate, 1 in sum; several that are best share it.
        there: (B, K) whether there is a candidate at all.

    Returns:
        (B,) nats.
    """
    chances = rewards.masked_fill(~there, -torch.inf).log_softmax(-1)
    return -(best * chances.masked_fill(~there, 0)).sum(-1)


def ranking_loss(rewards: Tensor, preferred: Tensor, margins: Tensor | None = None) -> Tensor:
    """Mean of −log σ(r_i − r_j − m_ij) over the compared pairs (Ouyang et al. 2022, arXiv:2203.02155, eq. 1).

    Where all of K candidates were compared, a pair weighs 1 / (K choose 2). A tie is half a win of either side, whose
    loss is least, log 2, where the rewards are equal. The margin m is that of Touvron et al. 2023, arXiv:2307.09288,
    eq. 2.

    Args:
        rewards: (B, K).
        preferred: (B, K, K) how often i was preferred to j, in [0, 1]; NaN where the two were not compared. The
            entries above the diagonal count, those below say the same.
        margins: (B, K, K), by how much the reward of i has to exceed that of j, where i was preferred.

    Returns:
        (B,) nats; 0 where nothing was compared.
    """
    wins = preferred.triu(1)
    compared = ~wins.isnan() & torch.ones_like(wins, dtype=torch.bool).triu(1)
    wins = wins.masked_fill(~compared, 0)
    apart = rewards[:, :, None] - rewards[:, None, :]
    held = torch.zeros_like(apart) if margins is None else margins
    losses = -wins * logsigmoid(apart - held) - (1 - wins) * logsigmoid(-apart - held.transpose(1, 2))
    return losses.masked_fill(~compared, 0).sum((1, 2)) / compared.sum((1, 2)).clamp(min=1)


def plackett_luce_loss(rewards: Tensor, ranks: Tensor) -> Tensor:
    """−log P(ranking), the best drawn from all, the next from the rest, and so on (Plackett 1975, Appl. Stat. 24).

    P = Π_i exp r_i / Σ_{j not ranked above i} exp r_j, which is Bradley–Terry's for two. Each of several that tie is
    drawn from all that are not above it (Breslow 1974, Biometrics 30, p. 89): their rewards are drawn together.

    Args:
        rewards: (B, K).
        ranks: (B, K), 1 the best, equal for a tie; NaN where there is no candidate.

    Returns:
        (B,) nats.
    """
    left = ranks[:, None, :] >= ranks[:, :, None]  # whether j was still there when i was drawn
    there = ~ranks.isnan()
    rest = rewards[:, None, :].masked_fill(~left, -torch.inf)
    rest = rest.masked_fill(~there[:, :, None], 0).logsumexp(-1)
    return (rest - rewards).masked_fill(~there, 0).sum(-1)
