"""Log-probabilities of labelled tokens: TRL's fused LM head against ours, on this processor.

`python -m benchmarks.lm_head`: 16 rows of 40 tokens, half of them labelled, vocabulary 49,152, hidden 576.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from steps.lm_head import add_labelled_lm_head

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


def seconds(work: Callable[[], None], repeats: int = 5) -> float:
    """Median wall-clock seconds, after one run that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def smollm2_config(layers: int) -> LlamaConfig:
    """The shape of SmolLM2-135M with some number of its 30 layers."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )


def main() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 49152, (16, 40))
    labels = ids.clone()
    labels[:, :20] = -100
    found = {}
    for name, add in (("TRL", add_fused_lm_head), ("labelled", add_labelled_lm_head)):
        model = LlamaForCausalLM(smollm2_config(1)).bfloat16()
        model.get_output_embeddings().requires_grad_(False)
        add(model, outputs=OUTPUTS)

        def step(model=model) -> None:
            model(input_ids=ids, labels=labels, fused_lm_head=True).loss.backward()
            model.zero_grad()

        found[name] = seconds(step)
        print(f"{name:<9} {found[name]:.3f} s a step")
    print(f"ratio     {found['TRL'] / found['labelled']:.1f}")


if __name__ == "__main__":
    main()
