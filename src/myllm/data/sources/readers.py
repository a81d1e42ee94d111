"""How one file becomes rows of text, by its kind. Readers are generators and hold a row or a small batch at a time.

A reader gives what it can and names what it cannot: a row without text, a line that is no JSON, a file that ends early.
None of that stops a preparation; `SkipLog` counts it, and the data set's manifest says so.

Large parquet, arrow and plain jsonl files can be read in parts, each by another process: part k of n takes the row
groups, batches or lines that begin in its share of the file.
"""

import gzip
import io
import json
import re
import runpy
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .arrow_readers import read_arrow, read_parquet
from .read_task import ReadTask, SkipLog
from .text_encoding import MARK_BYTES, NotTextError, as_utf8, decode_text, encoding_of

MAX_PLAIN_CHARS = 100_000
"""A longer .txt or .md, such as a book, is cut into documents at blank lines, so that validation can be held out."""
MAX_LINE_BYTES = 1 << 26
"""A longer line is not held in memory: it is passed over and named."""


_SURROGATE = re.compile("[\ud800-\udfff]")
Reader = Callable[[ReadTask, SkipLog], Iterator[str]]


def suffix_of(name: str | Path) -> str:
    """A file's kind: its last suffix, or the last two of a compressed one (".jsonl.gz")."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return "".join(suffixes[-2:]) if suffixes and suffixes[-1] in (".gz", ".zst") else "".join(suffixes[-1:])


def read_file(reader: str, task: ReadTask, faults: SkipLog) -> Iterator[str]:
    """The rows of a file. Whatever makes the rest of it unreadable ends it, and is named."""
    place = task.name if task.parts == 1 else f"{task.name}, part {task.part + 1} of {task.parts}"
    try:
        yield from READERS[reader](task, faults)
    except EOFError as error:
        faults.add("file_cut_short", place, _without_path(error, task))
    except (OSError, zlib.error) as error:
        faults.add("unreadable_file", place, _without_path(error, task))


def _without_path(error: Exception, task: ReadTask) -> str:
    """What is said of a file goes with the data set, and is the same wherever the file lay."""
    return str(error).replace(str(task.path), task.name)


# -- plain text -------------------------------------------------------------------------------------------------------


def _read_whole(task: ReadTask, faults: SkipLog) -> Iterator[str]:
    """A whole file as one document."""
    text = _decode(task, faults)
    if text is not None:
        yield text


def _read_prose(task: ReadTask, faults: SkipLog) -> Iterator[str]:
    """A file as one document, or several of at most MAX_PLAIN_CHARS, cut at blank lines where it has any."""
    text = _decode(task, faults)
    if text is not None:
        yield from split_prose(text, MAX_PLAIN_CHARS)


def split_prose(text: str, most: int) -> Iterator[str]:
    """A text in pieces of at most `most` characters, cut at a blank line, a line's end or a space if there is one."""
    start = 0
    while len(text) - start > most:
        end = start + most
        for mark in ("\n\n", "\n", " "):
            cut = text.rfind(mark, start + most // 2, end)
            if cut >= 0:
                end = cut + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _read_topics(task: ReadTask, _: SkipLog) -> Iterator[str]:
    """pydoc's reference topics: a module that holds one dictionary of texts."""
    yield from runpy.run_path(str(task.path))["topics"].values()


def _decode(task: ReadTask, faults: SkipLog) -> str | None:
    """A file's text: UTF-8, or what a byte order mark or a Python file says it is. Line ends become newlines."""
    content = task.path.read_bytes()
    encoding = "utf-8"
    if task.path.suffix.lower() == ".py":
        with suppress(SyntaxError):  # names one that does not exist
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    try:
        return decode_text(content, encoding).replace("\r\n", "\n")
    except NotTextError as error:
        faults.add("invalid_text", task.name, str(error))
        return None


# -- one JSON object a line -------------------------------------------------------------------------------------------


def _read_jsonl(task: ReadTask, faults: SkipLog) -> Iterator[str]:
    """One JSON object a line; the text is under a key. Compression follows the name."""
    with _opened(task.path) as opened, _in_utf8(opened) as file:
        start, end = 0, None
        if file is not opened and task.part:  # its lines are found from the beginning on, by the first part
            return
        if task.parts > 1 and file is opened:
            start, end = task.share(task.path.stat().st_size)
            if start:  # a line belongs to the part that its first byte lies in
                file.seek(start - 1)
                while (piece := file.readline(MAX_LINE_BYTES)) and not piece.endswith(b"\n"):
                    pass
        # Telling the place costs a call a line, and only a part has to know it.
        at = file.tell() if end is not None else 0
        number = 0
        while end is None or at < end:
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return
            number += 1
            at += len(line)
            place = f"{task.name}, line {number}" + (f" behind byte {start}" if start else "")
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                at += _pass_over(file)
                faults.add("line_too_long", place, f"more than {MAX_LINE_BYTES:,} bytes")
            elif not line.isspace():
                text = _parse(line, place, task.column, faults)
                del line  # up to MAX_LINE_BYTES, which the caller's work on the text need not keep
                if text is not None:
                    yield text


@contextmanager
def _in_utf8(file: BinaryIO) -> Iterator[BinaryIO]:
    """A file's bytes; of one that its byte order mark says to be UTF-16 or UTF-32, those of its text in UTF-8."""
    wide = encoding_of(file.peek(MARK_BYTES))
    if wide in ("utf-16", "utf-32"):
        yield io.BufferedReader(_Chunks(as_utf8(file, wide)), 1 << 16)
    else:
        yield file


def _pass_over(file: BinaryIO) -> int:
    """Read to the end of a line without keeping it; how many bytes that were."""
    passed = 0
    while piece := file.readline(1 << 20):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


def _parse(line: bytes, place: str, column: str, faults: SkipLog) -> str | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))  # Windows programs start a file with a byte order mark
    except UnicodeDecodeError as error:
        faults.add("invalid_utf8", place, str(error.reason))
    except (ValueError, RecursionError) as error:
        faults.add("invalid_json", place, str(error))
    else:
        if not isinstance(row, dict) or column not in row:
            seen = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            faults.add("no_text", place, f"expected an object with the key {column!r}, found {seen}")
        else:
            text = _text_of(row[column], place, faults)
            # Only an escape can make one, and such a line is rare enough to be looked at.
            if text and (b"\\ud" in line or b"\\uD" in line) and _SURROGATE.search(text):
                faults.add("lone_surrogates_replaced", place)
                return _SURROGATE.sub("\ufffd", text)
            return text
    return None


def _text_of(value: Any, place: str, faults: SkipLog) -> str | None:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    faults.add("no_text", place, f"expected a text, found {str(value)[:40]!r}")
    return None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, uncompressed as its name says."""
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            if not file.peek(1):
                raise EOFError("it is empty, and not a gzip file")  # gzip lets that pass
            with gzip.open(file) as lines:
                yield lines
        elif path.suffix.lower() == ".zst":
            yield io.BufferedReader(_Chunks(_decompress_zstd(file)), 1 << 16)
        else:
            yield file


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a file to read."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._held = memoryview(b"")  # a slice of which copies nothing: a chunk may be 50 MB that went into 2 KB

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._held:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._held = memoryview(chunk)
        size = min(len(buffer), len(self._held))
        buffer[:size], self._held = self._held[:size], self._held[size:]
        return size


def _decompress_zstd(file: BinaryIO) -> Iterator[bytes]:
    """One frame after another; zstandard's own stream reader takes a file that was cut short for a whole one."""
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
    "prose": _read_prose,
    "whole": _read_whole,
    "topics": _read_topics,
    "jsonl": _read_jsonl,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
READER_BY_SUFFIX = {
    ".txt": "prose",
    ".md": "prose",
    ".py": "whole",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".json.gz": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Which reader takes which files, by suffix."""


def is_splittable(name: str) -> bool:
    """Whether a file can be read in parts: one that is compressed as a whole cannot."""
    return suffix_of(name) in (".parquet", ".arrow", ".jsonl")
