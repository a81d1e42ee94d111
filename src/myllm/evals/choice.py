"""Scores which of several endings continues a text, as in HellaSwag, or which word ends it: for all tasks of tasks.py.

`acc` takes the ending with the highest sum of log-probabilities, `acc_norm` the one with the highest per character (or
per token, in HellaSwag's nanogpt protocol). No end-of-text token comes first. A text that does not fit into the context
together with its ending loses its beginning. All of this is as in lm-evaluation-harness.

Shapes: N questions of a batch, M endings of it, P tokens of the shared prefixes, T tokens of a row.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from myllm.distributed.collectives import DistContext
from myllm.errors import UserError

from .tasks import Question

Encode = Callable[[str], np.ndarray]
ScoreContinuations = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`Transformer.score_continuations`: prefixes (B, P), the prefix of each row (M,), tokens and targets (M, T), to
log-probabilities (M, T). Targets of -1 are ignored."""
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""`Transformer.evaluate`: tokens and targets (M, T) to log-probabilities, ranks and highest probabilities (M, T)."""

BATCH_SIZE = 16
"""Questions scored together."""


@dataclass(frozen=True)
class TokenizedQuestion:
    """A question in token ids."""

    contexts: tuple[np.ndarray, ...]
    """One for all endings, or one for each: where the question has one for each, or where they had to be cut."""
    endings: tuple[np.ndarray, ...]
    lengths: tuple[int, ...]
    """acc_norm divides the log-probability of each ending by this."""
    answer: int


# -- tokenizing -------------------------------------------------------------------------------------------------------


def tokenize_questions(
    questions: list[Question], encode: Encode, end_of_text: int, context_length: int, separately: bool = False
) -> list[TokenizedQuestion]:
    """The questions in tokens, cut to fit a model's context.

    Args:
        end_of_text: replaces an empty text, since the first token of an ending needs a token before it.
        separately: tokenize endings without their text, and normalize by tokens, not characters.

    Raises:
        UserError: an ending alone does not fit.
    """
    tokenized = []
    for number, question in enumerate(questions):
        pairs = _tokenize_separately(question, encode) if separately else _tokenize_together(question, encode)
        contexts = tuple(
            context if len(context) else np.array([end_of_text]) for context, _ in pairs[: len(question.contexts)]
        )
        endings = tuple(ending for _, ending in pairs)
        longest = max(map(len, endings))
        if longest > context_length:
            raise UserError(
                f"an ending of example {number:,} has {longest} tokens, the model's context is {context_length}; train "
                "a model with a larger model.max_seq_len"
            )
        if max(map(len, contexts)) + longest - 1 > context_length:  # the last token of an ending is only a target
            contexts = contexts if len(contexts) > 1 else contexts * len(endings)
            contexts = tuple(
                context[-(context_length + 1 - len(ending)) :]
                for context, ending in zip(contexts, endings, strict=True)
            )
        lengths = tuple(map(len, endings if separately else question.endings))
        tokenized.append(TokenizedQuestion(contexts, endings, lengths, question.answer))
    return tokenized


def _tokenize_together(question: Question, encode: Encode) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each ending with its context, as lm-evaluation-harness tokenizes them.

    It tokenizes the context alone and together with the ending. The ending's tokens are those after as many tokens as
    the context alone has.
    """
    encoded = {}
    pairs = []
    for context, ending in _pairs(question):
        stripped = context.rstrip()  # trailing spaces of the context belong to the ending
        if context not in encoded:
            encoded[context] = encode(stripped)
        pairs.append((encoded[context], encode(f"{context} {ending}")[len(encoded[context]) :]))
    return pairs


def _tokenize_separately(question: Question, encode: Encode) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(encode(context), encode(f" {ending}")) for context, ending in _pairs(question)]


def _pairs(question: Question) -> Iterator[tuple[str, str]]:
    contexts = question.contexts
    return zip(contexts if len(contexts) > 1 else contexts * len(question.endings), question.endings, strict=True)


# -- scoring ----------------------------------------------------------------------------------------------------------


def choice_sums(
    score: ScoreContinuations, questions: list[TokenizedQuestion], dist: DistContext, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Counts over one rank's share of the questions.

    Shapes:
        returns (4,) float64: correct by the sum, correct by the normalized sum, expected correct by guessing, questions
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for i, totals in ending_log_probs(score, questions, dist, batch_size):
        question = questions[i]
        correct = int(totals.argmax()) == question.answer
        correct_by_norm = int((totals / torch.tensor(question.lengths)).argmax()) == question.answer
        sums += torch.tensor([correct, correct_by_norm, 1 / len(totals), 1], dtype=torch.float64)
    return sums


def ending_log_probs(
    score: ScoreContinuations, questions: list[TokenizedQuestion], dist: DistContext, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[int, Tensor]]:
    """The index of each of this rank's questions, and the summed log-probabilities of its endings.

    Shapes:
        yields (endings,) float64, on the CPU
    """
    for indices in _batches(questions, dist, batch_size):
        batch = [questions[i] for i in indices]
        shared = min(len(context) for question in batch for context in question.contexts)
        tensors = _to_rows(batch, shared - 1)  # the last token of each context predicts the ending
        log_probs = score(*(tensor.to(dist.device) for tensor in tensors))  # (M, T)
        totals = log_probs.cpu().double().sum(dim=1)
        yield from zip(indices, totals.split([len(question.endings) for question in batch]), strict=True)


def last_word_sums(
    evaluate: Evaluate, questions: list[TokenizedQuestion], dist: DistContext, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Counts over one rank's share of questions with a single ending.

    Shapes:
        returns (4,) float64: endings of which every token is the most likely one, sums of their log-probabilities and
        of their squares, questions
    """
    sums = torch.zeros(4, dtype=torch.float64)
    for _, log_prob, is_greedy in last_word_log_probs(evaluate, questions, dist, batch_size):
        sums += torch.tensor([is_greedy, log_prob, log_prob**2, 1], dtype=torch.float64)
    return sums


def last_word_log_probs(
    evaluate: Evaluate, questions: list[TokenizedQuestion], dist: DistContext, batch_size: int = BATCH_SIZE
) -> Iterator[tuple[int, float, bool]]:
    """The index of each of this rank's questions, its ending's log-probability, and whether it is the greedy one."""
    for indices in _batches(questions, dist, batch_size):
        _, _, tokens, targets = _to_rows([questions[i] for i in indices], 0)
        log_probs, ranks, _ = evaluate(tokens.to(dist.device), targets.to(dist.device))  # (N, T), 0 where ignored
        totals, is_greedy = log_probs.cpu().double().sum(dim=1), (ranks == 0).all(dim=1)
        yield from zip(indices, totals.tolist(), is_greedy.tolist(), strict=True)


def _batches(questions: list[TokenizedQuestion], dist: DistContext, batch_size: int) -> list[list[int]]:
    """Indices of this rank's questions.

    Questions are sorted by length and batched before ranks share the batches, so batches are the same for any number of
    ranks.
    """

    def size(i: int) -> tuple[int, int]:
        return max(map(len, questions[i].contexts)), max(map(len, questions[i].endings))

    by_size = sorted(range(len(questions)), key=size)
    batches = [by_size[start : start + batch_size] for start in range(0, len(by_size), batch_size)]
    return batches[dist.rank :: dist.world_size]


def _to_rows(batch: list[TokenizedQuestion], prefix_length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `ScoreContinuations` for the endings of a batch, in their order.

    Contexts of a batch have similar lengths, but not the same. The prefix is what all of them have; the rest of each
    context precedes its endings. So nothing is padded on the left, and every token is at its position.

    Shapes:
        returns prefixes (contexts, P), owners (M,), tokens and targets (M, T)
    """
    contexts = [context for question in batch for context in question.contexts]
    owners, rows, first = [], [], 0
    for question in batch:
        for choice, ending in enumerate(question.endings):
            owner = choice if len(question.contexts) > 1 else 0
            owners.append(first + owner)
            rows.append((question.contexts[owner][prefix_length:], ending))
        first += len(question.contexts)
    width = max(len(rest) + len(ending) for rest, ending in rows) - 1
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    targets = np.full((len(rows), width), -1, dtype=np.int64)
    for m, (rest, ending) in enumerate(rows):
        row = np.concatenate((rest, ending))
        tokens[m, : len(row) - 1] = row[:-1]
        targets[m, len(rest) - 1 : len(row) - 1] = ending
    prefixes = np.stack([context[:prefix_length] for context in contexts]).astype(np.int64)
    return torch.from_numpy(prefixes), torch.tensor(owners), torch.from_numpy(tokens), torch.from_numpy(targets)


# -- metrics ----------------------------------------------------------------------------------------------------------


def finish(sums: Tensor) -> dict[str, float]:
    """Metrics from `choice_sums` over all ranks, with standard errors as in lm-eval."""
    correct, correct_by_norm, by_chance, n = sums.tolist()
    acc, acc_norm = correct / n, correct_by_norm / n
    return {
        "acc": acc,
        "acc_norm": acc_norm,
        "acc_stderr": _standard_error(acc, n),
        "acc_norm_stderr": _standard_error(acc_norm, n),
        "chance": by_chance / n,
        "n_examples": int(n),
    }


def finish_last_word(sums: Tensor) -> dict[str, float]:
    """Metrics from `last_word_sums` over all ranks: perplexity is of whole words, as in lm-eval."""
    correct, total, squares, n = sums.tolist()
    acc, mean = correct / n, total / n
    variance = max(squares / n - mean**2, 0) * n / (n - 1) if n > 1 else math.nan
    perplexity = math.exp(-mean) if mean > -700 else math.inf
    return {
        "acc": acc,
        "acc_stderr": _standard_error(acc, n),
        "perplexity": perplexity,
        "perplexity_stderr": perplexity * math.sqrt(variance / n),  # of exp(x), to first order
        "chance": 0.0,
        "n_examples": int(n),
    }


def _standard_error(accuracy: float, n: float) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / (n - 1)) if n > 1 else math.nan
