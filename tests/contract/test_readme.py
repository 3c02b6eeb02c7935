"""Every command the README shows is run, word for word, in a project whose data set is small."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import tiny

README = (tiny.REPOSITORY / "README.md").read_text(encoding="utf-8")


def shown() -> list[str]:
    """The commands in the README's bash blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project that calls itself `reviews`, with a file of pairs for the README to add."""
    root = tiny.make_project(tmp_path_factory.mktemp("readme") / "project")
    (root / "recipes/tiny.yaml").rename(root / "recipes/reviews.yaml")
    recipe = (root / "recipes/reviews.yaml").read_text().replace("name: tiny", "name: reviews")
    (root / "recipes/reviews.yaml").write_text(recipe.replace("{name: reviews}", "{name: tiny}"))
    tiny.write_rows(tiny.preference_rows(300, seed=1), root / "pairs.jsonl")
    return root


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PYTHONPATH": str(tiny.REPOSITORY), "PATH": path}


def test_make_targets_exist() -> None:
    makefile = (tiny.REPOSITORY / "Makefile").read_text()
    targets = [command.split()[1] for command in shown() if command.startswith("make ")]
    assert targets == ["run", "test"]
    for target in targets:
        assert re.search(rf"^{target}: setup\n\t\$\(BIN\)/", makefile, flags=re.MULTILINE)


def test_the_commands_run_beside_the_ui_which_stops_when_it_is_told_to(reviews: Path) -> None:
    """One server for all commands, as somebody has it who leaves `prefloop ui` open."""
    assert "prefloop ui" in shown()
    ui = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "ui"], cwd=reviews, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert ui.stdout is not None
    said = [ui.stdout.readline() for _ in range(4)]
    children = psutil.Process(ui.pid).children(recursive=True)
    try:
        assert re.match(r"mlflow +http://127\.0\.0\.1:\d+/#/experiments", said[1]), said
        assert re.match(r"prefect +http://127\.0\.0\.1:\d+/runs\n", said[2]), said
        run_all(reviews)
    finally:
        ui.send_signal(signal.SIGINT)
        rest = ui.communicate(timeout=60)[0]
    assert "stopped" in rest
    assert children
    _, left = psutil.wait_procs(children, timeout=10)
    assert [child for child in left if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


def serve(project: Path, command: str) -> None:
    """A command that stays open until it is told to end."""
    running = subprocess.Popen(
        [sys.executable, "-u", "-m", "flows.cli", *shlex.split(command)[1:]],
        cwd=project,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    assert any("Ctrl-C ends it" in line for line in iter(running.stdout.readline, ""))
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=60)
    assert running.returncode in (0, 130)  # told before or after its loop had begun


def run_all(project: Path) -> None:
    """Every `prefloop` command of the README but the one that is open already."""
    commands = ["prefloop run recipes/reviews.yaml"]  # what `make run` runs
    commands += [c for c in shown() if c.startswith("prefloop ") and c != "prefloop ui"]
    assert len(commands) >= 7
    for command in commands:
        if command.startswith("prefloop serve"):
            serve(project, command)
            continue
        result = subprocess.run(
            [sys.executable, "-m", "flows.cli", *shlex.split(command)[1:]],
            cwd=project,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=900,
        )
        if "doctor" in command:  # says what this very machine lacks; here it must only speak
            assert "python" in result.stdout
            continue
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def test_every_prefloop_command_is_in_the_readme() -> None:
    from flows.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {"run", "compare", "retrain", "lineage"} <= names
    for name in names:
        assert f"prefloop {name}" in README


def test_every_data_command_is_in_the_data_readme() -> None:
    from flows.data import app

    told = (tiny.REPOSITORY / "data/README.md").read_text(encoding="utf-8")
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    for name in names:
        assert f"prefloop data {name}" in told, name
