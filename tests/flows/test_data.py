"""`prefloop data` as a person runs it, on sixty rows; versions between clones, remotes and writers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import tiny_data
from tiny_data import attempt, contents, data, dvc, git, refused, surroundings

from steps import batches, versions
from steps.datasets import read_table
from steps.errors import DataError, EnvironmentProblem

BAD = [
    {"prompt": "a", "chosen": "", "rejected": "nothing was chosen here"},
    {"prompt": "b", "chosen": "seven is chosen", "rejected": 7},
]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared and committed project; copy it before you write."""
    return tiny_data.make_project(tmp_path_factory.mktemp("prepared") / "project")


@pytest.fixture(scope="session")
def grown(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The project with a second batch added and committed, and what adding it said; copy it before you write."""
    root = copy(prepared, tmp_path_factory.mktemp("grown"))
    batch = tiny.write_rows([*tiny_data.rows(12, "new "), *BAD], root.parent / "more.jsonl")
    with batch.open("a") as stream:
        stream.write('{"prompt": broken\n')
    said = data(root, "add", "tiny", batch)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "grown")
    return root, said


def copy(project: Path, to: Path) -> Path:
    return Path(shutil.copytree(project, to / "project", symlinks=True))


@pytest.fixture
def project(prepared: Path, tmp_path: Path) -> Path:
    return copy(prepared, tmp_path)


@pytest.fixture
def larger(grown: tuple[Path, str], tmp_path: Path) -> Path:
    return copy(grown[0], tmp_path)


def md5s(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.glob("*.parquet")}


def locked(root: Path, revision: str = "") -> dict[str, str]:
    found = versions.outputs("tiny", root, revision)
    return {file: md5 for file, md5 in found.items() if file.endswith(".parquet")}


# -- add ---------------------------------------------------------------------------------------------------------


def test_add_says_what_changed_and_what_comes_next(grown: tuple[Path, str]) -> None:
    _, said = grown
    assert "more.jsonl: 27 rows" in said
    assert [line.split() for line in said.splitlines() if line.startswith(("rows read", "valid  ", "in quar"))] == [
        ["rows", "read", "60", "87", "+27"],
        ["valid", "60", "84", "+24"],
        ["in", "quarantine", "0", "3", "+3"],
    ]
    assert "  unreadable" in said and "  not_text" in said and "  empty" in said
    assert "8 of 8 files changed" in said
    assert "git add data/tiny/source/more.jsonl data/datasets.yaml dvc.lock" in said
    assert "git commit -m" in said and "dvc push" in said
    tables = said.partition("keep it")[0]
    assert max(map(len, tables.splitlines())) <= 100 and "\x1b" not in said


def test_add_keeps_the_registrys_comments_and_the_batchs_provenance(grown: tuple[Path, str]) -> None:
    root, _ = grown
    first = "        pairs: pairs.jsonl  # the first batch\n"
    more = first + "        more: more.jsonl\n"
    assert (root / "data/datasets.yaml").read_text() == tiny_data.REGISTRY.replace(first, more)
    (record,) = [json.loads(line) for line in (root / "data/tiny/batches.jsonl").read_text().splitlines()]
    batch = (root / "data/tiny/source/more.jsonl").read_bytes()
    assert batch == (root.parent / "more.jsonl").read_bytes()
    assert record["sha256"] == hashlib.sha256(batch).hexdigest()
    assert (record["file"], record["original"], record["bytes"], record["rows"]) == (
        "more.jsonl",
        "more.jsonl",
        len(batch),
        27,
    )
    assert record["by"] == "Ada <ada@example.org>" and record["added"].startswith("20")


def test_add_again_changes_nothing_and_other_bytes_are_refused(larger: Path, tmp_path: Path) -> None:
    before = contents(larger)
    shutil.copyfile(larger / "data/tiny/source/more.jsonl", tmp_path / "more.jsonl")
    assert "nothing has changed" in data(larger, "add", "tiny", tmp_path / "more.jsonl")
    shutil.copyfile(tmp_path / "more.jsonl", tmp_path / "again.jsonl")
    assert "the same bytes are there under another name" in refused(larger, "add", "tiny", tmp_path / "again.jsonl")
    tiny.write_rows(tiny_data.rows(1, "other "), tmp_path / "more.jsonl")
    said = refused(larger, "add", "tiny", tmp_path / "more.jsonl")
    assert "another file of that name is there" in said and "next" in said
    assert contents(larger) == before


def test_an_unknown_dataset_is_made_only_with_a_format(project: Path, tmp_path: Path) -> None:
    batch = tiny.write_rows(tiny_data.rows(20, "fresh "), tmp_path / "fresh batch.jsonl")
    said = refused(project, "add", "fresh", batch)
    assert "there is no dataset 'fresh'" in said and "rankings" in said and "sharegpt" in said
    assert "did you mean 'preferences'" in refused(project, "add", "fresh", batch, "--format", "preference")
    said = data(project, "add", "fresh", batch, "--format", "preferences")
    assert "git add 'data/fresh/source/fresh batch.jsonl'" in said
    registry = (project / "data/datasets.yaml").read_text()
    assert registry.startswith(tiny_data.REGISTRY)
    assert 'fresh-batch: "fresh batch.jsonl"' in registry
    assert versions.current("fresh", project).counts["read"] == 40
    listed = data(project, "list")
    assert [line.split()[0] for line in listed.splitlines()] == ["dataset", "fresh", "tiny"]


def test_a_new_dataset_is_told_what_its_files_call_the_fields(larger: Path, tmp_path: Path) -> None:
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    rows = [{names[field]: text for field, text in row.items()} for row in tiny_data.rows(20, "other ")]
    batch = tiny.write_rows(rows, tmp_path / "other.jsonl")
    said = refused(larger, "add", "other", batch, "--format", "preferences")
    assert "the fields of other.jsonl are question, good, bad" in said and f"where {batch}" in said
    assert "quarantine.parquet" not in said and "data report" not in said
    assert "--columns FIELD=YOURS" in said and "nothing was added to 'other'" in said
    told = [word for field, own in names.items() for word in ("--columns", f"{field}={own}")]
    assert "pairs" not in data(larger, "add", "other", batch, "--format", "preferences", *told)
    assert versions.current("other", larger).counts["valid"] == 40
    (tmp_path / "empty.jsonl").touch()
    said = refused(larger, "add", "empty", tmp_path / "empty.jsonl", "--format", "preferences")
    assert "its files are empty" in said and "quarantine" not in said


def test_a_batch_that_fails_is_taken_back_whole(larger: Path, tmp_path: Path) -> None:
    registry = larger / "data/datasets.yaml"
    registry.write_text(registry.read_text() + "    rules: {checks: {same_sides: stop}}\n")
    dvc(larger, "repro", "-q", "split@tiny")
    before = contents(larger)
    batch = tiny.write_rows([{"prompt": "q", "chosen": "Same", "rejected": "same."}], tmp_path / "same.jsonl")
    said = refused(larger, "add", "tiny", batch)
    assert said.strip().startswith("nothing was added to 'tiny'")
    assert "same.jsonl line 1" in said
    assert contents(larger) == before
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"this is no gzip")
    assert "nothing was added to 'newer'" in refused(larger, "add", "newer", broken, "--format", "hh")
    assert contents(larger) == before and not (larger / "data/newer").exists()


# -- look --------------------------------------------------------------------------------------------------------


def test_list_and_show(larger: Path) -> None:
    version = versions.current("tiny", larger)
    (row,) = [line.split() for line in data(larger, "list").splitlines()[1:]]
    assert row == [
        "tiny",
        "preferences",
        version.digest[:12],
        "87",
        "3",
        str(version.counts["preferences"]),
        "prepared",
    ]
    shown = data(larger, "show", "tiny")
    assert version.digest in shown and git(larger, "rev-parse", "HEAD").strip() in shown
    assert all(md5 in shown for md5 in locked(larger).values())
    earlier = data(larger, "show", "tiny@HEAD~1")
    assert all(md5 in earlier for md5 in locked(larger, "HEAD~1").values())
    assert "more.jsonl" in shown and "more.jsonl" not in earlier
    assert version.digest != versions.at("tiny", larger, "HEAD~1").digest
    assert all(type(count) is int for count in version.counts.values())
    assert "git knows no revision" in refused(larger, "show", "tiny@nowhere")
    assert "did you mean 'tiny'" in refused(larger, "show", "tinny")


def test_report_names_rows_by_file_and_line(larger: Path) -> None:
    said = data(larger, "report", "tiny")
    assert "87 rows read = 84 valid + 3 in quarantine" in said
    assert "more.jsonl line 25: chosen is empty" in said
    assert "95 % interval" in said and "longer side chosen" in said
    assert '{"prompt": broken' in said
    assert max(map(len, said.splitlines())) <= 100
    assert data(larger, "report", "tiny", "--all").count("more.jsonl line 2") >= 3


def test_diff_counts_and_shows_rows(larger: Path) -> None:
    said = data(larger, "diff", "tiny", "HEAD~1", "HEAD")
    assert "27 rows came, 0 went, 0 changed, 60 are the same" in said
    assert "more.jsonl line 1\n" in said
    back = data(larger, "diff", "tiny", "HEAD", "HEAD~1")
    assert "0 rows came, 27 went, 0 changed, 60 are the same" in back
    source = larger / "data/tiny/source/pairs.jsonl"
    lines = source.read_text().splitlines()
    lines[4] = lines[4].replace("likes", "adores")
    source.write_text("\n".join(lines) + "\n")
    dvc(larger, "repro", "-q", "split@tiny")
    said = data(larger, "diff", "tiny", "HEAD")
    assert "0 rows came, 0 went, 1 changed, 86 are the same" in said
    assert "pairs.jsonl line 5" in said and "adores" in said


def test_a_source_that_drifted_is_told_before_it_is_trained_on(project: Path) -> None:
    version, found = batches.refresh("tiny", project)
    assert (version.tables, found) == (versions.current("tiny", project).tables, [])
    source = project / "data/tiny/source/pairs.jsonl"
    records = [json.loads(line) for line in source.read_text().splitlines()]
    tiny.write_rows([{**record, "chosen": record["chosen"] * 9} for record in records], source)
    version, found = batches.refresh("tiny", project)
    assert version.tables == versions.current("tiny", project).tables
    assert {"answer length", "longer side chosen"} <= {finding.what for finding in found if finding.drifted}


# -- restore -----------------------------------------------------------------------------------------------------


def test_records_are_exported_repaired_and_restored(larger: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    assert "3 quarantined records" in data(larger, "report", "tiny", "--export", bad)
    before = contents(larger)
    said = refused(larger, "restore", "tiny", bad)
    assert "3 repaired rows still fail" in said and "bad.jsonl line 3: unreadable" in said
    assert contents(larger) == before
    lines = bad.read_text().splitlines()
    mended = [lines[0].replace('""', '"now something"'), lines[1].replace("7", '"eight was not"')]
    mended.append('{"prompt": "whole", "chosen": "again it is", "rejected": "no"}')
    bad.write_text("\n".join(mended) + "\n")
    batch = f"repaired-{hashlib.sha256(bad.read_bytes()).hexdigest()[:8]}.jsonl"
    assert f"{batch}: 3 rows" in data(larger, "restore", "tiny", bad)
    counts = versions.current("tiny", larger).counts
    assert (counts["read"], counts["valid"], counts["quarantined"]) == (90, 87, 3)
    assert batch in data(larger, "show", "tiny")


# -- clones and remotes ------------------------------------------------------------------------------------------


def test_two_clones_have_the_same_bytes_at_every_revision(project: Path, tmp_path: Path) -> None:
    dvc(project, "remote", "modify", "storage", "url", str(tmp_path / "remote"))
    git(project, "commit", "-qam", "a remote")
    dvc(project, "push", "-q")
    git(tmp_path, "clone", "-q", str(project), "clone")
    clone = tmp_path / "clone"
    data(project, "add", "tiny", tiny.write_rows(tiny_data.rows(12, "new "), tmp_path / "more.jsonl"))
    git(project, "add", "-A")
    git(project, "commit", "-qm", "grown")
    dvc(project, "push", "-q")
    git(clone, "pull", "-q")
    assert "its tables are not here: dvc pull" in data(clone, "list")
    for revision in ("HEAD~1", "HEAD"):
        data(clone, "fetch", f"tiny@{revision}", "--to", tmp_path / revision)
        assert md5s(tmp_path / revision) == locked(project, revision) == locked(clone, revision)
    assert md5s(tmp_path / "HEAD") != md5s(tmp_path / "HEAD~1")
    dvc(clone, "pull", "-q")
    assert md5s(clone / "data/tiny") == locked(project)
    assert versions.current("tiny", clone).digest == versions.current("tiny", project).digest
    assert "nothing has changed" in data(clone, "add", "tiny", tmp_path / "more.jsonl")


def test_a_table_that_is_nowhere_is_named(project: Path, tmp_path: Path) -> None:
    shutil.rmtree(project / ".dvc/cache")
    said = refused(project, "fetch", "tiny@HEAD", "--to", tmp_path / "out")
    assert "can be had neither from DVC's cache nor from its remote" in said and "dvc push" in said
    (project / "data/tiny/gold.parquet").write_bytes(b"something else")
    assert "is not the one dvc.lock names" in refused(project, "fetch", "tiny", "--to", tmp_path / "out")
    assert not list((tmp_path / "out").glob("gold*"))


def test_push_and_fetch_through_s3(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        address = f"http://{host}:{port}"
        import boto3

        boto3.client("s3", endpoint_url=address).create_bucket(Bucket="data")
        dvc(project, "remote", "modify", "storage", "url", "s3://data/prefloop")
        dvc(project, "remote", "modify", "storage", "endpointurl", address)
        git(project, "commit", "-qam", "a remote")
        dvc(project, "push", "-q")
        git(tmp_path, "clone", "-q", str(project), "clone")
        data(tmp_path / "clone", "fetch", "tiny@HEAD", "--to", tmp_path / "out")
    finally:
        server.stop()
    assert md5s(tmp_path / "out") == locked(project)


def test_without_git(project: Path, tmp_path: Path) -> None:
    digest = versions.current("tiny", project).digest
    shutil.rmtree(project / ".git")
    with pytest.raises(EnvironmentProblem, match=r"core\.no_scm true"):
        versions.prepare("tiny", project)
    dvc(project, "config", "--local", "core.no_scm", "true")
    version = versions.prepare("tiny", project)
    assert (version.digest, version.revision) == (digest, "")
    shown = data(project, "show", "tiny")
    assert digest in shown and "no git" in shown
    data(project, "fetch", "tiny", "--to", tmp_path / "out")
    assert md5s(tmp_path / "out") == locked(project)
    assert "no git repository" in refused(project, "show", "tiny@HEAD")


# -- one writer, many readers ------------------------------------------------------------------------------------


def slow_repro(root: Path, table: str, seconds: int = 600) -> subprocess.Popen[str]:
    """A `dvc repro` whose stage waits just before it puts a table in its place."""
    (root / "data/tiny/source/later.jsonl").write_text(json.dumps(tiny_data.rows(1, "later ")[0]) + "\n")
    registry = root / "data/datasets.yaml"
    registry.write_text(registry.read_text().replace("# the first batch", "\n        later: later.jsonl"))
    wait = f"__import__('time').sleep({seconds})"
    hook = f"if path.name == '{table}.parquet': path.with_suffix('.waiting').touch(); {wait}"
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "-q", "split@tiny"],
        cwd=root,
        env=surroundings(BEFORE_TABLE=hook),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: (root / f"data/tiny/{table}.waiting").exists())
    return process


def wait_for(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_second_writer_is_told_to_wait(project: Path, tmp_path: Path) -> None:
    batch = tiny.write_rows(tiny_data.rows(2, "second "), tmp_path / "second.jsonl")
    with versions.one_writer(project):
        said = attempt(project, sys.executable, "-m", "flows.cli", "data", "add", "tiny", str(batch)).stdout
    assert "another process is working on the data" in said and "wait for it to end" in said
    process = slow_repro(project, "rows")
    try:
        before = contents(project)
        with pytest.raises(EnvironmentProblem, match="another process is working on the data"):
            versions.prepare("tiny", project)
        assert "another process is working on the data" in refused(project, "add", "tiny", batch)
        assert contents(project) == before
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_a_reader_never_meets_half_a_table(project: Path, tmp_path: Path) -> None:
    batch = tiny.write_rows(tiny_data.rows(20, "more "), tmp_path / "more.jsonl")
    tables = [project / f"data/tiny/{name}.parquet" for name in ("rows", "valid", "preferences", "gold")]
    seen: dict[str, set[int]] = {path.name: set() for path in tables}
    failed: list[Exception] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            for path in tables:
                try:
                    seen[path.name].add(len(read_table(path)))
                except Exception as error:
                    failed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    data(project, "add", "tiny", batch)
    done.set()
    reader.join()
    assert failed == []
    assert seen["rows.parquet"] == {60, 100}
    assert all(len(sizes) == 2 for sizes in seen.values()), seen


def test_what_cannot_be_used_is_an_error_with_a_way_out(project: Path) -> None:
    assert "a file to add is not there" in refused(project, "add", "tiny", "nowhere.jsonl")
    assert "next" in refused(project, "report", "nothing")
    assert "a folder cannot be added" in refused(project, "add", "tiny", project)
    file = project / "data/datasets.yaml"
    assert "one of preferences, hh" in refused(project, "add", "new", file, "--format", "prefs")
    assert "call it my-data" in refused(project, "add", "my data", file, "--format", "hh")
    assert "has its columns already" in refused(project, "add", "tiny", file, "--columns", "prompt=question")
    assert "a column is FIELD=YOURS" in refused(project, "add", "new", file, "--format", "hh", "--columns", "prompt")
    with pytest.raises(DataError, match="has not been prepared at HEAD"):
        versions.at("nothing", project, "HEAD")
    result = attempt(project.parent, sys.executable, "-m", "flows.cli", "data", "list")
    assert result.returncode == 1 and "this is not a prefloop project" in result.stdout
