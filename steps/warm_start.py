"""Training that begins at another policy than its reference."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel, load_peft_weights
from transformers import PreTrainedModel

from steps.backbone import load_adapter
from steps.errors import ModelError
from steps.models import ADAPTER, is_whole_model, load_policy

SHAPE = ("r", "lora_alpha", "target_modules", "layers_to_transform", "rank_pattern", "alpha_pattern", "use_rslora")


def begin_at(policy: PreTrainedModel, start: Path | None, base: Path, dtype: str) -> None:
    """Give a policy the weights of another one.

    To be called when all that is made of the reference has been made: its log-probabilities, its adapter, its copy.

    Args:
        start: what a run left: a folder that holds `adapter`. None leaves the policy as it is.

    Raises:
        ModelError: the two have not the same weights to train.
    """
    if start is None:
        return
    weights = start / ADAPTER
    if is_whole_model(weights) != (not isinstance(policy, PeftModel)):
        kinds = ("an adapter", "a whole model")
        raise _misfit(weights, f"{kinds[is_whole_model(weights)]}, and the recipe trains the other kind")
    if not isinstance(policy, PeftModel):
        policy.load_state_dict(load_policy(base, dtype, weights, trainable=True).state_dict())
        return
    ours, theirs = policy.peft_config["default"], LoraConfig.from_pretrained(str(weights))
    different = [
        f"{name} {getattr(theirs, name)}, the recipe's {getattr(ours, name)}"
        for name in SHAPE
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if different:
        raise _misfit(weights, "; ".join(different))
    load_adapter(policy, "default", load_peft_weights(str(weights), device="cpu"))


def _misfit(weights: Path, have: str) -> ModelError:
    return ModelError(
        "training cannot begin at the champion: its weights are of another shape",
        where=str(weights),
        have=have,
        then="give model.lora the champion's values, or set policy.start=sft",
    )
