"""Losses of pairs of answers that TRL's DPOTrainer does not have. Pure functions of log-probabilities of whole answers.

Of every pair, (B,) each: `chosen` and `rejected`, log π(y|x) in nats, summed over the tokens of the answer; with
`…_lengths` for how many those are. Every function returns (B,), a loss for each pair.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def conservative_loss(margins: Tensor, smoothing: float) -> Tensor:
    """−(1 − ε) log σ(m) − ε log σ(−m): labels are wrong with probability ε.

    "Conservative DPO" (Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO"). The gradient
    in m is σ(m) − (1 − ε): gone where the policy holds a pair for right as often as its label is.

    Args:
        margins: (B,) m = β (log π/ρ of the chosen answer − log π/ρ of the rejected one).
    """
    return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)


def calibration_loss(chosen: Tensor, rejected: Tensor, delta: float) -> Tensor:
    """max(0, δ − log π(y_w) + log π(y_l)): SLiC-HF's rank calibration loss (arXiv:2305.10425, eq. 1, first term)."""
    return torch.relu(delta - chosen + rejected)


def slic_loss(chosen: Tensor, rejected: Tensor, targets: Tensor, delta: float, lam: float) -> Tensor:
    """max(0, δ − log π(y_w) + log π(y_l)) − λ log π(y_sft): SLiC-HF (Zhao et al. 2023, arXiv:2305.10425, eq. 1).

    Args:
        targets: (B,) log π of an answer SFT imitates; of another prompt, as a rule.
    """
    return calibration_loss(chosen, rejected, delta) - lam * targets


def simpo_loss(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, beta: float, gamma: float
) -> Tensor:
    """−log σ(β/|y_w| log π(y_w) − β/|y_l| log π(y_l) − γ): SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6)."""
    rewards = beta * (chosen / chosen_lengths - rejected / rejected_lengths)
    return -F.logsigmoid(rewards - gamma)


def cpo_loss(chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, beta: float, alpha: float) -> Tensor:
    """−log σ(β log π(y_w) − β log π(y_l)) − α/|y_w| log π(y_w): CPO (Xu et al. 2024, arXiv:2401.08417, §3).

    The second term is a mean over tokens, as in TRL, which the authors' code became; the paper has the sum.
    """
    return -F.logsigmoid(beta * (chosen - rejected)) - alpha * chosen / chosen_lengths


def log_odds(mean_log_probs: Tensor) -> Tensor:
    """log p/(1 − p) from log p, without loss of digits at either end.

    Args:
        mean_log_probs: log p, of the geometric mean of an answer's token probabilities; below 0.
    """
    log_p = mean_log_probs.clamp(max=-torch.finfo(mean_log_probs.dtype).eps)  # p = 1 has no odds
    near_one = log_p > -math.log(2)  # each branch only sees what it is exact for, or its gradient spoils the other's
    log1m = torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, log_p, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_one, -1.0, log_p))),
    )
    return log_p - log1m


def orpo_loss(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, beta: float
) -> Tensor:
    """−1/|y_w| log π(y_w) − λ log σ(log odds(y_w) − log odds(y_l)): ORPO (Hong et al. 2024, arXiv:2403.07691).

    Equations 6 and 7; the odds are those of the geometric mean of an answer's token probabilities.

    Args:
        beta: the paper's λ; TRL calls it `beta`.
    """
    likely, unlikely = chosen / chosen_lengths, rejected / rejected_lengths
    return -likely - beta * F.logsigmoid(log_odds(likely) - log_odds(unlikely))
