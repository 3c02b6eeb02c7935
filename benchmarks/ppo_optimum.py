"""Does PPO reach the optimum where it is known? `python -m benchmarks.ppo_optimum [SEEDS]`, 10 unless said.

One token is chosen among a few. The best policy under a reward r and a KL penalty of weight β against ρ is
π(y) ∝ ρ(y) exp(r(y) / β) (Ziegler et al. 2019, arXiv:1909.08593, eq. 2, solved for π). A policy trained long enough
should be that distribution: the total variation between the two, ½ Σ |π − π*|, is 0 for equal and 1 for disjoint ones.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.toy import TOY, ToyReward, toy_model, toy_tokenizer, train_toy
from steps.policy_config import PPO

BETA = 0.5
TOLERANCE = 0.05


def distribution(model, prompt: torch.Tensor) -> torch.Tensor:
    """(vocabulary,) probabilities of the first token."""
    with torch.no_grad():
        return model(prompt).logits[0, -1].double().softmax(-1)


def main(seeds: int) -> None:
    tokenizer = toy_tokenizer()
    reached = 0
    for seed in range(seeds):
        draw = torch.Generator().manual_seed(seed)
        worth = torch.randn(len(tokenizer), generator=draw, dtype=torch.float64)
        prompt = torch.tensor([tokenizer("w0 w1")["input_ids"]])
        start = toy_model(seed)
        reference = distribution(start, prompt)
        optimum = reference * (worth / BETA).exp()
        optimum /= optimum.sum()
        ppo = PPO(
            rollouts=80,
            kl={"coefficient": BETA},
            lam=1.0,
            value_clip=None,
            normalise_reward=0,
            whiten_advantages=False,
            critic_learning_rate=1e-2,
            trainer={
                **TOY,
                "per_device_train_batch_size": 256,
                "num_iterations": 2,
                "max_completion_length": 1,
                "learning_rate": 3e-3,
                "lr_scheduler_type": "linear",
            },
        )
        with tempfile.TemporaryDirectory() as scratch:
            reward = ToyReward(lambda tokens, worth=worth: float(worth[tokens[0]]))
            trainer = train_toy(start, ["w0 w1"], reward, ppo, seed, Path(scratch))
        found = distribution(trainer.policy, prompt)
        variation = 0.5 * float((found - optimum).abs().sum())
        before = 0.5 * float((reference - optimum).abs().sum())
        reached += variation <= TOLERANCE
        print(f"seed {seed}: total variation {before:.3f} at the start, {variation:.3f} at the end", flush=True)
    print(f"{reached} of {seeds} within {TOLERANCE}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
