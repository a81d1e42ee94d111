"""The held-out stream's first sequences: the same tokens every time. `perplexity` makes figures of them."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from myllm.data.dataloader import read_batch
from myllm.data.dataset import TokenStream


def validation_batches(
    stream: TokenStream, n_sequences: int, seq_len: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """One rank's share of the stream's first `n_sequences` sequences, as inputs and targets.

    Shapes:
        gives (B, seq_len) each, B at most `batch_size`
    """
    mine = np.arange(n_sequences)[rank::world_size]
    for start in range(0, len(mine), batch_size):
        yield read_batch(stream, mine[start : start + batch_size], seq_len)
