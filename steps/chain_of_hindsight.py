"""The policy step by Chain of Hindsight: fitted to chains of good and bad answers, then asked for good ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer

from steps import policy_prompt
from steps.artifact import Facts
from steps.backbone import Rows, answer_tokens, demonstration_tokens, token_log_probs
from steps.errors import ModelError
from steps.hindsight import BAD, GOOD, IGNORED, Chain, Template, draws_of, openings, visible
from steps.implicit_rewards import held_out_rewards
from steps.intervals import wilson
from steps.lm_head import labelled_lm_head
from steps.models import ADAPTER, checkpoint_files, load_policy, load_tokenizer, save_weights
from steps.pairs import training_and_held_out
from steps.policy_config import ChainOfHindsight
from steps.statistics import pair_accuracy
from steps.tracking import Tracker
from steps.training import LengthGrouped, LengthGroupedSampler, arguments, run_trainer
from steps.warm_start import begin_at

Tokens = list[int]


class Chains:
    """Makes a batch of chains out of pairs: which template, which tokens are hidden, and which demonstration comes
    along is drawn by (seed, row, epoch) alone.

    Args:
        demonstrations: tokens of prompts and of completions, of which each pair brings one along; None for none.

    Attributes:
        sampler: that of the training, which knows the epoch.
    """

    def __init__(
        self,
        config: ChainOfHindsight,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        max_length: int | None,
        demonstrations: tuple[list[Tokens], list[Tokens]] | None = None,
    ) -> None:
        self.config, self.tokenizer, self.seed, self.max_length = config, tokenizer, seed, max_length
        self.templates = [Template.parse(text) for text in config.templates]
        self.demonstrations = demonstrations
        self.sampler: LengthGroupedSampler | None = None

    def chain(self, pair: Mapping[str, Any], draw: np.random.Generator) -> Chain:
        """The chain of a pair: `prompt`, `good_ids`, `bad_ids`."""
        template = self.templates[int(draw.integers(len(self.templates)))]
        first, *later = template.feedback
        openers = [self.tokenizer(pair["prompt"] + first)["input_ids"]]
        openers += [self.tokenizer(words, add_special_tokens=False)["input_ids"] for words in later]
        made = Chain.of(template.sides, openers, {GOOD: pair["good_ids"], BAD: pair["bad_ids"]})
        return made.hiding(self.config.hidden_least, self.config.hidden_most, draw).cut(self.max_length)

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch.

        Returns:
            input_ids, attention_mask, labels, sides: (B, L); `visible` (B, 1, L, L) where a token is hidden; and with
            demonstrations `sft_input_ids`, `sft_attention_mask`, `sft_labels`: (B, M).
        """
        epoch = self.sampler.epoch if self.sampler else 0
        draws = [draws_of(self.seed, pair["row"], epoch) for pair in pairs]
        chains = [self.chain(pair, draw) for pair, draw in zip(pairs, draws, strict=True)]
        batch = {
            "input_ids": _padded([chain.ids for chain in chains], self.tokenizer.pad_token_id),
            "attention_mask": _padded([[1] * len(chain.ids) for chain in chains], 0),
            "labels": _padded([chain.labels for chain in chains], IGNORED),
            "sides": _padded([chain.sides for chain in chains], 0),
        }
        if any(chain.hidden for chain in chains):
            batch["visible"] = torch.from_numpy(visible(chains)).unsqueeze(1)
        if self.demonstrations:
            prompts, completions = self.demonstrations
            picked = [int(draw.integers(len(prompts))) for draw in draws]
            rows = Rows.of([prompts[i] for i in picked], [completions[i] for i in picked], self.tokenizer.pad_token_id)
            batch |= {"sft_input_ids": rows.ids, "sft_attention_mask": rows.mask, "sft_labels": rows.labels}
        return batch


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, L) of rows, filled up on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


class HindsightTrainer(LengthGrouped, SFTTrainer):
    """TRL's SFTTrainer on chains, some of whose tokens are hidden from others.

    Args:
        sft_coefficient: weight of the demonstrations' loss.
    """

    def __init__(self, *args, sft_coefficient: float, **kwargs) -> None:
        self.sft_coefficient = sft_coefficient
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        self.data_collator.sampler = LengthGroupedSampler(self.train_dataset["length"], batch, self.args.seed)
        return self.data_collator.sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean negative log-likelihood of the answers' tokens (eq. 2), and λ times that of demonstrations' (§2)."""
        sides, seen = inputs.pop("sides"), inputs.pop("visible", None)
        demonstrations = {name: inputs.pop(name) for name in [*inputs] if name.startswith("sft_")}

        def forward(**given):
            if seen is not None:
                given["attention_mask"] = self._attention(seen)
            found = model(**given)
            if given.get("fused_lm_head"):
                self._note(found, sides[:, 1:])
            return found

        loss = super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)
        if not demonstrations:
            return loss
        # With `num_items_in_batch`, Trainer leaves gradient accumulation to the loss.
        shares = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return loss + self.sft_coefficient * self._demonstration_loss(model, demonstrations) / shares

    def _attention(self, seen: Tensor) -> Tensor:
        """(B, 1, L, L) in the form the model's attention takes it in."""
        implementation = self.model.config._attn_implementation
        if implementation == "sdpa":
            return seen
        if implementation == "eager":
            floor = torch.finfo(self.model.dtype).min
            return torch.zeros(seen.shape, dtype=self.model.dtype, device=seen.device).masked_fill(~seen, floor)
        raise ModelError(
            "single tokens cannot be hidden in this model's attention",
            where="policy.chain_of_hindsight.hidden_most",
            have=f"attention `{implementation}`",
            then="set hidden_least and hidden_most to 0",
        )

    @torch.no_grad()
    def _note(self, found, sides: Tensor) -> None:
        """Tell the loss of good and of bad answers.

        Args:
            sides: (B, L − 1) of the tokens that are predicted.
        """
        loss = -found.log_probs.detach()
        masks = [(sides == side) & found.label_mask for side in (GOOD, BAD)]
        totals = torch.stack([value for mask in masks for value in ((loss * mask).sum(), mask.sum().to(loss.dtype))])
        good, goods, bad, bads = self.accelerator.gather(totals).reshape(-1, 4).sum(0).tolist()
        for name, total, count in (("good", good, goods), ("bad", bad, bads)):
            if count:
                self._metrics["train"][f"loss/{name}"].append(total / count)

    def _demonstration_loss(self, model, batch: Mapping[str, Tensor]) -> Tensor:
        given = {name.removeprefix("sft_"): value for name, value in batch.items()}
        found = model(**given, fused_lm_head=True, use_cache=False)
        loss = -found.log_probs.sum() / found.label_mask.sum().clamp(min=1)
        self._metrics["train"]["loss/sft"].append(self.accelerator.gather(loss.detach()).mean().item())
        return loss


class HeldOutPairs:
    """Held-out pairs, and how likely a model finds their answers after some words.

    Answers have the tokens they have after the plain prompt, whatever stands between the two.

    Args:
        pairs: prompt, chosen, rejected.
        batch: rows scored at once.
    """

    def __init__(self, pairs: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, tracker: Tracker, batch: int) -> None:
        self.prompts, self.tokenizer, self.tracker, self.batch = list(pairs["prompt"]), tokenizer, tracker, batch
        self.answers = {
            side: answer_tokens(tokenizer, self.prompts, list(pairs[name]))[1]
            for side, name in ((GOOD, "chosen"), (BAD, "rejected"))
        }

    @torch.no_grad()
    def log_probs(self, model: PreTrainedModel, side: int, after: str = "") -> np.ndarray:
        """(pairs,) log-likelihoods of whole answers under a model with TRL's fused head."""
        model.eval()
        asked = self.tokenizer([prompt + after for prompt in self.prompts])["input_ids"]
        said = self.answers[side]
        order = sorted(range(len(said)), key=lambda i: len(asked[i]) + len(said[i]))
        found = np.zeros(len(said))
        for first in range(0, len(order), self.batch):
            self.tracker.progress("held-out", first, len(order))
            part = order[first : first + self.batch]
            rows = Rows.of([asked[i] for i in part], [said[i] for i in part], self.tokenizer.pad_token_id)
            rows = rows.to(model.device)
            log_probs = token_log_probs(model, rows)[0] * rows.completion_mask
            found[part] = log_probs.sum(1).double().cpu().numpy()
        self.tracker.progress("held-out", len(order), len(order))
        return found

    def tokens(self, side: int) -> int:
        """How many tokens the answers have together."""
        return sum(map(len, self.answers[side]))


def measure(
    model: PreTrainedModel, pairs: HeldOutPairs, start: Mapping[int, np.ndarray], words: Mapping[int, str], beta: float
) -> Facts:
    """What a policy makes of held-out pairs.

    The implicit reward is β log π(y | x, praise) / ρ(y | x): the policy as it is asked, against the start as it is
    asked, which is plainly. A pair is classified by log π(y | x, praise) − log π(y | x, blame), higher being better.

    Args:
        start: (pairs,) log-likelihoods of either side's answers under the start.
        words: praise and blame, by side; without blame nothing is classified.
        beta: unit of the implicit rewards.
    """
    praised = {side: pairs.log_probs(model, side, words[GOOD]) for side in (GOOD, BAD)}
    rewards = {side: beta * (praised[side] - start[side]) for side in (GOOD, BAD)}
    facts = {
        **held_out_rewards(rewards[GOOD], rewards[BAD]),
        "eval_loss/good": float(-praised[GOOD].sum() / pairs.tokens(GOOD)),
    }
    if BAD not in words:
        return facts
    blamed = {side: pairs.log_probs(model, side, words[BAD]) for side in (GOOD, BAD)}
    accuracy = pair_accuracy(praised[GOOD] - blamed[GOOD], praised[BAD] - blamed[BAD])
    low, high = wilson(accuracy * len(pairs.prompts), len(pairs.prompts))
    return {
        **facts,
        "eval_loss/bad": float(-blamed[BAD].sum() / pairs.tokens(BAD)),
        "classification_accuracy": accuracy,
        "classification_accuracy_low": low,
        "classification_accuracy_high": high,
    }


def with_tokens(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Pairs as `Chains` takes them: row, prompt, good_ids, bad_ids, and their length without feedback."""
    prompts = list(pairs["prompt"])
    asked, good = answer_tokens(tokenizer, prompts, list(pairs["chosen"]))
    _, bad = answer_tokens(tokenizer, prompts, list(pairs["rejected"]))
    lengths = [sum(map(len, parts)) for parts in zip(asked, good, bad, strict=True)]
    rows = list(range(len(prompts)))
    return Dataset.from_dict({"row": rows, "prompt": prompts, "good_ids": good, "bad_ids": bad, "length": lengths})


def tune_policy(
    chain_of_hindsight: ChainOfHindsight,
    dtype: str,
    *,
    base: Path,
    sft: Path,
    preferences: Path,
    demonstrations: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
    start: Path | None = None,
) -> Facts:
    """Fit the SFT model to chains of answers and feedback (arXiv:2302.02676, eq. 2), and note how it is asked then.

    Args:
        sft: the SFT step's artifact, where the policy starts and what its implicit rewards are measured against.
        preferences: table of prompt, chosen, rejected, margin, part.
        demonstrations: table of prompt, completion; read where `sft_coefficient` is above 0.
        start: another policy to begin the training at.
    """
    config = chain_of_hindsight
    train, held_out, batch = training_and_held_out(preferences, config)
    tokenizer = load_tokenizer(base)
    set_seed(seed)
    fixed = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    args = arguments(SFTConfig, config.trainer, seed=seed, out=out, **fixed)
    beside = demonstration_tokens(tokenizer, demonstrations) if config.sft_coefficient else None
    chains = Chains(config, tokenizer, seed, args.max_length, beside)
    with labelled_lm_head(sft_trainer):
        trainer = HindsightTrainer(
            load_policy(base, dtype, sft / ADAPTER, trainable=True),
            args=args,
            data_collator=chains,
            train_dataset=with_tokens(train, tokenizer),
            processing_class=tokenizer,
            sft_coefficient=config.sft_coefficient,
        )
    pairs = HeldOutPairs(held_out.to_pandas(), tokenizer, tracker, batch)
    before = {side: pairs.log_probs(trainer.model, side) for side in (GOOD, BAD)}
    begin_at(trainer.model, start, base, dtype)
    trainer.checkpoint_files = checkpoint_files(trainer.model)
    run_trainer(trainer, tracker)
    words = openings(chains.templates)
    measured = measure(trainer.model, pairs, before, words, config.beta)
    tracker.metrics(measured, trainer.state.global_step)
    policy_prompt.write(save_weights(trainer.model, base, out), words[GOOD])
    return {
        "method": "chain_of_hindsight",
        "start": "champion" if start else "sft",
        "pairs": len(train),
        "held_out": len(held_out),
        "steps": trainer.state.global_step,
        "prompt_after": words[GOOD],
        "accuracy": measured["eval_rewards/accuracies"],
        **measured,
    }
