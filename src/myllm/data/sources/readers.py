"""How one file becomes rows of text, by its suffix. Readers are generators that hold one row or a small batch.

A reader never stops a preparation: it logs what it cannot use (a row without text, a line that is not JSON, a file that
ends early) in a `SkipLog` and yields the rest.

Large parquet, arrow and uncompressed jsonl files can be read in parts, each by another process. A part takes the row
groups, batches or lines that begin in its range of the file.
"""

import gzip
import io
import json
import re
import runpy
import sys
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from .arrow_readers import read_arrow, read_parquet
from .read_task import ReadTask, SkipLog
from .text_column import NoTextError, parse_text_column
from .text_encoding import MARK_BYTES, NotTextError, as_utf8, decode_text, encoding_of

MAX_PLAIN_CHARS = 100_000
"""A longer .txt or .md, such as a book, is split into documents, so that some can be held out for validation."""
MAX_LINE_BYTES = 1 << 26
"""A longer line is skipped without holding it in memory."""
BUFFER_BYTES = 1 << 16
_SURROGATE = re.compile("[\ud800-\udfff]")

Reader = Callable[[ReadTask, SkipLog], Iterator[str]]


def suffix_of(name: str | Path) -> str:
    """The last suffix of a file, or the last two if it is compressed (".jsonl.gz"); in lower case."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] in ([".gz"], [".zst"]) else suffixes[-1:])


def is_splittable(name: str) -> bool:
    """Whether a file can be read in parts. Compressed files cannot."""
    return suffix_of(name) in (".parquet", ".arrow", ".jsonl")


def read_file(reader: str, task: ReadTask, skips: SkipLog) -> Iterator[str]:
    """The rows of a file. An error in the middle ends the file and is logged."""
    place = task.name if task.num_parts == 1 else f"{task.name}, part {task.part + 1} of {task.num_parts}"
    try:
        yield from READERS[reader](task, skips)
    except (OSError, EOFError, zlib.error) as error:
        reason = "file_cut_short" if isinstance(error, EOFError) else "unreadable_file"
        # The log is stored with the data set and must be the same wherever the file was.
        skips.add(reason, place, str(error).replace(str(task.path), task.name))


# -- plain text -------------------------------------------------------------------------------------------------------


def _read_text(task: ReadTask, skips: SkipLog, max_chars: int = sys.maxsize) -> Iterator[str]:
    """The file as one document, or as several of at most `max_chars`. UTF-8, or the encoding that a byte order mark or
    a Python encoding comment names. Line ends become newlines."""
    content = task.path.read_bytes()
    encoding = "utf-8"
    if task.path.suffix.lower() == ".py":
        with suppress(SyntaxError):  # the comment names an unknown encoding
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    try:
        text = decode_text(content, encoding).replace("\r\n", "\n")
    except NotTextError as error:
        skips.add("invalid_text", task.name, str(error))
        return
    del content
    yield from split_prose(text, max_chars)


def split_prose(text: str, max_chars: int) -> Iterator[str]:
    """A text in pieces of at most `max_chars`, split after a blank line, a line or a word where possible."""
    start = 0
    while len(text) - start > max_chars:
        end = start + max_chars
        for separator in ("\n\n", "\n", " "):
            found = text.rfind(separator, start + max_chars // 2, end)
            if found >= 0:
                end = found + len(separator)
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _read_topics(task: ReadTask, _: SkipLog) -> Iterator[str]:
    """pydoc's reference topics: a module with one dictionary of texts."""
    yield from runpy.run_path(str(task.path))["topics"].values()


# -- one JSON object per line -----------------------------------------------------------------------------------------


def _read_jsonl(task: ReadTask, skips: SkipLog) -> Iterator[str]:
    """One JSON object per line, with the text under a key."""
    with _open_uncompressed(task.path) as raw, _as_utf8_file(raw) as file:
        start, end = 0, None
        if file is not raw and task.part:  # UTF-16 has no byte positions to split at: the first part reads it all
            return
        if task.num_parts > 1 and file is raw:
            start, end = task.part_range(task.path.stat().st_size)
            if start:  # a line belongs to the part that holds its first byte
                file.seek(start - 1)
                _skip_line(file)
        # `tell` costs a call per line, so the position is counted, and only needed for a part.
        position = file.tell() if end is not None else 0
        number = 0
        while end is None or position < end:
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return
            number += 1
            position += len(line)
            place = f"{task.name}, line {number}" + (f" after byte {start}" if start else "")
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                position += _skip_line(file)
                skips.add("line_too_long", place, f"more than {MAX_LINE_BYTES:,} bytes")
            elif not line.isspace():
                text = _parse_line(line, place, task.column, skips)
                del line  # up to MAX_LINE_BYTES that the consumer of the text does not need
                if text is not None:
                    yield text


@contextmanager
def _as_utf8_file(file: io.BufferedReader) -> Iterator[io.BufferedReader]:
    """The file itself, or its content in UTF-8 if it has the byte order mark of UTF-16 or UTF-32."""
    encoding = encoding_of(file.peek(MARK_BYTES))
    if encoding in ("utf-16", "utf-32"):
        yield io.BufferedReader(_ChunkReader(as_utf8(file, encoding)), BUFFER_BYTES)
    else:
        yield file


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of the line without keeping it; returns the number of bytes."""
    size = 0
    while chunk := file.readline(1 << 20):
        size += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return size


def _parse_line(line: bytes, place: str, column: str, skips: SkipLog) -> str | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # Windows programs start a file with a byte order mark
    except UnicodeDecodeError as error:
        skips.add("invalid_utf8", place, str(error.reason))
        return None
    except (ValueError, RecursionError) as error:
        skips.add("invalid_json", place, str(error))
        return None
    if not isinstance(row, dict):
        skips.add("no_text", place, f"expected an object with the key {column!r}, found a {type(row).__name__}")
        return None
    try:
        text = parse_text_column(column).text_of(row)
    except NoTextError as error:
        skips.add("no_text", place, str(error))
        return None
    # Only an escape can produce a surrogate, and such lines are rare.
    if text and (b"\\ud" in line or b"\\uD" in line) and _SURROGATE.search(text):
        skips.add("lone_surrogates_replaced", place)
        return _SURROGATE.sub("\ufffd", text)
    return text


@contextmanager
def _open_uncompressed(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed according to its suffix."""
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            if not file.peek(1):
                raise EOFError("the file is empty, not gzip")  # gzip accepts it
            with gzip.open(file) as lines:
                yield cast(io.BufferedReader, lines)  # it has the same methods
        elif path.suffix.lower() == ".zst":
            yield io.BufferedReader(_ChunkReader(_decompress_zstd(file)), BUFFER_BYTES)
        else:
            yield file


class _ChunkReader(io.RawIOBase):
    """An iterable of chunks as a file."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")  # slicing it copies nothing: a chunk may be 50 MB, read 64 KB at a time

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _decompress_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: zstandard's own stream reader accepts a truncated file as complete."""
    import zstandard

    try:
        frame = zstandard.ZstdDecompressor().decompressobj()
        while data := file.read(16_384):
            while data:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise OSError(f"not a zstd file ({error})") from None
    if not frame.eof:
        raise EOFError("the zstd stream ends early")


READERS: dict[str, Reader] = {
    "prose": partial(_read_text, max_chars=MAX_PLAIN_CHARS), "whole": _read_text, "topics": _read_topics,
    "jsonl": _read_jsonl, "parquet": read_parquet, "arrow": read_arrow,
}  # fmt: skip
READER_BY_SUFFIX = {
    ".txt": "prose", ".md": "prose", ".py": "whole",
    ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl", ".json.gz": "jsonl",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
