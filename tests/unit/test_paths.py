"""Where a project is, and whether there is room in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from steps.errors import EnvironmentProblem
from steps.paths import Var, need_space, project_root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "dvc.yaml").touch()
    (tmp_path / "project" / "data" / "datasets.yaml").touch()
    return tmp_path / "project"


def test_the_root_is_found_from_anywhere_inside(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = root / "a" / "b"
    inside.mkdir(parents=True)
    assert project_root(inside) == project_root(root) == root
    monkeypatch.chdir(inside)
    assert project_root() == root


def test_outside_a_project_the_error_says_how_to_get_inside(root: Path) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        project_root(root.parent)
    text = str(caught.value)
    assert "this is not a prefloop project" in text
    assert str(root.parent) in text
    assert "PREFLOOP_ROOT" in text


def test_one_of_the_two_files_is_not_enough(root: Path) -> None:
    (root / "dvc.yaml").unlink()
    with pytest.raises(EnvironmentProblem):
        project_root(root)


def test_the_environment_names_the_root(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFLOOP_ROOT", str(root))
    assert project_root(tmp_path) == root


def test_folders_are_made_when_they_are_asked_for(root: Path) -> None:
    var = Var(root)
    assert not var.path.exists()
    assert var.folder("store") == root / "var" / "store"
    assert var.folder("store").is_dir()


def test_too_little_space_names_what_there_is_and_what_is_needed(tmp_path: Path) -> None:
    need_space(tmp_path, 0)
    with pytest.raises(EnvironmentProblem, match="GiB free, 1e\\+09 GiB needed") as caught:
        need_space(tmp_path, 1e9)
    assert str(tmp_path) in str(caught.value)
    assert "launch.min_free_gib" in str(caught.value)
