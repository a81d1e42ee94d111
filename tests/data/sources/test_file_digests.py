"""A file is hashed once, by one of several processes, and again only if it may have changed."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from myllm.config import DataConfig, RunConfig
from myllm.data.prepare.prepare import resolve
from myllm.data.sources import file_digests
from myllm.training.preflight.data_and_disk import inspect_data_and_disk

Hashed = Callable[[], list[str]]


pytestmark = pytest.mark.usefixtures("temp_data")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two files, old enough to be cached."""
    monkeypatch.setattr(file_digests, "SETTLED_NS", -1)
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "ab":
        (texts / f"{name}.txt").write_text(f"the text of {name}")
    return texts


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hashed:
    """Returns the names of the files hashed since the last call, by any process."""
    log, real = tmp_path / "log", file_digests.file_sha256
    log.touch()

    def file_sha256(path: Path) -> str:
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        return real(path)

    def names() -> list[str]:
        seen = sorted(log.read_text().split())
        log.write_text("")
        return seen

    monkeypatch.setattr(file_digests, "file_sha256", file_sha256)
    return names


def ask(folder: Path) -> list[str]:
    """The digests of a folder's files, after checking them."""
    files = sorted(map(str, folder.glob("*.txt")))
    found = file_digests.file_digests(files, folder.parent / "listings" / "memory.json")
    for file, (size, digest) in zip(files, found, strict=True):
        content = Path(file).read_bytes()
        assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    return [digest for _, digest in found]


def test_rehashes_only_changed_files(folder: Path, hashed: Hashed) -> None:
    ask(folder)
    assert hashed() == ["a.txt", "b.txt"]
    ask(folder)
    assert hashed() == []
    before = (folder / "a.txt").stat()
    while (folder / "a.txt").stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock ticks
        (folder / "a.txt").write_text("the text of c")  # as long as it was
        os.utime(folder / "a.txt", ns=(before.st_atime_ns, before.st_mtime_ns))  # and, it says, as old
    (folder / "c.txt").write_text("new")
    ask(folder)
    assert hashed() == ["a.txt", "c.txt"]
    (folder / "c.txt").unlink()
    ask(folder)
    assert hashed() == []


def test_concurrent_processes_hash_once(folder: Path, hashed: Hashed) -> None:
    children, ready = [], os.pipe()
    for _ in range(4):
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.close(ready[1])
                os.read(ready[0], 1)  # all at once
                ask(folder)
                code = 0
            finally:  # never back into pytest
                os._exit(code)
        children.append(child)
    os.close(ready[1])
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert hashed() == ["a.txt", "b.txt"]


def test_recent_changes_not_cached(folder: Path, hashed: Hashed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may change again within the resolution of its times."""
    monkeypatch.setattr(file_digests, "SETTLED_NS", 10**18)
    for _ in range(2):
        ask(folder)
        assert hashed() == ["a.txt", "b.txt"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "myllm-digests-1", "files": {"a": [1]}}'])
def test_ignores_damaged_or_unwritable_cache(content: str, folder: Path, hashed: Hashed) -> None:
    memory = folder.parent / "listings" / "memory.json"
    memory.parent.mkdir()
    memory.write_text(content)
    ask(folder)
    assert hashed() == ["a.txt", "b.txt"]
    memory.unlink()
    memory.parent.rename(folder.parent / "elsewhere")
    memory.parent.write_text("a file where the folder should be")
    ask(folder)
    assert hashed() == ["a.txt", "b.txt"]


def test_restart_reuses_digests(folder: Path, hashed: Hashed) -> None:
    config = DataConfig(source=f"files:{folder}", val_tokens=2)
    assert resolve(config).folder == resolve(config).folder
    assert hashed() == ["a.txt", "b.txt"]


def test_preflight_does_not_hash(folder: Path, hashed: Hashed, temp_data: Path) -> None:
    """A preflight only needs sizes, and writes no cache."""
    config = DataConfig(source=f"files:{folder}", val_tokens=2)
    assert inspect_data_and_disk(replace(RunConfig(), data=config)).tokens
    assert hashed() == []
    assert not temp_data.exists()
