"""Loss, perplexity, bits a byte and token accuracy on the held-out stream: the same tokens every time."""

import math

import numpy as np
import torch
from torch import Tensor

from ..data.loader import batch_of
from ..data.shards import TokenStream
from ..metrics import perplexity
from . import Score


def validation_sums(
    score: Score,
    stream: TokenStream,
    n_sequences: int,
    seq_len: int,
    batch_size: int,
    token_bytes: Tensor,
    rank: int,
    world_size: int,
) -> Tensor:
    """One rank's share of the stream's first `n_sequences` sequences.

    Shapes:
        token_bytes (V,), bytes of text a token stands for, on the device; returns (4,) float64: summed loss in nats,
        tokens, bytes, hits
    """
    device = token_bytes.device
    mine = np.arange(n_sequences)[rank::world_size]
    # On the host in float64: sums over millions of tokens, and MPS has no float64.
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(mine), batch_size):
        tokens, targets = (part.to(device) for part in batch_of(stream, mine[start : start + batch_size], seq_len))
        log_probs, hits = score(tokens, targets)  # (B, T) each
        parts = (-log_probs, torch.ones_like(targets), token_bytes[targets], hits)
        sums += torch.stack([part.to("cpu", torch.float64).sum() for part in parts])
    return sums


def finish(sums: Tensor) -> dict[str, float]:
    """Figures from the sums over all ranks."""
    loss_sum, tokens, text_bytes, hits = sums.tolist()
    loss = loss_sum / tokens
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss_sum / math.log(2) / text_bytes if text_bytes else math.nan,
        "token_accuracy": hits / tokens,
        "n_tokens": int(tokens),
    }
