"""A step in a process of its own: what comes back, and what is said when nothing does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from steps import launch
from steps.config import Launch
from steps.errors import DataError, Interrupted, PrefloopError, StepFailed, StepKilled
from steps.launch import Here, Process, last_lines, launcher, stop_requested, thread_environment

Failure = Callable[[str], PrefloopError]
REPOSITORY = Path(__file__).parents[2]

BUSY = 0.2  # seconds of a processor
WORK = (
    f"BUSY = {BUSY}"
    + """
print("imported, loudly")
import os, signal, sys, time
from pathlib import Path
from steps.errors import DataError, Interrupted
from steps.launch import stop_requested


def well(*, seed, out, tracker, **inputs):
    tracker.metrics({"seed": seed}, 1)
    print("all is well")
    return {"pid": os.getpid(), "parent": os.getppid(), "threads": os.environ["OMP_NUM_THREADS"]}


def killed(*, seed, out, tracker):
    print("nearly there", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def busy_and_killed(*, seed, out, tracker):
    end = time.process_time() + BUSY
    while time.process_time() < end:
        pass
    killed(seed=seed, out=out, tracker=tracker)


def raising(*, seed, out, tracker):
    raise DataError("no rows", where="here.parquet", have="nothing", then="add some")


def crashing(*, seed, out, tracker):
    return 1 / 0


def leaving(*, seed, out, tracker):
    print("goodbye", flush=True)
    os._exit(3)


def patient(*, seed, out, tracker):
    (out / "begun").write_text(str(os.getpid()))
    while not stop_requested():
        time.sleep(0.02)
    raise Interrupted("stopped on request", then="run again")


def deaf(*, seed, out, tracker):
    import subprocess
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "begun").write_text(f"{os.getpid()} {helper.pid}")
    print("hanging", flush=True)
    while True:
        time.sleep(0.02)
"""
)


@pytest.fixture
def partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and a module `faraway` that a child can import."""
    (tmp_path / "faraway.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    folder = tmp_path / "step.partial"
    folder.mkdir()
    return folder


def asked(partial: Path, name: str) -> Path:
    spec = {"step": "step", "function": f"faraway:{name}", "config": {}, "inputs": {}, "seed": 7}
    (partial / "spec.json").write_text(json.dumps(spec))
    return partial


@pytest.fixture
def process(partial: Path) -> Iterator[Process]:
    work = Process()
    yield work
    work.close()


@pytest.fixture
def failure(partial: Path, process: Process) -> Callable[[str], PrefloopError]:
    """What the launcher raises when a function of `faraway` is run."""

    def fail(name: str) -> PrefloopError:
        with pytest.raises(PrefloopError) as caught:
            process(asked(partial, name))
        return caught.value

    return fail


# -- in a process of its own -------------------------------------------------------------------------------------


def test_a_step_leaves_facts_journal_and_log(partial: Path) -> None:
    work = Process(threads=3)
    work(asked(partial, "well"))
    work.close()
    facts = json.loads((partial / "facts.json").read_text())
    assert facts["threads"] == "3"
    assert facts["pid"] != os.getpid()
    assert json.loads((partial / "journal.jsonl").read_text())["values"] == {"seed": 7.0}
    assert "all is well" in (partial / "log.txt").read_text()


def test_a_killed_step_says_so_with_the_end_of_its_log(partial: Path, failure: Failure) -> None:
    error = failure("killed")
    assert type(error) is StepKilled
    text = str(error)
    assert "SIGKILL" in text
    assert "memory" in text
    assert str(partial / "log.txt") in text
    assert "nearly there" in text
    assert "goes on at its newest checkpoint" in text


def test_what_killed_attempts_used_is_counted(partial: Path, failure: Failure) -> None:
    for attempt in (1, 2):
        failure("busy_and_killed")
        assert json.loads((partial / "usage.json").read_text())["cpu_seconds"] >= attempt * BUSY


def test_what_a_step_raises_is_raised_here(partial: Path, failure: Failure) -> None:
    error = failure("raising")
    assert type(error) is DataError
    assert (error.what, error.where, error.have, error.then) == ("no rows", "here.parquet", "nothing", "add some")


def test_a_crash_is_told_with_its_type_and_the_place_of_its_traceback(partial: Path, failure: Failure) -> None:
    error = failure("crashing")
    assert type(error) is StepFailed
    text = str(error)
    assert text.startswith("ZeroDivisionError: division by zero")
    assert str(partial / "log.txt") in text
    assert "return 1 / 0" in text


def test_a_step_that_leaves_without_a_word_is_told_with_its_status(partial: Path, failure: Failure) -> None:
    error = failure("leaving")
    assert type(error) is StepFailed
    assert "ended with status 3" in str(error)
    assert "goodbye" in str(error)


# -- a step that takes too long ----------------------------------------------------------------------------------


def timed_out(partial: Path, name: str, seconds: float) -> StepFailed:
    work = Process(timeout=seconds)
    with pytest.raises(StepFailed) as caught:
        work(asked(partial, name))
    work.close()
    return caught.value


def test_a_step_out_of_time_is_asked_to_checkpoint_and_end(partial: Path) -> None:
    error = timed_out(partial, "patient", 1.0)
    assert type(error) is StepFailed  # not Interrupted, which nobody asked for, nor StepKilled, which is tried again
    assert str(error).startswith("the step took longer than the 1 s it may, and its process was ended")
    assert "goes on at its newest checkpoint" in error.then
    assert "launch.timeout" in error.then
    assert not psutil.pid_exists(int((partial / "begun").read_text()))
    written = json.loads((partial / "error.json").read_text())
    assert written["what"] == "stopped on request"  # it had the time to say so


def test_a_hanging_step_is_killed_with_what_it_started(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.3)
    error = timed_out(partial, "deaf", 2.0)
    assert "longer than the 2 s" in str(error)
    assert "hanging" in error.have
    for pid in map(int, (partial / "begun").read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_step_within_its_time_is_left_alone(partial: Path) -> None:
    work = Process(timeout=600)
    work(asked(partial, "well"))
    work.close()
    assert (partial / "facts.json").is_file()


def test_an_error_of_an_earlier_try_is_not_taken_for_that_of_this_one(
    partial: Path, process: Process, failure: Failure
) -> None:
    failure("raising")
    assert type(failure("killed")) is StepKilled
    process(asked(partial, "well"))
    assert not (partial / "error.json").exists()


def test_a_function_that_is_not_there_is_a_failed_step(partial: Path, failure: Failure) -> None:
    assert "AttributeError" in str(failure("nowhere"))


def test_steps_are_forked_from_one_process(partial: Path, process: Process) -> None:
    process(asked(partial, "well"))
    first = json.loads((partial / "facts.json").read_text())
    process(asked(partial, "well"))
    second = json.loads((partial / "facts.json").read_text())
    assert first["parent"] == second["parent"] != os.getpid()
    assert first["pid"] != second["pid"]


def test_modules_are_imported_ahead_and_a_missing_one_is_the_steps_own_matter(partial: Path, process: Process) -> None:
    process.prepare(["faraway", "nowhere.at.all"])
    process(asked(partial, "well"))
    assert (partial / "facts.json").is_file()


def test_an_interrupted_launch_asks_its_step_to_end_and_waits_for_it(partial: Path) -> None:
    script = f"""
from pathlib import Path
from steps.launch import Process
try:
    Process()(Path({str(partial)!r}))
except KeyboardInterrupt:
    print("interrupted")
"""
    asked(partial, "patient")
    running = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    wait_for(partial / "begun")
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=30)
    assert output == "interrupted\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((partial / "begun").read_text()), 0)
    assert json.loads((partial / "error.json").read_text())["kind"] == Interrupted.__name__


def test_a_step_dies_with_the_process_it_was_forked_from(partial: Path) -> None:
    process, told = Process(), []
    asked(partial, "patient")

    def run() -> None:
        try:
            process(partial)
        except StepKilled as error:
            told.append(error)

    running = threading.Thread(target=run)
    running.start()
    wait_for(partial / "begun")
    process._worker.kill()
    running.join(30)
    assert "SIGKILL" in str(told[0])
    with suppress(psutil.NoSuchProcess):
        orphan = psutil.Process(int((partial / "begun").read_text()))
        wait_until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)


def test_a_step_that_does_not_end_when_asked_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.2)
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    script = f"{ignore}; print('deaf', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "deaf\n"
    launch.end(child.pid, child)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()


def wait_for(file: Path) -> None:
    wait_until(lambda: file.is_file() and file.read_text())


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# -- around it ---------------------------------------------------------------------------------------------------


def test_the_recipe_chooses_the_launcher(partial: Path) -> None:
    assert isinstance(launcher(Launch(launcher="here")), Here)
    work = launcher(Launch(launcher="process", threads=2))
    work(asked(partial, "well"))
    assert json.loads((partial / "facts.json").read_text())["threads"] == "2"


def test_given_threads_stand_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    assert thread_environment(3)["OMP_NUM_THREADS"] == thread_environment(3)["MKL_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in thread_environment(None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert thread_environment(None)["OMP_NUM_THREADS"] == str(os.cpu_count())


def test_settings_somebody_made_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "OMP_WAIT_POLICY" not in thread_environment(None)
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert thread_environment(None)["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_last_lines_are_the_last_ones_indented(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("".join(f"line {number}\n" for number in range(20)) + "\n\n")
    assert last_lines(log, 2) == "line 18\n        line 19"
    assert last_lines(log).count("\n") == 11


def test_no_log_and_an_empty_log_are_told_apart(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "log.txt") == "no log"
    (tmp_path / "log.txt").write_text("\n \n")
    assert last_lines(tmp_path / "log.txt") == "an empty log"


def test_a_log_that_is_not_text_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_bytes(b"ok\n\xff\xfe end")
    assert last_lines(tmp_path / "log.txt").startswith("ok\n")


def test_nobody_has_asked_this_process_to_stop() -> None:
    assert not stop_requested()
