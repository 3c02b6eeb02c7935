"""Another clock for a command: Python to run before it, as `Forks` takes it."""

from __future__ import annotations

DAY = 86400


def clock(shift: str) -> str:
    """What makes `time` and `datetime` wrong by so many seconds; an expression, in which `elapsed` counts seconds."""
    return f"""
import datetime, time
import steps.experiment, steps.locks, steps.registry
time_, time_ns, began = time.time, time.time_ns, time.monotonic()
def shift():
    elapsed = time.monotonic() - began
    return {shift}
time.time = lambda: time_() + shift()
time.time_ns = lambda: time_ns() + int(shift() * 10**9)
class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=shift())
for module in (steps.experiment, steps.locks, steps.registry):
    if hasattr(module, "datetime"):
        module.datetime = Clock
"""


JUMPING = clock(f"{DAY} if int(2 * elapsed) % 2 else -{DAY}")  # yesterday and tomorrow, half a second each
