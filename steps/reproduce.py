"""Does a finished run come out again? Its code, data and recipe of then, run anew into a store of their own.

The commit is checked out in a git work tree of its own, the tables are fetched by the md5s the run wrote down, and
every step runs in a process whose code is that checked-out one (`steps.repeat`). Then each artifact is held against the
manifest of then (`steps.sameness`).

Nothing of the project changes: no model is registered, no run is logged, the store and the tables stay as they are. All
that is written lies below `var/reproduce` and is removed at the end, however that comes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from steps import provenance, registry, repeat, versions
from steps.errors import EnvironmentProblem, PrefloopError, StepFailed, did_you_mean
from steps.launch import last_lines, thread_environment
from steps.paths import Var
from steps.recorded import Original
from steps.sameness import Result, StepNow, compared, judged
from steps.tracking import Forwarder

PLACE = "reproduce"  # below var/
_ADAPTERS = ("champion", "start")  # inputs of a step that are adapters of an earlier run


def wanted_steps(then: Original, steps: Sequence[str] = (), until: str = "") -> list[str]:
    """The steps to run again: all that were written down, or those named, or those up to one.

    Raises:
        PrefloopError: a name that is no step of that run.
    """
    known = list(then.steps)
    for name in [*steps, *([until] if until else [])]:
        if name not in known:
            raise PrefloopError(f"{then.run} has no step '{name}'", have=did_you_mean(name, known))
    chosen = known[: known.index(until) + 1] if until else known
    return [name for name in chosen if name in steps or not steps]


def reproduce(
    then: Original,
    root: Path,
    forwarder: Forwarder,
    steps: Sequence[str] = (),
    until: str = "",
    threads: int | None = None,
    tell: Callable[[str | StepNow], None] = lambda said: None,
) -> Result:
    """Run a run again and hold each of its steps against what was written down.

    Args:
        steps, until: which steps; all when neither is given. Those before them run too.
        threads: how many a step may use; as many as then, when not given.
        tell: is told what is done next, and each step once it is compared.

    Raises:
        PrefloopError: something it needs is gone, or a step failed.
    """
    wanted, root = wanted_steps(then, steps, until), root.resolve()
    with _workplace(root) as place:
        tell(f"checking out {then.commit[:12]}")
        tree = _check_out(then.commit, root, place)
        tell(f"fetching the tables of {then.data}")
        tables = versions.fetch(then.data, root, then.revision, place / "tables", [f"{t}.parquet" for t in then.tables])
        (place / "recipe.yaml").write_text(then.recipe, encoding="utf-8")
        verdicts = Var(root).path / "verdicts"
        if verdicts.is_dir():  # what a judge that costs something said then
            shutil.copytree(verdicts, Var(tree).path / "verdicts")
        job = {
            "tree": str(tree),
            "project": str(root),
            "recipe": str(place / "recipe.yaml"),
            "store": str(place / "store"),
            "tables": {f"data/{t}": [str(tables[f"{t}.parquet"]), md5] for t, md5 in then.tables.items()},
            "adapters": _adapters(then, wanted, place, forwarder),
            "steps": wanted,
        }
        count = threads or _threads_of(then)
        done: list[StepNow] = []
        for answer in _answers(job, place, tree, count, tell):
            done.append(compared(then, answer, done, _here(answer, count)))
            tell(done[-1])
    return judged(then, done)


def _threads_of(then: Original) -> int:
    known = [step.surroundings["threads"] for step in then.steps.values() if "threads" in step.surroundings]
    return int(known[0]) if known else os.cpu_count() or 1


def _here(answer: Mapping[str, Any], threads: int) -> dict[str, str]:
    hardware = provenance.hardware()
    return {
        "libraries": ", ".join(f"{name} {version}" for name, version in answer["libraries"].items()),
        "processor": hardware["processor"],
        "architecture": platform.machine(),
        "gpus": hardware["gpus"],
        "threads": str(threads),
    }


def _adapters(then: Original, wanted: Iterable[str], place: Path, forwarder: Forwarder) -> dict[str, list[str]]:
    """The champion that the evaluation met and the adapter that training began at, fetched from the registry.

    Raises:
        PrefloopError: the registry does not hold one of them any more.
    """
    found: dict[str, list[str]] = {}
    known = list(then.steps)
    for name in known[: max(map(known.index, wanted)) + 1]:
        for role in _ADAPTERS:
            if digest := then.steps[name].manifest.get("inputs", {}).get(role):
                models = registry.every_version(forwarder.client)
                held = [one for one in models if one.tags.get("policy_digest") == digest]
                if not held:
                    raise PrefloopError(
                        f"the adapter that the {name} step took as its {role} is not in the registry any more",
                        have=f"no version has the digest {digest[:12]}",
                        then=f"--until {_before(name, then)} leaves that step out",
                    )
                folder = registry.fetch_adapter(forwarder.client, held[0], place / "adapters")
                found[role] = [str(folder), digest]
    return found


def _before(name: str, then: Original) -> str:
    known = list(then.steps)
    return known[max(known.index(name) - 1, 0)]


def _answers(
    job: Mapping[str, Any], place: Path, tree: Path, threads: int, tell: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """What `steps.repeat` says of each step it has run, in a process of its own that does not outlive this one."""
    (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
    log = place / "log.txt"
    with log.open("wb") as said:
        child = subprocess.Popen(
            [sys.executable, "-P", str(Path(repeat.__file__).resolve()), str(place / "job.json")],
            cwd=tree,
            env=_environment(tree, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        assert child.stdout is not None
        try:
            tell("running the steps")
            for line in child.stdout:
                answer = json.loads(line)
                if "error" in answer:
                    given = answer["error"]
                    raise StepFailed(f"the run cannot be repeated: {given.pop('what')}", **given)
                yield answer
            if status := child.wait():
                raise StepFailed(f"running the steps again ended with status {status}", have=last_lines(log))
        finally:
            _end(child)


def _environment(tree: Path, threads: int) -> dict[str, str]:
    """The surroundings of a step of then: its code, its number of threads, and no way to this project's servers."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_TRACKING", "PYTHONPATH"))}
    count = str(threads)
    fixed = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    return {**kept, **thread_environment(threads), **fixed, "PYTHONPATH": str(tree), "PREFLOOP_ROOT": str(tree)}


def _end(child: subprocess.Popen[str]) -> None:
    """End a process and all it started."""
    import psutil

    with suppress(psutil.Error):
        family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(family, timeout=10)
    child.communicate()


# -- a place to work in ------------------------------------------------------------------------------------------


@contextmanager
def _workplace(root: Path) -> Iterator[Path]:
    """A folder that is gone at the end, with git's work tree in it; so are those of processes that were killed."""
    parent = Var(root).folder(PLACE)
    for folder in [path for path in parent.iterdir() if path.is_dir()]:
        lock = FileLock(parent / f"{folder.name}.lock")
        with suppress(Timeout), lock.acquire(timeout=0):
            _remove(folder, root)
    place = parent / f"{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    lock = FileLock(parent / f"{place.name}.lock")
    try:
        with lock:
            place.mkdir()
            try:
                yield place
            finally:
                _remove(place, root)
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
            parent.rmdir()  # unless another one is at work


def _remove(place: Path, root: Path) -> None:
    _git(["worktree", "remove", "--force", "--force", str(place / "tree")], root)
    shutil.rmtree(place, ignore_errors=True)
    _git(["worktree", "prune"], root)
    place.with_name(place.name + ".lock").unlink(missing_ok=True)


def _check_out(commit: str, root: Path, place: Path) -> Path:
    """The project at a commit, in a work tree of its own.

    Raises:
        EnvironmentProblem: git cannot.
    """
    tree = place / "tree"
    done = _git(["-c", "core.hooksPath=/dev/null", "worktree", "add", "--detach", "--quiet", str(tree), commit], root)
    if done.returncode:
        raise EnvironmentProblem(
            "git cannot check out the commit beside the project", where=commit, have=done.stderr.strip() or done.stdout
        )
    prefix = _git(["rev-parse", "--show-prefix"], root).stdout.strip()
    return tree / prefix


def _git(arguments: list[str], root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, encoding="utf-8")
