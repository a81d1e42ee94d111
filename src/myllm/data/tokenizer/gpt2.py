"""GPT-2's byte-pair encoding (r50k_base) through tiktoken, from the file beside this one, never from the network."""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import tiktoken

from myllm.errors import UserError

NAME = "r50k_base"
VOCAB_FILE = "r50k_base.tiktoken"
SHIPPED_VOCABULARY = Path(__file__).with_name(VOCAB_FILE)
# Source: tiktoken_ext/openai_public.py, which checks its download against the same hash.
VOCAB_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# The vocabulary's own pattern (same source) ends in \s++$|\s+(?!\S)|\s: of a run of white space it leaves the last one
# to what comes next. Looking ahead takes a backtracking engine, which is half as fast and overflows its stack in a run
# of about a million. `marked` cuts texts there beforehand, and what is left to match needs no lookahead.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"""
END_OF_TEXT = 50_256
END_OF_TEXT_SPELLED = "<|endoftext|>"
CUT = END_OF_TEXT + 1
"""Stands for a mark within a document while it is tokenised, and never in what is given out."""

# What Unicode, and so the pattern, calls white space; Python's own idea of it has four characters more.
_WHITE = (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
# One call takes some 60 bytes of memory a character where there is nothing to cut words at.
MAX_PIECE_CHARS = 1_000_000
NEAR_CHARS = 1_000
MOST_ENCODINGS = 4
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")


def split_text(text: str, size: int) -> Iterator[str]:
    """Pieces of at most `size` characters, cut between two words where there are some near.

    No token of this vocabulary reaches over such a place, so a cut there changes nothing; elsewhere it changes at most
    the tokens at the cut.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        for match in _BETWEEN_WORDS.finditer(text, end - min(size // 2, NEAR_CHARS), end):
            end = match.start()
        yield text[start:end]
        start = end
    yield text[start:]


def marked(texts: Sequence[str], end: str, cut: str) -> str:
    """The texts as one, `end` before each, and `cut` before the last white space of two or more that something follows.

    Args:
        end: a character that is in no text, as is `cut`.
    """
    joined = end.join(("", *texts))
    codes = np.frombuffer(joined.encode("utf-32-le"), dtype="<u4")
    white = _is_white()[codes]
    cuts = np.flatnonzero(white[:-2] & white[1:-1] & ~white[2:] & (codes[2:] != ord(end))) + 1
    return cut.join(joined[a:b] for a, b in pairwise((0, *cuts.tolist(), len(joined))))


@cache
def _is_white() -> np.ndarray:
    """Whether each character of Unicode is white space, (0x110000,) bool."""
    white = np.zeros(0x110000, dtype=bool)
    white[list(_WHITE)] = True
    return white


def absent(text: str) -> tuple[str, str]:
    """Two characters that a text lacks: the same two control characters for nearly any, so that their tables are there.

    A text of a million characters cannot hold all that there are.
    """
    candidates = map(chr, chain(range(1, 9), range(0xFDD0, 0x110000)))
    first, second = islice((one for one in candidates if one not in text), 2)
    return first, second


class GPT2Tokenizer:
    """The vocabulary that ships with the code. Its tables are built at first use, which takes a moment.

    Raises:
        UserError: if the vocabulary file is missing or not the one expected.
    """

    kind = "tiktoken"

    def __init__(self, file: Path) -> None:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the vocabulary {file}: {error.strerror}; restore it with git checkout"
            ) from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        if self.sha256 != VOCAB_SHA256:
            raise UserError(
                f"the vocabulary {file} is damaged: its sha256 is {self.sha256[:12]}..., expected "
                f"{VOCAB_SHA256[:12]}...; restore it with git checkout"
            )
        self.name = NAME
        self.end_of_text = END_OF_TEXT
        self.vocab_size = END_OF_TEXT + 1
        self._content = content
        self._encodings: dict[tuple[str, str], tiktoken.Encoding] = {}

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, self._content.splitlines())}

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        return {rank: token for token, rank in self._ranks.items()} | {END_OF_TEXT: END_OF_TEXT_SPELLED.encode()}

    def _bpe(self, end: str, cut: str) -> tiktoken.Encoding:
        """That takes these two characters for the end of a text, and for a mark within."""
        # At first use: the process that plans a data set never encodes.
        encoding = self._encodings.get((end, cut))
        if encoding is None:
            encoding = tiktoken.Encoding(
                NAME, pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens={end: END_OF_TEXT, cut: CUT}
            )
            if len(self._encodings) >= MOST_ENCODINGS:
                self._encodings.clear()
            self._encodings[end, cut] = encoding
        return encoding

    def encode(self, text: str) -> np.ndarray:
        return self.encode_documents([text])[0][1:]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        if all(len(text) <= MAX_PIECE_CHARS for text in texts):
            return self._encode_together(texts)
        front = np.array([END_OF_TEXT], dtype=np.uint16)
        return [np.concatenate((front, *self._encode_pieces(text))) for text in texts]

    def _encode_pieces(self, text: str) -> Iterator[np.ndarray]:
        return (self._encode_together([piece])[0][1:] for piece in split_text(text, MAX_PIECE_CHARS))

    def _encode_together(self, texts: Sequence[str]) -> list[np.ndarray]:
        """In one call: tiktoken cuts at marks before it looks at any text, so no document sees another."""
        end, cut = absent("".join(texts))
        tokens = self._bpe(end, cut).encode_to_numpy(marked(texts, end, cut), allowed_special={end, cut})
        tokens = tokens[tokens != CUT].astype(np.uint16)
        starts = np.flatnonzero(tokens == END_OF_TEXT).tolist()
        return [tokens[start:end] for start, end in pairwise((*starts, len(tokens)))]

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join([self._bytes_of[each] for each in ids])

    def token_bytes(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths
