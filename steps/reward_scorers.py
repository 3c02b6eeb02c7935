"""The reward as policies are given it while they learn: of one model, or of an ensemble less its uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steps.backbone import REWARD, Rows, Scorer, add_adapter, linear_head
from steps.models import is_whole_model, load_reward_model, score_head
from steps.reward_model import Reading, member_folders


class CarefulScorer(Scorer):
    """Mean − c · standard deviation of several scorers (`Reading.careful`), or one of them on another scale.

    Args:
        scorers: the members.
        reading: mean, deviation and c; mean 0 and deviation 1 leave the members' own scale.
    """

    def __init__(self, scorers: Sequence[Scorer], reading: Reading) -> None:
        self.scorers, self.reading = list(scorers), reading
        first = self.scorers[0]
        self.model, self.adapter, self.decoder = first.model, first.adapter, first.decoder
        self.head = nn.ModuleList([scorer.head for scorer in self.scorers])  # type: ignore[assignment]

    def scores(self, rows: Rows, pad: int) -> Tensor:
        return self.scaled(self.members(rows, pad))

    def members(self, rows: Rows, pad: int) -> Tensor:
        """(N, B) each member's scores − c · standard deviation over the members, on the scale they were trained on."""
        members = torch.stack([scorer.scores(rows, pad) for scorer in self.scorers])
        return members - self.reading.penalty * members.std(0) if len(members) > 1 else members

    def scaled(self, members: Tensor) -> Tensor:
        """(B,) the reward, from (N, B) what `members` gives."""
        return (members.mean(0) - self.reading.mean) / self.reading.deviation


def careful_scorer(first: Scorer, weights: Path, member: Callable[[str, Path], Scorer], *, scaled: bool) -> Scorer:
    """A reward step's model as a policy is given it.

    Args:
        first: the scorer of the first member, which is all there is to most.
        weights: the step's folder `adapter`.
        member: makes the scorer of a further member, from a name for its adapter and the folder of its weights.
        scaled: whether the constants beside the weights are applied; who normalises rewards itself does not want it.
    """
    reading = Reading.of(weights)
    others = [member(f"{REWARD}-{n}", folder) for n, folder in enumerate(member_folders(weights)[1:], start=1)]
    if not others and not (scaled and reading.answers):
        return first
    if not scaled:
        reading = Reading(members=reading.members, penalty=reading.penalty)
    return CarefulScorer([first, *others], reading)


def reward_scorer(policy: PreTrainedModel, base: Path, dtype: str, weights: Path) -> Scorer:
    """The reward model: adapters over the policy's base, or models of their own where every weight was trained."""

    def member(name: str, folder: Path) -> Scorer:
        head = linear_head(score_head(folder))
        if is_whole_model(folder):
            return Scorer(load_reward_model(base, dtype, folder), None, head)
        add_adapter(policy, name, folder)
        return Scorer(policy, name, head)

    return careful_scorer(member(REWARD, weights), weights, member, scaled=True)


def members_of(scorer: Scorer) -> list[Scorer]:
    """The scorers a scorer is made of."""
    return scorer.scorers if isinstance(scorer, CarefulScorer) else [scorer]
