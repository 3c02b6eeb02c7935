"""Where bytes come from: found, fetched, checked against their sha256, and kept."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import fsspec
import pytest
from tenacity import Retrying, stop_after_attempt

from steps import sources
from steps.datasets import Source
from steps.errors import DataError
from steps.sources import File, files_of


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(folder: Path, **files: bytes) -> None:
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def read(source: Source, local: Path, downloads: Path | None = None) -> list[tuple[str, str, bytes]]:
    """(role, name, bytes) of every file."""
    with files_of(source, local, downloads or local / "downloads") as files:
        found = []
        for file in files:
            with file.open() as stream:
                found.append((file.role, file.name, stream.read()))
        return found


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried twice."""
    monkeypatch.setattr(sources, "_retried", lambda kind: Retrying(stop=stop_after_attempt(1), reraise=True))


# -- on this machine ---------------------------------------------------------------------------------------------


def test_files_come_in_the_order_of_their_roles(tmp_path: Path) -> None:
    put(tmp_path, p_jsonl=b"{}\r\n", q_jsonl=b"[]")
    source = Source(files={"second": "p.jsonl", "first": "q.jsonl"})
    assert read(source, tmp_path) == [("first", "q.jsonl", b"[]"), ("second", "p.jsonl", b"{}\r\n")]


def test_a_folder_gives_its_data_files_sorted_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path, raw__b_jsonl=b"b", raw__a__z_csv=b"z", raw__readme_md=b"no", other_jsonl=b"no")
    (tmp_path / "raw" / "c.JSONL.gz").write_bytes(gzip.compress(b"c"))
    assert read(Source(files={"all": "raw"}), tmp_path) == [
        ("all", "raw/a/z.csv", b"z"),
        ("all", "raw/b.jsonl", b"b"),
        ("all", "raw/c.JSONL.gz", b"c"),
    ]


def test_what_goes_with_data_is_left_aside_and_what_may_be_data_is_not(tmp_path: Path) -> None:
    for name in (".cache/p.jsonl", "._p.jsonl", "LICENSE.txt", "_SUCCESS", "p.jsonl", "_part.jsonl", "readme"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(b"x")
    assert [name for _, name, _ in read(Source(files={"all": "raw"}), tmp_path)] == ["raw/_part.jsonl", "raw/p.jsonl"]
    (tmp_path / "raw" / "more.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match="a kind that is not known") as caught:
        read(Source(files={"all": "raw"}), tmp_path)
    assert "more.xlsx" in str(caught.value)
    assert "raw/*.jsonl" in str(caught.value)


@pytest.mark.parametrize("pattern", ["part-*.jsonl", "part-?.jsonl", "part-[12].jsonl"])
def test_a_pattern_gives_the_files_it_fits(pattern: str, tmp_path: Path) -> None:
    for name in ("part-2.jsonl", "part-1.jsonl", "whole.jsonl"):
        (tmp_path / name).write_bytes(name.encode())
    assert [name for _, name, _ in read(Source(files={"p": pattern}), tmp_path)] == ["part-1.jsonl", "part-2.jsonl"]


@pytest.mark.parametrize("where", ["p.jsonl", "*.jsonl", "empty"])
def test_a_missing_file_is_named_with_what_is_there(where: str, tmp_path: Path) -> None:
    put(tmp_path, pairs_csv=b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        read(Source(files={"pairs": where}), tmp_path)
    text = str(caught.value)
    assert "the source file for 'pairs' cannot be read" in text
    assert str(tmp_path / where) in text
    assert "pairs.csv" in text
    assert "source.files.pairs" in text


def test_a_file_outside_the_folder_keeps_its_address(tmp_path: Path) -> None:
    put(tmp_path, elsewhere__p_jsonl=b"x", local__q_jsonl=b"y")
    where = str(tmp_path / "elsewhere" / "p.jsonl")
    assert read(Source(files={"p": where}), tmp_path / "local", tmp_path) == [("p", where, b"x")]
    assert read(Source(files={"p": "../elsewhere/p.jsonl"}), tmp_path / "local", tmp_path)[0][2] == b"x"


def test_another_file_than_the_registry_names_is_refused_with_both_digests(tmp_path: Path) -> None:
    put(tmp_path, p_jsonl=b"{}")
    with pytest.raises(DataError, match="not the file the registry names") as caught:
        read(Source(files={"pairs": "p.jsonl"}, sha256=sha256(b"{ }")), tmp_path)
    assert sha256(b"{}") in str(caught.value)
    assert sha256(b"{ }") in str(caught.value)


def test_each_of_several_files_is_held_against_its_own_digest(tmp_path: Path) -> None:
    put(tmp_path, a_jsonl=b"a", b_jsonl=b"b")
    files = {"a": "a.jsonl", "b": "b.jsonl"}
    assert len(read(Source(files=files, sha256={"a": sha256(b"a"), "b": sha256(b"b")}), tmp_path)) == 2
    with pytest.raises(DataError, match=sha256(b"b")):
        read(Source(files=files, sha256={"b": sha256(b"a")}), tmp_path)


def test_one_digest_cannot_stand_for_a_folder(tmp_path: Path) -> None:
    put(tmp_path, raw__a_jsonl=b"a", raw__b_jsonl=b"b")
    with pytest.raises(DataError, match="a sha256 is of one file"):
        read(Source(files={"all": "raw"}, sha256=sha256(b"b")), tmp_path)


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl.zst", "p.jsonl.bz2"])
def test_what_does_not_decompress_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not compressed at all")
    with pytest.raises(DataError, match="cannot be read") as caught:
        read(Source(files={"p": name}), tmp_path)
    assert name in str(caught.value)


# -- at an address -----------------------------------------------------------------------------------------------


@pytest.fixture
def address() -> str:
    with fsspec.open("memory://somewhere/p.jsonl", "wb") as stream:
        stream.write(b"remote")
    return "memory://somewhere/p.jsonl"


def test_an_address_is_fetched_once_and_kept_under_its_digest(address: str, tmp_path: Path) -> None:
    source = Source(files={"p": address}, sha256=sha256(b"remote"))
    assert read(source, tmp_path) == [("p", address, b"remote")]
    fsspec.filesystem("memory").rm("/somewhere/p.jsonl")
    assert read(source, tmp_path) == [("p", address, b"remote")]
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == [sha256(b"remote")]


def test_a_file_address_is_fetched_and_decompressed_by_its_name(tmp_path: Path) -> None:
    data = gzip.compress(b"remote")
    (tmp_path / "p.jsonl.gz").write_bytes(data)
    source = Source(files={"p": f"file://{tmp_path}/p.jsonl.gz"}, sha256={"p": sha256(data)})
    assert read(source, tmp_path)[0][2] == b"remote"


@pytest.mark.parametrize("query", ["?download=1", "?a=b.csv#c", "#x"])
def test_what_an_address_asks_for_beside_the_file_is_no_part_of_its_kind(query: str) -> None:
    file = File("p", f"https://example.org/p.jsonl.gz{query}", Path("x"))
    assert (file.suffix, file.compression_suffix) == (".jsonl", ".gz")
    assert File("p", "who?.csv", Path("x")).suffix == ".csv"


def test_an_archive_without_a_byte_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"p\.jsonl\.gz"):
        read(Source(files={"p": "p.jsonl.gz"}), tmp_path)


def test_an_address_without_a_digest_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs its sha256"):
        read(Source(files={"p": address}), tmp_path)


def test_an_address_that_holds_something_else_is_refused_and_not_kept(address: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=sha256(b"remote")):
        read(Source(files={"p": address}, sha256=sha256(b"other")), tmp_path)
    assert list((tmp_path / "downloads").iterdir()) == []


def test_what_was_kept_is_checked_again(address: str, tmp_path: Path) -> None:
    put(tmp_path / "downloads", **{sha256(b"remote"): b"altered since"})
    with pytest.raises(DataError, match=sha256(b"altered since")):
        read(Source(files={"p": address}, sha256=sha256(b"remote")), tmp_path)


@pytest.mark.parametrize("address", ["memory://nowhere/x.jsonl", "gopher://x/y.jsonl", "file:///nowhere/x.jsonl"])
def test_an_address_that_cannot_be_fetched_is_named(address: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        read(Source(files={"p": address}, sha256="0" * 64), tmp_path)
    assert address in str(caught.value)


@pytest.mark.parametrize("failure", [OSError, RuntimeError])
def test_whatever_a_store_raises_is_a_data_error(
    failure: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise failure("no credentials")

    monkeypatch.setattr(sources.fsspec, "open", broken)
    with pytest.raises(DataError, match="no credentials"):
        read(Source(files={"p": "s3://bucket/p.jsonl"}, sha256="0" * 64), tmp_path)


# -- in an archive -----------------------------------------------------------------------------------------------


def archive(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def unpacked(data: bytes, downloads: Path, **settings: object) -> list[tuple[str, str, bytes]]:
    """Read an archive that lies among the downloads already: nothing is asked of the network."""
    (downloads / sha256(data)).write_bytes(data)
    source = Source(pypi="a==1", sha256=sha256(data), **{"files": {"texts": "a/t.txt"}, **settings})
    return read(source, downloads, downloads)


def test_a_file_is_taken_out_of_the_fetched_archive(tmp_path: Path) -> None:
    assert unpacked(archive({"a/t.txt": b"text"}), tmp_path) == [("texts", "a/t.txt", b"text")]


def test_a_file_is_taken_out_of_an_archive_inside_the_archive(tmp_path: Path) -> None:
    outer = archive({"a/inner.tar.gz": archive({"a/t.txt": b"text"})})
    assert unpacked(outer, tmp_path, archive="a/inner.tar.gz") == [("texts", "a/t.txt", b"text")]


@pytest.mark.parametrize("data", [archive({"a/other.txt": b"x"}), b"no archive", b""])
def test_an_archive_without_the_file_is_a_data_error(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not hold the named file") as caught:
        unpacked(data, tmp_path)
    assert "a==1" in str(caught.value)


def test_a_fetched_archive_is_checked_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came = archive({"a/t.txt": b"text"})

    def download(requirement: str, into: Path) -> Path:
        (into / "a-1.tar.gz").write_bytes(came)
        return into / "a-1.tar.gz"

    monkeypatch.setattr(sources, "_pip_download", download)
    meant = Source(pypi="a==1", sha256=sha256(b"what was meant"), files={"texts": "a/t.txt"})
    with pytest.raises(DataError, match=sha256(came)):
        read(meant, tmp_path)
    right = meant.model_copy(update={"sha256": sha256(came)})
    assert read(right, tmp_path)[0][2] == b"text"
    monkeypatch.delattr(sources, "_pip_download")
