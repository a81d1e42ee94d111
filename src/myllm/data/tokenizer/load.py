"""Text to token ids and back: GPT-2's vocabulary (r50k.py), or one's own (tokenizer_json.py), behind one surface."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from myllm import paths
from myllm.errors import UserError, nearest
from myllm.paths import user_path

from .gpt2 import NAME, SHIPPED_VOCABULARY, VOCAB_FILE, GPT2Tokenizer
from .huggingface import HuggingFaceTokenizer

TOKENIZER_FILE = "tokenizer.json"


class Vocabulary(Protocol):
    """What a kind of vocabulary brings; `Tokenizer` says what each means."""

    kind: str
    name: str
    sha256: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> np.ndarray: ...
    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...
    def token_bytes(self) -> np.ndarray: ...


class Tokenizer:
    """Text to token ids and back. Load once a process: building the tables takes a moment.

    Raises:
        UserError: if the vocabulary's file is missing, damaged, or none that training can use.
    """

    def __init__(self, file: Path | None = None) -> None:
        """With GPT-2's vocabulary, or with a tokenizer.json."""
        self.file = file or SHIPPED_VOCABULARY
        kind = GPT2Tokenizer if self.file.name == VOCAB_FILE else HuggingFaceTokenizer
        self._vocabulary: Vocabulary = kind(self.file)
        self.name = self._vocabulary.name
        self.sha256 = self._vocabulary.sha256
        """Of the vocabulary's file."""
        self.vocab_size = self._vocabulary.vocab_size
        """The largest id + 1."""
        self.end_of_text = self._vocabulary.end_of_text
        """The special token that stands before each document."""

    @property
    def is_default(self) -> bool:
        """Whether this is the vocabulary that ships with the code, which nothing has to carry along."""
        return self.name == NAME

    def describe(self) -> dict[str, Any]:
        """What binds data to this vocabulary; no path, so the same on every machine."""
        return {
            "kind": self._vocabulary.kind,
            "name": self.name,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
        }

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text as it stands: `<|endoftext|>` in it is spelled out, never the special token.

        Shapes:
            returns (n,) uint16
        """
        try:
            return self._vocabulary.encode(text)
        except (UnicodeEncodeError, TypeError):  # a lone surrogate, which no UTF-8 can hold, becomes U+FFFD
            return self._vocabulary.encode(without_surrogates(text))

    def encode_document(self, text: str) -> np.ndarray:
        """A document as training sees it: the end-of-text token, then its text.

        Shapes:
            returns (1 + n,) uint16
        """
        return np.concatenate((np.array([self.end_of_text], dtype=np.uint16), self.encode(text)))

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same of several documents, which costs less than one after the other where they are short.

        Shapes:
            returns (1 + n,) uint16 each
        """
        try:
            return self._vocabulary.encode_documents(texts)
        except (UnicodeEncodeError, TypeError):  # as in `encode`
            return [self.encode_document(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return self._vocabulary.decode([int(i) for i in ids])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of each token, end to end.

        For a vocabulary that marks the start of words, a text's first word keeps its space; one that drops white space
        (WordPiece) gives a space before each word.
        """
        return self._vocabulary.decode_bytes([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token stands for; 0 for special tokens, which stand for none.

        Exact for byte-level vocabularies: a text's tokens sum to its UTF-8 length (after the vocabulary's own changes
        to the text, if it makes any). With Metaspace a text counts one space too many where it is given one in front.
        WordPiece counts no white space, which it drops: bits per byte come out somewhat too high, never too low.

        Shapes:
            (vocab_size,) int64
        """
        return self._vocabulary.token_bytes()


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that a config names: `r50k_base`, a tokenizer.json, or a folder that holds one. A path is relative
    to the current folder, or to temp_data/.

    Raises:
        UserError: nothing there, or none that training can use.
    """
    if str(spec) == NAME:
        return Tokenizer()
    path = user_path(spec)
    if not path.exists():
        path = _below_temp_data(path) or path
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if file.is_file():
        return Tokenizer(file)
    if path.is_dir():
        seen = sorted(each.name for each in path.iterdir())[:8]
        raise UserError(
            f"the folder {path} holds no {TOKENIZER_FILE}: it has {', '.join(seen) or 'nothing'}; give one that does "
            "(transformers writes one with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))"
        )
    known = [NAME, *(str(each) for each in (path.parent.glob("*") if path.parent != Path(".") else ()))]
    raise UserError(
        f"no tokenizer {str(spec)!r}{nearest(str(spec), known)}; give {NAME}, or the path of a {TOKENIZER_FILE}, such "
        "as one that `myllm tokenizer train SOURCE` wrote"
    )


def _below_temp_data(path: Path) -> Path | None:
    """Where paths.portable's name leads, or an absolute one that was written before temp_data/ was moved."""
    kept = Path(*path.parts[-3:]) if path.is_absolute() else path  # such as runs/NAME/tokenizer.json
    found = paths.temp_data() / kept
    return found if kept.parts[:1] in (("datasets",), ("runs",), ("tokenizers",)) and found.exists() else None


def without_surrogates(text: str) -> str:
    """The text with pairs of surrogates joined and each lone one, which no UTF-8 can hold, as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
