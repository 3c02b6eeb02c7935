"""The code digest: it changes with what a step computes, and with nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from steps import code
from steps.code import LIBRARIES, PLUMBING, code_digest, library_versions, modules_behind
from steps.pipeline import POLICIES, STEPS

REPOSITORY = Path(__file__).parents[2]
MODULES = sorted({step.function.partition(":")[0] for step in [*STEPS.values(), *POLICIES.values()]})

WORK = '''\
"""What it does."""

from steps.helper import half
from steps.tracking import Tracker


def work(x):
    """Twice a half."""
    return half(x) * 2  # one
'''
HELPER = """\
def half(x):
    return x / 2
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `steps` of a module `work` that uses `helper`, in place of the real one."""
    steps = tmp_path / "steps"
    steps.mkdir()
    for name, text in {"__init__": "", "work": WORK, "helper": HELPER, "tracking": "", "other": "x = 1\n"}.items():
        (steps / f"{name}.py").write_text(text)
    monkeypatch.setattr(code, "_ROOT", tmp_path)
    return steps


def digest(module: str = "steps.work") -> str:
    code_digest.cache_clear()
    try:
        return code_digest(module)
    finally:
        code_digest.cache_clear()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "# a comment\n" + text,
        lambda text: text.replace("  # one", "  # another"),
        lambda text: text.replace("What it does.", "What it does, at length."),
        lambda text: text.replace("Twice a half.", "Half, twice."),
        lambda text: text.replace('    """Twice a half."""\n', ""),
        lambda text: text.replace("return half(x) * 2", "return (\n        half(x)\n        * 2\n    )"),
        lambda text: text.replace("\n\n\n", "\n\n\n\n"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(package: Path, change: Callable[[str], str]) -> None:
    before = digest()
    changed = change(WORK)
    assert changed != WORK
    (package / "work.py").write_text(changed)
    assert digest() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("* 2", "* 3"),
        lambda text: text.replace("def work(x):", "def work(x=1):"),
        lambda text: text + "\nLEVEL = 1\n",
        lambda text: text.replace("return half(x) * 2", "return 2 * half(x)"),
    ],
)
def test_code_counts(package: Path, change: Callable[[str], str]) -> None:
    before = digest()
    changed = change(WORK)
    assert changed != WORK
    (package / "work.py").write_text(changed)
    assert digest() != before


def test_text_that_is_no_docstring_counts(package: Path) -> None:
    (package / "work.py").write_text('PROMPT = "a"\n')
    before = digest()
    (package / "work.py").write_text('PROMPT = "b"\n')
    assert digest() != before


def test_a_helper_counts_and_an_unused_module_does_not(package: Path) -> None:
    before = digest()
    (package / "other.py").write_text("x = 2\n")
    (package / "tracking.py").write_text("x = 2\n")
    assert digest() == before
    (package / "helper.py").write_text(HELPER.replace("/ 2", "/ 3"))
    assert digest() != before


def test_the_digest_does_not_depend_on_where_the_package_is(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest()
    shutil.copytree(package, tmp_path / "elsewhere" / "steps")
    monkeypatch.setattr(code, "_ROOT", tmp_path / "elsewhere")
    assert digest() == before


@pytest.mark.parametrize(
    "line",
    [
        "import steps.helper",
        "from steps import helper",
        "from steps.helper import half",
        "def late():\n    from steps.helper import half",
        "if True:\n    import steps.helper as h",
    ],
)
def test_every_spelling_of_an_import_is_followed(package: Path, line: str) -> None:
    (package / "work.py").write_text(line + "\n")
    assert modules_behind("steps.work") == ["steps.helper", "steps.work"]


def test_imports_are_followed_through_helpers_and_round_circles(package: Path) -> None:
    (package / "helper.py").write_text("from steps import other\n")
    (package / "other.py").write_text("from steps import work\n")
    assert modules_behind("steps.work") == ["steps.helper", "steps.other", "steps.work"]


@pytest.mark.parametrize("module", MODULES)
def test_no_step_counts_plumbing(module: str) -> None:
    behind = modules_behind(module)
    assert module in behind
    assert behind == sorted(set(behind))
    assert not PLUMBING & set(behind)


def test_the_helpers_of_the_real_steps_count() -> None:
    assert {"steps.frozen_layers", "steps.lm_head", "steps.models", "steps.pairs", "steps.training"} <= set(
        modules_behind("steps.dpo")
    )
    assert {"steps.advantages", "steps.backbone", "steps.losses", "steps.ppo_trainer", "steps.rollouts"} <= set(
        modules_behind("steps.ppo")
    )
    assert {"steps.judges", "steps.sampling", "steps.statistics"} <= set(modules_behind("steps.evaluate"))


def test_plumbing_names_modules_that_exist() -> None:
    for name in PLUMBING:
        path = REPOSITORY.joinpath(*name.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


def test_every_library_has_a_version() -> None:
    assert set(library_versions()) == set(LIBRARIES)
    assert all(version[0].isdigit() for version in library_versions().values())


def test_digests_are_computed_without_importing_anything_heavy() -> None:
    script = (
        "import sys\n"
        "from steps.code import code_digest, library_versions\n"
        "from steps.pipeline import POLICIES, STEPS\n"
        "steps = [*STEPS.values(), *POLICIES.values()]\n"
        "made = {code_digest(step.function.partition(':')[0]) for step in steps}\n"
        "library_versions()\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'mlflow', 'sklearn', 'pandas', 'great_expectations'}\n"
        "print(len(made), sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout.split(maxsplit=1) == [str(len(MODULES)), "[]\n"]
