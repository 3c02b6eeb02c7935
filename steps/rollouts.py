"""What methods share that learn from the policy's own answers: drawing them, scoring them, exact checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, load_peft_weights
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINING_ARGS_NAME
from trl import GRPOConfig
from trl.trainer.utils import RepeatSampler

from steps.artifact import Facts
from steps.backbone import Rows, Scorer, load_adapter, merged
from steps.datasets import read_table
from steps.errors import DataError, StepFailed
from steps.frozen_layers import FrozenLayers
from steps.implicit_rewards import HeldOut
from steps.models import checkpoint_files, save_weights
from steps.policy_config import PPO, Groups, OnPolicy
from steps.sampling import draw_tokens, uniforms_of
from steps.tracking import Tracker
from steps.training import arguments, run_trainer

SAMPLES = "samples"
# Of what TRL reports of answers; the names on the right are the project's.
RENAMED = {"completions/mean_length": "completion_length", "clip_ratio/region_mean": "clip_fraction"}
OF_GROUPS = ("reward_std", "frac_reward_zero_std", "step_time", "num_tokens")
LAST = ("reward", "kl", "entropy", "explained_variance", "completion_length", "ended", "win_rate_deviation")


class AnswerReward:
    """A reward model as TRL's trainers ask for it: one number for each answer.

    An answer that was cut off is scored as if it ended there: the reward model has only seen answers that end.

    Args:
        longest: tokens the reward model has learnt to read at most; of a longer text the beginning is left out.

    Attributes:
        latest: (B,) the scores of this process's last answers.
    """

    __name__ = "reward"

    def __init__(
        self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase, batch: int, longest: int | None = None
    ) -> None:
        self.scorer, self.tokenizer, self.batch, self.longest = scorer, tokenizer, batch, longest
        self.latest = torch.zeros(0)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[str], completions: Any, completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        self.latest = self.scores(self.rows(prompts, completion_ids), self.tokenizer.pad_token_id)
        return self.latest.tolist()

    def rows(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> Rows:
        """Prompts and answers, each with its end, where the scorer is."""
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        asked = self.tokenizer(list(prompts))["input_ids"]
        # Where padding and end are one token the score is read before it, so that it need not be there.
        whole = [[*ids] if end == pad or (ids and ids[-1] == end) else [*ids, end] for ids in completion_ids]
        if self.longest is not None:
            whole = [ids[1 - self.longest :] for ids in whole]
            asked = [ids[len(said) - self.longest :] for ids, said in zip(asked, whole, strict=True)]
        return Rows.of(asked, whole, pad).to(self.scorer.model.device)

    def scores(self, rows: Rows, pad: int) -> torch.Tensor:
        """(B,) what each row is worth."""
        return torch.cat([self.scorer.scores(part, pad) for part in rows.split(self.batch)])


class PromptSampler(RepeatSampler):
    """TRL's sampler with an order drawn from (seed, epoch) alone, so that a resumed run repeats it."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed * 1_000_003 + epoch)


class OnPolicyTrainer:
    """Mixed into TRL's GRPOTrainer or RLOOTrainer.

    Answers are drawn with random numbers that belong to (seed, rollout, row), so that they do not depend on how rows
    are spread over processes; and a checkpoint holds what a run needs to go on between two rollouts, and no more.
    """

    on_rollout: Callable[[Any, Mapping[str, list]], None] | None = None
    memories: Sequence[FrozenLayers] = ()

    @property
    def policy(self):
        """The policy itself, without what several processes wrap around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def checkpoint_files(self) -> tuple[str, ...]:
        """What a checkpoint holds, if it is whole."""
        return checkpoint_files(self.policy)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return updates_per_rollout(self.args)

    @property
    def rollout(self) -> int:
        """The number of the rollout that is being learnt from, from 0."""
        return self.state.global_step // self.updates_per_rollout

    def is_exact(self, step: int) -> bool:
        """Whether a run resumed at this optimizer step repeats the straight one: between two rollouts it does."""
        return step % self.updates_per_rollout == 0

    def _get_train_sampler(self, dataset=None):
        rows = self.train_dataset if dataset is None else dataset
        return PromptSampler(
            rows,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            seed=self.args.seed,
        )

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self.use_vllm or self.use_transformers_continuous_batching:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return self._draw(prompt_ids), None

    def _draw(self, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """A completion of each prompt, as tokens."""
        first = self.rollout * self.args.generation_batch_size + self.accelerator.process_index * len(prompt_ids)
        numbers = uniforms_of(self.args.seed, first, len(prompt_ids), self.max_completion_length)
        numbers = torch.nn.functional.pad(numbers, (0, 1))  # one step more, so that the last token is fed as well
        training = self.policy.training
        self.policy.eval()
        pad, widths = self.processing_class.pad_token_id, list(map(len, prompt_ids))
        with ExitStack() as stack:
            stack.enter_context(merged(self.policy))
            for memory in self.memories:
                stack.enter_context(memory.drawing())
            drawn = draw_tokens(self.policy, prompt_ids, numbers, self.temperature, self.eos_token_ids, pad)
            drawn = [row[: self.max_completion_length] for row in drawn]
            for memory in self.memories:
                whole = [[*asked, *said] for asked, said in zip(prompt_ids, drawn, strict=True)]
                memory.take(whole, max(widths), widths)
        self.policy.train(training)
        return drawn

    def tell(self, inputs: Sequence[Mapping[str, Any]], out: Mapping[str, Any], **more: list) -> None:
        """Pass on what a rollout came to: a list for each column, `more` besides the usual ones."""
        if self.on_rollout is None:
            return
        counts = out["completion_mask"].sum(1).tolist()
        tokens = [ids[:count] for ids, count in zip(out["completion_ids"].tolist(), counts, strict=True)]
        answers = {
            "prompt": [row["prompt"] for row in inputs],
            "answer": [self.processing_class.decode(ids, skip_special_tokens=True) for ids in tokens],
            "reward": self.reward_funcs[0].latest.tolist(),
            "tokens": counts,
            "ended": [ids[-1] in self.eos_token_ids for ids in tokens],
        }
        self.on_rollout(self, {**answers, **more})

    def log(self, logs, start_time=None):
        """TRL's log under the project's names."""
        for metrics in self._metrics.values():
            for name in [name for name in metrics if "/" in name or name in OF_GROUPS]:
                values = metrics.pop(name)
                if name in RENAMED:
                    metrics[RENAMED[name]] = values
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.policy, PeftModel):
            self.policy.save_pretrained(str(folder), selected_adapters=["default"])
        else:
            self.policy.save_pretrained(str(folder), state_dict=state_dict)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if isinstance(self.policy, PeftModel):
            load_adapter(self.policy, "default", load_peft_weights(resume_from_checkpoint, device="cpu"))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def updates_per_rollout(args: GRPOConfig) -> int:
    """Optimizer steps between two rollouts.

    Raises:
        StepFailed: a rollout does not end with an optimizer step.
    """
    passes = args.steps_per_generation * args.num_iterations
    if passes % args.gradient_accumulation_steps:
        raise StepFailed(
            "a rollout must end with an optimizer step",
            where="steps_per_generation, num_iterations and gradient_accumulation_steps (the recipe's `trainer:`)",
            have=f"{args.steps_per_generation} × {args.num_iterations} is no multiple of "
            f"{args.gradient_accumulation_steps}",
            then="change one of them, then run again",
        )
    return passes // args.gradient_accumulation_steps


def rollout_arguments(
    kind: Any, config: PPO | Groups, usual: Mapping[str, Any], *, seed: int, out: Path, **fixed: Any
) -> Any:
    """A TRL configuration that makes the recipe's number of rollouts; reports and checkpoints come once for each.

    Args:
        usual: what the method sets unless the recipe does.
    """
    args = arguments(kind, {**usual, **config.trainer}, seed=seed, out=out, **fixed)
    updates = updates_per_rollout(args)
    args.max_steps = config.rollouts * updates
    for name in ("save_steps", "logging_steps"):
        if name not in config.trainer:
            setattr(args, name, updates)
    return args


def prompts_of(preferences: Path, at_least: int) -> list[str]:
    """The prompts of the training pairs, each once, in the table's order; again from the start where they are few.

    Raises:
        DataError: there is none.
    """
    table = read_table(preferences, columns=["prompt", "part"])
    found = list(dict.fromkeys(table.loc[table["part"] == "train", "prompt"]))
    if not found:
        raise DataError("there are no prompts to answer", where=str(preferences), then="add data, or change the split")
    return found * -(-at_least // len(found))


def prompt_rows(prompts: Sequence[str]) -> Dataset:
    """Prompts as TRL's trainers take them."""
    return Dataset.from_dict({"prompt": list(prompts)})


def rollout_facts(method: str, trainer: Any, measured: Mapping[str, float]) -> Facts:
    """What a run of rollouts came to: the last report, and the implicit rewards of the held-out pairs."""
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    last = {name: history[-1][name] for name in LAST if name in history[-1]}
    return {
        "method": method,
        "rollouts": trainer.state.global_step // trainer.updates_per_rollout,
        "steps": trainer.state.global_step,
        "reward_at_start": history[0]["reward"],
        "accuracy": measured["eval_rewards/accuracies"],
        "likelihood_displaced": measured["eval_rewards/chosen"] < 0,
        **last,
        **measured,
    }


class Notes:
    """What is written down after a rollout: some answers, and now and then the implicit rewards of held-out pairs."""

    def __init__(self, config: OnPolicy, held_out: HeldOut, beta: float, tracker: Tracker) -> None:
        self.config, self.held_out, self.beta, self.tracker = config, held_out, beta, tracker

    def __call__(self, trainer: Any, answers: Mapping[str, list]) -> None:
        if not trainer.accelerator.is_main_process:
            return
        step, number = trainer.state.global_step, trainer.rollout
        if number % self.config.samples_every == 0:
            self.tracker.table(SAMPLES, step, answers)
        if number and number % self.config.measure_every == 0:
            self.tracker.metrics(self.held_out.measure(trainer.policy, self.beta), step)


def learn(
    method: str,
    trainer: Any,
    config: OnPolicy,
    held_out: HeldOut,
    beta: float,
    base: Path,
    out: Path,
    tracker: Tracker,
) -> Facts:
    """Train to the end with notes on the way, measure, and leave the weights in `out`.

    Args:
        beta: of the implicit rewards.
    """
    trainer.on_rollout = Notes(config, held_out, beta, tracker)
    run_trainer(trainer, tracker)
    measured = held_out.measure(trainer.policy, beta)
    tracker.metrics(measured, trainer.state.global_step)
    save_weights(trainer.policy, base, out)
    return rollout_facts(method, trainer, measured)
