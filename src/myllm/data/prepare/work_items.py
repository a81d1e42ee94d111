"""Units of work: which files, or parts of files, a worker takes at once, and how it makes tokens of them.

A unit leaves two files: `000012.bin`, its documents' tokens end to end, and `000012.npz`, how long each document is and
a hash of it. The second is written last: a unit that has it is done, and no restart does it again. Neither is forced to
the disk, which the tokenising would wait for; a restart checks the hashes, since the machine may have lost power.
"""

import hashlib
import json
import multiprocessing
import os
import secrets
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np

from myllm.config import DataConfig
from myllm.data.sources.cleaning import clean
from myllm.data.sources.read_task import SkipLog
from myllm.data.sources.readers import is_splittable
from myllm.data.sources.source import Source, SourceFile, read_documents
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.distributed.standard_streams import protect_output
from myllm.errors import UserError
from myllm.files import TEMP_SUFFIX, add_filename

SMALL_BYTES = 2_000_000
"""Small files make a unit together, up to about this much text."""
TINY_BYTES = 2_000
"""A smaller file counts as much, so that a million of them are not one unit."""
PART_BYTES = 3_000_000
"""A larger file is read in parts of about this size, where its kind allows. Small enough that at the end no worker has
much to do alone; large enough that a part's own cost, some milliseconds, does not matter."""
BATCH_CHARS = 100_000
"""Documents are tokenised together up to about this much text, some 10 ms of work."""
DOCUMENT_CHARS = 100
"""What a document costs beside its text, in characters: a million empty ones are not one batch."""
WRITE_BYTES = 1 << 20


@dataclass(frozen=True)
class FilePart:
    """A file, or one part of it."""

    file: SourceFile
    part: int = 0
    parts: int = 1

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes // self.parts


WorkItem = tuple[FilePart, ...]


def order_files(files: Iterable[SourceFile], shuffle: bool, seed: int) -> list[SourceFile]:
    """Files by name, or in a seeded order: a function of names and seed alone."""

    def key(file: SourceFile) -> tuple[bytes, str]:
        return (_mix(f"{seed}\0{file.name}") if shuffle else b"", file.name)

    return sorted(files, key=key)


def make_work_items(files: Iterable[SourceFile], shuffle: bool, seed: int, split: bool = True) -> list[WorkItem]:
    """Files in order, small ones together, large ones in parts. A function of names, sizes and seed alone.

    Args:
        split: whether files may be read in parts at all.
    """
    units: list[WorkItem] = []
    small: list[FilePart] = []
    held_bytes = 0
    for file in order_files(files, shuffle, seed):
        parts = max(1, round(file.size_bytes / PART_BYTES)) if split and is_splittable(file.name) else 1
        if parts > 1:
            numbers = sorted(range(parts), key=lambda part: _mix(f"{seed}\0{file.name}\0{part}") if shuffle else part)
            units += [tuple(small)] if small else []
            units += [(FilePart(file, part, parts),) for part in numbers]
            small, held_bytes = [], 0
            continue
        small.append(FilePart(file))
        # A server that does not say how large a file is has no small ones; a tiny one costs its opening.
        held_bytes += max(file.size_bytes, TINY_BYTES) if file.size_bytes or not file.remote else SMALL_BYTES
        if held_bytes >= SMALL_BYTES:
            units.append(tuple(small))
            small, held_bytes = [], 0
    return units + ([tuple(small)] if small else [])


def _mix(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


# -- what is on disk --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemIndex:
    """A finished unit: where its tokens are, and its documents in them."""

    path: Path
    """Raw little-endian uint16."""
    lengths: np.ndarray
    """Tokens of each document, (documents,) int64."""
    hashes: np.ndarray
    """First 8 bytes of the sha256 of each document's tokens, (documents,) uint64."""
    faults: SkipLog


def tokens_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.bin"


def is_tokenized(folder: Path, number: int) -> bool:
    return tokens_path(folder, number).with_suffix(".npz").exists()


def load_item_index(folder: Path, number: int) -> ItemIndex:
    path = tokens_path(folder, number)
    with np.load(path.with_suffix(".npz")) as saved:
        said = json.loads(bytes(saved["faults"]))
        faults = SkipLog(places=said["places"])
        faults.counts.update(said["counts"])
        return ItemIndex(path, saved["lengths"].astype(np.int64), saved["hashes"], faults)


def is_item_intact(folder: Path, number: int) -> bool:
    """Whether a finished unit is what it was: each document has its hash, and there is nothing else.

    Of a unit whose tokens are in shards by now, and so deleted, there is only the index to look at.
    """
    try:
        index = load_item_index(folder, number)
        with index.path.open("rb") as file:
            for length, expected in zip(index.lengths.tolist(), index.hashes.tolist(), strict=True):
                if int.from_bytes(_hash(file.read(2 * length)), "little") != expected:
                    return False
            return not file.read(1)
    except FileNotFoundError:
        return is_tokenized(folder, number)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return False


def _hash(document: bytes | np.ndarray) -> bytes:
    return hashlib.sha256(document).digest()[:8]


# -- what a worker does -----------------------------------------------------------------------------------------------


def init_worker() -> None:
    """What a worker process does first: leave what a terminal sends (Ctrl-C, its end) to the parent, and end with it.

    Each worker holds both ends of the queue that it waits on, so a killed parent would leave it waiting for ever.
    """
    protect_output(keep_going=True)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "only for worker processes"

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@cache
def _tokenizer(spec: str) -> Tokenizer:
    """One a worker process: building its tables takes longer than a small unit."""
    return load_tokenizer(spec)


def tokenize_item(
    unit: WorkItem, paths: dict[str, Path], source: Source, config: DataConfig, out: Path, stop: Path
) -> None:
    """Read every document of the unit and write its tokens to `out`, and the index beside it.

    Args:
        paths: where each of the unit's files lies, by name.
        stop: once a file of this name is there, no further tokens are wanted.

    Raises:
        InterruptedError: the parent has no use for more, and does not ask for this result.
    """
    # Named anew each time: a worker that outlives a killed parent by a moment spoils nobody's file.
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}{TEMP_SUFFIX}")
    try:
        with add_filename(out), temporary.open("wb", WRITE_BYTES) as file:
            tokenizer = _tokenizer(config.tokenizer)
            writer = _Writer(file)
            for batch in _batches(_documents(unit, paths, source, config, writer.faults)):
                if stop.exists():
                    raise InterruptedError(f"{stop} is there")
                _add(writer, batch, tokenizer)
        temporary.rename(out)
        with temporary.open("wb") as file:
            said = {"counts": dict(writer.faults.counts), "places": writer.faults.places}
            np.savez(
                file,
                lengths=np.array(writer.lengths, dtype=np.uint32),
                hashes=np.frombuffer(b"".join(writer.digests), dtype="<u8"),
                faults=np.frombuffer(json.dumps(said).encode(), dtype=np.uint8),
            )
        temporary.rename(out.with_suffix(".npz"))
    finally:
        temporary.unlink(missing_ok=True)


class _Writer:
    """Documents' tokens on their way to a file, and what is remembered of each."""

    def __init__(self, file: BinaryIO) -> None:
        self.lengths: list[int] = []
        self.digests: list[bytes] = []
        self.faults = SkipLog()
        self._file = file

    def add(self, document: np.ndarray) -> None:
        """Take a document: the end-of-text token, then its text's, (n,) uint16."""
        self.lengths.append(len(document))
        self.digests.append(_hash(document))
        self._file.write(document)


def _documents(
    unit: WorkItem, paths: dict[str, Path], source: Source, config: DataConfig, faults: SkipLog
) -> Iterator[tuple[str, str]]:
    """The unit's documents, cleaned, each with the name of its file."""
    place = ""

    def report(reason: str) -> None:
        faults.add(reason, place)

    for piece in unit:
        name = piece.file.name if piece.parts == 1 else f"{piece.file.name}, part {piece.part + 1}"
        path = paths[piece.file.name]
        if not path.exists():  # what is there but damaged is passed over and named; this is another matter
            raise UserError(f"{path} is no longer there; put it back, or start again without it")
        texts = read_documents(source, piece.file, path, faults, piece.part, piece.parts)
        for number, text in enumerate(texts, start=1):
            place = f"{name}, document {number}"
            if (cleaned := clean(text, config, report)) is not None:
                yield piece.file.name, cleaned


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Documents in lists of about BATCH_CHARS; a longer one alone."""
    batch: list[tuple[str, str]] = []
    chars = 0
    for file_name, text in documents:
        if batch and chars + len(text) > BATCH_CHARS:
            yield batch
            batch, chars = [], 0
        batch.append((file_name, text))
        chars += len(text) + DOCUMENT_CHARS
    if batch:
        yield batch


def _add(writer: _Writer, batch: list[tuple[str, str]], tokenizer: Tokenizer) -> None:
    """Tokenise documents together; should that fail, each alone, so that no more than one is lost and it is named."""
    try:
        documents = tokenizer.encode_documents([text for _, text in batch])
    # tiktoken's Rust side panics with a BaseException, which would kill the worker and say nothing.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | OSError | UserError):
            raise
        if len(batch) > 1:
            for one in batch:
                _add(writer, [one], tokenizer)
            return
        file_name, text = batch[0]
        writer.faults.add("untokenisable", f"{file_name}, a text of {len(text):,} characters", repr(error))
        return
    for document in documents:
        writer.add(document)
