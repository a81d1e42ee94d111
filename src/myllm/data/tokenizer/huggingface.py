"""A vocabulary of one's own: any tokenizer.json of Hugging Face's `tokenizers`, read from the disk alone."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from myllm.errors import UserError

MAX_VOCAB_SIZE = 65_536
"""Shards hold uint16."""
# What ends a document in the vocabularies in use, in the order in which they are looked for: a token made for it comes
# before one that ends a turn of a conversation or a sentence.
END_OF_TEXT_TOKENS = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "<|im_end|>", "[SEP]",
)  # fmt: skip
# One call takes about 170 bytes of memory a character, and some models more than linear time in the length of a word.
MAX_PIECE_CHARS = 100_000
NEAR_CHARS = 1_000
_WORD_START = re.compile(r"(?<=\S)\s")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFaceTokenizer:
    """The vocabulary in a tokenizer.json.

    What the file says about padding, truncation, dropout and tokens around a text is for a model's input, and is left
    out here: text goes in as it stands and nothing is lost or added. What it says about changing text first (case,
    Unicode forms, a space in front) belongs to the vocabulary and is done.

    Raises:
        UserError: unreadable, no tokenizer, without a token that ends a document, or too large for shards.
    """

    kind = "huggingface"

    def __init__(self, file: Path) -> None:
        content, spec = _read(file)
        self._file = file
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._peer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises nothing more exact
            raise UserError(
                f"{file} is JSON, but no tokenizer: {error}; expected a tokenizer.json as Hugging Face's tokenizers "
                "saves it, or as `myllm tokenizer train` does"
            ) from None
        self._tokens = {index: token for token, index in self._peer.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self._tokens, default=-1) + 1  # ids may have gaps
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise UserError(
                f"the vocabulary {file} has ids up to {self.vocab_size - 1:,}, but shards hold 16 bits a token: at "
                f"most {MAX_VOCAB_SIZE:,} tokens; take a smaller one, or train one with "
                f"`myllm tokenizer train SOURCE --vocab-size {MAX_VOCAB_SIZE}`"
            )
        # From the content alone, so that it is the same on every machine and in every folder.
        self.name = f"{str(spec['model'].get('type', 'bpe')).lower()}-{self.vocab_size}-{self.sha256[:8]}"
        ending = _ending(file, [token.content for token in self._peer.get_added_tokens_decoder().values()])
        self.end_of_text = self._peer.token_to_id(ending)
        self._take_text_as_it_stands(ending)
        added = self._peer.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special}
        unknown = {index for index, token in self._tokens.items() if token == _unknown_token(spec["model"])}
        self._unspeakable = (special - unknown) | {self.end_of_text}
        self._byte_level = "ByteLevel" in {part["type"] for part in _parts(spec)}
        spell = _spelling(spec)
        self._pieces = [b""] * self.vocab_size
        for index, token in self._tokens.items():
            self._pieces[index] = token.encode() if index in added else spell(token)
        self._lengths = np.array([len(piece) for piece in self._pieces], dtype=np.int64)
        if _joins_with_spaces(spec):
            self._lengths -= [piece.startswith(b" ") for piece in self._pieces]
        self._lengths[sorted(special)] = 0

    def _take_text_as_it_stands(self, ending: str) -> None:
        self._peer.no_truncation()
        self._peer.no_padding()
        if getattr(self._peer.model, "dropout", None):
            self._peer.model.dropout = None
        self._peer.add_special_tokens([ending])  # some files do not say that it is special
        self._peer.encode_special_tokens = True  # spelled in a text, they are text

    def encode(self, text: str) -> np.ndarray:
        try:
            if len(text) <= MAX_PIECE_CHARS:
                return self._encode(text)
            return np.concatenate([self._encode(piece) for piece in split_text(text, MAX_PIECE_CHARS)])
        except Exception as error:
            if type(error) is not Exception:  # the library's own has no type
                raise
            raise UserError(
                f"the vocabulary {self._file} cannot take a text that begins {text[:40]!r}: {error}; it needs a token "
                "for what it does not know, or all bytes, as one of `myllm tokenizer train` has"
            ) from None

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        front = np.array([self.end_of_text], dtype=np.uint16)
        return [np.concatenate((front, self.encode(text))) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        # encode_batch_fast is a little faster, but shares its work out over threads even for one text.
        ids = self._peer.encode(text, add_special_tokens=False).ids
        if not self._unspeakable.isdisjoint(ids):
            # Unigram and whole-word models find the special token's own entry in their vocabulary.
            parts = [self._spell(index) if index in self._unspeakable else [index] for index in ids]
            ids = [index for part in parts for index in part]
        return np.array(ids, dtype=np.uint16)

    def _spell(self, special: int) -> list[int]:
        """A special token's text, a character at a time: no token that holds all of it can be among them."""
        text = self._tokens[special]
        if self._byte_level:
            shown = byte_alphabet()
            text = "".join(shown[byte] for byte in text.encode())
        found = [token.id for character in text for token in self._peer.model.tokenize(character)]
        return [index for index in found if index not in self._unspeakable]

    def decode(self, ids: Sequence[int]) -> str:
        if self._byte_level:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self._peer.decode(ids, skip_special_tokens=False)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join([self._pieces[index] for index in ids])

    def token_bytes(self) -> np.ndarray:
        return self._lengths.copy()


def split_text(text: str, size: int) -> Iterator[str]:
    """Pieces of at most `size` characters, cut before a white-space character where one is near.

    A cut there changes no token of the usual vocabularies; elsewhere it changes at most the tokens at the cut, and a
    vocabulary that puts a space before every text puts one there too.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        for match in _WORD_START.finditer(text, end - min(size // 2, NEAR_CHARS), end):
            end = match.start()
        yield text[start:end]
        start = end
    yield text[start:]


def byte_alphabet() -> list[str]:
    """The printable stand-ins for the 256 bytes in a byte-level vocabulary.

    Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
    """
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _read(file: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the vocabulary {file}: {error.strerror}; make it readable") from None
    try:
        spec = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"the vocabulary {file} is not JSON ({error}); expected a tokenizer.json. A SentencePiece tokenizer.model "
            "becomes one with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ) from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise UserError(
            f"{file} is JSON, but no tokenizer: it has no model; expected a tokenizer.json as Hugging Face's "
            "tokenizers saves it (tokenizer_config.json and vocab.json are other files)"
        )
    return content, spec


def _ending(file: Path, added: list[str]) -> str:
    """The token that ends a document."""
    for token in END_OF_TEXT_TOKENS:
        if token in added:
            return token
    raise UserError(
        f"the vocabulary {file} has no token that ends a document: its added tokens are "
        f"{', '.join(added[:8]) or 'none'}, expected one of {', '.join(END_OF_TEXT_TOKENS)}; add one with "
        'tokenizers: tokenizer.add_special_tokens(["<|endoftext|>"]) and tokenizer.save(PATH)'
    )


# -- how a token is spelled -------------------------------------------------------------------------------------------


def _parts(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps before and after the model, those inside a Sequence too."""
    waiting = [spec.get("normalizer"), spec.get("pre_tokenizer"), spec.get("decoder")]
    while waiting:
        part = waiting.pop()
        if part:
            yield part
            waiting += [*part.get("normalizers", ()), *part.get("pretokenizers", ()), *part.get("decoders", ())]


def _unknown_token(model: dict[str, Any]) -> str | None:
    """What a model says for text that it has no token for: a special token that text may well turn into."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _joins_with_spaces(spec: dict[str, Any]) -> bool:
    """Whether words lose the white space between them, and a space is put there on the way back."""
    kinds = {part["type"] for part in _parts(spec)}
    return not kinds & {"ByteLevel", "Metaspace"} and ("WordPiece" in kinds or not spec.get("decoder"))


def _spelling(spec: dict[str, Any]) -> Any:
    """A function from a token, as the vocabulary writes it, to the bytes of text that it stands for."""
    model = spec["model"]
    if any(part["type"] == "ByteLevel" for part in _parts(spec)):
        byte_of = {shown: bytes([byte]) for byte, shown in enumerate(byte_alphabet())}
        return lambda token: b"".join(byte_of.get(character) or character.encode() for character in token)
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    spaced = _joins_with_spaces(spec)
    space = next((part["replacement"] for part in _parts(spec) if part["type"] == "Metaspace"), "▁")

    def spell(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if model.get("byte_fallback") else None
        if byte:
            return bytes([int(byte[1], 16)])
        if prefix and token.startswith(prefix):
            return token[len(prefix) :].encode()
        if suffix and token.endswith(suffix):
            return token[: -len(suffix)].encode() + b" "
        return (b" " if spaced else b"") + (token if spaced else token.replace(space, " ")).encode()

    return spell
