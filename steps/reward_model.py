"""A trained reward model as others use it: on its scale, as the mean of its members, with how far those disagree.

What belongs to the model besides its weights stands in `reward.json` beside them: the mean and deviation of its rewards
on the start policy's answers (Ziegler et al. 2019, arXiv:1909.08593, §2.2), the number of its members, the uncertainty
penalty, and how many tokens it reads. A bias in the head would say the same of the mean, but sequence classifiers lose
it when they are loaded. Further members lie in folders `member-1`, … beside the first one's weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from steps.models import load_reward_model, load_tokenizer

FILE = "reward.json"
MEMBER = "member-{}"


@dataclass(frozen=True)
class Reading:
    """How a reward is read off the weights.

    Attributes:
        mean, deviation: of the members' mean reward over the start policy's answers; 0 and 1 leave it as it is.
        answers: how many those were; 0 where the reward was not normalised.
        members: models, whose mean is the reward.
        penalty: standard deviations over the members that policies are not given.
        max_length: tokens; of a longer text the beginning is not read, as in the training. None for no bound.
    """

    mean: float = 0.0
    deviation: float = 1.0
    answers: int = 0
    members: int = 1
    penalty: float = 0.0
    max_length: int | None = None

    @classmethod
    def of(cls, weights: Path) -> Reading:
        """What stands beside a reward model's weights; the plain reading where nothing does."""
        path = weights / FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls()

    def write(self, weights: Path) -> None:
        """Put it beside the weights; nothing, where it is the plain one."""
        if self != Reading():
            (weights / FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def scaled(self, rewards: np.ndarray) -> np.ndarray:
        """Rewards of mean 0 and variance 1 on the start policy's answers, in the shape they are given in."""
        return (rewards - self.mean) / self.deviation

    def careful(self, members: np.ndarray) -> np.ndarray:
        """(n,) mean − c · standard deviation over the members (Coste et al. 2024, arXiv:2310.02743, §4: there c · σ²).

        Args:
            members: (N, n) scaled rewards.
        """
        return members.mean(0) - self.penalty * disagreement(members)


def disagreement(members: np.ndarray) -> np.ndarray:
    """(n,) standard deviation over the members, N − 1 in the denominator; 0 for a single one.

    Args:
        members: (N, n) rewards.
    """
    return members.std(0, ddof=1) if len(members) > 1 else np.zeros(members.shape[1])


def member_folders(weights: Path) -> list[Path]:
    """Where the weights of each member are."""
    count = Reading.of(weights).members
    return [weights, *(weights / MEMBER.format(number) for number in range(1, count))]


class RewardModel:
    """What a reward step left, ready to score answers.

    Args:
        weights: the step's folder `adapter`.
    """

    def __init__(self, base: Path, dtype: str, weights: Path) -> None:
        self.reading, self.tokenizer = Reading.of(weights), load_tokenizer(base)
        first, *others = member_folders(weights)
        self._models = [load_reward_model(base, dtype, first)]
        for folder in others:
            if isinstance(self._models[0], PeftModel):  # over the one base
                self._models[0].load_adapter(str(folder), adapter_name=folder.name)
                self._models.append(self._models[0])
            else:
                self._models.append(load_reward_model(base, dtype, folder))
        self._adapters = ["default", *(folder.name for folder in others)]

    def members(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """(N, n) what each member gives each answer to its prompt, on the model's scale."""
        return self.reading.scaled(np.stack(list(self._each(prompts, answers))))

    def _each(self, prompts: Sequence[str], answers: Sequence[str]):
        for model, adapter in zip(self._models, self._adapters, strict=True):
            if isinstance(model, PeftModel):
                model.set_adapter(adapter, inference_mode=True)
            yield reward_scores(model, self.tokenizer, prompts, answers, self.reading.max_length)

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """(n,) the reward, as a judge gives it."""
        return self.members(prompts, answers).mean(0)

    def careful_scores(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """(n,) the reward less the uncertainty penalty, as a policy is given it."""
        return self.reading.careful(self.members(prompts, answers))


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str], at_most: int | None = None
) -> list[list[int]]:
    """Tokens of answers to their prompts, each with its end; of what is too long the last ones."""
    end = tokenizer.eos_token
    texts = [p + a if a.endswith(end) else p + a + end for p, a in zip(prompts, answers, strict=True)]
    return [ids[-at_most:] if at_most else ids for ids in tokenizer(texts)["input_ids"]]


@torch.no_grad()
def reward_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    max_length: int | None = None,
    batch_size: int = 50,
) -> np.ndarray:
    """(n,) what a model gives each answer to its prompt; neither the padding nor the rest of a batch counts.

    Args:
        max_length: tokens it has learnt to read at most; of a longer text the beginning is left out.
    """
    model.eval()
    texts = tokens_of(tokenizer, prompts, answers, max_length)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    scores = np.zeros(len(texts))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        inputs = tokenizer.pad({"input_ids": [texts[i] for i in rows]}, return_tensors="pt", padding_side="right")
        scores[rows] = model(**inputs.to(model.device)).logits.squeeze(-1).float().cpu().numpy()
    return scores
