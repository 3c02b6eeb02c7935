"""The reward model: a number per answer, such that people's choices become likely."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedTokenizerBase, set_seed
from trl import RewardConfig

from steps.artifact import Facts
from steps.calibration import accuracy_by, calibration
from steps.config import Lora, Reward
from steps.implicit_rewards import held_out_rewards
from steps.intervals import bootstrap_interval, score_interval
from steps.models import (
    ADAPTER,
    MASTER,
    checkpoint_files,
    load_reward_model,
    load_tokenizer,
    lora_config,
    save_weights,
    torch_dtype,
)
from steps.pairs import COLUMNS, first_pairs, fitting_pairs
from steps.rankings import GROUP, groups_of, keys_of, torn, whole_groups
from steps.reward_model import MEMBER, Reading, disagreement, reward_scores
from steps.reward_trainers import GroupTrainer, PairTrainer, tokenised_groups, tokenised_pairs
from steps.tracking import Tracker
from steps.training import CHECKPOINTS, arguments, held_out_metrics, run_trainer

HELD_OUT = "held_out.parquet"
APART = 1_000_003  # between the seeds of the members of an ensemble
TOGETHER = 32  # answers in a batch of held-out groups, about

Side = tuple[str, str]  # a prompt and an answer to it


@dataclass(frozen=True)
class Material:
    """What a reward model learns from and is measured on.

    Attributes:
        train, held_out: rows as the loss's trainer takes them.
        batch: held-out rows in a batch.
        scored: the candidates of each held-out row.
        pairs: the held-out pairs, with all columns of the table.
        facts: how much there is to learn from.
    """

    train: Dataset
    held_out: Dataset
    batch: int
    scored: Sequence[Sequence[Side]]
    pairs: pd.DataFrame
    facts: Facts


def train_reward(
    reward: Reward,
    lora: Lora | None,
    dtype: str,
    *,
    base: Path,
    preferences: Path,
    seed: int,
    out: Path,
    tracker: Tracker,
    start: Sequence[Side] = (),
) -> Facts:
    """Fit a model with a scalar head to human comparisons, by `reward.loss` (`steps.losses`).

    Args:
        lora: the adapters that are trained beside the head; None trains every weight.
        preferences: table of prompt, chosen, rejected, margin, part, and of records that rank several answers group,
            chosen_rank, rejected_rank.
        start: answers of the start policy, on which the reward gets mean 0 and variance 1; none leave it as it is.
    """
    tokenizer = load_tokenizer(base)
    material = material_of(reward, preferences, tokenizer)
    sides, scores, measured, steps = [], [], [], 0
    for number in range(reward.ensemble):
        own = seed if number == 0 else (seed + number * APART) % 2**31
        told = tracker if number == 0 else MemberTracker(tracker, MEMBER.format(number))
        trainer = train_member(reward, lora, dtype, material, base, own, number, out, told)
        measured.append(held_out_metrics(trainer, told))
        sides.append(sides_of(material, torch.cat(padded(trainer.rewards)).double().numpy()))
        scores.append(start_scores(trainer.model, tokenizer, start, reward))
        keep_member(trainer.model, base, number, out)
        steps += trainer.state.global_step
    reading = reading_of(reward, np.stack(scores))
    reading.write(out / ADAPTER)
    differences = np.stack([chosen - rejected for chosen, rejected in sides])
    pairs = with_known(material.pairs, differences, ranked=reward.loss != "bradley_terry")
    pairs.to_parquet(out / HELD_OUT, index=False)
    found = held_out_rewards(*np.mean(sides, axis=0))
    if reward.loss != "bradley_terry" or reward.ensemble > 1:  # the trainer told means over batches, of one member
        tracker.metrics(found, trainer.state.global_step)
    return {
        **material.facts,
        "loss": reward.loss,
        "held_out": len(pairs),
        "steps": steps,
        **accuracy(pairs, seed),
        **{name: float(np.mean([one[name] for one in measured])) for name in measured[0]},
        **found,
        **scrutiny(pairs),
        **(ensemble_facts(differences) if reward.ensemble > 1 else {}),
        **({"start_mean": reading.mean, "start_deviation": reading.deviation} if start else {}),
    }


def longest_of(reward: Reward) -> int | None:
    """Tokens of a text that are read, the last ones; None for all."""
    return reward.trainer.get("max_length", RewardConfig.max_length)


def start_scores(model: Any, tokenizer: PreTrainedTokenizerBase, start: Sequence[Side], reward: Reward) -> np.ndarray:
    """(n,) what a member gives the start policy's answers."""
    if not start:
        return np.zeros(0)
    prompts, answers = zip(*start, strict=True)
    return reward_scores(model, tokenizer, prompts, answers, longest_of(reward))


def material_of(reward: Reward, preferences: Path, tokenizer: PreTrainedTokenizerBase) -> Material:
    """The recipe's share of a table of pairs: as pairs, or as groups that stay whole.

    Raises:
        DataError: nothing is left to train on.
    """
    train, held_out = fitting_pairs(preferences, reward)
    longest = longest_of(reward)
    if reward.loss == "bradley_terry":
        train, held_out, batch = first_pairs(train, held_out, reward)
        sides = [tuple(zip([p, p], both, strict=True)) for p, *both in held_out[COLUMNS].itertuples(index=False)]
        learnt, measured = (
            tokenised_pairs(part, tokenizer, longest, reward.margin_weight) for part in (train, held_out)
        )
        return Material(learnt, measured, batch, sides, held_out, {"pairs": len(train)})
    train, held_out = whole_groups(train, reward.pairs), whole_groups(held_out, reward.held_out)
    groups = [
        groups_of(train, reward.candidates, known_by_rank=not reward.min_margin),
        groups_of(held_out, reward.candidates),
    ]
    if reward.loss != "rankings":
        groups = [torn(part) for part in groups]
    sizes = [len(group.answers) for group in groups[0]]
    facts = {"pairs": len(train), "groups": len(sizes), "mean_candidates": float(np.mean(sizes))}
    return Material(
        tokenised_groups(groups[0], tokenizer, longest),
        tokenised_groups(groups[1], tokenizer, longest),
        max(1, TOGETHER // max(len(group.answers) for group in groups[1])),
        [[(group.prompt, answer) for answer in group.answers] for group in groups[1]],
        held_out,
        facts,
    )


def train_member(
    reward: Reward,
    lora: Lora | None,
    dtype: str,
    material: Material,
    base: Path,
    seed: int,
    number: int,
    out: Path,
    tracker: Tracker,
) -> PairTrainer | GroupTrainer:
    """Train one model to the end; checkpoints of a further member lie in a folder of its own."""
    set_seed(seed)
    folder = out if number == 0 else out / CHECKPOINTS / MEMBER.format(number)
    # Nothing is longer than `max_length` any more; what is cut here is not left out there.
    settings = {**reward.trainer, "max_length": None}
    shared: dict[str, Any] = {
        "args": arguments(RewardConfig, settings, seed=seed, out=folder, per_device_eval_batch_size=material.batch),
        "train_dataset": material.train,
        "eval_dataset": material.held_out,
        "processing_class": load_tokenizer(base),
        "peft_config": lora_config(lora, base, "SEQ_CLS") if lora else None,
    }
    model = load_reward_model(base, dtype if lora else MASTER)
    pairwise = reward.loss == "bradley_terry"
    trainer = PairTrainer(model, **shared) if pairwise else GroupTrainer(model, reward=reward, **shared)
    if lora and dtype == "nf4":
        # Over 4-bit weights TRL makes all that is trained bfloat16; a head of float32 states has to be float32.
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(torch_dtype(dtype))
    trainer.checkpoint_files = checkpoint_files(trainer.model)
    run_trainer(trainer, tracker)
    trainer.rewards.clear()  # of evaluations on the way
    return trainer


class MemberTracker:
    """A tracker for a further member of an ensemble: its curves stand beside the first one's."""

    stops_at: int | None = None

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name = tracker, name

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.metrics({f"{self._name}/{name}": value for name, value in values.items()}, step)

    def progress(self, phase: str, done: int, total: int, values: Mapping[str, float] | None = None) -> None:
        self._tracker.progress(f"{self._name} {phase}", done, total, values)

    def table(self, name: str, step: int, columns: Mapping[str, list]) -> None:
        self._tracker.table(f"{self._name}-{name}", step, columns)


def keep_member(model: Any, base: Path, number: int, out: Path) -> None:
    """Leave a member's weights: the first one's in `adapter`, a further one's in a folder in it."""
    if number == 0:
        save_weights(model, base, out)
        return
    name = MEMBER.format(number)
    made = save_weights(model, base, out / CHECKPOINTS / name)
    shutil.copytree(made, out / ADAPTER / name, dirs_exist_ok=True)


def reading_of(reward: Reward, scores: np.ndarray) -> Reading:
    """How the trained model is to be read.

    Args:
        scores: (N, n) of each member, for the start policy's answers.
    """
    given: Any = {
        "members": reward.ensemble,
        "penalty": reward.uncertainty_penalty,
        "max_length": longest_of(reward),
    }
    if not scores.shape[1]:
        return Reading(**given)
    means = scores.mean(0)
    return Reading(float(means.mean()), max(float(means.std()), 1e-6), len(means), **given)


# -- on the held-out pairs ---------------------------------------------------------------------------------------


def padded(batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Batches (B, K) of any K with the largest K, filled up with NaN."""
    most = max(batch.shape[1] for batch in batches)
    return [torch.nn.functional.pad(batch, (0, most - batch.shape[1]), value=torch.nan) for batch in batches]


def sides_of(material: Material, rewards: np.ndarray) -> np.ndarray:
    """(2, n) rewards of the chosen and the rejected sides of the held-out pairs.

    Args:
        rewards: (rows, K) of the candidates of each held-out row, NaN behind the last one.
    """
    known: dict[Side, float] = {}
    for row, values in zip(material.scored, rewards, strict=True):
        known |= dict(zip(row, values[: len(row)].tolist(), strict=True))
    pairs = material.pairs[COLUMNS].itertuples(index=False)
    return np.array([(known[prompt, chosen], known[prompt, rejected]) for prompt, chosen, rejected in pairs]).T


def with_known(pairs: pd.DataFrame, differences: np.ndarray, ranked: bool = False) -> pd.DataFrame:
    """Held-out pairs with what people said of them, the difference of their rewards and the members' disagreement.

    Args:
        differences: (N, n) of each member.
        ranked: whether pairs of one prompt were learnt from together.
    """
    known = [name for name in ("margin", "agreement") if name in pairs]
    groups = {GROUP: keys_of(pairs)} if ranked or GROUP in pairs else {}
    pairs = pairs[[*COLUMNS, *known]].assign(**groups).reset_index(drop=True)
    pairs["difference"] = differences.mean(0)
    if len(differences) > 1:
        pairs["disagreement"] = disagreement(differences)
    return pairs


def accuracy(pairs: pd.DataFrame, seed: int) -> Facts:
    """Share of pairs in people's order with its 95 % interval, a tie of rewards counted ½, and how many of those.

    Pairs of one ranking hang together, so there whole groups are drawn for the interval (`bootstrap_interval`).
    """
    signs = np.sign(pairs["difference"])
    right = ((1 + signs) / 2).to_numpy()
    if GROUP in pairs:
        low, high = bootstrap_interval(right, list(pairs[GROUP]), seed=seed)
    else:
        low, high = score_interval(*(int((signs == sign).sum()) for sign in (1, 0, -1)))
    bounds = {"accuracy_low": low, "accuracy_high": high}
    return {"accuracy": float(right.mean()), **bounds, "tied_rewards": int((signs == 0).sum())}


def scrutiny(pairs: pd.DataFrame) -> Facts:
    """How sure the reward model is against how often it is right, and where it is wrong (`steps.calibration`).

    Args:
        pairs: chosen, rejected, and `difference` of their rewards; margin and agreement where people gave them.
    """
    found = calibration(pairs["difference"])
    lengths = pairs["chosen"].str.len() - pairs["rejected"].str.len()
    facts: Facts = {
        "calibration_error": found.error,
        "log_loss": found.log_loss,
        "reliability": [asdict(part) for part in found.bins],
        "accuracy_by_length": [asdict(part) for part in accuracy_by(pairs["difference"], lengths)],
    }
    if "margin" in pairs and (given := pairs["margin"].notna()).any():
        by_margin = accuracy_by(pairs.loc[given, "difference"], pairs.loc[given, "margin"])
        facts["accuracy_by_margin"] = [asdict(part) for part in by_margin]
    if "agreement" in pairs and pairs["agreement"].notna().any():
        facts["raters_agree"] = float(pairs["agreement"].mean())  # what one person would come to
    return facts


def ensemble_facts(differences: np.ndarray) -> Facts:
    """How far the members are apart, and whether that tells which pairs the ensemble gets wrong.

    `errors_by_disagreement` is the chance that a pair the ensemble orders wrong has the higher disagreement, of it and
    one it orders right: ½ tells nothing. `errors_by_closeness` is the same of rewards that are close, which needs no
    ensemble: the disagreement is worth its price where it tells more.

    Args:
        differences: (N, n) of each member.
    """
    mean, apart = differences.mean(0), disagreement(differences)
    right = (1 + np.sign(differences)) / 2
    facts: Facts = {
        "member_accuracies": [float(one) for one in right.mean(1)],
        "disagreement": float(apart.mean()),
        "accuracy_by_disagreement": [asdict(part) for part in accuracy_by(mean, apart)],
    }
    wrong = mean < 0
    if 0 < wrong.sum() < len(wrong):
        facts["errors_by_disagreement"] = float(roc_auc_score(wrong, apart))
        facts["errors_by_closeness"] = float(roc_auc_score(wrong, -np.abs(mean)))
    return facts
