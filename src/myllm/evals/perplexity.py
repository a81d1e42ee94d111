"""How well a model predicts given tokens: loss, bits per byte, accuracy, top-5 accuracy and calibration.

A text of any length is scored by sliding window. One end-of-text token precedes its tokens. The first window scores a
whole context of tokens, each later window the next `stride`, so every token is scored exactly once, with at least
`context - stride` tokens before it (as far as the text has them). A smaller stride gives more context, at
context / stride times the work. The last window is as long as the others and scores the rest.

Shapes: B windows, T tokens of a window, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from myllm.data.sources.text_encoding import decode_text
from myllm.data.tokenizer.base import Tokenizer
from myllm.errors import UserError
from myllm.paths import user_path
from myllm.runs.logs import perplexity

TOP_K = 5
BINS = 15
"""Of confidence, all equally wide."""
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""`Transformer.evaluate`: from tokens and targets to log-probabilities, ranks (0 for the most likely token) and the
probability of the most likely token, (B, T) each. Targets of -1 are ignored."""


class Text(NamedTuple):
    """A text file in tokens."""

    tokens: np.ndarray
    n_bytes: int
    """Length of the text in UTF-8."""
    sha256: str
    """Of the file."""


def read_text(file: Path, tokenizer: Tokenizer) -> Text:
    """
    Raises:
        UserError: the file cannot be read, is not text, or is empty.
    """
    file = user_path(file)
    try:
        raw = file.read_bytes()
        text = decode_text(raw)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    tokens = tokenizer.encode(text)
    if not len(tokens):
        raise UserError(f"{file} is empty; expected a file with text")
    return Text(tokens, len(text.encode()), hashlib.sha256(raw).hexdigest())


def windows(n_tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Start and end of each window's inputs, and how many of its last tokens it scores.

    Args:
        n_tokens: length of the text, without the end-of-text token before it.

    Raises:
        UserError: the stride would skip tokens.
    """
    if not 1 <= stride <= context:
        raise UserError(
            f"the stride is {stride:,}, but must be at least 1 and at most the model's context, {context:,}"
        )
    found, scored = [], 0
    while scored < n_tokens:
        end = min(scored + (stride if scored else context), n_tokens)
        found.append((max(end - context, 0), end, end - scored))
        scored = end
    return found


def window_batches(
    text: np.ndarray, end_of_text: int, context: int, stride: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """One rank's windows of a text, as inputs and targets. A target of -1 was scored in an earlier window.

    Shapes:
        text (n,); yields (B, T) each, B at most `batch_size`
    """
    text = text.astype(np.int64)
    inputs = np.concatenate((np.array([end_of_text]), text))
    # All windows are equally long: only a single window may be shorter than the context.
    bounds = windows(len(text), context, stride)[rank::world_size]
    for first in range(0, len(bounds), batch_size):
        batch = bounds[first : first + batch_size]
        tokens = np.stack([inputs[start:end] for start, end, _ in batch])
        targets = np.stack([text[start:end] for start, end, _ in batch])
        for row, (start, end, scored) in zip(targets, batch, strict=True):
            row[: end - start - scored] = -1
        yield torch.from_numpy(tokens), torch.from_numpy(targets)


def perplexity_sums(
    evaluate: Evaluate, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor, device: torch.device
) -> Tensor:
    """Sums over batches of inputs and targets.

    Shapes:
        token_bytes (V,), bytes of text in each token; returns (5 + 3 BINS,) float64: summed loss in nats, tokens,
        bytes, correct predictions, correct in the top TOP_K; then for each bin: tokens, correct, summed confidence
    """
    sums = torch.zeros(5 + 3 * BINS, dtype=torch.float64)
    for tokens, targets in batches:
        scored = (targets != -1).flatten()
        # On the CPU, since MPS has no float64.
        log_probs, ranks, confidence = (
            values.cpu().flatten()[scored].double() for values in evaluate(tokens.to(device), targets.to(device))
        )  # (n,) each
        ones, correct, in_top_k = torch.ones_like(log_probs), (ranks == 0).double(), (ranks < TOP_K).double()
        n_bytes = token_bytes[targets.flatten()[scored]].double()
        bins = torch.zeros(BINS, 3, dtype=torch.float64)
        bin_of_token = (confidence * BINS).long().clamp(max=BINS - 1)
        bins.index_add_(0, bin_of_token, torch.stack((ones, correct, confidence), dim=1))
        totals = torch.stack((-log_probs, ones, n_bytes, correct, in_top_k)).sum(dim=1)
        sums += torch.cat((totals, bins.flatten()))
    return sums


def mix(sums: Tensor, weights: Sequence[float]) -> Tensor:
    """The sums over texts of which each has the given share of all tokens, so that their loss is the weighted mean.

    Shapes:
        sums (C, 5 + 3 BINS), one row for each text; returns (5 + 3 BINS,)
    """
    tokens = sums[:, 1]
    mixed = (torch.tensor(weights, dtype=sums.dtype) / tokens) @ sums * tokens.sum()
    mixed[1] = tokens.sum()  # exactly
    return mixed


def finish(sums: Tensor, text_bytes: int | None = None) -> dict[str, float]:
    """Metrics from the sums over all ranks.

    Args:
        text_bytes: length of the text in UTF-8, if known; otherwise the bytes of the tokens count.
    """
    loss_sum, tokens, token_bytes, correct, in_top_k = sums[:5].tolist()
    n_bytes = token_bytes if text_bytes is None else text_bytes
    loss = loss_sum / tokens
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss_sum / math.log(2) / n_bytes if n_bytes else math.nan,
        "token_accuracy": correct / tokens,
        f"top{TOP_K}_accuracy": in_top_k / tokens,
        "calibration_error": expected_calibration_error(sums[5:].view(BINS, 3)),
        "n_tokens": int(tokens),
    }


def expected_calibration_error(bins: Tensor) -> float:
    """The mean difference between accuracy and confidence: 0 for a model that is right as often as it predicts.

    Source: Guo et al. 2017 (arXiv 1706.04599), equation 3, with the most likely token as the prediction.

    Shapes:
        bins (BINS, 3): tokens, correct predictions, summed confidence
    """
    n, correct, confidence = bins.unbind(dim=1)
    return float((correct - confidence).abs().sum() / n.sum())
