"""Multiple choice from any corpus: which of four continuations belongs to a context?

A context comes from a held-out document, its true continuation from right behind it, three others from right behind
contexts of other held-out documents. Scored as HellaSwag is, so there is an accuracy against 25 % by chance with
nothing to download. Every ending has the same number of tokens, so `acc` (by the sum of log-probabilities) and
`acc_norm` (by their mean) agree here.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from myllm.data.dataset import TokenStream

from .scoring import Score

CONTEXT_TOKENS = 32
ENDING_TOKENS = 16
CHOICES = 4
PROTOCOL = 2
"""How examples are drawn. 1: other endings by document, true ones by place, so that chance was not 25 %."""
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
    enough, and never more than there are places for.

    Four documents are drawn, each with a chance in proportion to its length, and a place in each. Which of the four
    endings gets its own context is decided last, so that nothing but the context can tell: a model that does not look
    at it is right in exactly a quarter of the cases, whatever the text. That is worth the example that comes twice.
    """
    piece = CONTEXT_TOKENS + ENDING_TOKENS
    tokens = _read_stream(stream)
    bounds = np.append(np.flatnonzero(tokens == end_of_text), len(tokens))
    documents = [tokens[a + 1 : b] for a, b in pairwise(bounds) if b - a - 1 >= piece]
    if len(documents) < CHOICES:
        return []
    generator = np.random.Generator(np.random.PCG64(seed))
    places = np.array([len(document) // piece for document in documents])
    examples = []
    for _ in range(min(count, int(places.sum()))):
        # The first of several alarms, each ringing at a rate of its own, is one in proportion to its rate.
        drawn = np.argsort(generator.exponential(size=len(documents)) / places)[:CHOICES]
        starts = piece * generator.integers(0, places[drawn])
        passages = np.stack([documents[d][start : start + piece] for d, start in zip(drawn, starts, strict=True)])
        answer = int(generator.integers(CHOICES))
        examples.append(Example(passages[answer, :CONTEXT_TOKENS], passages[:, CONTEXT_TOKENS:], answer))
    return examples


def blind_accuracy(stream: TokenStream, examples: list[Example]) -> float:
    """The score of a model that knows how often each token comes in the held-out text, and sees no context.

    Within a few standard errors of a quarter, sqrt(3 / (16 n)); what a model scores beyond it is understanding.
    """
    counts = np.maximum(np.bincount(_read_stream(stream)), 1)
    scores = np.log(counts)[np.stack([example.endings for example in examples])].sum(axis=-1)  # (N, CHOICES)
    return float(np.mean(scores.argmax(axis=1) == [example.answer for example in examples]))


def why_unavailable(stream: TokenStream, end_of_text: int, context: int) -> str | None:
    """For people: why there can be no cloze; None where there can.

    Args:
        context: tokens that the model reads at once.
    """
    piece = CONTEXT_TOKENS + ENDING_TOKENS
    if context < piece:
        return f"cloze needs a context of {piece} tokens, model.max_seq_len is {context}"
    if not make_examples(stream, end_of_text, 1, 0):
        return (
            f"cloze needs {CHOICES} held-out documents of at least {piece} tokens; use more text, or a larger "
            "data.val_tokens if less than a tenth of the text is held out"
        )
    return None


def _read_stream(stream: TokenStream) -> np.ndarray:
    return stream.read(0, min(stream.tokens, READ_TOKENS))


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


def finish(sums: Tensor, blind: float) -> dict[str, float]:
    """Figures from the sums over all ranks.

    Args:
        blind: `blind_accuracy` of the same examples.
    """
    right, right_by_mean, n = sums.tolist()
    acc = right / n
    return {
        "acc": acc,
        "acc_norm": right_by_mean / n,
        "acc_stderr": math.sqrt(acc * (1 - acc) / n),
        "acc_blind": blind,
        "n_examples": int(n),
    }


def _rows(example: Example) -> np.ndarray:
    """Each ending behind the context, (CHOICES, CONTEXT_TOKENS + ENDING_TOKENS)."""
    return np.concatenate((np.tile(example.context, (CHOICES, 1)), example.endings), axis=1)
