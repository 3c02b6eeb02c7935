"""Relatives of DPO on the same pairs: TRL's DPOTrainer under another of its losses, or under one of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from steps.artifact import Facts
from steps.backbone import Rows
from steps.dpo import LengthGroupedDPOTrainer, learn_from_pairs
from steps.pair_losses import calibration_loss, conservative_loss, cpo_loss, orpo_loss, simpo_loss, slic_loss
from steps.pairs import training_and_held_out
from steps.policy_config import Relative
from steps.trainer_fields import REFERENCE_FREE

TARGET = ("target_prompt_ids", "target_ids")  # columns of a training pair: an answer to imitate beside it
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@dataclasses.dataclass(frozen=True)
class Likelihoods:
    """How likely the policy finds the answers of B pairs.

    Attributes:
        chosen, rejected: (B,) log π(y|x) in nats.
        chosen_lengths, rejected_lengths: (B,) tokens.
        margins: (B,) β (log π/ρ of the chosen answer − log π/ρ of the rejected one), with a reference ρ.
        targets: (B,) log π of the answers to imitate; None where pairs have none, as held-out ones.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    margins: Tensor
    targets: Tensor | None = None


Loss = Callable[[Likelihoods, Mapping[str, Any]], Tensor]


def _slic(of: Likelihoods, own: Mapping[str, Any]) -> Tensor:
    targets = of.chosen if own["target"] == "chosen" else of.targets
    if targets is None:
        return calibration_loss(of.chosen, of.rejected, own["delta"])
    return slic_loss(of.chosen, of.rejected, targets, own["delta"], own["lam"])


# (B,) losses that TRL's DPOTrainer lacks, by method; of a batch and the method's settings.
LOSSES: dict[str, Loss] = {
    "cdpo": lambda of, own: conservative_loss(of.margins, own["label_smoothing"]),
    "simpo": lambda of, own: simpo_loss(
        of.chosen, of.rejected, of.chosen_lengths, of.rejected_lengths, own["beta"], own["simpo_gamma"]
    ),
    "cpo": lambda of, own: cpo_loss(of.chosen, of.rejected, of.chosen_lengths, own["beta"], own["cpo_alpha"]),
    "orpo": lambda of, own: orpo_loss(of.chosen, of.rejected, of.chosen_lengths, of.rejected_lengths, own["beta"]),
    "slic": _slic,
    "slic_sample_rank": _slic,
}


class OwnLossTrainer(LengthGroupedDPOTrainer):
    """TRL's DPOTrainer, whose data, forward pass and metrics stay, under a loss it does not have.

    A loss without a reference asks it about held-out pairs alone: no pass over the training pairs, and `rewards/*` of
    the held-out ones only.

    Args:
        loss: (B,) of a batch and `own`, the method's settings.
    """

    def __init__(self, *args, loss: Loss, has_reference: bool, own: Mapping[str, Any], **kwargs) -> None:
        self.own_loss, self.has_reference, self.own = loss, has_reference, own
        if not has_reference:
            kwargs["reference_batches"] = len(kwargs["eval_dataset"]) // kwargs["args"].precompute_ref_batch_size
        super().__init__(*args, **kwargs)
        self.data_collator = TargetCollator(self.data_collator)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if name == "train" and not self.has_reference:
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        self._signature_columns: Any = [*dict.fromkeys((*columns, *TARGET))]

    def _compute_loss(self, model, inputs, return_outputs):
        target = {name: inputs[name] for name in inputs if name.startswith("target_")}
        given = {name: value for name, value in inputs.items() if name not in target}
        referred = "ref_chosen_logps" in given
        if not referred:
            nothing = torch.zeros(len(given["input_ids"]) // 2, device=given["input_ids"].device)
            given |= {"ref_chosen_logps": nothing, "ref_rejected_logps": nothing}
        seen = []

        def watched(**kwargs):
            seen.append(model(**kwargs))
            return seen[-1]

        super()._compute_loss(watched, given, False)  # for its metrics; its loss is let go
        if not referred:
            for name in REWARDS:
                self._metrics["train" if model.training else "eval"].pop(name)
        likelihoods = self._likelihoods(seen[0].log_probs, given)
        if target:
            found = model(
                input_ids=target["target_input_ids"],
                attention_mask=target["target_attention_mask"],
                labels=target["target_labels"],
                use_cache=False,
                fused_lm_head=True,
            )
            likelihoods = dataclasses.replace(likelihoods, targets=found.log_probs.sum(1))
        loss = self.own_loss(likelihoods, self.own).mean()
        return (loss, seen[0]) if return_outputs else loss

    def _likelihoods(self, log_probs: Tensor, given: Mapping[str, Tensor]) -> Likelihoods:
        """Of a batch whose first half are chosen sides, from (2B, L − 1) log-probabilities of labelled tokens."""
        chosen, rejected = log_probs.sum(1).chunk(2)
        chosen_lengths, rejected_lengths = given["completion_mask"][:, 1:].sum(1).clamp(min=1).chunk(2)
        reference = given["ref_chosen_logps"] - given["ref_rejected_logps"]
        margins = self.beta * (chosen - rejected - reference)
        return Likelihoods(chosen, rejected, chosen_lengths, rejected_lengths, margins)


class TargetCollator:
    """TRL's collator for pairs, which also takes the answers to imitate that stand beside them."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.pairs(rows)
        if TARGET[1] in rows[0]:
            asked, said = ([row[name] for row in rows] for name in TARGET)
            found = Rows.of(asked, said, self.pairs.pad_token_id)
            names = ("target_input_ids", "target_attention_mask", "target_labels")
            batch |= dict(zip(names, (found.ids, found.mask, found.labels), strict=True))
        return batch


def tune_policy(relative: Relative, method: str, dtype: str, *, preferences: Path, **step: Any) -> Facts:
    """A relative of DPO from the SFT model, on DPO's pairs.

    Args:
        method: a name of `policy.method`.
        preferences: table of prompt, chosen, rejected, margin, part.
        step: as `steps.dpo.learn_from_pairs` has it.
    """
    return learn(relative, method, training_and_held_out(preferences, relative), dtype, **step)


def learn(relative: Relative, method: str, pairs: tuple[Dataset, Dataset, int], dtype: str, **step: Any) -> Facts:
    """The same on pairs that have been chosen; see `steps.dpo.learn_from_pairs`."""
    if method not in LOSSES:
        return learn_from_pairs(method, relative.trainer, pairs, dtype, **step)
    own = {"label_smoothing": relative.trainer.get("label_smoothing"), **relative.loss}
    return learn_from_pairs(
        method,
        relative.trainer,
        pairs,
        dtype,
        kind=OwnLossTrainer,
        loss=LOSSES[method],
        has_reference=method not in REFERENCE_FREE,
        asks_first=method not in REFERENCE_FREE,
        own=own,
        **step,
    )
