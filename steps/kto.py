"""Kahneman–Tversky optimisation: each side of a pair is a row of its own, liked or not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import set_seed
from trl import KTOConfig, KTOTrainer
from trl.trainer import kto_trainer

from steps.artifact import Facts
from steps.backbone import active, evaluating, token_log_probs
from steps.dpo import pair_facts
from steps.frozen_layers import remember_frozen_layers
from steps.implicit_rewards import HeldOut
from steps.lm_head import labelled_lm_head
from steps.models import ADAPTER, checkpoint_files, frozen_depth, load_policy, load_tokenizer, save_weights
from steps.pairs import COLUMNS, training_and_held_out
from steps.policy_config import Relative
from steps.tracking import Tracker
from steps.training import AsksReference, KeepsAnswers, LengthGroupedSampler, arguments, run_trainer
from steps.warm_start import begin_at


class WholeBatches(Sampler[int]):
    """Batches that stay as they are, in an order drawn from (seed, epoch) alone.

    TRL gives every row the answer of its neighbour in the batch, to estimate the KL from: rows must not be dealt anew.

    Args:
        rows: how many there are.
        batch: rows that stay together; fewer at the end come last.
    """

    def __init__(self, rows: int, batch: int, seed: int) -> None:
        self.rows, self.batch, self.seed, self.epoch = rows, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        whole = self.rows // self.batch
        for place in torch.randperm(whole, generator=draw).tolist():
            yield from range(place * self.batch, (place + 1) * self.batch)
        yield from range(whole * self.batch, self.rows)


class LabelledTrainer(KeepsAnswers, AsksReference, KTOTrainer):
    """TRL's KTOTrainer on batches of like length that hold both labels; says how far the reference's pass is.

    Its `kl` is of answers to other prompts and never negative: the point that answers are held against (eq. 7), not the
    policy's distance from its start, and is named so.
    """

    def _get_train_sampler(self, train_dataset=None):
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return WholeBatches(len(rows), self.args.per_device_train_batch_size, self.args.seed)

    def log(self, logs, start_time=None):
        for metrics in self._metrics.values():
            if "kl" in metrics:
                metrics["reference_point"] = metrics.pop("kl")
        super().log(logs, start_time)


def labelled_rows(pairs: Dataset, batch: int, seed: int) -> Dataset:
    """Both sides of pairs as rows of prompt, completion, label, in batches of like length that hold both labels.

    A batch holds the chosen sides of some pairs and then their rejected sides, so that a row's neighbour answers
    another prompt as a rule, which TRL's estimate of the KL wants.

    Args:
        pairs: prompt, chosen, rejected.
        batch: rows.
    """
    lengths = [
        len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) for row in pairs.select_columns(COLUMNS)
    ]
    some = max(batch // 2, 1)
    order = list(LengthGroupedSampler(lengths, some, seed))
    rows = []
    for first in range(0, len(order), some):
        group = [pairs[place] for place in order[first : first + some]]
        for side in ("chosen", "rejected"):
            rows += [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row in group]
    return Dataset.from_list(rows)


def tune_policy(
    relative: Relative,
    method: str,
    dtype: str,
    *,
    base: Path,
    sft: Path,
    preferences: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
    start: Path | None = None,
) -> Facts:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8) of the SFT model, against a frozen copy of it.

    Args:
        sft: the SFT step's artifact; policy and reference both start there.
        preferences: table of prompt, chosen, rejected, margin, part.
        start: another policy to begin the training at; the reference stays the SFT model.
    """
    pairs, held_out, batch = training_and_held_out(preferences, relative)
    settings = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": batch, **relative.trainer}
    args: Any = arguments(KTOConfig, settings, seed=seed, out=out)
    rows = labelled_rows(pairs, args.per_device_train_batch_size, seed)
    set_seed(seed)
    tokenizer = load_tokenizer(base)
    model: Any = load_policy(base, dtype, sft / ADAPTER, trainable=True)
    adapted = isinstance(model, PeftModel)
    if adapted:
        remember_frozen_layers(model, frozen_depth(model.peft_config["default"], model.config.num_hidden_layers))
    with labelled_lm_head(kto_trainer):
        trainer: Any = LabelledTrainer(
            model,
            tracker=tracker,
            reference_batches=math.ceil(len(rows) / batch),
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
        )

    def reference(rows):  # asked before the first update, when a whole model is its own reference
        with evaluating(model), active(model, "ref" if adapted else None):
            return token_log_probs(model, rows)[0]

    measuring = HeldOut(held_out.to_pandas(), tokenizer, reference, batch)
    begin_at(model, start, base, dtype)
    trainer.checkpoint_files = checkpoint_files(trainer.model)
    run_trainer(trainer, tracker)
    measured = measuring.measure(trainer.model, trainer.beta)
    tracker.metrics(measured, trainer.state.global_step)
    save_weights(trainer.model, base, out)
    return pair_facts(method, start, len(pairs), trainer.state.global_step, len(held_out), measured)
