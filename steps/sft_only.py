"""No tuning: the policy is the SFT model, which is then held against the base it came from."""

from __future__ import annotations

import shutil
from pathlib import Path

from steps.artifact import Facts
from steps.models import ADAPTER
from steps.tracking import Tracker


def keep_policy(*, sft: Path, seed: int, out: Path, tracker: Tracker) -> Facts:
    """The SFT model's weights as the policy's."""
    shutil.copytree(sft / ADAPTER, out / ADAPTER, dirs_exist_ok=True)
    return {"method": "sft"}
