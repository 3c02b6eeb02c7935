"""What a policy wants its prompts to end with: words that belong to the policy, and that no judge is shown.

They lie beside its weights, so that they go wherever these go: into the store, the registry, the champion's folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from steps.errors import ModelError

PROMPT = "prompt.json"


def write(weights: Path, after: str) -> None:
    """Note that a policy is asked by a prompt with `after` behind it."""
    (weights / PROMPT).write_text(json.dumps({"after": after}, ensure_ascii=False), encoding="utf-8")


def asked_after(weights: Path) -> str:
    """What is put behind a prompt before a policy is asked; nothing for most.

    Args:
        weights: a policy's folder `adapter`.

    Raises:
        ModelError: the note is there, and cannot be read.
    """
    path = weights / PROMPT
    if not path.is_file():
        return ""
    try:
        after = json.loads(path.read_text(encoding="utf-8"))["after"]
        if isinstance(after, str):
            return after
        have = f"`after` is {type(after).__name__}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        have = f"{type(error).__name__}: {error}"
    raise ModelError(
        "it cannot be told how this policy is asked", where=str(path), have=have, then="run the policy step again"
    )
