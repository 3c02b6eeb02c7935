"""What a run is run with: code, packages, hardware. Written down when it begins, for nobody can find it out later."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from steps import code, pipeline
from steps.config import Recipe
from steps.launch import thread_environment

CODE = ("steps", "flows", "dvc.yaml", "pyproject.toml", "constraints.txt")  # what can change a result
CLEAN = "clean"
PACKAGES = "packages.txt"
_FIELD = re.compile(r"^(Name|Version):\s*(\S+)\s*$", re.MULTILINE)
HERE = Path(__file__).parents[1]


def describe(recipe: Recipe, text: str) -> dict[str, str]:
    """The tags of a run that say what it was run with.

    Args:
        text: the recipe as it was written down.
    """
    commit, state = code_state()
    installed = packages()
    return {
        "prefloop.code_commit": commit or "no git",
        "prefloop.code_state": state,
        "prefloop.seed": str(recipe.seed),
        "prefloop.recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "prefloop.packages": f"{len(installed)} packages, sha256 {_sha256(installed)[:16]}",
        "prefloop.threads": {**os.environ, **thread_environment(recipe.launch.threads)}["OMP_NUM_THREADS"],
        **{f"prefloop.{name}": value for name, value in hardware().items()},
        **{f"code.{name}": code.code_digest(pipeline.module_of(name, recipe))[:16] for name in recipe.steps},
    }


def code_state(root: Path = HERE) -> tuple[str, str]:
    """The commit the running code stands on, and `clean` or how far the code differs from it.

    Returns:
        ("", "no git") without git. The digest of a difference is a sha256 over `git diff` and the files git does not
        know, so that the same changes have the same name.
    """
    head = git(["rev-parse", "HEAD"], root)
    if head is None:
        return "", "no git"
    changed = git(["status", "--porcelain", "--untracked-files=all", "--", *CODE], root) or b""
    files = changed.decode(errors="replace").splitlines()
    if not files:
        return head.decode().strip(), CLEAN
    digest = hashlib.sha256(git(["diff", "HEAD", "--", *CODE], root) or b"")
    for name in sorted(line[3:] for line in files if line.startswith("??")):
        path = root / name.strip('"')
        digest.update(f"\n{name}\n".encode() + (path.read_bytes() if path.is_file() else b""))
    count = "1 file differs" if len(files) == 1 else f"{len(files)} files differ"
    return head.decode().strip(), f"{count}, sha256 of the difference {digest.hexdigest()[:16]}"


@functools.cache
def packages() -> list[str]:
    """`NAME==VERSION` of every installed package, sorted by name.

    The two fields are looked for in the text: parsing the metadata of 300 packages as mail takes half a second.
    """
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        fields = dict(_FIELD.findall((distribution.read_text("METADATA") or "").partition("\n\n")[0]))
        if "Name" in fields and "Version" in fields:
            name = re.sub(r"[-_.]+", "-", fields["Name"]).lower()
            found.setdefault(name, f"{name}=={fields['Version']}")  # the first on the path is the one imported
    return [found[name] for name in sorted(found)]


def hardware() -> dict[str, str]:
    """Processor, cores, memory and GPUs, in words, from what the system says; no driver is opened."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": f"{os.cpu_count()}" + (f", {usable} usable" if usable != os.cpu_count() else ""),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "gpus": ", ".join(gpus()) or "none found",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


def gpus(proc: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Names of NVIDIA's cards, as their driver lists them."""
    files = sorted(proc.glob("*/information"))
    found = (re.search(r"^Model:\s*(.+?)\s*$", path.read_text(errors="replace"), re.MULTILINE) for path in files)
    return [match.group(1) for match in found if match]


def _processor(info: Path = Path("/proc/cpuinfo")) -> str:
    try:
        fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", info.read_text(), re.MULTILINE))
    except OSError:
        fields = {}
    name = fields.get("model name") or platform.processor() or platform.machine()
    # Virtual machines hide the name; family and model still tell kinds of processor apart.
    return name + (f", family {fields['cpu family']}, model {fields['model']}" if "cpu family" in fields else "")


def _sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def git(arguments: Sequence[str], root: Path) -> bytes | None:
    """What git says, or None when it fails or is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True)
    except OSError:
        return None
    return None if done.returncode else done.stdout
