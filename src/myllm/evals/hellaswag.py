"""HellaSwag: which of four endings belongs to a text? Two protocols, which give other numbers for the same model.

    nanogpt    the text as it stands, " " + ending tokenised apart; acc_norm by the mean log-probability a token.
               Source: hellaswag.py of build-nanogpt and of llm.c. GPT-2 124M: acc_norm 29.5 %.
    lm-eval    the activity in front, bracketed remarks removed; text and ending tokenised together; acc_norm by the
               log-probability a character. Source: lm-evaluation-harness, its task hellaswag. GPT-2 124M: acc 28.9 %,
               acc_norm 31.1 %.

`acc` is by the sum of the ending's log-probabilities in both. Neither puts an end-of-text token in front. A text that
does not fit the model's window with its ending loses its beginning.

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

from myllm.errors import UserError

from .scoring import ScoreContinuations

Protocol = Literal["nanogpt", "lm-eval"]
Encode = Callable[[str], np.ndarray]

CHOICES = 4
BATCH_SIZE = 16
"""Examples scored together."""


@dataclass(frozen=True)
class Example:
    """A row of the data set, as it stands."""

    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class TokenizedExample:
    """An example in token ids, made once and kept."""

    contexts: tuple[np.ndarray, ...]
    """One for all endings, or one for each where they had to be cut."""
    endings: tuple[np.ndarray, ...]
    lengths: tuple[int, ...]
    """What acc_norm divides each ending's sum by."""
    answer: int


# -- texts to tokens --------------------------------------------------------------------------------------------------


def tokenize_examples(
    examples: list[Example], encode: Encode, end_of_text: int, window: int, protocol: Protocol = "nanogpt"
) -> list[TokenizedExample]:
    """The examples as a protocol shows them to a model that looks at `window` tokens.

    Args:
        end_of_text: stands in for an empty text, so that there is something to go on from.

    Raises:
        UserError: an ending alone does not fit.
    """
    tokens_of = {"nanogpt": nanogpt_tokens, "lm-eval": lm_eval_tokens}[protocol]
    items = []
    for number, example in enumerate(examples):
        context, endings, lengths = tokens_of(example, encode)
        if not len(context):
            context = np.array([end_of_text], dtype=np.uint16)
        longest = max(map(len, endings))
        if longest > window:
            raise UserError(
                f"HellaSwag needs a longer context: an ending of example {number:,} has {longest} tokens, the model "
                f"looks at {window}; train one with a larger model.max_seq_len"
            )
        contexts = (context,)
        if len(context) + longest - 1 > window:  # the last token of an ending is never read
            contexts = tuple(context[-(window + 1 - len(ending)) :] for ending in endings)
        items.append(TokenizedExample(contexts, endings, lengths, example.label))
    return items


Tokens = tuple[np.ndarray, tuple[np.ndarray, ...], tuple[int, ...]]


def nanogpt_tokens(example: Example, encode: Encode) -> Tokens:
    """Context, endings, and each ending's number of tokens."""
    endings = tuple(encode(" " + ending) for ending in example.endings)
    return encode(example.ctx), endings, tuple(map(len, endings))


def lm_eval_tokens(example: Example, encode: Encode) -> Tokens:
    """Context, endings, and each ending's number of characters.

    The harness tokenises the context alone and with each ending, and takes for the ending what lies behind the
    context's number of tokens.
    """
    context = clean_text(f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}")
    choices = [clean_text(ending) for ending in example.endings]
    stripped = context.rstrip()  # spaces at the context's end go to the ending
    between = context[len(stripped) :] + " "
    tokens = encode(stripped)
    endings = tuple(encode(stripped + between + choice)[len(tokens) :] for choice in choices)
    return tokens, endings, tuple(map(len, choices))


def clean_text(text: str) -> str:
    """A text without the marks that WikiHow's pages left in it, as lm-eval cleans it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# -- scoring ----------------------------------------------------------------------------------------------------------


def hellaswag_sums(
    score: ScoreContinuations,
    items: list[TokenizedExample],
    device: torch.device,
    rank: int,
    world_size: int,
    batch: int = BATCH_SIZE,
) -> Tensor:
    """One rank's share of the examples.

    Shapes:
        returns (3,) float64: right by the sum, right by the normalized sum, examples
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for numbers, totals in ending_log_probs(score, items, device, rank, world_size, batch):
        lengths = torch.tensor([items[i].lengths for i in numbers], dtype=torch.float64)  # (N, CHOICES)
        answers = torch.tensor([items[i].answer for i in numbers])
        right = (totals.argmax(dim=1) == answers).sum()
        right_by_norm = ((totals / lengths).argmax(dim=1) == answers).sum()
        sums += torch.stack((right, right_by_norm, torch.tensor(len(numbers)))).double()
    return sums


def ending_log_probs(
    score: ScoreContinuations,
    items: list[TokenizedExample],
    device: torch.device,
    rank: int,
    world_size: int,
    batch: int = BATCH_SIZE,
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of this rank's examples, a batch at a time, with each ending's summed log-probability.

    Batches are made before they are dealt to ranks, so each holds the same examples for any number of ranks.

    Shapes:
        each (N, CHOICES) float64, on the CPU
    """
    by_length = sorted(range(len(items)), key=lambda i: (max(map(len, items[i].contexts)), _longest(items[i])))
    batches = [by_length[start : start + batch] for start in range(0, len(by_length), batch)]
    for numbers in batches[rank::world_size]:
        tensors = _rows([items[i] for i in numbers])
        log_probs, _ = score(*(part.to(device) for part in tensors))  # (M, T)
        yield numbers, log_probs.cpu().double().sum(dim=1).view(-1, CHOICES)


def _longest(item: TokenizedExample) -> int:
    return max(map(len, item.endings))


def _rows(batch: list[TokenizedExample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `ScoreContinuations` takes, for the endings of a batch in their order.

    Contexts are of about one length, not of exactly one: what all have is their prefix, and the rest of each stands
    in front of its endings. So nothing is padded on the left, and every token is where it belongs.

    Shapes:
        returns prefixes (contexts, P), owners (M,), tokens and targets (M, T); M = N CHOICES
    """
    contexts = [context for item in batch for context in item.contexts]
    shared = min(map(len, contexts)) - 1  # P: the last token of each is read with the ending, which it predicts
    owners, rows = [], []
    first = 0
    for item in batch:
        for choice, ending in enumerate(item.endings):
            own = choice if len(item.contexts) > 1 else 0
            owners.append(first + own)
            rows.append((item.contexts[own][shared:], ending))
        first += len(item.contexts)
    width = max(len(rest) + len(ending) for rest, ending in rows) - 1
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    targets = np.full((len(rows), width), -1, dtype=np.int64)
    for m, (rest, ending) in enumerate(rows):
        whole = np.concatenate((rest, ending))
        tokens[m, : len(whole) - 1] = whole[:-1]
        targets[m, len(rest) - 1 : len(whole) - 1] = ending
    prefixes = np.stack([context[:shared] for context in contexts]).astype(np.int64)
    return tuple(torch.from_numpy(part) for part in (prefixes, np.array(owners), tokens, targets))


def finish(sums: Tensor) -> dict[str, float]:
    """Figures from the sums over all ranks; standard errors of a mean of n examples, as lm-eval gives them."""
    right, right_by_norm, n = sums.tolist()
    acc, acc_norm = right / n, right_by_norm / n
    return {
        "acc": acc,
        "acc_norm": acc_norm,
        "acc_stderr": _standard_error(acc, n),
        "acc_norm_stderr": _standard_error(acc_norm, n),
        "n_examples": int(n),
    }


def _standard_error(share: float, n: float) -> float:
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan
