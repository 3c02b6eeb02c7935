"""What fault tests share: a way to start commands without waiting for their imports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tiny_data
from forks import Forks
from servers import PrefectServer

from steps.tracking import quiet_environment

pytest.register_assert_rewrite("states")  # so that a failure there says what differs


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def prefloop(tmp_path_factory: pytest.TempPathFactory, prefect_server: PrefectServer) -> Iterator[Forks]:
    """Starts `prefloop` commands; flows need `prefect_server.start()` first."""
    quiet_environment()
    paths = {"PYTHONPATH": str(tiny.REPOSITORY), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    forks = Forks(tmp_path_factory.mktemp("commands"), {**prefect_server.environment, **paths})
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of sixty rows whose data are prepared; copy it."""
    return tiny_data.make_project(tmp_path_factory.mktemp("prepared") / "project")
