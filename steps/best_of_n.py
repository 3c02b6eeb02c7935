"""Best of n: no training; the start answers n times and the reward model picks. What tuning has to beat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.special import comb

from steps.artifact import Facts
from steps.models import ADAPTER
from steps.policy_config import BestOfN
from steps.statistics import best_of_n_kl
from steps.tracking import Tracker

DECODING = "decoding.json"  # beside the weights: how answers are drawn from them, where it is not plainly
PICKS = "reward"  # beside the weights: the reward model that picks among answers


def tune_policy(best_of_n: BestOfN, *, sft: Path, reward: Path, seed: int, out: Path, tracker: Tracker) -> Facts:
    """The SFT model with a note that n answers are drawn and the best one is given, and the model that picks it."""
    shutil.copytree(sft / ADAPTER, out / ADAPTER, dirs_exist_ok=True)
    shutil.copytree(reward / ADAPTER, out / ADAPTER / PICKS, dirs_exist_ok=True)
    (out / ADAPTER / DECODING).write_text(json.dumps({"best_of": best_of_n.n}), encoding="utf-8")
    return {"method": "best_of_n", "n": best_of_n.n, "kl_bound": best_of_n_kl(best_of_n.n)}


def answers_drawn(adapter: Path) -> int:
    """How many answers a model draws to give one."""
    path = adapter / DECODING
    return int(json.loads(path.read_text(encoding="utf-8"))["best_of"]) if path.is_file() else 1


def curve(rewards: np.ndarray, values: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """What best of 1, 2, 4, … would have come to, from the candidates of the largest.

    The mean over all subsets of n candidates: of N sorted by reward, the i-th is the best of C(i − 1, n − 1) of the
    C(N, n) subsets (Nakano et al. 2021, arXiv:2112.09332, appendix I).

    Args:
        rewards: (prompts, N), by which the best is picked.
        values: (prompts, N) each, what is averaged, by name.
    """
    order = np.argsort(rewards, axis=1, kind="stable")
    total = rewards.shape[1]
    sizes: Sequence[int] = [2**power for power in range(total.bit_length()) if 2**power <= total]
    points = []
    for n in sizes:
        weights = comb(np.arange(total), n - 1) / comb(total, n)
        means = {
            name: float((np.take_along_axis(value, order, 1) * weights).sum(1).mean()) for name, value in values.items()
        }
        points.append({"n": n, "kl": best_of_n_kl(n), **means})
    return points
