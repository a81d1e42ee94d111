"""Verify an export: transformers must load it and give our logits and our token ids."""

import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from myllm import paths
from myllm.data.tokenizer.base import Tokenizer
from myllm.errors import UserError, require
from myllm.model.transformer import Transformer

# Relative to the largest logit. Two correct float32 implementations differ by about 1e-6, a wrong one by over 1e-2.
TOLERANCE = 1e-4
RANDOM_TOKENS = 256
TEXT_TOKENS = 1_024
RANDOM_TEXTS = 200


@dataclass(frozen=True)
class Parity:
    """The largest differences of a logit."""

    random: float
    """On random tokens."""
    text: float
    """On real text."""
    largest_logit: float
    characters: int
    """Characters of text whose token ids were compared."""

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.random:.1e} on random tokens, {self.text:.1e} on real text "
            f"(logits up to {self.largest_logit:.1f}); same token ids on {self.characters:,} characters"
        )


def require_transformers() -> Any:
    """
    Raises:
        UserError: transformers is not installed.
    """
    return require("verifying an export", "export", "transformers")


def verify(folder: Path, model: Transformer, tokenizer: Tokenizer) -> Parity:
    """Load the folder without MyLLM and compare it with the model.

    Args:
        model: a model with the exported weights, in float32 on the CPU.

    Raises:
        UserError: logits, weights or token ids differ.
    """
    transformers = require_transformers()
    with _quiet(transformers):
        peer, notes = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        fast = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        characters = _check_ids(fast, tokenizer)
    if mismatches := {kind: sorted(names) for kind, names in notes.items() if names}:
        raise UserError(f"transformers does not find the exported weights: {mismatches}")
    (random_difference, text_difference), largest = compare_logits(
        "transformers gives", model, lambda tokens: peer.eval()(tokens).logits, sample_inputs(model, tokenizer)
    )
    return Parity(random_difference, text_difference, largest, characters)


@torch.no_grad()
def compare_logits(
    peer: str, model: Transformer, peer_logits: Callable[[Tensor], Tensor], inputs: Iterable[Tensor]
) -> tuple[list[float], float]:
    """The largest difference of a logit for each input, and the largest logit.

    Args:
        peer: what the model is compared with and a verb, such as "transformers gives".

    Raises:
        UserError: the logits differ by more than rounding.
    """
    differences, largest = [], 0.0
    for tokens in inputs:
        ours, theirs = model(tokens), peer_logits(tokens)
        if ours.shape != theirs.shape:
            raise UserError(f"{peer} logits of shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}")
        differences.append(float((ours - theirs).abs().max()))
        largest = max(largest, float(ours.abs().max()))
    if not all(difference <= TOLERANCE * largest for difference in differences):  # also rejects NaN
        raise UserError(
            f"{peer} other logits than this model: largest difference {max(differences):.1e}, allowed "
            f"{TOLERANCE * largest:.1e}. Nothing was exported. Please report this with the run's config.json"
        )
    return differences, largest


def sample_inputs(model: Transformer, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Random tokens and the start of a document, of limited length to save time.

    Shapes:
        returns (2, T) and (1, T)
    """
    config = model.config
    generator = torch.Generator().manual_seed(0)
    random_tokens = torch.randint(config.vocab_size, (2, min(config.max_seq_len, RANDOM_TOKENS)), generator=generator)
    text_tokens = tokenizer.encode_document(real_text()).tolist()[: min(config.max_seq_len, TEXT_TOKENS)]
    return random_tokens, torch.tensor([text_tokens])


def real_text() -> str:
    """Prose and code that exist on every machine with this package."""
    readme = paths.project_root() / "README.md"
    prose = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    return prose + Path(os.__file__).read_text(encoding="utf-8")


def random_texts() -> list[str]:
    """Texts that are hard for tokenizers: all of Unicode, white space, digits, quotes, names of special tokens."""
    rng = random.Random(0)
    parts = (
        lambda: chr((rng.randrange(0x110000 - 0x800) + 0xE000) % 0x110000),  # without surrogates
        lambda: chr(rng.randrange(32, 0x250)),
        lambda: rng.choice(" \t\n\r\x0b\x85\xa0\u2003\u3000") * rng.randrange(1, 6),
        lambda: str(rng.randrange(10**6)),
        lambda: rng.choice(
            ["'s", "'LL", "n\u2019t", "<|endoftext|>", "</s>", "[UNK]", "Ġ", "é", "e\u0301", "\U0001f469"]
        ),
        lambda: rng.choice(["the", "River", "of", "naïve", "言語", "мир", "foo_bar", "==>"]),
    )
    return ["".join(rng.choice(parts)() for _ in range(rng.randrange(40))) for _ in range(RANDOM_TEXTS)]


def _check_ids(fast: Any, tokenizer: Tokenizer) -> int:
    texts = [*random_texts(), real_text(), "", " ", "\n"]
    for text in texts:
        try:
            ours = tokenizer.encode_document(text).tolist()
        except UserError:  # the vocabulary lacks some characters
            continue
        theirs = fast(text).input_ids
        if ours != theirs:
            first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            raise UserError(
                f"transformers' tokenizer gives other ids than {tokenizer.name}: for {text[:60]!r} from token {first} "
                f"{theirs[first : first + 5]}, expected {ours[first : first + 5]}. Nothing was exported"
            )
    return sum(map(len, texts))


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Disable transformers' progress bars and warnings."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
