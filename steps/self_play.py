"""What an answer is worth among others to the same prompt: how often it would be preferred to them. Pure functions.

Swamy et al. 2024, "A Minimaximalist Approach to Reinforcement Learning from Human Feedback", arXiv:2401.04056 (SPO). A
policy that plays against itself needs no second player: the win rate of its samples against its other samples is the
reward, and whatever learns from rewards ends, on average over its training, at what no other policy is preferred to
(the minimax winner), also where preferences go round in a circle and no score of single answers could express them.

Shapes: G ≥ 2 answers to a prompt, in the last dimension; any dimensions before it, such as prompts.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit


def preferences(scores: np.ndarray) -> np.ndarray:
    """(…, G, G) P(i ≻ j) = σ(r_i − r_j), row i and column j, from (…, G) scores (Bradley & Terry 1952).

    All that is read of a reward model are these chances. Of several models the mean over their dimension is the
    preference of all together: that of one set of scores is transitive, a mean of several need not be.
    """
    scores = np.asarray(scores, float)
    return expit(scores[..., :, None] - scores[..., None, :])


def win_rates(preferred: np.ndarray) -> np.ndarray:
    """(…, G) w_i = 1/(G − 1) Σ_{j≠i} P(i ≻ j): SPO's reward of a sample among those of its prompt.

    Their mean over a group is ½, for P(i ≻ j) + P(j ≻ i) = 1.

    Args:
        preferred: (…, G, G) how likely answer i is preferred to answer j, ½ for a tie; the diagonal is not looked at.

    Raises:
        ValueError: a group has no second answer, or is no square.
    """
    *_, rows, columns = preferred.shape
    if rows != columns or rows < 2:
        raise ValueError(f"a group compares every two of at least two answers, found {rows} × {columns}")
    return np.where(np.eye(rows, dtype=bool), 0.0, preferred).sum(-1) / (rows - 1)


def for_leave_one_out(rates: np.ndarray) -> np.ndarray:
    """(…, G) (1 − 1/G) w_i: rewards whose leave-one-out advantages are w_i − ½.

    The others of a group lose what an answer wins, so a baseline of their mean would count every win G/(G − 1) times,
    and a KL penalty that stands beside it would be that much weaker than its coefficient says.
    """
    return (1 - 1 / rates.shape[-1]) * rates
