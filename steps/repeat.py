"""The half of `prefloop reproduce` that runs in the code of then: `python -P steps/repeat.py JOB`.

This file is today's, every module it imports is the checked-out one, so it asks of them only what they have had since
there were recipes. It runs steps into a store of their own: no data stage, no MLflow, no registry, no Prefect.

JOB is a JSON file: `tree` (the checked-out project), `project` (where a base model named by a path may lie instead),
`recipe`, `store`, `tables` and `adapters` (name → path and digest), `steps`. Each finished step is one JSON line on the
standard output; what libraries print goes to the standard error. The process ends with its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for done in _steps(job):
            print(json.dumps(done), file=answers)
    except Exception as error:
        names = ("what", "where", "have", "then")
        said = {name: getattr(error, name, "") for name in names}
        said["what"] = said["what"] or f"{type(error).__name__}: {error}"
        print(json.dumps({"error": said}), file=answers)
        raise


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def _steps(job: dict[str, Any]) -> Any:
    tree, project = Path(job["tree"]), Path(job["project"])
    import steps

    if Path(steps.__path__[0]).resolve().parent != tree.resolve():
        raise RuntimeError(f"the code that runs is not the checked-out one but {steps.__path__[0]}")
    from steps import code, pipeline
    from steps.config import load
    from steps.launch import launcher
    from steps.run import Input, Store, run_step

    recipe = load(job["recipe"])
    known = {name: Input(Path(path), digest) for name, (path, digest) in {**job["tables"], **job["adapters"]}.items()}
    known["source"] = _model(recipe.model.base, recipe.model.revision, tree, project)
    if judge := getattr(recipe.evaluate, "reward_model", None):
        known["classifier"] = _model(judge, recipe.evaluate.reward_revision, tree, project)
    if topics := getattr(recipe.evaluate, "topics", None):
        from steps import palms

        known |= palms.inputs(tree / topics.file, tree / topics.probes)
    store, launch = Store(Path(job["store"])), launcher(recipe.launch)
    for name in recipe.STEPS:
        if name not in job["steps"]:
            continue
        spec = pipeline.spec(name, recipe, known)
        print(json.dumps({"begins": name}), file=sys.stderr, flush=True)
        artifact = run_step(spec, store, launch).artifact
        known[name] = Input(artifact.path, artifact.digest)
        yield {
            "step": name,
            "key": artifact.key,
            "folder": str(artifact.path),
            "seed": spec.seed,
            "config": dict(spec.config),
            "code": code.code_digest(spec.function.partition(":")[0]),
            "libraries": code.library_versions(),
        }


def _model(name: str, revision: str | None, tree: Path, project: Path) -> Any:
    """A model's files: of the checked-out tree when they are in git, else where the project has them now."""
    from steps.base import locate

    return locate(name, revision, tree if (tree / name).is_dir() else project)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
