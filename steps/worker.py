"""One step in a process of its own: `python -m steps.worker PARTIAL`."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from steps.errors import write_error
from steps.launch import obey_parent
from steps.run import execute


def main(partial: Path) -> int:
    obey_parent()
    try:
        execute(partial)
    except BaseException as error:
        traceback.print_exc()
        write_error(error, partial / "error.json")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
