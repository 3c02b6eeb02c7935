"""What sections of a recipe have in common: they are frozen, refuse unknown keys, and check what TRL is given."""

from __future__ import annotations

from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from steps.errors import did_you_mean
from steps.trainer_fields import DPO_LOSSES, ON_GROUPS, SMOOTHED, fields_of, owned_of

USUAL: dict[str, Any] = {}  # settings of TRL where a recipe names none; each section gets a copy


class Section(BaseModel):
    """A part of a recipe: immutable, and no key that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def checked_trainer(kind: str) -> AfterValidator:
    """What refuses, in a section's `trainer`, what is no field of TRL's configuration or is not the recipe's to say.

    Args:
        kind: a key of `steps.trainer_fields.CONFIGS`.
    """

    def check(trainer: dict[str, Any]) -> dict[str, Any]:
        problems, owned = [], owned_of(kind)
        for key in trainer:
            if key in owned:
                problems.append(f"{key}: decided by prefloop ({owned[key]})")
            elif key not in fields_of(kind):
                problems.append(f"{key}: not a field of TRL's configuration, {did_you_mean(key, fields_of(kind))}")
        smoothing = trainer.get("label_smoothing", 0)
        if kind in ("cdpo", "robust") and not (isinstance(smoothing, int | float) and 0 <= smoothing < 0.5):
            problems.append("label_smoothing: a share of wrong labels, from 0 to below 0.5")
        losses = trainer.get("loss_type", []) if kind == "dpo" else []
        losses = [losses] if isinstance(losses, str) else losses
        for loss in losses:
            if loss not in DPO_LOSSES:
                problems.append(f"loss_type: TRL has no '{loss}', {did_you_mean(str(loss), DPO_LOSSES)}")
        if kind == "dpo" and smoothing and set(SMOOTHED).isdisjoint(losses):
            problems.append(f"label_smoothing: of `loss_type` only {', '.join(SMOOTHED)} have it; or set method: cdpo")
        answers = trainer.get("num_generations", 2)
        if kind in ON_GROUPS and (not isinstance(answers, int) or answers < 2):
            problems.append(f"num_generations: answers to a prompt are held against each other, from 2; got {answers}")
        if problems:
            raise ValueError("; ".join(problems))
        return trainer

    return AfterValidator(check)


class Pairs(Section):
    """Which human comparisons a step learns from, and how many it is measured on."""

    pairs: int | None = Field(None, ge=1, description="Training pairs; all when not given.")
    min_margin: float = Field(0.0, ge=0, description="Least margin of a training pair that has one.")
    max_chars: int | None = Field(
        None, ge=1, description="Longest answer in a training pair: short ones cost less to learn from."
    )
    held_out: int = Field(400, ge=1, description="Held-out pairs, drawn without regard to their margin.")
