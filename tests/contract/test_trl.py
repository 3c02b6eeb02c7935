"""The members of TRL and transformers the trainers lean on, so that an upgrade fails here and not in a run."""

from __future__ import annotations

import inspect

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer
from trl.trainer import dpo_trainer, grpo_trainer, rloo_trainer, sft_trainer
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler, add_fused_lm_head

from steps.lm_head import add_labelled_lm_head


def test_the_trainers_take_their_head_from_the_name_that_is_replaced() -> None:
    for module in (sft_trainer, dpo_trainer, grpo_trainer, rloo_trainer):
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


# -- what learning from the policy's own answers leans on --------------------------------------------------------

ROLLOUTS = {
    "_generate_single_turn": ["prompt_ids", "images", "multimodal_fields"],
    "_generate_and_score_completions": ["inputs"],
    "_prepare_inputs": ["generation_batch"],
    "_compute_loss": ["model", "inputs"],
    "_get_train_sampler": ["dataset"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "log": ["logs", "start_time"],
}
INHERITED = {
    "create_optimizer": ["model"],
    "_clip_grad_norm": ["model"],
    "_save": ["output_dir", "state_dict"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
}


@pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])
@pytest.mark.parametrize("name", [*ROLLOUTS, *INHERITED])
def test_what_is_overridden_is_there_and_is_called_the_same_way(trainer: type, name: str) -> None:
    parameters = list(inspect.signature(getattr(trainer, name)).parameters)[1:]
    wanted = {**ROLLOUTS, **INHERITED}[name]
    assert parameters[: len(wanted)] == wanted


def test_log_probabilities_are_asked_for_by_these_arguments() -> None:
    parameters = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    asked = ["model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
    assert list(parameters)[1:7] == asked


def test_a_rollout_has_the_parts_that_are_read() -> None:
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for part in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"):
        assert f'"{part}": {part}' in source
    prepare = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "shuffle_sequence_dict(" in prepare
    assert "self._step % generate_every == 0 or self._buffered_inputs is None" in prepare
    made = inspect.getsource(GRPOTrainer.__init__)
    members = (
        "_step = 0",
        "_metrics =",
        "temperature =",
        "eos_token_ids =",
        "epsilon_low =",
        "max_completion_length =",
    )
    for member in (*members, "reward_funcs = reward_funcs"):
        assert f"self.{member}" in made


def test_prompts_are_sampled_by_what_is_subclassed() -> None:
    assert "return RepeatSampler(" in inspect.getsource(GRPOTrainer._get_train_sampler)
    assert "generator=self.generator" in inspect.getsource(RepeatSampler.__iter__)


def test_one_answer_to_a_prompt_is_refused_by_the_configuration_alone() -> None:
    assert "if self.num_generations < 2" in inspect.getsource(GRPOConfig.__post_init__)
    assert "num_generations < 2" not in inspect.getsource(GRPOTrainer)


def test_the_trainer_clears_the_gradients_of_the_model_it_was_given() -> None:
    """And of no other: a critic beside it is cleared by us."""
    source = inspect.getsource(Trainer)
    assert "model.zero_grad()" in source
    assert "optimizer.zero_grad()" not in source


def test_peft_layers_say_which_adapter_is_active_where_it_is_switched() -> None:
    assert "self._active_adapter = adapter_names" in inspect.getsource(BaseTunerLayer.set_adapter)
