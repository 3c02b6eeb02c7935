"""Direct preference optimisation: from the SFT start to a model whose answers people prefer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import set_seed
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from steps.artifact import Facts
from steps.frozen_layers import remember_frozen_layers
from steps.lm_head import labelled_lm_head
from steps.models import ADAPTER, checkpoint_files, frozen_depth, load_policy, load_tokenizer, save_weights
from steps.pairs import training_and_held_out
from steps.policy_config import DPO
from steps.statistics import pair_accuracy
from steps.tracking import Tracker
from steps.training import AsksReference, KeepsAnswers, LengthGrouped, arguments, held_out_metrics, run_trainer
from steps.warm_start import begin_at


class LengthGroupedDPOTrainer(LengthGrouped, KeepsAnswers, AsksReference, DPOTrainer):
    """TRL's DPOTrainer on length-grouped batches; says how far the reference's pass is.

    `rewards/accuracies` is `statistics.pair_accuracy`, a tie counted ½; TRL counts it as wrong.
    """

    def _compute_loss(self, model, inputs, return_outputs):
        with gathered(self.accelerator) as seen:
            found = super()._compute_loss(model, inputs, return_outputs)
        chosen, rejected = (one.float().cpu().numpy() for one in seen[SIDES])
        told = self._metrics["train" if self.model.training else "eval"]
        told["rewards/accuracies"][-1] = pair_accuracy(chosen, rejected)
        return found


# Where the rewards of the two sides are among what TRL's loss gathers, counted from the end: what follows are
# accuracies, margins and two log-probabilities.
SIDES = slice(-6, -4)


@contextmanager
def gathered(accelerator: Accelerator) -> Iterator[list[Tensor]]:
    """What is gathered from all processes while the body runs, in its order."""
    seen: list[Tensor] = []
    gather = accelerator.gather

    def watched(tensor):
        seen.append(gather(tensor))
        return seen[-1]

    accelerator.gather = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del accelerator.gather


def tune_policy(dpo: DPO, dtype: str, *, preferences: Path, **step: Any) -> Facts:
    """Direct preference optimisation (arXiv:2305.18290, eq. 7) of the SFT model, against a frozen copy of it.

    Args:
        preferences: table of prompt, chosen, rejected, margin, part.
        step: as `learn_from_pairs` has it.
    """
    return learn_from_pairs("dpo", dpo.trainer, training_and_held_out(preferences, dpo), dtype, **step)


def learn_from_pairs(
    method: str,
    settings: Mapping[str, Any],
    pairs: tuple[Dataset, Dataset, int],
    dtype: str,
    *,
    base: Path,
    sft: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
    start: Path | None = None,
    kind: type[LengthGroupedDPOTrainer] = LengthGroupedDPOTrainer,
    asks_first: bool = True,
    **more: Any,
) -> Facts:
    """Train the SFT model on pairs, measure it on held-out ones, and leave the weights in `out`.

    The reference's log-probabilities are computed once, before the first update; of a whole model by the policy
    itself, which is loaded from the SFT step's directory.

    Args:
        settings: of TRL's DPOConfig.
        pairs: training pairs, held-out pairs and the batch for the latter.
        sft: the SFT step's artifact; policy and reference both start there.
        start: another policy to begin the training at; the reference stays the SFT model.
        kind: the trainer's class, which `more` is given to.
        asks_first: whether the reference is asked about every row before the first update, so that what frozen layers
            make of it may be remembered.
    """
    train, held_out, batch = pairs
    set_seed(seed)
    model = load_policy(base, dtype, sft / ADAPTER, trainable=True)
    settings = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": batch, **settings}
    if isinstance(model, PeftModel) and asks_first and settings["precompute_ref_log_probs"]:
        remember_frozen_layers(model, frozen_depth(model.peft_config["default"], model.config.num_hidden_layers))
    with labelled_lm_head(dpo_trainer):
        trainer = kind(
            model,
            tracker=tracker,
            reference_batches=math.ceil(len(train) / batch) + len(held_out) // batch,
            args=arguments(DPOConfig, settings, seed=seed, out=out, per_device_eval_batch_size=batch),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=load_tokenizer(base),
            **more,
        )
    begin_at(model, start, base, dtype)
    trainer.checkpoint_files = checkpoint_files(trainer.model)
    run_trainer(trainer, tracker)
    measured = held_out_metrics(trainer, tracker)
    save_weights(trainer.model, base, out)
    return pair_facts(method, start, len(train), trainer.state.global_step, len(held_out), measured)


def pair_facts(
    method: str, start: Path | None, pairs: int, steps: int, held_out: int, measured: Mapping[str, float]
) -> Facts:
    """What a run on pairs came to.

    Args:
        measured: on the held-out pairs.
    """
    return {
        "method": method,
        "start": "champion" if start else "sft",
        "pairs": pairs,
        "held_out": held_out,
        "steps": steps,
        "accuracy": measured["eval_rewards/accuracies"],
        "likelihood_displaced": measured["eval_rewards/chosen"] < 0,
        **measured,
    }
