"""Multiple choice from any corpus: which of four continuations belongs to a context?

The context is a passage of a held-out document and the correct ending is the text right after it. The three other
endings come right after passages of other held-out documents. Scored like HellaSwag, with nothing to download; chance
is 25 %. All endings have the same number of tokens, so `acc` (by the sum of log-probabilities) equals `acc_norm` (by
their mean).
"""

import math
from itertools import pairwise

import numpy as np
from torch import Tensor

from myllm.data.token_stream import TokenStream

from .choice import TokenizedQuestion

CONTEXT_TOKENS = 32
ENDING_TOKENS = 16
PASSAGE_TOKENS = CONTEXT_TOKENS + ENDING_TOKENS
CHOICES = 4
PROTOCOL = 2
"""How examples are drawn. In protocol 1, wrong endings were drawn by document and right ones by position, so chance was
not 25 %."""
READ_TOKENS = 2_000_000
"""Examples come from this many tokens at the start of the held-out stream."""


def make_examples(stream: TokenStream, end_of_text: int, count: int, seed: int) -> list[TokenizedQuestion]:
    """Up to `count` examples, at most one for each passage of the text; none if fewer than four documents are long
    enough. The same stream and seed give the same examples.

    Four documents are drawn with probabilities proportional to their lengths, and a passage in each. Which of the four
    contexts is shown is drawn last, so that only the context identifies the answer: a model that ignores it is right in
    exactly a quarter of the cases, whatever the text. This outweighs that an example may occur twice.
    """
    tokens = _read_stream(stream)
    bounds = np.append(np.flatnonzero(tokens == end_of_text), len(tokens))
    documents = [tokens[a + 1 : b] for a, b in pairwise(bounds) if b - a - 1 >= PASSAGE_TOKENS]
    if len(documents) < CHOICES:
        return []
    generator = np.random.Generator(np.random.PCG64(seed))
    n_passages = np.array([len(document) // PASSAGE_TOKENS for document in documents])
    examples = []
    for _ in range(min(count, int(n_passages.sum()))):
        # Weighted draw without replacement: the smallest of exponential variables with these rates.
        drawn = np.argsort(generator.exponential(size=len(documents)) / n_passages)[:CHOICES]
        starts = PASSAGE_TOKENS * generator.integers(0, n_passages[drawn])
        passages = np.stack(
            [documents[d][start : start + PASSAGE_TOKENS] for d, start in zip(drawn, starts, strict=True)]
        )
        answer = int(generator.integers(CHOICES))
        endings = tuple(passages[:, CONTEXT_TOKENS:])
        lengths = (ENDING_TOKENS,) * CHOICES
        examples.append(TokenizedQuestion((passages[answer, :CONTEXT_TOKENS],), endings, lengths, answer))
    return examples


def blind_accuracy(stream: TokenStream, examples: list[TokenizedQuestion]) -> float:
    """The accuracy of a unigram model of the held-out text, which ignores the context: a baseline.

    It lies within a few standard errors, sqrt(3 / (16 n)), of a quarter.
    """
    counts = np.maximum(np.bincount(_read_stream(stream)), 1)
    scores = np.log(counts)[np.stack([example.endings for example in examples])].sum(axis=-1)  # (N, CHOICES)
    return float(np.mean(scores.argmax(axis=1) == [example.answer for example in examples]))


def why_unavailable(examples: list[TokenizedQuestion], context: int) -> str | None:
    """Why cloze is not possible with these examples and this context, in tokens; None if it is."""
    if context < PASSAGE_TOKENS:
        return f"cloze needs a context of {PASSAGE_TOKENS} tokens, model.max_seq_len is {context}"
    if not examples:
        return (
            f"cloze needs {CHOICES} held-out documents of at least {PASSAGE_TOKENS} tokens; use more text, or a larger "
            "data.val_tokens if less than a tenth of the text is held out"
        )
    return None


def _read_stream(stream: TokenStream) -> np.ndarray:
    return stream.read(0, min(stream.tokens, READ_TOKENS))


def finish(sums: Tensor, blind: float) -> dict[str, float]:
    """Metrics from `choice.choice_sums` over all ranks.

    Args:
        blind: `blind_accuracy` of the same examples.
    """
    correct, _, _, n = sums.tolist()
    acc = correct / n
    return {
        "acc": acc,
        "acc_norm": acc,
        "acc_stderr": math.sqrt(acc * (1 - acc) / n),
        "acc_blind": blind,
        "n_examples": int(n),
    }
