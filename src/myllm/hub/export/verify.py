"""The gate: what transformers loads from the folder gives our logits and our token ids, or there is no export."""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from myllm import paths
from myllm.data.tokenizer.base import Tokenizer
from myllm.errors import UserError
from myllm.model.transformer import Transformer

# Of the largest logit. Two float32 programs of the same sums differ by about 1e-6; a wrong detail by 1e-2 and more.
TOLERANCE = 1e-4
RANDOM_TOKENS = 256
TEXT_TOKENS = 1_024
RANDOM_TEXTS = 200


@dataclass(frozen=True)
class Parity:
    """The largest differences found, and what they are to be compared with."""

    random: float
    """Of a logit, on random tokens."""
    text: float
    """Of a logit, on real text."""
    largest_logit: float
    characters: int
    """Of text whose token ids were compared."""

    def __str__(self) -> str:
        return (
            f"largest difference of a logit {self.random:.1e} on random tokens, {self.text:.1e} on real text "
            f"(logits up to {self.largest_logit:.1f}); the same token ids on {self.characters:,} characters"
        )


def require_transformers() -> Any:
    """
    Raises:
        UserError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise UserError(
            "nothing is called exported before transformers gives the same logits from it, and transformers is not "
            "installed: pip install transformers (the extra `export` of this package names the version in use)"
        ) from None
    return transformers


@torch.no_grad()
def verify(folder: Path, model: Transformer, tokenizer: Tokenizer) -> Parity:
    """Load the folder as a stranger would and compare.

    Args:
        model: with the weights that were written, in float32 on the CPU.

    Raises:
        UserError: they differ.
    """
    transformers = require_transformers()
    with _quiet(transformers):
        peer, notes = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        fast = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        characters = _check_ids(fast, tokenizer)
    if odd := {kind: sorted(names) for kind, names in notes.items() if names}:
        raise UserError(f"transformers finds other weights than were written: {odd}")
    differences, largest = [], 0.0
    for tokens in sample_inputs(model, tokenizer):
        ours, theirs = model(tokens), peer.eval()(tokens).logits
        _check_same_size(ours, theirs)
        differences.append(float((ours - theirs).abs().max()))
        largest = max(largest, float(ours.abs().max()))
    parity = Parity(*differences, largest, characters)
    if not max(differences) <= TOLERANCE * largest:  # NaN is no success
        raise UserError(
            f"transformers gives other logits than this model: {parity}; allowed {TOLERANCE * largest:.1e}. Nothing "
            "was exported; please report this with the run's config.json"
        )
    return parity


def _check_same_size(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise UserError(f"transformers gives logits of the shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")


def sample_inputs(model: Transformer, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Random tokens and the start of a document, as far into the context as time allows."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(config.vocab_size, (2, min(config.max_seq_len, RANDOM_TOKENS)), generator=generator)
    return drawn, torch.tensor(
        [tokenizer.encode_document(real_text()).tolist()[: min(config.max_seq_len, TEXT_TOKENS)]]
    )


def real_text() -> str:
    """Prose and code that every machine with this package has."""
    readme = paths.project_root() / "README.md"
    prose = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    return prose + Path(os.__file__).read_text(encoding="utf-8")


def random_texts() -> list[str]:
    """What breaks tokenizers: all of Unicode, runs of white space, digits, quotes, and special tokens spelled out."""
    chance = random.Random(0)
    parts = (
        lambda: chr((chance.randrange(0x110000 - 0x800) + 0xE000) % 0x110000),  # without surrogates
        lambda: chr(chance.randrange(32, 0x250)),
        lambda: chance.choice(" \t\n\r\x0b\x85\xa0\u2003\u3000") * chance.randrange(1, 6),
        lambda: str(chance.randrange(10**6)),
        lambda: chance.choice(
            ["'s", "'LL", "n\u2019t", "<|endoftext|>", "</s>", "[UNK]", "Ġ", "é", "e\u0301", "\U0001f469"]
        ),
        lambda: chance.choice(["the", "River", "of", "naïve", "言語", "мир", "foo_bar", "==>"]),
    )
    return ["".join(chance.choice(parts)() for _ in range(chance.randrange(40))) for _ in range(RANDOM_TEXTS)]


def _check_ids(fast: Any, tokenizer: Tokenizer) -> int:
    texts = [*random_texts(), real_text(), "", " ", "\n"]
    for text in texts:
        try:
            ours = tokenizer.encode_document(text).tolist()
        except UserError:  # a vocabulary without some characters
            continue
        theirs = fast(text).input_ids
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            raise UserError(
                f"transformers' tokenizer gives other ids than {tokenizer.name}: for {text[:60]!r} from token {at} "
                f"{theirs[at : at + 5]}, expected {ours[at : at + 5]}. Nothing was exported"
            )
    return sum(map(len, texts))


class _quiet:
    """transformers' progress bars and warnings out of the way, and back as they were."""

    def __init__(self, transformers: Any) -> None:
        self._logging = transformers.utils.logging

    def __enter__(self) -> None:
        self._level = self._logging.get_verbosity()
        self._bars = self._logging.is_progress_bar_enabled()
        self._logging.set_verbosity_error()
        self._logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bars:
            self._logging.enable_progress_bar()
