"""Digests of one's own files, each hashed once.

What was found is kept under temp_data/listings with each file's size and times, and holds as long as these stay the
same. So one of a run's processes hashes, and none at its later starts.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from myllm.errors import UserError
from myllm.files import file_sha256, read_json, write_json

from .hub_listing import listing_lock

FORMAT = "myllm-digests-1"
SETTLED_NS, COARSE_NS = 100_000_000, 2_000_000_000
"""A file that was changed so shortly before it was hashed may change again without a difference in its times: its
digest is not kept. Times go forward in steps of some milliseconds, on some disks of whole seconds."""


class Stamp(NamedTuple):
    """What differs after a file's content was changed."""

    size_bytes: int
    modified_ns: int
    changed_ns: int
    """Beside the other, which programs can set back."""


Known = dict[str, tuple[Stamp, str]]


def file_digests(files: Sequence[str], memory: Path) -> list[tuple[int, str]]:
    """Size in bytes and sha256 of each file.

    Of several processes that ask the same one hashes, and the others wait for its answer.

    Args:
        memory: where the answer is kept. If that cannot be, every call hashes.

    Raises:
        UserError: a file that cannot be read.
    """
    known, unknown = _look_up(files, memory)
    if unknown:
        with ExitStack() as stack:
            with suppress(OSError, UserError):  # nothing can be written there: this process's own answer will do
                memory.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(listing_lock(memory))
            known, unknown = _look_up(files, memory)
            known |= _hash(unknown, known, memory)
    return [(known[file][0].size_bytes, known[file][1]) for file in files]


def size_of(file: str) -> int:
    """Bytes.

    Raises:
        UserError: it cannot be read.
    """
    return _stamp(file).size_bytes


def _hash(files: list[str], known: Known, memory: Path) -> Known:
    """The files' stamps and digests, kept with what is known of others."""
    now = time.time_ns()
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the lock
        found = dict(zip(files, pool.map(_hash_one, files), strict=True))
    kept = known | {
        file: (stamp, digest)
        for file, (stamp, digest) in found.items()
        if _is_settled(stamp, now) and _stamp(file) == stamp
    }
    if files:
        with suppress(OSError):
            rows = {file: [*stamp, digest] for file, (stamp, digest) in kept.items()}
            write_json(memory, {"format": FORMAT, "files": rows})
    return found


def _hash_one(file: str) -> tuple[Stamp, str]:
    stamp = _stamp(file)
    try:
        return stamp, file_sha256(Path(file))
    except OSError as error:
        raise _unreadable(file, error) from None


def _is_settled(stamp: Stamp, now_ns: int) -> bool:
    step_ns = SETTLED_NS if stamp.changed_ns % 1_000_000_000 else COARSE_NS
    return abs(now_ns - stamp.changed_ns) > step_ns


def _look_up(files: Sequence[str], memory: Path) -> tuple[Known, list[str]]:
    """What is kept and still holds, and the files of which nothing is."""
    try:
        content = read_json(memory)
        rows = content["files"] if content["format"] == FORMAT else {}
        kept = {file: (Stamp(*stamp), str(digest)) for file, (*stamp, digest) in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        kept = {}
    known = {file: kept[file] for file in files if file in kept and kept[file][0] == _stamp(file)}
    return known, [file for file in files if file not in known]


def _stamp(file: str) -> Stamp:
    try:
        found = os.stat(file)
        return Stamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: str, error: OSError) -> UserError:
    return UserError(f"cannot read {file}: {error.strerror}; make it readable, or leave it out of the source")
