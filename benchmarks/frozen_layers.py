"""What remembering frozen layers saves: a training step on rows seen before, against one that computes them again.

`python -m benchmarks.frozen_layers`: 30 layers as in SmolLM2-135M, adapters on the upper 10, 16 rows of 32 tokens.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from benchmarks.lm_head import seconds, smollm2_config
from steps.frozen_layers import remember_frozen_layers


def main() -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], layers_to_transform=list(range(20, 30)))
    model = get_peft_model(LlamaForCausalLM(smollm2_config(30)).bfloat16(), lora)
    body = model.get_base_model().model
    ids = torch.randint(0, 49152, (16, 32))
    mask = torch.ones_like(ids)

    def step() -> None:
        body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float().square().mean().backward()
        model.zero_grad()

    again = seconds(step)
    memory = remember_frozen_layers(model, 20)
    assert memory is not None
    kept = seconds(step)
    print(f"computed again {again:.3f} s, remembered {kept:.3f} s, ratio {again / kept:.1f}")
    print(f"{memory.size / 2**20:.1f} MiB for {len(memory.kept)} rows")


if __name__ == "__main__":
    main()
