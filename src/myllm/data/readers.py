"""How one file becomes documents, by its kind. Readers are generators and hold one document at a time.

Raises (all of them):
    UserError: a file that cannot be read, decoded or parsed; names the file, the place and what to do.
"""

import gzip
import io
import json
import runpy
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

TEXT_KEY = "text"
"""Column or key that holds a document."""
MAX_PLAIN_CHARS = 100_000
"""A longer .txt or .md, such as a book, is cut into documents at blank lines, so that validation can be held out."""


def suffix_of(path: Path) -> str:
    """The file's kind: its last suffix, or the last two of a compressed one (".jsonl.gz")."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:]) if suffixes and suffixes[-1] in (".gz", ".zst") else "".join(suffixes[-1:])


def read_text(path: Path) -> Iterator[str]:
    """A whole file as one document."""
    yield _decode(path)


def read_prose(path: Path) -> Iterator[str]:
    """A file as one document, or several of at most MAX_PLAIN_CHARS, cut at blank lines where it has any."""
    text = _decode(path)
    start = 0
    while len(text) - start > MAX_PLAIN_CHARS:
        end = start + MAX_PLAIN_CHARS
        for mark in ("\n\n", "\n", " "):
            cut = text.rfind(mark, start + MAX_PLAIN_CHARS // 2, end)
            if cut >= 0:
                end = cut + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]


def read_topics(path: Path) -> Iterator[str]:
    """pydoc's reference topics: a module that holds one dictionary of texts."""
    yield from runpy.run_path(str(path))["topics"].values()


def read_jsonl(path: Path) -> Iterator[str]:
    """One JSON object a line; the document is under the key "text". Compression follows the name."""
    with _reading(path):
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))  # Windows programs start a file with a byte order mark
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON in UTF-8 ({error}); mend or remove the line"
                ) from None
            yield _text_of(row, f"{path}, line {number}")


def read_parquet(path: Path) -> Iterator[str]:
    """The column "text", one document a row."""
    import pyarrow
    import pyarrow.parquet

    with _reading(path):
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                names = table.schema_arrow.names
                if TEXT_KEY not in names:
                    raise UserError(f"{path} has no column {TEXT_KEY!r}, but {names}; rename the one that holds text")
                batches = table.iter_batches(batch_size=1_024, columns=[TEXT_KEY])
                for row, value in enumerate((value for batch in batches for value in batch.column(0)), start=1):
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        raise UserError(f"{path}, row {row}: not UTF-8 text ({error}); mend or remove it") from None
                    yield _text_of({TEXT_KEY: text}, f"{path}, row {row}")
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not a whole parquet file ({error}); replace it, or leave it out") from None


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": read_prose,
    ".md": read_prose,
    ".py": read_text,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".jsonl.zst": read_jsonl,
    ".json.gz": read_jsonl,
    ".parquet": read_parquet,
}


def _text_of(row: Any, where: str) -> str:
    if not isinstance(row, dict) or TEXT_KEY not in row:
        seen = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise UserError(f"{where}: expected an object with the key {TEXT_KEY!r}, found {seen}")
    value = row[TEXT_KEY]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {TEXT_KEY!r} should be a text, found {value!r}"[:300])
    return value or ""


def _decode(path: Path) -> str:
    with _reading(path):
        content = path.read_bytes()
    encoding = "utf-8"
    if path.suffix.lower() == ".py":  # a Python file may name another encoding in its first two lines (PEP 263)
        with suppress(SyntaxError):  # names one that does not exist
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    try:
        text = content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except (UnicodeError, LookupError) as error:
        place = f"byte {error.start:,}" if isinstance(error, UnicodeDecodeError) else "its first lines"
        raise UserError(
            f"{path} is not {encoding} text ({place}); convert it, for instance with "
            f"`iconv -f LATIN1 -t UTF-8`, or leave it out of the source"
        ) from None
    return text.replace("\r\n", "\n")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what can go wrong while reading into one clear message."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; replace the file, or leave it out of the source") from None


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, uncompressed as its name says."""
    with path.open("rb") as file:
        if path.suffix.lower() == ".gz":
            if not file.peek(1):
                raise EOFError("it is empty, and not a gzip file")  # gzip lets that pass
            with gzip.open(file) as lines:
                yield from lines
        elif path.suffix.lower() == ".zst":
            yield from _split_lines(_decompress_zstd(file))
        else:
            yield from file


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


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    held: list[bytes] = []  # the line so far
    for chunk in chunks:
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join((*held, line))
            held.clear()
        held.append(rest)
    yield b"".join(held)
