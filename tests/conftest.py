"""Fixtures every test may use."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from steps.launch import thread_environment

os.environ.update(thread_environment(1 if "PYTEST_XDIST_WORKER" in os.environ else 2))
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFLOOP_ROOT"):
    os.environ.pop(name, None)

import tiny  # noqa: E402
from forks import Forks  # noqa: E402
from servers import PrefectServer  # noqa: E402

# Where tests run in the background the signal is ignored, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> None:
    """Keep what is loaded out of the collector's sight: every trainer asks it to look for garbage in all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's directory, as the base step would leave it."""
    from steps.base import prepare_base
    from steps.tracking import NullTracker

    source = tiny.make_base(tmp_path_factory.mktemp("model") / "tiny")
    out = tmp_path_factory.mktemp("base")
    prepare_base("tiny", source=source, seed=0, out=out, tracker=NullTracker())
    return out


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh project, and the working directory inside it."""
    root = tiny.make_project(tmp_path / "project")
    monkeypatch.chdir(root)
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the tiny recipe has run to its end; read from it, do not write."""
    from rich.console import Console

    from steps.config import load
    from steps.experiment import Experiment

    root = tiny.make_project(tmp_path_factory.mktemp("finished") / "project")
    experiment = Experiment(load(root / "recipes/tiny.yaml"), root, Console(quiet=True))
    experiment.prepare_data()
    for name in experiment.recipe.STEPS:
        experiment.run(name)
    experiment.finish(experiment.register().uri)
    return root


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def prefloop(tmp_path_factory: pytest.TempPathFactory, prefect_server: PrefectServer) -> Iterator[Forks]:
    """Starts `prefloop` commands without waiting for their imports; flows need `prefect_server.start()` first."""
    from steps.tracking import quiet_environment

    quiet_environment()
    paths = {"PYTHONPATH": str(tiny.REPOSITORY), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    forks = Forks(tmp_path_factory.mktemp("commands"), {**prefect_server.environment, **paths})
    yield forks
    forks.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-fault", action="store_true", help="also the long fault tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_fault: long; runs with --every-fault (make faults)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--every-fault"):
        skip = pytest.mark.skip(reason="long; `make faults` runs it")
        for item in items:
            if "every_fault" in item.keywords:
                item.add_marker(skip)
