"""Proximal policy optimisation: from the SFT start to a model whose answers the reward model scores high."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.trainer import grpo_trainer

from steps.artifact import Facts
from steps.backbone import CRITIC, REFERENCE, REWARD, Scorer, add_adapter, demonstration_tokens, linear_head, plain
from steps.frozen_layers import FrozenLayers, remember_frozen_layers
from steps.implicit_rewards import HeldOut
from steps.lm_head import add_labelled_lm_head, labelled_lm_head
from steps.models import (
    ADAPTER,
    MASTER,
    frozen_depth,
    is_whole_model,
    load_policy,
    load_reward_model,
    load_tokenizer,
    score_head,
)
from steps.pairs import held_out_pairs
from steps.policy_config import PPO
from steps.ppo_trainer import Moments, PPOConfig, PPOTrainer
from steps.reward_model import Reading
from steps.reward_scorers import careful_scorer, members_of
from steps.rollouts import AnswerReward, learn, prompt_rows, prompts_of, rollout_arguments
from steps.sampling import draw_tokens, uniforms_of
from steps.tracking import Tracker
from steps.warm_start import begin_at


@dataclass(frozen=True)
class Models:
    """The four models of PPO.

    Attributes:
        reference: None where it is an adapter of the policy's base.
        all: every model there is, each once.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel | None
    reward: Scorer
    critic: Scorer
    all: tuple[PreTrainedModel, ...]


def tune_policy(
    ppo: PPO,
    dtype: str,
    *,
    base: Path,
    sft: Path,
    reward: Path,
    preferences: Path,
    demonstrations: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
    start: Path | None = None,
) -> Facts:
    """Maximise E[r(x, y)] − β KL(π‖ρ) (InstructGPT, arXiv:2203.02155, eq. 2) by PPO, from the SFT model.

    Args:
        sft: the SFT step's artifact; policy and reference both start there.
        reward: the reward step's artifact.
        preferences: prompts of its part `train` are answered; its held-out pairs measure the implicit reward.
        demonstrations: table of prompt, completion, for the pre-training mix.
        start: another policy to begin the training at. The reference stays the SFT model, and so does the scale of
            the reward, which its answers give.
    """
    set_seed(seed)
    tokenizer, models = load_tokenizer(base), load_models(ppo, dtype, base, sft, reward)
    args = rollout_arguments(PPOConfig, ppo, {}, seed=seed, out=out, disable_dropout=True)
    place_models(models, args)
    prompts = prompts_of(preferences, at_least=max(args.generation_batch_size, ppo.normalise_reward))
    longest = Reading.of(reward / ADAPTER).max_length
    answer_reward = AnswerReward(models.reward, tokenizer, args.per_device_train_batch_size, longest)
    moments = known_moments(ppo, reward) or start_moments(
        ppo, args, models.policy, answer_reward, tokenizer, prompts, tracker
    )
    begin_critic(models.critic, ppo, moments)
    memories = remembered(models)
    with labelled_lm_head(grpo_trainer, entropy_gradient=ppo.entropy_coefficient > 0):
        trainer = PPOTrainer(
            models.policy,
            answer_reward,
            critic=models.critic,
            ppo=ppo,
            moments=moments,
            reference=models.reference,
            demonstrations=demonstration_tokens(tokenizer, demonstrations) if ppo.ptx_coefficient else None,
            memories=memories,
            args=args,
            train_dataset=prompt_rows(prompts),
            processing_class=tokenizer,
        )
    held_out = HeldOut(held_out_pairs(preferences, ppo.held_out), tokenizer, trainer.reference_log_probs)
    for memory in memories:
        memory.keep()
    begin_at(models.policy, start, base, dtype)
    facts = learn("ppo", trainer, ppo, held_out, ppo.kl.coefficient or 1.0, base, out, tracker)
    moments_used = {"reward_mean": moments.mean, "reward_deviation": moments.deviation}
    return {**facts, "start": "champion" if start else "sft", **moments_used}


def load_models(ppo: PPO, dtype: str, base: Path, sft: Path, reward: Path) -> Models:
    """Policy, reference, reward model and critic: adapters over one base, or models of their own.

    Of whole models those that learn, and the reference, which has to agree with the policy at first, are in float32.
    """
    policy, head = load_policy(base, dtype, sft / ADAPTER, trainable=True), score_head(reward / ADAPTER)
    if ppo.backbone == "shared":
        add_adapter(policy, REFERENCE, "default")
        for name in (REWARD, CRITIC):
            add_adapter(policy, name, reward / ADAPTER)
        first, critic = (Scorer(policy, name, linear_head(head)) for name in (REWARD, CRITIC))

        def adapted(name: str, weights: Path) -> Scorer:
            add_adapter(policy, name, weights)
            return Scorer(policy, name, linear_head(score_head(weights)))

        careful = careful_scorer(first, reward / ADAPTER, adapted, scaled=False)
        return Models(policy, None, careful, critic, all=(policy,))
    learning = MASTER if is_whole_model(sft / ADAPTER) else dtype
    reference = load_policy(base, learning, sft / ADAPTER)
    apart = [load_reward_model(base, precision, reward / ADAPTER) for precision in (dtype, learning)]
    adapters = ["default" if isinstance(model, PeftModel) else None for model in apart]
    first, critic = (Scorer(model, adapter, linear_head(head)) for model, adapter in zip(apart, adapters, strict=True))

    def loaded(name: str, weights: Path) -> Scorer:
        return Scorer(load_reward_model(base, dtype, weights), adapters[0], linear_head(score_head(weights)))

    careful = careful_scorer(first, reward / ADAPTER, loaded, scaled=False)
    further = [scorer.model for scorer in members_of(careful)[1:]]
    return Models(policy, reference, careful, critic, all=(policy, reference, *apart, *further))


def place_models(models: Models, args: PPOConfig) -> None:
    """Put every model where it is used, and give a reference of its own the head the policy gets from its trainer."""
    for model in models.all:
        if not getattr(model, "is_quantized", False):
            model.to(args.device)
    for scorer in (models.reward, models.critic):
        scorer.head.to(args.device)
    if models.reference is not None:
        add_labelled_lm_head(plain(models.reference), args.temperature, outputs=("log_probs", "entropy"))


def known_moments(ppo: PPO, reward: Path) -> Moments | None:
    """The constants that stand beside the reward model, if any do and rewards are to be normalised."""
    reading = Reading.of(reward / ADAPTER)
    return Moments(reading.mean, reading.deviation) if reading.answers and ppo.normalise_reward else None


def start_moments(
    ppo: PPO,
    args: PPOConfig,
    policy: PreTrainedModel,
    reward: AnswerReward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tracker: Tracker,
    batch: int = 64,
) -> Moments:
    """Mean and deviation of the reward over the start policy's answers (Ziegler et al. 2019, §2.2)."""
    if not ppo.normalise_reward:
        return Moments()
    policy.eval()
    scores: list[float] = []
    for first in range(0, ppo.normalise_reward, batch):
        tracker.progress("start answers", first, ppo.normalise_reward)
        asked = list(prompts[first : min(first + batch, ppo.normalise_reward)])
        numbers = uniforms_of(args.seed + 1, first, len(asked), args.max_completion_length)  # not those of rollout 0
        ids, end = tokenizer(asked)["input_ids"], tokenizer.eos_token_id
        answers = draw_tokens(policy, ids, numbers, args.temperature, [end], tokenizer.pad_token_id)
        scores += reward(asked, None, answers)
    drawn = torch.tensor(scores, dtype=torch.float64)
    return Moments(float(drawn.mean()), max(float(drawn.std(correction=0)), 1e-6))


def begin_critic(critic: Scorer, ppo: PPO, moments: Moments) -> None:
    """Let the critic begin as the reward model, on the normalised scale, or knowing nothing."""
    with torch.no_grad():
        if ppo.critic_start == "reward":
            critic.head.weight.div_(moments.deviation)
            critic.head.bias.fill_(-moments.mean / moments.deviation)
        else:
            for parameter in critic.head.parameters():
                parameter.zero_()


def remembered(models: Models) -> list[FrozenLayers]:
    """A memory of the frozen layers of each model that has some."""
    found = []
    for model in models.all:
        adapters: dict[str, Any] = model.peft_config if isinstance(model, PeftModel) else {}
        depths = [frozen_depth(config, model.config.num_hidden_layers) for config in adapters.values()]
        found.append(remember_frozen_layers(model, min(depths, default=0)))
    return [memory for memory in found if memory is not None]
