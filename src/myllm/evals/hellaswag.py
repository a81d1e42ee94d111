"""HellaSwag: which of four endings continues a text? Two protocols, which give different numbers for the same model.

    nanogpt    the text unchanged; " " + ending tokenized separately; acc_norm by the mean log-probability per token.
               Source: hellaswag.py of build-nanogpt and of llm.c. GPT-2 124M: acc_norm 29.5 %.
    lm-eval    the activity label first, bracketed remarks removed; text and ending tokenized together; acc_norm by the
               log-probability per character. Source: lm-evaluation-harness, task hellaswag. GPT-2 124M: acc 28.9 %,
               acc_norm 31.1 %.

Both take `acc` by the sum of the ending's log-probabilities, and put no end-of-text token first. A text that does not
fit into the context together with its ending loses its beginning.

Data: Zellers et al. 2019 (arXiv 1905.07830).

Shapes: N examples of a batch, M endings of it, P tokens of the shared prefixes, T tokens of a row.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from myllm.distributed.collectives import DistContext
from myllm.errors import UserError

Protocol = Literal["nanogpt", "lm-eval"]
Encode = Callable[[str], np.ndarray]
ScoreContinuations = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`Transformer.score_continuations`: prefixes (B, P), the prefix of each row (M,), tokens and targets (M, T), to
log-probabilities (M, T). Targets of -1 are ignored."""

CHOICES = 4
BATCH_SIZE = 16
"""Examples scored together."""


@dataclass(frozen=True)
class Example:
    """A row of the data set."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class TokenizedExample:
    """An example in token ids."""

    contexts: tuple[np.ndarray, ...]
    """One for all endings, or one for each ending if they had to be cut."""
    endings: tuple[np.ndarray, ...]
    lengths: tuple[int, ...]
    """acc_norm divides the log-probability of each ending by this."""
    answer: int


# -- tokenizing -------------------------------------------------------------------------------------------------------


def tokenize_examples(
    examples: list[Example], encode: Encode, end_of_text: int, context_length: int, protocol: Protocol = "nanogpt"
) -> list[TokenizedExample]:
    """The examples by a protocol, cut to fit a model's context.

    Args:
        end_of_text: replaces an empty text, since the first token of an ending needs a token before it.

    Raises:
        UserError: an ending alone does not fit.
    """
    tokenize = {"nanogpt": nanogpt_tokens, "lm-eval": lm_eval_tokens}[protocol]
    tokenized = []
    for number, example in enumerate(examples):
        context, endings, lengths = tokenize(example, encode)
        if not len(context):
            context = np.array([end_of_text])
        longest = max(map(len, endings))
        if longest > context_length:
            raise UserError(
                f"HellaSwag needs a longer context: an ending of example {number:,} has {longest} tokens, the model's "
                f"context is {context_length}; train a model with a larger model.max_seq_len"
            )
        contexts: tuple[np.ndarray, ...] = (context,)
        if len(context) + longest - 1 > context_length:  # the last token of an ending is only a target
            contexts = tuple(context[-(context_length + 1 - len(ending)) :] for ending in endings)
        tokenized.append(TokenizedExample(contexts, endings, lengths, example.label))
    return tokenized


Tokens = tuple[np.ndarray, tuple[np.ndarray, ...], tuple[int, ...]]


def nanogpt_tokens(example: Example, encode: Encode) -> Tokens:
    """Context, endings, and the number of tokens of each ending."""
    endings = tuple(encode(" " + ending) for ending in example.endings)
    return encode(example.ctx), endings, tuple(map(len, endings))


def lm_eval_tokens(example: Example, encode: Encode) -> Tokens:
    """Context, endings, and the number of characters of each ending.

    The harness tokenizes the context alone and together with each ending. The ending's tokens are those after as many
    tokens as the context alone has.
    """
    context = clean_text(f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}")
    choices = [clean_text(ending) for ending in example.endings]
    stripped = context.rstrip()  # trailing spaces of the context belong to the ending
    between = context[len(stripped) :] + " "
    tokens = encode(stripped)
    endings = tuple(encode(stripped + between + choice)[len(tokens) :] for choice in choices)
    return tokens, endings, tuple(map(len, choices))


def clean_text(text: str) -> str:
    """Remove the markup of WikiHow pages, as lm-eval does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# -- scoring ----------------------------------------------------------------------------------------------------------


def hellaswag_sums(
    score: ScoreContinuations, examples: list[TokenizedExample], dist: DistContext, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Counts over one rank's share of the examples.

    Shapes:
        returns (3,) float64: correct by the sum, correct by the normalized sum, examples
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for indices, totals in ending_log_probs(score, examples, dist, batch_size):
        lengths = torch.tensor([examples[i].lengths for i in indices], dtype=torch.float64)  # (N, CHOICES)
        answers = torch.tensor([examples[i].answer for i in indices])
        correct = (totals.argmax(dim=1) == answers).sum()
        correct_by_norm = ((totals / lengths).argmax(dim=1) == answers).sum()
        sums += torch.stack((correct, correct_by_norm, torch.tensor(len(indices)))).double()
    return sums


def ending_log_probs(
    score: ScoreContinuations, examples: list[TokenizedExample], dist: DistContext, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of this rank's examples: their indices, and the summed log-probability of each ending.

    Examples are sorted by length and batched before ranks share the batches, so batches are the same for any number of
    ranks.

    Shapes:
        yields (N, CHOICES) float64, on the CPU
    """

    def size(i: int) -> tuple[int, int]:
        return max(map(len, examples[i].contexts)), max(map(len, examples[i].endings))

    by_size = sorted(range(len(examples)), key=size)
    batches = [by_size[start : start + batch_size] for start in range(0, len(by_size), batch_size)]
    for indices in batches[dist.rank :: dist.world_size]:
        tensors = _to_rows([examples[i] for i in indices])
        log_probs = score(*(tensor.to(dist.device) for tensor in tensors))  # (M, T)
        yield indices, log_probs.cpu().double().sum(dim=1).view(-1, CHOICES)


def _to_rows(batch: list[TokenizedExample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `ScoreContinuations` for the endings of a batch, in their order.

    Contexts of a batch have similar lengths, but not the same. The prefix is what all of them have; the rest of each
    context precedes its endings. So nothing is padded on the left, and every token is at its position.

    Shapes:
        returns prefixes (contexts, P), owners (M,), tokens and targets (M, T); M = N CHOICES
    """
    contexts = [context for example in batch for context in example.contexts]
    prefix_length = min(map(len, contexts)) - 1  # the last token of each context predicts the ending
    owners, rows, first = [], [], 0
    for example in batch:
        for choice, ending in enumerate(example.endings):
            owner = choice if len(example.contexts) > 1 else 0
            owners.append(first + owner)
            rows.append((example.contexts[owner][prefix_length:], ending))
        first += len(example.contexts)
    width = max(len(rest) + len(ending) for rest, ending in rows) - 1
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    targets = np.full((len(rows), width), -1, dtype=np.int64)
    for m, (rest, ending) in enumerate(rows):
        row = np.concatenate((rest, ending))
        tokens[m, : len(row) - 1] = row[:-1]
        targets[m, len(rest) - 1 : len(row) - 1] = ending
    prefixes = np.stack([context[:prefix_length] for context in contexts]).astype(np.int64)
    return (
        torch.from_numpy(prefixes),
        torch.from_numpy(np.array(owners)),
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
    )


def finish(sums: Tensor) -> dict[str, float]:
    """Metrics from the sums over all ranks, with standard errors as in lm-eval."""
    correct, correct_by_norm, n = sums.tolist()
    acc, acc_norm = correct / n, correct_by_norm / n
    return {
        "acc": acc,
        "acc_norm": acc_norm,
        "acc_stderr": _standard_error(acc, n),
        "acc_norm_stderr": _standard_error(acc_norm, n),
        "n_examples": int(n),
    }


def _standard_error(accuracy: float, n: float) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else math.nan
