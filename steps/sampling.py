"""Answers drawn from a model, such that two models draw with the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from steps.config import Sampling
from steps.formats import as_answer
from steps.tracking import Tracker


class InverseCdf(LogitsProcessor):
    """Draws each next token by inverting the distribution function at a number known beforehand.

    The numbers belong to a prompt, not to a batch or a model: beyond float error answers do not depend on the batch
    size, and two models that agree on a distribution draw the same token, which takes noise out of their comparison.
    It also costs one uniform number per token, where `torch.multinomial` draws one for every word of the vocabulary.

    Args:
        uniforms: (rows, steps) in [0, 1).
        temperature: the logits are divided by it.
    """

    def __init__(self, uniforms: torch.Tensor, temperature: float, prompt_length: int) -> None:
        self.uniforms, self.temperature, self.prompt_length = uniforms, temperature, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) logits to ones under which only the drawn token is possible."""
        step = input_ids.shape[1] - self.prompt_length
        return only(draw(scores.float() / self.temperature, self.uniforms[:, step]), scores)


def draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """(rows,) tokens: the first whose cumulative probability exceeds the row's number.

    Args:
        logits: (rows, vocabulary), float32.
        uniforms: (rows,) in [0, 1).
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def only(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Scores of which only `tokens` (rows,) are finite."""
    return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def uniforms_of(seed: int, first: int, rows: int, steps: int) -> torch.Tensor:
    """(rows, steps) random numbers of the prompts `first`, `first + 1`, …, each from a generator of its own."""
    generators = (torch.Generator().manual_seed(seed * 1_000_003 + first + row) for row in range(rows))
    return torch.stack([torch.rand(steps, generator=generator) for generator in generators])


@torch.no_grad()
def draw_tokens(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms: torch.Tensor,
    temperature: float,
    ends: Sequence[int],
    pad: int,
) -> list[list[int]]:
    """One completion of each prompt, drawn from the whole vocabulary; with its end token, unless it was cut off.

    Args:
        prompts: tokens.
        uniforms: (rows, steps) in [0, 1); a completion has at most that many tokens.
        ends: tokens that end a completion.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    # The last position is cut out of a larger tensor; left uncontiguous, a CPU copies the head once per row.
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    try:
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=uniforms.shape[1],
            do_sample=False,
            logits_processor=LogitsProcessorList([InverseCdf(uniforms.to(model.device), temperature, width)]),
            eos_token_id=list(ends),
            pad_token_id=pad,
        )[:, width:]
    finally:
        hook.remove()
    return [_ended(tokens, ends) for tokens in generated.tolist()]


def _ended(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens as far as the first that ends."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]


@dataclass(frozen=True)
class Answers:
    """What a model said.

    Attributes:
        texts: without the end token, as the data have answers (`steps.formats.as_answer`).
        lengths: (n,) in tokens, the end token not counted.
        tokens: as drawn, the end token included.
    """

    texts: list[str]
    lengths: np.ndarray
    tokens: list[list[int]]

    def part(self, place: int, count: int) -> Answers:
        """`count` of the answers, from the one at `place` on."""
        rows = slice(place, place + count)
        return Answers(self.texts[rows], self.lengths[rows], self.tokens[rows])


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    config: Sampling,
    seed: int,
    tracker: Tracker,
    label: str,
    temperature: float | None = None,
    place: int = 0,
    after: str = "",
) -> Answers:
    """One answer to each prompt, drawn from the whole vocabulary.

    Args:
        temperature: the configured one when not given.
        place: number of the first prompt; a prompt's random numbers go by its number.
        after: what the model wants its prompts to end with (`steps.policy_prompt`).
    """
    model.eval()
    end = tokenizer.eos_token_id
    drawn: list[list[int]] = []
    for first in range(0, len(prompts), config.batch_size):
        tracker.progress(label, first, len(prompts))
        asked = tokenizer([prompt + after for prompt in prompts[first : first + config.batch_size]])["input_ids"]
        numbers = uniforms_of(seed, place + first, len(asked), config.max_new_tokens)
        drawn += draw_tokens(model, asked, numbers, temperature or config.temperature, [end], tokenizer.pad_token_id)
    tracker.progress(label, len(prompts), len(prompts))
    said = [tokens[:-1] if tokens and tokens[-1] == end else tokens for tokens in drawn]
    texts = [
        as_answer(prompt, tokenizer.decode(tokens, skip_special_tokens=True))
        for prompt, tokens in zip(prompts, said, strict=True)
    ]
    return Answers(texts, np.array([len(tokens) for tokens in said]), drawn)
