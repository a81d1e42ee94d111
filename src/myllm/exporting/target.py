"""What an export writes: under another name, until it is whole and checked."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..files import fsync_folder, out_of_space


@contextmanager
def unfinished(to: Path) -> Iterator[Path]:
    """A folder beside `to` to write in; gone at the end with what is left in it, after a kill at the next try.

    Raises:
        UserError: nothing can be written there, or the disk is full.
    """
    work = to.with_name(f".partial-{to.name}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {to}: {error.strerror}; give another place") from None
    try:
        yield work
    except Exception as error:
        if not out_of_space(error):
            raise
        raise UserError(f"cannot write {to}: the disk is full. Nothing was exported; free some space") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    fsync_folder(to.parent)
