"""Answers at once against one at a time: `python -m benchmarks.sampling [PROMPTS]`, 40 unless said.

The model of `reviews` at random weights, 32 tokens an answer, no answer ends early; tokens a second, and their ratio.
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import LlamaForCausalLM

from benchmarks.lm_head import smollm2_config
from steps.models import torch_dtype
from steps.sampling import draw_tokens, uniforms_of

STEPS, WIDTH = 32, 8


def main(prompts: int) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(smollm2_config(30)).to(torch_dtype("auto")).eval()
    asked = torch.randint(10, 40_000, (prompts, WIDTH)).tolist()
    speeds = {}
    for batch in (1, prompts):
        start, drawn = time.perf_counter(), 0
        for first in range(0, prompts, batch):
            some = asked[first : first + batch]
            drawn += sum(map(len, draw_tokens(model, some, uniforms_of(0, first, len(some), STEPS), 1.0, [0], 0)))
        speeds[batch] = drawn / (time.perf_counter() - start)
        print(f"{batch:>4} at once: {speeds[batch]:7.1f} tokens a second")
    print(f"ratio {speeds[prompts] / speeds[1]:.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
