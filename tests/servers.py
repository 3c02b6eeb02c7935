"""Servers on loopback that can be killed and started again over the same database."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

from forks import PATIENCE, wait_for


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(address, timeout=2) as reply:
        return reply.status == 200
    return False


class Server:
    """A server of a project.

    Attributes:
        command: what is run, with the Python that runs us.
        environment: what it needs beside ours.
        health: an address that answers when it is up.
    """

    command: list[str]
    environment: dict[str, str]
    health: str
    process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it unless it runs, and wait until it answers."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                env={**os.environ, **self.environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        wait_for(lambda: answers(self.health))

    def kill(self) -> None:
        """kill -9 of it and its workers."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(PATIENCE)
            self.process = None


class PrefectServer(Server):
    """One for all flows of the suite, started when the first of them comes."""

    def __init__(self, home: Path) -> None:
        port = free_port()
        self.environment = {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
            "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
            "PREFECT_CLIENT_MAX_RETRIES": "2",  # of a dead server; five take minutes
        }
        self.health = f"http://127.0.0.1:{port}/api/health"
        self.command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]


class MlflowServer(Server):
    """With a database and artifacts of its own, as `prefloop ui` starts it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        port = free_port()
        self.address, self.database = f"http://127.0.0.1:{port}", folder / "mlflow.db"
        self.environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.health = f"{self.address}/health"
        self.command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        self.command += ["--backend-store-uri", f"sqlite:///{self.database}"]
        self.command += ["--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts"]
