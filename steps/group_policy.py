"""RLOO, GRPO and SPO: several answers to a prompt are held against each other, so no critic is needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

from steps.artifact import Facts
from steps.backbone import REFERENCE, Rows, Scorer, active, add_adapter, evaluating, token_log_probs
from steps.implicit_rewards import HeldOut
from steps.lm_head import labelled_lm_head
from steps.models import ADAPTER, load_policy, load_tokenizer
from steps.pairs import held_out_pairs
from steps.policy_config import Groups
from steps.reward_model import Reading
from steps.reward_scorers import CarefulScorer, members_of, reward_scorer
from steps.rollouts import (
    AnswerReward,
    OnPolicyTrainer,
    learn,
    prompt_rows,
    prompts_of,
    rollout_arguments,
)
from steps.self_play import for_leave_one_out, preferences, win_rates
from steps.tracking import Tracker
from steps.warm_start import begin_at

BETA = 0.05  # KL coefficient where the recipe names none; TRL's GRPO has no penalty unless asked for one


class GroupTrainer(OnPolicyTrainer):
    """Mixed into TRL's trainers on groups of answers; their KL is a mean over tokens, and is told an answer too."""

    tokens_an_answer = 0.0

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        self.tell(inputs, out)
        return out

    def log(self, logs, start_time=None):
        for metrics in self._metrics.values():
            if lengths := metrics.get("completions/mean_length"):
                self.tokens_an_answer = float(np.mean(lengths))
            if "kl" in metrics:
                metrics["kl_per_token"] = metrics["kl"]
                metrics["kl"] = [kl * self.tokens_an_answer for kl in metrics["kl"]]
        super().log(logs, start_time)


class LeaveOneOutTrainer(GroupTrainer, RLOOTrainer):
    """TRL's RLOOTrainer with answers that repeat and checkpoints that are exact."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        found = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return found[0] if isinstance(found, tuple) else found


class GroupRelativeTrainer(GroupTrainer, GRPOTrainer):
    """TRL's GRPOTrainer with answers that repeat and checkpoints that are exact."""


class ComparedReward(AnswerReward):
    """The same scores, with what answers are compared by.

    Attributes:
        members: (N, B) what each member of the reward model gives this process's last answers, on the scale its
            differences are log-odds on: the reward's own may be another (`Reading`).
    """

    def __init__(
        self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, batch: int, longest: int | None = None
    ) -> None:
        careful = scorer if isinstance(scorer, CarefulScorer) else CarefulScorer([scorer], Reading())
        super().__init__(careful, tokenizer, batch, longest)
        self.careful, self.members = careful, torch.zeros(1, 0)

    def scores(self, rows: Rows, pad: int) -> Tensor:
        self.members = torch.cat([self.careful.members(part, pad) for part in rows.split(self.batch)], 1)
        return self.careful.scaled(self.members)


class SelfPlayTrainer(LeaveOneOutTrainer):
    """RLOO of answers that are worth what they win against the others to their prompt (`steps.self_play`).

    Attributes:
        scores: (B,) what the reward model gives the last answers of all processes.
        win_rates: (P, G) what they win, G answers to each of P prompts.
    """

    scores: Tensor
    win_rates: np.ndarray

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.scores = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)[:, 0]
        # Of all processes, as TRL's scores are: the answers to a prompt may be spread over several.
        members = self.accelerator.gather(self.reward_funcs[0].members.T.contiguous()).T.float().cpu().numpy()
        rates = win_rates(preferences(members.reshape(len(members), -1, self.num_generations)).mean(0))
        self.win_rates = rates
        return torch.from_numpy(for_leave_one_out(rates)).to(self.scores).view(-1, 1)

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["reward"][-1] = self.scores.mean().item()  # TRL noted the win rates, whose mean says nothing
        metrics["win_rate_deviation"].append(float(self.win_rates.std()))
        metrics["win_rate_best"].append(float(self.win_rates.max(1).mean()))
        return out

    def tell(self, inputs, out, **more):
        first = self.accelerator.process_index * len(inputs)
        super().tell(inputs, out, win_rate=self.win_rates.ravel()[first : first + len(inputs)].tolist(), **more)


KINDS = {
    "rloo": (LeaveOneOutTrainer, RLOOConfig, rloo_trainer, AnswerReward),
    "grpo": (GroupRelativeTrainer, GRPOConfig, grpo_trainer, AnswerReward),
    "spo": (SelfPlayTrainer, RLOOConfig, rloo_trainer, ComparedReward),
}


def tune_policy(
    groups: Groups,
    method: str,
    dtype: str,
    *,
    base: Path,
    sft: Path,
    reward: Path,
    preferences: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
    start: Path | None = None,
) -> Facts:
    """Let TRL's trainer raise what our reward model gives the policy's answers, from the SFT model.

    REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740), group-relative policy optimisation (Shao et al.
    2024, arXiv:2402.03300) or self-play preference optimisation (Swamy et al. 2024, arXiv:2401.04056).

    Args:
        method: of `KINDS`.
        sft: the SFT step's artifact; policy and reference both start there.
        reward: the reward step's artifact.
        preferences: prompts of its part `train` are answered; its held-out pairs measure the implicit reward.
        start: another policy to begin the training at; the reference stays the SFT model.
    """
    set_seed(seed)
    kind, arguments_of, module, reward_of = KINDS[method]
    tokenizer, model = load_tokenizer(base), load_policy(base, dtype, sft / ADAPTER, trainable=True)
    scorer = reward_scorer(model, base, dtype, reward / ADAPTER)
    frozen = REFERENCE if isinstance(model, PeftModel) else None
    if frozen:
        add_adapter(model, frozen, "default")
    args = rollout_arguments(arguments_of, groups, {"beta": BETA}, seed=seed, out=out)
    prompts = prompts_of(preferences, at_least=args.generation_batch_size // args.num_generations)
    scorer.head.to(args.device)
    for part in members_of(scorer):
        if part.model is not model:
            part.model.to(args.device)
    with labelled_lm_head(module, entropy_gradient=getattr(args, "entropy_coef", 0) > 0):
        trainer = kind(
            model,
            reward_of(scorer, tokenizer, args.per_device_train_batch_size, Reading.of(reward / ADAPTER).max_length),
            args=args,
            train_dataset=prompt_rows(prompts),
            processing_class=tokenizer,
        )

    def reference(rows):  # asked before the first update, when a whole model is its own reference
        with evaluating(model), active(model, frozen):
            return token_log_probs(model, rows)[0]

    held_out = HeldOut(held_out_pairs(preferences, groups.held_out), tokenizer, reference)
    begin_at(model, start, base, dtype)
    facts = learn(method, trainer, groups, held_out, args.beta or 1.0, base, out, tracker)
    return {**facts, "start": "champion" if start else "sft"}
