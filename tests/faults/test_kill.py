"""kill -9 at any moment: the next run takes up where the step was, and ends with the same bytes."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import PATIENCE, Command, Forks
from states import PROCESS, RECIPE, artifacts, copy_without, digest, folder, partial, training_step

PPO = ("--set", "policy.method=ppo", "--set", "policy.ppo.rollouts=6")  # of four updates each
LONG = tuple(part for key in ("max_steps", "save_steps") for part in ("--set", f"policy.dpo.trainer.{key}=2000"))


def start(prefloop: Forks, root: Path, step: str, *more: str, before: str = "") -> Command:
    return prefloop(root, "step", step, RECIPE, *PROCESS, *more, before=before)


def waits_at(step: int) -> str:
    """What makes a training wait to be killed once it has reported a step: all eight take a fraction of a second."""
    return f"""
import time
from steps.tracking import Spool
report = Spool.progress
def report_and_wait(self, phase, done, *rest):
    report(self, phase, done, *rest)
    if phase == "training" and done >= {step}:
        time.sleep({PATIENCE})
Spool.progress = report_and_wait
"""


@pytest.mark.parametrize(("step", "at"), [("sft", 4), ("reward", 5), ("policy", 7)])
def test_killed_in_training_and_resumed_gives_the_same_bytes(
    prefloop: Forks, finished: Path, tmp_path: Path, step: str, at: int
) -> None:
    root = copy_without(finished, tmp_path / "project", step)
    running = start(prefloop, root, step, before=waits_at(at))
    running.until(lambda: training_step(root, step) >= at)
    running.kill()
    prefloop.none_left()
    start(prefloop, root, step).ended_well()
    assert artifacts(root) == artifacts(finished)
    assert not list((root / "var/store").glob("*.partial"))


@pytest.fixture(scope="module")
def straight(finished: Path, prefloop: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, float]:
    """Digest and seconds of a policy by PPO that nobody disturbed."""
    root = copy_without(finished, tmp_path_factory.mktemp("straight") / "project", "policy")
    begun = time.monotonic()
    start(prefloop, root, "policy", *PPO).ended_well()
    return digest(root, "policy"), time.monotonic() - begun


def killed_and_run_again(prefloop: Forks, finished: Path, root: Path, moment: Callable[[Command], object]) -> str:
    """Digest of a policy by PPO that was killed at a moment and run again."""
    copy_without(finished, root, "policy")
    running = start(prefloop, root, "policy", *PPO)
    moment(running)
    running.kill()
    prefloop.none_left()
    start(prefloop, root, "policy", *PPO).ended_well()
    assert not list((root / "var/store").glob("*.partial"))
    return digest(root, "policy")


def test_ppo_killed_in_a_rollout_ends_with_the_same_bytes(
    prefloop: Forks, finished: Path, tmp_path: Path, straight: tuple[str, float]
) -> None:
    """Step 10 lies in the third rollout."""
    root = tmp_path / "project"

    def moment(running: Command) -> None:
        running.until(lambda: training_step(root, "policy") >= 10)

    assert killed_and_run_again(prefloop, finished, root, moment) == straight[0]


def test_ppo_told_to_stop_leaves_a_checkpoint_and_ends_with_the_same_bytes(
    prefloop: Forks, finished: Path, tmp_path: Path, straight: tuple[str, float]
) -> None:
    """SIGTERM inside the second rollout, whose start is on disk: nothing is waited for."""
    root = copy_without(finished, tmp_path / "project", "policy")
    running = start(prefloop, root, "policy", *PPO)
    running.until(lambda: training_step(root, "policy") >= 5)
    running.step().send_signal(signal.SIGTERM)
    output = running.failed(130)
    assert "stopped on request" in output
    (said,) = re.findall(r"a checkpoint at step (\d+) of 24", output)
    assert int(said) % 4 == 0
    assert (partial(root, "policy") / "checkpoints" / f"checkpoint-{said}" / "critic.safetensors").is_file()
    start(prefloop, root, "policy", *PPO).ended_well()
    assert digest(root, "policy") == straight[0]


@pytest.mark.every_fault
@pytest.mark.parametrize("seed", range(20))
def test_ppo_killed_at_a_random_moment(
    prefloop: Forks, finished: Path, tmp_path: Path, straight: tuple[str, float], seed: int
) -> None:
    moment = random.Random(seed).uniform(0, straight[1])
    found = killed_and_run_again(prefloop, finished, tmp_path / "project", lambda running: time.sleep(moment))
    assert found == straight[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_a_checkpoint_within_ten_seconds_and_says_how_to_go_on(
    prefloop: Forks, finished: Path, tmp_path: Path, number: signal.Signals
) -> None:
    root = copy_without(finished, tmp_path / "project", "policy")
    running = start(prefloop, root, "policy", *LONG)
    running.until(lambda: training_step(root, "policy") >= 1)
    asked, reached = time.time(), training_step(root, "policy")
    running.signal(number)
    assert "goes on at the newest checkpoint" in running.failed(130)
    prefloop.none_left()
    (state,) = partial(root, "policy").glob("checkpoints/checkpoint-*/trainer_state.json")
    assert int(state.parent.name.split("-")[1]) >= reached
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # a share of a core is all there is, when it is busy
    assert state.stat().st_mtime - asked < 10 * crowd


def test_a_run_told_to_stop_leaves_a_checkpoint_too(
    prefloop: Forks, prefect_server, finished: Path, tmp_path: Path
) -> None:
    """As a service manager ends it: SIGTERM to the flow's process, which passes it on to the step."""
    prefect_server.start()
    root = copy_without(finished, tmp_path / "project", "policy")
    running = prefloop(root, "run", RECIPE, *PROCESS, *LONG)
    running.until(lambda: training_step(root, "policy") >= 1)
    running.signal(signal.SIGTERM)
    assert running.wait() != 0
    assert "goes on at the newest checkpoint" in running.said()
    prefloop.none_left()
    assert list(partial(root, "policy").glob("checkpoints/checkpoint-*/trainer_state.json"))


def test_an_interrupt_from_a_terminal_reaches_the_run_and_not_its_prefect_server(
    prefloop: Forks, finished: Path, tmp_path: Path
) -> None:
    """Ctrl-C goes to every process of the foreground group. The run has to tell its server how it ended."""
    root = copy_without(finished, tmp_path / "project", "policy")
    running = prefloop(root, "run", RECIPE, *PROCESS, *LONG)
    running.until(lambda: training_step(root, "policy") >= 1)
    os.killpg(os.getpgid(running.pid), signal.SIGINT)
    said = running.failed(130)
    assert "stopping: the step writes a checkpoint first" in said
    assert "goes on at the newest checkpoint" in said and "server" not in said
    prefloop.none_left()


@pytest.mark.parametrize("victim", ["the worker", "the step it forked"])
def test_a_step_killed_alone_is_a_failed_step_with_a_way_out(
    prefloop: Forks, finished: Path, tmp_path: Path, victim: str
) -> None:
    root = copy_without(finished, tmp_path / "project", "reward")
    running = start(prefloop, root, "reward", before=waits_at(1))
    running.until(lambda: training_step(root, "reward") >= 1)
    (running.worker() if victim == "the worker" else running.step()).kill()
    output = running.failed()
    assert "was killed (SIGKILL" in output
    assert "goes on at its newest checkpoint" in output


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("file", [FILES[0], *(pytest.param(file, marks=pytest.mark.every_fault) for file in FILES[1:])])
def test_a_truncated_checkpoint_is_not_resumed_from(prefloop: Forks, finished: Path, tmp_path: Path, file: str) -> None:
    root = copy_without(finished, tmp_path / "project", "policy")
    running = start(prefloop, root, "policy", before=waits_at(7))
    running.until(lambda: training_step(root, "policy") >= 7)
    running.kill()
    prefloop.none_left()
    written = (partial(root, "policy") / "checkpoints").glob(f"checkpoint-*/{file}")
    newest = max(written, key=lambda path: int(path.parent.name.split("-")[1]))
    newest.write_bytes(newest.read_bytes()[:100])
    start(prefloop, root, "policy").ended_well()
    assert digest(root, "policy") == digest(finished, "policy")


def test_a_dead_tracking_server_costs_nothing_but_a_later_delivery(
    prefloop: Forks, finished: Path, tmp_path: Path
) -> None:
    root = copy_without(finished, tmp_path / "project", "sft")
    dead = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    prefloop(root, "step", "sft", RECIPE, **dead, MLFLOW_HTTP_REQUEST_TIMEOUT="1").ended_well()
    assert digest(root, "sft") == digest(finished, "sft")
    assert '"loss"' in (folder(root, "sft") / "journal.jsonl").read_text()
