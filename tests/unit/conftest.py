"""Settings of the unit tests."""

from __future__ import annotations

from hypothesis import settings

# The same examples every time, no directory of old ones, and no clock: the machine may be busy.
settings.register_profile("prefloop", derandomize=True, database=None, deadline=None)
settings.load_profile("prefloop")
