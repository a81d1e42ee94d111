"""Which encoding a text file is in: UTF-8, or what its byte order mark says. Nothing else is guessed."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from myllm.errors import UserError

MARKS = (  # UTF-32's little-endian one begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
MARK_BYTES = 4
READ_BYTES = 1 << 16


class NotTextError(UserError):
    """Bytes that are no text in the encoding that they should be in."""


def encoding_of(head: bytes) -> str | None:
    """The encoding that a byte order mark at the beginning of a file names, as a codec that removes it; or None."""
    return next((encoding for mark, encoding in MARKS if head.startswith(mark)), None)


def decode_text(content: bytes, encoding: str = "utf-8") -> str:
    """A file's text.

    Args:
        encoding: of a file without a byte order mark.

    Raises:
        NotTextError: it is in another one; says how to convert it.
    """
    encoding = encoding_of(content) or encoding
    try:
        text = content.decode(encoding)
    except (UnicodeError, LookupError) as error:
        place = f"byte {error.start:,}" if isinstance(error, UnicodeDecodeError) else "its first lines"
        raise NotTextError(f"not {encoding.removesuffix('-sig')} ({place}); {_advice(content)}") from None
    if encoding == "utf-8" and (wide := _wide_without_mark(content)):
        raise NotTextError(f"{wide} without a byte order mark; `iconv -f {wide} -t UTF-8` converts it")
    return text


def _advice(content: bytes) -> str:
    if encoding_of(content) in ("utf-16", "utf-32"):
        return "its byte order mark says so, but it is damaged"
    if wide := _wide_without_mark(content):
        return f"`iconv -f {wide} -t UTF-8` converts it"
    if b"\0" in content:
        return "it has NUL bytes, so it is no text, or text in an encoding that its program knows"
    return "`iconv -f LATIN1 -t UTF-8` converts it, if it is LATIN1"


def _wide_without_mark(content: bytes) -> str | None:
    """UTF-16 or UTF-32 of mostly European text: nearly every character brings its NUL bytes, at the same places."""
    sample = content[:READ_BYTES]
    for width, name in ((4, "UTF-32"), (2, "UTF-16")):
        columns = [sample[at::width] for at in range(width)]
        nul = [column.count(0) / max(len(column), 1) for column in columns]
        if len(sample) >= 2 * width and min(nul[1:]) > 0.3 and nul[0] < 0.1:
            return f"{name}LE"
        if len(sample) >= 2 * width and min(nul[:-1]) > 0.3 and nul[-1] < 0.1:
            return f"{name}BE"
    return None


def as_utf8(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    """A wide file's content as UTF-8, a piece at a time.

    Raises:
        OSError: it is not what its byte order mark says.
        EOFError: it ends early.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while piece := file.read(READ_BYTES):
            yield decoder.decode(piece).encode("utf-8", "surrogatepass")
    except UnicodeError as error:
        raise OSError(f"not {encoding}, which its byte order mark says: {error}") from None
    if decoder.getstate()[0]:
        raise EOFError(f"it is {encoding} by its byte order mark, and ends within a character")
