"""Remembered layers: the same numbers with less work, and no memory where it would be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from steps.backbone import Rows, merged
from steps.config import Lora
from steps.frozen_layers import FrozenLayers, remember_frozen_layers
from steps.models import frozen_depth, load_policy, load_reward_model, lora_config
from steps.sampling import draw_tokens, uniforms_of

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


def test_rows_among_new_ones_are_not_computed_again(base: Path) -> None:
    plain, remembering = adapted(base), adapted(base)
    memory = remember_frozen_layers(remembering, 1)
    assert memory is not None
    some, more = rows(count=2, seed=0), rows(count=3, seed=1)
    mixed = {name: torch.cat([more[name][:1], some[name], more[name][1:]]) for name in some}
    forward(remembering, some)
    torch.testing.assert_close(forward(remembering, mixed), forward(plain, mixed), atol=1e-6, rtol=1e-5)
    assert memory.hits == 2
    assert len(memory.kept) == 5


def test_what_was_drawn_needs_no_forward_of_its_own(base: Path) -> None:
    plain, remembering = adapted(base), adapted(base)
    memory = remember_frozen_layers(remembering, 1)
    assert memory is not None
    prompts, pad = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], 0
    with memory.drawing():
        drawn = draw_tokens(remembering, prompts, uniforms_of(0, 0, 3, 7), 1.0, [1], pad)
        fed = [row[:6] for row in drawn]  # the last one drawn was not fed
        whole = [[*p, *c] for p, c in zip(prompts, fed, strict=True)]
        memory.take(whole, 4, [3, 2, 4])
    assert len(memory.kept) == 3
    packed = Rows.of(prompts, fed, pad)
    inputs = {"input_ids": packed.ids, "attention_mask": packed.mask}
    torch.testing.assert_close(forward(remembering, inputs), forward(plain, inputs), atol=1e-5, rtol=1e-4)
    assert memory.hits == 3


def test_a_row_whose_end_was_not_fed_is_not_remembered(base: Path) -> None:
    model = adapted(base)
    memory = remember_frozen_layers(model, 1)
    assert memory is not None
    with memory.drawing():
        drawn = draw_tokens(model, [[5, 6, 7], [8, 9]], uniforms_of(0, 0, 2, 4), 1.0, [], 0)
        memory.take([[5, 6, 7, *drawn[0]], [8, 9, *drawn[1][:3]]], 3, [3, 2])
    assert [len(row) // 8 for row in memory.kept] == [5]


def test_merged_is_the_same_model_and_leaves_every_bit_as_it_was(base: Path) -> None:
    model = adapted(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = rows()
    apart = forward(model, inputs)
    with merged(model):
        torch.testing.assert_close(forward(model, inputs), apart, atol=1e-5, rtol=1e-4)
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert changed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(forward(model, inputs), apart)
