"""Sampling by inversion: the right distribution, the same numbers for everybody, and nothing a batch can change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steps.config import Evaluate
from steps.models import load_policy, load_tokenizer
from steps.sampling import InverseCdf, draw, only, sample, uniforms_of
from steps.tracking import NullTracker

PROMPTS = [f"{'rain and ' * (number % 4)}prompt {number}: " for number in range(16)]
JUST_BELOW_ONE = 1 - 2**-24


@pytest.fixture(scope="module")
def model(base: Path) -> PreTrainedModel:
    return load_policy(base, "float32").eval()


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(base)


def answer(model, tokenizer, prompts=PROMPTS, seed=0, **settings) -> tuple[list[str], list[int]]:
    config = Evaluate(**{"max_new_tokens": 12, "batch_size": 16, **settings})
    said = sample(model, tokenizer, prompts, config, seed, NullTracker(), "test")
    assert isinstance(said.lengths, np.ndarray)
    return said.texts, said.lengths.tolist()


# -- drawing one token -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_frequencies_are_the_probabilities(seed: int) -> None:
    """With u = (i + ½)/n each token's count is n·p to within 1, whatever p is."""
    n = 5000
    logits = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 2
    tokens = draw(logits.expand(n, -1), (torch.arange(n) + 0.5) / n)
    counts = tokens.bincount(minlength=40)
    assert (counts - n * logits.double().softmax(-1)).abs().max() <= 1.01


def test_tokens_stand_in_the_order_of_the_numbers() -> None:
    tokens = draw(torch.zeros(4, 4), torch.tensor([0.1, 0.3, 0.6, 0.9]))
    assert tokens.tolist() == [0, 1, 2, 3]


def test_a_number_on_a_border_belongs_to_the_token_above_it() -> None:
    assert draw(torch.zeros(3, 4), torch.tensor([0.25, 0.5, 0.75])).tolist() == [1, 2, 3]


def test_nought_draws_the_first_token_that_is_possible() -> None:
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.0, 1.0]])
    assert draw(logits, torch.zeros(1)).tolist() == [2]


@pytest.mark.parametrize("number", [0.0, 2**-24, 0.5, JUST_BELOW_ONE])
@pytest.mark.parametrize("vocabulary", [7, 1000, 49_152])
def test_an_impossible_token_is_never_drawn(number: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(64, vocabulary, generator=generator) * 4
    impossible = torch.rand(64, vocabulary, generator=generator) < 0.6
    impossible[:, 0] = impossible[:, -1] = True
    impossible[:, 3] = False
    logits[impossible] = -torch.inf
    tokens = draw(logits, torch.full((64,), number))
    assert not impossible.gather(1, tokens[:, None]).any()


def test_the_same_distribution_and_number_give_the_same_token() -> None:
    logits = torch.randn(32, 100, generator=torch.Generator().manual_seed(0))
    numbers = torch.rand(32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(logits, numbers), draw(logits.clone(), numbers))
    alone = [draw(logits[row : row + 1], numbers[row : row + 1]).item() for row in range(32)]
    assert draw(logits, numbers).tolist() == alone


def test_only_the_drawn_token_is_left() -> None:
    left = only(torch.tensor([2, 0]), torch.randn(2, 4))
    assert left.softmax(-1).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


def test_the_processor_takes_the_number_of_the_step_and_divides_by_the_temperature() -> None:
    """Two logits, 0 and ln 3: the second has probability 3/4, and at temperature ½ it has 9/10."""
    scores = torch.tensor([[0.0, float(np.log(3))]])
    numbers = torch.tensor([[0.2, 0.3]])
    for length, temperature, expected in ((5, 1.0, 0), (6, 1.0, 1), (5, 0.5, 1)):
        processed = InverseCdf(numbers, temperature, prompt_length=5)(torch.zeros(1, length), scores)
        assert processed.argmax(-1).item() == expected


# -- the numbers -------------------------------------------------------------------------------------------------


def test_the_numbers_belong_to_the_prompt_and_not_to_the_batch() -> None:
    everything = uniforms_of(3, 0, 8, 5)
    assert everything.shape == (8, 5)
    assert torch.equal(torch.cat([uniforms_of(3, 0, 3, 5), uniforms_of(3, 3, 5, 5)]), everything)


def test_the_numbers_of_prompts_and_seeds_differ() -> None:
    rows = torch.cat([uniforms_of(seed, 0, 50, 4) for seed in (0, 1)])
    assert len(rows.unique(dim=0)) == 100
    assert (rows >= 0).all()
    assert (rows < 1).all()


# -- whole answers -----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_answers_and_another_one_others(model, tokenizer) -> None:
    assert answer(model, tokenizer) == answer(model, tokenizer)
    assert answer(model, tokenizer, seed=1)[0] != answer(model, tokenizer)[0]


def test_an_answer_does_not_depend_on_the_batch_size(model, tokenizer) -> None:
    expected = answer(model, tokenizer)
    assert answer(model, tokenizer, batch_size=3) == expected
    assert answer(model, tokenizer, batch_size=1) == expected


def test_answers_are_those_of_a_plain_loop_and_lengths_leave_out_the_end(model, tokenizer) -> None:
    """The loop has no cache, no batch and no padding, and stops at the end token."""
    with torch.no_grad():  # make the end token likely, so that some answers end and some do not
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 12
    try:
        answers, lengths = answer(model, tokenizer, max_new_tokens=24)
        numbers = uniforms_of(0, 0, len(PROMPTS), 24)
        for row, prompt in enumerate(PROMPTS):
            ids, drawn = tokenizer(prompt, return_tensors="pt")["input_ids"], []
            for step in range(24):
                with torch.no_grad():
                    token = draw(model(ids, use_cache=False).logits[:, -1], numbers[row, step : step + 1])
                if token.item() == tokenizer.eos_token_id:
                    break
                drawn.append(token.item())
                ids = torch.cat([ids, token[None]], dim=1)
            assert lengths[row] == len(drawn)
            assert answers[row] == tokenizer.decode(drawn, skip_special_tokens=True).strip()
        assert min(lengths) < 24
        assert max(lengths) == 24
    finally:
        with torch.no_grad():
            model.get_output_embeddings().weight[tokenizer.eos_token_id] /= 12


def test_a_very_low_temperature_is_greedy(model, tokenizer) -> None:
    prompts = PROMPTS[:4]
    greedy, _ = answer(model, tokenizer, prompts, temperature=1e-6, max_new_tokens=6)
    for prompt, text in zip(prompts, greedy, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert text == tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_sampling_leaves_no_hook_on_the_model(model, tokenizer) -> None:
    answer(model, tokenizer, PROMPTS[:2], max_new_tokens=1)
    assert not model.get_output_embeddings()._forward_pre_hooks
