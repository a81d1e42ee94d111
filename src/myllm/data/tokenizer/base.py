"""What every tokenizer does: encode a text, put the end-of-text token before a document, and decode.

`load.load_tokenizer` returns GPT-2's (gpt2.py) or a user's own (huggingface.py).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from myllm.planning.disk import bytes_per_token

SPLIT_WINDOW_CHARS = 1_000
"""How far before the size limit `split_text` looks for a boundary."""


class Tokenizer(ABC):
    """Text to token ids and back. Load once per process: building the tables takes a moment."""

    kind: str
    """The library that encodes: "tiktoken" or "huggingface"."""
    is_default: bool
    """True for GPT-2's vocabulary, which ships with the code; any other is copied into data sets and checkpoints."""
    name: str
    file: Path
    """The vocabulary."""
    sha256: str
    """Of the file."""
    vocab_size: int
    """The largest id + 1."""
    end_of_text: int
    """Id of the special token that precedes each document."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of ids, here and in shards."""
        return token_dtype(self.vocab_size)

    def describe(self) -> dict[str, Any]:
        """What ties data to this vocabulary. It has no path, so it is the same on every machine."""
        return {name: getattr(self, name) for name in ("kind", "name", "sha256", "vocab_size", "end_of_text")}

    def encode(self, text: str) -> np.ndarray:
        """Token ids of the text alone. A special token that the text spells out is encoded as ordinary text.

        Shapes:
            returns (n,) of `dtype`
        """
        try:
            return self._encode(text)
        except (UnicodeEncodeError, TypeError):  # the libraries' errors for a lone surrogate
            return self._encode(replace_surrogates(text))

    def encode_document(self, text: str) -> np.ndarray:
        """A document as training sees it: the end-of-text token, then its text.

        Shapes:
            returns (1 + n,) of `dtype`
        """
        return np.concatenate((np.array([self.end_of_text], dtype=self.dtype), self.encode(text)))

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_document` of each text."""
        return [self.encode_document(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The concatenated bytes of the tokens.

        A vocabulary that marks the start of words keeps the space before a text's first word; one that drops white
        space (WordPiece) gives a space before each word.
        """

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token stands for; 0 for special tokens.

        Exact for byte-level vocabularies: the tokens of a text sum to its UTF-8 length (after the vocabulary's own
        normalization). Metaspace counts one space too many if the vocabulary puts one before the text. WordPiece drops
        white space and does not count it, which makes bits per byte too high, never too low.

        Shapes:
            (vocab_size,) int64
        """

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray:
        """`encode`, for text that UTF-8 can hold."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Little-endian uint16 where the vocabulary allows, else uint32."""
    return np.dtype(f"<u{bytes_per_token(vocab_size)}")


def split_text(text: str, size: int, boundary: re.Pattern[str]) -> Iterator[str]:
    """Pieces of at most `size` characters, split before the last match of `boundary` near the limit, if there is one.

    A split at a boundary must not change the tokens; a split elsewhere changes only the tokens beside it.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        for match in boundary.finditer(text, end - min(size // 2, SPLIT_WINDOW_CHARS), end):
            end = match.start()
        yield text[start:end]
        start = end
    yield text[start:]


def replace_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
