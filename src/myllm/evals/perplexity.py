"""How well a model predicts given tokens: loss, bits a byte, accuracy, top-5 and calibration.

A text of any length goes through in windows. Its tokens stand behind one end-of-text token; the first window scores as
many as the model looks at, and each later one the next `stride`, so every token is scored once, with at least
`context - stride` tokens before it once that many lie behind it. A smaller stride gives more context and costs more
windows: context / stride times the work. The last window is as long as the others and scores what is left.

Shapes: B windows, T tokens of a window, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from myllm.errors import UserError
from myllm.runs.logs import perplexity

from .scoring import Assess

TOP_K = 5
BINS = 15
"""Of confidence, each as wide."""


def windows(n_tokens: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Start and end of each window's inputs, and how many of its last tokens it scores.

    Args:
        n_tokens: the text's own, without the one in front.

    Raises:
        UserError: a stride that leaves tokens out.
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
    text: np.ndarray, end_of_text: int, context: int, stride: int, batch: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """One rank's windows of a text, as inputs and targets; a target of -1 was scored in an earlier window.

    Shapes:
        text (n,); gives (B, T) each, B at most `batch`
    """
    text = text.astype(np.int64)
    whole = np.concatenate((np.array([end_of_text]), text))
    # All are as long as the context, but where there is only one.
    mine = windows(len(text), context, stride)[rank::world_size]
    for first in range(0, len(mine), batch):
        part = mine[first : first + batch]
        tokens = np.stack([whole[start:end] for start, end, _ in part])
        targets = np.stack([whole[start + 1 : end + 1] for start, end, _ in part])
        for row, (start, end, scored) in zip(targets, part, strict=True):
            row[: end - start - scored] = -1
        yield torch.from_numpy(tokens), torch.from_numpy(targets)


def perplexity_sums(
    assess: Assess, batches: Iterable[tuple[Tensor, Tensor]], token_bytes: Tensor, device: torch.device
) -> Tensor:
    """Sums over batches of inputs and targets.

    Shapes:
        token_bytes (V,), bytes of text that each token stands for; returns (5 + 3 BINS,) float64: summed loss in nats,
        tokens, bytes, hits, hits among the likeliest TOP, then by bin of confidence: tokens, hits, summed confidence
    """
    sums = torch.zeros(5 + 3 * BINS, dtype=torch.float64)
    for tokens, targets in batches:
        log_probs, places, confidence = assess(tokens.to(device), targets.to(device))
        asked = (targets != -1).flatten()
        lost, likelier, sure = (
            part.cpu().flatten()[asked].double() for part in (-log_probs, places, confidence)
        )  # (n,) each; on the host, since MPS has no float64
        hits, among = (likelier == 0).double(), (likelier < TOP_K).double()
        bytes_ = token_bytes[targets.flatten()[asked]]
        parts = (lost, torch.ones_like(lost), bytes_, hits, among)
        bins = (sure * BINS).long().clamp(max=BINS - 1)
        table = torch.zeros(BINS, 3, dtype=torch.float64)
        table.index_add_(0, bins, torch.stack((torch.ones_like(sure), hits, sure), dim=1))
        sums += torch.cat((torch.stack([part.double().sum() for part in parts]), table.flatten()))
    return sums


def finish(sums: Tensor, text_bytes: int | None = None) -> dict[str, float]:
    """Figures from the sums over all ranks.

    Args:
        text_bytes: the text's UTF-8 length, where it is known; else the tokens' bytes count.
    """
    loss_sum, tokens, token_bytes, hits, among = sums[:5].tolist()
    n_bytes = token_bytes if text_bytes is None else text_bytes
    loss = loss_sum / tokens
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss_sum / math.log(2) / n_bytes if n_bytes else math.nan,
        "token_accuracy": hits / tokens,
        f"top{TOP_K}_accuracy": among / tokens,
        "calibration_error": expected_calibration_error(sums[5:].view(BINS, 3)),
        "n_tokens": int(tokens),
    }


def expected_calibration_error(table: Tensor) -> float:
    """How far accuracy is from confidence, on average over all tokens: 0 for a model that is right as often as it
    says.

    Source: Guo et al. 2017 (arXiv 1706.04599), equation 3, with the likeliest token as the prediction.

    Shapes:
        table (BINS, 3): tokens, hits, summed confidence
    """
    n, hits, confidence = table.unbind(dim=1)
    return float((hits - confidence).abs().sum() / n.sum())
