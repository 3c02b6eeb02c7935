"""A project of sixty rows with git and DVC, whose stages can be stopped just before a table takes its place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import tiny
from click.testing import Result
from typer.testing import CliRunner

from flows.cli import app
from steps.errors import PrefloopError

REGISTRY = """\
# Our datasets.
datasets:
  tiny:   # pairs of kind and unkind words
    format: preferences
    source:
      files:
        pairs: pairs.jsonl  # the first batch
    # Half of the prompts are for training.
    split: {seed: 0, demonstrations: 0.2, preferences: 0.35, held_out: 0.25}
"""
HOOK = "    exec(__import__('os').environ.get('BEFORE_TABLE', ''))\n    draft.replace(path)\n"
WORDS = ("rain", "bread", "wheel", "music", "paint", "chess", "river", "lamps", "boats", "stone", "cloud", "tiger")


def rows(prompts: int, name: str = "") -> list[dict]:
    """Two different pairs a prompt; the longer side is chosen in half of them."""
    found = []
    for number in range(prompts):
        word, other = WORDS[number % 12], WORDS[(number // 12 + number + 5) % 12]
        for verb in ("likes", "hates"):
            sides = [f"{word} {verb} {other} {number} well", f"{other} {verb} {word} {number}"]
            found.append(
                {"prompt": f"{name}{number}: ", "chosen": sides[number % 2], "rejected": sides[1 - number % 2]}
            )
    return found


def make_project(root: Path) -> Path:
    """The project with its data prepared and committed, and a DVC remote beside it."""
    for name in ("dvc.yaml", ".dvc/config", ".gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tiny.REPOSITORY / name, root / name)
    shutil.copytree(tiny.REPOSITORY / "steps", root / "steps", ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("rows", "datasets"):
        path = root / "steps" / f"{module}.py"
        path.write_text(path.read_text().replace("    draft.replace(path)\n", HOOK))
    tiny.write_rows(rows(30), root / "data/tiny/source/pairs.jsonl")
    (root / "data/datasets.yaml").write_text(REGISTRY, encoding="utf-8")
    git(root, "init", "-q", "-b", "main")
    git(root, "config", "user.name", "Ada")
    git(root, "config", "user.email", "ada@example.org")
    run(root, sys.executable, "-m", "dvc", "repro", "-q", "split@tiny")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "prepared")
    return root


def run(root: Path, *command: str, **environment: str) -> str:
    """Output of a command that must succeed."""
    result = attempt(root, *command, **environment)
    assert result.returncode == 0, result.stdout
    return result.stdout


def attempt(root: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=root,
        env=surroundings(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def surroundings(**environment: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(tiny.REPOSITORY), "COLUMNS": "100", **environment}


def git(root: Path, *arguments: str) -> str:
    return run(root, "git", *arguments)


def dvc(root: Path, *arguments: str, **environment: str) -> str:
    return run(root, sys.executable, "-m", "dvc", *arguments, **environment)


def data(root: Path, *arguments: object) -> str:
    """`prefloop data` that must succeed."""
    result = _prefloop_data(root, *arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def refused(root: Path, *arguments: object) -> str:
    """What `prefloop data` says when it must fail."""
    result = _prefloop_data(root, *arguments)
    assert isinstance(result.exception, PrefloopError), result.output + str(result.exception)
    return str(result.exception)


def _prefloop_data(root: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)], env={"PREFLOOP_ROOT": str(root)})


def contents(root: Path) -> dict[str, bytes]:
    """Every file of the project that a version is made of, by name."""
    kept = [root / "dvc.lock", *(root / "data").rglob("*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in kept if path.is_file()}
