"""Any sequence classifier with one output as a reward model: from a directory or the hub, safetensors only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steps.artifact import digest_json
from steps.base import locate
from steps.errors import ModelError

_BATCH = 16


@dataclass(frozen=True)
class Classifier:
    """Scores answers to prompts; what `RewardJudge` takes.

    A model whose tokenizer has a chat template reads prompt and answer as a user's and an assistant's turn; any other
    reads them as a pair of texts, as its tokenizer joins them.

    Attributes:
        identity: digest of the model's files and of how they are used.
    """

    model: Any
    tokenizer: Any
    identity: str

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """(n,) the model's output for each answer to its prompt."""
        import torch

        found = np.zeros(len(answers))
        order = sorted(range(len(answers)), key=lambda row: len(prompts[row]) + len(answers[row]))
        with torch.no_grad():
            for start in range(0, len(order), _BATCH):
                rows = order[start : start + _BATCH]
                inputs = self._inputs([prompts[row] for row in rows], [answers[row] for row in rows])
                found[rows] = self.model(**inputs).logits.squeeze(-1).float().cpu().numpy()
        return found

    def _inputs(self, prompts: list[str], answers: list[str]) -> Any:
        options = {"return_tensors": "pt", "padding": True, "padding_side": "right"}
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompts, answers, **options).to(self.model.device)
        turns = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        texts = self.tokenizer.apply_chat_template(turns, tokenize=False)
        return self.tokenizer(texts, add_special_tokens=False, **options).to(self.model.device)


def load_classifier(source: str | Path, revision: str | None = None, root: Path | None = None) -> Classifier:
    """A reward model somebody else trained.

    Args:
        source: a directory, relative to `root`, or a hub id.
        revision: of a hub id, which needs one.

    Raises:
        ModelError: there is no such model, it cannot be loaded, it lacks weights, or has more than one output.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    found = locate(str(source), revision, root or Path.cwd())
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.path)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            found.path, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        have = str(error).strip().splitlines()[0]
        raise ModelError("the classifier cannot be loaded", where=str(source), have=have) from error
    if missing := sorted(loading["missing_keys"]):
        have = f"{', '.join(missing[:4])} would be random"
        raise ModelError("this is no reward model: weights are missing", where=str(source), have=have)
    if model.config.num_labels != 1:
        raise ModelError(
            "a reward model has one output", where=str(source), have=f"{model.config.num_labels}", then="name another"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.eval()
    return Classifier(model, tokenizer, digest_json(["classifier", found.digest]))
