"""Writing that survives a crash: whole or not at all, and on the disk before anything says so."""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        text = json.dumps(value, indent=2)  # the name of a file that is no UTF-8, which only an escape can hold
    write_text(path, text + "\n")


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder last: a rename is only as durable as its folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
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
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a file's lock. The system lets go of it when the process ends, however it ends.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
