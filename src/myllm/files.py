"""Writing that survives a crash: whole or not at all, and on the disk before anything says so."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from myllm import paths

from .errors import UserError
from .migrations import ROW

SHARED_MEMORY = Path("/dev/shm")
MORE_SHARED_MEMORY = "or give a container more of this memory (--shm-size 8g)"
FULL_BYTES = 1_000_000
"""A disk with less free space is taken for a full one."""
FORBIDDEN = (errno.EACCES, errno.EPERM)
UNUSABLE = {
    errno.ENAMETOOLONG: "a shorter name",
    errno.EISDIR: "a file, not a folder",
    errno.ENOTDIR: "a folder, not a file",
    errno.EEXIST: "a folder, not a file",
    errno.ELOOP: "no link that leads back to itself",
    errno.ENXIO: "a file, not a device or a pipe",
    errno.ENODEV: "a file, not a device or a pipe",
    errno.EINVAL: "a name that this file system takes",
}
"""What is expected of a path, by the error that says it is not so."""
TEMP_SUFFIX = ".myllm.tmp"
"""How the name of a file ends that is not whole yet."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What file systems without locks say: Lustre without `-o flock`, some NFS, disks in a cloud."""
NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF)
"""What file systems say that cannot flush a folder: SMB, Windows' disks under WSL, some FUSE."""


@contextmanager
def atomic_write(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` in one step when the block ends without an error: readers see
    the old content or the new, never a part.

    Until then its name is this writer's alone, so that several may write the same file at once; the last one's stays.

    Args:
        durable: on the disk before it has its name.
    """
    with add_filename(path):
        temporary, descriptor = _own(path, lambda name: os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
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
    """A new folder beside `path`, for what is to have that name, and for this process alone. It is removed when the
    block ends, with what is still in it, and after a kill by the next call for the same path."""

    def make(name: Path) -> int:
        while True:
            name.mkdir()
            with suppress(FileNotFoundError):  # taken for a dead writer's before it was open
                return os.open(name, os.O_RDONLY)

    folder, descriptor = _own(path, make)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _own(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """A name beside a path that nothing has yet, and what was made under it: open, and locked for as long as it is, so
    that others see whether its writer lives. What killed writers left of the same path is removed before."""
    # A name of up to 255 bytes must have room for what stands around it.
    name = path.name if len(os.fsencode(path.name)) <= 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    _remove_left_behind(path.parent, re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}{re.escape(TEMP_SUFFIX)}"))
    while True:
        temporary = path.with_name(f".{name}.{secrets.token_hex(8)}{TEMP_SUFFIX}")
        descriptor = make(temporary)
        with suppress(OSError):  # no locks here: what a kill leaves will stay
            _lock(descriptor, wait=True)
        if temporary.exists():  # else it was taken for a dead writer's, before it was locked
            return temporary, descriptor
        os.close(descriptor)


def _remove_left_behind(folder: Path, name: re.Pattern[str]) -> None:
    """Remove what killed writers left, and nothing else: by its exact name, and by its lock."""
    with suppress(OSError):  # a folder that may be written in, and not listed
        for left in [Path(entry.path) for entry in os.scandir(folder) if name.fullmatch(entry.name)]:
            with suppress(OSError):
                descriptor = os.open(left, os.O_RDONLY if left.is_dir() else os.O_RDWR)
                try:
                    _lock(descriptor, wait=False)
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                finally:
                    os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: see `replacing`. What UTF-8 cannot hold, as in a name of another encoding, is escaped
    as JSON does it."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def unwritable_reason(path: Path) -> str | None:
    """Why a file of this name cannot be written, to be asked before the hours that its content takes; None if it can
    be. Folders that are not there yet are taken for made."""
    try:
        if path.is_dir():
            return "it is a folder"
        if path.exists() and not os.access(path, os.W_OK):
            return os.strerror(errno.EACCES)
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def check_writable(path: Path, option: str) -> None:
    """
    Raises:
        UserError: the file that an option names cannot be written.
    """
    if reason := unwritable_reason(path):
        raise UserError(f"cannot write {path}: {reason}; give another file with {option}")


MAX_NESTING = 100
"""Of JSON that is read. No file of ours or of models is nested deeper than ten."""


def parse_json(text: str | bytes, where: object) -> Any:
    """Any JSON value. NaN and Infinity are taken too: they are no JSON, but programs write them.

    Args:
        where: the file, or the line of it, for messages.

    Raises:
        UserError: no JSON, no UTF-8, or nested too deeply for programs that walk through it.
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise UserError(f"{where} is nested too deeply, expected at most {MAX_NESTING} levels") from None
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if text.count("[") + text.count("{") > MAX_NESTING and _nesting(value) > MAX_NESTING:
        raise UserError(f"{where} is nested too deeply, expected at most {MAX_NESTING} levels")
    return value


def _nesting(value: Any) -> int:
    depth, level = 0, [value]
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        depth += 1
        level = [deep for inner in level for deep in (inner.values() if isinstance(inner, dict) else inner)]
    return depth


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Types of what is in it are the caller's to check.

    Raises:
        OSError: it cannot be read.
        UserError: it holds no JSON object.
    """
    value = parse_json(path.read_bytes(), path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {_json_type(value)}, expected an object")
    return value


def read_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of a run's metrics.jsonl or samples.jsonl, in order and by today's names; None for a line that is no
    row: no object, or without a step, as the last line is after a crash. Blank lines are left out.

    Raises:
        OSError: it cannot be read.
    """
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:  # a text may hold any other line end
        for line in lines:
            if line.strip():
                try:
                    row = parse_json(line, path)
                    row = restore_nonfinite(ROW.upgrade(row)) if isinstance(row, dict) else None
                except UserError:
                    row = None
                yield row if row is not None and _is_step(row.get("step")) else None


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _json_type(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
    }
    return names.get(type(value), "an object")


def fsync_dir(folder: Path) -> None:
    """Make the names in a folder last: a rename is only as durable as its folder.

    Some file systems cannot; nothing more can be done there.
    """
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


def out_of_space(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a write without room: a full disk, a quota, a file-size limit."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors has the number in its message alone, NumPy's tofile not even there.
    spelled = re.compile(rf"\(os error ({'|'.join(map(str, numbers))})\)|\d+ requested and \d+ written")
    while error is not None:
        if (isinstance(error, OSError) and error.errno in numbers) or spelled.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def add_filename(path: Path) -> Iterator[None]:
    """Give an OSError the file that it is about: a write without room has none of its own."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(TEMP_SUFFIX):
            error.filename = str(path)
        raise


def explain_os_error(error: OSError) -> str | None:
    """What a user can do about a file or folder that cannot be used; None: the fault is not the user's to mend."""
    path, why = error.filename, error.strerror or str(error)
    if out_of_space(error):
        where = full_disk_path(error)
        more = MORE_SHARED_MEMORY if where == SHARED_MEMORY else "or set MYLLM_DATA to a folder on a larger disk"
        return f"cannot write {where or 'a file'}: {why}; free some space and start the same command again, {more}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many files are open ({why}); allow more with `ulimit -n 65536`, and start the same command again"
    if not isinstance(path, str | bytes):
        return None
    path = os.fsdecode(path)
    if error.errno == errno.EROFS or (error.errno in FORBIDDEN and not _is_unreadable(Path(path))):
        return f"cannot write {path}: {why}; make it writable, or give another folder (MYLLM_DATA for data and runs)"
    if error.errno in FORBIDDEN:
        return f"cannot read {path}: {why}; make it readable"
    if error.errno in UNUSABLE:
        elsewhere = "; or set MYLLM_DATA to another folder" if Path(path).is_relative_to(paths.temp_data()) else ""
        return f"cannot use {path}: {why}; expected {UNUSABLE[error.errno]}{elsewhere}"
    return None


def full_disk_path(error: OSError, folder: Path | None = None) -> Path | None:
    """Which file or folder an error without room is about.

    Args:
        folder: where something was being written; semaphores and queues of processes lie in /dev/shm, and their errors
            do not say so.
    """
    if isinstance(error.filename, str | bytes):
        return Path(os.fsdecode(error.filename))
    for each in (folder, SHARED_MEMORY, Path(tempfile.gettempdir())):
        with suppress(OSError):
            if each is not None and shutil.disk_usage(each).free < FULL_BYTES:
                return each
    return folder


def _is_unreadable(path: Path) -> bool:
    """Whether a file or folder is there, or may be, and this user may not read it."""
    effective = os.access in os.supports_effective_ids
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a folder above it cannot be entered
    return not os.access(path, os.R_OK, effective_ids=effective)


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a file's lock. The system lets go of it when the process ends, however it ends.

    Where the file system has no locks, a file in the machine's own folder for temporary files is locked instead: that
    keeps the processes of this machine apart.

    Yields:
        whether other machines are kept out, too.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
        UserError: there are no locks here at all.
    """
    with path.open("a") as file:
        if everywhere := _try_lock(file, wait):
            yield everywhere
            return
    with open(_substitute(path), "a", opener=_open_own) as file:
        if not _try_lock(file, wait):
            raise UserError(
                f"cannot lock {path}: neither its file system nor {file.name}'s has locks; set MYLLM_DATA to a folder "
                "on a local disk, or TMPDIR to one"
            )
        yield False


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file; False where it is not there."""
    for each in (path, _substitute(path)):
        try:
            with each.open("rb") as file:
                if _try_lock(file, wait=False, shared=True):  # two who ask do not take each other for an answer
                    return False
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _try_lock(file: IO[Any], wait: bool, shared: bool = False) -> bool:
    """Lock an open file, or say False: its file system has no locks."""
    try:
        _lock(file, wait, shared)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def _lock(file: IO[Any] | int, wait: bool, shared: bool = False) -> None:
    import fcntl  # here: Windows has none, and is to be told so in words

    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def _substitute(path: Path) -> Path:
    """Where a lock is held for a file on a disk that has none."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"myllm-{os.getuid()}-{name}.lock")


def _open_own(path: str, flags: int) -> int:
    """Everybody can write to the folder for temporary files: follow nobody's link there."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""JSON has no such numbers: they are written as texts."""


def json_safe(value: Any) -> Any:
    """The same for JSON: numbers that are not finite as NOT_FINITE spells them."""
    if isinstance(value, dict):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def restore_nonfinite(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics with the numbers that `json_safe` spelled; one of samples, which has no kind, as it is."""
    if "kind" not in row:
        return row
    return {key: NONFINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
