"""Digests of local files, each computed once.

They are cached under temp_data/listings with the size and times of each file, and are valid while these are unchanged.
So one of a run's processes hashes, and none at later starts.
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
SETTLED_NS = 2_000_000_000
"""A file that was changed this recently may change again without a difference in its times, so its digest is not
cached. Times advance in steps of milliseconds, on some disks of whole seconds."""


class Stamp(NamedTuple):
    """What differs after a change of a file's content."""

    size_bytes: int
    modified_ns: int
    changed_ns: int
    """Programs can set `modified_ns` back, but not this."""


Digests = dict[str, tuple[Stamp, str]]


def file_digests(files: Sequence[str], cache: Path) -> list[tuple[int, str]]:
    """Size in bytes and sha256 of each file. If several processes need them, one hashes and the others wait.

    Args:
        cache: the cache file. If it cannot be written, every call hashes.

    Raises:
        OSError: a file cannot be read.
    """
    known, unknown = _look_up(files, cache)
    if unknown:
        with ExitStack() as stack:
            with suppress(OSError, UserError):  # not writable
                stack.enter_context(listing_lock(cache))
            known, unknown = _look_up(files, cache)
            if unknown:
                known |= _hash(unknown, known, cache)
    return [(known[file][0].size_bytes, known[file][1]) for file in files]


def _hash(files: list[str], known: Digests, cache: Path) -> Digests:
    """The digests of `files`, cached together with the known ones."""
    now = time.time_ns()
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        hashed = dict(zip(files, pool.map(_hash_file, files), strict=True))
    settled = {file: found for file, found in hashed.items() if abs(now - found[0].changed_ns) > SETTLED_NS}
    with suppress(OSError):
        rows = {file: [*stamp, digest] for file, (stamp, digest) in (known | settled).items()}
        write_json(cache, {"format": FORMAT, "files": rows})
    return hashed


def _hash_file(file: str) -> tuple[Stamp, str]:
    return _stamp(file), file_sha256(Path(file))  # in this order: a later change gives another stamp


def _look_up(files: Sequence[str], cache: Path) -> tuple[Digests, list[str]]:
    """The cached digests that are still valid, and the files without one."""
    try:
        content = read_json(cache)
        rows = content["files"] if content["format"] == FORMAT else {}
        cached = {file: (Stamp(*stamp), str(digest)) for file, (*stamp, digest) in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        cached = {}
    known = {file: cached[file] for file in files if file in cached and cached[file][0] == _stamp(file)}
    return known, [file for file in files if file not in known]


def _stamp(file: str) -> Stamp:
    status = os.stat(file)
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)
