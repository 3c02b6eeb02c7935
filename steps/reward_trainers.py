"""Trainers of reward models on TRL's RewardTrainer: pair by pair, or all answers of a prompt together.

Texts are tokenised here, prompt and answer as one text with its end, and cut on the left: TRL leaves out what is too
long, and a held-out pair that is left out would be missing from the accuracy.
`tests/contract/test_trl.py` and `tests/steps/test_reward_kinds.py` hold what this leans on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import RewardTrainer

from steps.config import Reward
from steps.losses import best_of_k_loss, plackett_luce_loss, ranking_loss
from steps.rankings import Group
from steps.reward_model import tokens_of
from steps.training import LengthGrouped, LengthGroupedSampler

CANDIDATES = "candidates"


def tokenised_pairs(
    pairs: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, at_most: int | None, margin_weight: float
) -> Dataset:
    """Pairs as TRL's trainer takes them; with the margin that their rewards have to differ by, where one is asked."""
    columns: dict[str, Any] = {
        f"{side}_ids": tokens_of(tokenizer, list(pairs["prompt"]), list(pairs[side]), at_most)
        for side in ("chosen", "rejected")
    }
    if margin_weight:
        columns["margin"] = list(margin_weight * pairs["margin"].fillna(0.0))
    return Dataset.from_dict(columns)


def tokenised_groups(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase, at_most: int | None) -> Dataset:
    """Groups as `GroupTrainer` takes them: a row has all its candidates, and what was said of them."""
    return Dataset.from_dict(
        {
            CANDIDATES: [tokens_of(tokenizer, [g.prompt] * len(g.answers), g.answers, at_most) for g in groups],
            "preferred": [g.preferred.tolist() for g in groups],
            "margins": [g.margins.tolist() for g in groups],
            "ranks": [g.ranks.tolist() for g in groups],
            "best": [g.best.tolist() for g in groups],
        }
    )


class WholeGroups:
    """Collator: all candidates of a prompt are in the batch its row is in, each once.

    Args:
        pad: the padding token.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of B rows, of up to K candidates each and N in all.

        Returns:
            `place` (B, K), where each candidate stands among the N, −1 for none; `input_ids` and `attention_mask`
            (N, L); `preferred` and `margins` (B, K, K), `ranks` and `best` (B, K), padded with NaN and 0.
        """
        sizes = [len(row[CANDIDATES]) for row in rows]
        most = max(sizes)
        place = torch.full((len(rows), most), -1)
        for number, size in enumerate(sizes):
            place[number, :size] = torch.arange(size) + sum(sizes[:number])
        ids = [torch.tensor(candidate) for row in rows for candidate in row[CANDIDATES]]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad)
        lengths = torch.tensor([len(candidate) for candidate in ids])
        return {
            "place": place,  # first: its rows are what the Trainer counts
            "input_ids": padded,
            "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long(),
            "preferred": _filled([row["preferred"] for row in rows], (most, most), np.nan),
            "margins": _filled([row["margins"] for row in rows], (most, most), 0.0),
            "ranks": _filled([row["ranks"] for row in rows], (most,), np.nan),
            "best": _filled([row["best"] for row in rows], (most,), 0.0),
        }


def _filled(values: Sequence[Any], shape: tuple[int, ...], value: float) -> Tensor:
    """(B, *shape) of arrays of that many dimensions, filled up with a value."""
    out = np.full((len(values), *shape), value, dtype=np.float32)
    for number, given in enumerate(values):
        array = np.array(given, dtype=np.float32)
        out[(number, *(slice(size) for size in array.shape))] = array
    return torch.from_numpy(out)


class PairTrainer(LengthGrouped, RewardTrainer):
    """TRL's RewardTrainer, which minimises −log σ(r(x, y_w) − r(x, y_l) − m), with the two rewards logged apart.

    Attributes:
        rewards: (B, 2) of the chosen and the rejected sides of the evaluations so far, batch by batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rewards: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if model.training else "eval"
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        sides = torch.stack(outputs.logits.detach().float().squeeze(-1).chunk(2), 1)
        sides = self.accelerator.gather_for_metrics(sides)
        if mode == "eval":
            self.rewards.append(sides.cpu())
        metrics = self._metrics[mode]
        metrics["accuracy"][-1] = share_right(sides[:, 0] - sides[:, 1])  # TRL takes a tie for an error
        for name, values in zip(("rewards/chosen", "rewards/rejected"), sides.unbind(1), strict=True):
            metrics[name].append(values.mean().item())
        return (loss, outputs) if return_outputs else loss


class GroupTrainer(LengthGrouped, RewardTrainer):
    """TRL's RewardTrainer on whole groups, by the loss of the recipe.

    All candidates of a prompt are in one batch element, so that none is seen in several batches of an epoch (Ouyang et
    al. 2022, §3.5).

    Attributes:
        rewards: (B, K) of the evaluations so far, batch by batch, NaN where there is no candidate.
    """

    def __init__(self, *args: Any, reward: Reward, processing_class: PreTrainedTokenizerBase, **kwargs: Any) -> None:
        self.reward = reward
        self.rewards: list[Tensor] = []
        collator = WholeGroups(processing_class.pad_token_id)
        super().__init__(*args, processing_class=processing_class, data_collator=collator, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [CANDIDATES, "preferred", "margins", "ranks", "best"]  # type: ignore[assignment]

    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [max(map(len, candidates)) for candidates in rows[CANDIDATES]]
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(lengths, batch, self.args.seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if model.training else "eval"
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        place = inputs["place"]
        there = place >= 0
        rewards = outputs.logits.float().squeeze(-1)[place.clamp(min=0)].masked_fill(~there, 0)
        loss = group_losses(rewards, inputs, self.reward).mean()
        if self.args.center_rewards_coefficient is not None:  # of two candidates TRL's (r_w + r_l)²
            means = rewards.sum(1) / there.sum(1)
            loss = loss + self.args.center_rewards_coefficient * ((2 * means) ** 2).mean()
        with torch.no_grad():
            self._note(mode, rewards, there, inputs)
        return (loss, outputs) if return_outputs else loss

    def _note(self, mode: str, rewards: Tensor, there: Tensor, inputs: dict[str, Tensor]) -> None:
        shown = rewards.masked_fill(~there, torch.nan)
        shown = self.accelerator.pad_across_processes(shown, dim=1, pad_index=torch.nan)
        shown = self.accelerator.gather_for_metrics(shown)
        metrics = self._metrics[mode]
        if mode == "eval":
            self.rewards.append(shown.cpu())
        else:
            self._total_train_tokens += self.accelerator.gather(inputs["attention_mask"].sum()).sum().item()
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["mean_reward"].append(shown.nanmean().item())
        row, better, worse = (inputs["preferred"] > 0.5).nonzero(as_tuple=True)
        if not len(row):
            return
        chosen, rejected = rewards[row, better], rewards[row, worse]
        # Pair by pair: groups have few pairs or many, so a mean of batch means would not be the pairs' mean.
        metrics["accuracy"] += [share_right(difference) for difference in chosen - rejected]
        metrics["margin"] += (chosen - rejected).tolist()
        metrics["rewards/chosen"] += chosen.tolist()
        metrics["rewards/rejected"] += rejected.tolist()


def group_losses(rewards: Tensor, said: dict[str, Tensor], reward: Reward) -> Tensor:
    """(B,) the recipe's loss of each group; arguments as `WholeGroups` has them."""
    if reward.loss == "best_of_k":
        return best_of_k_loss(rewards, said["best"], said["place"] >= 0)
    if reward.loss == "plackett_luce":
        return plackett_luce_loss(rewards, said["ranks"])
    preferred = said["preferred"]
    if reward.ties == "leave_out":
        preferred = preferred.masked_fill(preferred == 0.5, torch.nan)
    return ranking_loss(rewards, preferred, reward.margin_weight * said["margins"] if reward.margin_weight else None)


def share_right(differences: Tensor) -> float:
    """Share of pairs whose chosen side has the higher reward, a tie counted ½."""
    return float(((differences.sign() + 1) / 2).mean())
