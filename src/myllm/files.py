"""Files that survive crashes: atomic writes, locks, hashes, and JSON that is read strictly.

A file gets its final name only when it is complete and flushed to the disk.
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from .errors import UserError
from .migrations import ROW

TEMP_SUFFIX = ".myllm.tmp"  # of files that are still being written
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""Errors of file systems without locks: Lustre without `-o flock`, some NFS and cloud disks."""
NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF)
"""Errors of file systems that cannot flush a folder: SMB, Windows disks under WSL, some FUSE."""
MAX_JSON_DEPTH = 100  # no file of ours or of a model is nested deeper than ten levels
NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no such numbers: written as strings

# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends without an error. Readers see the old content or the new.

    Several processes may write the same file at once; the last one wins.

    Args:
        durable: flush it to the disk before it gets its name.
    """
    with add_filename(path):
        temporary, descriptor = _create_temporary(
            path, lambda name: os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        )
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            fsync_dir(path.parent)


@contextmanager
def temporary_dir(path: Path) -> Iterator[Path]:
    """Create a private folder next to `path`, to be renamed to it.

    It is removed when the block ends, with whatever is left in it. If the process is killed, the next call for the same
    path removes it.
    """

    def create(name: Path) -> int:
        while True:
            name.mkdir()
            with suppress(FileNotFoundError):  # another process removed it before it was locked
                return os.open(name, os.O_RDONLY)

    folder, descriptor = _create_temporary(path, create)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _create_temporary(path: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    """Create a file or folder with an unused name next to `path`, and remove those that killed writers left.

    Returns:
        its path, and its open descriptor. The descriptor holds a lock, so that other processes see that the writer is
        alive.
    """
    # File names have at most 255 bytes, and the prefix and suffix need some.
    name = path.name if len(os.fsencode(path.name)) <= 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    _remove_abandoned(path.parent, re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}{re.escape(TEMP_SUFFIX)}"))
    while True:
        temporary = path.with_name(f".{name}.{secrets.token_hex(8)}{TEMP_SUFFIX}")
        descriptor = create(temporary)
        with suppress(OSError):  # without locks, abandoned files stay
            _flock(descriptor, wait=True)
        if temporary.exists():  # else another process took it for abandoned before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _remove_abandoned(folder: Path, name: re.Pattern[str]) -> None:
    """Remove what killed writers left: files and folders whose full name matches and that nobody has locked."""
    with suppress(OSError):  # a folder may be writable but not listable
        for path in [Path(entry.path) for entry in os.scandir(folder) if name.fullmatch(entry.name)]:
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
                try:
                    _flock(descriptor, wait=False)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                finally:
                    os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically. Characters that UTF-8 cannot encode (file names may have some) are escaped."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fsync_dir(folder: Path) -> None:
    """Flush a folder's entries to the disk: without it, a rename may be lost in a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile do not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def nearest_existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists: it is on the same disk."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(nearest_existing(folder)).free


@contextmanager
def add_filename(path: Path) -> Iterator[None]:
    """Set the file name of an OSError that has none: failed writes don't name their file."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(TEMP_SUFFIX):
            error.filename = str(path)
        raise


# -- JSON -------------------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes, source: object) -> Any:
    """Parse any JSON value. NaN and Infinity are accepted: they are not JSON, but other programs write them.

    Args:
        source: the file or line, for messages.

    Raises:
        UserError: invalid JSON or UTF-8, or nested too deeply for recursive code.
    """
    too_deep = f"{source} is nested too deeply, expected at most {MAX_JSON_DEPTH} levels"
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise UserError(too_deep) from None
    except ValueError as error:
        raise UserError(f"{source} is not valid JSON: {error}") from None
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _json_depth(value) > MAX_JSON_DEPTH:
        raise UserError(too_deep)
    return value


def _json_depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        depth += 1
        level = [deep for inner in level for deep in (inner.values() if isinstance(inner, dict) else inner)]
    return depth


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file. The caller checks the types of its values.

    Raises:
        UserError: not a JSON object.
        OSError: the file cannot be read.
    """
    value = parse_json(path.read_bytes(), path)
    if not isinstance(value, dict):
        names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
        raise UserError(f"{path} holds {names.get(type(value), 'a number')}, expected an object")
    return value


def read_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """Read the rows of a run's metrics.jsonl or samples.jsonl, with migrated keys. Blank lines are skipped.

    Yields:
        a row; or None for an invalid line, such as the last one after a crash: not an object, or without a step.
    """
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:  # texts may contain other line ends
        for line in lines:
            if line.strip():
                yield parse_row(line, path)


def parse_row(line: str, path: Path) -> dict[str, Any] | None:
    """One line of `read_rows`."""
    try:
        row = parse_json(line, path)
        row = ROW.upgrade(row) if isinstance(row, dict) else {}
    except UserError:
        row = {}
    if "kind" in row:  # metrics; texts of samples stay as they are
        row = {key: NONFINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
    valid = type(row.get("step")) is int and 0 <= row["step"] < 2**53
    return row if valid else None


def json_safe(value: Any) -> Any:
    """The same value with numbers that are not finite as strings (see NONFINITE)."""
    return map_json(lambda leaf: str(leaf) if isinstance(leaf, float) and not math.isfinite(leaf) else leaf, value)


def map_json(convert: Callable[[Any], Any], value: Any) -> Any:
    """The same lists and dictionaries with each value in them converted; tuples become lists."""
    if isinstance(value, dict):
        return {key: map_json(convert, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [map_json(convert, inner) for inner in value]
    return convert(value)


# -- locks ------------------------------------------------------------------------------------------------------------


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file. The system releases it when the process ends, even if it is killed.

    On a file system without locks, a file in the local folder for temporary files is locked instead, which only
    excludes other processes of this machine.

    Yields:
        True if other machines are excluded too.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
        UserError: neither file system has locks.
    """
    with path.open("a") as file:
        if excludes_machines := _try_lock(file, wait):
            yield excludes_machines
            return
    with open(_local_lock_path(path), "a", opener=_open_private) as file:
        if not _try_lock(file, wait):
            raise UserError(
                f"cannot lock {path}: neither its file system nor that of {file.name} has locks; set MYLLM_DATA or "
                "TMPDIR to a folder on a local disk"
            )
        yield False


def is_locked(path: Path) -> bool:
    """True if a process holds the lock on a file; False if there is no such file."""
    for candidate in (path, _local_lock_path(path)):
        try:
            with candidate.open("rb") as file:
                if _try_lock(file, wait=False, shared=True):  # shared: two processes that test don't see each other
                    return False
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _try_lock(file: IO[Any], wait: bool, shared: bool = False) -> bool:
    """Lock an open file. Returns False if its file system has no locks."""
    while True:
        try:
            _flock(file, wait, shared)
            return True
        except OSError as error:
            if error.errno in NO_LOCKS:
                return False
            if shared or not _is_only_tested(file):
                raise
        time.sleep(0.001)


def _is_only_tested(file: IO[Any]) -> bool:
    """True if nobody holds the lock of an open file but processes that are in `is_locked` just now."""
    import fcntl

    try:
        _flock(file, wait=False, shared=True)
    except OSError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True


def _flock(file: IO[Any] | int, wait: bool, shared: bool = False) -> None:
    import fcntl  # imported here, so that Windows, which has none, gets a message instead of a traceback

    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def _local_lock_path(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"myllm-{os.getuid()}-{name}.lock")


def _open_private(path: str, flags: int) -> int:
    """Everybody can write to the folder for temporary files, so don't follow links there."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
