"""What a preparation's worker processes do: one unit of files to tokens, and spans of tokens to one shard."""

import hashlib
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ..errors import UserError
from .sources import SourceFile
from .tokenizer import Tokenizer

COPY_BYTES = 1 << 20
STOP = "stop"
"""A file of this name among the unit files: no further tokens are wanted."""


def start_worker() -> None:
    """What a worker process does first: leave Ctrl-C to its parent, and end with it.

    Each worker holds both ends of the queue that it waits on, so a killed parent would leave it waiting for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "only for worker processes"

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@dataclass(frozen=True)
class UnitTokens:
    """One unit's tokens, on disk, and where its documents lie in them."""

    path: Path
    """Raw uint16."""
    lengths: np.ndarray
    """Tokens of each document, (documents,) int64."""
    hashes: np.ndarray
    """First 8 bytes of the sha256 of each document's tokens, (documents,) uint64."""
    empty: int
    """Documents dropped because they hold nothing but white space."""


@cache
def _tokenizer() -> Tokenizer:
    """One a worker process: building its tables takes longer than a small unit."""
    return Tokenizer()


def tokenize_unit(unit: tuple[SourceFile, ...], out: Path) -> UnitTokens:
    """Read every document of the unit's files and write its tokens.

    Raises:
        InterruptedError: the parent has no use for more, and does not ask for this result.
    """
    tokenizer, stop = _tokenizer(), out.with_name(STOP)
    lengths, hashes, empty = [], [], 0
    with out.open("wb") as file:
        for source in unit:
            for text in source.read(source.path):
                if stop.exists():
                    raise InterruptedError(f"{out} is no longer wanted")
                if not text.strip():
                    empty += 1
                    continue
                try:
                    tokens = tokenizer.encode_document(text)
                # tiktoken's Rust side panics with a BaseException, which would kill the worker and say nothing.
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                        raise
                    raise UserError(
                        f"cannot tokenise a document of {source.path}: {error}; leave the file out"
                    ) from None
                file.write(tokens.astype("<u2").tobytes())
                lengths.append(len(tokens))
                hashes.append(int.from_bytes(hashlib.sha256(tokens.tobytes()).digest()[:8], "little"))
    return UnitTokens(out, np.array(lengths, dtype=np.int64), np.array(hashes, dtype=np.uint64), empty)


def write_shard(path: Path, spans: list[tuple[Path, int, int]]) -> str:
    """Copy spans of unit files into one .npy file.

    Plain writes, not a memory map: on a full disk a map ends the process with SIGBUS, a write raises.

    Returns:
        the file's sha256
    """
    digest = hashlib.sha256()
    tokens = sum(end - start for _, start, end in spans)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    with path.open("wb") as file:
        for part in _parts(header.getvalue(), spans):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _parts(header: bytes, spans: list[tuple[Path, int, int]]) -> Iterator[bytes]:
    """A shard's bytes in pieces small enough to hold."""
    yield header
    for unit, start, end in spans:
        with unit.open("rb") as file:
            file.seek(2 * start)
            left = 2 * (end - start)
            while left:
                part = file.read(min(left, COPY_BYTES))
                assert part, f"{unit} is shorter than it was"
                yield part
                left -= len(part)
