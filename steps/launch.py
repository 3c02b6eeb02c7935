"""Where a step's work runs: here, or in a process of its own.

In its own process, memory comes back when the step is done, a crash or a kill is a failed step and not a dead flow,
and a step that hangs can be ended. Both launchers take the same partial directory and leave the same bytes in it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from steps.config import Launch
from steps.errors import StepFailed, StepKilled, read_error
from steps.run import Launcher, execute

GRACE = 30.0  # seconds a step gets to write a checkpoint after SIGTERM


def launcher(config: Launch) -> Launcher:
    """The launcher a recipe asks for."""
    if config.launcher == "here":
        return execute
    return lambda partial: process(partial, threads=config.threads)


def process(partial: Path, threads: int | None = None) -> None:
    """Run the step whose spec lies in `partial` as a child process.

    Its output goes to `log.txt` there. It ends when this process does: it holds one end of a pipe whose other end
    closes with us, however we die.

    Raises:
        PrefloopError: what the child raised; `StepFailed` with the end of its log when it died without a word.
    """
    (partial / "error.json").unlink(missing_ok=True)
    environment = {**os.environ, **thread_environment(threads)}
    with (partial / "log.txt").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "steps.worker", str(partial)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        try:
            status = child.wait()
        except BaseException:
            end(child)
            raise
        finally:
            if child.stdin:
                child.stdin.close()
    if status == 0:
        return
    log_path = partial / "log.txt"
    if error := read_error(partial / "error.json"):
        if type(error) is StepFailed and not error.where:
            error = StepFailed(error.what, where=str(log_path), have=last_lines(log_path))
        raise error
    killed = status < 0
    raise (StepKilled if killed else StepFailed)(
        f"the step's process {_how_it_ended(status)}",
        where=str(log_path),
        have=last_lines(log_path),
        then="run again: the step goes on at its newest checkpoint",
    )


def end(child: subprocess.Popen) -> None:
    """Ask a step to write a checkpoint and go; insist after `GRACE` seconds."""
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def thread_environment(threads: int | None) -> dict[str, str]:
    """Settings that OpenMP and the model libraries read once, on import.

    A passive wait policy lets a waiting thread sleep rather than spin, worth a factor of several on a busy machine.
    """
    count = str(threads or os.cpu_count() or 1)
    fixed = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count} if threads else {}
    usual = {
        "OMP_NUM_THREADS": count,
        "OMP_WAIT_POLICY": "PASSIVE",
        # glibc gives large blocks back at once; every tensor of logits would be mapped and zeroed anew.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
        "MALLOC_TOP_PAD_": str(256 * 2**20),
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "BITSANDBYTES_NOWELCOME": "1",
    }
    return {**{name: value for name, value in usual.items() if name not in os.environ}, **fixed}


def last_lines(path: Path, count: int = 12) -> str:
    """The end of a log, indented for an error message."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    except OSError:
        return "no log"
    return "\n        ".join(lines[-count:]) or "an empty log"


def _how_it_ended(status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", most often because memory ran out" if -status == signal.SIGKILL else ""
        return f"was killed ({name}{hint})"
    return f"ended with status {status}"


# -- inside the child --------------------------------------------------------------------------------------------

_stop = threading.Event()


def stop_requested() -> bool:
    """Whether this process was asked to write a checkpoint and end."""
    return _stop.is_set()


def obey_parent() -> None:
    """Take SIGTERM as a request to checkpoint and end, and die with the parent."""
    signal.signal(signal.SIGTERM, lambda *_: _stop.set())

    def wait_for_end() -> None:
        while os.read(0, 1024):  # not sys.stdin: its lock would be held when the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()
