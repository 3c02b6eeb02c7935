"""Proximal policy optimisation with a critic, on TRL's GRPOTrainer.

TRL brings data loading, generation (vLLM among it), checkpoints and the training loop; what makes it PPO is here: a
value for every token, advantages by GAE, clipped losses, a KL penalty token by token, and a pre-training mix
(Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593; Ouyang et al. 2022, arXiv:2203.02155).
`tests/contract/test_trl.py` names every member of TRL this leans on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from steps.advantages import KLController, explained_variance, gae, masked_mean, token_rewards, whiten
from steps.backbone import REFERENCE, Rows, Scorer, active, token_log_probs
from steps.errors import StepFailed
from steps.frozen_layers import FrozenLayers
from steps.losses import clipped, clipped_policy_loss, clipped_value_loss, k3
from steps.policy_config import PPO
from steps.rollouts import AnswerReward, OnPolicyTrainer

CRITIC_FILE, STATE_FILE = "critic.safetensors", "ppo.json"


@dataclass
class PPOConfig(GRPOConfig):
    """GRPO's configuration with one completion a prompt: a critic's value is the baseline, not a group's mean."""

    num_generations: int = field(default=1, metadata={"help": "Completions of a prompt in one rollout."})

    def __post_init__(self) -> None:
        wanted, self.num_generations = self.num_generations, max(2, self.num_generations)
        super().__post_init__()
        self.num_generations = wanted


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of the reward model's scores over the start policy's answers."""

    mean: float = 0.0
    deviation: float = 1.0


class PPOTrainer(OnPolicyTrainer, GRPOTrainer):
    """PPO of a causal model against a reward model.

    Args:
        model: the policy. With adapters: its `default` adapter is trained, and `reference` is the frozen start.
        reward: what answers are worth.
        critic: V before every token; its weights are trained beside the policy's.
        ppo: the algorithm's parameters.
        moments: what scores are normalised with.
        reference: the start policy, where it is a model of its own.
        demonstrations: prompts and completions to mix in, when `ppo.ptx_coefficient` asks for it.
        memories: of frozen layers; told to forget before each rollout.
        on_rollout: called after a rollout with the trainer, and lists of what each answer came to.
    """

    _tag_names, _name = ["trl", "ppo"], "PPO"

    def __init__(
        self,
        model: PreTrainedModel,
        reward: AnswerReward,
        *,
        critic: Scorer,
        ppo: PPO,
        moments: Moments = Moments(),
        reference: PreTrainedModel | None = None,
        demonstrations: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None = None,
        memories: Sequence[FrozenLayers] = (),
        on_rollout: Callable[[Any, Mapping[str, list]], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise StepFailed(
                "PPO runs in several processes that hold whole models, not in parts of one",
                have="FSDP or DeepSpeed in accelerate's configuration",
                then="use plain data parallelism, or policy.method=grpo",
            )
        self.answer_reward, self.critic, self.ppo, self.moments = reward, critic, ppo, moments
        self.reference, self.demonstrations = reference, demonstrations
        self.memories, self.on_rollout = memories, on_rollout
        self.kl = KLController(ppo.kl.coefficient, ppo.kl.target, ppo.kl.rate)
        self.critic.train()
        self._moved_too_far = False

    # -- rollouts ------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **_
    ):
        """As TRL's, over rows padded on the right."""
        prompt = input_ids.shape[1] - logits_to_keep
        rows = Rows.joined(
            input_ids[:, :prompt], attention_mask[:, :prompt], input_ids[:, prompt:], attention_mask[:, prompt:]
        )
        with self.accelerator.autocast():
            found = [token_log_probs(self.policy, part) for part in rows.split(batch_size or len(rows.ids))]
        log_probs = torch.cat([log_probs for log_probs, _ in found])
        return log_probs, torch.cat([entropy for _, entropy in found]) if compute_entropy else None, None

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A rollout: answers, their rewards token by token, and what critic and policy should learn from them."""
        for memory in self.memories:
            memory.forget()
        out = super()._generate_and_score_completions(inputs)
        rows, batch = rows_of(out), self.args.per_device_train_batch_size
        mask = rows.completion_mask.float()
        old = out.get("old_per_token_logps")  # TRL leaves it out where every rollout is used for one update
        if old is None:
            old = torch.cat([self._log_probs(part) for part in rows.split(batch)])
        old = out["old_per_token_logps"] = old * mask
        reference = torch.cat([self.reference_log_probs(part) for part in rows.split(batch)]) * mask
        with self.accelerator.autocast():
            values = torch.cat([self.critic.values(part) for part in rows.split(batch)])
        ended = torch.isin(
            out["completion_ids"].gather(1, (mask.sum(1).long() - 1).clamp(min=0)[:, None]).squeeze(1),
            torch.tensor(self.eos_token_ids, device=mask.device),
        ).float()
        log_ratios = old - reference
        rewards = token_rewards(self._scores(ended), log_ratios, mask, self.kl.coefficient)
        if self.ppo.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, total=self._total)
        advantages, returns = gae(rewards, values, mask, self.ppo.gamma, self.ppo.lam)
        out["advantages"] = whiten(advantages, mask, total=self._total) if self.ppo.whiten_advantages else advantages
        out |= {"values": values, "returns": returns, "tokens_per_update": self._tokens_per_update(mask)}
        self._moved_too_far = False
        self._report(inputs, out, log_ratios, ended, mask)
        return out

    def _log_probs(self, rows: Rows) -> Tensor:
        with self.accelerator.autocast():
            return token_log_probs(self.policy, rows)[0]

    def reference_log_probs(self, rows: Rows) -> Tensor:
        """(B, T) log-probabilities of completions under the start policy."""
        with self.accelerator.autocast():
            if self.reference is not None:
                return token_log_probs(self.reference, rows)[0]
            with active(self.policy, REFERENCE):
                return token_log_probs(self.policy, rows)[0]

    def _scores(self, ended: Tensor) -> Tensor:
        """(B,) what answers are worth to the policy."""
        scores = (self.answer_reward.latest.to(ended.device) - self.moments.mean) / self.moments.deviation
        if self.ppo.reward_clip is not None:
            scores = scores.clamp(-self.ppo.reward_clip, self.ppo.reward_clip)
        return scores - self.ppo.missing_eos_penalty * (1 - ended)

    def _tokens_per_update(self, mask: Tensor) -> Tensor:
        """Tokens all processes together learn from in one optimizer step, on average over the rollout."""
        updates = self.args.steps_per_generation / self.args.gradient_accumulation_steps
        return (self._total(mask.sum()) / updates).clamp(min=1)

    def _total(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, reduction="sum")

    def _report(self, inputs: list[dict], out: dict, log_ratios: Tensor, ended: Tensor, mask: Tensor) -> None:
        """What the rollout came to, and a step of the KL controller."""
        gather = self.accelerator.gather
        kl = gather(log_ratios.sum(1))
        self._note(
            kl=kl.mean(),
            kl_error=kl.std() / max(len(kl), 1) ** 0.5 if len(kl) > 1 else kl.new_zeros(()),
            kl_k3=gather((k3(log_ratios) * mask).sum(1)).mean(),
            kl_coefficient=self.kl.coefficient,
            ended=gather(ended).mean(),
            value=masked_mean(out["values"], mask, self._total),
            explained_variance=explained_variance(out["values"], out["returns"], mask, self._total),
        )
        self.kl.update(float(kl.mean()))
        self.tell(inputs, out, kl=log_ratios.sum(1).tolist())

    # -- learning ------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        """The critic's loss; the policy's gradient is taken before, so that only one of the two graphs is in memory."""
        rows, mask = rows_of(inputs), rows_of(inputs).completion_mask.float()
        per_update = inputs["tokens_per_update"]
        policy_loss = torch.zeros(())
        if self.rollout >= self.ppo.critic_warmup and not self._moved_too_far:
            policy_loss = self._policy_loss(rows, inputs, mask, per_update)
            if not self._moved_too_far:
                self.accelerator.backward(policy_loss)
        with self.accelerator.autocast():
            values = self.critic.values(rows)
        losses = clipped_value_loss(values, inputs["values"], inputs["returns"], self.ppo.value_clip)
        value_loss = (losses * mask).sum() / per_update
        self._note(value_loss=masked_mean(losses.detach(), mask, self._total))
        return self.ppo.value_coefficient * value_loss + policy_loss.detach().to(value_loss.device)

    def _policy_loss(self, rows: Rows, inputs: Mapping[str, Tensor], mask: Tensor, per_update: Tensor) -> Tensor:
        with self.accelerator.autocast():
            log_probs, entropy = token_log_probs(self.policy, rows)
        old, advantages = inputs["old_per_token_logps"], inputs["advantages"]
        losses = clipped_policy_loss(log_probs, old, advantages, self.epsilon_low)
        loss = ((losses - self.ppo.entropy_coefficient * entropy) * mask).sum() / per_update
        with torch.no_grad():
            moved = masked_mean(k3(old - log_probs), mask, self._total)
            self._moved_too_far = self.ppo.update_kl is not None and float(moved) > self.ppo.update_kl
            self._note(
                policy_loss=masked_mean(losses, mask, self._total),
                entropy=masked_mean(entropy, mask, self._total),
                clip_fraction=masked_mean(clipped(log_probs, old, advantages, self.epsilon_low), mask, self._total),
                update_kl=moved,
                ratio=masked_mean((log_probs - old).exp(), mask, self._total),
            )
        return loss + self._pretraining_loss() if self.ppo.ptx_coefficient and self.demonstrations else loss

    def _pretraining_loss(self) -> Tensor:
        """γ · mean negative log-likelihood of demonstrations (InstructGPT, eq. 2), drawn by (seed, step, process)."""
        prompts, completions = self.demonstrations  # type: ignore[misc]
        seed = (self.args.seed * 1_000_003 + self._micro_step) * 1_009 + self.accelerator.process_index
        draw = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(prompts), (self.args.per_device_train_batch_size,), generator=draw).tolist()
        pad = self.processing_class.pad_token_id
        rows = Rows.of([prompts[i] for i in chosen], [completions[i] for i in chosen], pad).to(self.policy.device)
        with self.accelerator.autocast():
            log_probs, _ = token_log_probs(self.policy, rows)
        loss = -masked_mean(log_probs, rows.completion_mask.float())
        self._note(ptx_loss=self.accelerator.gather(loss.detach()).mean())
        shares = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        return self.ppo.ptx_coefficient * loss / shares

    @property
    def _micro_step(self) -> int:
        """Forward passes since the start of the run, those before a resume included."""
        within = self._step % self.args.gradient_accumulation_steps
        return self.state.global_step * self.args.gradient_accumulation_steps + within

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._step % self.current_gradient_accumulation_steps == 0:
            for parameter in self.critic.parameters():  # Trainer clears the policy's alone
                parameter.grad = None
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for parameter in [*self._policy_parameters(), *self.critic.parameters()]:
                if parameter.grad is not None:
                    parameter.grad = self._total(parameter.grad)
        return loss

    def _policy_parameters(self) -> list[nn.Parameter]:
        critic = {id(parameter) for parameter in self.critic.parameters()}
        return [p for p in self.policy.parameters() if p.requires_grad and id(p) not in critic]

    def create_optimizer(self, model=None):
        """One optimizer for both, with a group of its own for the critic."""
        if self.optimizer is not None:
            return self.optimizer
        with _frozen(self.critic.parameters()):
            optimizer = super().create_optimizer(model)
        rate = self.args.learning_rate if self.ppo.critic_learning_rate is None else self.ppo.critic_learning_rate
        optimizer.add_param_group({"params": self.critic.parameters(), "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _clip_grad_norm(self, model):
        """Clip policy and critic, each by its own norm; the policy's is reported."""
        clip = self.accelerator.clip_grad_norm_
        self._note(critic_grad_norm=clip(self.critic.parameters(), self.args.max_grad_norm))
        return clip(self._policy_parameters(), self.args.max_grad_norm)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def checkpoint_files(self):
        return (*super().checkpoint_files, CRITIC_FILE, STATE_FILE)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            own = {str(place): p.detach().contiguous() for place, p in enumerate(self.critic.parameters())}
            save_file(own, str(folder / CRITIC_FILE))
            (folder / STATE_FILE).write_text(json.dumps(asdict(self.kl)), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        own = load_file(str(folder / CRITIC_FILE))
        with torch.no_grad():
            for place, parameter in enumerate(self.critic.parameters()):
                parameter.copy_(own[str(place)])
        self.kl = KLController(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))

    # -- reports -------------------------------------------------------------------------------------------------

    def _note(self, **values: Tensor | float) -> None:
        mode = "train" if self.model.training else "eval"
        for name, value in values.items():
            self._metrics[mode][name].append(float(value))


def rows_of(batch: Mapping[str, Tensor]) -> Rows:
    """The rows of a batch as TRL's trainers keep them."""
    return Rows.joined(batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"])


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    held = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
