"""PPO on a model of a few thousand parameters: one that ends, one critic, one reward that is a sum."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer import grpo_trainer

from steps.backbone import Scorer, add_adapter
from steps.lm_head import labelled_lm_head
from steps.models import load_policy, load_tokenizer
from steps.policy_config import PPO
from steps.ppo_trainer import REFERENCE, PPOConfig, PPOTrainer
from steps.rollouts import AnswerReward, prompt_rows, rollout_arguments

PROMPTS = [f"{'rain ' * (number % 3)}prompt {number}: " for number in range(24)]
TRAINER = {
    "per_device_train_batch_size": 4,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "temperature": 0.7,
}


class EvenReward(AnswerReward):
    """Share of an answer's tokens that are even: a number nothing has to be learnt for."""

    def __call__(self, prompts, completions, completion_ids, **_: Any) -> list[float]:
        self.latest = torch.tensor([sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids])
        return self.latest.tolist()


def policy(base: Path, seed: int = 0, **lora: Any):
    """The tiny model with a trained-looking adapter, a frozen copy of it, and one for the critic."""
    torch.manual_seed(seed)
    model = load_policy(base, "float32")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], **lora}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    add_adapter(model, REFERENCE, "default")
    add_adapter(model, "critic", "default")
    return model


def critic(model) -> Scorer:
    torch.manual_seed(1)
    return Scorer(model, "critic", nn.Linear(model.config.hidden_size, 1))


def trainer(
    base: Path, out: Path, trainer: Mapping[str, Any] | None = None, more: Mapping[str, Any] | None = None, **ppo: Any
) -> PPOTrainer:
    """A PPOTrainer ready to train; `ppo` are its parameters, `trainer` TRL's, `more` the constructor's."""
    config = PPO(**{"rollouts": 3, **ppo, "trainer": {**TRAINER, **(trainer or {})}})
    args = rollout_arguments(PPOConfig, config, {}, seed=3, out=out, disable_dropout=True)
    model, tokenizer = policy(base), load_tokenizer(base)
    head = critic(model)
    with labelled_lm_head(grpo_trainer, entropy_gradient=config.entropy_coefficient > 0):
        return PPOTrainer(
            model,
            EvenReward(head, tokenizer, 8),
            critic=head,
            ppo=config,
            args=args,
            train_dataset=prompt_rows(PROMPTS),
            processing_class=tokenizer,
            **(more or {}),
        )


def weights(made: PPOTrainer) -> dict[str, torch.Tensor]:
    """All that is trained, by name."""
    named = {name: p for name, p in made.policy.named_parameters() if ".default." in name or ".critic." in name}
    named |= {f"head.{name}": p for name, p in made.critic.head.named_parameters()}
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def prepared(made: PPOTrainer) -> list[dict[str, torch.Tensor]]:
    """The minibatches of a first rollout, with the trainer as it is before its first update."""
    made.model.train()
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps
    rows = [{"prompt": prompt} for prompt in PROMPTS[: made.args.generation_batch_size]]
    made._prepare_inputs(rows)
    return made._buffered_inputs
