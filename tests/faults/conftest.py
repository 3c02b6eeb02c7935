"""What fault tests share: a way to start commands without waiting for their imports."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
from forks import Forks, wait_for

from steps.tracking import quiet_environment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(address, timeout=2) as reply:
        return reply.status == 200
    return False


class PrefectServer:
    """One for all flows of the suite, started when the first of them comes."""

    def __init__(self, home: Path) -> None:
        self.port, self.process = free_port(), None
        self.environment = {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        }

    def start(self) -> None:
        import os

        if self.process is None:
            command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                env={**os.environ, **self.environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        wait_for(lambda: answers(f"http://127.0.0.1:{self.port}/api/health"))

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(60)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def prefloop(tmp_path_factory: pytest.TempPathFactory, prefect_server: PrefectServer) -> Iterator[Forks]:
    """Starts `prefloop` commands; flows need `prefect_server.start()` first."""
    quiet_environment()
    paths = {"PYTHONPATH": str(tiny.REPOSITORY), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    forks = Forks(tmp_path_factory.mktemp("commands"), {**prefect_server.environment, **paths})
    yield forks
    forks.close()
