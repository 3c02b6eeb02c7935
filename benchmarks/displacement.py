"""Do chosen answers become less likely, and what prevents it at what price? `python -m benchmarks.displacement RECIPE`.

A known failure of DPO: the margin grows because rejected answers fall, and the chosen ones fall with them (Razin et
al. 2024, arXiv:2410.08847). DPO and the relatives that should hold the chosen answers up run on one budget: the pairs,
batches and learning rate of the recipe's `policy.dpo`. Printed over the seeds: log π/ρ in nats of held-out chosen and
rejected answers against the SFT model, their margin, the accuracy, the gold win rate and the policy's KL.

    python -m benchmarks.displacement recipes/reviews.yaml --seeds 3 --set policy.dpo.pairs=512
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from steps.comparison import Variant, variants
from steps.config import Recipe, load
from steps.errors import PrefloopError
from steps.experiment import Experiment
from steps.policy_config import RELATIVES

METHODS = "dpo,dpo:sigmoid+sft,dpo:apo_zero,dpo:nca_pair,ipo,cdpo,kto,cpo,orpo,simpo,slic"
STEPS = Recipe.STEPS[: Recipe.STEPS.index("gate")]
BETA = 0.1  # TRL's, where a recipe says none
COLUMNS = ("chosen", "rejected", "margin", "accuracy", "win rate", "KL")


def beta_of(recipe: Recipe) -> float:
    """What the implicit rewards of a run are multiplied by."""
    policy = recipe.policy
    settings = policy.relative if policy.method in RELATIVES else getattr(policy, policy.method)
    return float(settings.trainer.get("beta", BETA))


def measured(variant: Variant, root: Path) -> tuple[float, ...]:
    """A run's values of `COLUMNS`."""
    experiment = Experiment(variant.recipe, root, Console(quiet=True), meets_champion=False)
    experiment.prepare_data()
    facts: dict[str, Any] = {}
    for step in STEPS:
        facts |= experiment.run(step).artifact.facts
    experiment.close()
    rewards = (facts[f"eval_rewards/{name}"] / beta_of(variant.recipe) for name in ("chosen", "rejected", "margins"))
    rest = (facts["eval_rewards/accuracies"], facts["win_rate"], facts.get("policy_kl_full") or float("nan"))
    return (*rewards, *rest)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("recipe")
    asked.add_argument("--methods", default=METHODS)
    asked.add_argument("--seeds", type=int, default=1)
    asked.add_argument("--set", action="append", default=[], dest="assignments")
    given = asked.parse_args()
    recipe = load(given.recipe, given.assignments)
    strength = float(recipe.policy.dpo.trainer.get("beta", BETA))
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for variant in variants(recipe, given.methods.split(","), [strength], given.seeds):
        try:
            found[f"{variant.method} {variant.setting}"].append(measured(variant, Path.cwd()))
        except PrefloopError as error:
            print(f"{variant.name}: {error.what}", flush=True)
    print(f"{'':28}" + "".join(f"{name:>10}" for name in COLUMNS))
    for name, runs in found.items():
        print(f"{name:28}" + "".join(f"{value:10.3f}" for value in np.mean(runs, axis=0)))


if __name__ == "__main__":
    main()
