"""Where a step's work runs: here, or in a process of its own.

In its own process, memory comes back when the step is done, a crash or a kill is a failed step and not a dead flow,
and a step that hangs can be ended. Both launchers take the same partial directory and leave the same bytes in it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from steps.config import Launch
from steps.errors import StepFailed, StepKilled, read_error
from steps.run import execute

GRACE = 30.0  # seconds a step gets to write a checkpoint after SIGTERM


class Here:
    """Steps run in this process."""

    def prepare(self, modules: Sequence[str]) -> None:
        """Nothing to do ahead of time."""

    def __call__(self, partial: Path) -> None:
        execute(partial)


class Process:
    """Each step runs in a process of its own, forked from one that has imported what steps need (`steps.worker`).

    A step's output goes to `log.txt` beside its spec. Steps end when this process does: the worker holds one end of a
    pipe whose other end closes with us, however we die.

    Args:
        threads: threads a step may use; all cores when not given.
        timeout: seconds a step may take; no limit when not given.
    """

    def __init__(self, threads: int | None = None, timeout: float | None = None) -> None:
        self.threads, self.timeout = threads, timeout
        self._worker: subprocess.Popen[str] | None = None
        self._dismiss: Callable[[], object] = lambda: None

    def prepare(self, modules: Sequence[str]) -> None:
        """Begin to import what coming steps need, without waiting for it."""
        self._ask({"import": list(modules)})

    def __call__(self, partial: Path) -> None:
        """Run the step whose spec lies in `partial`.

        Raises:
            PrefloopError: what the step raised; `StepFailed` with the end of its log when it died without a word or
                was ended after `timeout`.
        """
        (partial / "error.json").unlink(missing_ok=True)
        log = partial / "log.txt"
        limit = Limit(self.timeout)
        status = self._run(partial, limit)
        if status == 0:
            return
        if limit.reached:
            raise StepFailed(
                f"the step took longer than the {self.timeout:g} s it may, and its process was ended",
                where=str(log),
                have=last_lines(log),
                then="run again: the step goes on at its newest checkpoint; or raise launch.timeout",
            )
        if error := read_error(partial / "error.json"):
            if type(error) is StepFailed and not error.where:
                error = StepFailed(error.what, where=str(log), have=last_lines(log))
            raise error
        killed = status < 0
        raise (StepKilled if killed else StepFailed)(
            f"the step's process {_how_it_ended(status)}",
            where=str(log),
            have=last_lines(log),
            then="run again: the step goes on at its newest checkpoint",
        )

    def close(self) -> None:
        """Let the worker go."""
        self._worker = None
        self._dismiss()

    def _run(self, partial: Path, limit: Limit) -> int:
        """The step's exit status, negative for a signal."""
        function = json.loads((partial / "spec.json").read_text(encoding="utf-8"))["function"]
        worker = self._ask({"import": [function.partition(":")[0]], "run": str(partial)})
        child = None
        try:
            child = int(worker.stdout.readline())  # type: ignore[union-attr]
            with limit.watching(child):
                return int(worker.stdout.readline())  # type: ignore[union-attr]
        except ValueError:  # the worker itself is gone
            if child is not None:
                _signal(child, signal.SIGKILL)
            status = worker.wait()
            self.close()
            return status or 1
        except BaseException as error:
            if child is not None:
                if isinstance(error, KeyboardInterrupt):
                    print("\nstopping: the step writes a checkpoint first", file=sys.stderr, flush=True)
                end(child, worker)
            self.close()
            raise

    def _ask(self, request: Mapping[str, object]) -> subprocess.Popen[str]:
        if self._worker is None or self._worker.poll() is not None:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "steps.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a step's own words go to its log
                text=True,
                env={**os.environ, **thread_environment(self.threads)},
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
            self._dismiss = weakref.finalize(self, _dismiss, self._worker)
        print(json.dumps(request), file=self._worker.stdin, flush=True)
        return self._worker


def launcher(config: Launch) -> Here | Process:
    """The launcher a recipe asks for."""
    return Here() if config.launcher == "here" else Process(config.threads, config.timeout)


class Limit:
    """The time a step may take: after it SIGTERM, for a checkpoint, and after `GRACE` seconds more SIGKILL.

    Attributes:
        reached: whether the step was asked to end.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.reached = seconds, False
        self._over = threading.Event()

    @contextmanager
    def watching(self, child: int) -> Iterator[None]:
        """While the body runs, the clock runs for the process of that number."""
        if self.seconds is None:
            yield
            return
        watch = threading.Thread(target=self._watch, args=(child,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            self._over.set()
            watch.join()

    def _watch(self, child: int) -> None:
        if self._over.wait(self.seconds):
            return
        self.reached = True
        _signal(child, signal.SIGTERM)
        if not self._over.wait(GRACE):
            _end_all(child)


def _end_all(child: int) -> None:
    """End a process that does not listen, and what it started."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(child).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    _signal(child, signal.SIGKILL)


def end(child: int, worker: subprocess.Popen[str]) -> None:
    """Ask a step to write a checkpoint and go; insist after `GRACE` seconds.

    Args:
        child: the step's process id.
        worker: says on its standard output when the step is over.
    """
    assert worker.stdout is not None
    _signal(child, signal.SIGTERM)
    if not select.select([worker.stdout], [], [], GRACE)[0]:
        _signal(child, signal.SIGKILL)
    worker.stdout.readline()


def _signal(child: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, number)


def _dismiss(worker: subprocess.Popen[str]) -> None:
    worker.terminate()  # it may be deep in an import
    worker.communicate()


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
