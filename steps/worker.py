"""Where model steps run: `python -m steps.worker` forks a process for each.

Importing torch, transformers, TRL and PEFT takes as long as a short training. It is done once, here; a step is a fork
that finds them in memory and ends with all that it took. `python -m steps.worker PARTIAL` runs one step and no more.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from steps import usage
from steps.errors import write_error
from steps.launch import obey_parent
from steps.run import execute
from steps.usage import Usage


def serve() -> None:
    """Answer the JSON lines of standard input until it ends, and take the running step along when it does.

    `{"import": [MODULE, …]}` makes later steps start sooner. `{"run": PARTIAL, "import": […]}` runs the step whose spec
    lies there; the answer is its process id on a line of standard output, and when it is over its exit status.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # whatever a library prints goes to a log
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "run" in request:
            log = os.open(Path(request["run"], "log.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.close(log)
        for module in request["import"]:
            with suppress(Exception):  # the step will meet it again, and say so
                importlib.import_module(module)
        if "run" in request:
            child, alive = fork(Path(request["run"]))
            print(child, file=answers)
            status = wait_for(child, Path(request["run"]))
            os.close(alive)
            print(status, file=answers)


def fork(partial: Path) -> tuple[int, int]:
    """Start a step; returns its process id, and a descriptor it dies with when it closes."""
    watched, alive = os.pipe()
    gc.freeze()  # trainers look for garbage several times, and need not do so in all that was imported
    child = os.fork()
    if child:
        os.close(watched)
        return child, alive
    os.dup2(watched, 0)
    os.close(watched)
    os.close(alive)
    if _cuda_is_lost():
        os.execv(sys.executable, [sys.executable, "-m", "steps.worker", str(partial)])  # noqa: S606
    status = work(partial)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait_for(child: int, partial: Path, period: float = 0.05) -> int:
    """The exit status of a step, negative for a signal; the step is killed when nobody is left to be told.

    One that a signal ended could not write down what it had used; the kernel knows.
    """
    ended, nobody = 0, False
    while not ended:
        ended, status, used = os.wait4(child, 0 if nobody else os.WNOHANG)
        if not ended and select.select([0], [], [], period)[0]:
            os.kill(child, 9)
            nobody = True
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        usage.add(partial, Usage.of(used))
    if nobody:
        sys.exit(1)
    return code


def _cuda_is_lost() -> bool:
    """Whether something that was imported opened the CUDA driver, which a fork cannot use."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda._is_in_bad_fork()


def work(partial: Path) -> int:
    """Run a step in this process; what it raises goes to a file. The exit status."""
    obey_parent()
    try:
        execute(partial)
    except BaseException as error:
        traceback.print_exc()
        write_error(error, partial / "error.json")
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(work(Path(sys.argv[1])))
    serve()
