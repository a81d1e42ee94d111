"""Writes are whole or not at all; locks end with their holder."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

import pytest

from myllm import files
from myllm.errors import UserError, out_of_space
from myllm.files import (
    atomic_write,
    file_lock,
    file_sha256,
    is_locked,
    parse_json,
    read_json,
    read_rows,
    temporary_dir,
    write_json,
    write_text,
)


def test_write_replaces_without_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("first", "日本語\n", ""):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_write_preserves_old_file(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", fail) if failing == "fsync" else (Path, "replace", fail)))
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_concurrent_writes_are_atomic(tmp_path: Path) -> None:
    path, ready, writers = tmp_path / "a.txt", os.pipe(), []
    for letter in "abc":
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.close(ready[1])
                os.read(ready[0], 1)  # all at once
                for _ in range(60):
                    write_text(path, letter * 100_000)
                    seen = path.read_text()
                    assert len(seen) == 100_000
                    assert len(set(seen)) == 1
                code = 0
            finally:  # never back into pytest
                os._exit(code)
        writers.append(child)
    os.close(ready[1])
    assert [os.waitpid(writer, 0)[1] for writer in writers] == [0, 0, 0]
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_removes_only_stale_temporary_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"

    def write() -> AbstractContextManager[object]:
        return atomic_write(path) if kind == "file" else temporary_dir(path)

    if (child := os.fork()) == 0:
        with write():
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)  # this one: an earlier test's program may have ended too
    assert len(list(tmp_path.glob(".a.txt.*"))) == 1
    others = {".a.txt.tmp", ".a.txt.0123456789abcdef.tmp", ".b.txt.0123456789abcdef.myllm.tmp", ".a.txt.mine.myllm.tmp"}
    for name in others:
        (tmp_path / name).touch()
    with write():  # one that lives is left alone
        write_text(path, "new")
        assert len(list(tmp_path.glob(".a.txt.*"))) == len(others)
    assert {name.name for name in tmp_path.glob(".*")} == others


def test_write_file_with_maximum_name_length(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 125 + ".json")
    write_json(path, 1)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_lock_falls_back_to_local_directory(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file on a disk that has locks stands in for one that is not; where there are none at all, it is said."""
    (tmp_path / "lustre").mkdir()
    path, real = tmp_path / "lustre" / "lock", fcntl.flock

    def flock(file: IO[str] | int, operation: int) -> None:
        where = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
        if where.startswith(str(tmp_path / "lustre")):
            raise OSError(number, os.strerror(number))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    with file_lock(path) as everywhere:
        assert not everywhere
        assert is_locked(path)
        with pytest.raises(BlockingIOError), file_lock(path, wait=False):
            pass
    assert not is_locked(path)
    write_text(path.with_name("a.txt"), "written all the same")
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path / "lustre"))
    with pytest.raises(
        UserError, match=r"cannot lock .*lock: neither its file system nor that of .* has locks; set MYLLM_DATA"
    ):
        file_lock(path).__enter__()


def test_directory_fsync_failure_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_json_is_indented_utf8(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "été", "n": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "été",\n  "n": 1\n}\n'


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1_000_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"x" * 1_000_000).hexdigest()


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EFBIG, True), (errno.EACCES, False), (errno.EIO, False)],
)
def test_out_of_space_errno(number: int, expected: bool) -> None:
    assert out_of_space(OSError(number, "")) is expected


def test_held_lock_is_refused_until_released(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock"), pytest.raises(BlockingIOError), file_lock(tmp_path / "lock", wait=False):
        pass
    with file_lock(tmp_path / "lock", wait=False):
        pass


def test_lock_is_granted_while_another_process_tests_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`is_locked` shares the lock for a moment, which must not refuse the run that starts in this moment."""
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open("rb") as tester:
        fcntl.flock(tester, fcntl.LOCK_SH)
        monkeypatch.setattr(files.time, "sleep", lambda seconds: fcntl.flock(tester, fcntl.LOCK_UN))
        with file_lock(tmp_path / "lock", wait=False):
            assert is_locked(tmp_path / "lock")


def test_killed_process_releases_lock(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from myllm.files import file_lock\n"
    code += "with file_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError), file_lock(tmp_path / "lock", wait=False):
        pass
    process.kill()
    process.communicate(timeout=240)
    with file_lock(tmp_path / "lock", wait=False):
        pass


def test_json_round_trips_non_utf8_file_name(tmp_path: Path) -> None:
    name = os.fsdecode(b"n\xe9/\xc3\xa9")
    write_json(tmp_path / "a.json", {"source": name})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"source": name}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"a": 1', "is not valid JSON"),
        (b'{"a": "\xe9"}', "is not valid JSON: 'utf-8'"),
        (b"null", "holds null, expected an object"),
        (b"[{}]", "holds a list, expected an object"),
        (b"7", "holds a number, expected an object"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "is nested too deeply, expected at most 100 levels"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "is not valid JSON"),
    ],
)
def test_invalid_json_error_names_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json {message}"):
        read_json(tmp_path / "a.json")


def test_temporary_dir_is_recreated_after_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process that wants the same name takes it for a dead one's."""
    real, cleared = os.open, []

    def clear(path: Path, flags: int, *more: int, **named: int | None) -> int:
        if Path(path).is_dir() and not cleared:
            cleared.append(path)
            Path(path).rmdir()
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", clear)
    with temporary_dir(tmp_path / "a") as folder:
        assert folder.is_dir()
    assert cleared
    assert not list(tmp_path.iterdir())


def test_reads_bom_nan_and_nested_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(
        b'\xef\xbb\xbf{"a": [NaN, -Infinity], "b": ' + b"[[]," * 90 + b"[]" + b"]" * 90 + b"}"
    )
    assert read_json(tmp_path / "a.json")["a"][1] == float("-inf")
    assert parse_json("[1]", "here") == [1]


def test_malformed_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    """Damaged lines are skipped and counted. A text may contain other line separators."""
    odd = ["{}", "null", "[]", "7", "no JSON", '{"step": null}', '{"step": true}', '{"step": -1}', '{"step": "3"}']
    odd += [
        '{"step": 1e400}',
        '{"step": ' + "9" * 400 + "}",
        '{"step": 1, "a": ' + "[" * 3_000,
        '{"step": 1, "version": []}',
    ]
    good = ['{"step": 3, "text": "a\u2028b\x85c"}', '{"step": 4, "loss": NaN}\r']
    (tmp_path / "rows.jsonl").write_text("\n\n".join([*odd, *good]), encoding="utf-8", newline="")
    rows = list(read_rows(tmp_path / "rows.jsonl"))
    assert rows.count(None) == len(odd)
    assert [row["step"] for row in rows if row] == [3, 4]
    assert rows[-2]["text"] == "a\u2028b\x85c"
