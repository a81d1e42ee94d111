"""How one file becomes documents, by its kind. Readers are generators and hold one document at a time.

Raises (all of them):
    UserError: a file that cannot be read, decoded or parsed; names the file, the place and what to do.
"""

import gzip
import io
import json
import re
import runpy
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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
    with _reading(path), _open_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error}); mend or remove the line") from None
            yield _text_of(row, f"{path}, line {number}")


def read_parquet(path: Path) -> Iterator[str]:
    """The column "text", one document a row."""
    import pyarrow
    import pyarrow.parquet

    with _reading(path):
        try:
            table = pyarrow.parquet.ParquetFile(path)
            if TEXT_KEY not in table.schema_arrow.names:
                raise UserError(f"{path} has no column {TEXT_KEY!r}; its columns are {table.schema_arrow.names}")
            for batch in table.iter_batches(batch_size=1_024, columns=[TEXT_KEY]):
                for value in batch.column(0):
                    yield _text_of({TEXT_KEY: value.as_py()}, str(path))
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} is not a whole parquet file: {error}") from None


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
    # A Python file may name another encoding in its first two lines (PEP 263).
    cookie = (
        re.search(rb"coding[:=]\s*([-\w.]+)", b"\n".join(content.splitlines()[:2])) if path.suffix == ".py" else None
    )
    encoding = cookie.group(1).decode("ascii") if cookie else "utf-8"
    try:
        text = content.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except (UnicodeDecodeError, LookupError) as error:
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
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert it or leave it out") from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; replace the file, or leave it out of the source") from None


@contextmanager
def _open_lines(path: Path) -> Iterator[IO[str]]:
    kind = path.suffix.lower()
    if kind == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield lines
    elif kind == ".zst":
        import zstandard

        try:
            with (
                path.open("rb") as raw,
                zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader,
            ):
                yield io.TextIOWrapper(reader, encoding="utf-8")
        except zstandard.ZstdError as error:
            raise OSError(f"not a whole zstd file: {error}") from None
    else:
        with path.open(encoding="utf-8") as lines:
            yield lines
