"""Multiple choice from any corpus: which of four continuations belongs to a context?

A context comes from a held-out document, its true continuation from right behind it, three others from other held-out
documents. Scored as HellaSwag is, so there is an accuracy against 25 % by chance with nothing to download. Every ending
has the same number of tokens, so `acc` (by the sum of log-probabilities) and `acc_norm` (by their mean) agree here.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..data.shards import TokenStream
from . import Score

CONTEXT_TOKENS = 32
ENDING_TOKENS = 16
CHOICES = 4
READ_TOKENS = 2_000_000
"""How much of the held-out stream examples are made from."""


@dataclass(frozen=True)
class Example:
    """Token ids, (CONTEXT_TOKENS,), and four endings, (CHOICES, ENDING_TOKENS); `answer` is the true one."""

    context: np.ndarray
    endings: np.ndarray
    answer: int


def make_examples(stream: TokenStream, end_of_text: int, count: int, seed: int) -> list[Example]:
    """Up to `count` examples, the same ones for the same stream and seed; none if fewer than four documents are long
    enough.
    """
    piece = CONTEXT_TOKENS + ENDING_TOKENS
    tokens = stream.read(0, min(stream.tokens, READ_TOKENS))
    bounds = np.append(np.flatnonzero(tokens == end_of_text), len(tokens))
    documents = [tokens[a + 1 : b] for a, b in pairwise(bounds) if b - a - 1 >= piece]
    if len(documents) < CHOICES:
        return []
    generator = np.random.Generator(np.random.PCG64(seed))
    places = [(d, start) for d, text in enumerate(documents) for start in range(0, len(text) - piece + 1, piece)]
    examples = []
    for i in generator.permutation(len(places))[:count]:
        d, start = places[i]
        others = generator.permutation(np.delete(np.arange(len(documents)), d))[: CHOICES - 1]
        endings = [documents[d][start + CONTEXT_TOKENS : start + piece]]
        for other in others:
            at = generator.integers(0, len(documents[other]) - ENDING_TOKENS + 1)
            endings.append(documents[other][at : at + ENDING_TOKENS])
        answer = int(generator.integers(CHOICES))
        endings.insert(answer, endings.pop(0))
        examples.append(Example(documents[d][start : start + CONTEXT_TOKENS], np.stack(endings), answer))
    return examples


def cloze_sums(score: Score, examples: list[Example], device: torch.device, rank: int, world_size: int) -> Tensor:
    """One rank's share of the examples.

    Shapes:
        returns (3,) float64: right by the sum, right by the mean, examples
    """
    sums = torch.zeros(3, dtype=torch.float64)
    mine = examples[rank::world_size]
    for start in range(0, len(mine), 8):
        batch = mine[start : start + 8]
        rows = np.concatenate([_rows(example) for example in batch]).astype(np.int64)  # (B 4, context + ending)
        tokens = torch.from_numpy(rows).to(device)
        targets = tokens[:, 1:].clone()
        targets[:, : CONTEXT_TOKENS - 1] = -1  # only the endings are asked
        log_probs, _ = score(tokens[:, :-1], targets)
        totals = log_probs.sum(dim=1).view(len(batch), CHOICES).cpu()  # (B, 4)
        answers = torch.tensor([example.answer for example in batch])
        right = (totals.argmax(dim=1) == answers).sum()
        right_by_mean = ((totals / ENDING_TOKENS).argmax(dim=1) == answers).sum()
        sums += torch.stack((right, right_by_mean, torch.tensor(len(batch)))).double()
    return sums


def finish(sums: Tensor) -> dict[str, float]:
    """Figures from the sums over all ranks."""
    right, right_by_mean, n = sums.tolist()
    acc = right / n
    return {
        "acc": acc,
        "acc_norm": right_by_mean / n,
        "acc_stderr": math.sqrt(acc * (1 - acc) / n),
        "n_examples": int(n),
    }


def _rows(example: Example) -> np.ndarray:
    """Each ending behind the context, (CHOICES, CONTEXT_TOKENS + ENDING_TOKENS)."""
    return np.concatenate((np.tile(example.context, (CHOICES, 1)), example.endings), axis=1)
