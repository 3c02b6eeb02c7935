"""A language of a few words, a model of some 40,000 weights and rewards that are counted, for the PPO benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl.trainer import grpo_trainer

from steps.backbone import Scorer
from steps.lm_head import add_labelled_lm_head, labelled_lm_head
from steps.policy_config import PPO
from steps.ppo_trainer import PPOConfig, PPOTrainer
from steps.rollouts import prompt_rows, rollout_arguments

WORDS = 29
TOY: dict[str, Any] = {"steps_per_generation": 1, "temperature": 1.0, "max_grad_norm": 1.0}


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """w0 … w28, an end and padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{number}": number + 3 for number in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=WORDS + 3,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        max_position_embeddings=128,
        num_labels=1,
    )


def toy_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(_config())


class ToyReward:
    """A reward that is a function of an answer's tokens."""

    __name__ = "reward"

    def __init__(self, worth: Callable[[Sequence[int]], float]) -> None:
        self.worth, self.latest = worth, torch.zeros(0)

    def __call__(self, prompts, completions, completion_ids, **_: Any) -> list[float]:
        self.latest = torch.tensor([self.worth(tokens) for tokens in completion_ids])
        return self.latest.tolist()


def train_toy(
    model: LlamaForCausalLM, prompts: Sequence[str], reward: ToyReward, ppo: PPO, seed: int, out: Path
) -> PPOTrainer:
    """PPO of all weights, with a reference and a critic that are models of their own."""
    args = rollout_arguments(PPOConfig, ppo, {"save_strategy": "no"}, seed=seed, out=out, disable_dropout=True)
    reference = LlamaForCausalLM(_config())
    reference.load_state_dict(model.state_dict())
    add_labelled_lm_head(reference, args.temperature, outputs=("log_probs", "entropy"))
    critic = LlamaForSequenceClassification(_config())
    head = torch.nn.Linear(64, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    rows = list(prompts) * -(-args.generation_batch_size // len(prompts))
    with labelled_lm_head(grpo_trainer, entropy_gradient=ppo.entropy_coefficient > 0):
        trainer = PPOTrainer(
            model,
            reward,  # type: ignore[arg-type]
            critic=Scorer(critic, None, head),
            ppo=ppo,
            reference=reference.eval(),
            args=args,
            train_dataset=prompt_rows(rows),
            processing_class=toy_tokenizer(),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer
