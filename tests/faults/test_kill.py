"""kill -9 at any moment: the next run takes up where the step was, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import tiny

COMMAND = [sys.executable, "-m", "flows.cli", "step"]
PROCESS = ("--set", "launch.launcher=process")
PPO = ("--set", "policy.method=ppo", "--set", "policy.ppo.rollouts=6")  # of four updates each
PATIENCE = 300  # seconds; what is waited for takes a few on an idle machine, and an import alone a minute on a busy one


def copy_without(finished: Path, to: Path, step: str) -> Path:
    """A copy of the finished project in which one step has yet to be done."""
    shutil.copytree(finished, to, symlinks=True)
    for folder in (to / "var/store").glob(f"{step}-*"):
        shutil.rmtree(folder)
    return to


def start(root: Path, step: str, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY)}
    return subprocess.Popen(
        [*COMMAND, step, "recipes/tiny.yaml", *PROCESS, *more],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def training_step(root: Path, step: str) -> int:
    """How far the step in the partial directory is; −1 before it trains."""
    for path in (root / "var/store").glob(f"{step}-*.partial/progress.json"):
        try:
            state = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        return state["done"] if state["phase"] == "training" else -1
    return -1


def digest(root: Path, step: str) -> str:
    manifest = next((root / "var/store").glob(f"{step}-*/manifest.json"))
    return json.loads(manifest.read_text())["digest"]


def kill_everything(process: subprocess.Popen) -> list[psutil.Process]:
    """kill -9 of the command alone; returns its children, who should follow by themselves."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return children


@pytest.mark.parametrize(("step", "at"), [("sft", 4), ("reward", 5), ("policy", 7)])
def test_killed_in_training_and_resumed_gives_the_same_bytes(
    finished: Path, tmp_path: Path, step: str, at: int
) -> None:
    root = copy_without(finished, tmp_path / "project", step)
    running = start(root, step)
    wait_for(lambda: training_step(root, step) >= at)
    orphans = kill_everything(running)
    _, alive = psutil.wait_procs(orphans, timeout=PATIENCE)
    assert alive == []
    again = start(root, step)
    output, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, output
    assert digest(root, step) == digest(finished, step)
    assert not list((root / "var/store").glob("*.partial"))


@pytest.fixture(scope="module")
def straight(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """Digest and seconds of a policy by PPO that nobody disturbed."""
    root = copy_without(finished, tmp_path_factory.mktemp("straight") / "project", "policy")
    begun = time.monotonic()
    output, _ = (running := start(root, "policy", *PPO)).communicate(timeout=PATIENCE)
    assert running.returncode == 0, output
    return digest(root, "policy"), time.monotonic() - begun


def killed_and_run_again(finished: Path, root: Path, moment: Callable[[Path], None]) -> str:
    """Digest of a policy by PPO that was killed at a moment and run again."""
    copy_without(finished, root, "policy")
    running = start(root, "policy", *PPO)
    moment(root)
    orphans = kill_everything(running) if running.poll() is None else []
    _, alive = psutil.wait_procs(orphans, timeout=PATIENCE)
    assert alive == []
    output, _ = (again := start(root, "policy", *PPO)).communicate(timeout=PATIENCE)
    assert again.returncode == 0, output
    assert not list((root / "var/store").glob("*.partial"))
    return digest(root, "policy")


def test_ppo_killed_in_a_rollout_ends_with_the_same_bytes(
    finished: Path, tmp_path: Path, straight: tuple[str, float]
) -> None:
    """Step 10 lies in the third rollout."""
    moment = lambda root: wait_for(lambda: training_step(root, "policy") >= 10)  # noqa: E731
    assert killed_and_run_again(finished, tmp_path / "project", moment) == straight[0]


def forked(running: subprocess.Popen) -> psutil.Process:
    """The process of the step that a command is running."""
    below = psutil.Process(running.pid).children(recursive=True)
    workers = [process for process in below if "steps.worker" in " ".join(process.cmdline())]
    (child,) = (process for process in workers if process.ppid() in {worker.pid for worker in workers})
    return child


def test_ppo_told_to_stop_leaves_a_checkpoint_and_ends_with_the_same_bytes(
    finished: Path, tmp_path: Path, straight: tuple[str, float]
) -> None:
    """SIGTERM inside the second rollout, whose start is on disk: nothing is waited for."""
    root = copy_without(finished, tmp_path / "project", "policy")
    running = start(root, "policy", *PPO)
    wait_for(lambda: training_step(root, "policy") >= 5)
    forked(running).send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130, output
    assert "stopped on request" in output
    (said,) = re.findall(r"a checkpoint at step (\d+) of 24", output)
    partial = next((root / "var/store").glob("policy-*.partial"))
    assert int(said) % 4 == 0
    assert (partial / "checkpoints" / f"checkpoint-{said}" / "critic.safetensors").is_file()
    output, _ = (again := start(root, "policy", *PPO)).communicate(timeout=PATIENCE)
    assert again.returncode == 0, output
    assert digest(root, "policy") == straight[0]


@pytest.mark.every_fault
@pytest.mark.parametrize("seed", range(20))
def test_ppo_killed_at_a_random_moment(finished: Path, tmp_path: Path, straight: tuple[str, float], seed: int) -> None:
    moment = random.Random(seed).uniform(0.5, straight[1])
    found = killed_and_run_again(finished, tmp_path / "project", lambda root: time.sleep(moment))
    assert found == straight[0]


@pytest.mark.every_fault
@pytest.mark.parametrize("seed", range(12))
def test_killed_at_a_random_moment(finished: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    step = draw.choice(["base", "sft", "baseline", "reward", "policy", "evaluate", "gate"])
    root = copy_without(finished, tmp_path / "project", step)
    running = start(root, step)
    time.sleep(draw.uniform(0.5, 14))
    if running.poll() is None:
        kill_everything(running)
    again = start(root, step)
    output, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, output
    assert digest(root, step) == digest(finished, step)


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(finished: Path, tmp_path: Path) -> None:
    root = copy_without(finished, tmp_path / "project", "policy")
    long = (part for key in ("max_steps", "save_steps") for part in ("--set", f"policy.dpo.trainer.{key}=2000"))
    running = start(root, "policy", *long)
    wait_for(lambda: training_step(root, "policy") >= 1)
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=PATIENCE)
    assert running.returncode == 130, output
    assert "goes on at the newest checkpoint" in output
    partial = next((root / "var/store").glob("policy-*.partial"))
    assert list((partial / "checkpoints").glob("checkpoint-*/trainer_state.json"))


@pytest.mark.parametrize("victim", ["the worker", "the step it forked"])
def test_a_step_killed_alone_is_a_failed_step_with_a_way_out(finished: Path, tmp_path: Path, victim: str) -> None:
    root = copy_without(finished, tmp_path / "project", "reward")
    running = start(root, "reward")
    wait_for(lambda: training_step(root, "reward") >= 1)
    step = forked(running)
    (step.parent() if victim == "the worker" else step).kill()
    output, _ = running.communicate(timeout=PATIENCE)
    assert running.returncode == 1
    assert "was killed (SIGKILL" in output
    assert "goes on at its newest checkpoint" in output


def test_a_truncated_checkpoint_is_not_resumed_from(finished: Path, tmp_path: Path) -> None:
    root = copy_without(finished, tmp_path / "project", "policy")
    running = start(root, "policy")
    wait_for(lambda: training_step(root, "policy") >= 7)
    kill_everything(running)
    partial = next((root / "var/store").glob("policy-*.partial"))
    written = (partial / "checkpoints").glob("checkpoint-*/adapter_model.safetensors")
    weights = max(written, key=lambda path: int(path.parent.name.split("-")[1]))
    weights.write_bytes(weights.read_bytes()[:100])
    again = start(root, "policy")
    output, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, output
    assert digest(root, "policy") == digest(finished, "policy")


def test_a_dead_tracking_server_costs_nothing_but_a_later_delivery(finished: Path, tmp_path: Path) -> None:
    root = copy_without(finished, tmp_path / "project", "sft")
    environment = {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    environment |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
    command = [*COMMAND, "sft", "recipes/tiny.yaml"]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert digest(root, "sft") == digest(finished, "sft")
    journal = next((root / "var/store").glob("sft-*/journal.jsonl")).read_text()
    assert '"loss"' in journal
