"""KL of a policy to its start: nought for itself, the closed form on a toy, and three estimates that agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from steps.divergence import divergence
from steps.models import load_policy
from steps.sampling import draw_tokens, uniforms_of

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def start(base: Path) -> PreTrainedModel:
    return load_policy(base, "float32").eval()


@pytest.fixture(scope="module")
def policy(base: Path) -> PreTrainedModel:
    model = load_policy(base, "float32").eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def answers(model: PreTrainedModel, count: int, length: int, temperature: float) -> tuple[list, list]:
    asked = PROMPTS * (count // 2)
    drawn = draw_tokens(model, asked, uniforms_of(0, 0, count, length), temperature, [1], 0)
    return asked, drawn


def test_a_model_is_nowhere_from_itself(start: PreTrainedModel) -> None:
    found = divergence(start, start, *answers(start, 8, 6, 1.0), 1.0, 0)
    assert found.answers == 8
    assert (found.k1, found.error, found.k3, found.full) == pytest.approx((0, 0, 0, 0), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_one_token_is_the_closed_form(policy: PreTrainedModel, start: PreTrainedModel, temperature: float) -> None:
    """Σ π log π/ρ over the vocabulary, which needs no draw."""
    with torch.no_grad():
        logits = [[model(torch.tensor([p])).logits[0, -1] / temperature for p in PROMPTS] for model in (policy, start)]
    expected = [
        float((ours.softmax(-1) * (ours.log_softmax(-1) - theirs.log_softmax(-1))).sum())
        for ours, theirs in zip(*logits, strict=True)
    ]
    found = divergence(policy, start, *answers(policy, 64, 1, temperature), temperature, 0)
    assert found.full == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_the_estimates_agree_and_the_full_one_has_the_least_noise(
    policy: PreTrainedModel, start: PreTrainedModel
) -> None:
    found = divergence(policy, start, *answers(policy, 512, 5, 1.0), 1.0, 0)
    assert found.full > 0
    assert abs(found.k1 - found.full) < 4 * found.error
    assert abs(found.k3 - found.full) < 4 * found.error
    parts = [
        divergence(policy, start, *(x[i : i + 64] for x in answers(policy, 512, 5, 1.0)), 1.0, 0)
        for i in range(0, 512, 64)
    ]
    spread = {name: torch.tensor([getattr(part, name) for part in parts]).std() for name in ("k1", "full")}
    assert spread["full"] < spread["k1"]


def test_padding_and_batches_do_not_matter(policy: PreTrainedModel, start: PreTrainedModel) -> None:
    asked, drawn = answers(policy, 16, 8, 1.0)
    together, apart = (divergence(policy, start, asked, drawn, 1.0, 0, batch=batch) for batch in (16, 1))
    assert together.full == pytest.approx(apart.full, rel=1e-4)
    assert together.k3 == pytest.approx(apart.k3, rel=1e-4)


def test_an_empty_answer_is_left_out(policy: PreTrainedModel, start: PreTrainedModel) -> None:
    assert divergence(policy, start, PROMPTS, [[4, 1], []], 1.0, 0).answers == 1
    assert divergence(policy, start, PROMPTS, [[], []], 1.0, 0).answers == 0
