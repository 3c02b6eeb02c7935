"""Loading models: a frozen base, and adapters over it. Never pickles, never code from a model's repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, load_peft_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from steps.base import base_id
from steps.errors import ModelError

if TYPE_CHECKING:
    from steps.config import Lora

ADAPTER = "adapter"
SETS = ("target_modules", "modules_to_save", "exclude_modules")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype models compute in. `auto` is bfloat16 where the processor computes in it, float32 elsewhere.

    Weights kept in 4 bits (`nf4`) are computed with as `auto` has it.
    """
    if name not in ("auto", "nf4"):
        return getattr(torch, name)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(base: Path, dtype: str, adapter: Path | None = None, *, trainable: bool = False) -> PreTrainedModel:
    """A causal language model, with an adapter over it where one is given.

    Raises:
        ModelError: the weights cannot be read.
    """
    model = _load(AutoModelForCausalLM, base, dtype)
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)


def load_reward_model(base: Path, dtype: str, adapter: Path | None = None) -> PreTrainedModel:
    """A model with one number per sequence for a head; a fresh head when no adapter is given."""
    model = _load(AutoModelForSequenceClassification, base, dtype, num_labels=1)
    model.config.get_text_config().pad_token_id = load_tokenizer(base).pad_token_id
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter))


def four_bits(compute: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat with doubly quantised constants (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, §3)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _load(kind: Any, base: Path, dtype: str, **options: Any) -> PreTrainedModel:
    if dtype == "nf4":
        options["quantization_config"] = four_bits(torch_dtype(dtype))
    try:
        return kind.from_pretrained(base, dtype=torch_dtype(dtype), use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            "the base model cannot be loaded",
            where=str(base),
            have=str(error).strip().splitlines()[0],
            then="remove that folder and run again, or set model.base to another model",
        ) from error


def lora_config(lora: Lora, base: Path, task: str) -> LoraConfig:
    """Adapters for the layers a recipe names.

    Args:
        task: `CAUSAL_LM`, or `SEQ_CLS` for a model whose head is trained and kept with the adapter.

    Raises:
        ModelError: more layers than the model has.
    """
    layers = AutoConfig.from_pretrained(base).get_text_config().num_hidden_layers
    top = lora.top_layers
    if top is not None and top > layers:
        raise ModelError(f"the model has {layers} layers", where="model.lora.top_layers", have=str(top))
    return LoraConfig(
        task_type=task,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        layers_to_transform=list(range(layers - top, layers)) if top else None,
        base_model_name_or_path=base_id(base),
    )


def score_head(adapter: Path) -> torch.Tensor:
    """(1, hidden) weight of the head a reward model's adapter was saved with.

    Raises:
        ModelError: the adapter has none.
    """
    weights = load_peft_weights(str(adapter), device="cpu")
    heads = [value for name, value in weights.items() if name.endswith("score.weight")]
    if len(heads) != 1:
        raise ModelError("this is not a reward model's adapter", where=str(adapter), have=f"{len(heads)} score heads")
    return heads[0]


def frozen_depth(config: LoraConfig, layers: int) -> int:
    """How many layers, from below, an adapter leaves alone."""
    adapted = config.layers_to_transform
    return min(adapted) if isinstance(adapted, list) and len(adapted) < layers else 0


def save_adapter(model: PeftModel, base: Path, out: Path) -> Path:
    """Write the trained adapter into `out/adapter`: weights and configuration, no path of this machine."""
    folder = out / ADAPTER
    model.peft_config["default"].base_model_name_or_path = base_id(base)
    model.save_pretrained(folder, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)
    settings = folder / "adapter_config.json"
    written = json.loads(settings.read_text(encoding="utf-8"))
    # PEFT writes its sets in the order of this process's string hashes.
    written = {name: sorted(value) if name in SETS and value else value for name, value in written.items()}
    settings.write_text(json.dumps(written, indent=1, sort_keys=True), encoding="utf-8")
    return folder
