"""Training a byte-level BPE tokenizer: GPT-2's way of splitting words, and all 256 bytes."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from myllm.errors import UserError
from myllm.files import write_text

from .base import replace_surrogates
from .huggingface import MAX_VOCAB_SIZE

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 256 + 1
"""Every byte, and the special token."""
MIN_FREQUENCY = 2
# The trainer takes quadratic time in a word's length: a megabyte of one letter would hang it. No useful token is
# longer, and a split costs at most the pair of tokens beside it.
MAX_WORD_CHARS = 256
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_WORD_CHARS},}}|(?<!\s)\s{{{MAX_WORD_CHARS},}}")


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path, progress: bool = True) -> Path:
    """Learn a vocabulary and write it as a tokenizer.json. The same texts give the same bytes.

    If the text is too short for that many tokens, the vocabulary is smaller than `vocab_size`.

    Raises:
        UserError: an impossible size, or no text.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size:,}, expected {MIN_VOCAB_SIZE:,} (the 256 bytes and {END_OF_TEXT}) to "
            f"{MAX_VOCAB_SIZE:,}; 32000 suits most corpora"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=MIN_FREQUENCY, special_tokens=[END_OF_TEXT], show_progress=progress,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    chars = 0

    def pieces() -> Iterator[str]:
        nonlocal chars
        for text in texts:
            chars += len(text)
            yield from _split_long_runs(text)

    tokenizer.train_from_iterator(pieces(), trainer)
    if not chars:
        raise UserError("the source has no text to learn a vocabulary from; use another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, tokenizer.to_str(pretty=True))
    return out


def _split_long_runs(text: str) -> Iterator[str]:
    """The text in pieces, without words or runs of white space longer than MAX_WORD_CHARS."""
    if not text.isascii():
        text = replace_surrogates(text)
    start = 0
    for match in _LONG_RUN.finditer(text):
        for end in range(match.start() + MAX_WORD_CHARS, match.end(), MAX_WORD_CHARS):
            yield text[start:end]
            start = end
    yield text[start:]
