"""What is stored is damaged, full or out of reach: it is said where, what to do, and doing that is enough."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import states
from forks import Forks
from rich.console import Console
from states import RECIPE, RUN, copy_without
from tiny_data import dvc, refused

from steps import versions
from steps.config import load
from steps.errors import PrefloopError
from steps.experiment import Experiment

# -- the store ---------------------------------------------------------------------------------------------------


def cut_manifest(artifact: Path) -> str:
    manifest = artifact / "manifest.json"
    manifest.write_text(manifest.read_text()[:200])
    return "its manifest cannot be read"


def flip_a_bit(artifact: Path) -> str:
    """As a failing disk does it: size and time stay as they were."""
    weights = next(artifact.rglob("adapter_model.safetensors"))
    content, times = bytearray(weights.read_bytes()), weights.stat()
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    return "adapter_model.safetensors is not the file that was written"


def lose_a_file(artifact: Path) -> str:
    next(artifact.rglob("adapter_model.safetensors")).unlink()
    return "files are gone"


@pytest.mark.parametrize("damage", [cut_manifest, flip_a_bit, lose_a_file])
def test_a_damaged_artifact_is_named_and_made_again_once_it_is_gone(finished: Path, tmp_path: Path, damage) -> None:
    root = copy_without(finished, tmp_path / "project")
    artifact = states.folder(root, "sft")
    experiment = Experiment(load(root / RECIPE), root, Console(quiet=True))
    list(experiment.plan())  # all that is known of the finished steps
    found = damage(artifact)
    with pytest.raises(PrefloopError, match="a stored artifact is broken") as refusal:
        experiment.run("sft")
    assert found in refusal.value.have
    assert refusal.value.where == str(artifact) and "remove that folder" in refusal.value.then
    shutil.rmtree(artifact)
    assert not experiment.run("sft").reused
    assert experiment.run("policy").reused
    assert states.artifacts(root) == states.artifacts(finished)


# -- the disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of twenty megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "prefloop-test", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes the rights of root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(
    ("step", "free"),
    [
        ("sft", 60_000),
        *(
            pytest.param(step, free, marks=pytest.mark.every_fault)
            for step, free in [("sft", 0), ("sft", 8_000), ("sft", 150_000), ("policy", 0), ("policy", 200_000)]
        ),
    ],
)
def test_a_full_disk_is_named_and_nothing_is_lost(
    prefloop: Forks, prefect_server, finished: Path, tmp_path: Path, small_disk: Path, step: str, free: int
) -> None:
    """The disk fills up while a run is under way: when it comes to a step so many bytes are free."""
    prefect_server.start()
    root = states.without_var(finished, tmp_path / "project")
    (root / "var").symlink_to(small_disk, target_is_directory=True)
    watch = f"""
import steps.experiment, states
run = steps.experiment.Experiment.run
def filled(self, name):
    if name == {step!r}:
        states.fill({str(small_disk)!r}, {free})
    return run(self, name)
steps.experiment.Experiment.run = filled
"""
    said = prefloop(root, *RUN, before=watch).failed()
    assert f"[Errno {errno.ENOSPC}]" in said or "disk is full" in said, said
    assert "Traceback" not in said
    prefloop.none_left()
    (small_disk / "ballast").unlink()
    prefloop(root, *RUN).ended_well()
    states.equal(root, finished)


# -- the remote --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(prepared, tmp_path_factory.mktemp("remote") / "project", symlinks=True))


@pytest.mark.parametrize("remote", ["a folder that is not there", "below a file", "http://127.0.0.1:9/dvc"])
def test_a_remote_out_of_reach_is_named_and_what_needs_none_works(copied: Path, tmp_path: Path, remote: str) -> None:
    """The tables lie in the work tree, and DVC's cache is empty."""
    root = copied
    shutil.rmtree(root / ".dvc/cache", ignore_errors=True)
    (tmp_path / "file").touch()
    places = {"a folder that is not there": str(tmp_path / "nowhere"), "below a file": str(tmp_path / "file/remote")}
    dvc(root, "remote", "add", "--force", "--default", "elsewhere", places.get(remote, remote))
    said = refused(root, "fetch", "tiny@HEAD", "--to", tmp_path / "fetched")
    assert "neither from DVC's cache nor from its remote" in said
    assert "check the remote with `dvc remote list`" in said
    assert not list((tmp_path / "fetched").glob("*"))
    assert versions.prepare("tiny", root).counts["read"] == 60
