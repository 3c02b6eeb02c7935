"""How often does PPO go wrong? `python -m benchmarks.ppo_seeds [--seeds 10]`, on the default recipe unless said.

SFT and reward model are those of the recipe's own seed, made once and shared; the seeds are the policy step's. Every
policy answers the same held-out prompts with the same random numbers. The budget is small, so that the reward rises
less than in `prefloop run`. What is finished lies in `var/ppo-seeds` and is not made again: after an interruption the
same command goes on at the newest checkpoint.

A seed has failed when a number is none, the KL to the start passes 30 nats, the lower bound of the gold judge's win
rate is not above ½, less than half of the answers end, or their distinct-2 falls below half of the start's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from steps import pipeline
from steps.artifact import Artifact
from steps.config import Recipe, load
from steps.errors import StepFailed, StepKilled
from steps.experiment import Experiment
from steps.launch import launcher
from steps.paths import project_root
from steps.run import Input, Launcher, Store, run_step
from steps.tracking import curves

KL_BOUND, ENDED_BOUND, DISTINCT_BOUND = 30.0, 0.5, 0.5
HEADER = "seed       reward          KL       win rate       length  ended  distinct-2   failed"


@dataclass(frozen=True)
class Seed:
    """What one seed came to.

    Attributes:
        reward: mean score of the answers in the first and the last rollout.
        kl: nats an answer, the largest of all rollouts.
        finite: whether every number reported was one.
        win: win rate over the start by the gold judge, and its interval.
        length: of the answers, over the start's.
        ended: share of answers that were not cut off.
        distinct: distinct-2 of the policy's answers and of the start's.
    """

    seed: int
    reward: tuple[float, float]
    kl: float
    finite: bool
    win: tuple[float, float, float]
    length: float
    ended: float
    distinct: tuple[float, float]

    @property
    def failures(self) -> list[str]:
        """In what ways the seed has failed."""
        found = {
            "NaN": not self.finite,
            "KL": self.kl > KL_BOUND,
            "win": not self.win[1] > 0.5,
            "end": self.ended < ENDED_BOUND,
            "repeats": self.distinct[0] < DISTINCT_BOUND * self.distinct[1],
        }
        return [name for name, failed in found.items() if failed]

    def __str__(self) -> str:
        rate, low, high = self.win
        return (
            f"{self.seed:>4}  {self.reward[0]:6.2f} → {self.reward[1]:6.2f}  {self.kl:5.1f}  "
            f"{rate:.2f} [{low:.2f}, {high:.2f}]  {self.length:6.2f}  "
            f"{self.ended:5.2f}  {self.distinct[0]:.2f} / {self.distinct[1]:.2f}  {', '.join(self.failures) or '-'}"
        )


def of_artifacts(seed: int, policy: Artifact, evaluation: Artifact) -> Seed:
    """A seed from its policy's curves and its evaluation's facts."""
    drawn, facts = curves(policy.path), evaluation.facts
    reward, kl = ([value for _, value in drawn[name]] for name in ("reward", "kl"))
    return Seed(
        seed,
        reward=(reward[0], reward[-1]),
        kl=max(kl),
        finite=all(math.isfinite(value) for points in drawn.values() for _, value in points),
        win=(facts["win_rate"], facts["win_rate_low"], facts["win_rate_high"]),
        length=facts["length_ratio"],
        ended=facts["policy_ended"],
        distinct=(facts["policy_distinct_2"], facts["start_distinct_2"]),
    )


def one_seed(seed: int, recipe: Recipe, known: Mapping[str, Input], store: Store, launch: Launcher) -> Seed:
    """Tune and evaluate, or find what was made before."""
    tuned = run_step(replace(pipeline.spec("policy", recipe, known), seed=seed), store, launch).artifact
    met = {**known, "policy": Input(tuned.path, tuned.digest)}
    return of_artifacts(seed, tuned, run_step(pipeline.spec("evaluate", recipe, met), store, launch).artifact)


def shared(recipe: Recipe, root: Path) -> Experiment:
    """The experiment with data, base, SFT model, its answers and reward model, found in the store or made there."""
    experiment = Experiment(recipe, root, Console(highlight=False))
    experiment.prepare_data()
    for name in ("base", "sft", "baseline"):
        experiment.run(name)
    experiment.run_one("reward", again=False)
    return experiment


def summary(found: list[Seed], broken: int) -> str:
    """The seeds together."""
    failed = sum(bool(one.failures) for one in found) + broken
    text = f"{failed} of {len(found) + broken} seeds failed"
    if found:
        wins, gains = [one.win[0] for one in found], [one.reward[1] - one.reward[0] for one in found]
        text += (
            f"; over seeds, mean ± standard deviation: win rate {np.mean(wins):.3f} ± {np.std(wins):.3f}, "
            f"reward gained {np.mean(gains):.2f} ± {np.std(gains):.2f}"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo_seeds")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rollouts", type=int, default=8, help="of each seed's policy step")
    parser.add_argument("--prompts", type=int, default=200, help="answered in each evaluation")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/reviews.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="as for `prefloop run`; repeatable")
    given = parser.parse_args()
    budget = [f"policy.ppo.rollouts={given.rollouts}", f"evaluate.prompts={given.prompts}"]
    recipe = load(given.recipe, ["policy.method=ppo", *budget, *given.set])
    experiment = shared(recipe, project_root())
    store, launch = Store(experiment.var.folder("ppo-seeds")), launcher(recipe.launch)
    found: list[Seed] = []
    broken = 0
    print(HEADER, flush=True)
    for seed in range(given.seeds):
        try:
            found.append(one_seed(seed, recipe, experiment.known, store, launch))
            print(found[-1], flush=True)
        except StepKilled:
            raise
        except StepFailed as error:  # a training that broke down is a result too
            broken += 1
            print(f"{seed:>4}  {str(error).splitlines()[0]}", flush=True)
    print(summary(found, broken))


if __name__ == "__main__":
    main()
