"""The members of TRL and transformers the trainers lean on, so that an upgrade fails here and not in a run."""

from __future__ import annotations

import inspect
import math
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Trainer
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer
from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, rloo_trainer, sft_trainer
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler, add_fused_lm_head

from steps.dpo import SIDES
from steps.lm_head import add_labelled_lm_head
from steps.pair_losses import cpo_loss, orpo_loss, simpo_loss
from steps.pair_methods import REWARDS
from steps.trainer_fields import DPO_LOSSES


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
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
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


def test_rewards_are_those_of_all_processes_and_their_mean_is_noted_last() -> None:
    """So that groups can be compared where they are, and what was noted be replaced."""
    rewards = inspect.getsource(RLOOTrainer._calculate_rewards)
    assert rewards.rstrip().endswith("rewards_per_func = gather(rewards_per_func)\n        return rewards_per_func")
    scored = inspect.getsource(RLOOTrainer._generate_and_score_completions)
    assert "rewards_per_func = self._calculate_rewards(" in scored
    assert scored.count('self._metrics[mode]["reward"].append(') == 1
    assert "rewards.view(-1, num_generations)" in scored
    assert 'mode = "train" if self.model.training else "eval"' in scored


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


# -- what learning from pairs leans on ---------------------------------------------------------------------------

LN2 = math.log(2)


def test_a_loss_of_ours_finds_the_forward_pass_the_reference_and_the_rewards_where_it_looks_for_them() -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert list(inspect.signature(DPOTrainer._compute_loss).parameters)[1:] == ["model", "inputs", "return_outputs"]
    assert source.count(" model(**model_kwargs, labels=labels, fused_lm_head=True)") == 1
    assert 'inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]' in source
    for name in REWARDS:
        assert f'self._metrics[mode]["{name}"].append' in source
    parameters = inspect.signature(DPOTrainer._precompute_ref_logps).parameters
    assert list(parameters)[1:] == ["dataset", "name", "batch_size"]
    assert '"train",' in inspect.getsource(DPOTrainer.__init__)
    assert "self._signature_columns = [" in inspect.getsource(DPOTrainer._set_signature_columns_if_needed)
    assert "pad_token_id" in dpo_trainer.DataCollatorForPreference.__dataclass_fields__


def test_the_rewards_of_a_batch_are_gathered_where_the_accuracy_finds_them() -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    last = ["reward_accuracies", "margins", "chosen_logps", "rejected_logps"]
    found = re.findall(r"self\.accelerator\.gather\((\w+)\)", source)
    assert found[SIDES] == ["chosen_rewards", "rejected_rewards"]
    assert found[-4:] == last
    after = source.partition("self.accelerator.gather(chosen_rewards)")[2]
    assert "gather_for_metrics" not in after  # which gathers too


def test_kto_reads_a_rows_neighbour_in_its_batch() -> None:
    assert kto_trainer.add_fused_lm_head is add_fused_lm_head
    prepared = inspect.getsource(KTOTrainer._prepare_dataset)
    assert '[examples["completion_ids"][-1]] + examples["completion_ids"][:-1]' in prepared
    assert "batch_size=args.per_device_train_batch_size" in prepared
    assert 'model.add_adapter("ref", default_config)' in inspect.getsource(KTOTrainer.__init__)


def test_the_losses_a_recipe_may_name_are_those_trl_has() -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(DPO_LOSSES)


class _Likelihoods:
    """A model and a trainer of which only the loss is real: answers of one token, as likely as they are said to be."""

    def __init__(self, loss_type: str, beta: float, smoothing: float = 0.0) -> None:
        same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
        self.model = SimpleNamespace(training=True)
        self.accelerator, self.args = same, SimpleNamespace(discopop_tau=0.05)
        self.beta, self.loss_types, self.loss_weights, self.label_smoothing = beta, [loss_type], [1.0], smoothing
        self.ld_alpha, self.f_divergence_type, self.use_weighting = None, "reverse_kl", False
        self.aux_loss_enabled, self.precompute_ref_logps = False, True
        self._metrics, self._total_train_tokens, self._tp_size = {"train": defaultdict(list)}, 0, 1

    def loss(self, chosen: torch.Tensor, rejected: torch.Tensor, reference: float = -1.0) -> torch.Tensor:
        """Of (B,) log π, against a reference under which all are equally likely."""
        log_probs = torch.cat([chosen, rejected])[:, None]
        blank = torch.zeros_like(log_probs)
        told = {"entropy": blank, "mean_logits": blank, "is_top1": blank.bool(), "log_sum_sq_probs": None}
        output = FusedCausalLMOutput(loss=None, log_probs=log_probs, label_mask=None, aux_loss=None, **told)
        ids, equal = torch.ones(len(log_probs), 2, dtype=torch.long), torch.full_like(chosen, reference)
        masks = {"attention_mask": ids, "completion_mask": torch.tensor([[0, 1]]).repeat(len(ids), 1)}
        given = {"input_ids": ids, **masks, "ref_chosen_logps": equal, "ref_rejected_logps": equal}
        return DPOTrainer._compute_loss(self, lambda **_: output, given, False)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("sigmoid", LN2),
        ("robust", LN2),
        ("aot", LN2),
        ("hinge", 1.0),
        ("ipo", 1 / (4 * 0.2**2)),  # (0 − 1/2τ)²
        ("nca_pair", 2 * LN2),
        ("bco_pair", 2 * LN2),
        ("sppo_hard", 2 * (0.5 / 0.2) ** 2),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("sft", 1.0),
    ],
)
def test_at_equal_likelihoods_a_loss_is_what_it_is_on_paper(loss_type: str, expected: float) -> None:
    equal = torch.full((3,), -1.0, dtype=torch.float64)
    assert float(_Likelihoods(loss_type, 0.2, 0.1).loss(equal, equal)) == pytest.approx(expected)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_of_two_actions_ipo_takes_the_better_one_as_often_as_on_paper(tau: float) -> None:
    """A certain preference and an even reference: the optimum is σ(0.5/τ), not 1 (arXiv:2310.12036, §5.1)."""
    for offset in (0.0, -0.3, 0.3):
        logit = torch.tensor(0.5 / tau + offset, dtype=torch.float64, requires_grad=True)
        log_p = torch.stack([logit, torch.zeros_like(logit)]).log_softmax(0)
        _Likelihoods("ipo", tau).loss(log_p[:1], log_p[1:], -LN2).backward()
        assert float(logit.grad) == pytest.approx(2 * offset, abs=1e-12)


def test_the_robust_loss_is_unbiased_under_wrong_labels() -> None:
    """(1 − ε) L(w, l) + ε L(l, w) is DPO's loss of the right label (arXiv:2403.00409, lemma 3.1)."""
    one, two = torch.tensor([-2.0, -0.1]), torch.tensor([-0.5, -3.0])
    robust, plain = _Likelihoods("robust", 0.7, 0.2), _Likelihoods("sigmoid", 0.7)
    mixed = 0.8 * robust.loss(one, two) + 0.2 * robust.loss(two, one)
    assert float(mixed) == pytest.approx(float(plain.loss(one, two)), rel=1e-6)


def test_trls_sigmoid_loss_has_no_label_smoothing() -> None:
    """Which is why conservative DPO is a loss of ours; once TRL has it, ours can go."""
    one, two = torch.tensor([-2.0]), torch.tensor([-0.5])
    assert float(_Likelihoods("sigmoid", 0.7, 0.3).loss(one, two)) == float(_Likelihoods("sigmoid", 0.7).loss(one, two))


def _experimental(name: str):
    """A module of TRL's experimental part, which comes and goes; nothing of ours leans on it."""
    return pytest.importorskip(
        f"trl.experimental.{name}",
        reason=f"TRL has removed its {name} trainer: our loss has no peer to agree with any more, and needs none",
        exc_type=ImportError,
    )


@pytest.mark.parametrize("loss_type", ["simpo", "sigmoid"])
def test_our_simpo_and_cpo_are_trls(loss_type: str) -> None:
    trainer = _experimental("cpo").CPOTrainer
    chosen, rejected, lengths = torch.tensor([-9.0, -4.0]), torch.tensor([-8.0, -9.0]), torch.tensor([3.0, 8.0])
    itself = SimpleNamespace(
        alpha=0.0,
        loss_type=loss_type,
        beta=1.5,
        simpo_gamma=0.6,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    if loss_type == "simpo":
        theirs, *_ = trainer.cpo_loss(itself, chosen / lengths, rejected / lengths)
        ours = simpo_loss(chosen, rejected, lengths, lengths, 1.5, 0.6)
    else:
        theirs, *_ = trainer.cpo_loss(itself, chosen, rejected)
        ours = cpo_loss(chosen, rejected, lengths, 1.5, 0.0)
    torch.testing.assert_close(ours, theirs)


def test_our_odds_ratio_is_trls() -> None:
    trainer = _experimental("orpo").ORPOTrainer
    chosen, rejected, one = torch.tensor([-0.4, -3.0]), torch.tensor([-1.7, -0.2]), torch.ones(2)
    itself = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs, *_ = trainer.odds_ratio_loss(itself, chosen, rejected)  # β log σ(…), which is taken from the likelihood
    torch.testing.assert_close(orpo_loss(chosen, rejected, one, one, 0.3), -chosen - theirs)


def test_a_resumed_trainer_asks_for_its_epochs_this_way() -> None:
    parameters = list(inspect.signature(Trainer._init_training_state).parameters)
    assert parameters[:4] == ["self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs"]
    loop = inspect.getsource(Trainer._inner_training_loop)
    assert "epochs_trained, steps_trained_in_current_epoch = self._init_training_state(" in loop
    assert "for epoch in range(epochs_trained, num_train_epochs):" in loop
