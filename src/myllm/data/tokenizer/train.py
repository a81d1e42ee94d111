"""A byte-level vocabulary of one's own, learned from text: GPT-2's way of cutting words, and all 256 bytes."""

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
# The trainer takes quadratic time in a word's length: a megabyte of one letter would hang it. No token worth having is
# longer, and a cut costs at most the pair of tokens that it parts.
MAX_WORD_CHARS = 256
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_WORD_CHARS},}}|(?<!\s)\s{{{MAX_WORD_CHARS},}}")


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path, progress: bool = True) -> Path:
    """Learn a vocabulary and write it as a tokenizer.json. The same texts give the same bytes.

    Too little text for so many tokens gives fewer: the file's own size is what counts.

    Raises:
        UserError: a size that cannot be, or no text at all.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size:,}, expected {MIN_VOCAB_SIZE:,} (the 256 bytes and {END_OF_TEXT}) to "
            f"{MAX_VOCAB_SIZE:,} (shards hold 16 bits a token); 32000 suits most corpora"
        )
    peer = tokenizers.Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    peer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=MIN_FREQUENCY, special_tokens=[END_OF_TEXT], show_progress=progress,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield from _trainable(text)

    peer.train_from_iterator(counted(), trainer)
    if not seen:
        raise UserError("there is no text to learn a vocabulary from; give a source that has some")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, peer.to_str(pretty=True))
    return out


def _trainable(text: str) -> Iterator[str]:
    """A text in pieces without words or runs of white space too long for the trainer."""
    if not text.isascii():
        text = replace_surrogates(text)
    start = 0
    for match in _LONG_RUN.finditer(text):
        for cut in range(match.start() + MAX_WORD_CHARS, match.end(), MAX_WORD_CHARS):
            yield text[start:cut]
            start = cut
    yield text[start:]
