"""Work items: files and parts of files in shuffled order, and how a worker turns one into tokens.

An item leaves two files: `000012.bin`, the tokens of its documents end to end, and `000012.npz`, the length and a hash
of each document. The second is written last: an item that has it is finished, and no restart repeats it. Neither is
synced to the disk, since tokenizing would wait for that. A restart checks the hashes: the power may have failed.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from myllm.config import DataConfig
from myllm.data.sources.cleaning import clean
from myllm.data.sources.read_task import SkipLog
from myllm.data.sources.readers import is_splittable
from myllm.data.sources.source import Source, SourceFile, read_documents
from myllm.data.tokenizer.base import Tokenizer
from myllm.data.tokenizer.load import load_tokenizer
from myllm.errors import UserError
from myllm.files import TEMP_SUFFIX, add_filename

SMALL_BYTES = 2_000_000
"""Small files form an item together, up to about this much text."""
TINY_BYTES = 2_000
"""A smaller file counts as this much, so that a million of them are not one item."""
PART_BYTES = 3_000_000
"""A larger file is read in parts of about this size, if its kind allows. Small enough that no worker has much to do
alone at the end; large enough that the cost of a part, some milliseconds, does not matter."""
BATCH_CHARS = 100_000
"""Documents are tokenized together up to about this much text, some 10 ms of work."""
DOCUMENT_CHARS = 100
"""What a document costs besides its text, in characters: a million empty ones are not one batch."""
WRITE_BYTES = 1 << 20


@dataclass(frozen=True)
class FilePart:
    """A file, or one part of it."""

    file: SourceFile
    part: int = 0
    num_parts: int = 1

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes // self.num_parts


WorkItem = tuple[FilePart, ...]


def order_files(files: Iterable[SourceFile], shuffle: bool, seed: int) -> list[SourceFile]:
    """Files by name, or in an order that depends on their names and the seed alone."""

    def key(file: SourceFile) -> tuple[bytes, str]:
        return (_hash_text(f"{seed}\0{file.name}") if shuffle else b"", file.name)

    return sorted(files, key=key)


def make_work_items(files: Iterable[SourceFile], shuffle: bool, seed: int, split: bool = True) -> list[WorkItem]:
    """Files in order, small ones together, large ones in parts if `split`. Depends on names, sizes and seed alone."""
    items: list[WorkItem] = []
    small: list[FilePart] = []
    small_bytes = 0
    for file in order_files(files, shuffle, seed):
        splittable = split and (file.builder or is_splittable(file.name))
        count = max(1, round(file.size_bytes / PART_BYTES)) if splittable else 1
        if count > 1:
            parts = list(range(count))
            if shuffle:
                parts.sort(key=lambda part: _hash_text(f"{seed}\0{file.name}\0{part}"))
            items += [tuple(small)] if small else []
            items += [(FilePart(file, part, count),) for part in parts]
            small, small_bytes = [], 0
            continue
        small.append(FilePart(file))
        # If a server does not report sizes, each file is an item. A tiny file counts for the cost of opening it.
        small_bytes += max(file.size_bytes, TINY_BYTES) if file.size_bytes or not file.remote else SMALL_BYTES
        if small_bytes >= SMALL_BYTES:
            items.append(tuple(small))
            small, small_bytes = [], 0
    return items + ([tuple(small)] if small else [])


def _hash_text(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


# -- files of finished items ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemIndex:
    """What is known of a finished item's documents."""

    lengths: np.ndarray
    """Tokens of each document, (documents,) int64."""
    hashes: np.ndarray
    """First 8 bytes of the sha256 of each document's tokens, (documents,) uint64."""
    skips: SkipLog


def tokens_path(folder: Path, number: int) -> Path:
    """Raw tokens, of the tokenizer's dtype."""
    return folder / f"{number:06d}.bin"


def is_tokenized(folder: Path, number: int) -> bool:
    return tokens_path(folder, number).with_suffix(".npz").exists()


def load_item_index(folder: Path, number: int) -> ItemIndex:
    with np.load(tokens_path(folder, number).with_suffix(".npz")) as saved:
        skips = SkipLog()
        skips.merge(json.loads(bytes(saved["faults"])))
        return ItemIndex(saved["lengths"].astype(np.int64), saved["hashes"], skips)


def is_item_intact(folder: Path, token_bytes: int, number: int) -> bool:
    """Whether each document of a finished item has its hash, and the file holds nothing else.

    If the tokens are in shards by now, and so deleted, only the index is read.
    """
    try:
        index = load_item_index(folder, number)
        with tokens_path(folder, number).open("rb") as file:
            for length, expected in zip(index.lengths.tolist(), index.hashes.tolist(), strict=True):
                if int.from_bytes(_hash_document(file.read(token_bytes * length)), "little") != expected:
                    return False
            return not file.read(1)
    except FileNotFoundError:
        return is_tokenized(folder, number)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return False


def _hash_document(tokens: bytes | memoryview) -> bytes:
    return hashlib.sha256(tokens).digest()[:8]


# -- in a worker process ----------------------------------------------------------------------------------------------


@cache
def _tokenizer(name: str) -> Tokenizer:
    """One in each worker process: building its tables takes longer than a small item."""
    return load_tokenizer(name)


def tokenize_item(
    item: WorkItem, file_paths: dict[str, Path], source: Source, config: DataConfig, out: Path, stop: Path
) -> None:
    """Read the item's documents and write their tokens to `out`, and the index next to it.

    Args:
        file_paths: the local path of each file, by name.
        stop: once this file exists, the tokens are no longer wanted.

    Raises:
        InterruptedError: they are no longer wanted, and nobody asks for this result.
    """
    # A name of its own each time: a worker that outlives a killed parent for a moment must not spoil another's file.
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}{TEMP_SUFFIX}")
    tokenizer, skips = _tokenizer(config.tokenizer), SkipLog()
    lengths: list[int] = []
    hashes: list[bytes] = []
    try:
        with add_filename(out), temporary.open("wb", WRITE_BYTES) as file:
            for batch in _batches(_cleaned_documents(item, file_paths, source, config, skips)):
                if stop.exists():
                    raise InterruptedError(f"{stop} exists")
                for tokens in _encode(tokenizer, batch, skips):
                    lengths.append(len(tokens))
                    hashes.append(_hash_document(tokens.data))
                    file.write(tokens.data)
        temporary.rename(out)
        with temporary.open("wb") as file:
            logged = {"counts": dict(skips.counts), "places": skips.places}
            np.savez(
                file,
                lengths=np.array(lengths, dtype=np.uint32),
                hashes=np.frombuffer(b"".join(hashes), dtype="<u8"),
                faults=np.frombuffer(json.dumps(logged).encode(), dtype=np.uint8),
            )
        temporary.rename(out.with_suffix(".npz"))
    finally:
        temporary.unlink(missing_ok=True)


def _encode(tokenizer: Tokenizer, batch: list[tuple[str, str]], skips: SkipLog) -> list[np.ndarray]:
    """The tokens of each document, of which the batch has the file's name and the text.

    They are tokenized together. If that fails, each alone, so that only one is lost, and it is named.
    """
    try:
        return tokenizer.encode_documents([text for _, text in batch])
    # tiktoken's Rust side panics with a BaseException, which would kill the worker without a message.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError | OSError | UserError):
            raise
        if len(batch) > 1:
            return [tokens for document in batch for tokens in _encode(tokenizer, [document], skips)]
        file_name, text = batch[0]
        skips.add("untokenizable", f"{file_name}, a text of {len(text):,} characters", repr(error))
        return []


def _cleaned_documents(
    item: WorkItem, file_paths: dict[str, Path], source: Source, config: DataConfig, skips: SkipLog
) -> Iterator[tuple[str, str]]:
    """The item's documents, each with the name of its file."""
    place = ""

    def log_skip(reason: str) -> None:
        skips.add(reason, place)

    for part in item:
        name = part.file.name if part.num_parts == 1 else f"{part.file.name}, part {part.part + 1}"
        path = file_paths[part.file.name]
        if not path.exists():  # unlike a damaged file, which is skipped and logged
            raise UserError(f"{path} no longer exists; restore it, or run the command again without it")
        texts = read_documents(source, part.file, path, skips, part.part, part.num_parts)
        for number, text in enumerate(texts, start=1):
            place = f"{name}, document {number}"
            if (cleaned := clean(text, config, log_skip)) is not None:
                yield part.file.name, cleaned


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
