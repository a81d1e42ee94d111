"""GPT-2's byte-pair encoding (r50k_base) through tiktoken, from the file in assets/, never from the network."""

import base64
import hashlib
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken

from .. import paths
from ..errors import UserError

VOCAB_FILE = "r50k_base.tiktoken"
# Source: tiktoken_ext/openai_public.py, which checks its download against the same hash.
VOCAB_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
END_OF_TEXT = 50_256

# A run of about a million white-space characters overflows the regex engine's stack inside tiktoken and panics. Looking
# behind lets a run match at its start alone: tried at each of its characters, a shorter run would take quadratic time.
MAX_SPACE_CHARS = 100_000
_LONG_SPACE = re.compile(rf"(?<!\s)\s{{{MAX_SPACE_CHARS},}}")


class Tokenizer:
    """Text to token ids and back. Load once a process: building the tables takes a moment.

    Raises:
        UserError: if the vocabulary file is missing or not the one expected.
    """

    def __init__(self, path: Path | None = None) -> None:
        path = path or paths.assets() / VOCAB_FILE
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the vocabulary {path}: {error.strerror}; restore it with git checkout"
            ) from None
        self.sha256 = hashlib.sha256(content).hexdigest()
        if self.sha256 != VOCAB_SHA256:
            raise UserError(
                f"the vocabulary {path} is damaged: its sha256 is {self.sha256[:12]}..., expected "
                f"{VOCAB_SHA256[:12]}...; restore it with git checkout"
            )
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
        self.name = "r50k_base"
        self.end_of_text = END_OF_TEXT
        self._ranks = ranks
        self._bpe = tiktoken.Encoding(
            self.name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": END_OF_TEXT}
        )
        self.vocab_size = self._bpe.n_vocab

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text as it stands: `<|endoftext|>` in it is spelled out, never the special token.

        Shapes:
            returns (n,) uint16
        """
        # Cutting such a run in pieces changes at most the tokens at the cuts.
        runs = [match.span() for match in _LONG_SPACE.finditer(text)]
        cuts = [0, *(cut for a, b in runs for cut in range(a + MAX_SPACE_CHARS, b, MAX_SPACE_CHARS)), len(text)]
        pieces = [self._encode(text[a:b]) for a, b in pairwise(cuts) if b > a]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)

    def _encode(self, text: str) -> np.ndarray:
        try:
            ids = self._bpe.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, which no UTF-8 can hold, becomes U+FFFD
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            ids = self._bpe.encode_to_numpy(text, disallowed_special=())
        return ids.astype(np.uint16)

    def encode_document(self, text: str) -> np.ndarray:
        """A document as training sees it: `<|endoftext|>`, then its text.

        Shapes:
            returns (1 + n,) uint16
        """
        return np.concatenate((np.array([self.end_of_text], dtype=np.uint16), self.encode(text)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self._bpe.decode([int(i) for i in ids], errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._bpe.decode_bytes([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token stands for; 0 for `<|endoftext|>`, which stands for none.

        Shapes:
            (vocab_size,) int64
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self._ranks.items():
            lengths[rank] = len(token)
        return lengths
