"""Any tokenizer.json of Hugging Face's `tokenizers`, read from disk only."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from myllm.errors import UserError

from .base import Tokenizer, split_text

MAX_VOCAB_SIZE = 10**7
"""Only a damaged file has larger ids; tables have an entry for each."""
# In order of preference: a token made to end documents comes before one that ends a turn of a chat, or a sentence.
END_OF_TEXT_TOKENS = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "<|im_end|>", "[SEP]",
)  # fmt: skip
MAX_PIECE_CHARS = 100_000
"""Longer texts are encoded in pieces: a call takes about 170 bytes of memory per character, and some models take more
than linear time in the length of a word."""
WORD_START = re.compile(r"(?<=\S)\s")
SPACE_OR_LINE = re.compile(r"(?<=\S)[ \t]|(?<=[^\W_])[\r\n]")
"""For vocabularies of today's size, most of which split words as Llama 3 does: line breaks belong to the punctuation
before them. The smaller ones keep the boundary that existing data sets were made with."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFaceTokenizer(Tokenizer):
    """Encodes text as it is: the file's padding, truncation, dropout and template of special tokens are meant for a
    model's input and are ignored. Its normalization (case, Unicode forms, a space in front) is part of the vocabulary
    and is applied.

    Raises:
        UserError: the file is unreadable, not a tokenizer, has too large ids, or has no token that ends a document.
    """

    kind, is_default = "huggingface", False

    def __init__(self, file: Path) -> None:
        content, spec = _read(file)
        self.file = file
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._backend = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"{file} is JSON, but not a tokenizer: {error}; expected a tokenizer.json as Hugging Face's tokenizers "
                "or `myllm tokenizer train` save it"
            ) from None
        self._tokens = {index: token for token, index in self._backend.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self._tokens, default=-1) + 1  # ids may have gaps
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise UserError(
                f"the vocabulary {file} has ids up to {self.vocab_size - 1:,}, expected below {MAX_VOCAB_SIZE:,}; "
                "the file may be damaged: download it again"
            )
        # From the content alone, so that it is the same on every machine and in every folder.
        self.name = f"{str(spec['model'].get('type', 'bpe')).lower()}-{self.vocab_size}-{self.sha256[:8]}"
        end_token = _end_of_text_token(file, [token.content for token in self._added_tokens().values()])
        end_of_text = self._backend.token_to_id(end_token)
        assert end_of_text is not None  # it is one of the added tokens
        self.end_of_text = end_of_text
        self._boundary = WORD_START if self.dtype.itemsize == 2 else SPACE_OR_LINE
        self._ignore_model_input_settings(end_token)
        self._special = {index for index, token in self._added_tokens().items() if token.special}
        unknown = self._backend.token_to_id(_unknown_token(spec["model"]) or "")
        self._never_encoded = (self._special - {unknown}) | {self.end_of_text}
        self._byte_level = "ByteLevel" in {part["type"] for part in _parts(spec)}
        self._to_bytes, self._drops_spaces = _token_decoder(spec), _drops_spaces(spec)

    def _added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        return self._backend.get_added_tokens_decoder()

    def _ignore_model_input_settings(self, end_token: str) -> None:
        self._backend.no_truncation()
        self._backend.no_padding()
        if getattr(self._backend.model, "dropout", None):
            self._backend.model.dropout = None
        self._backend.add_special_tokens([end_token])  # some files do not mark it as special
        self._backend.encode_special_tokens = True  # special tokens that a text spells out are ordinary text

    @cached_property
    def _bytes(self) -> list[bytes]:
        """By id. Encoding needs no table, and this one takes a second for a large vocabulary."""
        found, added = [b""] * self.vocab_size, self._added_tokens()
        for index, token in self._tokens.items():
            found[index] = token.encode() if index in added else self._to_bytes(token)
        return found

    def _encode(self, text: str) -> np.ndarray:
        try:
            return np.concatenate([self._encode_piece(p) for p in split_text(text, MAX_PIECE_CHARS, self._boundary)])
        except Exception as error:
            if type(error) is not Exception:  # the library's own errors have no type
                raise
            raise UserError(
                f"the vocabulary {self.file} cannot encode a text that begins with {text[:40]!r}: {error}; it needs a "
                "token for unknown text, or all 256 bytes, which `myllm tokenizer train` includes"
            ) from None

    def _encode_piece(self, text: str) -> np.ndarray:
        # encode_batch_fast is a little faster, but starts threads even for one text.
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if not self._never_encoded.isdisjoint(ids):
            # Unigram and whole-word models find the special token's own entry in their vocabulary.
            parts = [self._spell_out(index) if index in self._never_encoded else [index] for index in ids]
            ids = [index for part in parts for index in part]
        return np.array(ids, dtype=self.dtype)

    def _spell_out(self, special: int) -> list[int]:
        """Tokens for a special token's text, one character at a time, so that none of them holds all of it."""
        text = self._tokens[special]
        if self._byte_level:
            alphabet = byte_alphabet()
            text = "".join(alphabet[byte] for byte in text.encode())
        found = [token.id for character in text for token in self._backend.model.tokenize(character)]
        return [index for index in found if index not in self._never_encoded]

    def decode(self, ids: Iterable[int]) -> str:
        if self._byte_level:
            return super().decode(ids)
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes[int(token)] for token in ids])

    def token_bytes(self) -> np.ndarray:
        lengths = np.array([len(token) for token in self._bytes], dtype=np.int64)
        if self._drops_spaces:
            lengths -= [token.startswith(b" ") for token in self._bytes]
        lengths[sorted(self._special)] = 0
        return lengths


def byte_alphabet() -> list[str]:
    """The printable characters that stand for the 256 bytes in a byte-level vocabulary.

    Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _read(file: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the vocabulary {file}: {error.strerror}; make it readable") from None
    try:
        spec = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"the vocabulary {file} is not JSON ({error}); expected a tokenizer.json. transformers converts a "
            "SentencePiece tokenizer.model: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ) from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise UserError(
            f"{file} is JSON, but not a tokenizer: it has no model; expected a tokenizer.json as Hugging Face's "
            "tokenizers saves it (tokenizer_config.json and vocab.json are other files)"
        )
    return content, spec


def _end_of_text_token(file: Path, added: list[str]) -> str:
    for token in END_OF_TEXT_TOKENS:
        if token in added:
            return token
    raise UserError(
        f"the vocabulary {file} has no token that ends a document: its added tokens are "
        f"{', '.join(added[:8]) or 'none'}, expected one of {', '.join(END_OF_TEXT_TOKENS)}; add one with "
        'tokenizers: tokenizer.add_special_tokens(["<|endoftext|>"]) and tokenizer.save(PATH)'
    )


# -- the bytes of a token ---------------------------------------------------------------------------------------------


def _parts(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps before and after the model, including those inside a Sequence."""
    queue = [spec.get("normalizer"), spec.get("pre_tokenizer"), spec.get("decoder")]
    while queue:
        part = queue.pop()
        if part:
            yield part
            queue += [*part.get("normalizers", ()), *part.get("pretokenizers", ()), *part.get("decoders", ())]


def _unknown_token(model: dict[str, Any]) -> str | None:
    """The special token that stands for text without a token of its own. Text may well encode to it."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _drops_spaces(spec: dict[str, Any]) -> bool:
    """Whether encoding drops the white space between words, and decoding puts a space there."""
    kinds = {part["type"] for part in _parts(spec)}
    return not kinds & {"ByteLevel", "Metaspace"} and ("WordPiece" in kinds or not spec.get("decoder"))


def _token_decoder(spec: dict[str, Any]) -> Callable[[str], bytes]:
    """A function from a token, as the vocabulary writes it, to the bytes of text that it stands for."""
    model = spec["model"]
    if any(part["type"] == "ByteLevel" for part in _parts(spec)):
        byte_of = {character: bytes([byte]) for byte, character in enumerate(byte_alphabet())}
        return lambda token: b"".join(byte_of.get(character) or character.encode() for character in token)
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    drops_spaces = _drops_spaces(spec)
    space = next((part["replacement"] for part in _parts(spec) if part["type"] == "Metaspace"), "▁")

    def to_bytes(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if model.get("byte_fallback") else None
        if byte:
            return bytes([int(byte[1], 16)])
        if prefix and token.startswith(prefix):
            return token[len(prefix) :].encode()
        if suffix and token.endswith(suffix):
            return token[: -len(suffix)].encode() + b" "
        return b" " + token.encode() if drops_spaces else token.replace(space, " ").encode()

    return to_bytes
