"""One set of weights, several models: policy, reference, reward model and critic as adapters over one frozen base.

Rows are right-padded, so that a token's position does not depend on what else is in its batch, and what frozen layers
make of a row can be remembered for all four (`steps.frozen_layers`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steps.datasets import read_table

REFERENCE, REWARD, CRITIC = "reference", "reward", "critic"  # names of adapters beside the policy's, `default`


@dataclass(frozen=True)
class Rows:
    """Prompts followed by their completions, padded on the right.

    Attributes:
        ids, mask: (B, L) tokens, and 1 where there is one.
        starts: (B,) length of each prompt.
        width: T, the length of the longest completion.
    """

    ids: Tensor
    mask: Tensor
    starts: Tensor
    width: int

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad: int) -> Rows:
        """Rows from lists of tokens."""
        rows = [torch.tensor([*p, *c]) for p, c in zip(prompts, completions, strict=True)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return cls(ids, mask, torch.tensor([len(p) for p in prompts]), max(map(len, completions)))

    @classmethod
    def joined(cls, prompts: Tensor, prompt_mask: Tensor, completions: Tensor, completion_mask: Tensor) -> Rows:
        """Rows from left-padded prompts (B, P) and right-padded completions (B, T), as TRL's trainers have them."""
        ids, mask = torch.cat([prompts, completions], 1), torch.cat([prompt_mask, completion_mask], 1)
        left = (prompt_mask == 0).sum(1)
        place = torch.arange(ids.shape[1], device=ids.device) + left[:, None]
        inside = place < ids.shape[1]
        place = place.clamp(max=ids.shape[1] - 1)
        mask = mask.gather(1, place) * inside
        length = int(mask.sum(1).max())
        return cls(ids.gather(1, place)[:, :length], mask[:, :length], prompt_mask.sum(1), completions.shape[1])

    def to(self, device: torch.device) -> Rows:
        return Rows(self.ids.to(device), self.mask.to(device), self.starts.to(device), self.width)

    def split(self, size: int) -> Iterator[Rows]:
        """Some rows at a time; all keep their padding, so that results stack."""
        parts = zip(self.ids.split(size), self.mask.split(size), self.starts.split(size), strict=True)
        return (Rows(ids, mask, starts, self.width) for ids, mask, starts in parts)

    @property
    def completion_mask(self) -> Tensor:
        """(B, T), 1 where a completion has a token."""
        return self.predicting(self.mask[:, 1:])

    @property
    def labels(self) -> Tensor:
        """(B, L) the tokens of completions, −100 elsewhere."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return self.ids.masked_fill((self.mask == 0) | (place < self.starts[:, None]), -100)

    def predicting(self, values: Tensor) -> Tensor:
        """(B, T, …) of values (B, L − 1, …): those at the places from which the completions' tokens are predicted."""
        place = self.starts[:, None] - 1 + torch.arange(self.width, device=self.ids.device)
        inside = place < values.shape[1]
        place = place.clamp(max=values.shape[1] - 1)
        tail = values.shape[2:]
        found = values.gather(1, place.reshape(*place.shape, *(1 for _ in tail)).expand(*place.shape, *tail))
        return found * inside.reshape(*inside.shape, *(1 for _ in tail)).to(values.dtype)


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers as tokens, the latter with their end."""
    asked = tokenizer(list(prompts))["input_ids"]
    whole = tokenizer([p + a for p, a in zip(prompts, answers, strict=True)])["input_ids"]
    return asked, [[*ids[len(p) :], tokenizer.eos_token_id] for p, ids in zip(asked, whole, strict=True)]


def demonstration_tokens(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Path
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of a table as tokens, the latter with their end."""
    rows = read_table(demonstrations, columns=["prompt", "completion"])
    return answer_tokens(tokenizer, list(rows["prompt"]), list(rows["completion"]))


def token_log_probs(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """(B, T) log-probabilities of the completions' tokens, and the entropies (nats) of what they were drawn from.

    Args:
        model: one with TRL's fused head (`steps.lm_head`), at its temperature.
        rows: anywhere; the results are where the model is.
    """
    rows = rows.to(model.device)
    found = model(input_ids=rows.ids, attention_mask=rows.mask, labels=rows.labels, fused_lm_head=True)
    entropy = found.entropy
    return rows.predicting(found.log_probs), None if entropy is None else rows.predicting(entropy)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model without PEFT's wrapper, if it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


# -- adapters over one base --------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While the body runs, nothing of the model is dropped out."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def active(model: PreTrainedModel, adapter: str | None) -> Iterator[None]:
    """While the body runs, `model` is what this adapter makes of it; what is trainable stays so.

    PEFT's own switch freezes the adapter it leaves, and with it whatever is to be trained besides the active one.

    Args:
        adapter: None leaves the model as it is.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)] if adapter else []
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [str(adapter)]
    try:
        yield
    finally:
        for layer, name in zip(layers, before, strict=True):
            layer._active_adapter = name


@contextmanager
def merged(model: PreTrainedModel) -> Iterator[None]:
    """While the body runs, the active adapter is part of the weights beneath, which generation reads fastest.

    Only where that is exact to float error and worth it: on a processor, with weights in float32. Bit for bit the
    same weights stand there again afterwards.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    if any(weight.dtype != torch.float32 or weight.device.type != "cpu" for weight in weights):
        yield
        return
    before = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.clone()
    for layer in layers:
        layer.merge(adapter_names=layer.active_adapters)
    try:
        yield
    finally:
        for layer, weight, data in zip(layers, weights, before, strict=True):
            weight.data = data
            layer.merged_adapters.clear()


def add_adapter(model: PeftModel, name: str, source: Path | str) -> None:
    """Add an adapter to a causal model under a name, frozen.

    Args:
        source: a directory PEFT wrote, also one of a sequence classifier over the same base; or the name of an
            adapter the model has, which is copied.
    """
    if isinstance(source, str):
        config, weights = model.peft_config[source], _weights(model, source)
    else:
        config, weights = LoraConfig.from_pretrained(source), load_peft_weights(str(source), device="cpu")
    kept = {key: value for key, value in config.to_dict().items() if key not in ("task_type", "modules_to_save")}
    model.add_adapter(name, LoraConfig(**{**kept, "task_type": "CAUSAL_LM"}))
    load_adapter(model, name, {key: value for key, value in weights.items() if "lora_" in key})
    for parameter in adapter_parameters(model, name):
        parameter.requires_grad_(False)


def load_adapter(model: PeftModel, name: str, weights: dict[str, Tensor]) -> None:
    """Set an adapter's weights.

    Raises:
        ValueError: some of them have no place in the model, or some are missing.
    """
    result = set_peft_model_state_dict(model, weights, adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if result.unexpected_keys or missing:
        raise ValueError(f"the adapter '{name}' does not fit: {[*result.unexpected_keys, *missing][:3]}")


def _weights(model: PeftModel, name: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return {key: value.detach().clone() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}


def adapter_parameters(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The weights of one adapter."""
    return [parameter for key, parameter in model.named_parameters() if f".{name}." in key]


class Scorer:
    """A decoder with one number per position for a head: a reward model, or a critic.

    Args:
        model: a causal model or a sequence classifier, with or without adapters.
        adapter: the one of its adapters that belongs to the scorer; None for a model of its own.
        head: hidden → 1.
    """

    def __init__(self, model: PreTrainedModel, adapter: str | None, head: nn.Linear) -> None:
        self.model, self.adapter, self.head = model, adapter, head
        self.decoder = getattr(plain(model), plain(model).base_model_prefix)

    def states(self, rows: Rows) -> Tensor:
        """(B, L, hidden) after every token."""
        with active(self.model, self.adapter):
            return self.decoder(input_ids=rows.ids, attention_mask=rows.mask, use_cache=False).last_hidden_state

    def values(self, rows: Rows) -> Tensor:
        """(B, T) before each token of the completions, 0 where there is none."""
        states = rows.predicting(self.states(rows)[:, :-1])
        return self.head(states.to(self.head.weight.dtype)).squeeze(-1) * rows.completion_mask

    def scores(self, rows: Rows, pad: int) -> Tensor:
        """(B,) at the last token of each row that is not `pad`, where sequence classifiers read.

        Where the end of an answer and padding are one token, that is the token before the end.
        """
        states = self.states(rows)
        place = torch.arange(states.shape[1], device=states.device)
        last = states[torch.arange(len(states), device=states.device), (place * (rows.ids != pad)).argmax(1)]
        return self.head(last.to(self.head.weight.dtype)).squeeze(-1)

    def parameters(self) -> list[nn.Parameter]:
        """All that is the scorer's own."""
        own = adapter_parameters(self.model, self.adapter) if self.adapter else list(self.decoder.parameters())
        return [*own, *self.head.parameters()]

    def train(self) -> None:
        """Make its weights trainable."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)


def linear_head(weight: Tensor) -> nn.Linear:
    """A head of (1, hidden) `weight` and a bias of 0."""
    head = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
    return head
