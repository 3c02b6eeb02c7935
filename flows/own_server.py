"""The Prefect server a command starts for itself, where none runs: out of the reach of Ctrl-C.

A terminal interrupts all processes of its foreground group. A command that is interrupted still has to tell its server
how the run ended, so the server must not be among them; it ends with the command.
"""

from __future__ import annotations

import functools
import subprocess
from typing import Any

from prefect.server.api import server


class _Apart:
    """The module `subprocess`, whose processes get sessions of their own."""

    Popen = staticmethod(functools.partial(subprocess.Popen, start_new_session=True))

    def __getattr__(self, name: str) -> Any:
        return getattr(subprocess, name)


def keep_apart() -> None:
    """From now on Prefect starts its server in a session of its own."""
    server.subprocess = _Apart()  # type: ignore[assignment]
