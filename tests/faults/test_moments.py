"""kill -9 of a whole run at a random moment in any of its steps: the next run ends as one that nobody disturbed."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import states
from forks import Command, Forks
from states import RUN

from steps.config import Recipe

STEPS = ("data", *Recipe.STEPS, "registry")


def step_of(root: Path) -> str:
    """The step a run is in."""
    store = root / "var/store"
    whole = {path.parent.name for path in store.glob("*/manifest.json") if path.parent.suffix != ".partial"}
    begun = whole | {path.parent.name for path in store.glob("*.partial/spec.json")}
    if any(name.startswith("gate-") for name in whole):
        return "registry"
    return next((step for step in reversed(STEPS) if any(name.startswith(f"{step}-") for name in begun)), "data")


def fresh(finished: Path, to: Path, step: str) -> Path:
    """The project before its first run; its data have yet to be prepared where the run is to be killed at that."""
    states.without_var(finished, to)
    if step == "data":
        for file in ("rows", "valid", "quarantine", "demonstrations", "preferences", "prompts", "gold"):
            (to / f"data/tiny/{file}.parquet").unlink()
        (to / "dvc.lock").unlink()
        shutil.rmtree(to / ".dvc/cache")
    return to


def kill_and_run_again(prefloop: Forks, finished: Path, root: Path, moment: Callable[[Command], object]) -> str:
    """Kill a run at a moment and run it again; the step that was going on, or `over`."""
    running = prefloop(root, *RUN)
    moment(running)
    found = step_of(root) if running.poll() is None else "over"
    running.kill()
    prefloop(root, *RUN).ended_well()
    prefloop.none_left()
    states.equal(root, finished)
    return found


MOMENTS: dict[str, Callable[[Path], object]] = {
    "data": lambda root: (root / "data/tiny/rows.parquet").exists(),
    "evaluate": lambda root: list((root / "var/store").glob("evaluate-*.partial/progress.json")),
    "registry": lambda root: list((root / "var/runs").glob("*/model/adapter")),
}


@pytest.mark.parametrize("step", MOMENTS)
def test_a_run_killed_outside_training(
    prefloop: Forks, prefect_server, finished: Path, tmp_path: Path, step: str
) -> None:
    """What is killed in training is in `test_kill.py`."""
    prefect_server.start()
    root = fresh(finished, tmp_path / "project", step)
    found = kill_and_run_again(prefloop, finished, root, lambda running: running.until(lambda: MOMENTS[step](root)))
    assert found == step


@pytest.fixture(scope="module")
def seconds(
    prefloop: Forks, prefect_server, finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """How long each step of a run takes that nobody disturbs."""
    prefect_server.start()
    root = fresh(finished, tmp_path_factory.mktemp("undisturbed") / "project", "data")
    running, last, found = prefloop(root, *RUN), time.monotonic(), dict.fromkeys(STEPS, 0.0)
    while running.poll() is None:
        time.sleep(0.02)
        now = time.monotonic()
        found[step_of(root)] += now - last
        last = now
    running.ended_well()
    states.equal(root, finished)
    return found


@pytest.mark.every_fault
@pytest.mark.parametrize("seed", range(50))
def test_a_run_killed_at_a_random_moment(
    prefloop: Forks, finished: Path, seconds: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture, seed: int
) -> None:
    """Fifty moments, each step's turn in order; `-k 'random_moment and (7 or 8)'` runs some of them."""
    step, share = STEPS[seed % len(STEPS)], random.Random(seed).random()
    root = fresh(finished, tmp_path / "project", step)

    def moment(running: Command) -> None:
        running.until(lambda: STEPS.index(step_of(root)) >= STEPS.index(step))
        time.sleep(share * seconds[step])

    found = kill_and_run_again(prefloop, finished, root, moment)
    shutil.rmtree(root)
    with capsys.disabled():
        print(f"\n{seed + 1:>2} of 50: killed in {found}, {share:.0%} into {step}", end=" ", flush=True)
