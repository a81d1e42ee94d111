"""What an export writes: under another name, until it is whole and checked."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from myllm.errors import UserError, out_of_space
from myllm.files import fsync_dir, temporary_dir


@contextmanager
def atomic_dir(to: Path) -> Iterator[Path]:
    """A folder beside `to` to write in, for this process alone; gone at the end with what is left in it, after a kill
    at the next try.

    Raises:
        UserError: nothing can be written there, or the disk is full.
    """
    with ExitStack() as stack:
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            work = stack.enter_context(temporary_dir(to))
        except OSError as error:
            raise UserError(f"cannot write {to}: {error.strerror}; give another place") from None
        try:
            yield work
        except Exception as error:
            if not out_of_space(error):
                raise
            raise UserError(f"cannot write {to}: the disk is full. Nothing was exported; free some space") from None
    fsync_dir(to.parent)
