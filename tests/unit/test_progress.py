"""What a log file gets to see of a step that works."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from steps.progress import _lines


class Looks:
    """Stands in for the event that ends the watching; before each look the step is one state further."""

    def __init__(self, folder: Path, states: list[tuple[str, int]]) -> None:
        self.folder, self.states = folder, states

    def wait(self, period: float) -> bool:
        if not self.states:
            return True
        phase, done = self.states.pop(0)
        state = {"phase": phase, "done": done, "total": 9, "values": {"loss": 0.5}}
        (self.folder / "progress.json").write_text(json.dumps(state))
        return False


def lines(folder: Path, states: list[tuple[str, int]], between: float) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    _lines("sft", folder, console, Looks(folder, states), lambda: None, 0.0, between)
    return console.file.getvalue().splitlines()


def test_a_log_gets_a_line_a_phase_and_now_and_then_how_far_it_is_but_none_twice(tmp_path: Path) -> None:
    states = [("training", 0), ("training", 0), ("training", 3), ("training", 3), ("held-out", 3), ("held-out", 3)]
    said = ["sft: training 0/9  loss 0.500", "sft: training 3/9  loss 0.500", "sft: held-out 3/9  loss 0.500"]
    assert lines(tmp_path, list(states), between=-1.0) == said
    assert lines(tmp_path, list(states), between=1e6) == [said[0], said[2]]
