"""Losses of policy gradients, token by token, and estimates of KL. Pure functions of tensors of one shape."""

from __future__ import annotations

import torch
from torch import Tensor


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
