"""What fault tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_data

pytest.register_assert_rewrite("states")  # so that a failure there says what differs


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of sixty rows whose data are prepared; copy it."""
    return tiny_data.make_project(tmp_path_factory.mktemp("prepared") / "project")
