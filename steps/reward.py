"""The reward model: a number per answer, such that people's choices become likely."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from steps.artifact import Facts
from steps.calibration import accuracy_by, calibration
from steps.config import Lora, Reward
from steps.intervals import wilson
from steps.models import MASTER, checkpoint_files, load_reward_model, load_tokenizer, lora_config, save_weights
from steps.pairs import COLUMNS, training_and_held_out
from steps.tracking import Tracker
from steps.training import LengthGrouped, arguments, held_out_metrics, run_trainer

HELD_OUT = "held_out.parquet"


class BradleyTerryTrainer(LengthGrouped, RewardTrainer):
    """TRL's RewardTrainer, which minimises −log σ(r(x, y_w) − r(x, y_l)), with the two rewards logged apart.

    Attributes:
        differences: r(x, y_w) − r(x, y_l) of the pairs of the evaluations so far, batch by batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.differences: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if model.training else "eval"
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        rewards = self.accelerator.gather_for_metrics(outputs.logits.detach().float().squeeze(-1))
        if mode == "eval":
            self.differences.append(torch.sub(*rewards.chunk(2)).cpu())
        for name, values in zip(("rewards/chosen", "rewards/rejected"), rewards.chunk(2), strict=True):
            self._metrics[mode][name].append(values.mean().item())
        return (loss, outputs) if return_outputs else loss


def train_reward(
    reward: Reward,
    lora: Lora | None,
    dtype: str,
    *,
    base: Path,
    preferences: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
) -> Facts:
    """Fit a model with a scalar head to human comparisons (Bradley–Terry; InstructGPT, arXiv:2203.02155, eq. 1).

    Args:
        lora: the adapters that are trained beside the head; None trains every weight.
        preferences: table of prompt, chosen, rejected, margin, part.
    """
    train, held_out, batch = training_and_held_out(preferences, reward)
    set_seed(seed)
    model = load_reward_model(base, dtype if lora else MASTER)
    trainer = BradleyTerryTrainer(
        model,
        args=arguments(RewardConfig, reward.trainer, seed=seed, out=out, per_device_eval_batch_size=batch),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=load_tokenizer(base),
        peft_config=lora_config(lora, base, "SEQ_CLS") if lora else None,
    )
    trainer.checkpoint_files = checkpoint_files(trainer.model)
    run_trainer(trainer, tracker)
    trainer.differences.clear()
    measured = held_out_metrics(trainer, tracker)
    pairs = with_margins(held_out.to_pandas(), preferences)
    pairs["difference"] = torch.cat(trainer.differences).double().numpy()
    pairs.to_parquet(out / HELD_OUT, index=False)
    save_weights(trainer.model, base, out)
    accuracy = measured["eval_rewards/accuracies"]
    low, high = wilson(accuracy * len(held_out), len(held_out))
    return {
        "pairs": len(train),
        "held_out": len(held_out),
        "steps": trainer.state.global_step,
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        **measured,
        **scrutiny(pairs),
    }


def with_margins(pairs: pd.DataFrame, preferences: Path) -> pd.DataFrame:
    """Pairs with what people said of them besides their order: margin and agreement, where the table has them."""
    table = pd.read_parquet(preferences)
    known = [name for name in ("margin", "agreement") if name in table]
    return pairs.merge(table.drop_duplicates(COLUMNS)[[*COLUMNS, *known]], on=COLUMNS, how="left")


def scrutiny(pairs: pd.DataFrame) -> Facts:
    """How sure the reward model is against how often it is right, and where it is wrong (`steps.calibration`).

    Args:
        pairs: chosen, rejected, and `difference` of their rewards; margin and agreement where people gave them.
    """
    found = calibration(pairs["difference"])
    lengths = pairs["chosen"].str.len() - pairs["rejected"].str.len()
    facts: Facts = {
        "calibration_error": found.error,
        "log_loss": found.log_loss,
        "reliability": [asdict(part) for part in found.bins],
        "accuracy_by_length": [asdict(part) for part in accuracy_by(pairs["difference"], lengths)],
    }
    if "margin" in pairs and (given := pairs["margin"].notna()).any():
        by_margin = accuracy_by(pairs.loc[given, "difference"], pairs.loc[given, "margin"])
        facts["accuracy_by_margin"] = [asdict(part) for part in by_margin]
    if "agreement" in pairs and pairs["agreement"].notna().any():
        facts["raters_agree"] = float(pairs["agreement"].mean())  # what one person would come to
    return facts
