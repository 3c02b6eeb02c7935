"""Direct preference optimisation: from the SFT start to a model whose answers people prefer."""

from __future__ import annotations

import math
from pathlib import Path

from peft import PeftModel
from transformers import set_seed
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from steps.artifact import Facts
from steps.config import DPO
from steps.frozen_layers import remember_frozen_layers
from steps.lm_head import labelled_lm_head
from steps.models import ADAPTER, checkpoint_files, frozen_depth, load_policy, load_tokenizer, save_weights
from steps.pairs import training_and_held_out
from steps.tracking import Tracker
from steps.training import LengthGrouped, arguments, held_out_metrics, run_trainer
from steps.warm_start import begin_at


class LengthGroupedDPOTrainer(LengthGrouped, DPOTrainer):
    """TRL's DPOTrainer on length-grouped batches; says how far the reference's pass is.

    Args:
        tracker: told of every batch of the reference's pass, of which there are `reference_batches`.
    """

    def __init__(self, *args, tracker: Tracker, reference_batches: int, **kwargs) -> None:
        self.tracker, self.reference_batches, self.referenced = tracker, reference_batches, 0
        super().__init__(*args, **kwargs)

    def compute_ref_log_probs(self, model, inputs):
        self.tracker.progress("reference", self.referenced, self.reference_batches)
        self.referenced += 1
        return super().compute_ref_log_probs(model, inputs)


def tune_policy(
    dpo: DPO,
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
    """Direct preference optimisation (arXiv:2305.18290, eq. 7) of the SFT model, against a frozen copy of it.

    The reference's log-probabilities are computed once, before the first update; of a whole model by the policy
    itself, which is loaded from the SFT step's directory.

    Args:
        sft: the SFT step's artifact; policy and reference both start there.
        preferences: table of prompt, chosen, rejected, margin, part.
        start: another policy to begin the training at; the reference stays the SFT model.
    """
    train, held_out, batch = training_and_held_out(preferences, dpo)
    set_seed(seed)
    model = load_policy(base, dtype, sft / ADAPTER, trainable=True)
    if isinstance(model, PeftModel):
        remember_frozen_layers(model, frozen_depth(model.peft_config["default"], model.config.num_hidden_layers))
    settings = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": batch, **dpo.trainer}
    with labelled_lm_head(dpo_trainer):
        trainer = LengthGroupedDPOTrainer(
            model,
            tracker=tracker,
            reference_batches=math.ceil(len(train) / batch) + len(held_out) // batch,
            args=arguments(DPOConfig, settings, seed=seed, out=out, per_device_eval_batch_size=batch),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=load_tokenizer(base),
        )
    begin_at(model, start, base, dtype)
    trainer.checkpoint_files = checkpoint_files(trainer.model)
    run_trainer(trainer, tracker)
    measured = held_out_metrics(trainer, tracker)
    save_weights(trainer.model, base, out)
    return {
        "method": "dpo",
        "start": "champion" if start else "sft",
        "pairs": len(train),
        "held_out": len(held_out),
        "steps": trainer.state.global_step,
        "accuracy": measured["eval_rewards/accuracies"],
        "likelihood_displaced": measured["eval_rewards/chosen"] < 0,
        **measured,
    }
