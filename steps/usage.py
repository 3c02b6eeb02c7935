"""What the processes of a step use: processor time, and memory at its peak."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

USAGE = "usage.json"
_UNIT = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in a MiB


@dataclass(frozen=True)
class Usage:
    """What an attempt at a step took, or all attempts together.

    Attributes:
        cpu_seconds: processor time.
        peak_mib: most resident memory any one process had, libraries included, in MiB.
    """

    cpu_seconds: float
    peak_mib: float

    @classmethod
    def of(cls, used: resource.struct_rusage) -> Usage:
        """As the kernel counts it."""
        return cls(used.ru_utime + used.ru_stime, used.ru_maxrss / _UNIT)

    @classmethod
    def so_far(cls) -> Usage:
        """Of this process and of its children that have ended."""
        own, children = (cls.of(resource.getrusage(who)) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return own.and_then(children)

    def since(self, earlier: Usage) -> Usage:
        """Processor time since then; the peak is the process's, for nobody can take it back."""
        return Usage(self.cpu_seconds - earlier.cpu_seconds, self.peak_mib)

    def and_then(self, later: Usage) -> Usage:
        """Both together."""
        return Usage(self.cpu_seconds + later.cpu_seconds, max(self.peak_mib, later.peak_mib))


def read(partial: Path) -> Usage | None:
    """What was used by all attempts so far; None where nobody measured it."""
    try:
        return Usage(**json.loads((partial / USAGE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def add(partial: Path, used: Usage) -> None:
    """Count an attempt at a step beside earlier ones."""
    if partial.is_dir():
        before = read(partial)
        whole = used if before is None else before.and_then(used)
        (partial / USAGE).write_text(json.dumps(asdict(whole)), encoding="utf-8")
