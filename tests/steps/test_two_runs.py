"""Two runs of one project at once: the second waits for the device, and takes what the first has made."""

from __future__ import annotations

import io
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from steps.config import assigned, load
from steps.experiment import Experiment
from steps.run import execute


class Told(io.StringIO):
    """A console's file that says when something has been written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    def write(self, text: str) -> int:
        self.event.set()
        return super().write(text)


def test_of_two_runs_of_the_same_content_the_second_waits_and_reuses(finished: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(finished, tmp_path / "project", symlinks=True))
    recipe = assigned(load(root / "recipes/tiny.yaml"), {"policy.dpo.trainer.beta": 0.7})
    words, begun, launched = Told(), threading.Event(), []

    def begin(command: str, file: Any) -> Experiment:
        made = Experiment(recipe, root, Console(file=file, width=100), {"prefloop.command": command})
        list(made.plan())
        return made

    first, second = begin("recipes/a.yaml", io.StringIO()), begin("recipes/b.yaml", words)

    def slowly(partial: Path) -> None:
        launched.append(partial)
        begun.set()
        assert words.event.wait(60)  # until the second has been told that it waits
        execute(partial)

    first.launch = second.launch = slowly  # type: ignore[assignment]
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first.run, "policy")
        assert begun.wait(60)
        two = pool.submit(second.run, "policy")
        outcomes = one.result(120), two.result(120)
    assert [outcome.reused for outcome in outcomes] == [False, True]
    assert outcomes[0].artifact.digest == outcomes[1].artifact.digest
    assert len(launched) == 1
    assert "waits" in words.getvalue()
    assert "which `policy` of recipes/a.yaml (process" in " ".join(words.getvalue().split())
