"""Documents and training sequences of a data set, decoded, and what its preparation skipped."""

import json
import re
from itertools import pairwise

import numpy as np

from myllm.config import EvalConfig
from myllm.errors import UserError

from .dataset import Dataset
from .mixture.mixed_dataset import MixedDataset
from .sampler import DataPosition, count_sequences, step_sequences, window_sequences
from .token_stream import TokenStream

READ_TOKENS = 1 << 20
PASSED_OVER = "passed_over.jsonl"
PROMPTS, PROMPT_WORDS, PROMPT_CHARS = 3, 5, 60
"""Of sample texts, if the user gives none."""
EXAMPLES = 2
"""Of skipped documents, for each reason: one file may be binary, and another in an encoding that can be converted."""


def document_at(dataset: Dataset, split: str, number: int) -> tuple[int, np.ndarray]:
    """Where a document begins in its split's stream, and its tokens with the end-of-text token before them.

    Raises:
        UserError: there are fewer documents.
    """
    stream = dataset.train if split == "train" else dataset.val
    start, before = 0, 0
    for shard in (shard for shard in dataset.shards if shard.split == split):
        if number < before + shard.documents:
            found = np.flatnonzero(stream.read(start, shard.tokens) == dataset.end_of_text)
            first = start + int(found[number - before])
            return first, stream.read(first, _end_of(stream, first + 1, dataset.end_of_text) - first)
        before += shard.documents
        start += shard.tokens
    raise UserError(f"{dataset.name} has {before:,} {split} documents, numbered from 0; there is no {number:,}")


def _end_of(stream: TokenStream, start: int, end_of_text: int) -> int:
    """Where the next document begins, or the stream ends."""
    while start < stream.tokens:
        part = stream.read(start, min(READ_TOKENS, stream.tokens - start))
        found = np.flatnonzero(part == end_of_text)
        if len(found):
            return start + int(found[0])
        start += len(part)
    return stream.tokens


def sequence_at(
    dataset: Dataset, split: str, number: int, seq_len: int, train_seed: int | None
) -> tuple[int, np.ndarray]:
    """Where a sequence begins in its split's stream, and its tokens: seq_len inputs, and the last target.

    Args:
        train_seed: number the sequences in the order of a run with this seed, from its first step on. None: in stored
            order.

    Raises:
        UserError: there are fewer sequences.
    """
    stream = dataset.train if split == "train" else dataset.val
    total = count_sequences(stream.tokens, seq_len)
    if train_seed is None and number >= total:
        raise UserError(f"{dataset.name} has {total:,} {split} sequences of {seq_len:,} tokens, numbered from 0")
    if train_seed is not None:
        if not total:
            raise UserError(f"{dataset.name} has no {split} sequence of {seq_len:,} tokens")
        position = DataPosition(number // total, number % total, train_seed, dataset.fingerprint)
        number = int(step_sequences(position, 1, total, window_sequences(seq_len))[0])
    return number * seq_len, stream.read(number * seq_len, seq_len + 1)


def describe_tokens(dataset: Dataset, tokens: np.ndarray) -> str:
    """Each document as text, under a line that says where it begins."""
    tokenizer = dataset.tokenizer()
    starts = np.flatnonzero(tokens == dataset.end_of_text).tolist()
    lines = []
    if not starts or starts[0] > 0:
        lines += [
            "--- continues a document that began earlier",
            tokenizer.decode(tokens[: starts[0] if starts else None]),
        ]
    for a, b in pairwise([*starts, len(tokens)]):
        lines += [
            f"--- token {a:,}: a document begins, {b - a - 1:,} of its tokens are shown",
            tokenizer.decode(tokens[a + 1 : b]),
        ]
    return "\n".join(lines)


def held_out_prompts(dataset: Dataset) -> tuple[str, ...]:
    """The first words of the first held-out documents of a data set, or of each component of a mixture. The same data
    give the same prompts."""
    if isinstance(dataset, MixedDataset):
        return tuple(prompt for component in dataset.components for prompt in held_out_prompts(component)[:1])
    tokens, tokenizer = dataset.val.read(0, min(READ_TOKENS, dataset.val.tokens)), dataset.tokenizer()
    prompts: list[str] = []
    for document in np.split(tokens, np.flatnonzero(tokens == dataset.end_of_text)):
        text = tokenizer.decode(document[document != dataset.end_of_text][:PROMPT_CHARS])
        if words := text.rstrip("\ufffd").split()[:PROMPT_WORDS]:  # the last token may end within a character
            prompts.append(" ".join(words)[:PROMPT_CHARS])
        if len(prompts) == PROMPTS:
            break
    return tuple(prompts) or EvalConfig().sample_prompts


def describe_skipped(dataset: Dataset) -> list[tuple[int, str]]:
    """How many documents of a complete data set were skipped or changed, by reason, and the reason with examples."""
    counts, listed = dataset.manifest["counts"], dataset.folder / PASSED_OVER
    examples: dict[str, dict[str, str]] = {}
    for row in map(json.loads, listed.read_text(encoding="utf-8").splitlines() if listed.exists() else ()):
        found = examples.setdefault(row["reason"], {})
        kind = re.sub(r"\d+", "", row["detail"])  # two files differ in the position of the fault
        if len(found) < EXAMPLES:
            found.setdefault(kind, f"{row['place']}: {row['detail']}".removesuffix(": "))
    others = {name: counts.get(name, 0) for name in ("copies_of_validation_dropped", "duplicates_dropped")}
    described = []
    for reason, count in {**others, **counts.get("passed_over", {})}.items():
        shown = "; ".join(examples.get(reason, {}).values())
        described.append((count, reason.replace("_", " ") + (f", such as {shown}" if shown else "")))
    return [(count, words) for count, words in described if count]
