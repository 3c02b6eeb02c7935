"""Does the reward rise, and does the critic come to know it? `python -m benchmarks.ppo_reward [SEEDS]`, 10 unless said.

The reward is the share of an answer's words whose number is even; a random model's is ½. Written down: the reward and
the critic's explained variance over the last rollouts, and every rollout whose mean KL to the start lies below 0 by
more than two standard errors, which only a mistake could bring about.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.toy import TOY, ToyReward, toy_model, train_toy
from steps.policy_config import PPO

LAST = 10  # rollouts that are averaged
PPO_OF_THE_TOY = PPO(
    rollouts=100,
    kl={"coefficient": 0.035},
    lam=1.0,
    normalise_reward=0,
    value_clip=None,
    critic_learning_rate=2e-3,
    critic_warmup=15,  # it learns while answers still differ; near the optimum there is little left to learn from
    trainer={
        **TOY,
        "per_device_train_batch_size": 128,
        "steps_per_generation": 2,
        "num_iterations": 3,
        "max_completion_length": 12,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "linear",
    },
)


def share_of_even_words(tokens) -> float:
    words = [token - 3 for token in tokens if token >= 3]
    return sum(word % 2 == 0 for word in words) / len(words) if words else 0.0


def main(seeds: int) -> None:
    prompts = [" ".join(f"w{(7 * row + place) % 29}" for place in range(4)) for row in range(64)]
    good = 0
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as scratch:
            reward = ToyReward(share_of_even_words)
            trainer = train_toy(toy_model(seed), prompts, reward, PPO_OF_THE_TOY, seed, Path(scratch))
        logs = [entry for entry in trainer.state.log_history if "reward" in entry]
        end = {
            name: np.mean([entry[name] for entry in logs[-LAST:]]) for name in ("reward", "explained_variance", "kl")
        }
        negative = sum(entry["kl"] < -2 * entry["kl_error"] - 1e-6 for entry in logs)
        good += end["reward"] >= 0.9 and end["explained_variance"] > 0.3 and not negative
        print(
            f"seed {seed}: reward {logs[0]['reward']:.2f} → {end['reward']:.3f}, explained variance "
            f"{end['explained_variance']:.2f}, KL {end['kl']:.1f} nats, {negative} rollouts of negative KL",
            flush=True,
        )
    print(f"{good} of {seeds} with reward ≥ 0.9, explained variance > 0.3 and no negative KL")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
