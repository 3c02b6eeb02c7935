"""A server dies while a run goes on: training does not notice, nothing is lost, and the next run ends as it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import states
from forks import Forks
from servers import MlflowServer
from states import PROCESS, RECIPE, RUN, digest, training_step


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "tracking")
    server.start()
    yield server
    server.kill()


@pytest.mark.every_fault
def test_mlflow_dies_in_training_and_does_not_return_before_the_next_run(
    finished: Path, prefloop: Forks, prefect_server, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    prefect_server.start()
    root = states.without_var(finished, tmp_path / "project")
    address = {"MLFLOW_TRACKING_URI": mlflow_server.address}
    running = prefloop(root, *RUN, **address)
    running.until(lambda: training_step(root, "sft") >= 1)
    mlflow_server.kill()
    said = running.failed()
    assert "the model registry cannot be reached" in said
    assert mlflow_server.address in said
    assert "run again: finished steps are reused" in said
    assert digest(root, "policy") == digest(finished, "policy")  # training was done all the same
    mlflow_server.start()
    prefloop(root, *RUN, **address).ended_well()
    assert states.artifacts(root) == states.artifacts(finished)
    assert states.curves(root, mlflow_server.database) == states.curves(finished)


@pytest.mark.every_fault
def test_mlflow_dies_in_training_and_returns_before_its_end(
    finished: Path, prefloop: Forks, prefect_server, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """It is back when the evaluation asks for the champion, sooner than prefloop would try it again by itself."""
    prefect_server.start()
    root = states.without_var(finished, tmp_path / "project")
    wait = "import steps.experiment as e; find = e.Experiment._find_champion\n"
    wait += "def late(self):\n    (self.root / 'asks').touch()\n"
    wait += "    while (self.root / 'asks').exists(): __import__('time').sleep(0.05)\n"
    wait += "    find(self)\ne.Experiment._find_champion = late"
    running = prefloop(root, *RUN, before=wait, MLFLOW_TRACKING_URI=mlflow_server.address)
    running.until(lambda: training_step(root, "reward") >= 1)
    mlflow_server.kill()
    running.until(lambda: (root / "asks").exists())
    mlflow_server.start()
    (root / "asks").unlink()
    running.ended_well()
    assert states.artifacts(root) == states.artifacts(finished)
    assert states.curves(root, mlflow_server.database) == states.curves(finished)


@pytest.mark.every_fault
def test_the_prefect_server_dies_in_training_and_the_next_run_goes_on(
    finished: Path, prefloop: Forks, prefect_server, tmp_path: Path
) -> None:
    prefect_server.start()
    root = states.without_var(finished, tmp_path / "project")
    running = prefloop(root, *RUN)
    running.until(lambda: training_step(root, "sft") >= 1)
    prefect_server.kill()
    said = running.failed()
    assert "the Prefect server is gone" in said
    assert f"next  `prefloop run {RECIPE} {' '.join(PROCESS)}` again" in said
    prefloop.none_left()
    prefect_server.start()
    prefloop(root, *RUN).ended_well()
    states.equal(root, finished)
