"""GPT-2's byte-pair encoding (r50k_base) through tiktoken, with the vocabulary file that ships with the code.

The vocabulary's own pattern ends in `\\s++$|\\s+(?!\\S)|\\s`: it leaves the last character of a run of white space to
the word that follows. The lookahead needs a backtracking engine, which is half as fast and overflows its stack in a run
of about a million. So `_join` marks those places beforehand, and the pattern here needs no lookahead. The documents of
a batch are joined too, since a call costs as much as a short document.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property, lru_cache
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import tiktoken

from myllm.errors import UserError

from .base import Tokenizer, replace_surrogates, split_text

NAME = "r50k_base"
VOCAB_FILE = "r50k_base.tiktoken"
SHIPPED_VOCABULARY = Path(__file__).with_name(VOCAB_FILE)
# Source: tiktoken_ext/openai_public.py, for the hash and the pattern.
VOCAB_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"""
END_OF_TEXT = 50_256
SPLIT = END_OF_TEXT + 1
"""Id of the mark within a run of white space; removed from what is returned."""
MAX_PIECE_CHARS = 1_000_000
"""Longer texts are encoded in pieces: one call takes some 60 bytes of memory per character."""
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
"""No token reaches over such a place."""
# White space of Unicode, and so of the pattern; Python's \s has four characters more.
_WHITE_SPACE = (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)


class GPT2Tokenizer(Tokenizer):
    """
    Raises:
        UserError: the vocabulary file is missing or damaged.
    """

    kind, is_default, name = "tiktoken", True, NAME
    vocab_size, end_of_text = END_OF_TEXT + 1, END_OF_TEXT

    def __init__(self, file: Path = SHIPPED_VOCABULARY) -> None:
        self.file = file
        try:
            self._content = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the vocabulary {file}: {error.strerror}; restore it with git checkout"
            ) from None
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        if self.sha256 != VOCAB_SHA256:
            raise UserError(
                f"the vocabulary {file} is damaged: its sha256 is {self.sha256[:12]}..., expected "
                f"{VOCAB_SHA256[:12]}...; restore it with git checkout"
            )

    # The tables are built at first use: the process that plans a data set never encodes.

    @cached_property
    def _bytes_by_id(self) -> dict[int, bytes]:
        return {rank: token for token, rank in _parse_ranks(self._content).items()} | {END_OF_TEXT: b"<|endoftext|>"}

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        if any(len(text) > MAX_PIECE_CHARS for text in texts):
            return super().encode_documents(texts)
        try:
            return self._encode_batch(texts)
        except (UnicodeEncodeError, TypeError):
            return self._encode_batch([replace_surrogates(text) for text in texts])

    def _encode(self, text: str) -> np.ndarray:
        pieces = split_text(text, MAX_PIECE_CHARS, _BETWEEN_WORDS)
        return np.concatenate([self._encode_batch([piece])[0][1:] for piece in pieces])

    def _encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One call for all documents: tiktoken splits at special tokens first, so no document affects another."""
        end, split = _absent_characters("".join(texts))
        encoding = _make_encoding(self._content, end, split)
        tokens = encoding.encode_to_numpy(_join(texts, end, split), allowed_special={end, split})
        tokens = tokens[tokens != SPLIT].astype(np.uint16)
        starts = np.flatnonzero(tokens == END_OF_TEXT).tolist()
        return [tokens[start:stop] for start, stop in pairwise((*starts, len(tokens)))]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes_by_id[int(token)] for token in ids])

    def token_bytes(self) -> np.ndarray:
        return np.array([len(self._bytes_by_id[token]) for token in range(END_OF_TEXT)] + [0], dtype=np.int64)


@cache
def _parse_ranks(vocabulary: bytes) -> dict[bytes, int]:
    """Id by token. One process loads the tokenizer many times, for data, evaluations and samples."""
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, vocabulary.splitlines())}


@lru_cache(maxsize=4)
def _make_encoding(vocabulary: bytes, end: str, split: str) -> tiktoken.Encoding:
    """An encoding whose special tokens are these two characters."""
    special = {end: END_OF_TEXT, split: SPLIT}
    return tiktoken.Encoding(NAME, pat_str=PATTERN, mergeable_ranks=_parse_ranks(vocabulary), special_tokens=special)


def _join(texts: Sequence[str], end: str, split: str) -> str:
    """One text: `end` before each document, and `split` before the last character of white space that follows another
    and precedes a character of the same document."""
    joined = end.join(("", *texts))
    codes = np.frombuffer(joined.encode("utf-32-le"), dtype="<u4")
    white = _is_white_space()[codes]
    splits = np.flatnonzero(white[:-2] & white[1:-1] & ~white[2:] & (codes[2:] != ord(end))) + 1
    return split.join(joined[start:stop] for start, stop in pairwise((0, *splits.tolist(), len(joined))))


@cache
def _is_white_space() -> np.ndarray:
    """Whether each code point is white space, (0x110000,) bool."""
    white = np.zeros(0x110000, dtype=bool)
    white[list(_WHITE_SPACE)] = True
    return white


def _absent_characters(text: str) -> Iterator[str]:
    """Two characters that the text lacks. Nearly all texts lack the first two candidates, whose encoding is cached."""
    candidates = map(chr, chain(range(1, 9), range(0xFDD0, 0x110000)))
    return islice((character for character in candidates if character not in text), 2)
