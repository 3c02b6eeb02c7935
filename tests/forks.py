"""`prefloop` without its imports: one process has done them all, and forks itself for every command.

Importing what a command and its steps need takes longer than the tiny recipe does. A command that was forked is a
process of its own that can be killed; its worker is forked from it, and a step from its worker, as ever. What a command
leaves behind when it is killed becomes a child of the process that forks, so that no orphan can hide.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

PATIENCE = 900  # seconds; what is waited for takes a few on an idle machine, and a hundred times as many on a busy one
BECOME_REAPER = 36  # Linux: PR_SET_CHILD_SUBREAPER
AHEAD = (
    *("flows.train", "flows.cli", "mlflow", "steps.charts", "steps.tracking", "steps.registry", "steps.worker"),
    *(f"steps.{step}" for step in ("base", "sft", "reward", "baseline", "dpo", "ppo", "evaluate", "gate")),
)


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What a condition becomes when it is something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


class Command:
    """A `prefloop` command that is running."""

    def __init__(self, pid: int, output: Path) -> None:
        self.pid, self.output = pid, output
        self.process = psutil.Process(pid)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with suppress(OSError, ValueError):
            self.returncode = int(self.output.with_suffix(".status").read_text())
        return self.returncode

    def wait(self, seconds: float = PATIENCE) -> int:
        wait_for(lambda: self.poll() is not None, seconds)
        assert self.returncode is not None
        return self.returncode

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for a moment in the command's life."""
        wait_for(lambda: condition() or self.poll() is not None)
        assert condition() or self.returncode is None, self.said()

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def ended_well(self) -> str:
        """What it said, once it has ended, which must be well."""
        assert self.wait() == 0, self.said()
        return self.said()

    def failed(self, status: int = 1) -> str:
        assert self.wait() == status, self.said()
        return self.said()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9 of the command alone: what it started should follow by itself."""
        with suppress(psutil.NoSuchProcess):
            self.signal(signal.SIGKILL)
        self.wait()

    def below(self) -> list[psutil.Process]:
        return self.process.children(recursive=True)

    def worker(self) -> psutil.Process:
        """The process that forks the command's steps."""
        return next(process for process in self.process.children() if process.name() == psutil.Process(self.pid).name())

    def step(self) -> psutil.Process:
        """The process of the step that the command is running."""
        (step,) = self.worker().children()
        return step


class Forks:
    """Starts commands.

    Args:
        folder: for what commands print.
        environment: of all commands.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.count = folder, 0
        self.log = (folder / "forks.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def __call__(self, root: Path, *arguments: str, before: str = "", **environment: str) -> Command:
        """Start `prefloop ARGUMENTS` in a project.

        Args:
            before: Python to run in the command's process before it begins.
        """
        self.count += 1
        output = self.folder / f"{self.count}.txt"
        request = {"cwd": str(root), "argv": arguments, "env": environment, "output": str(output), "before": before}
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return Command(int(self.process.stdout.readline()), output)

    def alive(self) -> list[psutil.Process]:
        """All that commands have started and that has not ended."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def none_left(self, seconds: float = PATIENCE) -> None:
        """Wait until nothing that was started lives any more."""
        wait_for(lambda: not self.alive(), seconds)

    def close(self) -> None:
        for process in self.alive():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.log.close()


# -- inside ------------------------------------------------------------------------------------------------------


def serve() -> bool:
    """Fork for every line of standard input. True in a fork, which is to become a command."""
    for module in AHEAD:
        importlib.import_module(module)
    gc.freeze()
    ctypes.CDLL(None).prctl(BECOME_REAPER, 1, 0, 0, 0)
    running: dict[int, Path] = {}
    waiting = b""
    while True:
        ready = select.select([0], [], [], 0.05)[0]
        reap(running)
        if not ready:
            continue
        received = os.read(0, 1 << 16)  # not sys.stdin, whose buffer a fork would inherit
        if not received:
            return False
        *lines, waiting = (waiting + received).split(b"\n")
        for line in lines:
            request = json.loads(line)
            child = os.fork()
            if child == 0:
                become(request)
                return True
            running[child] = Path(request["output"])
            os.write(1, b"%d\n" % child)


def reap(running: dict[int, Path]) -> None:
    """Take note of what has ended, and write down how commands did."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if output := running.pop(ended[0], None):
                draft = output.with_suffix(".draft")
                draft.write_text(str(os.waitstatus_to_exitcode(ended[1])))
                draft.rename(output.with_suffix(".status"))


def become(request: dict[str, Any]) -> None:
    import steps.launch

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for mine, given in ((0, nothing), (1, output), (2, output)):
        os.dup2(given, mine)
    os.environ.update(request["env"])
    sys.argv = ["prefloop", *request["argv"]]
    steps.launch.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=forked_worker, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL
    )
    exec(request["before"], {})


def forked_worker(command: list[str], env: dict[str, str], **settings: Any) -> subprocess.Popen[str]:
    """The worker, as `Popen` would start it, but by a fork that goes on here."""

    def work() -> None:
        gc.freeze()  # what the command had open is closed below, and nobody shall close it again
        os.closerange(3, 4096)  # the pipe at which Popen waits for an exec among them
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        os.environ.update(env)
        status = 1
        try:
            sys.modules["steps.worker"].serve()
            status = 0
        finally:
            os._exit(status)

    return subprocess.Popen(command, env=env, preexec_fn=work, **settings)


if __name__ == "__main__" and serve():
    import flows.cli

    flows.cli.main()
