"""What the pipeline costs over the trainers it calls: the reward step through `prefloop run` against a bare script.

`python -m benchmarks.overhead`, in a project whose data is prepared and whose base and SFT steps are done. Both sides
train the reward model of `recipes/reviews.yaml` with the same settings in a fresh process; the flow's side is a whole
`prefloop run` minus what its other steps took. Then a run with nothing changed, with a Prefect server up.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from steps.config import load
from steps.experiment import Experiment
from steps.launch import thread_environment
from steps.paths import Var, project_root

BARE = """
import json, sys, time
from pathlib import Path
from steps.config import load
from steps.reward import train_reward
from steps.tracking import NullTracker
recipe = load(sys.argv[1])
train_reward(recipe.reward, recipe.model.lora, recipe.model.dtype, base=Path(sys.argv[2]),
             preferences=Path(sys.argv[3]), seed=recipe.seed, out=Path(sys.argv[4]), tracker=NullTracker())
"""


def timed(command: list[str], **options) -> tuple[float, str]:
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    return time.perf_counter() - start, result.stdout


def main(recipe: str = "recipes/reviews.yaml") -> None:
    import os

    root = project_root()
    experiment = Experiment(load(recipe), root, Console(quiet=True))
    list(experiment.plan())
    specs = {name: experiment.spec(name) for name in ("base", "reward")}
    base = experiment.store.find(specs["base"])
    assert base is not None, "run `make run` first"
    environment = {**os.environ, **thread_environment(None)}
    preferences = experiment.known["data/preferences"].path
    with tempfile.TemporaryDirectory() as out:
        bare, _ = timed(
            [sys.executable, "-c", BARE, recipe, str(base.path), str(preferences), out], env=environment, cwd=root
        )
    kept = experiment.store.path / specs["reward"].name
    aside = kept.with_name("aside")
    shutil.move(kept, aside)
    try:
        flow, output = timed([sys.executable, "-m", "flows.cli", "run", recipe], cwd=root)
    finally:
        if kept.is_dir():
            shutil.rmtree(aside)
        else:
            shutil.move(aside, kept)
    others = sum(
        float(spent)
        for name, spent in re.findall(r"^(\w+)\s+(?:done|checked)\s+([\d.]+) s", output, re.M)
        if name != "reward"
    )
    print(f"bare script {bare:.1f} s; flow {flow - others:.1f} s (of {flow:.1f} s, other steps {others:.1f} s)")
    print(f"flow = 1.03 × bare + {flow - others - 1.03 * bare:.1f} s")

    from steps import ui

    var = Var(Path(root))
    servers = ui.start(var)
    try:
        again = min(timed([sys.executable, "-m", "flows.cli", "run", recipe], cwd=root)[0] for _ in range(3))
    finally:
        ui.stop(servers, var)
    print(f"nothing changed, Prefect server up: {again:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
