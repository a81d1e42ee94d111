"""GPT-2's byte-pair encoding (r50k_base) through tiktoken, from the file in assets/, never from the network."""

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

from ..errors import UserError

NAME = "r50k_base"
VOCAB_FILE = "r50k_base.tiktoken"
# Source: tiktoken_ext/openai_public.py, which checks its download against the same hash.
VOCAB_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = 50_256
END_OF_TEXT_SPELLED = "<|endoftext|>"

# A run of about a million white-space characters overflows the regex engine's stack inside tiktoken and panics. Looking
# behind lets a run match at its start alone: tried at each of its characters, a shorter run would take quadratic time.
MAX_SPACE_CHARS = 100_000
# One call takes some 60 bytes of memory a character where there is nothing to cut words at.
MAX_PIECE_CHARS = 1_000_000
NEAR_CHARS = 1_000
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_LONG_SPACE = re.compile(rf"(?<!\s)\s{{{MAX_SPACE_CHARS},}}")


def cut_text(text: str, size: int) -> Iterator[str]:
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


class R50k:
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

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, self._content.splitlines())}

    @cached_property
    def _bpe(self) -> tiktoken.Encoding:
        # At first use: the process that plans a data set never encodes.
        return tiktoken.Encoding(
            NAME, pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens={END_OF_TEXT_SPELLED: END_OF_TEXT}
        )

    def encode(self, text: str) -> np.ndarray:
        if len(text) < MAX_SPACE_CHARS:  # too short to hold such a run: nothing to look for
            return self._encode(text)
        return np.concatenate([self._encode_long(piece) for piece in cut_text(text, MAX_PIECE_CHARS)])

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        if any(len(text) >= MAX_SPACE_CHARS or END_OF_TEXT_SPELLED in text for text in texts):
            front = np.array([END_OF_TEXT], dtype=np.uint16)
            return [np.concatenate((front, self.encode(text))) for text in texts]
        # In one call: tiktoken cuts at the special token before it looks at any text, so no document sees another.
        joined = END_OF_TEXT_SPELLED.join(("", *texts))
        tokens = self._bpe.encode_to_numpy(joined, allowed_special={END_OF_TEXT_SPELLED}).astype(np.uint16)
        starts = np.flatnonzero(tokens == END_OF_TEXT).tolist()
        return [tokens[start:end] for start, end in pairwise((*starts, len(tokens)))]

    def _encode_long(self, text: str) -> np.ndarray:
        # Cutting such a run in pieces changes at most the tokens at the cuts.
        runs = [match.span() for match in _LONG_SPACE.finditer(text)]
        cuts = [0, *(cut for a, b in runs for cut in range(a + MAX_SPACE_CHARS, b, MAX_SPACE_CHARS)), len(text)]
        return np.concatenate([self._encode(text[a:b]) for a, b in pairwise(cuts)])

    def _encode(self, text: str) -> np.ndarray:
        return self._bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: Sequence[int]) -> str:
        return self._bpe.decode(ids, errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self._bpe.decode_bytes(ids)

    def token_bytes(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths
