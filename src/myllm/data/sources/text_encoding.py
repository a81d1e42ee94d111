"""Decoding text files: UTF-8, or the encoding of a byte order mark. Nothing else is guessed."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from myllm.errors import UserError

BYTE_ORDER_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
MARK_BYTES = 4
READ_BYTES = 1 << 16


class NotTextError(UserError):
    """Bytes that do not decode in the expected encoding."""


def encoding_of(head: bytes) -> str | None:
    """The codec for the byte order mark at the start of a file, which also removes it; None without a mark."""
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS if head.startswith(mark)), None)


def decode_text(content: bytes, encoding: str = "utf-8") -> str:
    """
    Args:
        encoding: for content without a byte order mark.

    Raises:
        NotTextError: the content has another encoding; the message says how to convert it.
    """
    marked = encoding_of(content)
    if not marked and (wide := _wide_encoding(content)):
        raise NotTextError(f"{wide} without a byte order mark; `iconv -f {wide} -t UTF-8` converts it")
    encoding = marked or encoding
    try:
        return content.decode(encoding)
    except (UnicodeError, LookupError) as error:
        place = f"byte {error.start:,}" if isinstance(error, UnicodeDecodeError) else "its first lines"
        is_binary = marked or b"\0" in content
        advice = "it is damaged or binary" if is_binary else "if it is LATIN1, `iconv -f LATIN1 -t UTF-8` converts it"
        raise NotTextError(f"not {encoding.removesuffix('-sig')} ({place}); {advice}") from None


def _wide_encoding(content: bytes) -> str | None:
    """UTF-16 or UTF-32 of mostly European text: nearly every character has NUL bytes at the same positions."""
    sample = content[:READ_BYTES]
    for width, name in ((4, "UTF-32"), (2, "UTF-16")):
        if len(sample) < 2 * width:
            continue
        columns = [sample[offset::width] for offset in range(width)]
        nul = [column.count(0) / len(column) for column in columns]
        if min(nul[1:]) > 0.3 and nul[0] < 0.1:
            return f"{name}LE"
        if min(nul[:-1]) > 0.3 and nul[-1] < 0.1:
            return f"{name}BE"
    return None


def as_utf8(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    """The content of a UTF-16 or UTF-32 file as UTF-8, in chunks.

    Raises:
        OSError: the content does not match its byte order mark.
        EOFError: the file ends within a character.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while chunk := file.read(READ_BYTES):
            yield decoder.decode(chunk).encode("utf-8", "surrogatepass")
    except UnicodeError as error:
        raise OSError(f"not {encoding}, although it has that byte order mark: {error}") from None
    if decoder.getstate()[0]:
        raise EOFError(f"it has the byte order mark of {encoding} and ends within a character")
