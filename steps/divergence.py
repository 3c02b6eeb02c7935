"""How far a policy has moved from its start: KL(π‖ρ), estimated on the policy's own answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from steps.backbone import Rows
from steps.losses import k3


@dataclass(frozen=True)
class Divergence:
    """KL(π‖ρ) of whole answers, in nats an answer, three ways (Schulman 2020, "Approximating KL divergence").

    Attributes:
        k1: mean of log π/ρ, unbiased and noisy.
        error: its standard error.
        k3: mean of the sum of ρ/π − 1 + log π/ρ over tokens, never negative.
        full: mean of the sum over tokens of KL between the two distributions of the next token: no draw is involved
            but that of the texts before it, so it has the least noise.
        answers: how many there were.
    """

    k1: float
    error: float
    k3: float
    full: float
    answers: int


@torch.no_grad()
def divergence(
    policy: PreTrainedModel,
    start: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    temperature: float,
    pad: int,
    batch: int = 16,
    start_prompts: Sequence[Sequence[int]] | None = None,
) -> Divergence:
    """KL of two causal models at a temperature.

    Where the policy is asked with words f of its own behind the prompt x, and the start ρ is not, this is
    KL(π(· | x, f) ‖ ρ(· | x)): how far what people get is from what they got, whatever was whispered to the policy.
    It holds the effect of the words besides that of the training, so it may be above 0 without any.

    Args:
        prompts, answers: tokens; the answers drawn from `policy` at `temperature`, with their end where they have one.
        start_prompts: what the start is asked, where that differs.
    """
    plainly = prompts if start_prompts is None else start_prompts
    whole, never_negative, exact = [], [], []
    order = sorted((i for i in range(len(answers)) if answers[i]), key=lambda i: len(prompts[i]) + len(answers[i]))
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        said = [answers[i] for i in part]
        rows = Rows.of([prompts[i] for i in part], said, pad).to(policy.device)
        other = Rows.of([plainly[i] for i in part], said, pad).to(policy.device)
        for one, theirs, own, mask in zip(*_distributions(policy, start, rows, other, temperature), strict=True):
            drawn = (own - theirs).gather(1, one[:, None]).squeeze(1)
            whole.append((drawn * mask).sum())
            never_negative.append((k3(drawn) * mask).sum())
            exact.append(((own.exp() * (own - theirs)).sum(1) * mask).sum())
    if not whole:
        return Divergence(0.0, 0.0, 0.0, 0.0, 0)
    log_ratios = torch.stack(whole).double()
    error = float(log_ratios.std() / len(log_ratios) ** 0.5) if len(log_ratios) > 1 else 0.0
    means = (float(torch.stack(values).double().mean()) for values in (whole, never_negative, exact))
    k1, never, full = means
    return Divergence(k1, error, never, full, len(whole))


def _distributions(
    policy: PreTrainedModel, start: PreTrainedModel, rows: Rows, start_rows: Rows, temperature: float
) -> tuple[Iterator[Tensor], ...]:
    """For each row: tokens (T,), log ρ and log π of the next token (T, vocabulary), and the mask (T,)."""
    drawn = rows.predicting(rows.ids[:, 1:])
    theirs, own = (_next_token(model, asked, temperature) for model, asked in ((start, start_rows), (policy, rows)))
    return iter(drawn), theirs, own, iter(rows.completion_mask.float())


def _next_token(model: PreTrainedModel, rows: Rows, temperature: float) -> Iterator[Tensor]:
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = getattr(plain, plain.base_model_prefix)
    states = decoder(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).last_hidden_state
    for row in rows.predicting(states[:, :-1]):  # one row's vocabulary at a time is in memory
        yield (plain.get_output_embeddings()(row).float() / temperature).log_softmax(-1)
