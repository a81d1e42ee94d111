"""The lock that a preparation holds on its data set. It ends with its process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from myllm.errors import MachineError
from myllm.files import file_lock, is_locked

BACKGROUND = ".background"
"""Suffix of a second lock: a preparation started by training holds it from its first moment. The data set's own lock is
taken only after the source's files are hashed, which takes minutes for a large source."""


class PreparationEnded(MachineError):
    """A data set is incomplete, and nobody is preparing the rest of it."""


@contextmanager
def preparation_lock(folder: Path, suffix: str = "") -> Iterator[None]:
    """Hold the preparation of a data set, or of a part of it, for this process; other processes wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(lock_path(folder, suffix)):
        yield


def lock_path(folder: Path, suffix: str = "") -> Path:
    return folder.parent / f".{folder.name}{suffix}.lock"


def is_being_prepared(folder: Path) -> bool:
    return any(is_locked(lock_path(folder, suffix)) for suffix in ("", BACKGROUND))


def preparation_ended(folder: Path) -> PreparationEnded:
    return PreparationEnded(
        f"the preparation of {folder} ended before the data set was complete (its own message is above, or where it "
        "was started); run the same command again: finished work is kept"
    )
