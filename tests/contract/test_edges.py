"""Who may import whom, and what must not be imported early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import tiny

HEAVY = ("torch", "transformers", "trl", "peft", "prefect", "mlflow", "great_expectations", "dvc", "pandas", "sklearn")


def test_the_import_contracts_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=tiny.REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "5 kept, 0 broken" in result.stdout


def test_the_folder_mlflow_does_not_hide_the_package() -> None:
    assert "site-packages" in str(mlflow.__file__)
    assert not list((tiny.REPOSITORY / "mlflow").rglob("*.py"))


@pytest.mark.parametrize(
    "module", ["flows.cli", "flows.data", "steps.config", "steps.run", "steps.gate", "steps.launch"]
)
def test_nothing_heavy_is_imported_before_it_is_needed(module: str) -> None:
    script = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], cwd=tiny.REPOSITORY, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_an_experiment_does_without_the_model_libraries() -> None:
    script = "import sys, steps.experiment, flows.train; print([n for n in ('torch', 'trl') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], cwd=tiny.REPOSITORY, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
