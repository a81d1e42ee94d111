"""Exceptions, exit codes, and errors in words that tell a user what to do."""

import errno
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

EXIT_UNFINISHED = os.EX_TEMPFAIL  # 75
"""Exit code of a run that should be started again."""
TIME_LIMIT = int(signal.SIGALRM)
"""Stands for train.max_wall_s among the signal numbers. No such signal is sent."""
TIME_LIMIT_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals that schedulers send shortly before the time limit of a job."""

SHARED_MEMORY = Path("/dev/shm")
FULL_DISK_BYTES = 1_000_000
"""A disk with less free space counts as full."""
PERMISSION_ERRORS = (errno.EACCES, errno.EPERM)
EXPECTED_PATH = {
    errno.ENAMETOOLONG: "a shorter name",
    errno.EISDIR: "a file, not a folder",
    errno.ENOTDIR: "a folder, not a file",
    errno.EEXIST: "a folder, not a file",
    errno.ELOOP: "no link that leads back to itself",
    errno.ENXIO: "a file, not a device or a pipe",
    errno.ENODEV: "a file, not a device or a pipe",
    errno.EINVAL: "a name that this file system accepts",
}


class UserError(ValueError):
    """Invalid input: says what was seen, what was expected, and what to do.

    Entry points print the message without a traceback and exit with code 2. Any other exception is a bug of this
    project and keeps its traceback.
    """


class MachineError(UserError):
    """A UserError that may differ between the machines of a run, such as a damaged file. Each one prints its own."""


class PrintedError(UserError):
    """Another process has printed the message."""


class TrainingDiverged(RuntimeError):
    """A gradient or weight is not finite, or too many updates in a row were skipped."""

    EXIT_CODE = 65
    """sysexits.h's EX_DATAERR. Not 1 (a crash that a restart may fix), nor 2 (a user error)."""


def exit_code(stopped_by: int) -> int:
    """Exit code of a run that a signal (or TIME_LIMIT) stopped."""
    return EXIT_UNFINISHED if stopped_by in (TIME_LIMIT, *TIME_LIMIT_SIGNALS) else 128 + stopped_by


def did_you_mean(word: str, known: list[str]) -> str:
    """`", did you mean 'x'?"` for the closest known word, or an empty string."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def require(task: str, extra: str, *modules: str) -> Any:
    """Import optional packages and return the last one.

    Args:
        task: what needs them, for the message.
        extra: the extra of this package that installs them.

    Raises:
        UserError: one is not installed.
    """
    try:
        return [import_module(module) for module in modules][-1]
    except ImportError as error:
        raise UserError(
            f"{task} needs {error.name}, which is not installed: pip install {' '.join(modules)} (or install the extra "
            f"`{extra}` of MyLLM)"
        ) from None


def bullets(lines: Iterable[str]) -> str:
    """A list in a message: one entry a line."""
    return "\n".join(f"  - {line}" for line in lines)


def warn(line: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


# -- OS errors --------------------------------------------------------------------------------------------------------


def out_of_space(error: BaseException | None) -> bool:
    """True if an error, or one of its causes, is a full disk, an exceeded quota or a file-size limit."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors gives the number only in its message, NumPy's tofile not even there.
    in_message = re.compile(rf"\(os error ({'|'.join(map(str, numbers))})\)|\d+ requested and \d+ written")
    while error is not None:
        if (isinstance(error, OSError) and error.errno in numbers) or in_message.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def explain_os_error(error: OSError, data: Path) -> str | None:
    """What a user can do about a file or folder that cannot be used. None if the error is not the user's to fix.

    Args:
        data: temp_data/, which can be moved.
    """
    path, reason = error.filename, error.strerror or str(error)
    if out_of_space(error):
        full = full_disk_path(error)
        remedy = "set MYLLM_DATA to a folder on a larger disk"
        if full == SHARED_MEMORY:
            remedy = "give the container more shared memory (--shm-size 8g)"
        return f"cannot write {full or 'a file'}: {reason}; free some space and run the same command again, or {remedy}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many files are open ({reason}); allow more with `ulimit -n 65536` and run the same command again"
    if not isinstance(path, str | bytes):
        return None
    path = os.fsdecode(path)
    if error.errno == errno.EROFS or (error.errno in PERMISSION_ERRORS and not _is_unreadable(Path(path))):
        return f"cannot write {path}: {reason}; make it writable, or give another folder (MYLLM_DATA for data and runs)"
    if error.errno in PERMISSION_ERRORS:
        return f"cannot read {path}: {reason}; make it readable"
    if error.errno in EXPECTED_PATH:
        remedy = "; or set MYLLM_DATA to another folder" if Path(path).is_relative_to(data) else ""
        return f"cannot use {path}: {reason}; expected {EXPECTED_PATH[error.errno]}{remedy}"
    return None


def full_disk_path(error: OSError, folder: Path | None = None) -> Path | None:
    """The file or folder that an out-of-space error is about.

    Args:
        folder: where data was being written. The error may be about another place: semaphores and queues of processes
            are in /dev/shm, and their errors have no file name.
    """
    if isinstance(error.filename, str | bytes):
        return Path(os.fsdecode(error.filename))
    for candidate in (folder, SHARED_MEMORY, Path(tempfile.gettempdir())):
        with suppress(OSError):
            if candidate is not None and shutil.disk_usage(candidate).free < FULL_DISK_BYTES:
                return candidate
    return folder


def _is_unreadable(path: Path) -> bool:
    """True if a file or folder exists, or may exist, and this user may not read it."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a parent folder cannot be entered
    return not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)
