"""The two web interfaces, on loopback: MLflow for experiments, Prefect for runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from steps.errors import EnvironmentProblem
from steps.paths import Var, project_root
from steps.tracking import forwarder, tracking_uri

HOST = "127.0.0.1"
PORTS = {"mlflow": 5000, "prefect": 4200}
HEALTH = {"mlflow": "/health", "prefect": "/api/health"}
STATE = "ui.json"
# Where a person wants to begin; MLflow's front page is about traces of language-model calls.
PAGES = {"mlflow": "/#/experiments?workflowType=machine_learning", "prefect": "/runs"}


def prefect_environment(var: Var) -> dict[str, str]:
    """Settings Prefect reads on import: its home inside the project, no telemetry, no log lines on the terminal."""
    usual = {
        "PREFECT_HOME": str(var.folder("prefect")),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; `prefloop serve` calls a flow crashed that misses three
        "PREFECT_CLI_COLORS": "false",
    }
    return {name: value for name, value in usual.items() if name not in os.environ}


def create_databases(var: Var) -> None:
    """Create the two databases ahead of the first run, which would wait for them.

    Raises:
        EnvironmentProblem: Prefect's could not be created.
    """
    _ = forwarder(var).client
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    made = subprocess.run(command, env={**os.environ, **prefect_environment(var)}, capture_output=True, text=True)
    if made.returncode:
        raise EnvironmentProblem("Prefect's database cannot be created", where=str(var.path), have=made.stderr.strip())


def running(var: Var) -> dict[str, str]:
    """Addresses of the servers `prefloop ui` has running in this project, by name; those that answer."""
    try:
        addresses = json.loads((var.path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: address for name, address in addresses.items() if answers(address + HEALTH[name], 0.5)}


def mlflow_address(var: Var) -> str:
    """Where MLflow's pages are, or would be after `prefloop ui`."""
    uri = tracking_uri(var)
    return uri if uri.startswith("http") else running(var).get("mlflow", f"http://{HOST}:{PORTS['mlflow']}")


def start(var: Var, wanted: Sequence[str] = tuple(PORTS)) -> dict[str, tuple[str, subprocess.Popen]]:
    """Start both servers and wait until they answer; MLflow's only where tracking does not go to a server already.

    Args:
        wanted: names of the servers, when not both.

    Raises:
        EnvironmentProblem: one of them does not come up; nothing is left running.
    """
    sender = forwarder(var)
    shared = sender.uri.startswith("http")
    if not shared:
        _ = sender.client  # the database exists before any server opens it
    ports = {name: _free_port(port) for name, port in PORTS.items()}
    commands = {
        "mlflow": [
            *("-m", "mlflow", "server", "--host", HOST, "--port", str(ports["mlflow"]), "--workers", "1"),
            *("--backend-store-uri", tracking_uri(var)),
            *("--default-artifact-root", var.folder("mlflow-artifacts").as_uri()),
        ],
        "prefect": ["-m", "prefect", "server", "start", "--host", HOST, "--port", str(ports["prefect"])],
    }
    commands = {name: commands[name] for name in wanted if not (shared and name == "mlflow")}
    environment: Mapping[str, str] = {
        **os.environ,
        **prefect_environment(var),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    logs = var.folder("logs")
    servers: dict[str, tuple[str, subprocess.Popen]] = {}
    try:
        for name, command in commands.items():
            log = (logs / f"{name}.txt").open("ab")
            child = subprocess.Popen(
                [sys.executable, *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            log.close()
            servers[name] = (f"http://{HOST}:{ports[name]}", child)
        for name, (address, child) in servers.items():
            _wait_for(name, address + HEALTH[name], child, logs / f"{name}.txt")
    except BaseException:
        stop(servers, var)
        raise
    (var.path / STATE).write_text(json.dumps({name: address for name, (address, _) in servers.items()}), "utf-8")
    return servers


def stop(servers: Mapping[str, tuple[str, subprocess.Popen]], var: Var) -> None:
    """End both servers and all their workers."""
    (var.path / STATE).unlink(missing_ok=True)
    for _, child in servers.values():
        _signal(child, 15)
    for _, child in servers.values():
        with suppress(subprocess.TimeoutExpired):
            child.wait(10)
        _signal(child, 9)


def _signal(child: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise EnvironmentProblem("no free port on loopback", where=HOST)


def answers(url: str, timeout: float) -> bool:
    """Whether a server says that it is well."""
    try:
        with urlopen(url, timeout=timeout) as reply:  # noqa: S310 - loopback, from our own state file
            return reply.status == 200
    except (URLError, OSError, ValueError):
        return False


def _wait_for(name: str, url: str, child: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    from steps.launch import last_lines

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answers(url, 1):
            return
        if child.poll() is not None:
            break
        time.sleep(0.2)
    raise EnvironmentProblem(f"the {name} server does not come up", where=str(log), have=last_lines(log))


if __name__ == "__main__":
    create_databases(Var(project_root()))
