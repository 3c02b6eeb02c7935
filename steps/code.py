"""Which code made a result: a digest over a step's module and all it imports from this package."""

from __future__ import annotations

import ast
import functools
import hashlib
from importlib import metadata
from pathlib import Path

# Modules that move results about but cannot change them.
PLUMBING = frozenset(
    {
        "steps",
        "steps.artifact",
        "steps.charts",
        "steps.code",
        "steps.config",
        "steps.errors",
        "steps.doctor",
        "steps.experiment",
        "steps.launch",
        "steps.paths",
        "steps.pipeline",
        "steps.progress",
        "steps.registry",
        "steps.report",
        "steps.run",
        "steps.tracking",
        "steps.trainer_fields",
        "steps.ui",
        "steps.versions",
        "steps.worker",
    }
)
# Libraries whose version decides what a model step computes.
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "scikit-learn")


_ROOT = Path(__file__).parents[1]


def _source_of(module: str) -> Path | None:
    """The file of a module of this package, found without importing anything; None where there is none."""
    path = _ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return tree


def _imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "steps"}


def _parse(module: str) -> ast.Module | None:
    path = _source_of(module)
    return ast.parse(path.read_text(encoding="utf-8")) if path else None


def modules_behind(module: str) -> list[str]:
    """A step's module and every module of this package it reaches, plumbing left out; sorted."""
    reached: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name in reached or name in PLUMBING:
            continue
        tree = _parse(name)
        if tree is None:  # `from steps.x import y`, where y is no module
            continue
        reached.add(name)
        pending += _imports(tree)
    return sorted(reached)


@functools.cache
def code_digest(module: str) -> str:
    """sha256 over the code behind a step. Comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for name in modules_behind(module):
        tree = _parse(name)
        assert tree is not None
        digest.update(f"{name}\n{ast.dump(_without_docstrings(tree))}\n".encode())
    return digest.hexdigest()


@functools.cache
def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide what a step computes."""
    return {name: metadata.version(name) for name in LIBRARIES}
