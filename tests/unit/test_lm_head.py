"""The labelled LM head against TRL's own, number by number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from trl.trainer import dpo_trainer, sft_trainer
from trl.trainer.utils import add_fused_lm_head

from steps import lm_head
from steps.lm_head import add_labelled_lm_head, labelled_lm_head, token_statistics
from steps.models import load_policy

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def batch(rows: int = 4, length: int = 11) -> dict[str, torch.Tensor]:
    """Rows padded on the right, their first tokens unlabelled as a prompt is."""
    ids = torch.randint(2, 258, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 2 + row] = -100
        if row:
            ids[row, -row:], mask[row, -row:], labels[row, -row:] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def both(base: Path, inputs: dict[str, Any], set_up=lambda model: None, fused: bool = True, **settings) -> list:
    """(output, gradients) of TRL's head and of ours."""
    found = []
    for add in (add_fused_lm_head, add_labelled_lm_head):
        model = load_policy(base, "float32")
        set_up(model)
        add(model, **settings)
        output = model(**inputs, fused_lm_head=fused)
        output.loss.backward()
        found.append((output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    return found


def assert_same(found: list, outputs: tuple[str, ...] = OUTPUTS) -> None:
    (theirs, their_gradients), (ours, our_gradients) = found
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    for name in outputs:
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype, name
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-5, rtol=1e-5, msg=name)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert our_gradients.keys() == their_gradients.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in our_gradients.values())
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"cast_lm_head_to_fp32": True},
    ],
)
def test_everything_and_the_gradients_equal_those_of_trl(base: Path, settings: dict[str, Any]) -> None:
    assert_same(both(base, batch(), outputs=OUTPUTS, **settings))


def test_a_given_number_of_tokens_divides_the_loss(base: Path) -> None:
    found = both(base, {**batch(), "num_items_in_batch": 100}, outputs=OUTPUTS)
    assert_same(found)
    labelled = int(found[1][0].label_mask.sum())
    (_, _), (plain, _) = both(base, batch(), outputs=OUTPUTS)
    assert found[1][0].loss.item() == pytest.approx(plain.loss.item() * labelled / 100, rel=1e-5)


def test_more_labels_than_are_projected_at_once_change_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "_ROWS", 5)
    assert_same(both(base, batch(), outputs=OUTPUTS))


def test_a_batch_without_a_label_has_no_loss_and_still_a_gradient(base: Path) -> None:
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    (theirs, _), (ours, gradients) = both(base, inputs)
    assert ours.loss.item() == theirs.loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_fields_that_are_not_asked_for_are_absent(base: Path) -> None:
    (theirs, _), (ours, _) = both(base, batch(), outputs=("entropy",))
    assert {name for name in OUTPUTS if getattr(ours, name) is None} == {"mean_logits", "is_top1"}
    assert {name for name in OUTPUTS if getattr(theirs, name) is None} == {"mean_logits", "is_top1"}


@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": 100}])
def test_the_plain_forward_is_left_as_it_was(base: Path, extra: dict[str, Any]) -> None:
    (theirs, _), (ours, _) = both(base, {**batch(), **extra}, fused=False)
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("final_logit_softcapping", 5.0),
        ("logit_scale", 0.5),
        ("logits_scaling", 4.0),
        ("output_multiplier", 0.5),
        ("lm_head_multiplier", 0.5),
    ],
)
def test_a_model_that_scales_its_logits_is_scored_as_trl_scores_it(base: Path, name: str, value: float) -> None:
    def scale(model: Any) -> None:
        setattr(model.config, name, value)

    assert_same(both(base, batch(), scale, outputs=OUTPUTS))


def test_a_mixture_of_experts_keeps_the_loss_of_its_router() -> None:
    settings = MixtralConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    losses = []
    for add in (add_fused_lm_head, add_labelled_lm_head):
        torch.manual_seed(0)
        model = MixtralForCausalLM(settings)
        add(model)
        output = model(**batch(), fused_lm_head=True)
        losses.append((output.loss.item(), None if output.aux_loss is None else output.aux_loss.item()))
    assert losses[1] == pytest.approx(losses[0])


def test_what_only_trl_computes_is_left_to_trl(base: Path) -> None:
    (theirs, _), (ours, _) = both(base, batch(), outputs=("log_probs", "log_sum_sq_probs"))
    torch.testing.assert_close(ours.log_sum_sq_probs, theirs.log_sum_sq_probs)


@pytest.mark.parametrize("size", [2, 258, 49_152])
def test_uniform_logits_have_the_entropy_of_their_number(size: int) -> None:
    """Entropy ln V, log-probability −ln V, and the mean of equal logits is the logit."""
    found = token_statistics(torch.full((3, size), 2.5), torch.tensor([0, 1, size - 1]), OUTPUTS)
    assert found["entropy"].tolist() == pytest.approx([math.log(size)] * 3, rel=1e-5)
    assert found["log_probs"].tolist() == pytest.approx([-math.log(size)] * 3, rel=1e-5)
    assert found["mean_logits"].tolist() == [2.5] * 3


def test_two_logits_by_hand() -> None:
    """Logits 0 and ln 3 are probabilities 1/4 and 3/4: entropy ln 4 − ¾ ln 3."""
    found = token_statistics(torch.tensor([[0.0, math.log(3)]] * 2), torch.tensor([0, 1]), OUTPUTS)
    assert found["log_probs"].tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)])
    assert found["entropy"].tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3)] * 2)
    assert found["is_top1"].tolist() == [False, True]


def test_only_the_log_probability_has_a_gradient() -> None:
    found = token_statistics(torch.randn(2, 5, requires_grad=True), torch.tensor([0, 1]), OUTPUTS)
    assert [name for name in OUTPUTS if found[name].requires_grad] == ["log_probs"]


def test_trl_has_its_own_head_back_afterwards_whatever_happens() -> None:
    with pytest.raises(ZeroDivisionError), labelled_lm_head(dpo_trainer, sft_trainer):
        assert dpo_trainer.add_fused_lm_head is sft_trainer.add_fused_lm_head is add_labelled_lm_head
        _ = 1 / 0
    assert dpo_trainer.add_fused_lm_head is sft_trainer.add_fused_lm_head is add_fused_lm_head
