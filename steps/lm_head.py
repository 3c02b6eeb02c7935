"""Log-probabilities of the labelled tokens alone, for a processor without Triton.

TRL's trainers score tokens through a fused LM head that on a CPU projects every position, prompt and padding too, in
tiles. Projecting only the labelled positions, at once, is several times faster there and equal to float error
(`benchmarks/lm_head.py` measures both).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

SCALES = ("logits_scaling", "logit_scale", "output_multiplier", "lm_head_multiplier")
_ROWS = 2048  # labelled positions projected at once: 2048 × 50,000 logits in float32 are 400 MB


def token_statistics(logits: torch.Tensor, targets: torch.Tensor, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What a trainer reports of each labelled token.

    Args:
        logits: (n, vocabulary), float32.
        targets: (n,), the tokens that followed.
        wanted: of `log_probs`, `entropy` (nats), `mean_logits`, `is_top1`; only the first has a gradient.

    Returns:
        (n,) for each that is wanted; `log_probs` always.
    """
    log_p = logits.log_softmax(-1)
    found = {"log_probs": log_p.gather(-1, targets[:, None]).squeeze(-1)}
    with torch.no_grad():
        if "entropy" in wanted:
            found["entropy"] = -log_p.exp().mul_(log_p).sum(-1)
        if "mean_logits" in wanted:
            found["mean_logits"] = logits.mean(-1)
        if "is_top1" in wanted:
            found["is_top1"] = log_p.argmax(-1) == targets
    return found


def add_labelled_lm_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """Give `model` a forward that scores labelled positions, with the signature of TRL's `add_fused_lm_head`."""
    plain = [*outputs, "log_probs"]
    simple = (
        next(model.parameters()).device.type == "cpu"
        and "log_sum_sq_probs" not in plain
        and model.get_output_embeddings().bias is None
        and not getattr(model.config.get_text_config(), "output_router_logits", False)
        and not getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        and all(getattr(model.config.get_text_config(), name, None) in (None, 1.0) for name in SCALES)
    )
    if not simple:
        add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, outputs)
        return
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args: Any, fused_lm_head: bool = False, labels=None, num_items_in_batch=None, **kwargs: Any):
        if not fused_lm_head:
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            extra = {name: value for name, value in given.items() if value is not None}
            return original(*args, **extra, **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        mask = targets != -100
        weight = self.get_output_embeddings().weight
        if cast_lm_head_to_fp32:
            hidden, weight = hidden.float(), weight.float()
        chunks = [
            token_statistics(at_least_float32(F.linear(h, weight)) / temperature, t, outputs)
            for h, t in zip(hidden[mask].split(_ROWS), targets[mask].split(_ROWS), strict=True)
        ]
        found = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
        scattered = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in found.items()}
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        blank = dict.fromkeys(("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
        return FusedCausalLMOutput(
            loss=-found["log_probs"].sum() / count, label_mask=mask, aux_loss=None, **{**blank, **scattered}
        )

    model.forward = types.MethodType(forward, model)


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """Values in a precision that sums over a vocabulary keep."""
    return values if values.dtype == torch.float64 else values.float()


@contextmanager
def labelled_lm_head(*modules: Any, entropy_gradient: bool = False) -> Iterator[None]:
    """While the body constructs a trainer, `add_fused_lm_head` in these TRL modules is ours.

    Args:
        entropy_gradient: whether the trainer learns from the entropy; ours only reports it, so TRL's stays.
    """
    if entropy_gradient:
        yield
        return
    for module in modules:
        module.add_fused_lm_head = add_labelled_lm_head
    try:
        yield
    finally:
        for module in modules:
            module.add_fused_lm_head = add_fused_lm_head
