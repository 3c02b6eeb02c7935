"""Seconds and peak memory of the data stages on many rows.

`python -m benchmarks.data_stages [ROWS …]`, 200,000 unless said. Pairs of made-up words, some 450 characters a row,
as JSON lines; each stage is its own process, as under DVC. Reading is what decompressing, decoding and parsing the
lines takes alone.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
ENTRY = """datasets:
  many:
    format: preferences
    source:
      files: {pairs: pairs.jsonl}
"""
MEASURE = """
import resource, runpy, sys
sys.argv = [sys.argv[1], "many"]
runpy.run_module(sys.argv[0], run_name="__main__")
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
READ = """
import json, time
start = time.perf_counter()
with open("data/many/source/pairs.jsonl", "rb") as lines:
    for line in lines:
        json.loads(line.decode())
print(time.perf_counter() - start)
"""


def write_pairs(path: Path, rows: int) -> None:
    """Pairs of sentences of made-up words; one in a thousand is empty, one in a thousand repeats the one before."""
    draw = random.Random(0)  # noqa: S311 - words, not secrets
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(3, 9))) for _ in range(20_000)]
    before = ""
    with path.open("w", encoding="utf-8") as out:
        for row in range(rows):
            prompt, chosen, rejected = (" ".join(draw.choices(words, k=count)) for count in (12, 28, 26))
            line = json.dumps({"prompt": prompt, "chosen": chosen if row % 1000 else "", "rejected": rejected})
            out.write((before if row % 1000 == 500 else line) + "\n")
            before = line


def main(rows: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        source = root / "data/many/source"
        source.mkdir(parents=True)
        (root / "data/datasets.yaml").write_text(ENTRY, encoding="utf-8")
        write_pairs(source / "pairs.jsonl", rows)
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        call = {"cwd": root, "env": environment, "capture_output": True, "text": True, "check": True}
        reading = float(subprocess.run([sys.executable, "-c", READ], **call).stdout)
        total = 0.0
        for stage in ("ingest", "validate", "split"):
            start = time.perf_counter()
            said = subprocess.run([sys.executable, "-c", MEASURE, f"steps.{stage}"], **call).stdout.splitlines()
            seconds = time.perf_counter() - start
            total += seconds
            print(f"{stage:<9} {seconds:6.1f} s  peak {int(said[-1].split()[1]) / 2**20:.2f} GiB  {said[0]}")
        print(f"{rows:,} rows: {total:.1f} s, {total - reading:.1f} s beyond reading ({reading:.1f} s)\n")


if __name__ == "__main__":
    for rows in [int(argument) for argument in sys.argv[1:]] or [200_000]:
        main(rows)
