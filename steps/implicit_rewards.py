"""Implicit rewards of held-out pairs, so that methods with and without a reward model stand in one chart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steps.backbone import Rows, answer_tokens, evaluating, token_log_probs
from steps.statistics import pair_accuracy

LogProbs = Callable[[Rows], Tensor]


class HeldOut:
    """Held-out pairs and how likely the start policy finds them, which is looked up once.

    Args:
        pairs: prompt, chosen, rejected.
        reference: (B, T) log-probabilities of completions under the start policy.
        batch: rows scored at once.
    """

    def __init__(
        self, pairs: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, reference: LogProbs, batch: int = 32
    ) -> None:
        self.tokenizer, self.batch = tokenizer, batch
        lengths = pairs[["chosen", "rejected"]].map(len).max(axis=1) + pairs["prompt"].map(len)
        pairs = pairs.loc[lengths.sort_values(kind="stable").index]  # little padding; no mean depends on the order
        self.sides = {side: self._rows(pairs["prompt"], pairs[side]) for side in ("chosen", "rejected")}
        self.reference = {side: self._likelihoods(rows, reference) for side, rows in self.sides.items()}

    def _rows(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Rows]:
        asked, said = answer_tokens(self.tokenizer, prompts, answers)
        pad = self.tokenizer.pad_token_id
        firsts = range(0, len(asked), self.batch)
        return [Rows.of(asked[i : i + self.batch], said[i : i + self.batch], pad) for i in firsts]

    @staticmethod
    @torch.no_grad()
    def _likelihoods(batches: Sequence[Rows], log_probs: LogProbs) -> Tensor:
        """(pairs,) log-probabilities of whole answers."""
        return torch.cat([(log_probs(rows).cpu() * rows.completion_mask).sum(1).double() for rows in batches])

    def measure(self, policy: PreTrainedModel, beta: float) -> dict[str, float]:
        """`eval_rewards/…`: β log(π/ρ) of chosen and rejected answers (DPO, arXiv:2305.18290, eq. 5), and accuracy."""

        def log_probs(rows: Rows) -> Tensor:
            return token_log_probs(policy, rows)[0]

        with evaluating(policy):
            found = {side: self._likelihoods(batches, log_probs) for side, batches in self.sides.items()}
        rewards = {side: beta * (found[side] - self.reference[side]) for side in found}
        return held_out_rewards(rewards["chosen"].numpy(), rewards["rejected"].numpy())


def held_out_rewards(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, float]:
    """`eval_rewards/…`, over all held-out pairs; a tie counts ½.

    Args:
        chosen, rejected: (n,) rewards of the two sides.
    """
    return {
        "eval_rewards/chosen": float(chosen.mean()),
        "eval_rewards/rejected": float(rejected.mean()),
        "eval_rewards/margins": float((chosen - rejected).mean()),
        "eval_rewards/accuracies": pair_accuracy(chosen, rejected),
    }
