"""Remembered layers: the same numbers with less work, and no memory where it would be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from steps.config import Lora
from steps.frozen_layers import FrozenLayers, remember_frozen_layers
from steps.models import frozen_depth, load_policy, load_reward_model, lora_config

LORA = Lora(r=4, alpha=8, target_modules=("q_proj", "v_proj"), top_layers=1)
HIDDEN = 16


def adapted(base: Path, lora: Lora = LORA) -> PeftModel:
    """The tiny model with an adapter over its upper layer that is not the identity."""
    torch.manual_seed(0)
    model = get_peft_model(load_policy(base, "float32"), lora_config(lora, base, "CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model


def rows(count: int = 4, length: int = 9, seed: int = 0, pad: str = "right") -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 258, (count, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, count):
        place = slice(length - row, None) if pad == "right" else slice(0, row)
        ids[row, place], mask[row, place] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def forward(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    """Logits where there is a token; what stands at padding is nobody's business."""
    logits = model(**inputs, **{"use_cache": False, **options}).logits
    return logits * inputs["attention_mask"][..., None]


def gradients(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    forward(model, inputs).log_softmax(-1)[..., 5].sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_logits_and_gradients_are_those_of_a_model_without_memory(base: Path) -> None:
    plain, remembering = adapted(base), adapted(base)
    memory = remember_frozen_layers(remembering, 1)
    assert memory is not None
    for seed in (0, 1, 0, 1):
        inputs = rows(seed=seed)
        torch.testing.assert_close(forward(remembering, inputs), forward(plain, inputs), atol=1e-6, rtol=1e-5)
        ours, theirs = gradients(remembering, inputs), gradients(plain, inputs)
        assert ours.keys() == theirs.keys()
        assert any(gradient.abs().max() > 1e-3 for gradient in ours.values())
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)
    assert memory.hits > 0


def test_the_second_pass_is_remembered(base: Path) -> None:
    model = adapted(base)
    memory = remember_frozen_layers(model, 1)
    forward(model, rows())
    assert memory.hits == 0
    assert len(memory.kept) == 4
    forward(model, rows())
    assert memory.hits == 4
    assert len(memory.kept) == 4


def test_remembered_rows_do_not_run_the_frozen_layers(base: Path) -> None:
    model, ran = adapted(base), []
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    remember_frozen_layers(model, 1)
    for _ in range(3):
        forward(model, rows())
    assert len(ran) == 1


def test_rows_are_remembered_whatever_batch_they_come_in(base: Path) -> None:
    """Row 2 alone, and longer padding, find what the batch of four left."""
    model, plain = adapted(base), adapted(base)
    memory = remember_frozen_layers(model, 1)
    inputs = rows()
    forward(model, inputs)
    alone = {name: value[2:3, :7] for name, value in inputs.items()}
    padded = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in inputs.items()}
    for again in (alone, padded, {name: value.flip(0) for name, value in inputs.items()}):
        before = memory.hits
        torch.testing.assert_close(forward(model, again), forward(plain, again), atol=1e-6, rtol=1e-5)
        assert memory.hits == before + len(again["input_ids"])


def test_a_batch_with_one_new_row_is_computed_whole_and_rightly(base: Path) -> None:
    model, plain = adapted(base), adapted(base)
    memory = remember_frozen_layers(model, 1)
    forward(model, rows())
    mixed = {name: torch.cat([old, rows(seed=1)[name]]) for name, old in rows().items()}
    torch.testing.assert_close(forward(model, mixed), forward(plain, mixed), atol=1e-6, rtol=1e-5)
    assert memory.hits == 0
    assert len(memory.kept) == 8


def test_rows_padded_on_the_left_are_not_remembered(base: Path) -> None:
    model, plain = adapted(base), adapted(base)
    memory = remember_frozen_layers(model, 1)
    inputs = rows(pad="left")
    for _ in range(2):
        torch.testing.assert_close(forward(model, inputs), forward(plain, inputs), atol=1e-6, rtol=1e-5)
    assert memory.hits == 0
    assert not memory.kept


@pytest.mark.parametrize("way", ["cache", "positions"])
def test_a_forward_with_a_cache_or_positions_of_its_own_is_not_remembered(base: Path, way: str) -> None:
    model, plain = adapted(base), adapted(base)
    memory = remember_frozen_layers(model, 1)
    inputs = rows(count=1)
    options = {"use_cache": True} if way == "cache" else {"position_ids": torch.arange(9)[None] + 3}
    for _ in range(2):
        torch.testing.assert_close(forward(model, inputs, **options), forward(plain, inputs, **options))
    assert memory.hits == 0
    assert not memory.kept


def test_generating_with_a_memory_gives_the_same_tokens(base: Path) -> None:
    model, plain = adapted(base).eval(), adapted(base).eval()
    remember_frozen_layers(model, 1)
    inputs = rows(pad="left")
    forward(model, rows())
    made, expected = (m.generate(**inputs, max_new_tokens=5, do_sample=False) for m in (model, plain))
    assert torch.equal(made, expected)


def test_the_memory_keeps_to_its_limit(base: Path) -> None:
    """Rows of 9, 8, 7 and 6 tokens of 16 floats are 576, 512, 448 and 384 bytes; 1100 hold the first two."""
    model, plain = adapted(base), adapted(base)
    memory = FrozenLayers(model.get_base_model().model, 1, limit=1100)
    for _ in range(2):
        torch.testing.assert_close(forward(model, rows()), forward(plain, rows()), atol=1e-6, rtol=1e-5)
    assert memory.size == 4 * HIDDEN * (9 + 8)
    assert sum(states.numel() * states.element_size() for states in memory.kept.values()) == memory.size
    assert memory.hits == 0
    two = {name: value[:2] for name, value in rows().items()}
    forward(model, two)
    assert memory.hits == 2


def test_a_sequence_classifier_remembers_too(base: Path) -> None:
    plain, model = load_reward_model(base, "float32"), load_reward_model(base, "float32")
    model.score.load_state_dict(plain.score.state_dict())
    memory = remember_frozen_layers(model, 1)
    for _ in range(2):
        expected = plain(**rows(), use_cache=False).logits
        torch.testing.assert_close(model(**rows(), use_cache=False).logits, expected, atol=1e-6, rtol=1e-5)
    assert memory.hits == 4


@pytest.mark.parametrize("name", ["attention_dropout", "hidden_dropout", "resid_pdrop"])
def test_a_model_with_dropout_is_left_alone(base: Path, name: str) -> None:
    model = load_policy(base, "float32")
    setattr(model.config, name, 0.1)
    assert remember_frozen_layers(model, 1) is None


def test_nothing_frozen_is_nothing_to_remember(base: Path) -> None:
    assert remember_frozen_layers(load_policy(base, "float32"), 0) is None


def test_a_model_that_has_no_layers_by_that_name_is_left_alone() -> None:
    settings = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    assert remember_frozen_layers(GPT2LMHeadModel(settings), 1) is None


@pytest.mark.parametrize(("top", "depth"), [(1, 1), (2, 0), (None, 0)])
def test_the_frozen_depth_is_what_lies_below_the_lowest_adapter(base: Path, top: int | None, depth: int) -> None:
    config = lora_config(LORA.model_copy(update={"top_layers": top}), base, "CAUSAL_LM")
    assert frozen_depth(config, AutoModelForCausalLM.from_pretrained(base).config.num_hidden_layers) == depth


def test_what_is_kept_is_not_forgotten(base: Path) -> None:
    model = adapted(base)
    memory = remember_frozen_layers(model, 1)
    forward(model, rows())
    memory.keep()
    kept, size = dict(memory.kept), memory.size
    forward(model, rows(seed=1))
    assert len(memory.kept) == 8
    memory.forget()
    assert memory.kept == kept
    assert memory.size == size
    forward(model, rows())
    assert memory.hits == 4
