"""What four bits save: memory of the weights, and the peak of one step of DPO, in float32 and in NF4.

`python -m benchmarks.quantised_memory`: a llama of random weights and some 60 MB, made in code, as the recipe
`ultrafeedback-qlora` has its base (NF4 by bitsandbytes, constants quantised too, adapters over every linear layer), 4
pairs of 256 tokens. Float32 is measured with the same adapters (LoRA), and with every weight trained. Each runs in a
process of its own, on CPU with one thread. Weights are counted tensor by tensor; the peak is what the step adds to the
process's resident memory at most, the model's own aside, sampled every millisecond.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

KINDS = {"float32, all weights": "full", "float32 + LoRA": "float32", "NF4 + LoRA (QLoRA)": "nf4"}
PAIRS, TOKENS = 4, 256
MIB = 2**20


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """The largest resident memory while it runs, sampled by a thread."""

    def __enter__(self) -> Peak:
        self.start = self.most = resident()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.001):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    @property
    def rise(self) -> int:
        return self.most - self.start


def save_model(folder: Path) -> None:
    """A llama of 15.4 million weights, 12.8 million of them in linear layers that are quantised."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 5000}
    config = LlamaConfig(**size, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)


def measured(kind: str, folder: Path) -> dict[str, float]:
    """Bytes of the weights, of what is trained, and the rise of memory over one step; seconds of the step."""
    import torch
    from peft import LoraConfig, get_peft_model

    from steps.config import Lora
    from steps.models import load_policy

    torch.manual_seed(0)
    libc = ctypes.CDLL("libc.so.6")
    model = load_policy(folder, "nf4" if kind == "nf4" else "float32")
    if kind != "full":
        lora = Lora(r=16, alpha=32)  # type: ignore[call-arg]
        targets = list(lora.target_modules)
        model = get_peft_model(model, LoraConfig("CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, target_modules=targets))
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    for module in model.modules():  # constants of quantised weights are no parameters
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            inner = (state.absmax, state.state2.absmax) if state.nested else (state.absmax,)
            weights += sum(one.numel() * one.element_size() for one in inner)
    trained = [one for one in model.parameters() if one.requires_grad]
    ids = torch.randint(0, 5000, (2 * PAIRS, TOKENS))
    libc.malloc_trim(0)
    with Peak() as peak:
        began = time.perf_counter()
        optimizer = torch.optim.AdamW(trained)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        likely = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).sum((1, 2))
        chosen, rejected = likely.chunk(2)  # against a reference of which all differences are 0
        loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - began
    return {"weights": weights, "trained": sum(one.numel() for one in trained), "rise": peak.rise, "seconds": seconds}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--kind", help=argparse.SUPPRESS)
    asked.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.kind:
        print(json.dumps(measured(given.kind, given.model)))
        return
    settings = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    # Freed blocks go back at once, so that resident memory is what is in use.
    settings |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print(f"{'':22}{'weights':>10}{'trained':>12}{'step adds':>11}{'both':>9}{'step':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        save_model(Path(scratch))
        for name, kind in KINDS.items():
            command = [sys.executable, "-m", "benchmarks.quantised_memory", "--kind", kind, "--model", scratch]
            said = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True)
            found = json.loads(said.stdout.splitlines()[-1])
            weights, rise = (found[part] / MIB for part in ("weights", "rise"))
            print(
                f"{name:22}{weights:6.1f} MiB{found['trained']:12,}{rise:7.0f} MiB{weights + rise:5.0f} MiB"
                f"{found['seconds']:6.2f} s"
            )


if __name__ == "__main__":
    main()
