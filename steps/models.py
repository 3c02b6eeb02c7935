"""Loading models: adapters over a frozen base, or whole models. Never pickles, never code from a model's repository.

A step leaves what it trained in its folder `adapter`: an adapter, or where `model.lora` is null and every weight was
trained, a whole model with its tokenizer, which transformers loads by itself.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_FILE
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME
from transformers.utils import SAFE_WEIGHTS_NAME as WHOLE_FILE

from steps.base import base_id
from steps.errors import ModelError
from steps.training import CHECKPOINT_FILES

if TYPE_CHECKING:
    from steps.config import Lora

ADAPTER = "adapter"
MASTER = "float32"  # of weights that are trained themselves: bfloat16 loses updates below 1/256 of a weight
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


def is_whole_model(weights: Path) -> bool:
    """Whether a step's weights are a model of their own, and not an adapter over the base."""
    return (weights / CONFIG_NAME).is_file()


def load_policy(base: Path, dtype: str, weights: Path | None = None, *, trainable: bool = False) -> PreTrainedModel:
    """A causal language model: the base, an adapter over it, or what a whole model's training left.

    Args:
        dtype: of frozen weights; a whole model that is `trainable` comes in float32.
        weights: what a step left in its folder `adapter`; None for the base itself.

    Raises:
        ModelError: the weights cannot be read.
    """
    if weights is not None and is_whole_model(weights):
        return _load(AutoModelForCausalLM, weights, MASTER if trainable else dtype).requires_grad_(trainable)
    model = _load(AutoModelForCausalLM, base, dtype)
    return model if weights is None else PeftModel.from_pretrained(model, str(weights), is_trainable=trainable)


def load_reward_model(base: Path, dtype: str, weights: Path | None = None) -> PreTrainedModel:
    """A model with one number per sequence for a head; a fresh head when no weights of a step are given."""
    whole = weights is not None and is_whole_model(weights)
    model = _load(AutoModelForSequenceClassification, weights if whole else base, dtype, num_labels=1)
    model.config.get_text_config().pad_token_id = load_tokenizer(base).pad_token_id
    if whole:
        return model.requires_grad_(False)
    return model if weights is None else PeftModel.from_pretrained(model, str(weights))


def four_bits(compute: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat with doubly quantised constants (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, §3)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def device() -> torch.device:
    """Where models are: this process's GPU, where there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _load(kind: Any, folder: Path, dtype: str, **options: Any) -> PreTrainedModel:
    if dtype == "nf4":
        options["quantization_config"] = four_bits(torch_dtype(dtype))
    try:
        model = kind.from_pretrained(folder, dtype=torch_dtype(dtype), use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise ModelError(
            "the model cannot be loaded",
            where=str(folder),
            have=str(error).strip().splitlines()[0],
            then="remove that folder and run again, or set model.base to another model",
        ) from error
    for module in model.modules():
        # A processor with AVX-512 bfloat16 would pack 4-bit weights anew when it first uses them without gradients, for
        # which not all widths will do, and then compute otherwise than in training: the start's KL would not be 0.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model if dtype == "nf4" else model.to(device())


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


def score_head(weights: Path) -> torch.Tensor:
    """(1, hidden) weight of the head a reward model was saved with.

    Raises:
        ModelError: there is none.
    """
    with safe_open(weights / (WHOLE_FILE if is_whole_model(weights) else ADAPTER_FILE), "pt") as saved:
        heads = [saved.get_tensor(name) for name in saved.keys() if name.endswith("score.weight")]  # noqa: SIM118
    if len(heads) != 1:
        raise ModelError("this is not a reward model's weights", where=str(weights), have=f"{len(heads)} score heads")
    return heads[0]


def frozen_depth(config: LoraConfig, layers: int) -> int:
    """How many layers, from below, an adapter leaves alone."""
    adapted = config.layers_to_transform
    return min(adapted) if isinstance(adapted, list) and len(adapted) < layers else 0


def checkpoint_files(model: PreTrainedModel) -> tuple[str, ...]:
    """What a checkpoint of a trainer's model cannot be resumed without."""
    others = tuple(name for name in CHECKPOINT_FILES if name != ADAPTER_FILE)
    return (*others, ADAPTER_FILE if isinstance(model, PeftModel) else WHOLE_FILE)


def save_weights(model: PreTrainedModel, base: Path, out: Path) -> Path:
    """Write what was trained into `out/adapter`: an adapter, or a whole model; no path of this machine."""
    folder = out / ADAPTER
    if isinstance(model, PeftModel):
        _save_adapter(model, base, folder)
    else:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def _save_adapter(model: PeftModel, base: Path, folder: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = base_id(base)
    model.save_pretrained(folder, selected_adapters=["default"])
    (folder / "README.md").unlink(missing_ok=True)
    settings = folder / "adapter_config.json"
    written = json.loads(settings.read_text(encoding="utf-8"))
    # PEFT writes its sets in the order of this process's string hashes.
    written = {name: sorted(value) if name in SETS and value else value for name, value in written.items()}
    settings.write_text(json.dumps(written, indent=1, sort_keys=True), encoding="utf-8")
