"""Supervised fine-tuning: the start every policy is measured against."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer

from steps.artifact import Facts
from steps.config import SFT, Lora
from steps.datasets import read_table
from steps.lm_head import labelled_lm_head
from steps.models import MASTER, checkpoint_files, load_policy, load_tokenizer, lora_config, save_weights
from steps.tracking import Tracker
from steps.training import KeepsAnswers, LengthGrouped, arguments, run_trainer


class LengthGroupedSFTTrainer(LengthGrouped, KeepsAnswers, SFTTrainer):
    """TRL's SFTTrainer on length-grouped batches."""


def train_sft(
    sft: SFT, lora: Lora | None, dtype: str, *, base: Path, demonstrations: Path, seed: int, out: Path, tracker: Tracker
) -> Facts:
    """Fit a model to demonstrations by maximum likelihood of their completions.

    Args:
        lora: the adapters that are trained; None trains every weight.
        demonstrations: table of prompt, completion.
    """
    rows = read_table(demonstrations)[["prompt", "completion"]].head(sft.rows)
    set_seed(seed)
    model = load_policy(base, dtype if lora else MASTER)
    with labelled_lm_head(sft_trainer):
        trainer = LengthGroupedSFTTrainer(
            model,
            args=arguments(SFTConfig, sft.trainer, seed=seed, out=out),
            train_dataset=Dataset.from_pandas(rows, preserve_index=False),
            processing_class=load_tokenizer(base),
            peft_config=lora_config(lora, base, "CAUSAL_LM") if lora else None,
        )
    trainer.checkpoint_files = checkpoint_files(trainer.model)
    run_trainer(trainer, tracker)
    save_weights(trainer.model, base, out)
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry] or [history[-1]["train_loss"]]
    return {"rows": len(rows), "steps": trainer.state.global_step, "loss": losses[-1]}
