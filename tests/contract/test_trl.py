"""The members of TRL and transformers the trainers lean on, so that an upgrade fails here and not in a run."""

from __future__ import annotations

import inspect

from transformers import Trainer
from trl import DPOTrainer, RewardTrainer, SFTTrainer
from trl.trainer import dpo_trainer, sft_trainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from steps.lm_head import add_labelled_lm_head


def test_the_trainers_take_their_head_from_the_name_that_is_replaced() -> None:
    for module in (sft_trainer, dpo_trainer):
        assert module.add_fused_lm_head is add_fused_lm_head
        assert "add_fused_lm_head(" in inspect.getsource(module)


def test_our_head_has_the_signature_of_theirs() -> None:
    assert (
        inspect.signature(add_labelled_lm_head).parameters.keys()
        == inspect.signature(add_fused_lm_head).parameters.keys()
    )


def test_the_heads_output_has_the_fields_that_are_filled() -> None:
    fields = {"loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss"}
    assert fields <= set(FusedCausalLMOutput.__dataclass_fields__)


def test_a_peft_policy_gets_a_frozen_copy_as_its_reference() -> None:
    source = inspect.getsource(DPOTrainer.__init__)
    assert 'model.add_adapter("ref", default_config)' in source


def test_the_sampler_and_the_metrics_are_where_they_are_overridden() -> None:
    assert "_get_train_sampler" in vars(Trainer)
    for trainer in (SFTTrainer, RewardTrainer, DPOTrainer):
        assert "_get_train_sampler" not in vars(trainer)
    assert 'self._metrics[mode]["accuracy"].append' in inspect.getsource(RewardTrainer.compute_loss)
    assert "chunks=2" in inspect.getsource(RewardTrainer.compute_loss)
